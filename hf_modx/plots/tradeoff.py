"""What is learned against what is kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from .style import NORMAL, PLAIN_TEXT, add_legend, line_styles, new_figure, plain_axes, save_figure


def draw_tradeoff(points: Mapping[str, Sequence[tuple[float, float]]], path: Path, metric: str) -> None:
    """A small mark a seed and a large one for the mean of each recipe: up is more kept, right is more learned.

    Args:
        points: by recipe, (plasticity, stability) of each seed as fractions: the mean of the tests right after the
            phase that teaches each, and the mean of the old tests at the end.
        path: of the PNG; its folder is made if need be.
        metric: its name, as in "Image-to-text recall@1".

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(4.8, 4.4)
    axes = figure.subplots()
    plain_axes(axes)
    handles = {}
    for recipe, look in line_styles(list(points)).items():
        mark = {"color": look["color"], "marker": look["marker"], "linestyle": "none"}
        learned, kept = ([100 * value for value in values] for values in zip(*points[recipe], strict=True))
        if len(learned) > 1:
            axes.plot(learned, kept, markersize=4, alpha=0.55, **mark)
        filled = {} if look["linestyle"] == "-" else {"markerfacecolor": "white", "markeredgewidth": 1.8}
        (handles[recipe],) = axes.plot(mean(learned), mean(kept), markersize=10, **{**mark, **filled})
    axes.margins(0.15)
    axes.set_xlabel("plasticity: tests right after their phase, %", fontsize=NORMAL)
    axes.set_ylabel("stability: old tests at the end, %", fontsize=NORMAL)
    axes.set_title(metric, fontsize=NORMAL, **PLAIN_TEXT)
    add_legend(figure, handles)
    save_figure(figure, path)
