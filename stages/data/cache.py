"""Decoded pixels kept for the next epoch, where every worker sees them: in memory, or in a file without a name.

    index -> kept already? -> a view of it
                  no -----> decode, resize if no draw asks for another size -> keep

What is kept is what decoding gives, to the bit, so the batches are the same with and without. Encoded bytes are not kept:
the operating system's file cache does that already. Each image has its place from the start, by the size that the dataset
stage found; workers are forked and write into the same pages.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np

from deploy.image import ImageSpec
from pipeline.errors import UserError
from pipeline.log import logger
from stages.data.augment import Pixels, resized
from stages.data.coco import CocoSplit

Cache = Literal["none", "memory", "disk"]
SHARE = 0.8  # of what is free, at most: the training itself needs some


class PixelCache:
    """The images of a split, each decoded once. With `fit` they are kept as large as they lie on that canvas."""

    def __init__(
        self, split: CocoSplit, where: Literal["memory", "disk"], directory: Path, fit: ImageSpec | None
    ) -> None:
        """On disk it takes a file in `directory` that is gone with the process. Raises UserError where there is no room."""
        self.split, self.fit = split, fit
        sizes = [(int(height), int(width)) for height, width in split.sizes_N2]
        self.sizes = [fit.content_size(*size) for size in sizes] if fit else sizes
        self.starts = np.cumsum([0] + [3 * height * width for height, width in self.sizes])
        needed = int(self.starts[-1])
        _refuse_without_room(needed, where, directory)
        if where == "memory":
            self._bytes = mmap.mmap(-1, needed)
        else:
            with tempfile.TemporaryFile(dir=directory) as file:
                os.ftruncate(file.fileno(), needed)
                if hasattr(os, "posix_fallocate"):  # else a disk that fills up meanwhile would kill the process
                    os.posix_fallocate(file.fileno(), 0, needed)
                self._bytes = mmap.mmap(file.fileno(), needed)
        self._kept = mmap.mmap(-1, len(split))
        self._lock = multiprocessing.Lock()  # so that who sees the mark sees the pixels too
        logger.info("cache: %s, room for %d decoded images, %.2f GB", where, len(split), needed / 1e9)

    def __call__(self, index: int, canvas_HWC: Pixels | None = None) -> Pixels:
        """The image's pixels, (height, width, 3), never on the canvas. Raises DeployError where it can no longer be read."""
        view_HWC = np.frombuffer(self._bytes, np.uint8, self.starts[index + 1] - self.starts[index], self.starts[index])
        view_HWC = view_HWC.reshape(*self.sizes[index], 3)
        with self._lock:
            kept = self._kept[index]
        if not kept:
            view_HWC[:] = resized(self.split.pixels(index), self.sizes[index])
            with self._lock:
                self._kept[index] = 1
        return view_HWC


def _refuse_without_room(needed: int, where: Literal["memory", "disk"], directory: Path) -> None:
    free = free_memory() if where == "memory" else shutil.disk_usage(directory).free
    if needed > SHARE * free:
        other = "cache: disk" if where == "memory" else "cache: memory"
        raise UserError(
            f"cache: {where} needs {needed / 1e9:.1f} GB for the decoded training images, {free / 1e9:.1f} GB are free and "
            f"{SHARE:.0%} of them may be used; set {other} if there is more room, `images` for fewer, or cache: none"
        )


def free_memory() -> int:
    """Bytes that this process may still take: by the kernel, and by its container where that has a limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: nobody says what is free, half of all is a guess that leaves room
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(told["inactive_file"]))  # what files take is given back when asked for
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free
