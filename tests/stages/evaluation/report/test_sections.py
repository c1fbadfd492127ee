"""What the sections say of a story that did not go as it should."""

from __future__ import annotations

import json
from typing import Any

from stages.evaluation.report.chain import chains
from stages.evaluation.report.comparison import Comparison
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.sections import audit, results

ROLES = Roles("teacher", "student", "control", "control_equal_time")


def evidence_of(story: Any) -> Evidence:
    """The evidence of a story."""
    return Evidence(**story.inputs(), roles=ROLES)


def test_a_loss_that_never_taught_is_said(story: Any) -> None:
    distilled = next(one for one in story.checkpoints if one.name == "distilled")
    lines = [{"step": step, "student/cls": 1.0, "head/ckd": 0.0, "lr": 0.0} for step in (10, 20)]
    distilled.path("metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    story.checkpoints = [distilled]
    assert audit.training(evidence_of(story)).sentences == [
        "loss head/ckd of distilled was 0 throughout: it taught nothing"
    ]


def test_disturbed_latency_is_called_unreliable_wherever_it_stands(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", reliable=False, evidence={"reasons": ["the clock fell"]})
    evidence = evidence_of(story)
    assert (
        audit.latency(evidence)
        .sentences[1]
        .startswith("model onnx: UNRELIABLE, do not quote it: the clock fell; to measure again")
    )
    assert results.result_table(evidence).rows[-1][-2:] == ("4.40 ?", "5.50 ?")


def test_calls_are_shown_over_time(story: Any) -> None:
    story.latency_rows.clear()
    calls = {"at_s": [0.01 * i for i in range(300)], "end_to_end_ms": [5.0] * 150 + [9.0] * 149 + [500.0]}
    (story.folder / "calls.json").write_text(json.dumps(calls))
    story.time("onnx", calls="calls.json")
    evidence = evidence_of(story)
    assert evidence.calls(evidence.latency_rows[0]) == calls
    over_time = audit.latency(evidence).plots[-1]
    assert "over the time of the measurement" in over_time.caption
    assert "seconds from the first call" in over_time.svg
    assert "<image" not in over_time.svg  # the page loads nothing, so no picture of pixels either
    assert over_time.svg == audit.latency(evidence).plots[-1].svg


def test_a_sweep_is_a_table_and_its_first_row_is_quoted(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", p99=5.5)
    story.time("onnx", p99=31.5, batch=8, threads=1, images_per_second=512.3, reliable=False)
    evidence = evidence_of(story)
    assert evidence.quoted_latency == evidence.latency_rows[:1]
    section = audit.latency(evidence)
    detailed, swept = section.tables
    assert len(detailed.rows) == 5
    assert [row[1:3] for row in swept.rows] == [("1", "2"), ("8", "1")]
    assert swept.rows[1][3:] == ("4.40", "31.50", "512.3", "61", "NO")
    assert not any("UNRELIABLE" in one for one in section.sentences)  # the one that is quoted was quiet


def test_the_same_file_on_another_machine_is_quoted_too(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx")
    story.time("onnx", machine={"cpu": "Cortex-A78AE", "cores": 6})
    assert len(evidence_of(story).quoted_latency) == 2


def test_requests_at_a_rate_are_told(story: Any) -> None:
    story.latency_rows.clear()
    response = {"n": 1000, "mean": 6.0, "p50": 5.0, "p90": 7.0, "p95": 9.0, "p99": 31.25}
    served = {"rate": 30.0, "response": response, "busy": 0.15, "kept_up": True, "reliable": True, "reasons": []}
    story.time("onnx", at_rate=served)
    assert audit.latency(evidence_of(story)).sentences[-1] == (
        "model onnx, 2 threads: at 30 requests a second p50 5.00 ms, p99 31.25 ms, from when a request was due; "
        "busy 15 % of the time"
    )
    story.latency_rows.clear()
    story.time("onnx", at_rate=served | {"kept_up": False, "reliable": False, "reasons": ["hot"]})
    assert audit.latency(evidence_of(story)).sentences[-1].endswith("did NOT keep up: the queue grew; UNRELIABLE: hot")


def test_percentiles_that_were_not_measured_stay_empty(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", p99=None)
    (table,) = audit.latency(evidence_of(story)).tables
    assert table.rows[-1] == ("end to end", "4.40", "4.40", "4.84", "5.28", "-", "200")


def test_a_teacher_that_was_only_loaded(story: Any, story_parts: Any) -> None:
    loaded = {"iterations": 0, "images": 0, "seconds": 0.0}
    story.checkpoints = [
        story_parts.changed(one, loaded) if one.name == "teacher" else one for one in story.checkpoints
    ]
    said = results.advantage(evidence_of(story)).sentences
    assert "weights were loaded, not trained here" in said[0]
    assert not any("iterations" in one for one in said)


def test_absent_training_is_said(story: Any) -> None:
    story.checkpoints.clear()
    (said,) = results.advantage(evidence_of(story)).sentences
    assert said == "not told: the training of teacher and student is not wired into this report"


def test_results_of_older_code_are_said(story: Any) -> None:
    story.provenance("teacher", adopted_from={"key": "f" * 64, "code": "e" * 64})
    section = audit.provenance(evidence_of(story))
    assert section.sentences[0] == f"node teacher was made by older code and kept on request (key {'f' * 16})"
    assert any("torch 2.15.0" in one for one in section.sentences)
    assert "data: 3 boxes lie partly outside their image: clipped" in section.sentences


def test_class_means_over_seeds(three_seeds: Any) -> None:
    section = results.classes(evidence_of(three_seeds))
    (table,) = section.tables
    assert table.head == (
        "class",
        "objects",
        "teacher",
        "control",
        "control_equal_time",
        "student",
        "onnx",
        "student - control",
    )
    rows = [row for row in three_seeds.rows if row.name.startswith("student[")]
    assert table.rows[0][0] == "cat"
    assert table.rows[0][5] == f"{100 * sum(row.per_class['cat'] for row in rows) / 3:.1f}"
    assert "student (3 nodes)" in section.notes[0]


def test_missing_equal_time_control_is_said() -> None:
    section = results.gain(
        Comparison("control", missing="m"), Comparison("control_equal_time", missing="nobody ran it")
    )
    assert section.strong == "gain over control not measured: m"
    assert list(section.sentences) == ["gain over control_equal_time not measured: nobody ran it"]


def test_proofs_in_words(story: Any) -> None:
    pruned, exported, size = audit.proofs(evidence_of(story)).sentences
    assert pruned.startswith("pruning student: 40 tensors of assistants and adapters removed (365 k numbers, 1.46 MB)")
    assert "bit for bit what the student gave before, on 8 images" in pruned
    assert "700 detections in 32 images matched" in exported
    assert (
        "118 learnt tensors in the file, each traced to one of student, and 21 constants that nobody learnt" in exported
    )
    assert size == "size: onnx has 2.26 MB, teacher 3.01 MB"


def test_a_file_on_two_machines_is_two_rows_and_times_stay_with_their_machine(story: Any) -> None:
    """AP of one machine beside the latency of another would be a model that nobody has."""
    device = {
        "cpu": "ARMv8",
        "name": "Jetson AGX Orin (Orin)",
        "cores": 8,
        "gpus": [{"name": "Orin", "compute_capability": "8.7"}],
        "power_mode": "MAXN",
        "l4t": "36.4.3",
    }
    there = {"target": "orin", "machine": device}
    here = next(row for row in story.rows if row.name == "onnx")
    story.rows.append(here.model_copy(update=there))
    evidence = evidence_of(story)
    lines = {row[0]: row[5:] for row in results.result_table(evidence).rows}
    assert lines["onnx"] == ("4.40", "5.50")
    assert lines["onnx on orin"] == ("-", "-")
    (timed,) = story.latency_rows
    steps = {name: {**values, "p50": 9.0} for name, values in timed.steps.items()}
    story.latency_rows.append(timed.model_copy(update={**there, "steps": steps}))
    evidence = evidence_of(story)
    lines = {row[0]: row[5:] for row in results.result_table(evidence).rows}
    assert lines["onnx"] == ("4.40", "5.50")
    assert lines["onnx on orin"] == ("9.00", "5.50")
    assert "model onnx on orin: batch of one, 120 M operations, on Jetson AGX Orin (Orin)" in " ".join(
        audit.latency(evidence).sentences
    )
    said = [one for one in audit.provenance(evidence).sentences if one.startswith("machine: ARMv8")]
    assert said == ["machine: ARMv8, 8 cores, GPU Orin, compute capability 8.7, L4T 36.4.3, power mode MAXN"]
    (hop,) = (
        row for table in results.chain(chains(evidence), evidence).tables for row in table.rows if "orin" in row[0]
    )
    assert hop[:2] == ("onnx on orin", "exported file, onnxruntime 1.31.1")
