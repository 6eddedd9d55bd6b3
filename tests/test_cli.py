"""The command hf-modx, as a user types it."""

import json
import runpy
import sys

import pytest
from datasets import DatasetDict, load_from_disk

from hf_modx import ContinualRun, ModXTrainingArguments, PhaseStream
from hf_modx.cli import COMMANDS, main
from hf_modx.demo import demo_stream
from hf_modx.phases import content_fingerprint

from tiny import tiny_clip, tiny_pairs


@pytest.fixture(scope="module")
def place(processor, tmp_path_factory):
    """A folder with data (`data`) and runs of one phase on them (`finetune`, `modx`)."""
    place = tmp_path_factory.mktemp("place")
    pairs = tiny_pairs(30)
    splits = {"may_train": range(16), "may_test": range(16, 24), "other_test": range(24, 30)}
    data = DatasetDict({name: pairs.select(rows) for name, rows in splits.items()})
    data.save_to_disk(place / "data")
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    for recipe in ("modx", "finetune"):
        args = ModXTrainingArguments(str(place / recipe), max_steps=2, per_device_train_batch_size=8, **quiet)
        stream = PhaseStream.from_splits(data)
        ContinualRun(stream, recipe, args, model=tiny_clip(processor), processing_class=processor).run()
    return place


@pytest.fixture
def fails(capsys):
    """What a command that fails says, on one line."""

    def fails(*argv):
        assert main([str(argument) for argument in argv]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
        assert captured.err.startswith(f"hf-modx {argv[0]}: ")
        return captured.err

    return fails


def test_help_lists_every_command_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "exit codes:" in text
    assert all(f"    {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_a_command_shows_an_example(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"    hf-modx {command} " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nothing"], ["report"], ["merge", "a", "b", "--weight", "x"]])
