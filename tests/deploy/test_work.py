"""Work carried elsewhere: done by the folder's own code without our packages, interrupted, checked when it is back."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import work
from deploy.accuracy import evaluate_predictor
from deploy.digest import digest
from deploy.errors import DeployError
from deploy.predictor import Predictor
from deploy.work import Task, UnfinishedError

TOY = '''
from pathlib import Path
from deploy.backend import Backend

class Toy(Backend):
    SUFFIX = ".toy"

    @classmethod
    def obstacle(cls, made_for):
        return f"a toy runs nowhere, not even on {made_for}"

    @classmethod
    def build(cls, onnx, file, level=1):
        """Writes the file, and a sidecar beside it."""
        file.write_bytes(bytes(level) + Path(onnx).read_bytes()[:8])
        Path(f"{file}.json").write_text("{}")
        return {"level": level, "made_for": "play"}

    def infer(self, images_BHWC): ...
    def identity(self): ...
'''


@pytest.fixture
def inputs(tmp_path, model, new_image, new_annotations):
    """A model, two white images and where the cat is in them."""
    images = {f"images/{i}.png": new_image(tmp_path / "data" / f"{i}.png") for i in (1, 2)}
    annotations = new_annotations(tmp_path / "val.json", [(1, 17, [10, 10, 20, 20]), (2, 18, [40, 40, 20, 20])], 2)
    return {"models/tiny/tiny.onnx": model, "annotations.json": annotations, **images}


OPENED = {"model": "inputs/models/tiny/tiny.onnx", "backend": "onnxruntime", "runtime": {"threads": 1}}
VALIDATE = Task(
    "tiny", "validate", {**OPENED, "images": "inputs/images", "annotations": "inputs/annotations.json", "batch_size": 2}
)
BENCHMARK = Task(
    "fast", "benchmark", {**OPENED, "images": ["inputs/images/1.png"], "measure": {"iterations": 20, "warmup": 1}}
)
BUILD = Task("engine", "build", {"model": OPENED["model"], "backend": "toy", "file": "tiny.toy", "build": {"level": 3}})


def carry(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def there(folder: Path, python: Path) -> "subprocess.CompletedProcess[str]":
    """Do the work as somebody at the device does."""
    command = [python, *work.COMMAND]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def done(tmp_path, inputs):
    """Work of two tasks, done in this process."""
    folder = tmp_path / "work"
    work.write(folder, [VALIDATE, BENCHMARK], inputs)
    for task in (VALIDATE, BENCHMARK):
        work.do_one(folder, task.name)
    return folder


def test_work_is_done_without_our_packages_and_gives_what_it_gives_here(tmp_path, inputs, bare_python):
    work.write(tmp_path / "work", [VALIDATE, BENCHMARK], inputs)
    stick = carry(tmp_path / "work", tmp_path / "stick")
    ran = there(stick, bare_python)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    shutil.copytree(stick / "results", tmp_path / "work/results")
    found = work.results(tmp_path / "work")
    value = found["tiny"].value
    with Predictor.open(inputs["models/tiny/tiny.onnx"]) as predictor:
        accuracy, results = evaluate_predictor(predictor, tmp_path / "data", inputs["annotations.json"])
    assert json.loads(found["tiny"].files["detections.json"].read_text()) == results
    assert value["accuracy"] == accuracy.to_dict()
    assert value["backend"]["runtime"] == "onnxruntime"
    assert value["backend"]["threads"] == 1
    latency = found["fast"].value
    assert latency["iterations"] == 20
    assert latency["steps"]["end_to_end"]["n"] == 20
    for one in found.values():
        assert {"name", "cpu", "gpus", "driver", "power_mode", "python"} <= one.device.keys()


def test_the_same_work_is_left_as_it_is_and_other_work_replaces_it(done, inputs):
    work.write(done, [VALIDATE, BENCHMARK], inputs)
    assert set(work.results(done)) == {"tiny", "fast"}
    work.write(done, [VALIDATE], inputs)
    with pytest.raises(UnfinishedError, match=r"1 of 1 tasks have no result yet \(tiny\)"):
        work.results(done)
    assert not list(done.parent.glob(".*.partial"))


def test_a_folder_made_anew_takes_nothing_of_the_one_before(tmp_path, done, inputs):
    """Who forces a measurement wants another one, and a device may still have the results of the first."""
    shutil.move(done / "results", tmp_path / "before")
    shutil.rmtree(done)
    work.write(done, [VALIDATE, BENCHMARK], inputs)
    shutil.move(tmp_path / "before", done / "results")
    with pytest.raises(DeployError, match="results/tiny: of task tiny of other work"):
        work.results(done)
    assert not any(work._is_done(done, work._plan(done), task) for task in (VALIDATE, BENCHMARK))


def test_other_code_is_other_work(tmp_path, done, inputs, monkeypatch):
    before = json.loads((done / "work.json").read_text())
    package = shutil.copytree(Path(work.__file__).parent, tmp_path / "deploy")
    (package / "latency.py").write_text("# mended\n")
    monkeypatch.setattr(work, "__file__", str(package / "work.py"))
    work.write(done, [VALIDATE, BENCHMARK], inputs)
    after = json.loads((done / "work.json").read_text())
    assert [name for name in before["files"] if before["files"][name] != after["files"][name]] == ["deploy/latency.py"]
    assert (done / "deploy/latency.py").read_text() == "# mended\n"
    assert not (done / "results").exists()


def test_code_that_was_changed_on_the_way_is_refused_there(tmp_path, inputs, bare_python):
    work.write(tmp_path / "work", [BENCHMARK], inputs)
    (tmp_path / "work/deploy/latency.py").write_text("# faster\n")
    ran = there(tmp_path / "work", bare_python)
    assert ran.returncode == 2
    assert "deploy/latency.py was changed; copy the folder again" in ran.stderr


def test_interrupted_work_continues(tmp_path, done, bare_python):
    stick = carry(done, tmp_path / "stick")
    kept = (stick / "results/tiny/result.json").stat().st_mtime_ns
    shutil.move(stick / "results/fast", stick / "results/.fast.partial")  # as a power cut leaves it
    (stick / "results/.fast.partial/result.json").unlink()
    ran = there(stick, bare_python)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines() == ["1 of 2 tasks were done before", "fast: benchmark", "fast: done"]
    assert (stick / "results/tiny/result.json").stat().st_mtime_ns == kept
    assert sorted(path.name for path in (stick / "results").iterdir()) == ["fast", "tiny"]


def test_a_task_that_fails_keeps_what_was_done_before(tmp_path, inputs, bare_python):
    broken = Task("broken", "benchmark", {**BENCHMARK.settings, "backend": "abacus"})
    work.write(tmp_path / "work", [VALIDATE, broken], inputs)
    ran = there(tmp_path / "work", bare_python)
    assert ran.returncode == 2
    assert "error: backend: there is no 'abacus'" in ran.stderr
    assert "task broken failed, as said above; mend it and give the same command again" in ran.stderr
    assert (tmp_path / "work/results/tiny/result.json").is_file()
    with pytest.raises(UnfinishedError, match=r"1 of 2 tasks have no result yet \(broken\)"):
        work.results(tmp_path / "work")


DYING = """
import os, pathlib, signal
def do(settings, folder, out):
    (out / "half").write_text("half")
    if not pathlib.Path("once").exists():
        pathlib.Path("once").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"half": sorted(file.name for file in out.iterdir())}
