"""Pascal VOC folders: the convention of its boxes, its layouts, difficult objects, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Choice
from pipeline.errors import ConfigError, UserError
from stages.data.source import RawDataset, Source

Document = dict[str, list[dict[str, object]]]
CORNERS = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def thing(corners: tuple[float, ...], name: str = "dog", more: str = "") -> str:
    """One object as XML."""
    return f"<object><name>{name}</name>{more}{CORNERS.format(*corners)}</object>"


def label(
    root: Path, stem: str, *objects: str, images: str = "JPEGImages", suffix: str = ".jpg", size: str = ""
) -> None:
    """Write an XML file in `Annotations` and a 40 x 30 image of the same name."""
    for folder in ("Annotations", images):
        (root / folder).mkdir(parents=True, exist_ok=True)
    text = f"<annotation><filename>{stem}{suffix}</filename>{size}{''.join(objects)}</annotation>"
    (root / "Annotations" / f"{stem}.xml").write_text(text)
    Image.new("RGB", (40, 30)).save(root / images / f"{stem}{suffix}")


def image_set(root: Path, name: str, *stems: str) -> None:
    """Write a file of ImageSets/Main."""
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def written(root: Path, **settings: object) -> RawDataset:
    """What the source makes of a folder, in `root`/made."""
    choice = Choice.parse(Source, {"name": "voc", "folder": str(root), **settings})
    (root / "made").mkdir(exist_ok=True)
    return choice.cls(choice.config).write(root / "made")


def read(raw: RawDataset) -> tuple[Document, Document]:
    """Both documents."""
    train, val = (json.loads(split.annotations.read_text()) for split in (raw.train, raw.val))
    return train, val


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Two images to train on and one to validate on."""
    label(
        tmp_path,
        "a",
        thing((1, 1, 10, 5)),
        thing((3, 4, 40, 30), "cat"),
        size="<size><width>40</width><height>30</height></size>",
    )
    label(tmp_path, "b")
    label(tmp_path, "c", thing((2, 2, 2, 2), "ant"))
    image_set(tmp_path, "train", "a", "b")
    image_set(tmp_path, "val", "c")
    return tmp_path


def test_corners_name_the_first_and_the_last_pixel_from_1(devkit: Path) -> None:
    train, val = read(written(devkit, train="train", val="val"))
    assert [a["bbox"] for a in train["annotations"]] == [[0, 0, 10, 5], [2, 3, 38, 27]]
    assert [a["bbox"] for a in val["annotations"]] == [[1, 1, 1, 1]]  # one pixel
    assert train["annotations"][0]["area"] == 50


def test_corners_may_be_edges(devkit: Path) -> None:
    train, _ = read(written(devkit, train="train", val="val", corners="edges"))
    assert [a["bbox"] for a in train["annotations"]] == [[1, 1, 9, 4], [3, 4, 37, 26]]


def test_a_box_that_begins_at_0_is_said(devkit: Path) -> None:
    label(devkit, "b", thing((0, 0, 10, 5)))
    (finding,) = written(devkit, train="train", val="val").findings
    assert finding.startswith("train: 1 boxes begin at pixel 0 or before (b.xml: dog); ")
    assert "set corners: edges" in finding
    assert written(devkit, train="train", val="val", corners="edges").findings == ()


def test_both_splits_have_all_classes_in_alphabetical_order(devkit: Path) -> None:
    train, val = read(written(devkit, train="train", val="val"))
    assert train["categories"] == val["categories"]
    assert [c["name"] for c in train["categories"]] == ["ant", "cat", "dog"]
    assert [a["category_id"] for a in train["annotations"]] == [3, 2]


def test_sizes_are_taken_where_they_are_given(devkit: Path) -> None:
    first, second = read(written(devkit, train="train", val="val"))[0]["images"]
    assert (first["width"], first["height"]) == (40, 30)
    assert "width" not in second
    assert second["file_name"] == "JPEGImages/b.jpg"


def test_images_without_objects_stay(devkit: Path) -> None:
    train, _ = read(written(devkit, train="train", val="val"))
    assert [a["image_id"] for a in train["annotations"]] == [1, 1]
    assert len(train["images"]) == 2


@pytest.mark.parametrize(("setting", "expected"), [("ignore", [1]), ("object", [0]), ("drop", [])])
def test_difficult_objects(devkit: Path, setting: str, expected: list[int]) -> None:
    label(devkit, "c", thing((2, 2, 9, 9), more="<difficult>1</difficult>"))
    _, val = read(written(devkit, train="train", val="val", difficult=setting))
    assert [a["iscrowd"] for a in val["annotations"]] == expected


