"""Reports: which runs belong together, what the tables say, and a page that is safe whatever the names."""

import json
import re
import statistics
from html.parser import HTMLParser

import pytest
from PIL import Image

from hf_modx import ContinualRun, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.evaluation import EvaluationMatrix
from hf_modx.phases import content_fingerprint
from hf_modx.plots import Retrieved
from hf_modx.report import (
    FlippedTest,
    compare,
    find_tests,
    flipped_tests,
    group_runs,
    lost_classes,
    read_run,
    write_report,
)
from hf_modx.report.tables import mean_matrix, plasticity, spread, stability

from tiny import tiny_clip, tiny_pairs

RECALL = "image_to_text_recall@1"
NASTY = "<script>alert(1)</script> a|b\n[x](http://e.vil) ![i](http://e.vil/i.png) \"'&\u202e"


@pytest.fixture(scope="module")
def finished(processor, tmp_path_factory):
    """The stream and the folder of a run of two phases with a base."""
    data = tiny_pairs(48)
    base, *phases = [
        Phase(name, data.select(range(16 * k, 16 * k + 10)), data.select(range(16 * k + 10, 16 * k + 16)))
        for k, name in enumerate(("base", "first", "second"))
    ]
    stream, folder = PhaseStream(tuple(phases), base=base), tmp_path_factory.mktemp("run")
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    args = ModXTrainingArguments(
        str(folder), imav_samples=8, max_steps=4, learning_rate=3e-3, per_device_train_batch_size=8, seed=0, **quiet
    )
    ContinualRun(stream, "modx", args, model=tiny_clip(processor), processing_class=processor).run()
    return stream, folder


def write_run(finished, folder, recipe, seed, last=0.5, change=lambda identity, results: None, **settings):
    """A run as the finished one, with another recipe, seed and settings, and the same matrix for every metric."""
    record, results = (json.loads((finished / name).read_text()) for name in ("run.json", "results.json"))
    identity = record["identity"]
    identity["recipe"] = results["recipe"] = recipe
    identity["hyperparameters"] |= {"seed": seed, **settings}
    for rows in results["matrix"].values():
        rows[:] = [[0.1, 0.2, 0.3], [0.6, 0.8, 0.2], [last, 0.4, 0.9]]
    change(identity, results)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(results))
    return read_run(folder)


@pytest.fixture
def make_run(finished, tmp_path):
    """`write_run` into a new folder."""
    _, folder = finished
    return lambda recipe, *args, **options: write_run(
        folder, tmp_path / f"{recipe}-{len(list(tmp_path.iterdir()))}", recipe, *args, **options
    )


# ---- Which runs belong together ----


def test_seeds_of_one_recipe_are_one_group_in_their_order(make_run):
    groups = group_runs([make_run("modx", 2), make_run("finetune", 0), make_run("modx", 1)])
    assert {name: [run.seed[0] for run in runs] for name, runs in groups.items()} == {"modx": [1, 2], "finetune": [0]}


def test_recipes_that_differ_in_more_than_the_seed_are_named_by_it(make_run):
    def alpha(value):
        return lambda identity, results: identity["recipe_args"]["ModX"].update(alpha=value)

    runs = [make_run("modx", 0, change=alpha(5.0)), make_run("modx", 0, change=alpha(20.0)), make_run("joint", 0)]
    assert list(group_runs(runs)) == ["modx (alpha 5.0)", "modx (alpha 20.0)", "joint"]


def test_learning_rate_makes_another_group(make_run):
    groups = group_runs([make_run("modx", 0, learning_rate=0.1), make_run("modx", 1, learning_rate=0.2)])
    assert list(groups) == ["modx (learning_rate 0.1)", "modx (learning_rate 0.2)"]


def test_run_that_changed_its_settings_is_no_seed_of_one_that_did_not(make_run):
    def other(identity, results):
        results["changed_settings"] = [{"until_phase": 1, "changes": ["recipe was 'finetune' and is 'modx'"]}]

    groups = group_runs([make_run("modx", 0), make_run("modx", 1, change=other)])
    assert list(groups) == [f"modx (settings changed after phase {phase})" for phase in (None, 1)]


def test_one_seed_twice_is_refused(make_run):
    with pytest.raises(ValueError, match="same seed of modx"):
        group_runs([make_run("modx", 0), make_run("modx", 0)])


