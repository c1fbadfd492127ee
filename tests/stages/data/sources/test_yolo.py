"""YOLO folders: data.yaml in the forms people have, labels of boxes and polygons, and what is refused by file and line."""

import json
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

from deploy.image import decode
from pipeline.config import Choice
from pipeline.errors import UserError
from stages.data.source import RawDataset, Source
from stages.data.sources.yolo import label_file, upright_size

Document = dict[str, list[dict[str, object]]]


def labelled(file: Path, *lines: str, size: tuple[int, int] = (40, 20), **options: object) -> Path:
    """Save a (width, height) image and, if there are lines, its label file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file, **options)
    if lines:
        beside = file.with_suffix(".txt")
        text = Path(*("labels" if part == "images" else part for part in beside.parts))
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(f"{line}\n" for line in lines))
    return file


def describe(root: Path, **content: object) -> None:
    """Write data.yaml."""
    (root / "data.yaml").write_text(
        yaml.safe_dump({"train": "images/train", "val": "images/val", "names": ["a", "b"], **content})
    )


def written(root: Path, **settings: object) -> RawDataset:
    """What the source makes of a folder."""
    settings = {"val": "val", **settings} if "val_fraction" not in settings else settings
    choice = Choice.parse(Source, {"name": "yolo", "folder": str(root), **settings})
    (root / "made").mkdir(exist_ok=True)
    return choice.cls(choice.config).write(root / "made")


def read(raw: RawDataset) -> tuple[Document, Document]:
    """Both documents."""
    train, val = (json.loads(split.annotations.read_text()) for split in (raw.train, raw.val))
    return train, val


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images to train on, one of them without objects, and one to validate on."""
    labelled(tmp_path / "images" / "train" / "one.png", "1 0.5 0.5 0.25 0.5", "0 0.1 0.2 0.2 0.4")
    labelled(tmp_path / "images" / "train" / "two.png", "")
    labelled(tmp_path / "images" / "val" / "three.png", "0 0.25 0.25 0.5 0.5")
    describe(tmp_path)
    return tmp_path


def test_centres_become_corners_in_pixels(folder: Path) -> None:
    train, val = read(written(folder))
    assert [a["bbox"] for a in train["annotations"]] == [[15, 5, 10, 10], pytest.approx([0, 0, 8, 8])]
    assert [a["category_id"] for a in train["annotations"]] == [2, 1]
    assert [a["bbox"] for a in val["annotations"]] == [[0, 0, 20, 10]]
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    assert [image["file_name"] for image in train["images"]] == ["images/train/one.png", "images/train/two.png"]
    assert (train["images"][0]["width"], train["images"][0]["height"]) == (40, 20)


def test_a_polygon_becomes_its_box(folder: Path) -> None:
    (folder / "labels/train/one.txt").write_text("1 0.5 0.25 0.75 0.5 0.5 1.0 0.25 0.5\n")
    train, _ = read(written(folder))
    assert [a["bbox"] for a in train["annotations"]] == [[10, 5, 20, 15]]


def test_keypoints_after_a_box_are_left_out(folder: Path) -> None:
    describe(folder, kpt_shape=[2, 3])
    (folder / "labels/train/one.txt").write_text("1 0.5 0.5 0.25 0.5 0.1 0.1 2 0.9 0.9 2\n")
    train, _ = read(written(folder))
    assert [a["bbox"] for a in train["annotations"]] == [[15, 5, 10, 10]]


