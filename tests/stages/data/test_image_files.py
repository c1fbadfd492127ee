"""Which files are images of a folder, where links lead out of it, into it and around."""

from pathlib import Path

import pytest

from stages.data.image_files import image_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them deeper, and what is none."""
    for name in ("a.JPG", "deeper/b.tif", "notes.txt", "x.png/readme"):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "set"


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in image_files(folder))


def test_files_are_taken_by_their_suffix(folder: Path) -> None:
    assert names(folder) == ["a.JPG", "deeper/b.tif"]


def test_links_to_other_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "below").mkdir(parents=True)
    (other / "below" / "c.png").touch()
    (other / "back").symlink_to(folder)
    (other / "below" / "round").symlink_to(other)
    for link in ("one", "two"):
        (folder / link).symlink_to(other)
    assert names(folder) == ["a.JPG", "deeper/b.tif", "one/below/c.png"]


@pytest.mark.parametrize("target", [".", "..", "deeper"])
def test_links_into_the_folder_and_around_it_are_left(folder: Path, target: str) -> None:
    (folder / "again").symlink_to(folder / target)
    assert names(folder) == ["a.JPG", "deeper/b.tif"]


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert names(tmp_path / "link") == ["a.JPG", "deeper/b.tif"]
