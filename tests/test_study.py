"""The study: its tiny form from the command to the tables, and the numbers in them."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "study")]

import certainty  # noqa: E402
import choose  # noqa: E402
import measures  # noqa: E402
import run as study  # noqa: E402
import tables  # noqa: E402
import towers  # noqa: E402
from cells import FAILED, STUDY, Cell, failure, is_finished  # noqa: E402
from measures import METRIC, METRICS, spread  # noqa: E402

from hf_modx import ModXTrainingArguments, build_recipe  # noqa: E402
from hf_modx.data.loading import at_most  # noqa: E402
from hf_modx.demo import DEMO_STREAMS  # noqa: E402
from hf_modx.files import read_json  # noqa: E402
from hf_modx.interruption import StopOnSignal  # noqa: E402
from hf_modx.recipes import check_teachers  # noqa: E402
from hf_modx.yaml_arguments import parse_arguments  # noqa: E402

import continual_clip  # noqa: E402

TINY = ["--tiny", "--streams", "instance", "--use_cpu", "true"]


# ---- The command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny study of two recipes, of which one fails."""
    folder = tmp_path_factory.mktemp("study")
    entries = folder / "recipes.yaml"
    entries.write_text("recipes:\n  wrong: {recipe: modx, recipe_args: {alpha: -1}}\nsets:\n  both: [finetune, wrong]")
    command = [*TINY, "--recipe_file", str(entries), "--recipes", "both", "--output_dir", str(folder / "out")]
    assert study.main(command) == 1
    (folder / "command.json").write_text(json.dumps(command))
    return folder


@pytest.fixture
def command(folder):
    return json.loads((folder / "command.json").read_text())


@pytest.mark.slow
def test_every_run_has_its_folder_and_a_line_in_the_tables(folder):
    assert is_finished(folder / "out" / "instance" / "finetune-seed0")
    text = (folder / "out" / "tables.md").read_text()
    assert "| finetune | 0 |" in text and "| frozen | 0 |" in text
    assert "part_1 24 (4.17)" in text and "union 96 (1.04)" in text
    assert "Image-to-text recall@1 of each test:\n\n| recipe | part_0, learned |" in text


@pytest.mark.slow
def test_a_run_that_fails_says_why_in_the_tables(folder):
    text = (folder / "out" / "tables.md").read_text()
    assert "- wrong, seed 0: failed:" in text and "alpha must not be negative, got -1" in text


@pytest.mark.slow
def test_figures_cards_and_measures_are_written(folder):
    out = folder / "out"
    assert (out / "front.png").stat().st_size > 10_000 and (out / "curves-instance.png").stat().st_size > 10_000
    assert "recall" in (out / "cards" / "instance" / "finetune-seed0" / "README.md").read_text()
    assert (out / "measures.csv").read_text().count("instance,finetune,0,finished") == len(METRICS)


@pytest.mark.slow
def test_union_is_in_no_number_of_the_summary(folder):
    results = json.loads((folder / "out" / "instance" / "finetune-seed0" / "results.json").read_text())
    assert results["tests"][-1] == "union" and results["learned_at"][-1] == "all"
    *own, _ = results["matrix"][METRIC][-1]
    assert results["summary"][METRIC]["last"] == pytest.approx(sum(own) / len(own))


@pytest.mark.slow
def test_finished_runs_are_not_done_again_and_failed_ones_are(folder, command, monkeypatch):
    begun = []
    monkeypatch.setattr(continual_clip, "main", lambda argv: begun.append(argv[argv.index("--output_dir") + 1]))
    study.main(command)
    assert begun == [str(folder / "out" / "instance" / "wrong-seed0")]


@pytest.mark.slow
def test_a_folder_with_other_settings_is_refused(command):
    with pytest.raises(SystemExit, match=r"other settings \(--learning_rate, 0.1\)"):
        study.main([*command, "--learning_rate", "0.1"])


@pytest.mark.slow
def test_jobs_are_processes_whose_last_words_are_the_reason(tmp_path):
    run = study.Run("class", "er", 0, None, ("--recipe", "no_such_recipe"), tmp_path / "run")
    with study.Workers(jobs=2, threads=1) as workers:
        ((ended, reason),) = workers.carry_out([run])
    assert ended is run and "no recipe 'no_such_recipe'" in reason
    assert failure(run.folder) == reason