def test_wrong_usage_has_its_own_exit_code(capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2 and "usage: hf-modx" in capsys.readouterr().err


def test_module_is_the_command_and_tells_its_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf_modx", "report", str(tmp_path), "--output_dir", "out"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("hf_modx", run_name="__main__")
    assert exit_.value.code == 1
    assert capsys.readouterr().err == f"hf-modx report: {tmp_path} holds no run: there is no run.json in it.\n"


def test_traceback_is_shown_where_it_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        main(["report", str(tmp_path), "--output_dir", "out", "--traceback"])


# ---- report ----


def test_report_compares_with_finetune_and_shows_examples(place, tmp_path, capsys):
    runs = [str(place / "modx"), str(place / "finetune")]
    found = ["--examples", "2", "--dataset_name", str(place / "data")]
    assert (
        main(["report", *runs, "--output_dir", str(tmp_path / "out"), "--metrics", "text_to_image_mrr", *found]) == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "### Text-to-image MRR" in text and "| modx - finetune |" in text
    assert "| finetune | may | 0 to 1 | 8 |" in text and "| modx | other | 0 to 1 | 6 |" in text


def test_another_reference_can_be_chosen(place, tmp_path):
    runs = [str(place / "finetune"), str(place / "modx"), "--reference", "modx"]
    assert main(["report", *runs, "--output_dir", str(tmp_path)]) == 0
    assert "| finetune - modx |" in (tmp_path / "report.md").read_text()


def test_examples_whose_data_are_not_found_are_left_out_with_a_warning(place, tmp_path, caplog):
    tiny_pairs(5, style="other").save_to_disk(tmp_path / "other")
    flags = ["--examples", "2", "--dataset_name", str(tmp_path / "other")]
    assert main(["report", str(place / "modx"), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    assert "No examples of modx" in caplog.text
    assert "flipped" not in (tmp_path / "out" / "report.html").read_text()


def test_wrong_reports_end_with_the_reason(place, tmp_path, fails):
    out = ("--output_dir", tmp_path / "out")
    assert "no metric 'nothing'" in fails("report", place / "modx", *out, "--metrics", "nothing")
    assert "no recipe 'joint'" in fails("report", place / "modx", *out, "--reference", "joint")
    assert "must not be negative" in fails("report", place / "modx", *out, "--examples", "-1")
    assert not (tmp_path / "out").exists()


def test_report_without_matplotlib_names_the_remedy(place, tmp_path, fails, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'hf_modx[plots]'" in fails("report", place / "modx", "--output_dir", tmp_path / "out")


# ---- evaluate ----


def test_evaluate_finds_what_the_run_has_measured(place, tmp_path, capsys):
    file = tmp_path / "new" / "values.json"
    flags = ["--dataset_name", str(place / "data"), "--output_file", str(file)]
    assert main(["evaluate", str(place / "modx" / "phase-1"), *flags]) == 0
    found = json.loads(file.read_text())
    results = json.loads((place / "modx" / "results.json").read_text())
    assert found["test_pairs"] == {"may_test": 8, "other_test": 6}
    for metric, rows in results["matrix"].items():
        measured = dict(zip(results["tests"], rows[1], strict=True))
        for test in ("may", "other"):
            assert found["values"][f"{test}_test"][metric] == pytest.approx(measured[test], abs=1e-9)
    assert capsys.readouterr().out.startswith("| metric | may_test | other_test |")


def test_evaluate_takes_a_revision_of_the_hub(place, hub, api, capsys):
    api.create_repo("owner/clip")
    api.create_branch("owner/clip", branch="phase-1")
    api.upload_folder(repo_id="owner/clip", folder_path=place / "modx" / "phase-1", revision="phase-1")
    flags = ["--dataset_name", str(place / "data"), "--split", "other_test", "--max_samples", "4"]
    assert main(["evaluate", "owner/clip@phase-1", *flags]) == 0
    assert "| Image-to-text recall@1 |" in capsys.readouterr().out


def test_wrong_evaluations_end_with_the_reason(place, tmp_path, fails):
    model, data = place / "modx" / "phase-1", ("--dataset_name", place / "data")
    assert "There is no split x. The splits are: may_train" in fails("evaluate", model, *data, "--split", "x")
    assert "no column 'text'" in fails("evaluate", model, *data, "--caption_column", "text")
    assert "--batch_size must be at least 1" in fails("evaluate", model, *data, "--batch_size", "0")
    said = fails("evaluate", model, *data, "--pair_id_column", "pair_ids")
    assert "no column 'pair_ids' (pair_id_column) in any part. Did you mean 'pair_id'?" in said
    assert "--split does not go with --tests" in fails("evaluate", model, "--tests", "t.yaml", "--split", "test")
    said = fails("evaluate", model, *data, "--demo_stream", "class")
    assert "--demo_stream does not go with --tests or --dataset_name" in said
    assert "nowhere" in fails("evaluate", tmp_path / "nowhere", *data)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    fails("evaluate", tmp_path / "broken", *data)


# ---- merge ----


def test_merge_writes_a_model_that_evaluate_takes(place, tmp_path, capsys):
    models = [str(place / "modx" / f"phase-{number}") for number in (0, 1)]
    assert main(["merge", *models, "--weight", "0.25", "--output_dir", str(tmp_path / "merged")]) == 0
    flags = ["--dataset_name", str(place / "data"), "--split", "may_test"]
    assert main(["evaluate", str(tmp_path / "merged"), *flags]) == 0
    assert "| 0.25 | phase-1 |" in (tmp_path / "merged" / "README.md").read_text()


def test_wrong_merges_end_with_the_reason(place, tmp_path, fails):
    models = [place / "modx" / f"phase-{number}" for number in (0, 1)]
    out = ("--output_dir", tmp_path / "merged")
    assert "must be in [0, 1], got 2.0" in fails("merge", *models, *out, "--weight", "2")
    assert "is not empty" in fails("merge", *models, "--output_dir", place)
    missing = place / "modx" / "phase-9"
    assert f"There is no folder {missing}, and an id on the Hub" in fails("merge", models[0], missing, *out)


# ---- demo-data ----


@pytest.mark.slow
def test_demo_data_are_the_built_in_stream(tmp_path, capsys):
    assert main(["demo-data", "--output_dir", str(tmp_path / "demo"), "--seed", "3"]) == 0
    assert "mosaic_train: 1,023 pairs" in capsys.readouterr().out
    saved, stream = load_from_disk(tmp_path / "demo"), demo_stream(3)
    assert len(saved) == 2 * len(stream.all_phases())
    for phase in stream.all_phases():
        for part, dataset in (("train", phase.train), ("test", phase.test)):
            assert content_fingerprint(saved[f"{phase.name}_{part}"]) == content_fingerprint(dataset)


TESTS = """
- {{name: may, kind: retrieval, dataset: {data}, split: may_test}}
- name: shapes
  kind: zero_shot
  dataset: {data}
  split: other_test
  label_column: pair_id
  class_names: {names}
  templates: ["a {{}}"]
"""


def test_evaluate_takes_declared_tests_of_all_kinds(place, tmp_path, capsys):
    names = json.dumps([f"thing {number}" for number in range(48)])
    (tmp_path / "tests.yaml").write_text(TESTS.format(data=place / "data", names=names))
    out = tmp_path / "values.json"
    argv = ["evaluate", place / "modx" / "phase-1", "--tests", tmp_path / "tests.yaml", "--output_file", out]
    assert main([str(argument) for argument in argv]) == 0
    values = json.loads(out.read_text())["values"]
    measured = json.loads((place / "modx" / "results.json").read_text())["matrix"]["image_to_text_recall@1"]
    assert values["may"]["image_to_text_recall@1"] == measured[1][0]
    assert 0 <= values["shapes"]["zero_shot_top1"] <= 1
    assert "| zero-shot top-1" in capsys.readouterr().out.lower()
    assert main([str(argument) for argument in [*argv, "--max_samples", "2"]]) == 0
    assert set(json.loads(out.read_text())["test_pairs"].values()) == {2}


def test_disorder_is_that_of_the_results(place, tmp_path, capsys):
    run, out = place / "modx", tmp_path / "disorder.json"
    models = [run / "phase-0", run / "phase-1"]
    argv = ["disorder", *models, "--dataset_name", place / "data", "--split", "may_test", "--output_file", out]
    assert main([str(argument) for argument in [*argv, "--plots", tmp_path]]) == 0
    found = json.loads(out.read_text())["values"]["may_test"]
    (phase,) = [
        entry for entry in json.loads((run / "results.json").read_text())["spatial_disorder"]["phases"] if entry
    ]
    recorded = phase["since_start"]["tests"]["may"]
    assert found["image"]["ram"]["mean"] == pytest.approx(recorded["image"]["ram"]["mean"], abs=1e-3)
    assert found["text"]["sam"]["shares"] == pytest.approx(recorded["text"]["sam"]["shares"], abs=1e-6)
    assert "| may_test |" in capsys.readouterr().out and (tmp_path / "ram.png").exists()


def test_disorder_needs_captions(place, tmp_path, fails):
    entry = {"name": "x", "kind": "zero_shot", "dataset": str(place / "data"), "split": "other_test"}
    entry |= {"label_column": "pair_id", "class_names": [str(number) for number in range(48)]}
    (tmp_path / "tests.yaml").write_text(json.dumps([entry]))
    phase = place / "modx" / "phase-0"
    assert "tests with captions" in fails("disorder", phase, phase, "--tests", tmp_path / "tests.yaml")
