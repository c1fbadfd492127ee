"""The contact sheet: what it counts, and that boxes lie where detectors get them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline.__main__
from deploy.drawing import colour
from pipeline.errors import UserError
from stages.data.contact_sheet import CELL_PX, MARGIN_PX, contact_sheet
from stages.data.source import RawDataset, RawSplit


@pytest.fixture
def raw(tmp_path: Path) -> RawDataset:
    """One 200 x 100 image with a car in its right half, and one without anything."""
    splits = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (200, 100), (len(name), len(split), 40)).save(tmp_path / split / name)
        annotations = [
            {"id": 1, "image_id": 1, "category_id": 2, "bbox": [100, 20, 80, 60]},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 90, 90], "iscrowd": 1},
        ]
        images = [{"id": i, "file_name": name} for i, name in ((1, "a.png"), (2, "b.png"))]
        categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "car"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(document))
        splits.append(RawSplit(tmp_path / split, tmp_path / f"{split}.json"))
    return RawDataset(*splits)


def test_boxes_lie_where_the_detector_gets_them(raw: RawDataset, tmp_path: Path) -> None:
    lines = contact_sheet(raw, (160, 160), None, tmp_path / "out" / "sheet.png")
    assert lines == [
        "2 + 2 images, boxes of training + validation: dog 0 + 0, car 1 + 1",
        f"contact sheet of 1 training images: {tmp_path / 'out' / 'sheet.png'}",
    ]
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    head = sheet.shape[0] - CELL_PX - 26
    cell = sheet[head : head + CELL_PX, MARGIN_PX : MARGIN_PX + CELL_PX]
    rows, columns = np.nonzero((cell == colour(1)).all(-1))
    # The image fills the upper half of the square canvas, at 1.6 pixels of the sheet a pixel; the label lies above the box.
    assert (columns.min(), columns.max()) == (160, 288)
    assert rows.max() == 128
    assert 10 < rows.min() < 32
    assert not (cell == colour(0)).all(-1).any()


def test_selected_classes_alone(raw: RawDataset, tmp_path: Path) -> None:
    first, _ = contact_sheet(raw, (64, 96), ("car",), tmp_path / "sheet.png")
    assert first.endswith(": car 1 + 1")
    with pytest.raises(UserError, match="no image has a box"):
        contact_sheet(raw, (64, 96), ("dog",), tmp_path / "sheet.png")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("classes", [None, ("car",)])
def test_what_refers_to_nothing_is_refused(raw: RawDataset, tmp_path: Path, split: str, classes: object) -> None:
    """As the dataset stage refuses it, not as a KeyError."""
    file = tmp_path / f"{split}.json"
    document = json.loads(file.read_text())
    document["annotations"].append({"id": 3, "image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9]})
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"{split}: 1 annotations of unknown categories \(annotation 3: category 9\)"):
        contact_sheet(raw, (64, 96), classes, tmp_path / "sheet.png")  # type: ignore[arg-type]


def test_check_says_where_it_is(raw: RawDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    files = {s: {"images": str(tmp_path / s), "annotations": str(tmp_path / f"{s}.json")} for s in ("train", "val")}
    stage = {"uses": "dataset", "source": {"name": "coco", **files}, "size": 64}
    Path("my.yaml").write_text(json.dumps({"stages": {"data": stage}}))
    assert pipeline.__main__.main(["check", "my.yaml"]) == 0
    assert "data: contact sheet of 1 training images: runs/check/my/data.png" in capfd.readouterr().out
    assert Image.open("runs/check/my/data.png").width > CELL_PX
    (tmp_path / "train" / "a.png").unlink()
    assert pipeline.__main__.main(["check", "my.yaml"]) == 2
    assert "a.png: no such image file" in capfd.readouterr().err
    Path("digits.yaml").write_text(json.dumps({"stages": {"data": {"uses": "dataset", "source": "digits"}}}))
    assert pipeline.__main__.main(["check", "digits.yaml"]) == 0
    assert "contact sheet" not in capfd.readouterr().out  # its images are made when it runs
