"""Pseudo labels: what a model finds becomes training annotations, where none is yet, and validation stays as it was."""

import json

import numpy as np
import onnx
import pytest

from deploy.contract import Contract
from deploy.image import ImageSpec
from pipeline.errors import UserError, VerdictError
from stages import pseudo_label
from stages.artifacts.exported_model import ExportedModel, ParityRecord
from stages.data.coco import CocoSplit

# In pixels of the canvas of 64, and of images of 128: class 3 and class 5.
BOXES = np.asarray([[10, 10, 30, 30], [40, 40, 60, 60]], np.float32)


@pytest.fixture
def model(tmp_path, digits):
    """An exported model that finds the same two objects in every image, with scores 0.9 and 0.6."""
    values = {"boxes": BOXES[None], "scores": np.asarray([[0.9, 0.6]], np.float32), "labels": np.asarray([[3, 5]])}
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in values.items()]
    nodes = [onnx.helper.make_node("Constant", [], [one.name], value=one) for one in stored]
    outputs = [onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in stored]
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, [1, 64, 64, 3])
    graph = onnx.helper.make_graph(nodes, "constant", [images], outputs)
    file = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), file)
    spec = ImageSpec(64, 64, (0, 0, 0))
    contract = Contract(spec, digits.classes, digits.category_ids, 2, one_by_one=True)
    contract.write_to_onnx(file)
    told = {"reference": "", "images": 1, "matched": 1, "unmatched": 0, "max_box_px": 0, "max_score": 0}
    parity = ParityRecord(**told, label_mismatches=0, passed=True, sentence="")
    made = ExportedModel(
        file=file.name,
        sha256="",
        bytes=1,
        classes=digits.classes,
        parameters=1,
        flops=1,
        opset=18,
        contract=json.loads(contract.to_json()),
        parity=parity,
        initialisers=1,
        constants=1,
        source="",
    )
    return made.placed(tmp_path, name="big", key="big-key")


@pytest.fixture
def bare(tmp_path, digits):
    """The digits, of which half of the training images have lost their annotations."""
    document = json.loads(digits.annotations("train").read_text())
    kept = {one["id"] for one in document["images"][::2]}
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in kept]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "train.json").write_text(json.dumps(document))
    (tmp_path / "bare" / "val.json").write_bytes(digits.annotations("val").read_bytes())
    moved = {
        name: getattr(digits, name).model_copy(
            update={"images": str(digits.folder(name)), "annotations": f"{name}.json"}
        )
        for name in ("train", "val")
    }
    return digits.model_copy(update=moved).placed(tmp_path / "bare", name="bare", key="bare-key")


def training(data):
    return json.loads(data.annotations("train").read_text())


def test_images_without_labels_get_them(make, tmp_path, model, bare):
    made = make(tmp_path, "more", pseudo_label, {}, model=model, data=bare)
    before, after = training(bare), training(made)
    new = after["annotations"][len(before["annotations"]) :]
    assert after["annotations"][: len(before["annotations"])] == before["annotations"]
    assert len(new) == 2 * len(before["images"][1::2])
    assert {one["image_id"] for one in new} == {one["id"] for one in before["images"][1::2]}
    assert len({one["id"] for one in after["annotations"]}) == len(after["annotations"])
    assert new[0]["bbox"] == pytest.approx([20, 20, 40, 40])
    assert new[0]["category_id"] == bare.category_ids[3]
    assert new[0]["pseudo_score"] == pytest.approx(0.9)
    assert made.train.box_count == bare.train.box_count + len(new)
    assert made.fingerprint != bare.fingerprint
    assert f"{len(new)} of {len(after['annotations'])} training boxes are pseudo labels" in made.problems[-1]
    assert made.annotations("val").read_bytes() == bare.annotations("val").read_bytes()
    split = CocoSplit(made.folder("train"), made.annotations("train"))
    assert split.sample(1).labels_N.tolist() == [3, 5]


def test_what_is_annotated_is_not_labelled_twice(make, tmp_path, model, bare):
    document = training(bare)
    image = document["images"][0]["id"]
    number = max(one["id"] for one in document["annotations"]) + 1
    known = {
        "image_id": image,
        "category_id": bare.category_ids[3],
        "bbox": [22, 22, 40, 40],
        "area": 1600,
        "iscrowd": 0,
    }
    crowd = {**known, "category_id": bare.category_ids[5], "bbox": [0, 0, 128, 128], "iscrowd": 1, "id": number + 1}
    document["annotations"] += [{**known, "id": number}, crowd]
    bare.annotations("train").write_text(json.dumps(document))
    made = make(tmp_path, "more", pseudo_label, {"images": "all"}, model=model, data=bare)
    new = [one for one in training(made)["annotations"] if "pseudo_score" in one]
    assert image not in {one["image_id"] for one in new}
    assert len({one["image_id"] for one in new}) > len(document["images"]) / 2


def test_only_what_is_above_the_score(make, tmp_path, model, bare):
    made = make(tmp_path, "more", pseudo_label, {"score": 0.7}, model=model, data=bare)
    assert {one["category_id"] for one in training(made)["annotations"] if "pseudo_score" in one} == {
        bare.category_ids[3]
    }
    with pytest.raises(VerdictError, match=r"nothing new is found above 0.95 in 20 images; lower score"):
        make(tmp_path, "none", pseudo_label, {"score": 0.95}, model=model, data=bare)


def test_nothing_to_label_and_other_classes_are_told(make, tmp_path, model, digits):
    with pytest.raises(UserError, match="every training image has annotations; set images: all"):
        make(tmp_path, "none", pseudo_label, {}, model=model, data=digits)
    other = model.model_copy(update={"classes": ("a",)}).placed(model.directory, name="other", key="other-key")
    with pytest.raises(UserError, match="other has other classes than the dataset"):
        make(tmp_path, "other", pseudo_label, {}, model=other, data=digits)
