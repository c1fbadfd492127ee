import hashlib
import json

import numpy as np
import onnx
import PIL.Image
import pytest

from deploy import atomic
from deploy.bundle import Bundle
from deploy.errors import DeployError
from deploy.image import Placement
from deploy.predictor import Predictor
from deploy.release import Sample, write
from deploy.sidecar import beside
from deploy.verification import verify


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
    (only,) = opened.models
    assert (bundle / only.file).read_bytes() == model.read_bytes()
    assert opened.release["classes"] == ["cat", "dog"]
    assert only.accuracy == {"statistics": {"ap": 0.5}}
    assert (bundle / "README.md").read_text() == "# Tiny\n"
    names = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    tensors = {f"sample/{name}.npy" for name in ("images", "boxes", "scores", "labels")}
    assert names == {"release.json", "README.md", "model.onnx", "sample/image.jpg", "sample/detections.json", *tensors}
    assert set(opened.release["files"]) == names - {"release.json"}
    expected = opened.expected("model.onnx")
    with Predictor.open(bundle) as predictor:
        (found,) = predictor([opened.sample_image])
    assert found.to_list(contract.classes) == expected.to_list(contract.classes)
    assert len(found) == 3


def test_golden_tensors_are_what_the_reference_takes_and_gives(bundle):
    """A runtime in another language starts from these: numpy's own format, uint8 in, candidates out."""
    golden = {name: np.load(bundle / "sample" / f"{name}.npy") for name in ("images", "boxes", "scores", "labels")}
    assert [(one.dtype.str, one.shape) for one in golden.values()] == [
        ("|u1", (1, 64, 64, 3)),
        ("<f4", (1, 4, 4)),
        ("<f4", (1, 4)),
        ("<i8", (1, 4)),
    ]
    with Predictor.open(bundle) as predictor:
        batch, _ = predictor.prepare([predictor.decode(Bundle.open(bundle).sample_image)])
        found = predictor.infer(batch)
    np.testing.assert_array_equal(golden["images"], batch)
    np.testing.assert_array_equal(golden["scores"], found.scores_BN)


def test_every_check_passes(bundle):
    assert [(check.name, check.passed) for check in verify(bundle)] == [
        ("files", True),
        ("model", True),
        ("sample", True),
    ]


def test_a_bundle_without_sample(tmp_path, model, entry, release):
    opened = write(tmp_path / "plain", [entry(model)], release, "card")
    assert opened.sample_image is None
    assert opened.expected("model.onnx") is None
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
        (lambda release: release.update(schema_version=3), "schema_version 3 is none of 1, 2"),
        (lambda release: release.pop("licence") and None, "licence is missing"),
        (lambda release: release.update(files=[]), r"files is \[\]"),
        (lambda release: release["files"].pop("model.onnx") and None, r"does not list model\.onnx"),
        (lambda release: release["files"].update({"../x": {}}), r"\.\./x lies outside the bundle"),
        (lambda release: release["sample"].update(image="other.jpg"), "does not list the files of the sample"),
        (lambda release: release.update(classes=["dog", "cat"]), "classes are not those of its contracts"),
        (lambda release: release["models"][0]["contract"].update(colour="bgr"), "unknown field 'colour'"),
        (lambda release: release["models"][0].update(size=1), "unknown field 'size'"),
        (lambda release: release["models"][0].pop("backend") and None, "missing field 'backend'"),
        (lambda release: release["models"][0].update(made_for=[]), r"made_for is \[\]"),
        (lambda release: release["models"][0].update(made_for={"versions": "10"}), "made_for.versions is '10'"),
        (lambda release: release["models"][0].update(latency=[3]), "a row of latency is no object"),
        (lambda release: release["sample"].update(tensors=[]), "detections and tensors are no objects"),
        (lambda release: release["models"][0].update(sha256="0"), "another hash among the models"),
        (lambda release: release.update(models=[]), "it holds no model"),
        (lambda release: release.update(models=release["models"] * 2), "model.onnx is listed twice"),
        (lambda release: release["models"].append(3), "an object is wanted, given 3"),
        (lambda release: [release], "schema_version None"),
    ],
)
def test_a_changed_release_json_is_refused(bundle, change, message):
    rewrite(bundle, change)
    with pytest.raises(DeployError, match=message):
        Bundle.open(bundle)


def test_the_contract_must_be_that_of_the_model(bundle):
    rewrite(bundle, lambda release: release["models"][0]["contract"].update(nms_iou=0.9))
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
    rewrite(bundle, lambda release: release["models"][0].update(sha256=digest["sha256"]))
    checks = verify(bundle)
    assert [check.passed for check in checks] == [True, True, False]
    assert "a score moved" in checks[-1].detail


