"""Plots as SVG, to be set into a page: fonts, colours and widths are the page's."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from stages.evaluation.report.estimate import Estimate
from stages.evaluation.report.evidence import Evidence, stage_of

COLOURS = ("#2563eb", "#d97706", "#0f766e", "#9333ea", "#92400e", "#4b5563", "#65a30d", "#0891b2", "#be185d", "#dc2626")
_MEASURED = "DejaVu Sans"  # comes with matplotlib, and is wider than what the page then shows: nothing overlaps
_STYLE: Any = {  # matplotlib types the keys one by one
    "svg.fonttype": "none",  # letters stay letters: searchable and small
    "svg.hashsalt": "headstart",  # the same numbers give the same file
    "font.family": _MEASURED,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#374151",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
}
_TIMES = [digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 3, 5, 7)]  # ticks, in milliseconds
_POINTS = 150  # of one line: more cannot be seen at this size
Series = tuple[Sequence[float], Sequence[float]]  # x, y
Points = Mapping[float, Sequence[float]]  # x, and every y that was measured there


def stage_colours(evidence: Evidence) -> dict[str, str]:
    """A stage has one colour in every plot."""
    roles = evidence.roles
    known = [
        roles.student,
        roles.control,
        evidence.exported[0].name if evidence.exported else "",
        "",
        roles.equal_time_control,
        roles.teacher,
    ]
    colours = {stage_of(name): colour for name, colour in zip(known, COLOURS, strict=False) if name}
    names = [row.name for row in evidence.rows] + [checkpoint.name for checkpoint in evidence.checkpoints]
    stages = [stage_of(name) for name in names]
    free = [colour for colour in COLOURS if colour not in colours.values()]
    others = [stage for stage in dict.fromkeys(stages) if stage not in colours]
    return colours | {stage: free[index % len(free)] for index, stage in enumerate(others)}


def read_metrics(file: Path) -> dict[str, Series]:
    """Each quantity of a metrics.jsonl over the step."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return dict(found)


