"""COCO average precision of results or of a predictor, by hotcoco for speed or by pycocotools, which defines it.

Both give the same 12 statistics; `crosscheck` asserts it on the results at hand. `paired_bootstrap` says how sure a
gain is.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploy.detections import Detections
    from deploy.predictor import Predictor

Result = dict[str, Any]  # one detection as COCO writes it: image_id, category_id, bbox (xywh), score
EVALUATORS = {"hotcoco": ("hotcoco", "hotcoco"), "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval")}
STATISTICS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)


@dataclass(frozen=True)
class Accuracy:
    """The 12 COCO statistics, from 0 to 1, and the AP of each class; None where there is no ground truth to find."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    per_class: dict[str, float | None]
    images: int
    evaluator: str
    version: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def coco_results(image_id: int, detections: Detections, category_ids: Sequence[int]) -> list[Result]:
    """One image's detections as COCO writes results: category ids for labels, boxes as x, y, width, height."""
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for (x1, y1, x2, y2), score, label in zip(
            detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]


def evaluate(results: Sequence[Result], annotations: Path, evaluator: str = "hotcoco") -> Accuracy:
    """The COCO evaluation of results over all images and categories of an annotations file.

    Raises DeployError when the evaluator is unknown or not installed, or when the results do not belong to the
    annotations.
    """
    evaluation = match(results, Path(annotations), evaluator)
    with contextlib.redirect_stdout(io.StringIO()):  # both print their table
        evaluation.accumulate()
        evaluation.summarize()
    statistics = dict(zip(STATISTICS, (_or_none(value) for value in evaluation.stats), strict=True))
    precision = evaluation.eval["precision"]  # IoU threshold, recall, category, area, limit
    names = {category["id"]: category["name"] for category in evaluation.cocoGt.dataset["categories"]}
    per_class: dict[str, float | None] = {}
    for index, category_id in enumerate(evaluation.params.catIds):
        of_class = precision[:, :, index, 0, -1]
        known = of_class[of_class > -1]
        per_class[names[category_id]] = float(known.mean()) if known.size else None
    package = EVALUATORS[evaluator][0].partition(".")[0]
    return Accuracy(
        **statistics,
        per_class=per_class,
        images=len(evaluation.params.imgIds),
        evaluator=evaluator,
        version=importlib.import_module("importlib.metadata").version(package),
    )


def evaluate_predictor(
    predictor: Predictor,
    images: Path,
    annotations: Path,
    evaluator: str = "hotcoco",
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Accuracy, list[Result]]:
    """The accuracy of a predictor on a COCO dataset, and the results it was computed from.

    `progress` is told images done and images in all. Raises DeployError when `detect_all` does, or there is no evaluator.
    """
    _modules(evaluator)  # before the work, not after it
    results = detect_all(predictor, images, annotations, batch_size, progress)
    return evaluate(results, annotations, evaluator), results


def detect_all(
    predictor: Predictor,
    images: Path,
    annotations: Path,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """What a predictor finds in all images of a COCO dataset, down to the contract's evaluation threshold.

    Raises DeployError when images are missing or the classes are not those of the annotations.
    """
    dataset = _read(Path(annotations))
    contract = predictor.contract
    problems = []
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    if unknown := sorted(set(contract.category_ids) - set(names)):
        problems.append(f"the model's category ids {unknown} are not among its categories")
    pairs = zip(contract.category_ids, contract.classes, strict=True)
    if others := [f"{i} is {names[i]!r}, to the model {name!r}" for i, name in pairs if names.get(i, name) != name]:
        # So it is where classes were selected for the training: their ids are then those of the checked val.json.
        problems.append(f"category {', '.join(others[:3])}; give annotations with the model's own categories")
    files = [(image["id"], Path(images) / image["file_name"]) for image in dataset["images"]]
    if missing := [file for _, file in files if not file.is_file()]:
        problems.append(f"{len(missing)} of {len(files)} images are missing, such as {missing[0]}")
    if problems:
        raise DeployError(f"{annotations}: " + "; ".join(problems))
    results: list[Result] = []
    found = predictor.batch((file for _, file in files), batch_size, contract.evaluation_score_threshold)
    for done, ((image_id, _), detections) in enumerate(zip(files, found, strict=True), 1):
        results += coco_results(image_id, detections, contract.category_ids)
        if progress:
            progress(done, len(files))
    return results


def crosscheck(results: Sequence[Result], annotations: Path, tolerance: float = 1e-6) -> Accuracy:
    """The accuracy by hotcoco, after pycocotools has found the same.

    Raises DeployError when any statistic or class differs.
    """
    fast, reference = (evaluate(results, annotations, evaluator) for evaluator in EVALUATORS)
    pairs = {name: (getattr(fast, name), getattr(reference, name)) for name in STATISTICS}
    pairs |= {f"AP of {name}": (ap, reference.per_class.get(name)) for name, ap in fast.per_class.items()}
    different = [
        f"{name} {a} against {b}"
        for name, (a, b) in pairs.items()
        if (a is None) != (b is None) or (a is not None and b is not None and abs(a - b) > tolerance)
    ]
    if different:
        raise DeployError(
            f"{annotations}: hotcoco {fast.version} and pycocotools {reference.version} disagree: "
            + "; ".join(different)
            + "; trust pycocotools and report the difference to hotcoco"
        )
    return fast


def match(results: Sequence[Result], annotations: Path, evaluator: str, all_sizes_only: bool = False) -> Any:
    """A COCOeval of either package, which use the same names, after its per-image matching.

    `all_sizes_only` leaves out the area ranges. Raises DeployError like `evaluate`.
    """
    coco_module, evaluation_module = _modules(evaluator)
    dataset = _read(annotations)
    images = {image["id"] for image in dataset["images"]}
    if strangers := sorted({result["image_id"] for result in results} - images)[:5]:
        raise DeployError(f"{annotations}: there are results of images it does not list, such as {strangers}")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_module.COCO(str(annotations))
        if results:
            found = truth.loadRes([dict(result) for result in results])  # pycocotools writes into them
        else:  # pycocotools cannot load an empty list
            found = coco_module.COCO()
            found.dataset = dataset | {"annotations": []}
            found.createIndex()
        evaluation = evaluation_module.COCOeval(truth, found, "bbox")
        if all_sizes_only:
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    return evaluation


def _modules(evaluator: str) -> tuple[Any, Any]:
    if evaluator not in EVALUATORS:
        raise DeployError(f"accuracy: unknown evaluator {evaluator!r}; choose one of {', '.join(EVALUATORS)}")
    coco, evaluation = EVALUATORS[evaluator]
    try:
        return importlib.import_module(coco), importlib.import_module(evaluation)
    except ImportError as error:
        raise DeployError(f"accuracy: {evaluator} is not installed; pip install {evaluator}") from error


def _read(annotations: Path) -> dict[str, Any]:
    try:
        dataset = json.loads(annotations.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeployError(f"{annotations}: COCO annotations are wanted ({error})") from error
    present = dataset if isinstance(dataset, dict) else {}
    lacks = [key for key in ("images", "annotations", "categories") if key not in present]
    if lacks:
        raise DeployError(f"{annotations}: COCO annotations are wanted, {', '.join(lacks)} lack")
    names = [category["name"] for category in dataset["categories"]]
    if len(set(names)) != len(names):
        raise DeployError(f"{annotations}: two categories have one name among {sorted(names)}; rename one")
    return dict(dataset)


def _or_none(value: float) -> float | None:
    value = float(value)
    return None if value < 0 or math.isnan(value) else value
