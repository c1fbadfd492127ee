"""Digests of folders: names, sizes and times, through links, which may lead nowhere or back."""

import os
from pathlib import Path

from pipeline.digest import of_folder


def test_a_folder_is_its_files(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("1")
    before = of_folder(tmp_path)
    assert of_folder(tmp_path) == before
    (tmp_path / "a" / "two.txt").write_text("2")
    assert of_folder(tmp_path) != before
    (tmp_path / "a" / "two.txt").unlink()
    assert of_folder(tmp_path) == before
    os.utime(tmp_path / "a" / "b" / "one.txt", (1, 1))
    assert of_folder(tmp_path) != before


def test_links_are_followed_once_and_may_be_broken(tmp_path: Path) -> None:
    apart, folder = tmp_path / "apart", tmp_path / "folder"
    apart.mkdir()
    folder.mkdir()
    (folder / "linked").symlink_to(apart)
    (folder / "back").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "missing")
    before = of_folder(folder)
    (apart / "new.txt").write_text("1")
    assert of_folder(folder) != before
    (folder / "nowhere").unlink()
    assert of_folder(folder) != before
