"""A heat map of the phase x test matrix."""

import math
from pathlib import Path

from ..evaluation import EvaluationMatrix
from .style import LARGE, NORMAL, PLAIN_TEXT, lines_of, new_figure, save_figure

CELL = (0.72, 0.42)
"""Width and height of a cell in inches."""

MOST = 24
"""Phases and tests whose cells have that size and a number each. Where one is more than that, the picture grows no
more in its direction, names stand at some of them and no cell has a number: the 10,000 numbers of 100 phases, written
after each of them, would take longer than many a phase."""

COLOURS = "cividis"
"""One ramp from dark to bright, which reads the same with every kind of colour vision and in grey."""

DARK = 0.47
"""Below this part of the ramp white reads better on it than black (WCAG contrast)."""


def draw_matrix(matrix: EvaluationMatrix, path: Path, title: str, brightest: float | None = None) -> None:
    """A heat map of the matrix with its numbers in percent, as PNG; the cell of the phase that teaches a test is
    framed and bold, one that is not measured is grey.

    Cells have one size, as far as there are not too many (`MOST`), and the picture grows around them, so that no name
    is clipped; a name of more than two lines ends in an ellipsis.

    Args:
        matrix: with at least one phase or the initial row, and at least one test.
        path: of the file, in a folder that is made if need be; a reader sees the old or the new one, never a part.
        title: stands above.
        brightest: the value at the bright end of the ramp, to compare pictures; default: the largest of the matrix.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = (["start"] if matrix.has_initial_row else []) + matrix.phases
    figure = new_figure(CELL[0] * min(len(matrix.tests), MOST), CELL[1] * min(len(rows), MOST))
    figure.set_layout_engine("none")  # cells of one size, whatever stands around them
    axes = figure.add_axes((0, 0, 1, 1), facecolor="lightgrey")
    brightest = brightest or largest_value(matrix)
    axes.imshow(matrix.values, cmap=COLOURS, vmin=0, vmax=brightest, aspect="auto", interpolation="nearest")
    if max(len(rows), len(matrix.tests)) <= MOST:
        for row in range(len(rows)):
            for test in range(len(matrix.tests)):
                _write_cell(axes, matrix, row, test, brightest)
    _name_axes(axes, rows, matrix.tests)
    axes.set_title(lines_of(title, 60), fontsize=LARGE, pad=10, color="black", **PLAIN_TEXT)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors="black")
    save_figure(figure, path)


def largest_value(*matrices: EvaluationMatrix) -> float:
    """Of all their cells; 1 where nothing was measured or all is 0."""
    values = [value for matrix in matrices for value in matrix.values.ravel() if not math.isnan(value)]
    return max(values, default=0) or 1


def _write_cell(axes, matrix: EvaluationMatrix, row: int, test: int, brightest: float) -> None:
    value = matrix.values[row, test]
    colour = "white" if value < DARK * brightest else "black"
    phase = row if matrix.has_initial_row else row + 1
    learned_here = matrix.learned_at[test] == phase
    text = "-" if math.isnan(value) else f"{100 * value:.1f}"
    weight = "bold" if learned_here else "normal"
    axes.text(
        test, row, text, color=colour, fontsize=NORMAL, fontweight=weight, ha="center", va="center", **PLAIN_TEXT
    )
    if learned_here:
        from matplotlib.patches import Rectangle

        frame = Rectangle((test - 0.45, row - 0.42), 0.9, 0.84, fill=False, edgecolor=colour, linewidth=1.6)
        axes.add_patch(frame)


def _name_axes(axes, rows: list[str], tests: list[str]) -> None:
    named_tests, named_rows = (range(0, len(names), -(-len(names) // MOST)) for names in (tests, rows))
    columns = [lines_of(tests[place], 22) for place in named_tests]
    slanted = any(len(line) > 9 for name in columns for line in name.splitlines())
    turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(named_tests, columns, fontsize=NORMAL, **turned, **PLAIN_TEXT)
    axes.set_yticks(named_rows, [lines_of(rows[place], 30) for place in named_rows], fontsize=NORMAL, **PLAIN_TEXT)
    axes.set_xlabel("test", fontsize=NORMAL, color="black")
    axes.set_ylabel("after phase", fontsize=NORMAL, color="black")