def test_other_streams_are_refused(make_run):
    other = make_run("modx", 1, change=lambda identity, results: results.update(phases=["first", "other"]))
    with pytest.raises(ValueError, match=r"cannot be compared: the phases are \['first', 'second'\]"):
        group_runs([make_run("modx", 0), other])


def test_other_tests_of_one_seed_are_refused(make_run):
    def other(identity, results):
        identity["tests"]["first"] = "other rows"

    with pytest.raises(ValueError, match="data of the test 'first' are not the same"):
        group_runs([make_run("finetune", 0), make_run("modx", 0, change=other)])
    assert group_runs([make_run("finetune", 0), make_run("modx", 1, change=other)])


def test_folders_that_hold_no_run_are_named(tmp_path, make_run):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run"):
        read_run(tmp_path)
    folder = make_run("modx", 0).folder
    (folder / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say recipe"):
        read_run(folder)
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="has no results yet"):
        read_run(folder)


# ---- Tables ----


def test_spread_is_mean_and_standard_deviation_of_a_sample_in_percent():
    assert spread([0.1, 0.2, None, float("nan"), 0.6]) == f"30.0 ± {statistics.stdev([10, 20, 60]):.1f}"
    assert (spread([0.123]), spread([None])) == ("12.3", "")


def test_plasticity_and_stability():
    matrix = EvaluationMatrix(
        ["a", "b"], ["base", "a", "b", "never"], [[9, 9, 9, 9], [9, 0.8, 9, 9], [0.5, 0.4, 0.9, 9]], [0, 1, 2, None]
    )
    assert plasticity(matrix) == pytest.approx((0.8 + 0.9) / 2)
    assert stability(matrix) == pytest.approx((0.5 + 0.4) / 2)


def test_mean_matrix_has_a_gap_where_a_seed_has_one():
    one, two = (EvaluationMatrix(["a"], ["a"], [[0.2], [last]]) for last in (0.4, None))
    assert mean_matrix([one, two]).to_lists() == [[pytest.approx(0.2)], [None]]


def test_differences_are_paired_by_seed(make_run):
    runs = [make_run("finetune", seed, last) for seed, last in ((0, 0.1), (1, 0.5), (2, 0.9))]
    runs += [make_run("modx", seed, last) for seed, last in ((1, 0.6), (0, 0.3), (7, 0.0))]
    comparison = compare(group_runs(runs), RECALL)
    column = comparison.header.index("base, end")
    cells = {row[0]: row[column] for row in comparison.rows}
    assert cells == {"finetune": "50.0 ± 40.0", "modx": "30.0 ± 30.0", "modx - finetune": "15.0 ± 7.1"}


def test_every_cell_of_the_diagonal_and_of_the_end_is_in_the_table(make_run):
    comparison = compare(group_runs([make_run("modx", 0)]), RECALL)
    row = dict(zip(comparison.header, comparison.rows[0], strict=True))
    assert (row["first, after its phase"], row["second, after its phase"]) == ("80.0", "90.0")
    assert (row["base, end"], row["first, end"], row["second, end"]) == ("50.0", "40.0", "90.0")
    assert (row["plasticity"], row["stability"], row["last"]) == ("85.0", "45.0", "60.0")
    assert row["forgetting"] == "25.0"  # base 10 of 60, first 40 of 80
    assert "Before the first phase: base 10.0, first 20.0, second 30.0." in comparison.notes


def test_tests_without_a_metric_are_left_out(make_run):
    def zero_shot(identity, results):
        results["matrix"]["zero_shot_top1"] = [[None, 0.5, None]] * 3

    comparison = compare(group_runs([make_run("modx", 0, change=zero_shot)]), "zero_shot_top1")
    row = dict(zip(comparison.header, comparison.rows[0], strict=True))
    assert (row["first, end"], row["stability"]) == ("50.0", "50.0") and "second, end" not in row


def test_metric_that_was_not_measured_is_named(make_run):
    with pytest.raises(ValueError, match=r"no metric 'nothing'. It has: image_to_text_recall@1"):
        compare(group_runs([make_run("modx", 0)]), "nothing")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 2}, "Image rows distilled (modx), percent:"),
        ({"alpha": 0, "replay_alpha": 0.1}, "Image rows distilled (modx), percent of the replayed ones:"),
    ],
)
def test_report_says_of_which_rows_the_distilled_ones_are_a_part(make_run, options, said):
    def change(identity, results):
        identity["recipe_args"]["ModX"] |= options

    assert said in compare(group_runs([make_run("modx", 0, change=change)]), RECALL).notes[-1]


# ---- Classes ----


