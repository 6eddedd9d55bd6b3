"""Images with the captions that were found for them before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from .style import NORMAL, PLAIN_TEXT, SMALL, lines_of, new_figure, save_figure

COLUMNS = 4
LOST, GAINED = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class Retrieved:
    """An image of a test whose first caption is right before or after, and not both.

    Attributes:
        test: name of the test.
        image: small enough to be shown.
        caption: its own.
        before, after: the caption that was found first, by an earlier and by a later model.
        is_lost: right before and wrong after; else the other way round.
    """

    test: str
    image: Image
    caption: str
    before: str
    after: str
    is_lost: bool


def draw_retrieved(found: Sequence[Retrieved], path: Path) -> None:
    """Each image with its caption and the wrong one: what it reads now where it was lost, what it read before where it
    was gained.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = min(COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(2.4 * columns, 2.9 * rows)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, one in zip(cells, found, strict=False):
        axes.imshow(one.image.convert("RGB"), interpolation="nearest")
        axes.set_title(lines_of(one.caption, 28), fontsize=NORMAL, **PLAIN_TEXT)
        wrong = f"✗ now: {one.after}" if one.is_lost else f"✓ learned, was: {one.before}"
        colour = LOST if one.is_lost else GAINED
        place = {"x": 0.5, "y": -0.04, "transform": axes.transAxes, "ha": "center", "va": "top"}
        axes.text(
            s=f"{lines_of(wrong, 32)}\n[{lines_of(one.test, 30)}]", fontsize=SMALL, color=colour, **place, **PLAIN_TEXT
        )
    save_figure(figure, path)
