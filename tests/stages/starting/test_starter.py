"""`pipeline init`: what it finds in the layouts people have, and what it says when it does not."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pipeline.errors import UserError
from pipeline.graph import load
from stages import dataset
from stages.starting import starter
from stages.starting.starter import canvas, write
from stages.starting.students import choose, students

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, which is not here")


@pytest.fixture(autouse=True)
def _no_step_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "minutes", lambda config, classes: 61.0 + classes)


def coco(file: Path, names: list[str], images: Path | None = None, part: str = "bbox") -> Path:
    """Write a COCO file of 48 x 64 images, and the images where a folder is given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"id": i, "file_name": name, "height": 48, "width": 64} for i, name in enumerate(names)]
    annotations = [{"id": i + 1, "image_id": i, "category_id": 1, part: [1, 2, 9, 9]} for i in range(len(names))]
    document = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    file.write_text(json.dumps(document))
    for number, name in enumerate(names if images else []):
        assert images is not None
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (number, len(file.name), 0)).save(images / name)
    return file


def settings(out: Path) -> dict[str, object]:
    """Settings of the data stage in the config that was written, which the stage takes."""
    data = yaml.safe_load(out.read_text())["stages"]["data"]
    assert data.pop("uses") == "dataset"
    dataset.Config.model_validate(data)
    source = data["source"]
    assert isinstance(source, dict)
    return source


def found(out: Path, split: str) -> tuple[Path, Path]:
    """(images, annotations) of a split in the config."""
    files = settings(out)[split]
    assert isinstance(files, dict)
    return Path(files["images"]), Path(files["annotations"])


def test_coco_as_published(tmp_path: Path) -> None:
    """The same names may be in both folders; keypoints and captions lie beside the instances."""
    root, out = tmp_path / "coco", tmp_path / "my.yaml"
    for split in ("train2017", "val2017"):
        coco(root / "annotations" / f"instances_{split}.json", ["1.png", "2.png"], root / split)
        coco(root / "annotations" / f"person_keypoints_{split}.json", ["1.png"])
        coco(root / "annotations" / f"captions_{split}.json", ["1.png"], part="caption")
    lines = write(root, out)
    annotations = root / "annotations"
    assert found(out, "train") == (root / "train2017", annotations / "instances_train2017.json")
    assert found(out, "val") == (root / "val2017", annotations / "instances_val2017.json")
    assert lines[0].startswith('coco: {"train": {"images": ')
    assert lines[1] == "training: 2 images, 2 boxes"
    assert lines[-2].startswith("trainings: about 62 min on this machine")
    assert str(out) in lines[-1]


def test_files_beside_their_images(tmp_path: Path) -> None:
    root, out = tmp_path / "export", tmp_path / "my.yaml"
    for split in ("train", "valid", "test"):
        coco(root / split / "_annotations.coco.json", ["a.png", "b.png"], root / split)
    write(root, out)
    assert found(out, "train") == (root / "train", root / "train" / "_annotations.coco.json")
    assert found(out, "val") == (root / "valid", root / "valid" / "_annotations.coco.json")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_with_a_fault_is_named_and_not_passed_over(tmp_path: Path, split: str) -> None:
    root, out = tmp_path / "coco", tmp_path / "my.yaml"
    for name in ("train", "val"):
        coco(root / f"instances_{name}.json", ["1.png", "2.png"], root / name)
    file = root / f"instances_{split}.json"
    document = json.loads(file.read_text())
    del document["annotations"][1]["bbox"]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"{file.name}: 1 x 'Field required' \(annotations\[1\].bbox\)"):
        write(root, out)


def test_a_file_without_annotations_is_the_one_of_its_split(tmp_path: Path) -> None:
    root, out = tmp_path / "coco", tmp_path / "my.yaml"
    for name in ("train", "val"):
        coco(root / f"instances_{name}.json", ["1.png", "2.png"], root / name)
    file = root / "instances_val.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    assert write(root, out)[2] == "validation: 2 images, 0 boxes"
    assert found(out, "val") == (root / "val", file)


