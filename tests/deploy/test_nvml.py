"""NVML is asked through ctypes; here a library in Python answers in its place. No GPU was at hand."""

import ctypes

import pytest

from deploy.nvml import Nvml


class Library:
    """Answers as libnvidia-ml does: 0 and a value behind the pointer, or the number of an error."""

    def __init__(self, failing=()):
        self.failing = set(failing)
        self.open = False
        self.asked = b""

    def __getattr__(self, name):
        if name not in ANSWERS:
            raise AttributeError(f"{name}: undefined symbol")
        return lambda *given: 3 if name in self.failing else ANSWERS[name](self, *given)


def found(library, address, handle):
    library.asked = address
    handle._obj.value = 1234
    return 0


def value(number):
    def answer(_, *given):
        given[-1]._obj.value = number
        return 0

    return answer


def clock(_, device, kind, pointer):
    assert device.value == 1234
    pointer._obj.value = {0: 1590, 2: 5000}[kind]
    return 0


def memory(_, device, pointer):
    pointer._obj.total, pointer._obj.used = 16_000_000_000, 512_000_000
    return 0


def opened(is_open):
    def answer(library):
        library.open = is_open
        return 0

    return answer


ANSWERS = {
    "nvmlInit_v2": opened(True),
    "nvmlShutdown": opened(False),
    "nvmlDeviceGetHandleByPciBusId_v2": found,
    "nvmlDeviceGetClockInfo": clock,
    "nvmlDeviceGetTemperature": value(64),
    "nvmlDeviceGetPowerUsage": value(69_500),
    "nvmlDeviceGetMemoryInfo": memory,
    "nvmlDeviceGetCurrentClocksThrottleReasons": value(0x1 | 0x4 | 0x20),
}


def test_a_sample_has_units_and_leaves_out_what_is_no_throttling():
    library = Library()
    gpu = Nvml(library, b"0000:65:00.0")
    assert library.asked == b"0000:65:00.0"
    assert gpu.sample() == {
        "gpu_mhz": 1590,
        "gpu_memory_mhz": 5000,
        "gpu_c": 64,
        "gpu_w": 69.5,
        "gpu_memory_mb": 512,
        "gpu_throttling": 0x24,  # idle is no throttling
    }
    gpu.close()
    assert not library.open


def test_what_the_gpu_does_not_tell_is_left_out():
    gpu = Nvml(Library(failing=["nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksThrottleReasons"]), b"0")
    assert not {"gpu_w", "gpu_throttling"} & gpu.sample().keys()


def test_no_driver_and_no_such_gpu_are_errors():
    with pytest.raises(OSError, match="cannot be started"):
        Nvml(Library(failing=["nvmlInit_v2"]), b"0")
    library = Library(failing=["nvmlDeviceGetHandleByPciBusId_v2"])
    with pytest.raises(OSError, match="knows no GPU at 0000:01:00"):
        Nvml(library, b"0000:01:00.0")
    assert not library.open


def test_a_process_without_cuda_asks_no_gpu(monkeypatch):
    """Also where there is one: this process has not loaded CUDA's driver."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **_: (_ for _ in ()).throw(OSError(f"{name}: not loaded")))
    assert Nvml.of_this_process() is None