"""


def with_other_code(folder, name, text):
    """The work as if our package had this file when it was written."""
    (folder / name).write_text(text)
    plan = json.loads((folder / "work.json").read_text())
    plan["files"][name] = digest(folder / name)
    (folder / "work.json").write_text(json.dumps(plan))


def test_a_task_that_is_killed_is_done_again_and_alone(tmp_path, inputs, bare_python):
    """As by the kernel, when memory is short: no half result is seen, and the others go on."""
    folder = tmp_path / "work"
    work.write(folder, [VALIDATE, BENCHMARK], inputs)
    with_other_code(folder, "deploy/tasks/benchmark.py", DYING)
    ran = there(folder, bare_python)
    assert ran.returncode == 2
    assert "task fast was killed by signal 9; is there enough memory?" in ran.stderr
    assert not (folder / "results/fast").exists()
    ran = there(folder, bare_python)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[0] == "1 of 2 tasks were done before"
    assert work.results(folder)["fast"].value == {"half": ["half"]}


def test_a_backend_builds_its_file_there(tmp_path, inputs, bare_python):
    work.write(tmp_path / "work", [BUILD], inputs)
    (tmp_path / "work/deploy/backends/toy.py").write_text(TOY)
    ran = there(tmp_path / "work", bare_python)
    assert ran.returncode == 0, ran.stderr
    (built,) = work.results(tmp_path / "work").values()
    assert built.value == {
        "file": "tiny.toy",
        "built": {"level": 3, "made_for": "play"},
        "obstacle": "a toy runs nowhere, not even on play",
    }
    assert sorted(built.files) == ["tiny.toy", "tiny.toy.json"]
    assert built.files["tiny.toy"].read_bytes() == bytes(3) + inputs["models/tiny/tiny.onnx"].read_bytes()[:8]


def test_a_backend_without_files_of_its_own_builds_nothing(tmp_path, inputs):
    task = Task("engine", "build", {**BUILD.settings, "backend": "onnxruntime"})
    work.write(tmp_path / "work", [task], inputs)
    with pytest.raises(DeployError, match="nothing is to be built"):
        work.do_one(tmp_path / "work", "engine")


def test_a_file_that_was_spoilt_on_the_way_is_refused_there(tmp_path, inputs):
    work.write(tmp_path / "work", [VALIDATE], inputs)
    stick = carry(tmp_path / "work", tmp_path / "stick")
    with (stick / "inputs/models/tiny/tiny.onnx").open("ab") as file:
        file.write(b"x")
    (stick / "inputs/images/2.png").unlink()
    with pytest.raises(
        DeployError,
        match=r"inputs/images/2.png is missing; inputs/models/tiny/tiny.onnx was changed; copy the folder again",
    ):
        work.do(stick)


def refuse(done: Path, message: str) -> None:
    with pytest.raises(DeployError, match=message) as caught:
        work.results(done)
    assert not isinstance(caught.value, UnfinishedError)


def edit(done: Path, task: str, **changes: object) -> None:
    file = done / "results" / task / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_results_of_another_file_are_refused(tmp_path, done, inputs, new_model, contract):
    """The same names, another model: results that were right for the work before."""
    results = carry(done / "results", tmp_path / "kept")
    other = new_model(tmp_path / "other.onnx", contract.__class__(**{**vars(contract), "nms_iou": 0.9}))
    work.write(done, [VALIDATE, BENCHMARK], {**inputs, "models/tiny/tiny.onnx": other})
    shutil.copytree(results, done / "results")
    refuse(done, r"results/tiny: made from another inputs/models/tiny/tiny.onnx \(sha256 .*; remove its results")


def test_results_of_other_work_are_refused(tmp_path, done, inputs):
    results = carry(done / "results", tmp_path / "kept")
    slower = Task("fast", "benchmark", {**BENCHMARK.settings, "measure": {"iterations": 30}})
    work.write(done, [VALIDATE, slower], inputs)
    shutil.copytree(results, done / "results")
    refuse(done, "of task fast of other work")


def test_results_of_two_devices_are_refused(done):
    device = json.loads((done / "results/fast/result.json").read_text())["device"]
    edit(
        done, "fast", device={**device, "name": "Tesla T4", "gpus": [{"name": "Tesla T4", "compute_capability": "7.5"}]}
    )
    refuse(done, "they are of several devices: tiny of .*, fast of Tesla T4")


def test_results_that_were_changed_on_the_way_are_refused(done):
    file = done / "results/tiny/detections.json"
    file.write_text(file.read_text().replace("17", "18", 1))
    refuse(done, "results/tiny: detections.json was changed")
    file.unlink()
    refuse(done, "results/tiny: detections.json is missing")
    edit(done, "tiny", files={"../../../passwd": {"sha256": "", "size": 0}})
    refuse(done, r"\.\./\.\./\.\./passwd lies outside")
    (done / "results/tiny/result.json").write_text("[]")
    refuse(done, "result.json is not a result")
    (done / "results/tiny/result.json").write_text("{")
    refuse(done, "it cannot be read")


def test_two_at_the_same_work_are_one_too_many(tmp_path, inputs):
    work.write(tmp_path / "work", [VALIDATE], inputs)
    with work._alone(tmp_path / "work"), pytest.raises(DeployError, match="another process is at work in it"):
        work.do(tmp_path / "work")


def test_mistakes_are_told_before_anything_is_written(tmp_path, inputs):
    tasks = [Task("a", "validat"), Task("a", "benchmark")]
    with pytest.raises(
        DeployError, match=r"nothing does 'validat'; there are .*validate; two tasks .*; .*no.onnx is missing"
    ):
        work.write(tmp_path / "work", tasks, {**inputs, "x": tmp_path / "no.onnx"})
    assert not (tmp_path / "work").exists()
    with pytest.raises(DeployError, match="a folder of work is wanted"):
        work.do(tmp_path)
    (tmp_path / "work.json").write_text('{"schema_version": 99}')
    with pytest.raises(DeployError, match="schema_version 99 is not 1; use the deploy beside it"):
        work.do(tmp_path)