def test_signal_that_ends_a_run_of_one_job_ends_the_study(tmp_path, monkeypatch):
    begun = []

    def interrupted_run(argv):
        begun.append(argv)
        with StopOnSignal():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(continual_clip, "main", interrupted_run)
    assert study.main([*TINY, "--output_dir", str(tmp_path)]) == study.INTERRUPTED
    assert len(begun) == 1
    assert list(tmp_path.rglob(FAILED)) == []


@pytest.mark.parametrize("status", ["143", "130", "-15"])
def test_run_that_a_signal_has_ended_has_not_failed(tmp_path, monkeypatch, status):
    end = f"sys.exit({status})" if status[0] != "-" else "os.kill(os.getpid(), 15)"
    (tmp_path / "continual_clip.py").write_text(f"import os, sys\n{end}")
    monkeypatch.setattr(study, "HERE", tmp_path / "study")
    runs = [study.Run("class", name, 0, None, (), tmp_path / name) for name in ("er", "ewc")]
    with study.Workers(jobs=1, threads=1) as workers:
        assert [workers._record(run, workers._apart) for run in runs][1] == "not begun"
    assert failure(runs[0].folder) is None


# ---- What is planned ----


def plan(*argv):
    return study.planned(*study.parse(argv))


def test_bases_come_first_and_then_seed_after_seed():
    runs = plan("--recipes", "finetune,joint", "--streams", "domain,class", "--seeds", "0,1")
    assert [run.recipe for run in runs[:4]] == ["frozen"] * 4
    assert [(run.seed, run.stream, run.recipe) for run in runs[4:7]] == [
        (0, "domain", "joint"),
        (0, "domain", "finetune"),
        (0, "class", "joint"),
    ]


def test_flags_of_an_entry_may_differ_by_stream_and_the_command_line_has_the_last_word(tmp_path):
    entries = tmp_path / "recipes.yaml"
    entries.write_text(
        "recipes:\n  a: {recipe: modx, recipe_args: {alpha: 1}, streams: {class: {recipe_args: {alpha: 3}}}}"
    )
    flags = ["--recipes", "a", "--recipe_file", str(entries), "--seeds", "0", "--learning_rate", "0.5"]
    *_, domain, of_class = plan(*flags, "--streams", "domain,class")
    assert '{"alpha": 1}' in domain.flags and '{"alpha": 3}' in of_class.flags
    assert domain.flags[-2:] == ("--learning_rate", "0.5")


def test_entry_may_start_from_the_base_of_its_stream_and_seed(tmp_path):
    entries = tmp_path / "recipes.yaml"
    entries.write_text('recipes:\n  small: {per_device_train_batch_size: 64, model_name_or_path: "{base}"}')
    runs = plan("--recipes", "small", "--recipe_file", str(entries), "--seeds", "3,4", "--output_dir", str(tmp_path))
    bases = {(run.stream, run.seed): str(run.folder / "phase-0") for run in runs if run.recipe == "frozen"}
    small = [run for run in runs if run.recipe == "small"]
    assert {(run.stream, run.seed): run.flags[-1] for run in small} == bases


def test_entry_that_starts_from_the_base_differs_in_nothing_that_it_does_not_name(tmp_path):
    """A run that is given its model does not take the built-in stream's defaults by itself."""
    entries = tmp_path / "recipes.yaml"
    entries.write_text('recipes:\n  small: {recipe: finetune, max_steps: 400, model_name_or_path: "{base}"}')
    *_, plain = plan("--recipes", "finetune", "--output_dir", str(tmp_path))
    *_, small = plan("--recipes", "small", "--recipe_file", str(entries), "--output_dir", str(tmp_path))
    kinds = (continual_clip.ScriptArguments, ModXTrainingArguments)
    found = [
        parse_arguments(kinds, [*run.argv, "--use_cpu", "true"], continual_clip.defaults)[1] for run in (plain, small)
    ]
    settings, others = (args.to_dict() for args in found)
    changed = {name for name in settings if settings[name] != others[name]}
    assert changed == {"max_steps", "output_dir"}


