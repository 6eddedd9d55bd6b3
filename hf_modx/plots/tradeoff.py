"""What is learned against what is kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .style import NORMAL, PLAIN_TEXT, add_legend, line_styles, new_panels, plain_axes, save_figure

Points = Mapping[str, Sequence[tuple[float, float]]]
"""By recipe, (plasticity, stability) of each seed as fractions: the mean of the tests right after the phase that
teaches each, and the mean of the old tests at the end."""


def draw_tradeoff(points: Points, path: Path, metric: str) -> None:
    """A small mark a seed and a large one for the mean of each recipe: up is more kept, right is more learned.

    Args:
        points: of the recipes.
        path: of the PNG; its folder is made if need be.
        metric: its name, as in "Image-to-text recall@1".

    Raises:
        ImportError: matplotlib is not installed.
    """
    draw_tradeoffs({metric: points}, path)


def draw_tradeoffs(panels: Mapping[str, Points], path: Path, fronts: Sequence[Sequence[str]] = ()) -> None:
    """The same for several streams side by side, each with axes of its own.

    Args:
        panels: by title.
        path: of the PNG; its folder is made if need be.
        fronts: recipes that are one with several values of an option: a thin line joins them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    looks = line_styles(list(dict.fromkeys(recipe for points in panels.values() for recipe in points)))
    figure, all_axes = new_panels(len(panels), 4.3, 3.8, columns=3)
    handles: dict[str, Any] = {}
    for (title, points), axes in zip(panels.items(), all_axes, strict=True):
        plain_axes(axes, title)
        middles = {recipe: _draw_recipe(axes, seeds, looks[recipe]) for recipe, seeds in points.items()}
        handles |= {recipe: line for recipe, (line, _) in middles.items()}
        for front in fronts:
            if joined := sorted(middles[recipe][1] for recipe in front if recipe in middles):
                axes.plot(*zip(*joined, strict=True), color="dimgrey", linewidth=0.8, zorder=1)
        axes.margins(0.15)
        axes.set_xlabel("plasticity: tests right after their phase, %", fontsize=NORMAL)
    all_axes[0].set_ylabel("stability: old tests at the end, %", fontsize=NORMAL, **PLAIN_TEXT)
    add_legend(figure, {recipe: handles[recipe] for recipe in looks})
    save_figure(figure, path)


def _draw_recipe(axes, seeds: Sequence[tuple[float, float]], look: Mapping) -> tuple[Any, tuple[float, float]]:
    """The large mark and where it stands."""
    mark = {"color": look["color"], "marker": look["marker"], "linestyle": "none"}
    learned, kept = ([100 * value for value in values] for values in zip(*seeds, strict=True))
    if len(learned) > 1:
        axes.plot(learned, kept, markersize=4, alpha=0.55, **mark)
    filled = {} if look["linestyle"] == "-" else {"markerfacecolor": "white", "markeredgewidth": 1.8}
    (line,) = axes.plot(mean(learned), mean(kept), markersize=10, **{**mark, **filled})
    return line, (mean(learned), mean(kept))
