"""Every defect of a COCO dataset: planted, found, counted, and refused or handled as it says."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from stages.data.coco import CocoSplit
from stages.data.coco_check import check
from stages.data.coco_document import parse
from stages.data.source import RawDataset, RawSplit

Document = dict[str, list[dict[str, object]]]


class Drawer:
    """Two splits of two 40 x 30 images, clean until a test spoils them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        self.documents: dict[str, Document] = {}
        for split in ("train", "val"):
            (folder / split).mkdir()
            for index in (1, 2):
                self.image(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(folder / split / f"{index}.png")
            self.documents[split] = {
                "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)],
                "annotations": [box(i, i, 5 + i, [2.0, 3.0, 10.0, 12.0]) for i in (1, 2)],
                "categories": [{"id": 6, "name": "cat"}, {"id": 7, "name": "dog"}],
            }

    @staticmethod
    def image(pixels: np.ndarray) -> Image.Image:
        return Image.fromarray(pixels)

    def raw(self) -> RawDataset:
        for split, document in self.documents.items():
            (self.folder / f"{split}.json").write_text(json.dumps(document))
        train, val = (RawSplit(self.folder / name, self.folder / f"{name}.json") for name in ("train", "val"))
        return RawDataset(train, val)

    def refusal(self) -> str:
        with pytest.raises(UserError) as caught:
            check(self.raw())
        return str(caught.value)


def box(number: int, image: int, category: int, bbox: list[float], **more: object) -> dict[str, object]:
    """One annotation."""
    area = bbox[2] * bbox[3]
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0, **more}


@pytest.fixture
def drawer(tmp_path: Path) -> Drawer:
    return Drawer(tmp_path)


def test_clean_data_has_nothing_to_say(drawer: Drawer) -> None:
    checked = check(drawer.raw())
    assert checked.findings == ()
    assert [category["id"] for category in checked.train["categories"]] == [6, 7]
    train = np.stack([np.asarray(Image.open(drawer.folder / "train" / f"{i}.png")) for i in (1, 2)])
    np.testing.assert_allclose(checked.mean_rgb, train.reshape(-1, 3).mean(axis=0), rtol=1e-12)


def test_missing_image(drawer: Drawer) -> None:
    (drawer.folder / "val" / "2.png").unlink()
    assert drawer.refusal().startswith(f"val: 1 images missing in {drawer.folder / 'val'} (2.png);")


def test_truncated_image(drawer: Drawer) -> None:
    file = drawer.folder / "train" / "1.png"
    file.write_bytes(file.read_bytes()[:500])
    assert "train: 1 unreadable images (1.png: " in drawer.refusal()


def test_something_that_is_no_image(drawer: Drawer) -> None:
    (drawer.folder / "train" / "1.png").write_text("hello")
    assert "train: 1 unreadable images (1.png: " in drawer.refusal()


@pytest.mark.parametrize(
    ("part", "what"), [("images", "image ids"), ("annotations", "annotation ids"), ("categories", "category ids")]
)
def test_duplicate_ids(drawer: Drawer, part: str, what: str) -> None:
    entries = drawer.documents["train"][part]
    entries.append(copy.deepcopy(entries[0]))
    assert f"train: 1 duplicate {what} ({entries[0]['id']})" in drawer.refusal()


def test_duplicate_category_names(drawer: Drawer) -> None:
    drawer.documents["train"]["categories"][1]["name"] = "cat"
    assert "train: 1 duplicate category names (cat)" in drawer.refusal()


def test_annotation_of_an_unknown_category(drawer: Drawer) -> None:
    drawer.documents["val"]["annotations"][0]["category_id"] = 9
    assert "val: 1 annotations of unknown categories (annotation 1: category 9)" in drawer.refusal()


def test_annotation_of_an_unknown_image(drawer: Drawer) -> None:
    drawer.documents["train"]["annotations"][0]["image_id"] = 77
    assert "train: 1 annotations of unknown images (annotation 1: image 77)" in drawer.refusal()


def test_category_of_val_that_train_calls_otherwise(drawer: Drawer) -> None:
    drawer.documents["val"]["categories"][1]["name"] = "wolf"
    assert "val: 1 categories that train does not have (7 'wolf', in train 'dog')" in drawer.refusal()


def test_val_may_list_fewer_categories(drawer: Drawer) -> None:
    del drawer.documents["val"]["categories"][1]
    drawer.documents["val"]["annotations"][1]["category_id"] = 6
    checked = check(drawer.raw())
    assert checked.val["categories"] == checked.train["categories"]
    assert checked.findings == ("val: 1 categories without boxes (dog); kept; they have no AP",)


