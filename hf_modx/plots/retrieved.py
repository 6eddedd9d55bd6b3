"""Images with the captions that were found for them before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from .style import NORMAL, PLAIN_TEXT, SMALL, lines_of, new_figure, save_figure

COLUMNS = 4
LOST, GAINED = "#A34700", "#0072B2"
"""Dark enough to be read as small letters on white."""


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
    for axes, one in zip(cells, found, strict=False):
        axes.imshow(one.image.convert("RGB"), interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(lines_of(one.caption, 24, 3), fontsize=NORMAL, **PLAIN_TEXT)
        text = f"lost, now: {one.after}" if one.is_lost else f"gained, was: {one.before}"
        colour = LOST if one.is_lost else GAINED
        axes.set_xlabel(
            f"{lines_of(text, 26, 3)}\n({lines_of(one.test, 24, 1)})", fontsize=SMALL, color=colour, **PLAIN_TEXT
        )
    for unused in cells[len(found) :]:
        figure.delaxes(unused)
    save_figure(figure, path)
