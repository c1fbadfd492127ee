"""Contract: how an exported file wants its images and what its outputs mean. It travels inside the file.

Who has the file has the contract: image size and padding, classes, thresholds. So no device can preprocess differently
from the evaluation, and a change of the output's meaning is a change of schema that older readers refuse.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from deploy.errors import DeployError
from deploy.image import ImageSpec

SCHEMA_VERSION = 1
METADATA_KEY = "headstart.contract"
NMS_PLACES = ("host", "graph", "none")


@dataclass(frozen=True)
class Contract:
    """What a consumer of the model must know. Raises DeployError on construction when it contradicts itself.

    The graph takes uint8 NHWC RGB and gives decoded candidates: boxes (B, K, 4) xyxy in input pixels, scores (B, K),
    labels (B, K). `nms` says who suppresses duplicates: the host after the graph, the graph itself, or nobody because
    the detector needs none. Out of a graph with NMS inside come survivors, padded with scores of 0.
    """

    image: ImageSpec
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of the COCO annotations, one a class: what results are scored under
    candidates: int  # K, the fixed number of boxes an image that leave the graph
    score_threshold: float = 0.3  # deployment; no part of any AP
    evaluation_score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    nms: str = "host"
    class_agnostic_nms: bool = False
    one_by_one: bool = False  # the graph takes a batch of one and no other, as some files from elsewhere do
    input_name: str = "images"
    output_names: tuple[str, str, str] = ("boxes", "scores", "labels")
    producer: dict[str, Any] = field(default_factory=dict)  # name, version, detector, ...
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        problems = []
        if self.schema_version != SCHEMA_VERSION:
            problems.append(f"schema_version {self.schema_version!r} is not {SCHEMA_VERSION}; use the matching release")
        if not self.classes:
            problems.append("classes are missing")
        if len(self.classes) != len(self.category_ids):
            problems.append(f"{len(self.classes)} classes but {len(self.category_ids)} category_ids")
        if len(set(self.category_ids)) != len(self.category_ids):
            problems.append(f"category_ids repeat: {list(self.category_ids)}")
        if self.nms not in NMS_PLACES:
            problems.append(f"nms {self.nms!r} is none of {', '.join(NMS_PLACES)}")
        problems += [
            f"{name} must lie between 0 and 1, not {getattr(self, name)!r}"
            for name in ("score_threshold", "evaluation_score_threshold", "nms_iou")
            if not 0 <= getattr(self, name) <= 1
        ]
        problems += [
            f"{name} must be at least 1, not {getattr(self, name)!r}"
            for name in ("candidates", "max_detections")
            if getattr(self, name) < 1
        ]
        if len(self.output_names) != 3:
            problems.append(f"output_names must name boxes, scores and labels, not {self.output_names!r}")
        if problems:
            raise DeployError("contract: " + "; ".join(problems))

    def to_json(self) -> str:
        """The contract as JSON with sorted keys: equal contracts give equal text.

        What came later than the schema is written only where it says something, so that older readers refuse exactly the
        files that they cannot handle.
        """
        values = asdict(self) | {"image": self.image.to_dict()}
        return json.dumps({name: one for name, one in values.items() if one or name not in _LATER}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """The inverse of `to_json`. Raises DeployError on fields that are unknown, missing or of the wrong type."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DeployError(f"contract: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise DeployError(f"contract: an object is wanted, given {type(values).__name__}")
        names = {one.name for one in fields(cls)}
        problems = [f"unknown field {name!r}" for name in sorted(set(values) - names)]
        problems += [f"missing field {name!r}" for name in sorted(names - set(values) - _LATER)]
        problems += [
            f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}, not {values[name]!r}"
            for name, kinds in _KINDS.items()
            if name in values and type(values[name]) not in kinds  # exact: True is no number
        ]
        if problems:
            raise DeployError("contract: " + "; ".join(problems))
        tuples = {name: tuple(values[name]) for name in ("classes", "category_ids", "output_names")}
        return cls(**(values | tuples | {"image": ImageSpec.from_dict(values["image"])}))

    def write_to_onnx(self, path: Path) -> None:
        """Puts the contract into an ONNX file's metadata, replacing an older one; the file is changed as a whole or not
        at all.
        """
        import onnx

        from deploy import atomic

        path = Path(path)
        model = onnx.load(path, load_external_data=False)
        entries = {entry.key: entry.value for entry in model.metadata_props} | {METADATA_KEY: self.to_json()}
        onnx.helper.set_model_props(model, entries)
        atomic.write(path, model.SerializeToString())

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], where: str) -> Contract:
        """The contract among a file's metadata; `where` names the file in errors."""
        if METADATA_KEY not in metadata:
            raise DeployError(f"{where}: the file carries no contract ({METADATA_KEY}); export it with Headstart")
        return cls.from_json(metadata[METADATA_KEY])


_LATER = {"one_by_one"}
_KINDS: dict[str, tuple[type, ...]] = {
    "image": (dict,),
    "classes": (list,),
    "category_ids": (list,),
    "candidates": (int,),
    "score_threshold": (int, float),
    "evaluation_score_threshold": (int, float),
    "nms_iou": (int, float),
    "max_detections": (int,),
    "nms": (str,),
    "class_agnostic_nms": (bool,),
    "one_by_one": (bool,),
    "input_name": (str,),
    "output_names": (list,),
    "producer": (dict,),
    "schema_version": (int,),
}
