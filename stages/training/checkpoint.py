"""Checkpoints of a training: the newest and the one before, each proven by a digest at its end.

A file that a crash, a full disk or a bad sector has spoilt is known as such, and the one before is taken: the training
repeats a few steps and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.log import logger

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_DIGEST = hashlib.sha256


class Checkpoints:
    """The two checkpoints in a directory."""

    def __init__(self, directory: Path) -> None:
        self.last, self.previous = directory / LAST, directory / PREVIOUS

    def save(self, state: dict[str, Any]) -> None:
        """Write a state; the newest before it is kept. At every moment one whole checkpoint is there, once there was one.

        Raises UserError where it cannot be written: what was there before stays.
        """
        # Serialised in memory first: torch turns a full disk into an error that does not say so.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        partial = self.last.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.write(_DIGEST(buffer.getbuffer()).digest())
                file.flush()
                os.fsync(file.fileno())
            if self.last.exists():
                self.last.replace(self.previous)
            partial.replace(self.last)
        except OSError as problem:
            partial.unlink(missing_ok=True)
            there = self.last if self.last.exists() else self.previous
            kept = f"{there.name} of before stays" if there.exists() else "there is none of before"
            raise UserError(
                f"checkpoint {self.last}: cannot be written, {problem.strerror or problem}; {kept}: free some space and give "
                "the same command again"
            ) from problem

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The state of the newest checkpoint that is whole; None where there is none."""
        for file in (self.last, self.previous):
            if not file.exists():
                continue
            state = _read(file, device)
            if state is not None:
                return state
            logger.warning("checkpoint %s is damaged and is left out: its digest is not that of its content", file)
            file.unlink()  # else the next save would put it in place of the whole one before
        return None


def _read(file: Path, device: torch.device) -> dict[str, Any] | None:
    """The state in a file; None where its digest is wrong."""
    content = memoryview(file.read_bytes())
    size = _DIGEST().digest_size
    payload, digest = content[:-size], content[-size:]
    if _DIGEST(payload).digest() != digest:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    return state
