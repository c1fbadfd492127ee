"""Checkpoints: the newest that is whole is taken, whatever happened to the others; a full disk loses none."""

import errno
import os
import resource

import pytest
import torch

from pipeline.errors import UserError
from stages.training.checkpoint import Checkpoints

CPU = torch.device("cpu")


def state(number, size=1000):
    return {"step": number, "weights": torch.full((size,), float(number))}


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which the last two are kept."""
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2, 3):
        checkpoints.save(state(number))
    return checkpoints


def step(checkpoints):
    found = checkpoints.load(CPU)
    return found and found["step"]


def test_the_newest_is_loaded_and_the_one_before_is_kept(saved, tmp_path):
    assert step(saved) == 3
    assert torch.equal(saved.load(CPU)["weights"], state(3)["weights"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    saved.last.unlink()
    assert step(saved) == 2


def test_nothing_to_load(tmp_path):
    assert Checkpoints(tmp_path).load(CPU) is None


def cut(content):
    return content[: len(content) // 2]


def emptied(content):
    return b""


def flipped(content):
    """One bit of a weight: the file is as long, and torch would load it."""
    at = content.index(state(3)["weights"].numpy().tobytes()) + 402
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def flipped_in_the_digest(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, emptied, flipped, flipped_in_the_digest])
def test_a_damaged_newest_is_known_and_the_one_before_is_taken(saved, damage, caplog):
    saved.last.write_bytes(damage(saved.last.read_bytes()))
    assert step(saved) == 2
    assert "last.ckpt is damaged" in caplog.text
    # The damaged one must not take the place of the whole one before.
    saved.save(state(4))
    assert step(saved) == 4
    saved.last.unlink()
    assert step(saved) == 2


def test_where_both_are_damaged_there_is_none(saved):
    for file in (saved.last, saved.previous):
        file.write_bytes(cut(file.read_bytes()))
    assert saved.load(CPU) is None


def test_torch_alone_would_not_have_noticed(saved):
    """Why there is a digest: the flipped bit is loaded without a word."""
    import io

    content = flipped(saved.last.read_bytes())
    found = torch.load(io.BytesIO(content[:-32]), weights_only=True)["weights"]
    assert not torch.equal(found, state(3)["weights"])


@pytest.mark.parametrize("left", [["previous.ckpt", "last.partial"], ["last.ckpt", "previous.ckpt", "last.partial"]])
def test_killed_between_two_renames_or_before_them(saved, tmp_path, left):
    """What each moment of a save leaves: a whole file that has no name yet is not needed."""
    (tmp_path / "last.partial").write_bytes(saved.last.read_bytes())
    if "last.ckpt" not in left:
        saved.last.replace(saved.previous)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(left)
    assert step(saved) == 3
    saved.save(state(4))
    assert step(saved) == 4
    assert not (tmp_path / "last.partial").exists()


def test_a_full_disk_is_a_sentence_and_loses_nothing(saved, monkeypatch, tmp_path):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"No space left on device; last\.ckpt of before stays: free some space and give"
    ):
        saved.save(state(4))
    assert step(saved) == 3
    assert not (tmp_path / "last.partial").exists()  # it would fill what is left


def test_a_file_that_may_not_grow(saved):
    """The system's own limit, in the midst of the writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"File too large; last\.ckpt of before stays"):
            saved.save(state(4, size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert step(saved) == 3
    saved.save(state(4, size=1_000_000))
    assert step(saved) == 4
