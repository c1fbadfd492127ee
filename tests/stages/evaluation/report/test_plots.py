"""Pictures show all that they are given."""

import numpy as np
import pytest

from stages.evaluation.report import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, in place of their SVG."""
    figures = []
    monkeypatch.setattr(plots, "_svg", lambda figure: figures.append(figure) or "")
    return figures


def test_curves_of_all_panels_lie_within_the_axis_they_share(drawn):
    low, high = {100: [0.08], 3000: [0.1]}, {100: [0.2], 3000: [0.7, 0.9]}
    plots.curves({"200 iterations": {"control": low}, "950 iterations": {"control": low, "helped": high}}, "images")
    (figure,) = drawn
    for panel in figure.axes:
        least, most = panel.get_ylim()
        shown = np.concatenate([line.get_ydata() for line in panel.lines])
        assert least == 0
        assert shown.max() < most
    assert most > 90
