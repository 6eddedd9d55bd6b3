"""Forgetting curves: every test after every phase, the recipes side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from ..evaluation import EvaluationMatrix
from .style import NORMAL, PLAIN_TEXT, add_legend, line_styles, name_ticks, new_panels, plain_axes, save_figure


def draw_curves(runs: Mapping[str, Sequence[EvaluationMatrix]], path: Path, label: str) -> None:
    """One panel a measured test: its value in percent after every phase, a line a recipe through the mean over
    its seeds, the range over them shaded. A dotted line stands at the phase that teaches the test.

    Args:
        runs: by recipe, the matrix of each seed; all of the same phases and tests.
        path: of the PNG; its folder is made if need be.
        label: of the y-axis, as in "Image-to-text recall@1, %".

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was measured.
    """
    first = next(iter(runs.values()))[0]
    names = (["start"] if first.has_initial_row else []) + first.phases
    looks = line_styles(list(runs))
    width = min(max(2.7, 0.4 * len(names) + 1), 7)
    measured = [m.values for matrices in runs.values() for m in matrices]
    tests = [
        test for test in range(len(first.tests)) if not all(np.isnan(values[:, test]).all() for values in measured)
    ]
    if not tests:
        raise ValueError("Nothing was measured: there is nothing to draw.")
    figure, panels = new_panels(len(tests), width, 2.5, columns=max(1, int(12 / width)), sharey=True)
    handles = {}
    for test, axes in zip(tests, panels, strict=True):
        plain_axes(axes, first.tests[test])
        for recipe, matrices in runs.items():
            handles[recipe] = _draw_recipe(axes, matrices, test, looks[recipe])
        learned_at = first.learned_at[test]
        place = learned_at - (not first.has_initial_row) if isinstance(learned_at, int) else None
        if place is not None and place >= 0:
            axes.axvline(place, color="dimgrey", linewidth=1, linestyle=":", zorder=1)
        axes.set_xlim(-0.3, len(names) - 0.7)
    name_ticks(figure, panels, range(len(names)), names)
    figure.supylabel(label, fontsize=NORMAL, **PLAIN_TEXT)
    figure.supxlabel("after phase (dotted: the phase that teaches the test)", fontsize=NORMAL)
    add_legend(figure, handles)
    save_figure(figure, path)


def _draw_recipe(axes, matrices: Sequence[EvaluationMatrix], test: int, look: Mapping):
    """What is not measured in some seed leaves a gap."""
    rows = [[100 * value for value in values] for values in zip(*(m.values[:, test] for m in matrices), strict=True)]
    places = range(len(rows))
    (line,) = axes.plot(places, [mean(row) for row in rows], markersize=5, linewidth=1.8, **look)
    if len(matrices) > 1:
        low, high = (
            [extreme(row) if not any(map(math.isnan, row)) else math.nan for row in rows] for extreme in (min, max)
        )
        axes.fill_between(places, low, high, color=look["color"], alpha=0.18, linewidth=0)
    return line
