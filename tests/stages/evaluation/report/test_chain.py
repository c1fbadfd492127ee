"""Which hop lost AP: chains follow what was made from what, and a gap is no loss."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.artifacts.checkpoint import DistilledCheckpoint
from stages.artifacts.exported_model import LayerCost, Quantisation
from stages.evaluation.report.chain import chains, distinct, explained, hops, narrowed
from stages.evaluation.report.evidence import Evidence, Roles

ROLES = Roles("teacher", "student", "control", "control_equal_time")


def evidence_of(story: Any) -> Evidence:
    """The evidence of a story."""
    return Evidence(**story.inputs(), roles=ROLES)


def names(story: Any) -> list[list[str]]:
    """Names of the rows of each chain."""
    return [[row.name for row in chain] for chain in chains(evidence_of(story))]


def test_follows_sources_from_teacher_to_file(story: Any) -> None:
    assert names(story) == [["teacher", "distilled", "student", "onnx"]]


def test_one_chain_a_seed_the_shipped_one_first(three_seeds: Any) -> None:
    found = names(three_seeds)
    assert found[0] == ["teacher", "distilled[seed=0]", "student[seed=0]", "onnx"]
    assert sorted(chain[-1] for chain in found[1:]) == ["student[seed=1]", "student[seed=2]"]
    everything = [hop for chain in chains(evidence_of(three_seeds)) for hop in hops(chain, evidence_of(three_seeds))]
    assert len(distinct(everything + everything)) == 7


def test_passes_over_what_was_not_measured(story: Any) -> None:
    story.rows = [row for row in story.rows if row.name != "distilled"]
    assert names(story) == [["teacher", "student", "onnx"]]
    (chain,) = chains(evidence_of(story))
    assert [hop.kind for hop in hops(chain, evidence_of(story))] == ["gap", "loss"]


def test_names_the_hop_that_lost_most(empty: Any) -> None:
    best = empty.row("teacher", "trained", 1.0)
    before = empty.row("distilled", "distilled", 0.9, seed=1, source="teacher")
    empty.measure("student", "pruned", before[:-4], "distilled")
    empty.measure("onnx", "exported", before[: len(before) // 2], "student")
    evidence = evidence_of(empty)
    (chain,) = chains(evidence)
    found = hops(chain, evidence)
    assert len(best) > len(before) // 2
    assert [hop.kind for hop in found] == ["gap", "loss", "loss"]
    lost = [hop.lost for hop in found]
    assert all(value is not None and value > 0.001 for value in lost)
    assert lost[2] == found[2].source_ap - found[2].target_ap
    words = explained(found)
    assert "is a gap of" in words[0]
    assert words[1] == f"after the training the hop from student to onnx lost the most: {100 * lost[2]:.1f} AP"
    assert words[2] == f"less was lost from distilled to student {100 * lost[1]:.1f}"


def test_a_hop_that_gains_is_no_loss(empty: Any) -> None:
    results = empty.row("control", "trained", 0.9, seed=3)
    worse = results[: len(results) // 2]
    empty.rows.clear()
    empty.measure("control", "trained", worse)
    empty.measure("onnx", "exported", results, "control")
    (chain,) = chains(evidence_of(empty))
    (hop,) = hops(chain, evidence_of(empty))
    assert hop.kind == "loss"
    assert hop.lost is not None
    assert hop.lost < 0
    assert explained([hop]) == ["no AP was lost after the training (control to onnx)"]


def test_training_of_a_pruned_student_is_its_distillation(story: Any) -> None:
    evidence = evidence_of(story)
    for name in ("distilled", "student", "onnx"):
        key = next(row.key for row in evidence.rows if row.name == name)
        training = evidence.training(key)
        assert isinstance(training, DistilledCheckpoint)
    story.checkpoints = [one for one in story.checkpoints if one.name != "distilled"]
    evidence = evidence_of(story)
    training = evidence.training(next(row.key for row in evidence.rows if row.name == "student"))
    assert training is not None
    assert training.name == "student"  # and never the teacher


QUANTISATION = Quantisation(
    runtime="onnxruntime", calibration="minmax", images=128, images_sha256="ab", validation_images=20, left_out=(),
    held_out=200, ap_before=0.5, ap_after=0.49, ap_drop_low=0.0, ap_drop_high=0.02, max_ap_drop=0.01, cpu="A CPU",
    instructions=("avx512_vnni",),
    layers=tuple(LayerCost(layer=name, disagreement=0.1, kept=name == "head.a") for name in ("head.a", "head.b", "c", "d")),
)  # fmt: skip


@pytest.fixture
def quantised(story: Any) -> Any:
    """A story whose file was quantised and lost every third of its detections."""
    before = json.loads((story.folder / "onnx.json").read_text())
    story.measure("int8", "exported", [one for index, one in enumerate(before) if index % 3], "onnx")
    values = {"precision": "int8", "float_layers": ("head.a",), "quantisation": QUANTISATION}
    story.export("int8", "onnx", **values)
    return story


def test_an_int8_hop_is_told_with_its_interval_sizes_and_layers(quantised: Any) -> None:
    evidence = evidence_of(quantised)
    (chain,) = chains(evidence)
    *others, hop = hops(chain, evidence)
    assert [row.name for row in chain] == ["teacher", "distilled", "student", "onnx", "int8"]
    assert {one.precision for one in others} == {None}
    assert hop.precision == "int8"
    assert hop.lost is not None
    assert hop.lost_low is not None
    assert hop.lost_high is not None
    assert 0 < hop.lost_low < hop.lost < hop.lost_high
    before, after = chain[-2].statistics, chain[-1].statistics
    assert hop.lost_by_size == (("small", before["ap_small"] - after["ap_small"]),)  # 96 x 64 pixels hold no others
    assert hop.sensitive == ("head.a", "head.b", "c")
    (words,) = narrowed([*others, hop])
    small = 100 * hop.lost_by_size[0][1]
    assert words == (
        f"the INT8 hop (onnx to int8) lost {100 * hop.lost:.1f} AP, 95 % interval "
        f"[{100 * hop.lost_low:.1f}, {100 * hop.lost_high:.1f}], mostly small objects ({small:.1f} AP of them); most "
        "sensitive layers: head.a, head.b, c; kept in float32: head.a"
    )


def test_an_int8_hop_that_lost_nothing_says_so(story: Any) -> None:
    story.measure("int8", "exported", json.loads((story.folder / "onnx.json").read_text()), "onnx")
    story.export("int8", "onnx", precision="int8", quantisation=QUANTISATION)
    evidence = evidence_of(story)
    (chain,) = chains(evidence)
    (words,) = narrowed(hops(chain, evidence))
    assert words.startswith("the INT8 hop (onnx to int8) lost no AP, 95 % interval [0.0, 0.0]; most sensitive layers")


def test_the_interval_is_computed_once(quantised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.evaluation.report import evidence as module

    calls = []
    bootstrap = module.paired_bootstrap
    monkeypatch.setattr(module, "paired_bootstrap", lambda *given: calls.append(given) or bootstrap(*given))
    evidence = evidence_of(quantised)
    (chain,) = chains(evidence)
    assert hops(chain, evidence) == hops(chain, evidence)
    assert len(calls) == 1
