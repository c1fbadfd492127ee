"""Drop the assistants and prove it: the student alone, with the outputs it had before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import BaseConfig
from pipeline.errors import VerdictError
from pipeline.log import logger
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint, PruneProof
from stages.artifacts.dataset import Dataset
from stages.detection.load import build_detector, load_detector, parameter_count
from stages.evaluation.flops import inference_flops
from stages.evaluation.probes import replay


class Config(BaseConfig):
    """Nothing to set: a proof has no options."""


def run(config: Config, directory: Path, *, checkpoint: DistilledCheckpoint, data: Dataset) -> Checkpoint:
    """Keep `student.*`, drop `methods.*`, and let a fresh process reproduce the recorded outputs from what is kept."""
    state = load_file(checkpoint.path(checkpoint.weights))
    student = {key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")}
    dropped = {key: value for key, value in state.items() if key.startswith("methods.")}
    plain = build_detector(checkpoint.detector, len(checkpoint.classes))
    problems = leaks(state, student, plain.state_dict())
    weights = directory / "model.safetensors"
    save_file(student, weights, {"classes": json.dumps(checkpoint.classes)})
    if not problems:
        problems = replay_problems(checkpoint, weights, directory)
    if problems:
        raise VerdictError("prune: the student is not alone, so nothing is released: " + "; ".join(problems))
    detector = load_detector(checkpoint.detector, len(checkpoint.classes), weights)
    removed: Counter[str] = Counter()
    for key, value in dropped.items():
        removed[".".join(key.split(".")[1:3])] += value.numel()
    proof = PruneProof(
        probes=len(load_file(checkpoint.path(checkpoint.probes))["images"]),
        removed_tensors=len(dropped),
        removed_parameters=sum(removed.values()),
        removed_bytes=sum(value.nbytes for value in dropped.values()),
        removed_flops=checkpoint.methods_flops,
        removed=dict(removed),
        parameters=parameter_count(detector),
        flops=inference_flops(detector, data.height, data.width),
    )
    for name, count in removed.items():
        logger.info("removed %-28s %10d numbers", name, count)
    logger.info(
        "proof: a fresh process reproduced %d images bit for bit from %d parameters", proof.probes, proof.parameters
    )
    return Checkpoint(
        detector=checkpoint.detector,
        classes=checkpoint.classes,
        weights=weights.name,
        parameters=proof.parameters,
        iterations=checkpoint.iterations,
        seconds=checkpoint.seconds,
        images=checkpoint.images,
        seed=checkpoint.seed,
        source=checkpoint.key,
        licences=checkpoint.licences,
        proof=proof,
    )


def leaks(state: dict[str, Tensor], student: dict[str, Tensor], plain: dict[str, Tensor]) -> list[str]:
    """What a student built from its settings alone would not have, lacks, or has in another shape."""
    problems = [
        f"{key} belongs neither to the student nor to a method"
        for key in state
        if key.split(".")[0] not in ("student", "methods")
    ]
    problems += [f"{key} is no tensor of the student" for key in student if key not in plain]
    problems += [f"the student's {key} is missing" for key in plain if key not in student]
    problems += [
        f"{key} has shape {tuple(student[key].shape)}, the student's has {tuple(plain[key].shape)}"
        for key in student.keys() & plain.keys()
        if student[key].shape != plain[key].shape
    ]
    return problems[:10]


def replay_problems(checkpoint: DistilledCheckpoint, weights: Path, directory: Path) -> list[str]:
    """Where the pruned file, in a fresh process, differs from the student before pruning."""
    probes = checkpoint.path(checkpoint.probes)
    try:
        found = replay(checkpoint.detector, len(checkpoint.classes), weights, probes, directory)
    except RuntimeError as problem:
        return [str(problem)]
    problems = [
        f"{name} differ from those before pruning by up to {difference:g}"
        for name, difference in found["differences"].items()
        if difference != 0
    ]
    if found["parameters"] != checkpoint.parameters:
        problems.append(f"it has {found['parameters']} parameters, the student had {checkpoint.parameters}")
    return problems
