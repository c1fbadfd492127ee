"""CUDA, as far as an engine needs it: one device, its memory, a stream, a captured graph. Through the driver's library.

`libcuda` comes with every driver, its names carry no version and its interface is kept stable; so no package is needed.
It shares its primary context with the runtime library that TensorRT uses.
Source: CUDA Driver API, https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from deploy.errors import DeployError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the legacy stream
_CAPTURE_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating


class Cuda:
    """The first CUDA device (CUDA_VISIBLE_DEVICES chooses it) with one stream. Raises DeployError where there is none,
    and for every call that fails.

    `library` stands in for libcuda in tests. Addresses are device pointers as whole numbers.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else _load()
        self._device = _first(self._library)
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._context = context
        self.use()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self.stream = stream.value or 0
        self._graphs: list[int] = []
        self._allocated: list[int] = []

    def use(self) -> None:
        """Makes the device the calling thread's own; every thread that infers must."""
        self._call("cuCtxSetCurrent", self._context)

    def describe(self) -> dict[str, Any]:
        """See `describe`."""
        return describe(self._library)

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes, freed by `close`."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._allocated.append(address.value)
        return address.value

    def upload(self, address: int, array: NDArray[np.generic]) -> None:
        """Copies a contiguous array to the device, in the stream's order."""
        size, source = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, ctypes.c_void_p(self.stream))

    def download(self, array: NDArray[np.generic], address: int) -> None:
        """Copies from the device into a contiguous array, in the stream's order; `synchronise` before it is read."""
        size, target = ctypes.c_size_t(array.nbytes), ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, ctypes.c_void_p(self.stream))

    def synchronise(self) -> None:
        """Waits until the stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def begin_capture(self) -> None:
        """From here on what is put into the stream is recorded, not done."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream), _CAPTURE_THREAD)

    def end_capture(self) -> int:
        """The recorded work as a graph that `launch` takes."""
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)
        self._graphs.append(made.value or 0)
        return made.value or 0

    def launch(self, graph: int) -> None:
        """Puts a recorded graph into the stream."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Gives back graphs, memory, stream and device."""
        for graph in self._graphs:
            self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))
        for address in self._allocated:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._graphs, self._allocated = [], []
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(self.stream))
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _call(self, function: str, *arguments: Any) -> None:
        _call(self._library, function, *arguments)


def devices(library: Any = None) -> tuple[list[dict[str, Any]], str | None]:
    """Each CUDA device's `name`, `compute_capability` as `8.6` and `memory_bytes`, and the CUDA version the driver
    supports. CUDA's own order: nvidia-smi's numbering may be another.

    None of them, and None, where there is no driver or it finds no device. `library` stands in for libcuda.
    """
    try:
        library = library if library is not None else _load()
    except DeployError:
        return [], None
    if library.cuInit(0):
        return [], None

    def ask(function: str, kind: Any, *arguments: Any) -> Any:
        value = kind()
        return None if getattr(library, function)(ctypes.byref(value), *arguments) else value.value

    version = ask("cuDriverGetVersion", ctypes.c_int)
    found = []
    for index in range(ask("cuDeviceGetCount", ctypes.c_int) or 0):
        handle = ask("cuDeviceGet", ctypes.c_int, index)
        name = ctypes.create_string_buffer(256)
        library.cuDeviceGetName(name, len(name), handle)
        major, minor = (ask("cuDeviceGetAttribute", ctypes.c_int, one, handle) for one in (_MAJOR, _MINOR))
        found.append(
            {
                "name": name.value.decode(errors="replace"),
                "compute_capability": f"{major}.{minor}",
                "memory_bytes": ask("cuDeviceTotalMem_v2", ctypes.c_size_t, handle),
            }
        )
    return found, f"{version // 1000}.{version % 1000 // 10}" if version else None


def describe(library: Any = None) -> dict[str, Any]:
    """`device`, `compute_capability` and `driver_cuda` of the device that CUDA puts first. Raises DeployError where
    there is none."""
    library = library if library is not None else _load()
    _first(library)
    (first, *_), version = devices(library)
    return {
        "device": first["name"],
        "compute_capability": first["compute_capability"],
        "driver_cuda": version,
    }


def obstacle() -> str | None:
    """Why this machine has no CUDA device, or None."""
    try:
        _first(_load())
    except DeployError as error:
        return str(error)
    return None


def _first(library: Any) -> int:
    count, device = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuInit", 0)
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise DeployError("cuda: the driver knows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    _call(library, "cuDeviceGet", ctypes.byref(device), 0)
    return device.value


def _load() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeployError(f"cuda: this machine has no NVIDIA driver ({error}); run it where there is a GPU") from error


def _call(library: Any, function: str, *arguments: Any) -> None:
    if code := getattr(library, function)(*arguments):
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        words = text.value.decode() if text.value else "unknown"
        raise DeployError(
            f"cuda: {function} failed: {words} (code {code}); see nvidia-smi and the driver's log (dmesg)"
        )
