"""What an edge program loads."""

from __future__ import annotations

from pipeline.artifact import Artifact


class Bundle(Artifact):
    """A folder in Hugging Face layout: model, release.json, model card, and a sample if the user opted in."""

    folder: str
    files: dict[str, str]
    """Path in the folder to sha256."""
