"""The one look of all pictures: white ground, few lines, colours that differ for every kind of colour vision."""

import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's colours without the yellow, which is too faint on white ("Color Universal Design", 2008)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""As many as colours: what colour tells, shape tells too."""

PLAIN_TEXT = {"parse_math": False, "usetex": False}
"""A dollar sign in a name is a dollar sign."""

SMALL, NORMAL, LARGE = 9, 10, 11
"""Sizes of letters in points."""

LETTER, LINE = 0.085, 0.2
"""Width of a letter and height of a line of the legend in inches, generously."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches that keeps its parts from each other.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: that keeps figures and settings of the whole process
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf_modx[plots]'") from error
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def new_panels(number: int, width: float, height: float, columns: int = 4, **shared: Any) -> tuple[Any, list]:
    """A figure of panels of so many inches, in rows of at most so many columns, as even as can be, and their axes."""
    rows = -(-number // columns)
    columns = -(-number // rows)
    figure = new_figure(width * columns + 0.5, height * rows + 0.8)
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False, **shared) for axis in row]
    for unused in axes[number:]:
        figure.delaxes(unused)
    return figure, axes[:number]


def plain_axes(axes: Any, title: str = "") -> None:
    """Two spines, a faint grid and a title that breaks before it is clipped."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, colors="black")
    if title:
        axes.set_title(lines_of(title, 24), fontsize=NORMAL, color="black", **PLAIN_TEXT)


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and stroke of each name; the strokes differ where the colours begin again."""
    looks = zip(cycle(PALETTE), cycle(MARKERS), strict=False)
    strokes = ("-", "--", ":", "-.")
    return {
        name: {"color": colour, "marker": marker, "linestyle": strokes[number // len(PALETTE) % len(strokes)]}
        for number, (name, (colour, marker)) in enumerate(zip(names, islice(looks, len(names)), strict=True))
    }


def add_legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """One legend for all panels, above them, in as many columns as fit; the figure grows by its height."""
    labels = [lines_of(name, 40) for name in handles]
    widest = max((len(line) for label in labels for line in label.splitlines()), default=1)
    columns = max(1, min(len(labels), int(figure.get_figwidth() / (LETTER * widest + 0.7))))
    lines = max((len(label.splitlines()) for label in labels), default=1)
    grow(figure, LINE * lines * -(-len(labels) // columns))
    legend = figure.legend(
        list(handles.values()), labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=NORMAL
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def name_ticks(figure: Any, panels: Sequence[Any], places: Sequence[float], names: Sequence[str]) -> None:
    """Names along the x-axis of all panels, slanted where they would touch; the figure grows by their height."""
    labels = [lines_of(name, 16) for name in names]
    longest = LETTER * max((len(line) for label in labels for line in label.splitlines()), default=0)
    rows, columns = panels[0].get_subplotspec().get_gridspec().get_geometry()
    slanted = longest > figure.get_figwidth() / columns / (len(names) + 1)
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    for axes in panels:
        axes.set_xticks(list(places), labels, fontsize=SMALL, **turned, **PLAIN_TEXT)
    grow(figure, rows * 0.7 * longest if slanted else 0)


def grow(figure: Any, inches: float) -> None:
    """Make the figure taller, so that what comes on top does not take from the panels."""
    figure.set_figheight(figure.get_figheight() + inches)


def lines_of(name: str, width: int, lines: int = 2) -> str:
    """At most so many lines of printable characters; what is longer ends in an ellipsis."""
    printable = "".join(character if character.isprintable() else " " for character in str(name))
    return "\n".join(textwrap.wrap(printable, width, max_lines=lines, placeholder=" …"))


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG around all that is drawn, so that nothing is clipped. A reader of the file sees the old or the new
    one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks shows as boxes
        figure.savefig(
            temporary, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
        )
    os.replace(temporary, path)
