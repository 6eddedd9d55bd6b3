"""Pictures: everything that is drawn is inside, nothing is clipped, whatever the names."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hf_modx.evaluation import EvaluationMatrix
from hf_modx.plots import (
    Retrieved,
    draw_curves,
    draw_disorder,
    draw_matrix,
    draw_retrieved,
    draw_tradeoff,
    draw_tradeoffs,
    draw_training,
)
from hf_modx.plots.style import PALETTE, line_styles

# A layout that does not fit is a warning of matplotlib; a script that the font lacks is no fault of ours.
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "ignore:Glyph .* missing")

PLAIN = ["first", "second", "third"]
NAMES = [
    *("a|b\nc `d`", "<script>alert(1)</script>", "$\\frac$ *b* _c_", "名前 👩‍🚀", "long name " * 20),
    *(f"number {k}: {'Very Wide Words ' * 6}" for k in range(3)),
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, and a record of every text that was drawn on one."""
    figures = []
    save, draw = Figure.savefig, Text.draw

    def spy_on_save(figure, *args, **options):
        save(figure, *args, **options)
        figure.drawn_texts = set()
        figure.draw_without_rendering()
        figures.append(figure)

    def spy_on_draw(text, *args, **options):
        vars(text.get_figure(root=True)).setdefault("drawn_texts", set()).add(text)
        draw(text, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy_on_save)
    monkeypatch.setattr(Text, "draw", spy_on_draw)
    return figures


def matrix(names, shift=0.0, learned_at=None):
    values = [[(row + column) % 7 / 10 + shift for column in range(len(names))] for row in range(len(names) + 1)]
    return EvaluationMatrix(names, names, values, learned_at)


def assert_nothing_is_clipped(figure, path):
    """Every text's extent lies inside the figure, no panel has collapsed, and the margin of the file is white."""
    for text in figure.drawn_texts:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert inside or not text.get_text().strip(), (text.get_text(), box, figure.bbox)
    for axes in figure.axes:
        assert min(axes.get_window_extent().size) > 60
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    margin = np.ones(pixels.shape[:2], dtype=bool)
    margin[8:-8, 8:-8] = False
    assert (pixels[margin] == 255).all()


def test_matrix_of_100_phases_is_no_larger_than_one_of_24(drawn, tmp_path):
    """It is drawn after every phase, and the text is what takes the time."""
    many = matrix([f"phase {number}" for number in range(100)])
    draw_matrix(many, tmp_path / "m.png", "recall")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().shape == (101, 100)
    assert (len(axes.get_xticks()), len(axes.get_yticks()), len(axes.texts)) == (20, 21, 0)
    with Image.open(tmp_path / "m.png") as picture:
        assert max(picture.size) < 2600


def test_curves_are_whole(drawn, tmp_path):
    runs = {name: [matrix(NAMES), matrix(NAMES, 0.02)] for name in NAMES}
    draw_curves(runs, tmp_path / "curves.png", "Image-to-text recall@1, %")
    assert_nothing_is_clipped(drawn[0], tmp_path / "curves.png")


def test_tradeoff_is_whole(drawn, tmp_path):
    draw_tradeoff({name: [(0.1, 0.2), (0.3, 0.25)] for name in NAMES}, tmp_path / "t.png", "recall")
    assert_nothing_is_clipped(drawn[0], tmp_path / "t.png")


def test_tradeoffs_of_several_streams_are_whole_and_join_their_fronts(drawn, tmp_path):
    panels = {name: {recipe: [(0.1 * k, 0.2)] for k, recipe in enumerate(NAMES)} for name in NAMES[:4]}
    draw_tradeoffs(panels, tmp_path / "t.png", [NAMES[:3], ["not there"]])
    assert_nothing_is_clipped(drawn[0], tmp_path / "t.png")
    lines = [line.get_xdata() for line in drawn[0].axes[0].lines if len(line.get_xdata()) > 1]
    assert [list(line) for line in lines] == [pytest.approx([0, 10, 20])]


def test_training_is_whole(drawn, tmp_path):
    log = {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "a_term_of_the_loss": [1.0, None, 0.5]}
    draw_training(
        {n: [[log] * len(NAMES)] * 2 for n in NAMES}, {n: [3] * len(NAMES) for n in NAMES}, NAMES, tmp_path / "t.png"
    )
    assert_nothing_is_clipped(drawn[0], tmp_path / "t.png")


