"""Stream: detections of the newest frame of a source that does not wait, such as a camera.

    source --reader thread--> the newest frame alone --caller's thread--> Predictor --> Seen

While one frame is being looked at the reader takes the next ones and keeps only the last, so a slow model sees fewer
frames and never old ones. `Seen.dropped` says how many it did not see. Where every image counts use `Predictor.batch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Condition, Thread
from typing import TYPE_CHECKING

from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from typing_extensions import Self

    from deploy.detections import Detections
    from deploy.predictor import Predictor

    Frame = Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Seen:
    """One frame that was looked at: its place in the source, from 0, and how many were passed over before it."""

    index: int
    dropped: int
    frame: Frame
    detections: Detections


class Stream:
    """Iterate over it to get `Seen`, newest frame first come; use it as a context manager, or `close` it.

    Frames are images of Pillow or uint8 RGB arrays (H, W, 3) that the source does not write to again; the source is
    read by one thread of its own, from the first iteration on. The last frame is always seen. What the source raises is
    raised to the caller, after the frame before it was seen.
    """

    def __init__(
        self,
        predictor: Predictor,
        frames: Iterable[Frame],
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> None:
        self._predictor = predictor
        self._frames = frames
        self._limits = score_threshold, max_detections
        self._changed = Condition()
        self._newest: tuple[int, Frame] | None = None
        self._error: BaseException | None = None
        self._ended = self._closed = False
        # A daemon: a camera that never answers again must not keep a program from ending.
        self._reader = Thread(target=self._read, name="headstart-stream", daemon=True)

    def __iter__(self) -> Iterator[Seen]:
        """Once: a source cannot be read again. Raises DeployError for the second time, and when it is closed."""
        if self._closed or self._reader.ident is not None:
            raise DeployError("stream: it was read or closed already; make a new one from a new source")
        self._reader.start()
        last = -1
        while (newest := self._take()) is not None:
            index, frame = newest
            (found,) = self._predictor([frame], *self._limits)
            yield Seen(index, index - last - 1, frame, found)
            last = index

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the reader, and waits for it: the frame that it is reading comes to its end first.

        Raises DeployError when the source does not come back within the timeout, in seconds.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._reader.ident is not None:
            self._reader.join(timeout_s)
            if self._reader.is_alive():
                raise DeployError(
                    f"stream: the source did not give or end a frame within {timeout_s:g} s; close the source itself"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take(self) -> tuple[int, Frame] | None:
        """The newest frame, once there is one that was not taken; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._ended or self._closed)
            if self._closed:
                return None
            newest, self._newest = self._newest, None
            if newest is None and self._error is not None:
                raise self._error
            return newest

    def _read(self) -> None:
        try:
            frames = iter(self._frames)
            for index, frame in enumerate(frames):
                with self._changed:
                    if self._closed:
                        break
                    self._newest = index, frame
                    self._changed.notify_all()
            if self._closed and hasattr(frames, "close"):
                frames.close()  # a generator's own clean-up, in the thread that ran it
        except BaseException as error:  # whatever it is, it is the caller's
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
