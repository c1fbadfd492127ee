"""Did helping help at all? Every arm against its control and against the other arms, and where distillation pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.evaluation.report import plots
from stages.evaluation.report.arms import Arm, Experiment, Group, group_of
from stages.evaluation.report.estimate import Estimate
from stages.evaluation.report.page import Plot, Section, Table
from stages.evaluation.report.wording import MISSING, ap, counted, interval, listed, seconds, signed_ap

LENGTHS = ("images", "steps", "epochs")  # axes of a matrix that lie on the axes of a plot


def arms_table(found: Experiment) -> Table:
    """One line a control, then one an arm: AP, and the gain at equal iterations and at equal time, with intervals."""
    head = ("arm", "methods", "seeds", "images", "iterations", "time", "AP", "gain", "interval", "over equal time")
    longest = max(arm.group.seconds for arm in found.arms)
    lines = [_line(group, "none", longest) for group in controls(found)]
    for arm in found.arms:
        mark = " (had less time)" if arm.favoured else ""
        gains = (
            signed_ap(arm.gain.mean) if arm.gain else MISSING,
            interval(arm.gain.low, arm.gain.high) if arm.gain else MISSING,
            _gain(arm.gain_over_longer) + mark,
        )
        lines.append((*_line(arm.group, arm.methods, longest)[:-3], *gains))
    return Table(head, lines, words=2)


def controls(found: Experiment) -> list[Group]:
    """Every plain training that an arm is compared with, once."""
    used = [group for arm in found.arms for group in (arm.control, arm.longer) if group is not None]
    return list({group.name: group for group in used}.values())


def _line(group: Group, methods: str, longest: float) -> tuple[str, ...]:
    one, count = group.one, str(len(group.runs))
    size = (count, f"{one.images:,}", f"{one.iterations:,}", seconds(group.seconds, longest))
    return (group.name, methods, *size, ap(group.ap), MISSING, MISSING, MISSING)


def _gain(gain: Estimate | None) -> str:
    return f"{signed_ap(gain.mean)} {interval(gain.low, gain.high)}" if gain else MISSING


def arms(found: Experiment) -> Section:
    """Picture, table, and each arm in words."""
    sentences = [f"arm {arm.name}: {arm.gain.sentence}{_at_equal_time(arm)}" for arm in found.compared if arm.gain]
    sentences += [
        f"arm {whole.name} over {part.name}, which is the same with less help: {gain.sentence}"
        for whole, part, gain in found.ablations
    ]
    sentences += [f"arm {arm.name} is not compared: {arm.refused}" for arm in found.arms if arm.refused]
    tables = [arms_table(found)]
    if found.between:
        tables.append(_between(found))
    bars = {arm.name: [gain for gain in (arm.gain, arm.gain_over_longer) if gain] for arm in found.compared if arm.gain}
    labels = ("at equal iterations", "at equal time, or more for the control")
    caption = "gain in AP over the control, with its interval; one small dot a seed"
    picture = [Plot(plots.intervals(bars, labels, "gain in AP over the control"), caption)] if bars else []
    return Section("Arms against the control", "", sentences, tables, picture, notes=_notes(found))


def _at_equal_time(arm: Arm) -> str:
    if arm.longer is None or arm.gain_over_longer is None:
        return ""
    times = f"{seconds(arm.longer.seconds, arm.group.seconds)} against {seconds(arm.group.seconds, arm.longer.seconds)}"
    had = "which had less time" if arm.favoured else "which had as long or longer"
    return f"; over {arm.longer.name}, {had} ({times}): {arm.gain_over_longer.sentence}"


def _notes(found: Experiment) -> list[str]:
    """How the intervals came about, and what they do not say."""
    seeded = any(arm.gain and len(arm.gain.gains) > 1 for arm in found.arms)
    notes = [
        f"images: paired bootstrap, {found.samples:,} samples of {found.images:,} validation images, every model on the "
        "same draws"
    ]
    if seeded:
        notes.append(
            "interval of several seeds: for other seeds and other images (the analysis of many readers and many cases, "
            "Obuchowski and Rockette 1995, with Hillis' degrees of freedom, 2007)"
        )
    if alone := [arm.name for arm in found.compared if arm.gain and len(arm.gain.gains) == 1]:
        notes.append(f"interval of one seed: for other images only; another seed is not known of ({listed(alone)})")
    notes.append(
        f"each interval is for one comparison: of {counted(20, 'arm')} without any effect, about one is outside its own; "
        "the arm with the largest gain is partly the luckiest"
    )
    if not any(arm.longer for arm in found.arms):
        notes.append(
            "equal iterations are not equal time: a step with help costs more (see the times); no plain training with "
            "more iterations is wired in, so nothing is said of equal time"
        )
    return notes


def _between(found: Experiment) -> Table:
    """Row minus column, marked where the interval excludes 0."""
    names = list(dict.fromkeys(name for pair in found.between for name in pair))

    def cell(row: str, column: str) -> str:
        gain = found.between.get((row, column))
        if gain is None:
            return MISSING
        return signed_ap(gain.mean) + (" *" if gain.low > 0 or gain.high < 0 else "")

    lines = [(row, *(cell(row, column) for column in names)) for row in names]
    title = "arm of the row minus arm of the column, AP; * where the 95 % interval excludes 0"
    return Table(("", *names), lines, title=title)


def where_it_pays(found: Experiment) -> Section | None:
    """AP of controls and arms over the labelled images and over the iterations; None where neither varies."""
    compared = [arm for arm in found.compared if arm.control]
    by_images = _curves(compared, "images", "iterations")
    by_steps = _curves(compared, "iterations", "images")
    shown = [
        Plot(plots.curves(panels, label), f"AP over {label}; a dot a seed, the line through their means")
        for panels, label in ((by_images, "labelled images"), (by_steps, "iterations"))
        if panels
    ]
    if not shown:
        return None
    where = [
        f"{arm.name} ({arm.group.one.images:,} labelled images, {arm.group.one.iterations:,} iterations): "
        f"{arm.gain.sentence}"
        for arm in sorted(compared, key=lambda arm: (arm.group.one.images, arm.group.one.iterations))
        if arm.gain
    ]
    return Section("Where distillation pays", sentences=where, plots=shown)


def _curves(compared: Sequence[Arm], over: str, fixed: str) -> dict[str, dict[str, plots.Points]]:
    """Panels by the value of `fixed`, in each a line a stage: the APs of every seed at each value of `over`.

    Panels in which `over` does not vary are left out.
    """
    unit = {"images": "labelled images", "iterations": "iterations"}[fixed]
    panels: dict[int, dict[str, dict[float, list[float]]]] = {}
    for arm in compared:
        assert arm.control is not None
        for group in (arm.control, arm.group):
            line = panels.setdefault(getattr(group.one, fixed), {}).setdefault(group_of(group.name, LENGTHS), {})
            line[getattr(group.one, over)] = [run.row.statistics["ap"] or 0.0 for run in group.runs.values()]
    return {
        f"{value:,} {unit}": {name: dict(sorted(points.items())) for name, points in lines.items()}
        for value, lines in sorted(panels.items())
        if _varies(lines)
    }


def _varies(lines: Mapping[str, Mapping[float, Sequence[float]]]) -> bool:
    return any(len(points) > 1 for points in lines.values())