def test_disorder_is_whole(drawn, tmp_path):
    share = {"[0, 5]": 0.4, "(5, 10]": 0.3, "(10, 15]": 0.2, "(15, 20]": 0.06, "(20, 180]": 0.04}
    draw_disorder(dict.fromkeys(NAMES, share), tmp_path / "d.png", "$ABS$ " * 30)
    assert_nothing_is_clipped(drawn[0], tmp_path / "d.png")
    heights = [bar.get_height() for bar in drawn[0].axes[0].containers[0]]
    assert heights == pytest.approx([40, 30, 20, 6, 4])


def test_retrieved_is_whole(drawn, tmp_path):
    image = Image.new("RGB", (40, 90), "red")
    found = [Retrieved(name, image, name, name, name, is_lost=k % 2 == 0) for k, name in enumerate(NAMES)]
    draw_retrieved(found, tmp_path / "r.png")
    assert_nothing_is_clipped(drawn[0], tmp_path / "r.png")
    said = [axes.get_xlabel().split(",")[0] for axes in drawn[0].axes]
    assert said == ["lost" if one.is_lost else "gained" for one in found]


def test_curves_show_mean_and_range_and_leave_gaps_where_nothing_was_measured(drawn, tmp_path):
    low, high = matrix(PLAIN), matrix(PLAIN, 0.1)
    high.values[1, 0] = math.nan
    draw_curves({"modx": [low, high]}, tmp_path / "c.png", "recall")
    axes = drawn[0].axes[0]
    line = next(line for line in axes.lines if len(line.get_xdata()) == 4)
    mean = 100 * (low.values[:, 0] + high.values[:, 0]) / 2
    assert line.get_ydata() == pytest.approx(mean, nan_ok=True) and math.isnan(line.get_ydata()[1])
    shaded = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    assert shaded[:, 1].min() == pytest.approx(100 * low.values[0, 0])
    assert shaded[:, 1].max() == pytest.approx(100 * high.values[3, 0])


def test_dotted_line_stands_where_a_test_is_taught_and_nowhere_for_one_that_is_not(drawn, tmp_path):
    draw_curves({"modx": [matrix(PLAIN, learned_at=[2, 0, None])]}, tmp_path / "c.png", "recall")
    dotted = [[line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] for axes in drawn[0].axes]
    assert dotted == [[2], [0], []]


def test_tests_that_were_not_measured_have_no_panel(drawn, tmp_path):
    values = matrix(PLAIN)
    values.values[:, 1] = math.nan
    draw_curves({"modx": [values]}, tmp_path / "c.png", "recall")
    assert [axes.get_title() for axes in drawn[0].axes] == ["first", "third"]
    values.values[:] = math.nan
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_curves({"modx": [values]}, tmp_path / "c.png", "recall")


def test_phases_are_side_by_side_whatever_their_steps(drawn, tmp_path):
    logs = {name: [[{"step": [n, 2 * n], "loss": [1, 2]}] * 2] for name, n in (("short", 5), ("long", 50))}
    draw_training(logs, {"short": [10, 10], "long": [100, 100]}, ["a", "b"], tmp_path / "t.png")
    lines = [list(line.get_xdata()) for line in drawn[0].axes[0].lines if line.get_linestyle() == "-"]
    assert lines == [[0.5, 1.0], [1.5, 2.0]] * 2


def test_a_log_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_training({"modx": [[{}]]}, {"modx": [3]}, ["a"], tmp_path / "t.png")


def test_disorder_with_other_bins_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'b' has the bins"):
        draw_disorder({"a": {"[0, 5]": 1.0}, "b": {"[0, 6]": 1.0}}, tmp_path / "d.png", "SAM")


def test_matrices_can_share_their_colours(drawn, tmp_path):
    for number, values in enumerate(([[0.1], [0.2]], [[0.2], [0.4]])):
        draw_matrix(EvaluationMatrix(["a"], ["a"], values), tmp_path / f"{number}.png", "title", brightest=0.4)
    assert {figure.axes[0].images[0].get_clim() for figure in drawn} == {(0, 0.4)}


def test_colours_differ_for_eyes_that_see_no_red_or_no_green():
    # Viénot, Brettel and Mollon, "Digital video colourmaps", Color Research and Application 24 (1999).
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    colours = np.array([to_rgb(colour) for colour in PALETTE]) ** 2.2
    for seen in (np.eye(3), protan, deutan):
        rgb = np.clip(colours @ (np.linalg.inv(to_lms) @ seen @ to_lms).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(rgb[:, None] - rgb, axis=-1) + 9 * np.eye(len(rgb))
        assert apart.min() > 0.1


def test_every_recipe_has_a_look_of_its_own():
    looks = [tuple(look.values()) for look in line_styles([str(number) for number in range(21)]).values()]
    assert len(set(looks)) == 21
