"""Why believe it? Training, latency, proofs, images and where every number comes from: each as a section of the page."""

from __future__ import annotations

from collections.abc import Sequence

from stages.artifacts.checkpoint import Checkpoint, TrainedDetector
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import LatencyRow
from stages.evaluation.report import plots
from stages.evaluation.report.arms import group_of
from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.page import Plot, Section, Table
from stages.evaluation.report.pictures import SCORE, strips
from stages.evaluation.report.sections.results import shipped
from stages.evaluation.report.wording import MISSING, counted, megabytes, millions, milliseconds, seconds

STEPS = ("decode", "preprocess", "inference", "postprocess", "end_to_end")
PANELS = 6  # of losses, above which only one training of several seeds is drawn


def training(evidence: Evidence) -> Section:
    """Losses, learning rate and AP over the steps."""
    series = {}
    for one in evidence.trainings:
        if one.metrics and one.path(one.metrics).is_file() and (found := plots.read_metrics(one.path(one.metrics))):
            series[one.name] = found
    if not series:
        return Section("Training", sentences=["no training left its metrics"])
    aps = {name: found["val/ap"] for name, found in series.items() if "val/ap" in found}
    rates = {name: found["lr"] for name, found in series.items() if "lr" in found}
    panels, of_which = series, ""
    if len(series) > PANELS:
        groups = dict.fromkeys(map(group_of, series))
        panels = {group: next(found for name, found in series.items() if group_of(name) == group) for group in groups}
        of_which = " of the first seed"
    shown = [
        Plot(
            plots.while_training(aps, rates, plots.stage_colours(evidence)),
            "AP on the validation images and learning rate, by step",
        ),
        Plot(plots.losses(panels), f"weighted losses{of_which}, by step, on a logarithmic axis"),
    ]
    dead = [
        f"loss {term} of {name} was 0 throughout: it taught nothing"
        for name, found in series.items()
        for term, (_, values) in found.items()
        if plots.is_loss(term) and not any(values)
    ]
    notes = ["AP while training is for watching; the AP that counts is that of the table of models"] if aps else []
    return Section("Training", sentences=dead, plots=shown, notes=notes)


def latency(evidence: Evidence) -> Section:
    """Milliseconds by step, over time, and whether to believe them."""
    rows, quoted = evidence.latency_rows, evidence.quoted_latency
    if not rows:
        return Section("Latency", sentences=["no latency was measured"])
    tables, sentences = [], []
    for row in quoted:
        cores = row.machine.get("cores", "?")
        device = row.machine.get("name") or row.machine.get("cpu", "an unnamed CPU")
        where = f"{device} ({cores} cores, {row.threads} used), {row.backend}"
        memory = "" if row.peak_memory_mb is None else f"; the process held {row.peak_memory_mb:.0f} MB at most"
        images = "one" if row.batch == 1 else str(row.batch)
        sentences.append(f"model {row.label}: batch of {images}, {millions(row.flops)} operations, on {where}{memory}")
        if not row.reliable:
            reasons = "; ".join(row.evidence.get("reasons", ())) or "the benchmark gives no reason"
            sentences.append(f"model {row.label}: UNRELIABLE, do not quote it: {reasons}; {evidence.measure_again}")
        tables.append(_latency_table(row, title=row.label if len(quoted) > 1 else ""))
    sentences += [_at_rate(row) for row in rows if row.at_rate]
    tables += [_sweep_table(rows)] if len(rows) > len(quoted) else []
    parts = {
        row.label: {step: row.steps[step]["mean"] or 0.0 for step in STEPS[:-1] if step in row.steps} for row in quoted
    }
    shown = [Plot(plots.stacked(parts, "ms, mean of each step"), "where the time of one call goes")]
    if calls := {row.label: found for row in quoted if (found := evidence.calls(row))}:
        caption = "how long calls took, over the time of the measurement: darker where more of them lie"
        shown.append(Plot(plots.over_time(calls), caption))
    note = "a percentile is given only where at least ten samples lie beyond it: p99 needs 1,000"
    return Section("Latency", sentences=sentences, tables=tables, plots=shown, notes=[note])