def test_image_in_both_splits_under_another_name(drawer: Drawer) -> None:
    (drawer.folder / "val" / "2.png").write_bytes((drawer.folder / "train" / "1.png").read_bytes())
    assert "train and val: 1 images are in both (1.png is 2.png of val)" in drawer.refusal()


def test_image_in_both_splits_saved_again(drawer: Drawer) -> None:
    """Other bytes, the same pixels."""
    again = drawer.folder / "val" / "2.png"
    Image.open(drawer.folder / "train" / "1.png").save(again, compress_level=0)
    assert again.read_bytes() != (drawer.folder / "train" / "1.png").read_bytes()
    assert "train and val: 1 images are in both (1.png is 2.png of val)" in drawer.refusal()


def test_classes_that_are_left_out_are_counted_and_their_images_stay(drawer: Drawer) -> None:
    checked = check(drawer.raw(), ("dog",))
    assert [image["file_name"] for image in checked.train["images"]] == ["1.png", "2.png"]
    assert [(a["image_id"], a["category_id"]) for a in checked.train["annotations"]] == [(2, 1)]
    assert checked.train["categories"] == checked.val["categories"] == [{"id": 1, "name": "dog"}]
    assert checked.findings[0] == (
        "train: 1 boxes of classes that are not asked for (1 cat); left out, their images stay"
    )
    assert "train: 1 images without boxes (1.png); kept, as images where nothing is to be found" in checked.findings


def test_classes_that_no_box_has(drawer: Drawer) -> None:
    drawer.documents["val"]["annotations"].pop()
    with pytest.raises(UserError, match=r"^val: no boxes of dog; set `classes` to some that are there$"):
        check(drawer.raw(), ("dog",))
    with pytest.raises(UserError, match=r"^classes: the data has no 'wolf'; there are: cat, dog$"):
        check(drawer.raw(), ("wolf",))


def test_image_twice_in_one_split_is_said(drawer: Drawer) -> None:
    (drawer.folder / "val" / "2.png").write_bytes((drawer.folder / "val" / "1.png").read_bytes())
    assert check(drawer.raw()).findings == ("val: 1 images are there more than once (1.png is 2.png); kept",)


def test_wrong_size(drawer: Drawer) -> None:
    drawer.documents["train"]["images"][0]["width"] = 80
    assert "(1.png: 80 x 30 given, is 40 x 30)" in drawer.refusal()


