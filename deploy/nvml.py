"""The NVIDIA GPU that this process computes on, asked through NVML: clocks, temperature, power, memory, throttling.

By ctypes, so that a device needs no further package. Names and bits are those of nvml.h; NVML numbers GPUs its own way,
so the device is found by the PCI address that CUDA gives it.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

# Reasons that slow a GPU down because of heat or power; being idle and clocks set by hand are none.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
_GRAPHICS, _MEMORY, _TEMPERATURE_GPU = 0, 2, 0


class _MemoryInfo(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """One GPU, open until `close`. `library` is libnvidia-ml, `address` a PCI address as CUDA writes it.

    Raises OSError when NVML cannot start or does not know the address.
    """

    def __init__(self, library: Any, address: bytes) -> None:
        self._library = library
        self._device = ctypes.c_void_p()
        if library.nvmlInit_v2():
            raise OSError("nvml: it cannot be started; is the driver loaded?")
        if library.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(self._device)):
            self.close()
            raise OSError(f"nvml: it knows no GPU at {address.decode()}")

    @classmethod
    def of_this_process(cls, device: int = 0) -> Nvml | None:
        """The CUDA device of that number as this process sees it; None where the process has not loaded CUDA's driver, so
        computes on no GPU, or where NVML is not to be had (older Jetsons)."""
        try:
            cuda = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except (OSError, AttributeError):  # AttributeError: not Linux
            return None
        handle, address = ctypes.c_int(), ctypes.create_string_buffer(32)
        if (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(handle), device)
            or cuda.cuDeviceGetPCIBusId(address, len(address), handle)
        ):
            return None
        try:
            return cls(library, address.value)
        except OSError:
            return None

    def sample(self) -> dict[str, float]:
        """What the GPU tells: gpu_mhz, gpu_memory_mhz, gpu_c, gpu_w, gpu_memory_mb (of all processes) and gpu_throttling,
        the bits of THROTTLING. What it does not tell is left out."""
        found: dict[str, float] = {}
        number, reasons, memory = ctypes.c_uint(), ctypes.c_ulonglong(), _MemoryInfo()
        clock, heat = self._library.nvmlDeviceGetClockInfo, self._library.nvmlDeviceGetTemperature
        if not clock(self._device, _GRAPHICS, ctypes.byref(number)):
            found["gpu_mhz"] = float(number.value)
        if not clock(self._device, _MEMORY, ctypes.byref(number)):
            found["gpu_memory_mhz"] = float(number.value)
        if not heat(self._device, _TEMPERATURE_GPU, ctypes.byref(number)):
            found["gpu_c"] = float(number.value)
        if not self._library.nvmlDeviceGetPowerUsage(self._device, ctypes.byref(number)):
            found["gpu_w"] = number.value / 1e3
        if not self._library.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)):
            found["gpu_memory_mb"] = memory.used / 1e6
        # The name that every driver has; newer ones call it ...EventReasons as well.
        if not self._library.nvmlDeviceGetCurrentClocksThrottleReasons(self._device, ctypes.byref(reasons)):
            found["gpu_throttling"] = float(reasons.value & sum(THROTTLING))
        return found

    def close(self) -> None:
        """Shuts NVML down."""
        self._library.nvmlShutdown()
