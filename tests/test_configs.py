"""The configs that are shipped: each is complete, wires, compares like with like, and says how to run it."""

from pathlib import Path

import onnx
import onnx.parser
import pytest
import yaml

from pipeline import graph
from stages.training.session import SessionConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").glob("*.yaml"))
FILES = {"annotations", "weights", "backbone_weights"}  # settings that name a file
NANO = """<ir_version: 9, opset_import: ["": 17]>
g (float[batch, 3, 128, 128] images) => (float[batch, 24, 2048] output0) <int64[3] shape = {0, 24, 2048}> {
    output0 = Reshape(images, shape)
}"""
LENGTH = {"steps", "epochs", "validate_every"}


def place_files(settings, folder):
    """Make the files and folders that a config names, empty: loading reads none of them but ONNX files."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if key == "images" and isinstance(value, str):
                (folder / value).mkdir(parents=True, exist_ok=True)
            elif isinstance(value, str) and value.endswith(".onnx"):
                onnx.save(onnx.parser.parse_model(NANO), folder / value)
            elif isinstance(value, str) and key in FILES:
                (folder / value).parent.mkdir(parents=True, exist_ok=True)
                (folder / value).touch()
            else:
                place_files(value, folder)


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    return request.param


@pytest.fixture
def nodes(config, tmp_path, monkeypatch):
    """The nodes of a config, loaded where the files it names exist."""
    if "name: yolo," in config.read_text():
        pytest.importorskip("ultralytics")  # .ci/ultralytics runs it where that is
    place_files(yaml.safe_load(config.read_text()), tmp_path)
    monkeypatch.chdir(tmp_path)
    return {node.name: node for node in graph.load(config, (), "stages").nodes}


def recipe(node, without=frozenset()):
    """All that decides how a detector is trained, but for what a method adds."""
    settings = node.config.model_dump()
    return {name: settings[name] for name in SessionConfig.model_fields if name not in without}


def test_the_whole_chain_is_there(nodes):
    """A two-stage student has no static graph: its chain ends with its accuracy in PyTorch."""
    uses = {node.uses for node in nodes.values()}
    assert uses >= {"dataset", "train", "distill", "prune", "validate", "report"}
    students = [node.config.student.cls for node in nodes.values() if node.uses == "distill"]
    shipping = {"export", "benchmark", "release"}
    assert uses & shipping == (shipping if all(student.exportable for student in students) else set())


def test_student_and_control_differ_in_the_help_alone(nodes):
    pairs = [(node, nodes[name.replace("distilled", "control")]) for name, node in nodes.items() if "distilled" in name]
    assert pairs
    for distilled, control in pairs:
        assert distilled.config.student.dump() == control.config.detector.dump()
        assert recipe(distilled) == recipe(control)
        assert distilled.config.backbone_weights == control.config.backbone_weights


@pytest.mark.parametrize("config", [ROOT / "configs" / "quickstart.yaml"], indirect=True, ids=["quickstart"])
def test_the_longer_control_is_only_longer(nodes):
    control, longer = nodes["control"], nodes["control_equal_time"]
    assert recipe(longer, LENGTH) == recipe(control, LENGTH)
    assert longer.config.detector.dump() == control.config.detector.dump()
    assert longer.config.steps > control.config.steps


def test_its_head_says_how_to_run_it(config):
    head = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any(f"pipeline run configs/{config.name}" in line for line in head)


def without_seed(axes):
    return {name: value for name, value in axes.items() if name != "seed"}


@pytest.mark.parametrize("config", EXPERIMENTS, indirect=True, ids=lambda path: path.stem)
def test_every_arm_has_the_control_of_its_budget(nodes, config):
    arms = [node for node in nodes.values() if node.uses == "distill"]
    plain = [node for node in nodes.values() if node.uses == "train" and node.entry != "teacher"]
    assert len({(arm.entry, *without_seed(arm.axes).items()) for arm in arms}) > 1, "one arm is no experiment"
    for arm in arms:
        student = arm.config.student.dump()
        (control,) = [node for node in plain if recipe(node) == recipe(arm) and node.config.detector.dump() == student]
        assert control.entry in ("control", f"control_{arm.config.images}", arm.entry.removesuffix("_taught"))


@pytest.mark.parametrize("config", EXPERIMENTS, indirect=True, ids=lambda path: path.stem)
def test_an_experiment_trains_side_by_side_measures_and_tells(nodes, config):
    assert {node.uses for node in nodes.values()} >= {"dataset", "train", "distill", "validate", "report"}
    assert graph.load(config, (), "stages").jobs == 2


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_stated_beforehand(config):
    head = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert any(f"pipeline run configs/experiments/{config.name}" in line for line in head)
    assert "# STATED BEFOREHAND" in head
    for what in ("resolution", "steps", "learning rate", "minutes", "detectable"):
        assert any(line.startswith(f"# {what}  ") for line in head), what
    assert not any("@" in line for line in head)


@pytest.mark.parametrize(
    "config", [path for path in EXPERIMENTS if "methods" in path.stem], indirect=True, ids=lambda p: p.stem
)
def test_methods_are_compared_on_three_seeds_and_at_equal_time(nodes, config):
    arms = {node.entry for node in nodes.values() if node.uses == "distill"}
    assert arms >= {"assistant", "pkd", "head", "head_pkd"}
    seeds = {
        entry: {node.axes["seed"] for node in nodes.values() if node.entry == entry} for entry in (*arms, "control")
    }
    assert all(seeds[entry] == {0, 1, 2} for entry in ("control", "assistant", "pkd", "head"))
    longer = nodes["control_equal_time[seed=0]"]
    assert recipe(longer, LENGTH) == recipe(nodes["control[seed=0]"], LENGTH)
    assert longer.config.steps > nodes["control[seed=0]"].config.steps


@pytest.mark.parametrize(
    "name", ["hands_on", "head_r50_to_r18", "pkd_r50_to_r18", "task_adaptive_r101_to_r50", "tf_head_r18"]
)
def test_what_was_not_run_says_so(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert "NOT EXECUTED HERE" in text
    assert "Not as published" in text