def test_boxes_are_those_of_the_upright_image(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    labelled(folder / "images/val/three.jpg", "0 0.5 0.5 1 0.5", exif=exif)
    (folder / "images/val/three.png").unlink()
    _, val = read(written(folder))
    assert (val["images"][0]["width"], val["images"][0]["height"]) == (20, 40)
    assert val["annotations"][0]["bbox"] == [0, 10, 20, 20]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize(("orientation", "expected"), [(1, (20, 40)), (3, (20, 40)), (6, (40, 20)), (8, (40, 20))])
def test_sizes_are_those_of_the_decoded_image(
    tmp_path: Path, suffix: str, orientation: int, expected: tuple[int, int]
) -> None:
    """Pillow gives a TIFF's size turned already when it is opened."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = labelled(tmp_path / f"a.{suffix}", exif=exif)
    assert upright_size(file) == (decode(file).height, decode(file).width) == expected


def test_labels_lie_in_labels_or_beside(tmp_path: Path) -> None:
    """What the folder's own path is called counts nothing."""
    root = tmp_path / "images" / "set"
    beside = labelled(root / "train" / "a.png").with_suffix(".txt")
    assert label_file(beside.with_suffix(".png"), root) == beside
    image = labelled(root / "images" / "more" / "images" / "val" / "a.png")
    apart = root / "images" / "more" / "labels" / "val" / "a.txt"
    assert label_file(image, root) == apart
    image.with_suffix(".txt").touch()
    assert label_file(image, root) == image.with_suffix(".txt")
    apart.parent.mkdir(parents=True)
    apart.touch()
    assert label_file(image, root) == apart


def test_names_by_number_may_have_gaps(folder: Path) -> None:
    describe(folder, names={0: "a", 1: "b", 7: "h"})
    (folder / "labels/train/one.txt").write_text("7 0.5 0.5 0.25 0.5\n")
    train, _ = read(written(folder))
    assert [c["name"] for c in train["categories"]] == ["a", "b", "h"]
    assert train["annotations"][0]["category_id"] == 8


def test_names_by_number_may_be_quoted_and_be_numbers(folder: Path) -> None:
    describe(folder, names={"0": "a", "1": 7})
    assert [c["name"] for c in read(written(folder))[0]["categories"]] == ["a", "7"]


def test_images_without_a_label_file_are_said(folder: Path) -> None:
    (folder / "labels/train/two.txt").unlink()
    assert written(folder).findings == (
        "train: 1 images have no label file (labels/train/two.txt); taken as images where nothing is to be found",
    )


def test_a_line_that_stands_there_twice_is_one_object(folder: Path) -> None:
    (folder / "labels/train/one.txt").write_text("1 0.5 0.5 0.25 0.5\n1  0.5 0.5 0.25 0.5\n")
    raw = written(folder)
    assert len(read(raw)[0]["annotations"]) == 1
    assert raw.findings == ("train: 1 lines stand there twice (one.txt:2); each is one object",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0.25", "4 numbers; a box has 5"),
        ("0 0.5 0.5 0.25 0.5 0.9", "6 numbers; a box has 5"),
        ("0 0.5 0.5 0.25 x", "holds what is no number"),
        ("0 0.5 0.5 nan 0.5", "not finite"),
        ("0 0.5 20 0.25 0.5", "20 is not a fraction of the image"),
        ("0 0.5 -0.1 0.25 0.5", "-0.1 is not a fraction"),
        ("2 0.5 0.5 0.25 0.5", "class 2 is not among the 2 names"),
        ("0.5 0.5 0.5 0.25 0.5", "class 0.5 is not among the 2 names"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(folder: Path, line: str, reason: str) -> None:
    (folder / "labels/train/one.txt").write_text(f"0 0.5 0.5 0.25 0.5\n{line}\n")
    with pytest.raises(UserError, match=rf"train: 1 lines cannot be used \(one\.txt:2: .*{reason}"):
        written(folder)


def test_list_files_and_several_entries(tmp_path: Path) -> None:
    for name in "abc":
        labelled(tmp_path / "pictures" / f"{name}.png", "0 0.5 0.5 0.5 0.5")
    labelled(tmp_path / "more" / "images" / "d.png", "0 0.5 0.5 0.5 0.5")
    (tmp_path / "train.txt").write_text("./pictures/a.png\npictures/b.png\n")
    (tmp_path / "val.txt").write_text(f"{tmp_path}/pictures/c.png\n")
    describe(tmp_path, train=["train.txt", "more/images"], val="val.txt")
    train, val = read(written(tmp_path))
    assert [i["file_name"] for i in train["images"]] == ["more/images/d.png", "pictures/a.png", "pictures/b.png"]
    assert [i["file_name"] for i in val["images"]] == ["pictures/c.png"]
    assert (len(train["annotations"]), len(val["annotations"])) == (3, 1)  # labels beside images outside of `images`


def test_byte_order_marks_are_no_content(folder: Path) -> None:
    (folder / "train.txt").write_text("images/train/one.png\n", encoding="utf-8-sig")
    (folder / "labels/train/one.txt").write_text("1 0.5 0.5 0.25 0.5\n", encoding="utf-8-sig")
    describe(folder, train="train.txt")
    (folder / "data.yaml").write_text((folder / "data.yaml").read_text(), encoding="utf-8-sig")
    assert len(read(written(folder))[0]["annotations"]) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"path": "."},
        {"path": "/home/somebody/else"},  # a machine where it was written
        {"train": "../train/images", "val": "../valid/images"},
    ],
)
def test_paths_as_tools_write_them(tmp_path: Path, content: dict[str, object]) -> None:
    places = ("train/images", "valid/images") if "train" in content else ("images/train", "images/val")
    for place in places:
        labelled(tmp_path / place / "a.png", "0 0.5 0.5 0.5 0.5")
    describe(tmp_path, **content)
    train, val = read(written(tmp_path))
    assert [document["images"][0]["file_name"] for document in (train, val)] == [f"{place}/a.png" for place in places]
    assert len(train["annotations"]) == len(val["annotations"]) == 1