def _at_rate(row: LatencyRow) -> str:
    found = row.at_rate or {}
    answered = found["response"]
    p99 = f"p99 {milliseconds(answered['p99'])} ms" if answered["p99"] else "too few for p99"
    queue = "" if found["kept_up"] else "; it did NOT keep up: the queue grew"
    doubt = "" if found["reliable"] else f"; UNRELIABLE: {'; '.join(found['reasons'])}"
    return (
        f"model {row.label}, {counted(row.threads, 'thread')}: at {found['rate']:g} requests a second p50 "
        f"{milliseconds(answered['p50'])} ms, {p99}, from when a request was due; busy {100 * found['busy']:.0f} % of the "
        f"time{queue}{doubt}"
    )


def _sweep_table(rows: Sequence[LatencyRow]) -> Table:
    lines = []
    for row in rows:
        total = row.steps["end_to_end"]
        speed = MISSING if row.images_per_second is None else f"{row.images_per_second:,.1f}"
        memory = MISSING if row.peak_memory_mb is None else f"{row.peak_memory_mb:.0f}"
        numbers = [milliseconds(total.get("p50")), milliseconds(total.get("p99")), speed, memory]
        lines.append((row.label, str(row.batch), str(row.threads), *numbers, "yes" if row.reliable else "NO"))
    head = ("model", "batch", "threads", "p50, ms a call", "p99", "images a second", "memory, MB", "reliable")
    return Table(head, lines, title="By batch and threads")


def _latency_table(row: LatencyRow, title: str) -> Table:
    lines = []
    for step in STEPS:
        if values := row.steps.get(step):
            numbers = [milliseconds(values.get(name)) for name in ("mean", "p50", "p90", "p95", "p99")]
            lines.append((step.replace("_", " "), *numbers, f"{values.get('n') or 0:,.0f}"))
    return Table(("ms", "mean", "p50", "p90", "p95", "p99", "samples"), lines, title=title)


def proofs(evidence: Evidence) -> Section:
    """That nothing of the distillation is left, and that the file computes what the student computes."""
    sentences, lines = [], []
    for one in evidence.checkpoints:
        if isinstance(one, Checkpoint) and one.proof is not None:
            proof = one.proof
            sentences.append(
                f"pruning {one.name}: {counted(proof.removed_tensors, 'tensor')} of assistants and adapters removed "
                f"({millions(proof.removed_parameters)} numbers, {megabytes(proof.removed_bytes)} MB), and "
                f"{millions(proof.removed_flops)} operations an image that only training paid; what is left has exactly "
                f"the {proof.parameters:,} parameters of a student that was never helped, and in a fresh process gave "
                f"bit for bit what the student gave before, on {counted(proof.probes, 'image')}"
            )
            lines += [(one.name, module, f"{count:,}") for module, count in proof.removed.items()]
    sentences += [_proof_of(model) for model in evidence.models]
    if not sentences:
        return Section("Proofs", sentences=["nothing was pruned or exported"])
    tables = [Table(("student", "removed", "parameters"), lines, words=2)] if lines else []
    row, teacher = shipped(evidence), next(iter(evidence.of_stage(evidence.roles.teacher)), None)
    if row is not None and teacher is not None:
        sentences.append(
            f"size: {row.name} has {megabytes(row.bytes)} MB, {teacher.name} {megabytes(teacher.bytes)} MB"
        )
    return Section("Pruning, export, sizes", sentences=sentences, tables=tables)


