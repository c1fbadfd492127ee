"""Predictor: images in, detections out, through one contract, any backend and one post-processing.

decode -> prepare -> infer -> finish      each a method of its own, so that each can be timed
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.backend import Candidates, open_backend
from deploy.contract import Contract
from deploy.errors import DeployError
from deploy.image import Placement, decode
from deploy.postprocess import detect

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image
    from typing_extensions import Self

    from deploy.backend import Backend
    from deploy.detections import Detections
    from deploy.manifest import Model

    Source = Path | str | bytes | Image.Image | NDArray[np.uint8]


class Predictor:
    """A backend with the contract of its file, and which model of which bundle that is, if it is one. Use it as a
    context manager, or `close` it.
    """

    def __init__(self, backend: Backend, contract: Contract, model: Model | None = None) -> None:
        self.backend = backend
        self.contract = contract
        self.model = model

    @classmethod
    def open(cls, path: Path | str, backend: str | None = None, model: str | None = None, **settings: Any) -> Predictor:
        """A bundle's folder, or an exported file that carries its contract. `settings` are the backend's.

        Of a bundle with several models the fastest that runs on this device is taken (`deploy.selection`), or `model`,
        a file's name; a file that is none of a bundle is opened by its
        sidecar's backend, else by ONNX Runtime, unless `backend` names another. Raises
        DeployError when the bundle was changed, the file has no contract or the backend cannot be what it was asked to
        be.
        """
        path = Path(path)
        chosen = None
        if path.is_dir():
            from deploy.bundle import Bundle

            bundle = Bundle.open(path)
            if model is not None:
                chosen = bundle.model(model)
            else:
                chosen, provider = bundle.pick(backend, settings.get("provider"))
                if provider is not None:
                    settings = {**settings, "provider": provider}
            backend, file = backend or chosen.backend, path / chosen.file
        elif model is not None:
            raise DeployError(f"{path}: model {model!r} is chosen from a bundle's folder, and this is a file")
        else:
            file = path
        opened = open_backend(file, backend, **settings)
        try:
            contract = Contract.from_metadata(opened.metadata(), str(file))
            # release.json protects the model by its hash, and the model release.json by its contract.
            if chosen and contract != chosen.contract:
                raise DeployError(f"{path}: release.json's contract is not the model's; copy the bundle again")
            return cls(opened, contract, chosen)
        except Exception:
            opened.close()
            raise

    def decode(self, source: Source) -> Image.Image:
        """The upright RGB image; see `deploy.image.decode`."""
        return decode(source)

    def prepare(self, images: Sequence[Image.Image]) -> tuple[NDArray[np.uint8], list[Placement]]:
        """The images as one uint8 batch (B, H, W, 3), and where each lies in it."""
        prepared = [self.contract.image.prepare(image) for image in images]
        placements = [placement for _, placement in prepared]
        if len(prepared) == 1:
            return prepared[0][0][None], placements  # a view, where stacking would copy
        return np.stack([array for array, _ in prepared]), placements

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """The backend's candidates, before NMS; a file that takes one image a call is called for each."""
        if not self.contract.one_by_one or len(images_BHWC) == 1:
            return self.backend.infer(images_BHWC)
        found = [self.backend.infer(images_BHWC[index : index + 1]) for index in range(len(images_BHWC))]
        return Candidates(
            np.concatenate([one.boxes_BN4 for one in found]),
            np.concatenate([one.scores_BN for one in found]),
            np.concatenate([one.labels_BN for one in found]),
        )

    def finish(
        self,
        candidates: Candidates,
        placements: Sequence[Placement],
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """Detections of each image, in pixels of the originals; thresholds are the contract's unless given."""
        return [
            detect(candidates.image(index), self.contract, placement, score_threshold, max_detections)
            for index, placement in enumerate(placements)
        ]

    def __call__(
        self, sources: Sequence[Source], score_threshold: float | None = None, max_detections: int | None = None
    ) -> list[Detections]:
        """Detections of some images, inferred together as one batch."""
        if not sources:
            return []
        batch, placements = self.prepare([self.decode(source) for source in sources])
        return self.finish(self.infer(batch), placements, score_threshold, max_detections)

    def batch(
        self,
        sources: Iterable[Source],
        batch_size: int,
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> Iterator[Detections]:
        """Detections of any number of images, one by one, inferred `batch_size` at a time."""
        if batch_size < 1:
            raise ValueError(f"batch: batch_size must be at least 1, given {batch_size}")
        remaining = iter(sources)
        while some := list(islice(remaining, batch_size)):
            yield from self(some, score_threshold, max_detections)

    def close(self) -> None:
        """Closes the backend."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