def of_classes(accuracies, learned_at=None):
    """The results of a run in which the test `first` is zero-shot, with these accuracies by phase and class."""

    def change(identity, results):
        results["per_class"] = {"first": {"classes": ["cat", "dog", "owl"], "zero_shot_top1": accuracies}}
        results["learned_at"][1] = learned_at

    return change


def test_classes_that_lost_most_come_first(make_run):
    change = of_classes([[0.9, 0.8, None], [0, 0, None], [0.8, 0.2, None]])
    (found,) = lost_classes([make_run("modx", 0, change=change)])
    assert (found.test, found.before, found.after) == ("first", 0, 2)
    assert (found.classes, found.lost, found.gained) == (2, 2, 0)
    assert found.worst == [("dog", 0.8, 0.2), ("cat", 0.9, 0.8)]


def test_classes_are_compared_since_the_phase_that_taught_them_in_the_mean_over_seeds(make_run):
    runs = [
        make_run("modx", seed, change=of_classes([[0, 0, 0], [0.4, 0.5, 0.6], [0.2, 0.5, last]], learned_at=1))
        for seed, last in ((0, 0.9), (1, 0.5))
    ]
    (found,) = lost_classes([*runs, make_run("modx", 2)])
    assert (found.before, found.lost, found.gained) == (1, 1, 1)
    assert found.worst == [("cat", pytest.approx(0.4), pytest.approx(0.2))]


def test_phases_without_accuracies_are_left_out(make_run):
    assert lost_classes([make_run("modx", 0, change=of_classes([None, [0.4, 0.5, 0.6], [0.2, 0.5, 0]]))]) == []


# ---- Flipped retrievals ----


def thing(caption):
    """Colour and shape of both ways to name them."""
    return set(caption.split()) - {"a", "one", "in"}


def test_flips_agree_with_the_matrix(finished):
    stream, folder = finished
    run = read_run(folder)
    tests = find_tests(run, [test for test, _ in stream.tests().values()])
    flipped = {test.test: test for test in flipped_tests(run, tests, 4)}
    spans = {name: (test.before, test.after) for name, test in flipped.items()}
    assert spans == {"base": (0, 2), "first": (1, 2), "second": (0, 2)}
    for column, (name, test) in enumerate(flipped.items()):
        before, after = (run.results["matrix"][RECALL][phase][column] for phase in spans[name])
        assert test.gained - test.lost == round(test.pairs * (after - before))
        assert len(test.examples) == min(4, test.lost + test.gained)
        for one in test.examples:
            assert (thing(one.before) == thing(one.caption)) == one.is_lost
            assert (thing(one.after) == thing(one.caption)) != one.is_lost
    assert sum(test.lost + test.gained for test in flipped.values()) > 0


def test_tests_are_told_by_their_content_also_when_cut(finished, make_run):
    stream, _ = finished
    other, right = tiny_pairs(6, style="other"), stream.phases[0].test
    run = make_run("modx", 0)
    assert list(find_tests(run, [other, right])) == ["first"]
    cut = right.shuffle(seed=0).select(range(4))
    run.identity["tests"]["first"] = content_fingerprint(cut, ["image", "caption", "pair_id"])
    run.results["test_pairs"]["first"] = 4
    assert find_tests(run, [right])["first"]["pair_id"] == cut["pair_id"]


def test_examples_without_the_folders_of_the_phases_are_left_out(finished, make_run, caplog):
    stream, _ = finished
    run = make_run("modx", 0)
    tests = find_tests(run, [test for test, _ in stream.tests().values()])
    assert len(tests) == 3 and flipped_tests(run, tests, 4) == []
    assert "phase-0 is gone" in caplog.text