def test_options_are_not_chosen_on_the_seeds_of_the_tables(capsys):
    with pytest.raises(SystemExit):
        study.parse(["--tune", "--seeds", "9,10"])
    assert "10 or more" in capsys.readouterr().err
    assert "--demo_validation" in plan("--tune")[0].flags


def test_all_entries_and_sets_can_be_built():
    content = yaml.safe_load((ROOT / "examples" / "study" / "recipes.yaml").read_text())
    for name in [name for names in content["sets"].values() for name in names]:
        entry = content["recipes"].get(name, {})
        recipe = entry.get("recipe", name)
        callbacks = build_recipe(recipe, **entry.get("recipe_args", {}))
        check_teachers(recipe, callbacks, entry.get("teacher", "previous"))
        assert callbacks, name


# ---- What the tables say ----


def results(matrix, learned_at=(0, 1, 2, None)):
    return {
        "phases": ["one", "two"],
        "tests": ["base", "one", "two", "union"],
        "learned_at": list(learned_at),
        "matrix": dict.fromkeys(METRICS, matrix),
    }


def test_measures_of_a_run():
    found = measures.measures(results([[0.5, 0.1, 0.0, 0.3], [0.4, 0.8, 0.1, 0.2], [0.2, 0.6, 0.9, 0.1]]), METRIC)
    assert found == pytest.approx(
        {
            "plasticity": (0.8 + 0.9) / 2,
            "reached": (0.5 + 0.8 + 0.9) / 3,
            "old": (0.2 + 0.6) / 2,
            "last": (0.2 + 0.6 + 0.9) / 3,
            "forgetting": ((0.5 - 0.2) + (0.8 - 0.6)) / 2,
            "union": 0.1,
        }
    )


def test_recipes_with_hyper_parameters_of_their_own_are_named(tmp_path):
    recipes = {}
    for name, rate in (("finetune", 5e-4), ("er", 5e-4), ("fast", 1e-3)):
        run = tmp_path / name
        run.mkdir()
        hyperparameters = {"learning_rate": rate, "teacher": "previous", "seed": len(recipes)}
        (run / "run.json").write_text(json.dumps({"identity": {"hyperparameters": hyperparameters}}))
        recipes[name] = {0: Cell("domain", name, 0, None, run, {}, "finished")}
    assert tables.other_settings(recipes) == " With other settings: fast (learning_rate 0.001)."
    assert tables.other_settings({"finetune": recipes["finetune"], "er": recipes["er"]}) == ""


