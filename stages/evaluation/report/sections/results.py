"""Is it good? Models, the chain between them, the gain, what the teacher had, classes: each as a section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from stages.artifacts.checkpoint import DistilledCheckpoint
from stages.artifacts.reports import AccuracyRow
from stages.evaluation.report import plots
from stages.evaluation.report.chain import Chain, Hop, distinct, explained, hops, narrowed
from stages.evaluation.report.comparison import Comparison, fairness, times
from stages.evaluation.report.evidence import Evidence, mean_ap, stage_of
from stages.evaluation.report.page import Plot, Section, Table
from stages.evaluation.report.wording import (
    MISSING,
    ap,
    counted,
    listed,
    megabytes,
    millions,
    milliseconds,
    seconds,
    signed_ap,
)

FORMS = {
    "trained": "trained on labels",
    "distilled": "student before pruning",
    "pruned": "student, pruned",
    "exported": "exported file",
}


def shipped(evidence: Evidence) -> AccuracyRow | None:
    """The row that stands for the result: the first exported file, else the first student."""
    return next(iter([*evidence.exported, *evidence.of_stage(evidence.roles.student)]), None)


def result_table(evidence: Evidence) -> Table:
    """One line a measured model."""
    lines = []
    for row in evidence.rows:
        timed = evidence.latency_of(row)
        total = timed.steps.get("end_to_end", {}) if timed else {}
        doubt = "" if timed is None or timed.reliable else " ?"
        lines.append(
            (
                row.label,
                ap(row.statistics.get("ap")),
                ap(row.statistics.get("ap50")),
                f"{row.parameters:,}",
                megabytes(row.bytes),
                milliseconds(total.get("p50")) + (doubt if total.get("p50") is not None else ""),
                milliseconds(total.get("p99")) + (doubt if total.get("p99") is not None else ""),
            )
        )
    return Table(("model", "AP", "AP50", "parameters", "MB", "p50 ms", "p99 ms"), lines)


def form_of(row: AccuracyRow, evidence: Evidence) -> str:
    """What was measured: `exported file in int8, onnxruntime 1.31.1`."""
    model = evidence.model(row.key)
    lowered = f" in {model.precision}" if model is not None and model.precision != "fp32" else ""
    return f"{FORMS[row.kind]}{lowered}, {row.backend}"


def models(evidence: Evidence, ships: bool = True) -> Section:
    """All that was measured; `ships` says that one student is to be shipped, so that what is not told of it is said."""
    if not evidence.rows:
        return Section("Models", sentences=["no AP was measured: no row is wired into this report"])
    table = result_table(evidence)
    forms = [form_of(row, evidence) for row in evidence.rows]
    lines = [(row[0], form, *row[1:]) for row, form in zip(table.rows, forms, strict=True)]
    colours = plots.stage_colours(evidence)
    points: dict[str, list[float]] = {}
    for row in evidence.rows:
        if (value := row.statistics.get("ap")) is not None:
            points.setdefault(stage_of(row.name), []).append(100 * value)
    plot = (
        [Plot(plots.dots(points, colours, "AP"), "AP of each stage, one dot a node, with the mean")] if points else []
    )
    evaluators = listed(sorted({row.evaluator for row in evidence.rows}))
    checked = [row.name for row in evidence.rows if row.crosschecked]
    images = max(row.images for row in evidence.rows)
    notes = [f"COCO AP, times 100, on {counted(images, 'validation image')}, by {evaluators}"]
    if checked:
        notes.append(f"a second evaluator (pycocotools against hotcoco) gave the same 12 numbers for {listed(checked)}")
    sizes = {timed.batch for row in evidence.rows if (timed := evidence.latency_of(row))} or {1}
    call = " or ".join(counted(size, "image") for size in sorted(sizes))
    notes.append(
        f"times are of a call with {call}, file to detections; ? marks a measurement that the machine disturbed"
    )
    notes += _left_out(evidence) if ships else []
    head = (table.head[0], "form", *table.head[1:])
    return Section("Models", tables=[Table(head, lines, words=2)], plots=plot, notes=notes)


def _left_out(evidence: Evidence) -> list[str]:
    """What a report of other stages would also say."""
    roles = evidence.roles
    needs = {
        "a gain over a control": (roles.student, roles.control),
        "what the teacher had that the student had not": (roles.teacher, roles.student),
    }
    absent = {what: [stage for stage in stages if not evidence.nodes_of(stage)] for what, stages in needs.items()}
    told = [f"{what} (there is no stage {' or '.join(stages)})" for what, stages in absent.items() if stages]
    return [f"not told here: {listed(told)}"] if told else []


def chain(found: Sequence[Chain], evidence: Evidence) -> Section:
    """Teacher to shipped file, hop by hop."""
    if not found:
        return Section("Which hop lost AP", sentences=["no two measured models were made one from the other"])
    shown = [one for one in found if one[-1].kind == "exported"] or list(found)
    words = list(dict.fromkeys(word for one in shown for word in explained(hops(one, evidence))))
    head = ("model", "form", "what this hop did", "AP", "AP50", "change of AP")
    tables = []
    for one in shown:
        lines = [_hop_line(row, hop, evidence) for row, hop in zip(one, [None, *hops(one, evidence)], strict=True)]
        tables.append(Table(head, lines, words=3, title=f"{one[0].name} to {one[-1].name}" if len(found) > 1 else ""))
    told = {hop for one in shown for hop in hops(one, evidence)}
    if others := [hop for one in found for hop in hops(one, evidence) if hop not in told]:
        lines = [
            (
                hop.source,
                hop.target,
                "gap" if hop.kind == "gap" else "conversion",
                ap(hop.source_ap),
                ap(hop.target_ap),
                signed_ap(hop.lost and -hop.lost),
            )
            for hop in distinct(others)
        ]
        head = ("from", "to", "kind of change", "AP", "AP after", "change of AP")
        tables.append(Table(head, lines, words=3, title="Hops of models that do not ship"))
    strong = next(word for word in reversed(words))
    lowered = narrowed(distinct([hop for one in found for hop in hops(one, evidence)]))
    return Section("Which hop lost AP", strong, [*(word for word in words if word != strong), *lowered], tables)


def _hop_line(row: AccuracyRow, hop: Hop | None, evidence: Evidence) -> tuple[str, ...]:
    if hop is None:
        did = "where the chain begins"
    elif hop.kind == "gap":
        did = "gap: another detector, taught by the one above"
    elif hop.precision:
        did = f"computed in {hop.precision}"
    else:
        did = {"pruned": "assistants dropped", "exported": "exported and run by another program"}.get(
            row.kind, "converted"
        )
    change = MISSING if hop is None or hop.lost is None else signed_ap(-hop.lost)
    return row.label, form_of(row, evidence), did, ap(row.statistics.get("ap")), ap(row.statistics.get("ap50")), change


def gain(over_control: Comparison | None, over_equal_time: Comparison | None) -> Section:
    """The student against its controls; None is one that nobody expects."""
    sentences = fairness(over_control, same_length=True) if over_control else []
    notes = []
    if over_control and over_control.pairs:
        one = over_control.pairs[0].gain
        notes.append(
            f"interval: paired bootstrap, {one.samples:,} samples of {one.images:,} validation images, each model on the "
            "same draw; it covers the choice of images, not that of the training seed"
        )
        if len(over_control.pairs) == 1:
            notes.append("one seed was run, so nothing is known about the spread over seeds")
        else:
            notes.append("over several seeds the interval given is the hull of theirs, the gain their mean")
    if over_equal_time and over_equal_time.pairs:
        sentences.append(
            f"against {over_equal_time.control}, the same student trained longer alone: {over_equal_time.sentence}"
        )
        sentences += [*times(over_equal_time), *fairness(over_equal_time, same_length=False)]
    elif over_equal_time:
        sentences.append(over_equal_time.sentence)
    lines = [
        (
            pair.student.name,
            pair.control.name,
            ap(pair.gain.ap_b),
            ap(pair.gain.ap_a),
            signed_ap(pair.gain.difference),
            signed_ap(pair.gain.low),
            signed_ap(pair.gain.high),
        )
        for comparison in (over_control, over_equal_time)
        for pair in (comparison.pairs if comparison else ())
    ]
    head = ("student", "control", "student's AP", "control's AP", "gain", "low", "high")
    tables = [Table(head, lines, words=2)] if lines else []
    strong = over_control.sentence if over_control else ""
    return Section("Gain over the control", strong, sentences, tables, notes=notes)


def advantage(evidence: Evidence) -> Section:
    """What the teacher had that the student had not, in words and numbers."""
    title = "What the teacher had that the student had not"
    roles = evidence.roles
    teacher, student = (
        next((trained for row in evidence.of_stage(stage) if (trained := evidence.training(row.key))), None)
        for stage in (roles.teacher, roles.student)
    )
    if teacher is None or student is None:
        absent = listed([name for name, one in ((roles.teacher, teacher), (roles.student, student)) if one is None])
        return Section(title, sentences=[f"not told: the training of {absent} is not wired into this report"])
    words = []
    if not teacher.iterations:
        words.append(
            "the teacher's weights were loaded, not trained here: what it learnt from is not known to this report"
        )
    elif teacher.images > student.images:
        words.append(
            f"the teacher learnt from {teacher.images:,} labelled images, the student from {student.images:,}: the "
            f"teacher had {teacher.images / max(1, student.images):.3g} times as many, and what it knows of the others "
            "reaches the student without their labels"
        )
    else:
        words.append(f"teacher and student learnt from {teacher.images:,} and {student.images:,} labelled images")
    if isinstance(student, DistilledCheckpoint) and student.unlabelled:
        words.append(
            f"the student also saw {counted(student.unlabelled, 'image')} without labels, of which a control learns nothing"
        )
    if teacher.iterations:
        words.append(
            f"it was trained for {teacher.iterations:,} iterations ({seconds(teacher.seconds, student.seconds)}), "
            f"the student for {student.iterations:,} ({seconds(student.seconds, teacher.seconds)}, the teacher's help included)"
        )
    words.append(
        f"it has {millions(teacher.parameters)} parameters ({teacher.detector['name']}), the student "
        f"{millions(student.parameters)} ({student.detector['name']}): {teacher.parameters / student.parameters:.2g} times"
    )
    return Section(title, sentences=words, tables=[_trainings_table(evidence)])


def _trainings_table(evidence: Evidence) -> Table:
    head = ("training", "detector", "parameters", "labelled images", "iterations", "time in steps", "seed")
    longest = max((one.seconds for one in evidence.trainings), default=0)
    lines = [
        (
            one.name,
            str(one.detector["name"]),
            f"{one.parameters:,}",
            f"{one.images:,}",
            f"{one.iterations:,}",
            seconds(one.seconds, longest),
            str(one.seed),
        )
        for one in evidence.trainings
    ]
    return Table(head, lines, words=2)


def classes(evidence: Evidence) -> Section:
    """AP of each class for the parts of the story."""
    roles = evidence.roles
    stages = [roles.teacher, roles.control, roles.equal_time_control, roles.student]
    stages += [stage_of(row.name) for row in evidence.exported]
    columns = {stage: rows for stage in dict.fromkeys(stages) if (rows := evidence.of_stage(stage))}
    compared = roles.student in columns and roles.control in columns
    boxes = evidence.data.val.boxes_per_class

    def line(name: str, objects: int, values: dict[str, float | None]) -> tuple[str, ...]:
        own, other = values.get(roles.student), values.get(roles.control)
        change = MISSING if own is None or other is None else signed_ap(own - other)
        return (name, f"{objects:,}", *map(ap, values.values()), *([change] if compared else []))

    lines = [
        line(name, boxes.get(name, 0), {stage: _class_ap(rows, name) for stage, rows in columns.items()})
        for name in evidence.data.classes
    ]
    lines.append(line("all", sum(boxes.values()), {stage: mean_ap(rows) for stage, rows in columns.items()}))
    several = [f"{stage} ({len(rows)} nodes)" for stage, rows in columns.items() if len(rows) > 1]
    notes = [f"means over nodes: {listed(several)}"] if several else []
    if any(boxes.get(name, 0) == 0 for name in evidence.data.classes):
        notes.append("a class without an object in the validation images has no AP")
    head = ("class", "objects", *columns, *(["student - control"] if compared else []))
    return Section("AP by class", tables=[Table(head, lines)], notes=notes)


def _class_ap(rows: Sequence[AccuracyRow], name: str) -> float | None:
    values = [value for row in rows if (value := row.per_class.get(name)) is not None]
    return fmean(values) if values else None