def test_parts_of_objects_are_no_objects(devkit: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    label(devkit, "c", thing((2, 2, 9, 9), "person", more=part))
    _, val = read(written(devkit, train="train", val="val"))
    assert [a["bbox"] for a in val["annotations"]] == [[1, 1, 8, 8]]


def test_several_years_in_one_folder(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        label(tmp_path / year, "000001", thing((1, 1, 5, 5)))
        image_set(tmp_path / year, "trainval", "000001")
    label(tmp_path / "VOC2007", "000002", thing((1, 1, 5, 5)), suffix=".png")
    image_set(tmp_path / "VOC2007", "test", "000002")
    train, val = read(written(tmp_path, train=["VOC2007/trainval", "VOC2012/trainval"], val="VOC2007/test"))
    names = [image["file_name"] for image in train["images"]]
    assert names == ["VOC2007/JPEGImages/000001.jpg", "VOC2012/JPEGImages/000001.jpg"]
    assert [image["file_name"] for image in val["images"]] == ["VOC2007/JPEGImages/000002.png"]


def test_folders_without_image_sets(tmp_path: Path) -> None:
    for stem in "abcde":
        label(tmp_path, stem, thing((1, 1, 5, 5)), images="images")
    train, val = read(written(tmp_path, train="*", val_fraction=0.4))
    assert (len(train["images"]), len(val["images"])) == (3, 2)
    assert train["images"][0]["file_name"].startswith("images/")  # type: ignore[attr-defined]


def test_xml_beside_its_image(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.xml").write_text(f"<annotation>{thing((1, 1, 5, 5))}</annotation>")
        Image.new("RGB", (40, 30)).save(tmp_path / split / "x.JPG", "JPEG")
    train, val = read(written(tmp_path, train="train", val="valid"))
    assert [d["images"][0]["file_name"] for d in (train, val)] == ["train/x.JPG", "valid/x.JPG"]


def test_an_image_of_another_name_is_found_by_the_file(tmp_path: Path) -> None:
    label(tmp_path, "a", thing((1, 1, 5, 5)))
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "photo 1.jpg")
    text = (tmp_path / "Annotations" / "a.xml").read_text().replace("a.jpg", r"C:\labels\photo 1.jpg")
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    image_set(tmp_path, "all", "a", "a")
    (image, _) = read(written(tmp_path, train="all", val="all"))[0]["images"]
    assert image["file_name"] == "JPEGImages/photo 1.jpg"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<annotation>", "no element found"),
        (
            f"<annotation>{thing((1, 1, 5, 5)).replace('<xmax>5', '<xmax>five')}</annotation>",
            "object 1 .dog. has the corners",
        ),
        (f"<annotation>{thing((1, 1, 5, 5), '')}</annotation>", "object 1 has no name"),
        ("<annotation><object><name>dog</name></object></annotation>", "None, None, None, None"),
        (
            '<?xml version="1.0" encoding="gb2312"?><annotation/>',
            "multi-byte encodings are not supported: save it as UTF-8",
        ),
        ('<?xml version="1.0" encoding="none"?><annotation/>', "unknown encoding: none: save it as UTF-8"),
    ],
)
def test_what_is_wrong_is_named_by_file(devkit: Path, content: str, reason: str) -> None:
    (devkit / "Annotations" / "b.xml").write_text(content)
    with pytest.raises(UserError, match=rf"voc: 1 annotations cannot be used \(b\.xml: .*{reason}"):
        written(devkit, train="train", val="val")


def test_an_image_set_may_begin_with_a_byte_order_mark(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "val.txt").write_text("c\n", encoding="utf-8-sig")
    assert len(read(written(devkit, train="train", val="val"))[1]["images"]) == 1


def test_sets_and_files_that_are_not_there(devkit: Path) -> None:
    with pytest.raises(UserError, match=r"val: no image set .*ImageSets.Main.test\.txt, no folder"):
        written(devkit, train="train", val="test")
    image_set(devkit, "val", "c", "z")
    with pytest.raises(UserError, match=r"val: 1 of .*val\.txt have no file in .*Annotations \(z\.xml\)"):
        written(devkit, train="train", val="val")
    with pytest.raises(ConfigError, match="give either `val` or `val_fraction`"):
        written(devkit, train="train")


def test_images_beside_the_folder_are_refused(tmp_path: Path) -> None:
    label(tmp_path, "a", thing((1, 1, 5, 5)), images="images")
    with pytest.raises(
        UserError, match=r"train: 1 images lie outside of the folder .*a\.jpg\); set folder to one that holds"
    ):
        written(tmp_path / "Annotations", train=".", val_fraction=0.5)


@pytest.mark.parametrize("images", ["JPEGImages", "images"])
def test_folders_of_splits_below_annotations(tmp_path: Path, images: str) -> None:
    for split in ("train", "val"):
        (tmp_path / "Annotations" / split).mkdir(parents=True)
        (tmp_path / images / split).mkdir(parents=True)
        for stem in "xy":
            text = f"<annotation><filename>/elsewhere/{stem}.jpg</filename>{thing((1, 1, 5, 5))}</annotation>"
            (tmp_path / "Annotations" / split / f"{stem}.xml").write_text(text)
        Image.new("RGB", (40, 30)).save(tmp_path / images / split / "x.jpg")
    train, val = read(written(tmp_path, train="Annotations/train", val="Annotations/val"))
    found = [[image["file_name"] for image in document["images"]] for document in (train, val)]
    # That y is missing is said by its name in the folder where it was looked for.
    assert found == [[f"{images}/{split}/{stem}.jpg" for stem in "xy"] for split in ("train", "val")]
