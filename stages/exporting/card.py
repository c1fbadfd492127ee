"""The model card of a bundle: what it is, what was measured on each of its files, and how images are made for it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deploy.contract import Contract
from deploy.manifest import Model
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.exporting.licence import Licence


def card(name: str, licence: Licence, models: Sequence[tuple[ExportedModel, Model]], data: Dataset) -> str:
    """The model card, as the Hugging Face hub reads it; `models` are the reference first."""
    reference, contract = models[0][0], models[0][1].contract
    shown = ", ".join(data.classes[:12]) + (", ..." if len(data.classes) > 12 else "")
    lines = [
        "---",
        f"license: {licence.name}",
        "pipeline_tag: object-detection",
        "library_name: onnx",
        "---",
        f"# {name}",
        "",
        f"An object detector for {len(data.classes)} classes ({shown}).",
        f"{reference.parameters:,} parameters, {reference.flops / 1e9:.2f} GFLOPs an image.",
        "",
    ]
    lines += elsewhere(reference)
    for one, model in models:
        lines += ["## Measured on this very file" if len(models) == 1 else f"## Measured on {model.file}", ""]
        lines += [*measured_lines(one, model), ""]
    lines += [
        "## Use",
        "",
        "```sh",
        "pip install '.[cpu]'   # in the Headstart repository",
        "deploy inspect .       # what is in it, and which file is taken on this device",
        "deploy predict . image.jpg",
        "deploy verify .",
        "```",
        "",
        f"Images: RGB uint8, {contract.image.sentence}. The graph normalises and decodes; {suppression(contract)}.",
        f"Deployment threshold {contract.score_threshold}; AP was measured from {contract.evaluation_score_threshold}.",
        "",
        "## Data",
        "",
        f"{data.train.image_count} training and {data.val.image_count} validation images. {data.attribution}".strip(),
        "",
        *(["## Licence", "", " ".join(licence.sentences), ""] if licence.sentences else []),
    ]
    return "\n".join(lines)


def elsewhere(model: ExportedModel) -> list[str]:
    """Where a model comes from that was not trained here; nothing of ours."""
    source = model.foreign
    if source is None:
        return []
    licence = f"its metadata names the licence {source.licence}" if source.licence else "it names no licence"
    lines = [f"Adapted from {source.file} (sha256 {source.sha256[:12]}), which was not trained here; {licence}."]
    if source.unknown_classes:
        lines.append(f"It does not know, and never finds: {', '.join(source.unknown_classes)}.")
    return [*lines, ""]


def suppression(contract: Contract) -> str:
    """Who does NMS, in words."""
    if contract.nms == "none":
        return "nobody does NMS, the model needs none"
    return f"NMS at IoU {contract.nms_iou} is done by the {contract.nms}"


def measured_lines(one: ExportedModel, model: Model) -> list[str]:
    """What the card says of one file."""
    measured = model.accuracy
    assert measured is not None
    ap, ap50 = measured["statistics"]["ap"], measured["statistics"]["ap50"]
    lines = [
        f"- {model.backend}, {model.precision}, {one.bytes / 1e6:.2f} MB"
        + (f", made for {json.dumps(model.made_for)}" if model.made_for else ""),
        f"- AP {number(ap)}, AP50 {number(ap50)} (COCO, {measured['images']} validation images, "
        f"{measured['evaluator']}, {measured['backend']})",
    ]
    for row in model.latency:
        total = row["steps"]["end_to_end"]
        doubt = "" if row["reliable"] else " - UNRELIABLE: " + "; ".join(row["evidence"]["reasons"])
        lines.append(
            f"- milliseconds of one image, file to detections: p50 {number(total['p50'], 2)}, "
            f"p99 {number(total['p99'], 2)}, on {row['machine']['cpu']}, {row['threads']} threads{doubt}"
        )
    against = f"against {one.parity.reference}, which it was made from: {one.parity.sentence}" if one.parity else ""
    return [*lines, f"- {against or one.not_executed}", *quantised(one)]


def quantised(model: ExportedModel) -> list[str]:
    """How an INT8 file got its numbers; nothing of another file."""
    told = model.quantisation
    if told is None:
        return []
    lost, low, high = (100 * one for one in (told.ap_before - told.ap_after, told.ap_drop_low, told.ap_drop_high))
    return [
        f"- INT8 for {told.runtime}, calibrated on {told.images} training images (sha256 {told.images_sha256[:12]}), none of "
        f"them a validation image; on {told.held_out} others it lost {lost:.1f} AP, 95 % interval [{low:.1f}, {high:.1f}]",
        f"- layers in float32: {', '.join(model.float_layers) or 'none but the decoding'}",
    ]


def number(value: float | None, digits: int = 3) -> str:
    """A measured number, or that there is none."""
    return "not measured" if value is None else f"{value:.{digits}f}"