# ---- The files ----


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def nasty_report(finished, tmp_path_factory):
    """A report in which every name and caption is nasty."""

    def nasty(identity, results):
        results["phases"][0] = results["tests"][1] = NASTY
        results["test_pairs"] = dict(zip(results["tests"], results["test_pairs"].values(), strict=True))
        results["per_class"] = {NASTY: {"classes": [NASTY], "zero_shot_top1": [[0.5], [0.5], [0.25]]}}

    folder = tmp_path_factory.mktemp("nasty")
    runs = [write_run(finished[1], folder / recipe, f"{NASTY} {recipe}", 0, change=nasty) for recipe in "ab"]
    example = Retrieved(NASTY, Image.new("RGB", (9, 9)), NASTY, NASTY, NASTY, is_lost=True)
    flips = {NASTY: [FlippedTest(NASTY, 0, 2, 6, 1, 0, [example])]}
    write_report(group_runs(runs), folder / "report", flips=flips)
    return folder / "report"


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_page_of_nasty_names_has_no_script_and_asks_nothing_of_a_network(nasty_report):
    text = (nasty_report / "report.html").read_text()
    page = Page(text)
    assert "\u202e" not in text
    assert "<script>alert(1)</script> a|b [x](http://e.vil)" in page.text  # as text
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "p",
        "div",
        "table",
        "thead",
        "tbody",
    }
    allowed |= {"tr", "th", "td", "figure", "img", "figcaption", "details", "summary", "small", "b"}
    assert {tag for tag, _ in page.elements} <= allowed
    for _, attributes in page.elements:
        assert set(attributes) <= {"lang", "charset", "http-equiv", "content", "name", "class", "src", "alt"}
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", text)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "script" not in policy
    # 2 curves, trade-off, training, 3 disorder, 2 matrices, 1 example
    assert sum(tag == "img" for tag, _ in page.elements) == 10
    assert "1 lost, 0 gained of 1 classes" in page.text and "-25.0" in page.text


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
def test_markdown_of_nasty_names_keeps_its_tables_and_links_only_its_own_pictures(nasty_report):
    text = (nasty_report / "report.md").read_text()
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    linked = re.findall(r"\]\(([^)]*)\)", text)
    assert sorted(linked) == sorted(path.name for path in nasty_report.glob("*.png"))
    assert "<script" not in text


def test_report_without_logs_and_examples_has_neither(make_run, tmp_path):
    def silent(identity, results):
        del results["spatial_disorder"], results["evaluation_seconds"]
        for record in results["training"]:
            del record["log"]

    page = write_report(group_runs([make_run("modx", 0, change=silent)]), tmp_path / "report")
    assert {path.name for path in tmp_path.joinpath("report").iterdir()} == {
        *("report.md", "report.html", "tradeoff.png", "matrix-1-modx.png"),
        *("curves-image_to_text_recall-1.png", "curves-text_to_image_recall-1.png"),
    }
    assert "flipped" not in page.read_text()


def test_report_says_what_training_and_evaluation_have_taken(make_run, tmp_path):
    def slow(identity, results):
        results["evaluation_seconds"] = [100.0, 3.0, 4.0]
        for record in results["training"]:
            record["train_runtime"] = 30.0

    runs = group_runs([make_run("modx", 0, change=slow), make_run("finetune", 0)])
    write_report(runs, tmp_path / "report")
    lines = (tmp_path / "report" / "report.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| modx | 0 |")).endswith("| 60, 7 |")


def test_report_says_what_else_than_the_recipe_is_not_alike(make_run, tmp_path):
    slower = [make_run("modx", seed, learning_rate=0.1) for seed in (0, 1)]
    write_report(group_runs([make_run("finetune", 0, learning_rate=0.2), *slower]), tmp_path / "report")
    said = "Phases: first, second. Not alike, learning_rate: 0.2 (finetune), 0.1 (modx)."
    assert said in (tmp_path / "report" / "report.md").read_text()
    assert said in (tmp_path / "report" / "report.html").read_text()


def test_report_of_runs_with_equal_settings_says_the_phases_alone(make_run, tmp_path):
    write_report(group_runs([make_run("finetune", 0), make_run("modx", 1)]), tmp_path / "report")
    assert "\nPhases: first, second.\n" in (tmp_path / "report" / "report.md").read_text()


def test_time_of_a_phase_that_was_interrupted_is_not_known(make_run, tmp_path):
    """Its log begins where it went on."""

    def resumed(identity, results):
        results["training"][1]["resumed_at_step"] = 3

    write_report(group_runs([make_run("modx", 0, change=resumed)]), tmp_path / "report")
    assert "| seconds of training, of evaluation |" not in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_changes_of_the_angle_between_image_and_caption_are_drawn(finished, tmp_path):
    _, folder = finished
    write_report(group_runs([read_run(folder)]), tmp_path / "report")
    assert "from before the first phase to after the last (ImAV)" in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "disorder-imav.png").exists()


def test_run_keeps_the_log_that_the_report_draws(finished):
    _, folder = finished
    logs = [record["log"] for record in read_run(folder).results["training"]]
    assert [log["step"] for log in logs] == [[1, 2, 3, 4]] * 2
    assert {"loss", "contrastive", "modx_distillation"} <= set(logs[0])
