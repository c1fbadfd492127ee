"""A whole story made by hand: a dataset of small images, and artifacts whose AP is really that of their results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.accuracy import STATISTICS, evaluate
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint, PruneProof
from stages.artifacts.dataset import Dataset, Split
from stages.artifacts.exported_model import ExportedModel, ParityRecord
from stages.artifacts.reports import AccuracyReport, AccuracyRow, LatencyReport, LatencyRow

CLASSES = ("cat", "dog", "<cow|calf>")
MACHINE = {"cpu": "A CPU of ours", "cores": 2, "memory_bytes": 8_000_000_000, "os": "Linux", "python": "3.11.0"}
IDS = (1, 3, 7)


def make_data(folder: Path, images: int = 20, seed: int = 0) -> Dataset:
    """Flat rectangles on noise, two to four an image."""
    generator = np.random.default_rng(seed)
    (folder / "val").mkdir(parents=True)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in zip(IDS, CLASSES, strict=True)],
    }
    for image_id in range(images):
        pixels = generator.integers(90, 130, (64, 96, 3), np.uint8)
        for column in range(generator.integers(2, 5)):
            x, y = 2 + 23 * column + int(generator.integers(0, 4)), int(generator.integers(2, 30))
            width, height = 16, int(generator.integers(18, 30))
            label = int(generator.integers(0, 3))
            pixels[y : y + height, x : x + width] = 60 + 60 * label
            annotation = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0, "image_id": image_id}
            document["annotations"].append(
                {**annotation, "id": len(document["annotations"]) + 1, "category_id": IDS[label]}
            )
        Image.fromarray(pixels).save(folder / "val" / f"{image_id}.png")
        document["images"].append({"id": image_id, "file_name": f"{image_id}.png", "width": 96, "height": 64})
    (folder / "val.json").write_text(json.dumps(document))
    counts = {
        name: sum(a["category_id"] == number for a in document["annotations"])
        for number, name in zip(IDS, CLASSES, strict=True)
    }
    split = Split(
        images="val",
        annotations="val.json",
        image_count=images,
        box_count=len(document["annotations"]),
        boxes_per_class=counts,
    )
    return Dataset(
        classes=CLASSES,
        category_ids=IDS,
        train=split.model_copy(update={"image_count": 3000}),
        val=split,
        height=64,
        width=96,
        pad_rgb=(110, 110, 110),
        fingerprint="ab" * 32,
        problems=("3 boxes lie partly outside their image: clipped",),
    ).placed(folder, name="data", key="d" * 64)


def detections(data: Dataset, quality: float, seed: int) -> list[dict[str, Any]]:
    """COCO results that find a share of the objects, with some jitter and some inventions."""
    document = json.loads(data.annotations("val").read_text())
    generator = np.random.default_rng(seed)
    found = []
    for annotation in document["annotations"]:
        if generator.random() < quality:
            jitter = (1.2 - quality) * 4 * generator.normal(size=4)
            found.append({**_result(annotation), "bbox": (np.array(annotation["bbox"]) + jitter).clip(1).tolist()})
            found[-1]["score"] = float(generator.uniform(0.3, 1))
        if generator.random() < 1 - quality:
            wrong = {
                **_result(annotation),
                "category_id": data.category_ids[int(generator.integers(len(data.category_ids)))],
            }
            found.append({**wrong, "score": float(generator.uniform(0.1, 0.7))})
    return found


def _result(annotation: dict[str, Any]) -> dict[str, Any]:
    return {name: annotation[name] for name in ("image_id", "category_id", "bbox")}


def key_of(name: str) -> str:
    """A key like the engine's."""
    return hashlib.sha256(name.encode()).hexdigest()


