"""Backend: one exported file, open on one runtime. Images in, candidates out. Implementations are the files of
`backends/`.

Shape letters: B images, H height, W width, C channels, N candidates an image.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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

    SUFFIX: ClassVar[str] = ".onnx"  # of the files it opens; another than .onnx is that of an engine, which it builds

    @classmethod
    def build(cls, onnx: Path, file: Path, *_: Any, **settings: Any) -> dict[str, Any]:
        """Makes this backend's file and its sidecar from an ONNX file that carries a contract; returns the sidecar.

        Raises DeployError where it cannot, or what it would make is not what was asked for; then there is no file.
        """
        raise DeployError(f"{onnx}: backend {cls.name()} takes the ONNX file as it is; nothing is to be built")

    @classmethod
    def made_for(cls, **settings: Any) -> dict[str, Any]:
        """What a machine must have to run what `build` makes here with these settings. JSON values.

        Raises DeployError where nothing can be built here.
        """
        return {}

    @classmethod
    def obstacle(cls, made_for: dict[str, Any]) -> str | None:
        """What keeps this machine from running a file that was made for such a one; None where nothing is known to."""
        return None

    @classmethod
    def name(cls) -> str:
        """Its name in settings: that of its file."""
        return cls.__module__.rpartition(".")[2]

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
    import pkgutil

    import deploy.backends

    return sorted(module.name for module in pkgutil.iter_modules(deploy.backends.__path__))


def backend_class(name: str) -> type[Backend]:
    """The class in a file of `deploy/backends/`. Raises DeployError for an unknown name."""
    # Not by `names`: to list a folder costs a device more than to ask for one file.
    if not name.isidentifier() or find_spec(f"deploy.backends.{name}") is None:
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


def open_backend(file: Path, name: str | None = None, **settings: Any) -> Backend:
    """Opens an exported file on the backend of that name: by default that of the sidecar beside it, else onnxruntime.

    Raises DeployError for an unknown name, setting or a file it cannot open.
    """
    if name is None:
        from deploy import sidecar

        beside = sidecar.peek(Path(file))
        name = beside.backend if beside else "onnxruntime"
    found = backend_class(name)
    _refuse_unknown(settings, [one for one in inspect.signature(found).parameters if one != "file"], name)
    make: Callable[..., Backend] = found
    return make(Path(file), **settings)


def build_engine(onnx: Path, file: Path, name: str, **settings: Any) -> dict[str, Any]:
    """Builds an engine of the backend of that name from an ONNX file; returns its sidecar.

    Raises DeployError for an unknown name or setting, and where `Backend.build` does.
    """
    found = backend_class(name)
    if found.SUFFIX != ".onnx":  # else Backend.build says that nothing is to be built
        _refuse_unknown(settings, build_settings(name), name)
    return found.build(Path(onnx), Path(file), **settings)


def build_settings(name: str) -> list[str]:
    """The settings that `build_engine` knows for a backend."""
    return [one for one in inspect.signature(backend_class(name).build).parameters if one not in ("onnx", "file")]


def _refuse_unknown(settings: dict[str, Any], known: list[str], name: str) -> None:
    if unknown := sorted(set(settings) - set(known)):
        raise DeployError(f"backend {name}: unknown setting {', '.join(unknown)}; it knows {', '.join(known)}")
