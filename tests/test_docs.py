"""The documents are true: their commands run, their Python runs, their links lead somewhere, the reference is current.

Shell lines run in a folder that has what the tutorial speaks of: `my_data`, `bundle`, `photo.jpg`, and the configs.
What is not run is named in NOT_RUN with its reason; a line of any other kind fails.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import deploy.__main__
import pipeline.__main__
from deploy.release import Sample, write
from pipeline.config import Choice
from stages.data.sources.digits import Digits
from stages.detection.detector import Detector
from stages.detection.records import Targets
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "python3 -m venv": "installs; .ci/run runs the README's test line as it stands",
    "pipeline run": "trains; .ci/smoke runs the quickstart",
    ".venv/bin/pre-commit": "changes the checkout's git hooks",
    "deploy validate runs/latest": "needs a run",
}
COMMANDS = {"pipeline": pipeline.__main__.main, "deploy": deploy.__main__.main}


def blocks(document: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(document.read_text()) if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader of the tutorial has: COCO data, a bundle, a photograph, and the shipped configs."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "made").mkdir()
    made = Digits(Digits.Config(train=12, val=4, size=128)).write(folder / "made")
    data = folder / "my_data"
    (data / "annotations").mkdir(parents=True)
    for name, split in (("train", made.train), ("val", made.val)):
        shutil.copytree(split.images, data / name)
        shutil.copy(split.annotations, data / "annotations" / f"instances_{name}.json")
    tiny = runpy.run_path(str(ROOT / "tests" / "deploy" / "conftest.py"))
    classes = tuple(category["name"] for category in json.loads(made.val.annotations.read_text())["categories"])
    contract = tiny["make_contract"](classes=classes, category_ids=tuple(range(1, len(classes) + 1)))
    model = tiny["write_model"](folder / "model.onnx", tiny["BOXES"], tiny["SCORES"], tiny["LABELS"], contract)
    photo = folder / "photo.jpg"
    Image.new("RGB", (640, 480), "white").save(photo)
    with tiny["Predictor"].open(model) as predictor:
        sample = Sample.take(photo, {"model.onnx": predictor})
    assert len(sample.detections["model.onnx"])
    release = {"name": "tiny", "licence": "none", "provenance": {}}
    entry = tiny["make_entry"](model, contract=contract)
    write(folder / "bundle", [entry], release, "A card.", sample)
    return folder


@pytest.fixture(autouse=True)
def reader(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])


def shell_lines(document: Path) -> list[str]:
    text = "\n".join(blocks(document, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def write_files(document: Path) -> None:
    """Write the Python blocks that begin with a file's name into that file."""
    for code in blocks(document, "python"):
        if named := re.match(r"# (\w+\.py)\n", code):
            Path(named[1]).write_text(code)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_shell_lines_run(document, capfd):
    write_files(document)
    Path("my_detector.yaml").unlink(missing_ok=True)
    shutil.rmtree("drawn", ignore_errors=True)
    for line in shell_lines(document):
        if any(line.startswith(kind) for kind in NOT_RUN):
            continue
        words = shlex.split(line.removeprefix(".venv/bin/"))
        assert words[0] in COMMANDS, f"{document.name}: neither run nor named in NOT_RUN: {line}"
        code = COMMANDS[words[0]](words[1:])
        assert not code, f"{document.name}: {line} ended with {code}: {capfd.readouterr().err}"


def test_tutorial_draws_and_predicts(folder, capfd):
    """The commands above do what the text says, not only end with 0."""
    assert deploy.__main__.main(["predict", "bundle", "photo.jpg", "--json", "--out", "drawn"]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert row["image"] == "photo.jpg"
    assert {"box_xyxy", "score", "label", "class"} == row["detections"][0].keys()
    assert [file.name for file in (folder / "drawn").iterdir()] == ["photo.png"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_python_blocks_run(document):
    for code in blocks(document, "python"):
        exec(compile(code, document.name, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_yaml_blocks_are_yaml(document):
    assert all(isinstance(yaml.safe_load(code), dict) for code in blocks(document, "yaml"))


def test_the_tutorials_method_teaches(folder):
    """The file that the tutorial shows is a method: its loss is finite, and reaches adapters and student."""
    write_files(ROOT / "docs" / "tutorial.md")
    shared = {"backbone": "tiny", "backbone_norm": "batch", "trainable_layers": 5, "neck_channels": 16}
    torch.manual_seed(0)
    student, teacher = (
        choice.cls.build(choice.config, 10)
        for choice in (Choice.parse(Detector, {"name": name, **shared}) for name in ("retinanet", "faster_rcnn"))
    )
    choice = Choice.parse(DistillationMethod, {"name": "./my_method.py", "weight": 0.2})
    task = DistillationTask(student, teacher, {"mine": choice.cls(choice.config, student, teacher)})
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    box = torch.tensor([[10.0, 10, 60, 60]])
    targets = Targets([box, box], [torch.zeros(1, dtype=torch.int64)] * 2, [(128, 128)] * 2)
    losses = task(images, targets, Clock(0, 10, 10, ()))
    assert losses["mine/feature"].isfinite()
    losses["mine/feature"].backward()
    assert all(parameter.grad is not None for parameter in task.methods["mine"].parameters())
    assert any(parameter.grad is not None for parameter in student.backbone.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_readme_holds_the_two_commands():
    """Each is one line, installs from the pins, and asks for extras that exist."""
    lines = shell_lines(ROOT / "README.md")
    run = next(line for line in lines if "pipeline run configs/quickstart.yaml" in line)
    test = next(line for line in lines if "pytest" in line)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line, wanted in ((run, {"train", "cpu"}), (test, {"train", "cpu", "test"})):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -e '.[")
        assert "-c constraints.txt && .venv/bin/" in line
        asked = set(re.search(r"\.\[([\w,]+)\]", line)[1].split(","))
        assert asked == wanted
        assert asked <= extras.keys()


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


def test_documents_name_files_that_exist():
    """Paths in backquotes below our folders, but for the `x.py` of recipes."""
    pattern = re.compile(r"`((?:stages|deploy|pipeline|tests|configs|docs|benchmarks|\.ci)/[\w./-]+)`")
    named = {path for document in DOCUMENTS for path in pattern.findall(document.read_text())}
    assert len(named) > 10
    assert sorted(path for path in named if not path.endswith("/x.py") and not (ROOT / path).exists()) == []


def test_reference_is_current():
    """In a process of its own: what it prints must not depend on what other tests have imported."""
    printed = subprocess.run(
        [sys.executable, "-m", "pipeline", "stages"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    (block,) = blocks(ROOT / "docs" / "reference.md", "text")
    assert block == printed, "docs/reference.md is out of date; run `make reference`"


def test_ci_and_newcomer_read_the_same_line():
    """The awk of .ci/run takes the README's test line whole."""
    script = (ROOT / ".ci" / "run").read_text()
    program = re.search(r"line=\$\(awk '(.+?)' README\.md\)", script)[1]
    found = subprocess.run(["awk", program, "README.md"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert found.strip() == next(line for line in shell_lines(ROOT / "README.md") if "pytest" in line)


def test_pins_hold_no_addresses_and_the_measured_torch():
    text = (ROOT / "constraints.txt").read_text()
    assert "//" not in text
    assert re.search(r"^torch==2\.15\.0 ; python_full_version >= '3\.11'$", text, re.MULTILINE)
    assert re.search(r"^torchvision==0\.29\.2$", text, re.MULTILINE)
