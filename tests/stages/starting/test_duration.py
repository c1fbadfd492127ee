"""`pipeline init` says how long the trainings of its config take."""

from string import Template

import pytest
import yaml

from pipeline.config import Choice
from stages.detection.detector import Detector
from stages.starting import duration
from stages.starting.duration import Setting, minutes, step_seconds
from stages.starting.starter_config import CONFIG

TINY = {"backbone": "tiny", "backbone_norm": "batch", "trainable_layers": 5, "neck_channels": 24}


def config(jobs: int) -> dict[str, object]:
    """The starter's config with a student of one line; 1,000 steps of each training."""
    filled = Template(CONFIG).safe_substitute(
        height=64, width=96, jobs=jobs, source="name: digits", student="name: retinanet", target=""
    )
    made = yaml.safe_load(filled)
    assert isinstance(made, dict)
    return made


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 3000 + 1200 + 3200), (2, 3000 + 3200)])
def test_side_by_side_or_one_after_the_other(monkeypatch: pytest.MonkeyPatch, jobs: int, seconds: float) -> None:
    seen = []

    def step(choice: Choice[Detector], setting: Setting) -> float:
        seen.append((choice.name, setting))
        return {"faster_rcnn": 3.0, "retinanet": 1.2}[choice.name]

    monkeypatch.setattr(duration, "step_seconds", step)
    assert minutes(config(jobs), 7) == pytest.approx(seconds / 60)
    setting = Setting(classes=7, size=(64, 96), batch_size=8, jobs=jobs)
    assert seen == [("faster_rcnn", setting), ("retinanet", setting)]


def test_a_step_is_tried_and_more_images_take_longer() -> None:
    choice: Choice[Detector] = Choice.parse(Detector, {"name": "retinanet", **TINY})
    few, many = (step_seconds(choice, Setting(3, (64, 64), batch, jobs=1)) for batch in (1, 32))
    assert 0 < few < many
