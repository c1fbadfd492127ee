"""Backend: one exported file, open on one runtime. Images in, candidates out. Implementations are the files of
`backends/`.

Shape letters: B images, H height, W width, C channels, N candidates an image.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Candidates:
    """Decoded boxes before NMS, xyxy in input pixels, a fixed number an image, highest score first."""

    boxes_BN4: NDArray[np.float32]
    scores_BN: NDArray[np.float32]
    labels_BN: NDArray[np.int64]

    def __post_init__(self) -> None:
        batch = self.scores_BN.shape
        if len(batch) != 2 or self.boxes_BN4.shape != (*batch, 4) or self.labels_BN.shape != batch:
            raise ValueError(
                "candidates: boxes (B, N, 4), scores (B, N) and labels (B, N) are wanted, given "
                f"{self.boxes_BN4.shape}, {batch} and {self.labels_BN.shape}"
            )

    def __len__(self) -> int:
        return len(self.scores_BN)

    def image(self, index: int) -> Candidates:
        """Those of one image, B = 1; a view."""
        one = slice(index, index + 1)
        return Candidates(self.boxes_BN4[one], self.scores_BN[one], self.labels_BN[one])


class Backend(ABC):
    """An open file. Timing a call of `infer` times the work: it returns when the results are on the host, in fresh
    arrays.
    """

    @abstractmethod
    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """Candidates of uint8 RGB images. Raises DeployError when their shape or type is not what the file takes."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Runtime, version, device, provider really used, precision: what a measured number must carry. JSON values."""

    def metadata(self) -> dict[str, str]:
        """What is written in the file or beside it; its contract is found there."""
        return {}

    def close(self) -> None:  # noqa: B027 - not abstract: most backends hold nothing that must be given back by hand
        """Gives back what the file holds; nothing may be inferred afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def names() -> list[str]:
    """The backends there are: the files of `deploy/backends/`."""
    import deploy.backends

    return sorted(module.name for module in pkgutil.iter_modules(deploy.backends.__path__))


def backend_class(name: str) -> type[Backend]:
    """The class in a file of `deploy/backends/`. Raises DeployError for an unknown name."""
    if name not in names():
        raise DeployError(f"backend: there is no {name!r}; choose one of {', '.join(names())}")
    module = importlib.import_module(f"deploy.backends.{name}")
    found = [
        one
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, Backend) and one.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise DeployError(f"backend {name}: one Backend class is wanted in its file, found {len(found)}")
    return found[0]


def open_backend(file: Path, name: str = "onnxruntime", **settings: Any) -> Backend:
    """Opens an exported file on the backend of that name.

    Raises DeployError for an unknown name, setting or a file it cannot open.
    """
    found = backend_class(name)
    known = [one for one in inspect.signature(found).parameters if one != "file"]
    if unknown := sorted(set(settings) - set(known)):
        raise DeployError(f"backend {name}: unknown setting {', '.join(unknown)}; it knows {', '.join(known)}")
    make: Callable[..., Backend] = found
    return make(Path(file), **settings)
