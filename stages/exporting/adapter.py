"""Adapter: what a team says of an ONNX detector that it already has, and the nodes that make it one of ours.

    images uint8 NHWC RGB -> colours, scaling, layout -> THE PREFIX GRAPH -> layout -> activation -> top-k
                                                                              boxes, scores, labels: our contract

Shape letters: B images, N boxes an image, K classes of the model, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import compose, numpy_helper, parser
from pydantic import Field

from pipeline.config import BaseConfig
from stages.exporting.foreign import PREFIX, TYPES, Foreign
from stages.exporting.layout import Floats, Layout, Nodes

Activation = Literal["none", "sigmoid", "softmax"]
Level = Annotated[int, Field(ge=0, le=255)]
_ACTIVATIONS = {"none": "Identity", "sigmoid": "Sigmoid", "softmax": "Softmax<axis = -1>"}
_OUTPUTS = ("boxes", "scores", "labels")


class InputConfig(BaseConfig):
    """How the model was fed when it was trained. What decides AP has no default: a guess would cost AP in silence."""

    fit: Literal["top_left", "centre", "stretch"]
    """How an image is put on the canvas: its ratio kept and placed top left or in the centre, or stretched."""
    colours: Literal["rgb", "bgr"]
    """Order of the channels."""
    divide_by: float = Field(gt=0)
    """Pixels from 0 to 255 are divided by it first: 255 for a model that takes 0 to 1, 1 for one that takes 0 to 255."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted after that, in the model's order of channels."""
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        1.0,
        1.0,
        1.0,
    )
    """Divided by after that, in the model's order of channels."""
    pad: tuple[Level, Level, Level] = (114, 114, 114)
    """Red, green and blue of what an image leaves of the canvas."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Order of the axes; the file's type, float or uint8, is read from the file."""
    size: tuple[int, int] | None = None
    """[height, width], for files that leave it open."""