@dataclasses.dataclass
class Story:
    """What `run` takes, built node by node."""

    folder: Path
    data: Dataset
    rows: list[AccuracyRow] = dataclasses.field(default_factory=list)
    latency_rows: list[LatencyRow] = dataclasses.field(default_factory=list)
    checkpoints: list[Any] = dataclasses.field(default_factory=list)
    models: list[ExportedModel] = dataclasses.field(default_factory=list)

    def row(
        self, name: str, kind: str, quality: float, seed: int = 0, source: str = "", **values: Any
    ) -> list[dict[str, Any]]:
        """Measure results of a quality; `seed` decides which objects are found."""
        return self.measure(name, kind, detections(self.data, quality, seed), source, **values)

    def measure(
        self, name: str, kind: str, results: list[dict[str, Any]], source: str = "", **values: Any
    ) -> list[dict[str, Any]]:
        """Add the row of some results, with their real AP."""
        (self.folder / f"{name}.json").write_text(json.dumps(results))
        accuracy = evaluate(results, self.data.annotations("val"))
        measured = dataclasses.asdict(accuracy)
        row = {
            "backend": "torch 2.15.0",
            "sha256": hashlib.sha256(b"weights of " + name.encode()).hexdigest(),
            "parameters": 482_586,
            "bytes": 1_950_000,
            "machine": MACHINE,
            "evaluator": "hotcoco 1.3",
            "crosschecked": kind == "exported",
        }
        self.rows.append(
            AccuracyRow(
                name=name,
                kind=kind,
                key=key_of(name),
                source=key_of(source) if source else "",
                statistics={one: measured[one] for one in STATISTICS},
                per_class=accuracy.per_class,
                images=accuracy.images,
                results=f"{name}.json",
                **(row | values),
            )
        )
        return results

    def train(self, name: str, cls: type = Checkpoint, source: str = "", **values: Any) -> None:
        """Add a checkpoint; trained ones have metrics."""
        folder = self.folder / f"made_{name}"
        folder.mkdir()
        fields: dict[str, Any] = {
            "detector": {"name": "retinanet", "backbone": "tiny"},
            "parameters": 482_586,
            "iterations": 950,
            "seconds": 100.0,
            "images": 100,
            "metrics": None if "proof" in values else "metrics.jsonl",
        }
        fields |= values
        if fields["metrics"]:
            helped = {"pkd/feature": 9.0, "head/akd": 0.2} if cls is DistilledCheckpoint else {}
            lines = [
                {"step": step, "lr": 0.007 * (1 - step / 1000)}
                | {
                    term: start / (1 + step / 60)
                    for term, start in ({"student/cls": 1.1, "student/box": 0.8} | helped).items()
                }
                for step in range(10, 960, 10)
            ]
            lines += [{"step": step, "val/ap": 0.0005 * step} for step in (475, 950)]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        made = cls(
            classes=self.data.classes, weights="model.safetensors", source=key_of(source) if source else "", **fields
        )
        self.checkpoints.append(made.placed(folder, name=name, key=key_of(name)))

    def provenance(self, name: str, **values: Any) -> None:
        """Write what the engine records beside the checkpoint of a node."""
        made = next(one for one in self.checkpoints if one.name == name)
        record = {"commit": {"id": "c0ffee" * 6, "dirty": False}, "versions": {"torch": "2.15.0"}, "seconds": 123.0}
        (made.directory / "provenance.json").write_text(json.dumps(record | values))

    def export(self, name: str, source: str, **values: Any) -> None:
        """Add the exported model of a row that was measured."""
        row = next(row for row in self.rows if row.name == name)
        parity = ParityRecord(
            reference=source, images=32, matched=700, unmatched=0, max_box_px=0.001, max_score=1e-6, label_mismatches=0,
            passed=True, sentence="700 detections in 32 images matched within 0.001 px and 1e-06 score",
        )  # fmt: skip
        fields = {"bytes": row.bytes, "parity": parity, "source": key_of(source), "sha256": row.sha256} | values
        self.models.append(
            ExportedModel(
                file="model.onnx", classes=self.data.classes, parameters=row.parameters, flops=120_000_000, opset=20, contract={},
                initialisers=118, constants=21, **fields,
            ).placed(self.folder, name=name, key=key_of(name))
        )  # fmt: skip

    def time(self, name: str, p99: float | None = 5.5, **values: Any) -> None:
        """Add the latency of a row that was measured."""
        row = next(row for row in self.rows if row.name == name)
        means = {"decode": 0.9, "preprocess": 0.4, "inference": 2.6, "postprocess": 0.5, "end_to_end": 4.4}
        n = 1000 if p99 is not None else 200
        steps = {
            step: {"mean": mean, "p50": mean, "p90": 1.1 * mean, "p95": 1.2 * mean, "p99": p99, "n": n}
            for step, mean in means.items()
        }
        shared = row.model_dump(
            include={"name", "kind", "key", "source", "backend", "sha256", "parameters", "bytes", "machine"}
        )
        fields: dict[str, Any] = {
            "threads": 2,
            "flops": 120_000_000,
            "peak_memory_mb": 61.0,
            "reliable": True,
            "evidence": {},
        }
        self.latency_rows.append(LatencyRow(**(shared | {"steps": steps} | fields | values)))

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of `stages.report.run`."""
        accuracy = AccuracyReport(rows=tuple(self.rows)).placed(self.folder, name="accuracy", key=key_of("accuracy"))
        latency = LatencyReport(rows=tuple(self.latency_rows)).placed(
            self.folder, name="latency", key=key_of("latency")
        )
        return {
            "data": self.data,
            "accuracy": [accuracy] if self.rows else [],
            "latency": [latency] if self.latency_rows else [],
            "checkpoints": self.checkpoints,
            "models": self.models,
        }


def make_story(folder: Path, data: Dataset, seeds: tuple[int, ...] = (0,)) -> Story:
    """Teacher, control, equal-time control, student before and after pruning, ONNX; with a matrix for several seeds."""
    story = Story(folder, data)
    folder.mkdir(exist_ok=True)
    story.row("teacher", "trained", 0.97, seed=90, parameters=748_492, bytes=3_010_000)
    detector = {"name": "faster_rcnn", "backbone": "tiny"}
    story.train("teacher", detector=detector, parameters=748_492, iterations=800, images=3000, seconds=90.0)
    for seed in seeds:
        axes = f"[seed={seed}]" if len(seeds) > 1 else ""
        story.row(f"control{axes}", "trained", 0.45, seed=seed)
        story.train(f"control{axes}", seed=seed)
        story.row(f"control_equal_time{axes}", "trained", 0.55, seed=10 + seed)
        story.train(f"control_equal_time{axes}", seed=seed, iterations=2000, seconds=190.0)
        results = story.row(f"distilled{axes}", "distilled", 0.85, seed=20 + seed, source="teacher", bytes=3_410_000)
        story.train(
            f"distilled{axes}",
            DistilledCheckpoint,
            "teacher",
            seed=seed,
            seconds=180.0,
            methods={},
            methods_flops=1,
            probes="p",
        )
        story.measure(f"student{axes}", "pruned", results, f"distilled{axes}")
        proof = PruneProof(
            probes=8, removed_tensors=40, removed_parameters=365_000, removed_bytes=1_460_000, removed_flops=800_000_000,
            removed={"head.assistant": 350_000, "pkd.adapters": 15_000}, parameters=482_586, flops=120_000_000,
        )  # fmt: skip
        story.train(f"student{axes}", source=f"distilled{axes}", seed=seed, seconds=180.0, proof=proof)
    exported = f"student[seed={seeds[0]}]" if len(seeds) > 1 else "student"
    story.measure(
        "onnx", "exported", results_of(story, exported), exported, backend="onnxruntime 1.31.1", bytes=2_260_000
    )
    story.export("onnx", exported)
    story.time("onnx")
    return story


def results_of(story: Story, name: str) -> list[dict[str, Any]]:
    """The results that a row was measured on."""
    return list(json.loads((story.folder / f"{name}.json").read_text()))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """A small validation split."""
    return make_data(tmp_path / "data")


@pytest.fixture
def story(tmp_path: Path, data: Dataset) -> Story:
    """One seed, everything measured."""
    return make_story(tmp_path / "made", data)


@pytest.fixture
def three_seeds(tmp_path: Path, data: Dataset) -> Story:
    """The same with three training seeds."""
    return make_story(tmp_path / "made", data, (0, 1, 2))


@pytest.fixture
def empty(tmp_path: Path, data: Dataset) -> Story:
    """Nothing measured yet."""
    (tmp_path / "made").mkdir()
    return Story(tmp_path / "made", data)


@pytest.fixture(scope="module")
def shared_empty(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Nothing measured yet; for a module's tests to share what one of its fixtures makes of it."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "made").mkdir()
    return Story(folder / "made", make_data(folder / "data"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One seed, everything measured; shared, not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return make_story(folder / "made", make_data(folder / "data"))


class Parts:
    """Records of a story, changed."""

    @staticmethod
    def renamed(row: AccuracyRow, name: str) -> AccuracyRow:
        """The same row of a node with another name."""
        return row.model_copy(update={"name": name})

    @staticmethod
    def changed(made: Any, values: dict[str, Any]) -> Any:
        """The same artifact with other fields, in its place."""
        return made.model_copy(update=values).placed(made.directory, name=made.name, key=made.key)


@pytest.fixture
def story_parts() -> Parts:
    """How to change records."""
    return Parts()