def _proof_of(model: ExportedModel) -> str:
    """That a file computes what its source does: an ONNX file by its tensors too, an engine by its census."""
    parity = model.parity
    if parity is None:
        compared = f"not executed here: {model.not_executed}"
    else:
        images = counted(parity.images, "validation image")
        compared = f"compared with {parity.reference} on {images}: {parity.sentence}"
    if model.census is not None:
        return f"engine {model.name} ({model.backend}): {model.census['sentence']}; {compared}"
    if model.foreign is not None:
        return (
            f"{model.foreign.file}, adapted as {model.name}: {compared}; {counted(model.initialisers, 'learnt tensor')} of "
            "it in the file; what it learnt from, and its licence, are whoever's made it"
        )
    return (
        f"export {model.name}: {compared}; {counted(model.initialisers, 'learnt tensor')} in the file, each traced to one "
        f"of {parity.reference if parity else 'the student'}, and {counted(model.constants, 'constant')} that nobody "
        "learnt (shapes, geometry of the anchors, fills of a single value); it holds nothing else"
    )


def images(evidence: Evidence, count: int) -> Section:
    """Ground truth, teacher's and student's boxes."""
    student = shipped(evidence)
    teacher = next(iter(evidence.of_stage(evidence.roles.teacher)), None)
    shown = {row.name: evidence.results(row) for row in (teacher, student) if row is not None}
    made = strips(evidence.data, shown, count) if count else []
    if not made:
        return Section("Images", sentences=["no validation image with an object is shown"])
    sentences = [
        f"{counted(len(made), 'image')} at even distances through the validation split, not chosen by anybody; boxes with a "
        f"score of at least {SCORE}",
        "blue: right (class, and IoU of at least 0.5); orange: wrong; thin orange: wrong, and in the place of a surer box; "
        "dashed: an object that was missed",
    ]
    return Section("Images", sentences=sentences, strips=made)


def provenance(evidence: Evidence) -> Section:
    """Where every number comes from."""
    data = evidence.data
    hashes = {row.key: row.sha256 for row in evidence.rows} | {model.key: model.sha256 for model in evidence.models}
    hashes[data.key] = data.fingerprint
    made = [data, *evidence.checkpoints, *evidence.models, *evidence.accuracy, *evidence.latency]
    lines, sentences = [], []
    versions: dict[str, str] = {}
    for one in made:
        record = one.provenance
        commit = record.get("commit") or {}
        code = f"{commit['id'][:10]}{' + changes' if commit.get('dirty') else ''}" if commit else MISSING
        seed = str(one.seed) if isinstance(one, TrainedDetector) else MISSING
        took = seconds(record["seconds"]) if "seconds" in record else MISSING
        lines.append((one.name, one.key[:16] or MISSING, hashes.get(one.key, "")[:16] or MISSING, seed, code, took))
        versions |= record.get("versions", {})
        if adopted := record.get("adopted_from"):
            sentences.append(f"node {one.name} was made by older code and kept on request (key {adopted['key'][:16]})")
    sentences.append(
        f"data: {data.train.image_count:,} training images with {data.train.box_count:,} objects, {data.val.image_count:,} "
        f"validation images with {data.val.box_count:,}; canvas {data.height} x {data.width} (height x width)"
    )
    sentences += [f"data: {problem}" for problem in data.problems]
    sentences += [data.attribution] if data.attribution else []
    machines = [row.machine for row in [*evidence.rows, *evidence.latency_rows]]
    for machine in [one for index, one in enumerate(machines) if one not in machines[:index]]:
        memory = machine.get("memory_bytes")
        told = [str(machine[name]) for name in ("cpu", "architecture", "os") if machine.get(name)]
        told += [f"{machine['cores']} cores"] if machine.get("cores") else []
        told += [f"{memory / 1e9:.1f} GB of memory"] if memory else []
        told += [f"Python {machine['python']}"] if machine.get("python") else []
        told += [
            f"GPU {gpu['name']}, compute capability {gpu['compute_capability']}" for gpu in machine.get("gpus") or ()
        ]
        names = {"driver": "driver", "cuda": "CUDA", "l4t": "L4T", "power_mode": "power mode"}
        told += [f"{word} {machine[name]}" for name, word in names.items() if machine.get(name)]
        sentences.append(f"machine: {', '.join(told)}")
    if versions:
        sentences.append("versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    head = ("made by", "key", "sha256 of weights, file or data", "seed", "code", "took")
    return Section("Provenance", sentences=sentences, tables=[Table(head, lines, words=6)])
