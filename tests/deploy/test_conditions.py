import threading

import pytest

from deploy.conditions import Sampler, Sensors, doubts, others_cores, summary
from deploy.machine import cores

QUIET = {"at_s": 0.0, "own_s": 0.0, "load_1min": 0.1, "cpu_mhz": 2000.0}


def run(*changes):
    """Samples a second apart, each the quiet one with a change."""
    return [QUIET | {"at_s": float(index)} | change for index, change in enumerate(changes)]


@pytest.fixture
def orin(tmp_path):
    """The files of a Jetson Orin that matter, as its kernel lays them out."""
    files = {
        "proc/stat": "cpu  100 0 50 900 5 1 2 0 0 0\ncpu0 0\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400",
        "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "729600",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "48625",
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal",  # switched off: no temperature
        "sys/class/thermal/thermal_zone2/temp": "",
        "sys/class/devfreq/17000000.gpu/cur_freq": "624750000",
        "sys/class/devfreq/13e00000.host1x/cur_freq": "115200000",
        "sys/class/hwmon/hwmon1/name": "ina3221",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
        "sys/class/hwmon/hwmon1/in1_input": "5000",
        "sys/class/hwmon/hwmon1/curr1_input": "1800",
        "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
        "sys/class/hwmon/hwmon3/name": "soctherm_oc",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "0",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": "37",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_a_jetson_tells(orin):
    found = Sensors(orin).read()
    assert found["cpu_mhz"] == pytest.approx(1120)
    assert found["gpu_mhz"] == 624.75
    assert found["cpu-thermal_c"] == 48.625
    assert found["VDD_IN_w"] == pytest.approx(9.0)
    assert found["over_currents"] == 37
    assert found["busy_s"] > 0
    assert not {"cv0-thermal_c", "sum of shunt voltages_w", "cpu_throttles"} & found.keys()


def test_a_machine_that_tells_nothing_is_no_error(tmp_path):
    found = Sensors(tmp_path).read()
    assert found.keys() <= {"at_s", "own_s", "load_1min"}
    assert doubts([{"at_s": 0.0, "own_s": 0.0}] * 2) == []


def test_the_thread_samples_until_the_block_ends(orin):
    with Sampler(gpu=True, interval_s=1e-3, sensors=Sensors(orin)) as sampler:
        while len(sampler.samples) < 4:
            threading.Event().wait(1e-3)
    taken = len(sampler.samples)
    times = [sample["at_s"] for sample in sampler.samples]
    assert taken >= 5
    assert times == sorted(times)
    threading.Event().wait(0.02)
    assert len(sampler.samples) == taken
    told = summary(sampler.samples)
    assert told["samples"] == taken
    assert told["VDD_IN_w"] == {"min": 9.0, "median": 9.0, "max": 9.0}
    assert not {"at_s", "own_s", "busy_s"} & told.keys()


def test_a_quiet_run_is_believed():
    assert doubts(run({}, {}, {})) == []


def test_the_work_of_others():
    assert "load" in doubts(run({}, {"load_1min": cores() + 0.5}, {}))[0]
    first, last = {"busy_s": 100.0, "load_1min": cores() + 9.0}, {"at_s": 10.0, "own_s": 10.0}
    assert doubts(run(first, last | {"busy_s": 111.0})) == []  # the load is history
    busy = run(first, last | {"busy_s": 115.0})
    assert others_cores(busy) == pytest.approx(0.5)
    assert "other processes used 0.50 of its cores" in doubts(busy)[0]


def test_clocks_that_fall_and_clocks_that_breathe():
    assert "the clock fell from 2000 to 1500" in doubts(run({}, {"cpu_mhz": 1500.0}))[0]
    falling = [{"gpu_mhz": mhz} for mhz in (1590.0, 1590, 1400, 1300, 1200, 1200)]
    assert doubts(run(*falling)) == ["the GPU's clock fell from 1590 to 1200 MHz"]
    breathing = [{"gpu_mhz": mhz} for mhz in (1590.0, 1590, 1590, 1400, 1590, 1200, 1590, 1590, 1500)]
    assert doubts(run(*breathing)) == []


def test_throttling_in_any_sample_counts():
    assert doubts(run({"gpu_throttling": 0.0}, {"gpu_throttling": 36.0}, {"gpu_throttling": 0.0})) == [
        "the GPU was throttled: power cap, temperature (software)"
    ]
    events = run({"over_currents": 37.0, "cpu_throttles": 5.0}, {}, {"over_currents": 39.0, "cpu_throttles": 5.0})
    assert doubts(events) == ["over-current: 2 events meanwhile"]