@dataclass(frozen=True)
class Adapter:
    """`selected` are the model's classes that are wanted, `labels` the dataset's labels of them."""

    input: InputConfig
    layout: Layout
    activation: Activation
    per_box: Literal["every", "best"]
    selected: tuple[int, ...]
    labels: tuple[int, ...]
    candidates: int

    def feed(self, images_BHWC: NDArray[np.uint8]) -> Floats:
        """Images as the foreign graph wants them, in numpy; the graph's own type is the caller's."""
        given = self.input
        images: NDArray[Any] = images_BHWC.astype(np.float32)
        if given.colours == "bgr":
            images = images[..., ::-1]
        images = images / np.float32(given.divide_by)
        images = (images - np.asarray(given.mean, np.float32)) / np.asarray(given.std, np.float32)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2) if given.layout == "nchw" else images)

    def read(self, outputs: Sequence[Floats]) -> tuple[Floats, Floats, NDArray[np.int64]]:
        """Candidates of the foreign graph's outputs, in numpy: boxes (B, C, 4), scores (B, C), labels (B, C)."""
        boxes_BN4, scores_BNK, objectness_BN1 = self.layout.decode(outputs)
        scores_BNK = activated(scores_BNK, self.activation)
        if objectness_BN1 is not None:
            scores_BNK = scores_BNK * activated(
                objectness_BN1, "none" if self.activation == "softmax" else self.activation
            )
        if self.per_box == "best":
            scores_BNK = np.where(scores_BNK == scores_BNK.max(-1, keepdims=True), scores_BNK, 0)
        flat = scores_BNK[..., list(self.selected)].reshape(len(scores_BNK), -1)
        order = np.argsort(-flat, axis=1, kind="stable")[:, : self.candidates]
        box, column = np.divmod(order, len(self.selected))
        return (
            np.take_along_axis(boxes_BN4, box[..., None], 1),
            np.take_along_axis(flat, order, 1),
            np.asarray(self.labels, np.int64)[column],
        )

    def around(self, foreign: Foreign) -> onnx.ModelProto:
        """The foreign graph with our nodes at both ends."""
        batch = "1" if foreign.one_by_one else "batch"
        before, after = self._before(foreign, batch), self._after(foreign, batch)
        fed = compose.merge_models(
            compose.add_prefix(before, "adapter/", rename_inputs=False),
            compose.add_prefix(foreign.model, PREFIX),
            io_map=[("adapter/prepared", PREFIX + foreign.input)],
        )
        outputs = [PREFIX + one.name for one in self.layout.outputs]
        merged = compose.merge_models(
            fed,
            compose.add_prefix(after, "adapter/", rename_outputs=False),
            io_map=[(name, f"adapter/raw_{index}") for index, name in enumerate(outputs)],
            outputs=list(_OUTPUTS),
            producer_name="headstart",
        )
        domains = {one.domain: one for one in merged.opset_import}  # merging lists a domain once for each model
        del merged.opset_import[:]
        merged.opset_import.extend(domains.values())
        return merged

    def _before(self, foreign: Foreign, batch: str) -> onnx.ModelProto:
        given, (height, width) = self.input, (foreign.canvas.height, foreign.canvas.width)
        lines, constants, last = (
            ["pixels = Cast<to = 1>(images)"],
            {},
            "pixels",
        )  # first: TensorRT-RTX cannot turn uint8
        if given.colours == "bgr":
            constants["turned_round"] = np.asarray([2, 1, 0], np.int64)
            lines.append(f"bgr = Gather<axis = 3>({last}, turned_round)")
            last = "bgr"
        steps: list[tuple[str, str, str, Any]] = [
            ("Div", "scaled", "divisor", given.divide_by),
            ("Sub", "centred", "mean", given.mean),
            ("Div", "normal", "std", given.std),
        ]
        for operator, made, name, value in steps:
            neutral = 0 if operator == "Sub" else 1
            if (np.asarray(value) != neutral).any():
                constants[name] = np.asarray(value, np.float32)
                lines.append(f"{made} = {operator}({last}, {name})")
                last = made
        shape = f"{batch}, {height}, {width}, 3"
        if given.layout == "nchw":
            lines.append(f"planes = Transpose<perm = [0, 3, 1, 2]>({last})")
            last, shape = "planes", f"{batch}, 3, {height}, {width}"
        lines.append(f"prepared = Cast<to = {foreign.dtype}>({last})")
        return parsed(
            foreign.model,
            f"uint8[{batch}, {height}, {width}, 3] images",
            f"{TYPES[foreign.dtype]}[{shape}] prepared",
            Nodes(tuple(lines), constants),
        )

    def _after(self, foreign: Foreign, batch: str) -> onnx.ModelProto:
        made, count = self.layout.nodes(), self.candidates
        constants: dict[str, NDArray[Any]] = {
            **made.constants,
            "tail_chosen": np.asarray(self.selected, np.int64),
            "tail_chosen_count": np.asarray(len(self.selected), np.int64),
            "tail_dataset_labels": np.asarray(self.labels, np.int64),
            "tail_flat_shape": np.asarray([0, self.layout.boxes * len(self.selected)], np.int64),
            "tail_candidate_count": np.asarray([count], np.int64),
            "tail_last_axis": np.asarray([-1], np.int64),
        }
        lines = [f"output_{index} = Cast<to = 1>(raw_{index})" for index in range(len(self.layout.outputs))]
        lines += [*made.lines, f"tail_active = {_ACTIVATIONS[self.activation]}(class_scores)"]
        last = "tail_active"
        if self.layout.objectness:
            sure = _ACTIVATIONS["none" if self.activation == "softmax" else self.activation]
            lines += [f"tail_sure = {sure}(objectness)", "tail_weighed = Mul(tail_active, tail_sure)"]
            last = "tail_weighed"
        if self.per_box == "best":
            constants["tail_nought"] = np.asarray(0, np.float32)
            lines += [f"tail_most = ReduceMax({last}, tail_last_axis)", f"tail_is_best = Equal({last}, tail_most)"]
            lines.append(f"tail_best_alone = Where(tail_is_best, {last}, tail_nought)")
            last = "tail_best_alone"
        lines += [
            f"tail_chosen_scores = Gather<axis = 2>({last}, tail_chosen)",
            "tail_flat = Reshape(tail_chosen_scores, tail_flat_shape)",
            "scores, tail_place = TopK<axis = 1>(tail_flat, tail_candidate_count)",
            "tail_box_index = Div(tail_place, tail_chosen_count)",
            "tail_column = Mod(tail_place, tail_chosen_count)",
            "tail_box_indices = Unsqueeze(tail_box_index, tail_last_axis)",
            "boxes = GatherND<batch_dims = 1>(decoded_boxes, tail_box_indices)",
            "labels = Gather(tail_dataset_labels, tail_column)",
        ]
        given = [
            f"{TYPES[kind]}[{', '.join(map(str, (batch, *one.shape)))}] raw_{index}"
            for index, (one, kind) in enumerate(
                zip(self.layout.outputs, foreign.types(self.layout.outputs), strict=True)
            )
        ]
        return parsed(
            foreign.model,
            ", ".join(given),
            f"float[{batch}, {count}, 4] boxes, float[{batch}, {count}] scores, int64[{batch}, {count}] labels",
            Nodes(tuple(lines), constants),
        )


def parsed(like: onnx.ModelProto, inputs: str, outputs: str, nodes: Nodes) -> onnx.ModelProto:
    """A model of these nodes, of the same operators' version as another; nodes are named by what they make."""
    (opset,) = (one.version for one in like.opset_import if one.domain == "")
    body = "\n".join(nodes.lines)
    header = f'<ir_version: {like.ir_version}, opset_import: ["" : {opset}]>'
    model = parser.parse_model(f"{header}\nadapter ({inputs}) => ({outputs})\n{{\n{body}\n}}")
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in nodes.constants.items())
    return model


def activated(values: Floats, activation: Activation) -> Floats:
    """In numpy; softmax over the last axis."""
    if activation == "none":
        return values
    wide = values.astype(np.float64)
    if activation == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-wide)), np.float32)
    weights = np.exp(wide - wide.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True), np.float32)