def write_trial(folder, name, last, seed=10, flags=("--demo_validation", "True")):
    """A run that has ended with such a score; None: that has failed."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir(parents=True)
    recipe = "er" if "weak" in name else "modx"
    record = {"recipe": run.name.split("-")[0], "seed": seed, "flags": ["--recipe", recipe, *flags]}
    (run / STUDY).write_text(json.dumps(record))
    if last is None:
        (run / FAILED).write_text(json.dumps({"reason": "loss: NaN"}))
        return
    (run / "run.json").write_text(json.dumps({"identity": {"phases": ["one", "two"]}}))
    (run / "results.json").write_text(json.dumps(results([[last] * 4] * 3)))


def ranked(folder):
    choose.main(folder)
    lines = [line for line in (folder / "search.md").read_text().splitlines() if line.startswith("| ")]
    return [line.split(" | ")[:4] for line in lines[2:]]


def test_search_ranks_entries_that_every_stream_has_and_counts_trials_by_recipe(tmp_path):
    last = {"a/weak": 0.2, "b/weak": 0.3, "a/strong": 0.1, "b/strong": 0.6, "a/half": 0.9, "a/frozen": 0.95}
    for name, value in {**last, "a/torn": 0.8, "b/torn": None}.items():
        write_trial(tmp_path, name, value)
    assert ranked(tmp_path) == [
        ["| strong", "35.0", "10.0", "60.0"],
        ["| weak", "25.0", "20.0", "30.0"],
        ["| half", "-", "90.0", "not run"],
        ["| torn", "-", "80.0", "failed"],
    ]
    counted = "4 settings, 7 runs, 6 of them finished, seed 10. Settings by recipe: er 1, modx 3."
    assert counted in (tmp_path / "search.md").read_text()


def test_search_gives_no_score_to_an_entry_that_a_seed_lacks(tmp_path):
    for name, value, seed in (("a/weak", 0.2, 10), ("a/weak", 0.4, 11), ("a/lucky", 0.9, 10), ("a/lucky", None, 11)):
        write_trial(tmp_path, name, value, seed)
    assert [row[:2] for row in ranked(tmp_path)] == [["| weak", "30.0"], ["| lucky", "-"]]


def test_error_of_a_difference_is_that_of_a_mean_over_tests():
    middle, error = certainty.mean_of_means([torch.tensor([0.0, 0.2, 0.4, 0.2]), torch.tensor([0.1, 0.3])])
    assert middle == pytest.approx(0.2)
    assert error == pytest.approx(((0.08 / 3) / 4 + 0.02 / 2) ** 0.5 / 2)


@pytest.mark.slow
def test_ranks_of_queries_have_the_mean_that_the_run_has_measured(folder):
    run = folder / "out" / "instance" / "finetune-seed0"
    stream = DEMO_STREAMS["instance"](0)
    cut = {name: (at_most(test, 24, seed=0), phase) for name, (test, phase) in stream.tests().items()}
    ranks = certainty.reciprocal_ranks(run / f"phase-{len(stream)}", SimpleNamespace(tests=lambda: cut))
    found = read_json(run / "results.json")
    measured = dict(zip(found["tests"], found["matrix"]["image_to_text_mrr"][-1], strict=True))
    assert [part.mean().item() for part in ranks] == pytest.approx([measured[name] for name in cut])


def test_settings_are_not_chosen_on_the_tests(tmp_path):
    write_trial(tmp_path, "a/weak", 0.2, flags=())
    with pytest.raises(SystemExit, match="weak-seed10 was measured on the tests"):
        choose.main(tmp_path)


def test_a_model_that_finds_nothing_is_named():
    matrix = [[0.5, 0.5, 0.5, 0.5], [0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert measures.has_collapsed({"matrix": {"image_to_text_recall@10": matrix}})
    assert not measures.has_collapsed({"matrix": {"image_to_text_recall@10": matrix[:2]}})


def test_stream_of_one_phase_without_a_base_has_nothing_to_forget():
    matrix = {metric: [[0.1], [0.5]] for metric in METRICS}
    found = {"phases": ["one"], "tests": ["one"], "learned_at": [1], "matrix": matrix}
    cells = [Cell("own", name, 0, None, Path("nowhere"), found, "finished") for name in ("finetune", "modx")]
    told = tables.measured(measures.summary(cells)["modx"][METRIC])
    assert (told["plasticity"], told["last"], told["last - finetune"]) == ("50.0", "50.0", "+0.0")
    nothing = ("old, end", "forgetting", "forgetting - finetune", "relative forgetting", "forgetting removed")
    assert {told[name] for name in nothing} == {"n.d."}


def test_difference_is_paired_by_seed_with_a_t_interval():
    found = measures.paired(spread({0: 0.5, 1: 0.7, 2: 0.6}), spread({2: 0.3, 1: 0.5, 0: 0.4, 7: 0.9}))
    assert found["seeds"] == 3 and found["mean"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert found["interval"] == pytest.approx(4.303 * 0.1 / 3**0.5)


def test_every_recipe_is_compared_with_modx_plus_by_seed():
    def cell(recipe, seed, end):
        matrix = {metric: [[0.5, 0.0], [end, end]] for metric in METRICS}
        results = {"matrix": matrix, "phases": ["one"], "learned_at": [0, 1], "tests": ["base", "one"]}
        return Cell("class", recipe, seed, None, None, results, "finished")

    ends = {"modx_plus": (0.3, 0.4, 0.5), "er": (0.2, 0.2, 0.2)}
    found = measures.summary([cell(name, seed, end) for name, of in ends.items() for seed, end in enumerate(of)])
    assert found["er"][METRIC]["last_less_modx_plus"]["mean"] == pytest.approx(-0.2)
    assert found["er"][METRIC]["last_less_modx_plus"]["interval"] == pytest.approx(4.303 * 0.1 / 3**0.5)


def test_forgetting_removed_is_a_ratio_of_means():
    def own(reached, last):
        known = {"reached": reached, "last": last, "plasticity": reached, "forgetting": dict.fromkeys(last, 0.1)}
        return {name: spread(by_seed) for name, by_seed in known.items()}

    finetune = own({0: 0.8, 1: 0.82, 2: 0.81, 3: 0.1}, {0: 0.4, 1: 0.41, 2: 0.42, 3: 0.1})
    recipe = own({0: 0.7, 1: 0.7, 2: 0.7}, {0: 0.5, 1: 0.53, 2: 0.5})
    found = measures.comparisons(recipe, finetune, None)
    assert found["forgetting_removed"] == pytest.approx(0.1 / 0.4)  # of the seeds that both have
    assert found["relative_plasticity"] == pytest.approx(0.7 / 0.81)
    assert found["relative_forgetting"] == pytest.approx(1.0)


def test_means_over_streams_say_of_how_many_forgetting_removed_is():
    def recipe(last, removed, plasticity):
        own = {"last": spread({0: last}), "union": spread({0: last / 2})}
        own |= {"forgetting_removed": removed, "relative_plasticity": plasticity, "relative_forgetting": last}
        return dict.fromkeys(tables.SHOWN, own)

    one = {"finetune": recipe(0.1, 0.0, 1.0), "er": recipe(0.2, 0.5, 0.8), "kl": recipe(0.2, 0.5, 0.8)}
    two = {"finetune": recipe(0.3, 0.0, 1.0), "er": recipe(0.5, None, 0.6)}
    lines = "\n".join(tables.all_streams({"domain": one, "class": two})).splitlines()
    assert "| er | 50 % (1 of 2) | 35 % | 70 % | 35.0 | 17.5 |" in lines
    assert not any("kl" in line for line in lines)
    assert tables.all_streams({"domain": one}) == []


def test_time_of_a_step_is_that_of_phases_that_were_not_interrupted(tmp_path):
    identity = {"recipe_args": {}, "phases": [{"rows": 8}, {"rows": 8}]}
    (tmp_path / "run.json").write_text(json.dumps({"identity": identity}))
    phase = {"starts_from": 1, "steps": 100, "train_runtime": 20.0, "pairs": 8}
    resumed = phase | {"train_runtime": 1.0, "resumed_at_step": 95}
    for training, time in (([phase, phase], "200"), ([phase, resumed], "200"), ([resumed], "not known")):
        found = tables.costs(Cell("class", "er", 0, None, tmp_path, {"training": training}, "finished"))
        assert found["ms a step"] == time


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.02, "replay_alpha": 0.1}, "25 %"),
        ({"alpha": 0, "replay_alpha": 0.1}, "25 % of replayed"),
        ({"alpha": 0}, "25 %"),
    ],
)
def test_rows_distilled_are_those_of_replayed_pairs_where_no_others_are(tmp_path, options, said):
    identity = {"recipe_args": {"ModX": options}, "phases": [{"rows": 8}]}
    (tmp_path / "run.json").write_text(json.dumps({"identity": identity}))
    training = [{"starts_from": 0, "steps": 1, "train_runtime": 1.0, "pairs": 8, "image_rows_kept": {"mean": 0.25}}]
    cell = Cell("class", "modx", 0, None, tmp_path, {"training": training}, "finished")
    assert tables.costs(cell)["rows distilled"] == said


@pytest.mark.parametrize("last", [{0: 0.4}, {0: 0.1, 1: 0.9}])
def test_forgetting_removed_needs_forgetting_that_is_more_than_noise(last):
    finetune = {"reached": spread(dict.fromkeys(last, 0.6)), "last": spread(last)}
    finetune["plasticity"] = finetune["forgetting"] = finetune["reached"]
    assert measures.comparisons(finetune, finetune, None)["forgetting_removed"] is None


# ---- Towers out of packages (their weights are compared whenever towers.py runs) ----


def test_package_that_is_missing_is_named_with_the_remedy():
    with pytest.raises(SystemExit, match="no-such-tower is not installed: see the commands"):
        towers.packaged("no-such-tower", "weights.onnx")


def test_package_of_another_version_is_refused():
    with pytest.raises(SystemExit, match="another version of transformers is installed"):
        towers.packaged("transformers", "no_such_file.onnx")


def test_image_size_is_whole_patches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["towers.py", "--output_dir", str(tmp_path), "--image_size", "64"])
    with pytest.raises(SystemExit):
        towers.main()
    assert "a multiple of 14" in capsys.readouterr().err