def losses(trainings: Mapping[str, Mapping[str, Series]]) -> str:
    """One panel a training, one line a loss, on a logarithmic axis: imitation losses differ by orders of magnitude."""
    names = [name for series in trainings.values() for name in series if is_loss(name)]
    colours = dict(zip(dict.fromkeys(names), COLOURS * (len(names) // len(COLOURS) + 1), strict=False))
    columns = 2 if len(trainings) == 4 else min(3, len(trainings))
    rows = -(-len(trainings) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.6 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, (title, series) in zip(panels, trainings.items(), strict=False):
            panel.set_title(title)
            panel.set_yscale("log")
            for name, (steps, values) in series.items():
                if is_loss(name):
                    panel.plot(*_thinned(steps, values), color=colours[name], label=name.removeprefix("student/"))
            shown = [value for name, (_, values) in series.items() if is_loss(name) for value in values if value > 0]
            if shown:  # a weight that warms up from 0 must not stretch the axis to nothing
                bottom, across = max(min(shown), max(shown) / 3e3), min(len(panel.lines), 4 if columns < 3 else 2)
                room = (max(shown) / bottom) ** (
                    0.12 * -(-len(panel.lines) // across)
                )  # above the lines, for the legend
                panel.set_ylim(bottom, 1.3 * max(shown) * room)
                panel.legend(ncols=across, loc="upper right", handlelength=1.2, columnspacing=1.2)
            panel.set_xlabel("step")
            panel.set_xlim(left=0)
        for empty in panels[len(trainings) :]:
            empty.set_visible(False)
        return _svg(figure)


def while_training(ap: Mapping[str, Series], rate: Mapping[str, Series], colours: Mapping[str, str]) -> str:
    """Validation AP, and the learning rate, over the step of every training; nodes of a stage share its colour."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for panel, title, lines, scale in (
            (left, "AP on validation images while training", ap, 100),
            (right, "Learning rate", rate, 1),
        ):
            panel.set_title(title)
            panel.set_xlabel("step")
            for name, (steps, values) in lines.items():
                x, y = _thinned(steps, values)
                stage, marker = stage_of(name), "o" if len(x) < 20 else ""
                label = None if stage in panel.get_legend_handles_labels()[1] else stage
                panel.plot(x, scale * y, color=colours[stage], label=label, marker=marker, markersize=3.5)
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
            if lines:
                panel.legend(loc="best", handlelength=1.2)
        return _svg(figure)


def dots(values: Mapping[str, Sequence[float]], colours: Mapping[str, str], label: str) -> str:
    """One row a name, one dot a value."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.55 + 0.32 * len(values)), layout="constrained")
        panel = figure.subplots()
        for height, (name, numbers) in enumerate(values.items()):
            panel.scatter(numbers, [height] * len(numbers), s=46, color=colours[name], alpha=0.85, zorder=3)
            panel.annotate(
                f"{np.mean(numbers):.1f}", (max(numbers), height), (8, 0), textcoords="offset points", va="center"
            )
        _named_rows(panel, list(values))
        panel.set_xlim(0, 1.08 * max(max(numbers) for numbers in values.values()) or 1)
        panel.set_xlabel(label)
        return _svg(figure)


def intervals(gains: Mapping[str, Sequence[Estimate]], labels: Sequence[str], label: str) -> str:
    """One row a name, one bar an estimate, its seeds as small dots; the line at 0 is no gain. AP times 100."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.95 + 0.42 * len(gains)), layout="constrained")
        panel = figure.subplots()
        panel.axvline(0, color="#111827", linewidth=0.9)
        for row, estimates in enumerate(gains.values()):
            for number, (one, colour) in enumerate(zip(estimates, COLOURS, strict=False)):
                y = row + 0.26 * (number - (len(estimates) - 1) / 2)
                name = labels[number] if labels[number] not in panel.get_legend_handles_labels()[1] else None
                reach = [[100 * (one.mean - one.low)], [100 * (one.high - one.mean)]]
                panel.errorbar(
                    100 * one.mean, y, xerr=reach, fmt="o", markersize=6, capsize=3, color=colour, label=name, zorder=3
                )
                if len(one.gains) > 1:
                    panel.scatter(
                        [100 * gain for gain in one.gains], [y] * len(one.gains), s=9, color="#111827", zorder=4
                    )
        _named_rows(panel, list(gains))
        panel.set_xlabel(label)
        figure.legend(loc="outside upper left", ncols=len(labels))
        return _svg(figure)


def curves(panels: Mapping[str, Mapping[str, Points]], label: str) -> str:
    """One panel a title, one line a name through the means at each x, all values as dots; x is logarithmic, y AP x 100."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = dict(zip(names, COLOURS * (len(names) // len(COLOURS) + 1), strict=False))
    columns = min(4, len(panels))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.9 * -(-len(panels) // columns) + 0.3), layout="constrained")
        axes = list(figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey=True).flat)
        for panel, (title, lines) in zip(axes, panels.items(), strict=False):
            panel.set_title(title)
            panel.set_xscale("log")
            for name, points in lines.items():
                means = [100 * float(np.mean(values)) for values in points.values()]
                panel.plot(list(points), means, marker="o", markersize=4, color=colours[name], label=name)
                for x, values in points.items():
                    panel.scatter([x] * len(values), [100 * value for value in values], s=10, color=colours[name])
            ticks = sorted({x for points in lines.values() for x in points})
            panel.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            panel.minorticks_off()
            panel.set_xlabel(label)
        axes[0].set_ylim(bottom=0)  # of all, once all is drawn: a limit that is set no longer grows
        for empty in axes[len(panels) :]:
            empty.set_visible(False)
        axes[0].set_ylabel("AP")
        axes[0].legend(loc="best", handlelength=1.2)
        return _svg(figure)


class Dot(Protocol):
    """A file in `frontier`."""

    @property
    def name(self) -> str: ...
    @property
    def milliseconds(self) -> float: ...
    @property
    def ap(self) -> float: ...
    @property
    def distilled(self) -> bool: ...
    @property
    def network(self) -> str: ...


def frontier(dots: Sequence[Dot], best: Sequence[Dot]) -> str:
    """One dot a file at its milliseconds and AP x 100, filled if distilled; equal networks joined, a line through `best`."""
    networks = list(dict.fromkeys(dot.network for dot in dots))
    colours = dict(zip(networks, COLOURS * (len(networks) // len(COLOURS) + 1), strict=False))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        panel = figure.subplots()
        panel.set_xscale("log")
        line = [(one.milliseconds, 100 * one.ap) for one in best]
        panel.plot(*zip(*line, strict=True), color="#9ca3af", linewidth=0.9, zorder=2)
        for network in networks:
            same = [dot for dot in dots if dot.network == network]
            x, y = ([one.milliseconds for one in same], [100 * one.ap for one in same])
            panel.plot(x, y, color=colours[network], linestyle=":", zorder=2)
            for dot in same:
                place, inside = (dot.milliseconds, 100 * dot.ap), colours[network] if dot.distilled else "#ffffff"
                panel.scatter(*place, s=42, color=inside, edgecolors=colours[network], linewidths=1.4, zorder=3)
                panel.annotate(dot.name, place, (7, 0), textcoords="offset points", va="center", fontsize=7.5)
        most = max(dot.milliseconds for dot in dots)
        ticks = [tick for tick in _TIMES if 0.8 * min(dot.milliseconds for dot in dots) <= tick <= 1.5 * most]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlim(right=1.6 * most)  # room for the last name
        panel.set_ylim(bottom=0)
        panel.set_xlabel("milliseconds an image")
        panel.set_ylabel("AP")
        return _svg(figure)


def stacked(parts: Mapping[str, Mapping[str, float]], label: str) -> str:
    """One bar a name, of its parts in their order."""
    names = list(parts)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.95 + 0.42 * len(names)), layout="constrained")
        panel = figure.subplots()
        start = np.zeros(len(names))
        for colour, part in zip(COLOURS, dict.fromkeys(part for one in parts.values() for part in one), strict=False):
            widths = np.array([parts[name].get(part, 0.0) for name in names])
            panel.barh(range(len(names)), widths, left=start, height=0.55, color=colour, label=part)
            start += widths
        _named_rows(panel, names)
        panel.set_xlabel(label)
        figure.legend(loc="outside upper left", ncols=6, handlelength=1, handleheight=1)
        return _svg(figure)


def over_time(calls: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One row a name: how many calls took how long in each part of the run, and over all of it, on one axis.

    `calls` are `at_s` and `end_to_end_ms` of every call. The slowest hundredth shares the topmost bin.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.5 * len(calls)), layout="constrained")
        axes = figure.subplots(len(calls), 2, squeeze=False, sharey="row", width_ratios=(4, 1))
        for (name, found), (panel, beside) in zip(calls.items(), axes, strict=True):
            seconds, times = np.asarray(found["at_s"]), np.asarray(found["end_to_end_ms"])
            least, most = float(times.min()), float(np.percentile(times, 99))
            edges = np.linspace(0.98 * least, 1.02 * max(most, 1.01 * least), 31)
            windows = np.linspace(0, max(float(seconds[-1]), 1e-3), min(60, 1 + len(times) // 10) + 1)
            shown = np.minimum(times, edges[-1])
            counts, _, _ = np.histogram2d(seconds, shown, (windows, edges))
            columns, rows = np.nonzero(counts)
            left, right, low, high = windows[columns], windows[columns + 1], edges[rows], edges[rows + 1]
            corners = np.stack([left, low, right, low, right, high, left, high], 1).reshape(-1, 4, 2)
            # Its stub takes sequences of (n, 2) arrays; one (N, 4, 2) array is such a sequence.
            cells = PolyCollection(corners, array=counts[columns, rows], cmap="Blues", linewidths=0)  # type: ignore[arg-type]
            cells.set_clim(-0.3 * counts.max(), counts.max())  # a single call is seen too
            panel.add_collection(cells)
            panel.set_xlim(0, windows[-1])
            panel.set_ylim(edges[0], edges[-1])
            panel.set_title(name)
            panel.set_xlabel("seconds from the first call")
            panel.set_ylabel("ms")
            beside.hist(shown, edges, orientation="horizontal", color=COLOURS[0])
            for percent, style in ((50, "-"), (90, "--")):
                beside.axhline(float(np.percentile(times, percent)), color="#111827", linewidth=0.9, linestyle=style)
            beside.set_xlabel("calls; p50, p90 dashed")
        return _svg(figure)


def _named_rows(panel: Axes, names: list[str]) -> None:
    panel.set_yticks(range(len(names)), names, color="#111827")
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")


def is_loss(name: str) -> bool:
    """Whether a quantity of metrics.jsonl is a loss, and not the rate, an AP or a norm of a gradient."""
    return name != "lr" and not name.startswith(("val/", "gradient/"))


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[Any, Any]:
    """At most `_POINTS` points, each the mean of its neighbours."""
    groups = min(len(steps), _POINTS)
    x, y = ([part.mean() for part in np.array_split(np.asarray(one, float), groups)] for one in (steps, values))
    return np.array(x), np.array(y)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(f"'{_MEASURED}'", "system-ui, Helvetica, Arial, sans-serif")
    # The page gives the width; the box gives the proportions.
    head, rest = text.split(">", 1)
    return re.sub(r'\s(width|height)="[^"]*"', "", head) + ">" + rest
