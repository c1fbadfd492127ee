import hashlib
import json

import onnx
import pytest

from deploy import bundle as module
from deploy.bundle import Bundle, verify, write
from deploy.errors import DeployError
from deploy.predictor import Predictor


def rewrite(bundle, change, file="release.json"):
    """Changes a JSON file of a bundle and, unless it is release.json, its hash too: a change nobody could see."""
    values = json.loads((bundle / file).read_text())
    values = change(values) or values
    (bundle / file).write_text(json.dumps(values))
    if file != "release.json":
        content = (bundle / file).read_bytes()
        digest = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        rewrite(bundle, lambda release: release["files"].update({file: digest}))


def test_what_is_written_is_read(bundle, contract, model):
    opened = Bundle.open(bundle)
    assert opened.contract == contract
    assert opened.model.read_bytes() == model.read_bytes()
    assert opened.release["classes"] == ["cat", "dog"]
    assert opened.release["accuracy"] == {"ap": 0.5}
    assert (bundle / "README.md").read_text() == "# Tiny\n"
    names = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    assert names == {"release.json", "README.md", "model.onnx", "sample/image.jpg", "sample/detections.json"}
    assert set(opened.release["files"]) == names - {"release.json"}
    image, expected = opened.sample
    with Predictor.open(bundle) as predictor:
        (found,) = predictor([image])
    assert found.to_list(contract.classes) == expected.to_list(contract.classes)
    assert len(found) == 3


def test_every_check_passes(bundle):
    assert [(check.name, check.passed) for check in verify(bundle)] == [
        ("files", True),
        ("model", True),
        ("sample", True),
    ]


def test_a_bundle_without_sample(tmp_path, model, contract, release):
    opened = write(tmp_path / "plain", model, contract, release, "card")
    assert opened.sample is None
    assert verify(opened.path)[-1].passed is None


@pytest.mark.parametrize("name", ["model.onnx", "README.md", "sample/image.jpg", "sample/detections.json"])
def test_a_changed_file_is_refused_by_name(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    for opening in (Bundle.open, Predictor.open):
        with pytest.raises(DeployError, match=f"{name} was changed"):
            opening(bundle)
    assert [check.passed for check in verify(bundle)] == [False]


def test_all_that_is_wrong_is_told_at_once(bundle):
    (bundle / "model.onnx").unlink()
    (bundle / "README.md").write_text("other")
    with pytest.raises(DeployError, match=r"README\.md was changed .*; model\.onnx is missing") as caught:
        Bundle.open(bundle)
    assert "copy the bundle again" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda release: release.update(schema_version=2), "schema_version 2 is not 1"),
        (lambda release: release.pop("licence") and None, "licence is missing"),
        (lambda release: release.update(files=[]), r"files is \[\]"),
        (lambda release: release["files"].pop("model.onnx") and None, r"does not list model\.onnx"),
        (lambda release: release["files"].update({"../x": {}}), r"\.\./x lies outside the bundle"),
        (lambda release: release.update(sample={"image": "other.jpg"}), "does not list the files of the sample"),
        (lambda release: release.update(classes=["dog", "cat"]), "classes are not those of its contract"),
        (lambda release: release["contract"].update(colour="bgr"), "unknown field 'colour'"),
        (lambda release: [release], "schema_version None"),
    ],
)
def test_a_changed_release_json_is_refused(bundle, change, message):
    rewrite(bundle, change)
    with pytest.raises(DeployError, match=message):
        Bundle.open(bundle)


def test_the_contract_must_be_that_of_the_model(bundle):
    rewrite(bundle, lambda release: release["contract"].update(nms_iou=0.9))
    with pytest.raises(DeployError, match=r"release\.json's contract is not the model's"):
        Predictor.open(bundle)
    assert [check.passed for check in verify(bundle)] == [True, False]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda rows: rows[0].update(score=rows[0]["score"] - 0.0005), True),
        (lambda rows: rows[0].update(score=rows[0]["score"] - 0.01), False),
        (lambda rows: rows[0]["box_xyxy"].__setitem__(2, rows[0]["box_xyxy"][2] - 0.15), True),  # 0.075 px of the input
        (lambda rows: rows[0]["box_xyxy"].__setitem__(2, rows[0]["box_xyxy"][2] - 1), False),
        (lambda rows: rows[0].update(label=1), False),
        (lambda rows: rows[:-1], False),
    ],
)
def test_the_sample_must_be_reproduced(bundle, change, verdict):
    rewrite(bundle, change, "sample/detections.json")
    assert verify(bundle)[-1].passed is verdict


def test_a_model_that_answers_otherwise_fails(bundle):
    file = onnx.load(bundle / "model.onnx")
    (scores,) = (one for one in file.graph.initializer if one.name == "scores_1N")
    scores.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scores) * 0.9, "scores_1N"))
    onnx.save(file, bundle / "model.onnx")
    content = (bundle / "model.onnx").read_bytes()
    digest = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    rewrite(bundle, lambda release: release["files"].update({"model.onnx": digest}))
    checks = verify(bundle)
    assert [check.passed for check in checks] == [True, True, False]
    assert "a score moved" in checks[-1].detail


def test_what_lacks_is_told_at_once_and_nothing_is_written(tmp_path, model, contract, release, white, detections):
    (tmp_path / "there").mkdir()
    del release["licence"]
    with pytest.raises(DeployError) as caught:
        write(tmp_path / "there", model, contract, release | {"size": 1}, "card", (white, detections()))
    for part in ("licence is missing", "'size' is unknown", "a sample without detections", "the folder exists"):
        assert part in str(caught.value)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(tmp_path, model, contract, release, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "_sync", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "new", model, contract, release, "card")
    assert set(tmp_path.iterdir()) == before


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(DeployError, match=r"release\.json: it cannot be read .* a bundle's folder is wanted"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle").mkdir()  # as in a release stage's artifact
    with pytest.raises(DeployError, match=r"release\.json: it cannot be read .* did you mean .*bundle\?"):
        Bundle.open(tmp_path)
