"""A training from data to weights: how images are loaded changes none of its bits, and it shows what it learnt from."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from stages import train
from stages.training.session import contradictions

AUGMENT = {"flip": 0.5, "jitter": [0.8, 1.2], "mosaic": 0.5, "mixup": 0.3, "switch_off": 0.2}


@pytest.fixture(scope="module")
def trained(make, digits, student_settings, tmp_path_factory):
    """A function from settings to the checkpoint of three steps."""
    folder = tmp_path_factory.mktemp("session")

    def run(name, **settings):
        config = {"detector": student_settings, "steps": 3, "batch_size": 4, "device": "cpu", "augment": AUGMENT}
        return make(folder, name, train, {**config, **settings}, data=digits)

    return run


def test_loading_changes_no_weight(trained):
    plain = trained("plain")
    others = [
        trained("memory", cache="memory", workers=1),
        trained("disk", cache="disk", workers="auto"),
    ]
    wanted = load_file(plain.path(plain.weights))
    for other in others:
        found = load_file(other.path(other.weights))
        assert all(found[name].equal(value) for name, value in wanted.items())
        assert other.path(other.metrics).read_text() == plain.path(plain.metrics).read_text()
        assert other.path(other.samples).read_bytes() == plain.path(plain.samples).read_bytes()
        assert sorted(path.name for path in other.directory.iterdir()) == sorted(
            path.name for path in plain.directory.iterdir()
        )
    with Image.open(plain.path(plain.samples)) as sheet:
        assert sheet.format == "JPEG"
    assert plain.waited > 0
    assert json.loads(plain.model_dump_json())["samples"] == "samples.jpg"


def test_a_cache_for_workers_needs_fork(monkeypatch, student_settings):
    monkeypatch.setattr("stages.training.session.start_method", lambda: None)
    config = {"detector": student_settings, "steps": 1, "cache": "memory"}
    assert list(contradictions(train.Config(**config, workers=0))) == []
    for workers in (1, "auto"):
        (problem,) = contradictions(train.Config(**config, workers=workers))
        assert (
            problem == "cache: memory is shared with workers by fork, which this system does not have; set workers: 0"
        )