def test_what_lacks_is_told_at_once_and_nothing_is_written(tmp_path, model, entry, release, white, detections):
    (tmp_path / "there").mkdir()
    del release["licence"]
    sample = Sample(white, Placement((1, 1), (1, 1)), {"other.onnx": detections()}, {})
    models = [entry(model), entry(model, sha256="0" * 64)]
    with pytest.raises(DeployError) as caught:
        write(tmp_path / "there", models, release | {"size": 1}, "card", sample)
    for part in (
        "licence is missing",
        "'size' is unknown",
        "a sample without detections",
        "the folder exists",
        "unknown model other.onnx",
        "what the reference model.onnx finds",
        "model.onnx is listed twice",
        "its sha256 is another",
    ):
        assert part in str(caught.value)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(tmp_path, model, entry, release, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(atomic, "sync", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "new", [entry(model)], release, "card")
    assert set(tmp_path.iterdir()) == before


@pytest.fixture
def two(tmp_path, model, new_model, new_contract, entry, release, timing):
    """Two files: the reference, slow here, and a faster one that is half precise in name and has another candidate limit."""
    other = new_model(tmp_path / "other.onnx", new_contract(nms_iou=0.4))
    image = tmp_path / "sample.png"
    PIL.Image.new("RGB", (64, 64), "white").save(image)
    with Predictor.open(model) as a, Predictor.open(other) as b:
        sample = Sample.take(image, {"model.onnx": a, "fast.onnx": b})
    models = [
        entry(model, latency=(timing(9.0, "some CPU"),)),
        entry(
            other,
            file="fast.onnx",
            precision="fp16",
            contract=new_contract(nms_iou=0.4),
            latency=(timing(3.0, "some CPU"),),
        ),
    ]
    return write(tmp_path / "two", models, release, "card", sample)


def test_of_several_the_fastest_is_taken_unless_one_is_named(two):
    with Predictor.open(two.path) as predictor:
        assert predictor.model.file == "fast.onnx"
        assert predictor.contract.nms_iou == 0.4
    with Predictor.open(two.path, model="model.onnx") as predictor:
        assert predictor.model.file == "model.onnx"
        assert predictor.contract == two.contract
    with pytest.raises(DeployError, match=r"no model 'x'; choose one of model\.onnx, fast\.onnx"):
        Predictor.open(two.path, model="x")
    with pytest.raises(DeployError, match="chosen from a bundle's folder"):
        Predictor.open(two.path / "fast.onnx", model="fast.onnx")


def test_a_named_backend_or_provider_limits_the_choice(two):
    with Predictor.open(two.path, "onnxruntime", provider="cpu") as predictor:
        assert predictor.model.file == "fast.onnx"
    with pytest.raises(DeployError, match="ONNX Runtime here has no provider cuda"):
        Predictor.open(two.path, provider="cuda")
    with pytest.raises(DeployError, match="there is no 'mine'"):  # it gets the reference, if there is one
        Predictor.open(two.path, "mine")


def test_each_file_has_its_own_sample(two):
    for name in (None, "model.onnx"):
        checks = verify(two.path, model=name)
        assert [check.passed for check in checks] == [True, True, True]
        assert checks[1].detail.startswith(name or "fast.onnx")
    rewrite(two.path, lambda rows: rows[:-1], "sample/fast.onnx.detections.json")
    assert verify(two.path)[-1].passed is False
    assert verify(two.path, model="model.onnx")[-1].passed is True
    rewrite(two.path, lambda release: release["sample"]["detections"].pop("fast.onnx") and None)
    assert verify(two.path)[-1].passed is None


def test_files_of_one_bundle_are_of_one_kind(tmp_path, model, new_model, new_contract, entry, release):
    contract = new_contract(score_threshold=0.4, classes=("dog", "cat"))
    other = entry(new_model(tmp_path / "other.onnx", contract), file="other.onnx", contract=contract)
    with pytest.raises(DeployError, match=r"other\.onnx and model\.onnx differ in classes; .* in score_threshold"):
        write(tmp_path / "mixed", [entry(model), other], release, "card")


def test_a_sidecar_goes_with_its_file(tmp_path, model, entry, release):
    beside(model).write_text("{}")
    made = write(tmp_path / "engine", [entry(model)], release, "card")
    assert "model.onnx.json" in made.release["files"]
    (made.path / "model.onnx.json").write_text("other")
    with pytest.raises(DeployError, match=r"model\.onnx\.json was changed"):
        Bundle.open(made.path)


def test_a_bundle_of_schema_1_is_read(bundle, contract):
    def older(release):
        (model,) = release.pop("models")
        release["schema_version"] = 1
        release["contract"] = model["contract"]
        release["accuracy"], release["latency"] = {"ap": 0.5}, None
        release["sample"] = {"image": "sample/image.jpg", "detections": "sample/detections.json"}

    rewrite(bundle, older)
    opened = Bundle.open(bundle)
    (model,) = opened.models
    assert (model.file, model.backend, model.precision, model.accuracy) == (
        "model.onnx",
        "onnxruntime",
        "fp32",
        {"ap": 0.5},
    )
    assert opened.contract == contract
    assert [check.passed for check in verify(bundle)] == [True, True, True]
    rewrite(bundle, lambda release: release.pop("accuracy") and None)
    with pytest.raises(DeployError, match="'accuracy' is missing"):
        Bundle.open(bundle)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(DeployError, match=r"release\.json: it cannot be read .* a bundle's folder is wanted"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle").mkdir()  # as in a release stage's artifact
    with pytest.raises(DeployError, match=r"release\.json: it cannot be read .* did you mean .*bundle\?"):
        Bundle.open(tmp_path)
