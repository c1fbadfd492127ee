"""Which machine did some work: from the CUDA driver, and from the files of drivers and boards."""

import ctypes

import pytest

from deploy import device as module
from deploy.cuda import devices
from deploy.device import device, driver, kind, l4t, power_mode

NVPMODEL = """
# comment
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_1 /sys/devices/system/cpu/cpu1/online
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_1 1
< POWER_MODEL ID=2 NAME=MODE_30W >
CPU_ONLINE CORE_1 1
< PM_CONFIG DEFAULT=2 >
"""


class Cuda:
    """A driver with two devices, by the calls of libcuda: results through pointers, 0 for success."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    @staticmethod
    def _put(pointer, value) -> int:
        pointer._obj.value = value
        return 0

    def cuInit(self, flags) -> int:  # the driver's name
        return self.error

    def cuDriverGetVersion(self, pointer) -> int:
        return self._put(pointer, 12060)

    def cuDeviceGetCount(self, pointer) -> int:
        return self._put(pointer, 2)

    def cuDeviceGet(self, pointer, index) -> int:
        return self._put(pointer, 100 + index)

    def cuDeviceGetName(self, buffer, size, handle) -> int:
        buffer.value = {100: b"Tesla T4", 101: b"Orin"}[handle]
        return 0

    def cuDeviceGetAttribute(self, pointer, attribute, handle) -> int:
        return self._put(pointer, {(75, 100): 7, (76, 100): 5, (75, 101): 8, (76, 101): 7}[attribute, handle])

    def cuDeviceTotalMem_v2(self, pointer, handle) -> int:
        assert isinstance(pointer._obj, ctypes.c_size_t)
        return self._put(pointer, 15_000_000_000) if handle == 100 else 1  # an error


def test_gpus_are_those_of_the_cuda_driver():
    gpus, version = devices(Cuda())
    assert version == "12.6"
    assert gpus == [
        {"name": "Tesla T4", "compute_capability": "7.5", "memory_bytes": 15_000_000_000},
        {"name": "Orin", "compute_capability": "8.7", "memory_bytes": None},
    ]


def test_a_driver_without_a_device_has_no_gpus():
    assert devices(Cuda(error=100)) == ([], None)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: gcc 11.4",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n", "540.4.0"),
        ("", None),
    ],
)
def test_the_drivers_version_is_read(text, version):
    assert driver(text) == version


def test_l4t_and_power_mode_are_read():
    assert l4t("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n") == "36.4.3"
    assert l4t("") is None
    assert power_mode("pmode:0002", NVPMODEL) == "MODE_30W"
    assert power_mode("pmode:0000", NVPMODEL) == "MAXN"
    assert power_mode("pmode:0007", NVPMODEL) == "7"  # nobody names it
    assert power_mode("", NVPMODEL) is None


def test_a_jetson_is_named_by_its_board_and_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "devices", lambda: (devices(Cuda())[0][1:], "12.6"))
    for name, text in {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1",
        "etc/nvpmodel.conf": NVPMODEL,
        "var/lib/nvpmodel/status": "pmode:0000 fmode:quiet",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = device(tmp_path)
    assert found["name"] == "NVIDIA Jetson AGX Orin Developer Kit (Orin)"
    assert (found["l4t"], found["power_mode"], found["driver"], found["cuda"]) == ("36.4.3", "MAXN", None, "12.6")


def test_another_device_differs_in_kind_and_another_power_mode_does_not(tmp_path):
    mine = device(tmp_path)
    assert kind(mine) == kind(mine | {"power_mode": "MAXN", "driver": "1", "os": "Linux 1", "cores": 1})
    assert kind(mine) != kind(mine | {"gpus": [{"name": "Tesla T4", "compute_capability": "7.5", "memory_bytes": 1}]})
    assert kind(mine) != kind(mine | {"cpu": "another"})
    assert mine["name"]