def test_images_of_linked_folders_are_found(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "images/train").rename(folder / "elsewhere/images")
    (folder / "labels/train").rename(folder / "elsewhere/labels")
    for part in ("images", "labels"):
        (folder / part / "train").mkdir()
        (folder / part / "train" / "linked").symlink_to(folder / "elsewhere" / part)
    train, _ = read(written(folder))
    names = [image["file_name"] for image in train["images"]]
    assert names == ["images/train/linked/one.png", "images/train/linked/two.png"]
    assert len(train["annotations"]) == 2


def test_the_same_images_twice_are_divided(folder: Path) -> None:
    describe(folder, val="images/train")
    train, val = read(written(folder, val_fraction=0.5))
    assert (len(train["images"]), len(val["images"])) == (1, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"names": []}, r"data\.yaml: names are \[\]; write a list"),
        ({"names": {"a": 0}}, r"data\.yaml: names are \{'a': 0\}; write a list"),
        ({"names": {True: "a"}}, r"data\.yaml: names are \{True: 'a'\}; write a list"),
        ({"names": [False, True]}, r"data\.yaml: 2 names are no text \(False, True\); put them in quotes"),
        ({"names": {0: "a", 1: None}}, r"data\.yaml: 1 names are no text \(None\); put them in quotes"),
        ({"nc": 3}, r"data\.yaml: nc is 3, and there are 2 names"),
        ({"val": "images/none"}, r"data\.yaml: val: 'images/none' is neither .*images/none"),
        ({"val": None}, r"data\.yaml: has no 'val'"),
        ({"train": "labels"}, r"data\.yaml: train: 'labels' holds no images"),
    ],
)
def test_a_yaml_that_leads_nowhere(folder: Path, content: dict[str, object], reason: str) -> None:
    describe(folder, **content)
    with pytest.raises(UserError, match=reason):
        written(folder)


def test_images_that_are_not_in_the_folder_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    labelled(other / "x.png", "0 0.5 0.5 0.5 0.5")
    describe(folder, val=str(other))
    with pytest.raises(UserError, match=r"val: 1 images lie outside of the folder .*x\.png"):
        written(folder)


@pytest.mark.parametrize("listed", [False, True])
def test_names_that_are_not_utf8_are_refused(folder: Path, listed: bool) -> None:
    """As in an old archive; a list file names them in the same bytes."""
    name = b"images/train/caf\xe9.png"
    try:
        (folder / "images/train/one.png").rename(folder / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    if listed:
        (folder / "train.txt").write_bytes(name + b"\n")
        describe(folder, train="train.txt")
    with pytest.raises(
        UserError, match=r"train: 1 images have names that are not UTF-8 \('images/train/caf\\udce9\.png'\)"
    ):
        written(folder)


def test_what_is_no_image_is_refused(folder: Path) -> None:
    (folder / "images/train/two.png").write_text("text")
    with pytest.raises(UserError, match=r"train: 1 images cannot be read \(two\.png\)"):
        written(folder)