def test_size_before_exif_rotation(drawer: Drawer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    drawer.image(np.zeros((30, 40, 3), np.uint8)).save(drawer.folder / "val" / "1.png", exif=exif)
    assert "1.png: 40 x 30 given, is 30 x 40 upright, that is after its EXIF rotation" in drawer.refusal()


def test_no_boxes_and_no_images(drawer: Drawer) -> None:
    drawer.documents["train"]["annotations"].clear()
    drawer.documents["val"]["images"].clear()
    drawer.documents["val"]["annotations"].clear()
    assert drawer.refusal().splitlines() == [
        "train: no boxes on its 2 images; give a file with annotations",
        "val: no images; give a file that lists some",
    ]


def test_not_coco_at_all(drawer: Drawer) -> None:
    drawer.documents["train"]["annotations"][0].pop("bbox")
    drawer.documents["train"]["annotations"][1]["bbox"] = [1.0, 2.0, float("nan"), 3.0]
    text = drawer.refusal()
    assert "1 x 'Field required' (annotations[0].bbox)" in text
    assert "1 x 'Input should be a finite number' (annotations[1].bbox[2])" in text


def test_json_that_is_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"images": [')
    with pytest.raises(UserError, match=r"a.json: 1 x 'Invalid JSON"):
        parse(file)


def test_all_refusals_at_once_with_three_examples_each(drawer: Drawer) -> None:
    (drawer.folder / "val" / "1.png").unlink()
    drawer.documents["train"]["images"][1]["height"] = 1
    drawer.documents["train"]["annotations"] += [box(10 + i, 1, 99, [0.0, 0.0, 5.0, 5.0]) for i in range(5)]
    lines = drawer.refusal().splitlines()
    assert len(lines) == 3
    assert "5 annotations of unknown categories" in lines[0]
    assert lines[0].count("category 99") == 3
    assert ", ...)" in lines[0]


def test_boxes_that_leave_the_image_are_clipped_for_training_only(drawer: Drawer) -> None:
    drawer.documents["train"]["annotations"].append(box(3, 1, 6, [30.0, -4.0, 20.0, 10.0]))
    checked = check(drawer.raw())
    assert checked.findings == (
        "train: 1 boxes reach out of their image (annotation 3: [30, -4, 20, 10] in 40 x 30); "
        "clipped for training, evaluated as annotated",
    )
    assert list(checked.train["annotations"][2]["bbox"]) == [30, -4, 20, 10]
    assert learnt(drawer, 0)[1] == [30, 0, 40, 6]


@pytest.mark.parametrize("bbox", [[5.0, 5.0, 0.0, 3.0], [5.0, 5.0, -2.0, 3.0], [50.0, 5.0, 4.0, 3.0]])
def test_boxes_without_area_are_not_trained_on(drawer: Drawer, bbox: list[float]) -> None:
    drawer.documents["train"]["annotations"].append(box(3, 1, 6, bbox))
    checked = check(drawer.raw())
    assert len(checked.findings) == 1
    assert "1 boxes of zero size or wholly outside their image" in checked.findings[0]
    assert len(checked.train["annotations"]) == 3
    assert learnt(drawer, 0) == [[2, 3, 12, 15]]


def test_crowds_are_not_trained_on(drawer: Drawer) -> None:
    drawer.documents["train"]["annotations"].append(box(3, 1, 6, [1.0, 1.0, 9.0, 9.0], iscrowd=1))
    checked = check(drawer.raw())
    assert checked.findings[0].startswith("train: 1 crowd annotations (annotation 3); not trained on;")
    assert checked.train["annotations"][2]["iscrowd"] == 1
    assert learnt(drawer, 0) == [[2, 3, 12, 15]]


def test_images_and_categories_without_boxes_are_kept(drawer: Drawer) -> None:
    drawer.documents["train"]["annotations"].pop()
    checked = check(drawer.raw())
    assert checked.findings == (
        "train: 1 images without boxes (2.png); kept, as images where nothing is to be found",
        "train: 1 categories without boxes (dog); kept: detectors get an output that learns nothing",
    )
    assert learnt(drawer, 1) == []


def test_what_pycocotools_needs_is_filled_in(drawer: Drawer) -> None:
    train = drawer.documents["train"]
    for annotation in train["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    train["annotations"][0]["id"] = 0
    del train["images"][0]["width"]
    checked = check(drawer.raw())
    assert [finding.partition(" (")[0] for finding in checked.findings] == [
        "train: 1 images without width and height",
        "train: 2 annotations without area",
        "train: 1 annotation has the id 0",
    ]
    assert [annotation["id"] for annotation in checked.train["annotations"]] == [1, 2]
    assert [annotation["area"] for annotation in checked.train["annotations"]] == [120, 120]
    assert checked.train["images"][0]["width"] == 40


def test_checked_file_scores_as_pycocotools_scores_the_original(drawer: Drawer) -> None:
    """Crowd, empty and outlying boxes stay what COCO evaluation takes them for."""
    mask = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    drawer.documents["val"]["annotations"] += [
        box(3, 1, 6, [5.0, 5.0, 0.0, 3.0]),
        box(4, 2, 7, [30.0, 20.0, 20.0, 20.0]),
        box(5, 2, 7, [0.0, 0.0, 9.0, 9.0], iscrowd=1),
    ]
    drawer.documents["val"]["info"] = {}  # type: ignore[assignment]
    checked = check(drawer.raw())
    (drawer.folder / "checked.json").write_text(json.dumps(checked.val))
    results = [
        {"image_id": i, "category_id": c, "bbox": b, "score": s}
        for i, c, b, s in [
            (1, 6, [2.0, 3.0, 10.0, 12.0], 0.9),
            (1, 6, [5.0, 5.0, 1.0, 3.0], 0.8),
            (2, 7, [30.0, 20.0, 20.0, 20.0], 0.7),
            (2, 7, [1.0, 1.0, 4.0, 4.0], 0.95),
        ]
    ]
    statistics = []
    for name in ("val.json", "checked.json"):
        truth = mask[0].COCO(drawer.folder / name)
        evaluation = mask[1].COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        statistics.append(evaluation.stats.tolist())
    assert statistics[0] == statistics[1]
    assert 0 < statistics[0][0] < 1


def learnt(drawer: Drawer, index: int) -> list[list[float]]:
    """Boxes that training sees on an image of the checked training file."""
    file = drawer.folder / "checked.json"
    file.write_text(json.dumps(check(drawer.raw()).train))
    boxes: list[list[float]] = CocoSplit(drawer.folder / "train", file).sample(index).boxes_N4.tolist()
    return boxes
