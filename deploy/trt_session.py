"""A TensorRT or TensorRT-RTX engine that runs: its buffers on the device, one stream, and captured graphs if wanted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import trt_network
from deploy.backend import Candidates
from deploy.census import CONVOLUTION, PRODUCT, Layer
from deploy.contract import Contract
from deploy.errors import DeployError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy.cuda import Cuda
    from deploy.sidecar import Sidecar


class Session:
    """An open engine. `trt` is the module, `device` where it runs; `graph` captures the work once for each batch size and
    replays it. Raises DeployError where the engine cannot be loaded or is not what its contract says."""

    def __init__(self, trt: Any, engine: Path, described: Sidecar, device: Cuda, graph: bool = False) -> None:
        self._file, self._cuda, self._sidecar = engine, device, described
        self._contract = Contract.from_json(described.contract)
        self._log = trt_network.logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise DeployError(f"{engine}: {trt.__name__} {trt.__version__} cannot load it: {self._log.errors()}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise DeployError(f"{engine}: no execution context: {self._log.errors()}; is the GPU's memory full?")
        self._most = described.settings["batch"][2]
        self._graphs: dict[int, int] | None = {} if graph else None
        name, spec = self._contract.input_name, self._contract.image
        self._image = (spec.height, spec.width, 3)
        self._set_batch(self._most)
        self._addresses = {name: self._allocate(name, np.dtype(np.uint8))}
        self._types = {}
        for output in self._contract.output_names:
            self._types[output] = np.dtype(trt.nptype(self._engine.get_tensor_dtype(output)))
            self._addresses[output] = self._allocate(output, self._types[output])
        for tensor, address in self._addresses.items():
            if not self._context.set_tensor_address(tensor, address):
                raise DeployError(f"{engine}: {tensor} is no tensor of it: {self._log.errors()}")

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """Uploads, computes, downloads and waits. Raises DeployError for images that the engine does not take."""
        batch = len(images_BHWC)
        if images_BHWC.shape[1:] != self._image or images_BHWC.dtype != np.uint8:
            raise DeployError(
                f"{self._file}: images must be uint8 of shape (B, {', '.join(map(str, self._image))}), "
                f"given {images_BHWC.dtype} of shape {list(images_BHWC.shape)}"
            )
        least = self._sidecar.settings["batch"][0]
        if not least <= batch <= self._most:
            raise DeployError(
                f"{self._file}: it takes {least} to {self._most} images together, given {batch}; "
                "build it with another batch"
            )
        self._cuda.use()
        self._cuda.upload(self._addresses[self._contract.input_name], np.ascontiguousarray(images_BHWC))
        self._run(batch)
        found = {}
        for name in self._contract.output_names:
            found[name] = np.empty(tuple(self._context.get_tensor_shape(name)), self._types[name])
            self._cuda.download(found[name], self._addresses[name])
        self._cuda.synchronise()
        boxes, scores, labels = (found[name] for name in self._contract.output_names)
        return Candidates(
            boxes.astype(np.float32, copy=False),
            scores.astype(np.float32, copy=False),
            labels.astype(np.int64, copy=False),
        )

    def _run(self, batch: int) -> None:
        self._set_batch(batch)
        if self._graphs is None:
            self._execute()
            return
        if batch not in self._graphs:
            self._execute()  # once as usual: what is done lazily cannot be captured
            self._cuda.synchronise()
            self._cuda.begin_capture()
            try:
                self._execute()
            finally:
                graph = self._cuda.end_capture()
            self._graphs[batch] = graph
        self._cuda.launch(self._graphs[batch])

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise DeployError(f"{self._file}: it cannot be executed: {self._log.errors()}")

    def _set_batch(self, batch: int) -> None:
        if not self._context.set_input_shape(self._contract.input_name, (batch, *self._image)):
            raise DeployError(f"{self._file}: it takes no batch of {batch}: {self._log.errors()}")

    def _allocate(self, tensor: str, dtype: np.dtype[Any]) -> int:
        shape = tuple(self._context.get_tensor_shape(tensor))
        if min(shape) < 0:
            raise DeployError(f"{self._file}: the size of {tensor} is not known before it runs: {shape}")
        return self._cuda.allocate(int(np.prod(shape)) * dtype.itemsize)

    def layers(self, trt: Any) -> tuple[Layer, ...]:
        """The layers as they were built, from the engine's inspector."""
        inspector = self._engine.create_engine_inspector()
        return built(json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON)))

    def close(self) -> None:
        """Gives back the engine, then the device."""
        del self._context, self._engine, self._runtime
        self._cuda.close()


def built(information: dict[str, Any]) -> tuple[Layer, ...]:
    """The layers of an engine, from the JSON of its inspector: the type of what each reads first, and its kind where
    its name tells it. A fused region (Myelin) is one layer whose inside nobody tells."""
    found = []
    for layer in information.get("Layers", []):
        if isinstance(layer, str):  # built without detailed profiling: names alone
            found.append(Layer(layer, "unknown", "unknown"))
            continue
        word = str(layer.get("ParameterType") or layer.get("LayerType", "unknown"))
        kind = (
            CONVOLUTION
            if "conv" in word.lower()
            else PRODUCT
            if re.search("gemm|matmul|matrix", word.lower())
            else word
        )
        formats = [str(one.get("Format/Datatype", "")) for one in layer.get("Inputs", [])]
        found.append(Layer(str(layer.get("Name", "")), kind, _of_format(formats[0] if formats else "")))
    return tuple(found)


def _of_format(text: str) -> str:
    """The precision in the inspector's words, as `Channel major FP16 format where channel % 4 == 0`."""
    words = {
        "fp32": "fp32",
        "float": "fp32",
        "fp16": "fp16",
        "half": "fp16",
        "bf16": "bf16",
        "int8": "int8",
        "fp8": "fp8",
    }
    found = re.search("|".join(words), text.lower())
    return words[found.group()] if found else "unknown"
