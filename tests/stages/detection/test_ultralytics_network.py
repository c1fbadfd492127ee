"""How Ultralytics' package is taken in: offline, leaving the process alone, and not beside a broken OpenCV."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import UserError
from stages.detection import ultralytics_network
from stages.detection.detectors.yolo import YOLO
from stages.detection.ultralytics_network import two_opencvs

needs = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="pip install 'headstart[ultralytics]' (AGPL-3.0)"
)

QUIET = """
import os, socket, sys, warnings
import numpy as np, torch
from PIL import Image

def refused(*_, **__):
    raise AssertionError("the network was asked for")

socket.getaddrinfo = socket.socket.connect = refused
import sympy  # of torch's: it adds a filter of warnings when something first asks for it
from stages.detection.detectors.yolo import YOLO

before = dict(os.environ), Image.open, torch.save, list(warnings.filters), np.get_printoptions()
YOLO.build(YOLO.Config(model="yolo11n"), 3)
assert before == (dict(os.environ), Image.open, torch.save, list(warnings.filters), np.get_printoptions())
from ultralytics.utils import ONLINE, AUTOINSTALL
from ultralytics.utils.events import events
assert (ONLINE, AUTOINSTALL, events.enabled) == (False, False, False)
"""


@needs
def test_the_package_asks_no_network_writes_nothing_and_leaves_the_process_as_it_was(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[3])}
    for name in ("XDG_CONFIG_HOME", "YOLO_OFFLINE", "YOLO_CONFIG_DIR"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", QUIET], env=environment, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == list(here.rglob("*")) == []
    assert "under AGPL-3.0" in done.stderr


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    ultralytics_network.package.cache_clear()
    monkeypatch.setattr(ultralytics_network.importlib.util, "find_spec", lambda name: None)
    try:
        with pytest.raises(UserError, match=r"pip install 'headstart\[ultralytics\]' \(licence: AGPL-3.0\)"):
            YOLO.build(YOLO.Config(), 2)
    finally:
        ultralytics_network.package.cache_clear()


def test_two_builds_of_opencv_are_told_with_the_command_that_mends_it(monkeypatch):
    there = {"opencv-python", "opencv-python-headless"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return "5"

    monkeypatch.setattr(ultralytics_network.importlib.metadata, "version", version)
    assert "pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python" in two_opencvs()
    there.remove("opencv-python")
    assert two_opencvs() is None


@needs
def test_pillow_still_opens_images_by_its_own_function():
    ultralytics_network.package()
    assert Image.open.__module__ == "PIL.Image"