def test_data_without_classes_is_refused(tmp_path: Path) -> None:
    file = coco(tmp_path / "data" / "train.json", ["1.png", "2.png"], tmp_path / "data" / "images")
    file.write_text(json.dumps({**json.loads(file.read_text()), "categories": []}))
    with pytest.raises(UserError, match=r"init: the training data below .*data has no classes"):
        write(tmp_path / "data", tmp_path / "my.yaml")


def test_images_in_subfolders_named_in_the_file(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    coco(root / "train.json", ["images/t/a.png"], root)
    coco(root / "val.json", ["images/v/a.png"], root)
    write(root, out)
    assert found(out, "train")[0] == found(out, "val")[0] == root


def test_the_name_of_the_given_folder_says_nothing(tmp_path: Path) -> None:
    root, out = tmp_path / "train", tmp_path / "my.yaml"
    coco(root / "val.json", ["a.png"], root / "images")
    with pytest.raises(UserError, match=r"no training annotations below .*; there are only: .*val.json \(val\)"):
        write(root, out)
    assert not out.exists()


def test_one_file_is_divided(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    coco(root / "labels.json", ["a.png", "b.png"], root / "pictures")
    lines = write(root, out)
    assert found(out, "train") == (root / "pictures", root / "labels.json")
    assert settings(out)["val_fraction"] == 0.2
    assert "nothing was found for it, so 20% of the training images are set aside" in lines[2]


def test_what_is_given_is_not_looked_for(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    for name in ("one", "two"):
        coco(root / f"{name}.json", [f"{name}.png"], root / "images")
    with pytest.raises(UserError, match=r"2 files could be the train annotations .*; name one by --train-annotations"):
        write(root, out)
    write(
        root,
        out,
        train_annotations=root / "one.json",
        val_annotations=root / "two.json",
        val_images=root / "images",
    )
    assert found(out, "train") == (root / "images", root / "one.json")
    assert found(out, "val") == (root / "images", root / "two.json")


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    coco(root / "train.json", ["a.png"])
    (root / "other.json").write_text('[{"bbox": 3}]')
    with pytest.raises(UserError) as caught:
        write(root, out, val_annotations=root / "other.json")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "--val-annotations" in lines[0]
    assert "not a COCO JSON with boxes" in lines[0]
    assert "(a.png) are in none of the" in lines[1]
    assert "--train-images" in lines[1]


def test_images_given_that_are_others(tmp_path: Path) -> None:
    root = tmp_path / "data"
    coco(root / "train.json", ["a.png"], root / "images")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--train-images .*empty: has none of the images of .*train.json \(a.png\)"):
        write(root, tmp_path / "my.yaml", train_images=tmp_path / "empty")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "my.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write(tmp_path, out)
    assert out.read_text() == "mine"


def test_odd_paths_survive_yaml(tmp_path: Path) -> None:
    root, out = tmp_path / 'a: "b" # c', tmp_path / "my.yaml"
    coco(root / "train.json", ["x.png", "y.png"], root / "images")
    write(root, out)
    assert found(out, "train") == (root / "images", root / "train.json")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], (320, 320)),
        ([(480, 640)], (256, 320)),
        ([(1080, 1920)], (192, 320)),
        ([(480, 640), (640, 480)], (320, 320)),
        ([(120, 160)], (128, 160)),
        ([(50, 100), (10, 10)], (128, 128)),
    ],
)
def test_canvas_holds_every_image(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert canvas(sizes) == expected


def test_config_is_a_whole_chain_without_a_problem(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    coco(root / "train.json", ["a.png", "b.png"], root / "images")
    write(root, out)
    made = {node.uses for node in load(out).nodes}
    assert made == {"dataset", "train", "distill", "prune", "export", "validate", "benchmark", "report", "release"}


@pytest.mark.parametrize(("cores", "gpus", "jobs"), [(2, [], 2), (1, [], 1), (16, [{"name": "A GPU"}], 1)])
def test_trainings_share_cores_and_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, gpus: list[object], jobs: int
) -> None:
    monkeypatch.setattr(starter, "cores", lambda: cores)
    monkeypatch.setattr(starter, "devices", lambda: (gpus, None))
    coco(tmp_path / "data" / "train.json", ["a.png", "b.png"], tmp_path / "data" / "images")
    write(tmp_path / "data", tmp_path / "my.yaml")
    assert yaml.safe_load((tmp_path / "my.yaml").read_text())["jobs"] == jobs


def voc(root: Path, stem: str, corner: int = 1) -> None:
    """An image with one dog, as VOC has it."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    box = f"<bndbox><xmin>{corner}</xmin><ymin>1</ymin><xmax>20</xmax><ymax>9</ymax></bndbox>"
    text = f"<annotation><object><name>dog</name>{box}</object></annotation>"
    (root / "Annotations" / f"{stem}.xml").write_text(text)
    Image.new("RGB", (64, 48), (len(stem), ord(stem[-1]), 0)).save(root / "JPEGImages" / f"{stem}.png")


def yolo(root: Path, *splits: str) -> None:
    """A folder with one image of one thing in each split, as YOLO trainers have it."""
    for split in splits:
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (len(split), 7, 0)).save(root / "images" / split / "a.png")
        (root / "labels" / split / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("".join(f"{split}: images/{split}\n" for split in splits) + "names: [thing]\n")


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (("train", "val", "trainval"), {"train": "train", "val": "val"}),
        (("trainval", "test"), {"train": "trainval", "val": "test"}),
        (("default",), {"train": "default", "val_fraction": 0.2}),
        ((), {"train": "*", "val_fraction": 0.2}),
    ],
)
def test_voc_image_sets(tmp_path: Path, sets: tuple[str, ...], expected: dict[str, object]) -> None:
    root, out = tmp_path / "VOC", tmp_path / "my.yaml"
    for stem in ("a", "b"):
        voc(root, stem)
    for number, name in enumerate(sets):
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("ab"[number % 2] + "\n" if len(sets) > 1 else "a\nb\n")
    lines = write(root, out)
    assert settings(out) == {"name": "voc", "folder": str(root), **expected}
    assert lines[3] == "classes: 1 (dog)"


def test_voc_of_several_years_and_with_edges(tmp_path: Path) -> None:
    root, out = tmp_path / "VOCdevkit", tmp_path / "my.yaml"
    for year in ("VOC2007", "VOC2012"):
        for stem, name in (("a", "train"), ("b", "val")):
            voc(root / year, year[-2:] + stem, corner=0)
            (root / year / "ImageSets" / "Main" / f"{name}.txt").write_text(f"{year[-2:]}{stem}\n")
    write(root, out)
    found = settings(out)
    assert found["train"] == ["VOC2007/train", "VOC2012/train"]
    assert found["val"] == ["VOC2007/val", "VOC2012/val"]
    assert found["corners"] == "edges"


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ({}, {"train": "train/*", "val": "val/*"}),
        (dict.fromkeys(("train", "val", "test"), "default"), {"train": "train/default", "val": "val/default"}),
        ({"train": "trainval", "test": "test", "val": "all"}, {"train": "train/trainval", "val": "val/all"}),
    ],
)
def test_voc_folders_of_splits(tmp_path: Path, sets: dict[str, str], expected: dict[str, object]) -> None:
    """What a folder is called says what it is for; one for tests is not trained on."""
    root, out = tmp_path / "export", tmp_path / "my.yaml"
    for number, split in enumerate(("train", "val", "test")):
        stem = "abc"[number]
        voc(root / split, stem)
        if split in sets:
            (root / split / "ImageSets" / "Main" / f"{sets[split]}.txt").write_text(f"{stem}\n")
    write(root, out)
    assert settings(out) == {"name": "voc", "folder": str(root), **expected}


@pytest.mark.parametrize("encoding", ["gb2312", "none"])
def test_other_xml_is_passed_over(tmp_path: Path, encoding: str) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    coco(root / "train.json", ["a.png", "b.png"], root / "images")
    (root / "notes.xml").write_text(f'<?xml version="1.0" encoding="{encoding}"?><notes/>')
    write(root, out)
    assert settings(out)["name"] == "coco"


def test_yolo_folders(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    yolo(root, "train", "val")
    write(root, out)
    assert settings(out) == {"name": "yolo", "folder": str(root), "data": "data.yaml", "train": "train", "val": "val"}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("names: [thing]\nnc: 2", "data.yaml: nc is 2, and there are 1 names; correct one of them"),
        ("names: [on]", r"data.yaml: 1 names are no text \(True\); put them in quotes"),
    ],
)
def test_what_is_wrong_in_a_data_yaml_is_said(tmp_path: Path, names: str, reason: str) -> None:
    root = tmp_path / "data"
    yolo(root, "train", "val")
    text = (root / "data.yaml").read_text()
    (root / "data.yaml").write_text(text.replace("names: [thing]", names))
    (root / "other.yaml").write_text("train: yes\n")
    with pytest.raises(UserError, match=reason):
        write(root, tmp_path / "my.yaml")


def test_a_folder_of_two_formats_is_asked_about(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    yolo(root, "train", "val")
    coco(root / "train.json", ["a.png", "b.png"], root / "pictures")
    with pytest.raises(UserError, match="can be read as coco and as yolo; say which by --coco or --yolo"):
        write(root, out)
    write(root, out, source="yolo")
    assert settings(out)["name"] == "yolo"
    with pytest.raises(UserError, match="--val-images is for COCO data, and this is yolo"):
        write(root, tmp_path / "other.yaml", source="yolo", val_images=root)


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data of a known layout: COCO needs"):
        write(tmp_path, tmp_path / "my.yaml")


def test_the_student_is_the_largest_within_the_budget(tmp_path: Path) -> None:
    offered = students(320, 320, 3)
    assert [student.gflops for student in offered] == sorted(student.gflops for student in offered)
    for student in (offered[0], offered[len(offered) // 2], offered[-1]):
        assert choose(320, 320, 3, student.gflops + 1e-6).gflops == student.gflops
    with pytest.raises(UserError, match=r"--gflops: 0.01 asked for, the smallest student has 0\.\d\d on 320 x 320"):
        choose(320, 320, 3, 0.01)


def test_budget_and_target_are_in_the_config(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "my.yaml"
    yolo(root, "train", "val")
    write(root, out, gflops=0.2, target="me@orin.local")
    loaded = load(out)
    (student,) = [node.config.detector for node in loaded.nodes if node.name == "control"]  # type: ignore[attr-defined]
    expected = choose(64, 64, 1, 0.2).choice.config
    assert student.config == expected
    assert loaded.by_name["latency_orin"].target == "orin"
    assert loaded.targets["orin"].ssh == "me@orin.local"


@needs_shared
@pytest.mark.parametrize(("name", "divided"), [("bccd", False), ("voc20-mix-320", False), ("coco128", True)])
def test_real_folders(tmp_path: Path, name: str, divided: bool) -> None:
    out = tmp_path / "my.yaml"
    lines = write(SHARED / name, out)
    images, annotations = found(out, "train")
    assert images == SHARED / name / "images"
    assert annotations.name.startswith("instances_train")
    assert ("val_fraction" in settings(out)) == divided
    stats = json.loads((SHARED / name / "stats.json").read_text())
    count = stats["images"] if isinstance(stats["images"], int) else stats["images"]["train"]
    shown = [int(line.split()[1].replace(",", "")) for line in lines[1:3]]
    assert (sum(shown) if divided else shown[0]) == count
