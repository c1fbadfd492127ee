"""The cache of decoded images: room is asked for first, and nothing is decoded twice."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from deploy.image import ImageSpec
from pipeline.errors import UserError
from stages.data import cache as module
from stages.data.augment import resized
from stages.data.cache import PixelCache, free_memory
from stages.data.coco import CocoSplit


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    """Three images of different sizes."""
    images, rng = [], np.random.default_rng(0)
    for number, (height, width) in enumerate([(30, 40), (50, 20), (8, 8)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    return CocoSplit(tmp_path, tmp_path / "a.json")


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("fit", [None, ImageSpec(16, 16, (0, 0, 0))])
def test_every_image_is_decoded_once_and_keeps_its_bits(
    split: CocoSplit, tmp_path: Path, where: Literal["memory", "disk"], fit: ImageSpec | None, monkeypatch: Any
) -> None:
    expected = [split.pixels(index) for index in range(3)]
    if fit:
        expected = [resized(one, fit.content_size(*one.shape[:2])) for one in expected]
    cache = PixelCache(split, where, tmp_path, fit)
    decoded: list[int] = []
    pixels = CocoSplit.pixels
    monkeypatch.setattr(CocoSplit, "pixels", lambda self, index: decoded.append(index) or pixels(self, index))
    for _ in range(2):
        for index in (2, 0, 1):
            np.testing.assert_array_equal(cache(index), expected[index])
    assert decoded == [2, 0, 1]


def test_without_room_it_is_refused(split: CocoSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * (30 * 40 + 50 * 20 + 8 * 8)
    monkeypatch.setattr(module, "free_memory", lambda: int(needed / module.SHARE) + 1)
    PixelCache(split, "memory", tmp_path, None)
    monkeypatch.setattr(module, "free_memory", lambda: int(needed / module.SHARE) - 1)
    with pytest.raises(
        UserError, match=r"cache: memory needs 0\.0 GB .* free and 80% .* set cache: disk if .* or cache: none"
    ):
        PixelCache(split, "memory", tmp_path, None)
    PixelCache(split, "memory", tmp_path, ImageSpec(16, 16, (0, 0, 0)))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": needed}))
    with pytest.raises(UserError, match=r"cache: disk needs .* set cache: memory if there is more room"):
        PixelCache(split, "disk", tmp_path, None)


def test_a_container_may_have_less_than_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1200000\ninactive_file 300000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    assert free_memory() == 2_300_000  # the files' part is given back when asked for
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory() == 5000 * 1024
