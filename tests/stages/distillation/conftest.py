"""Numbers computed by the methods' own authors' code, where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "data" / "reference"


@pytest.fixture
def reference():
    """A function from a file's name to its arrays as tensors; skips where the vectors are not at hand."""

    def load(name):
        file = REFERENCE / f"{name}.npz"
        if not file.exists():
            pytest.skip(
                "the reference vectors (../shared/data/reference) are not here; golden numbers are tested instead"
            )
        with np.load(file) as arrays:
            found = {key: arrays[key] for key in arrays.files}
        settings = json.loads(str(found.pop("settings_json")))
        found.pop("source", None)
        numbers = {k: torch.from_numpy(np.asarray(v)) for k, v in found.items() if v.dtype.kind in "fiub"}
        return numbers, settings

    return load
