"""All phases: hand-over, matrix, interruption, identity, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, Value
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, EarlyStoppingCallback, TrainerCallback, pipeline
from transformers.utils import logging as transformers_logging

from hf_modx import RECIPES, ContinualRun, Contrastive, ModX, Phase, PhaseStream
from hf_modx.evaluation.suite import ZeroShotTest
from hf_modx.files import seal
from hf_modx.run.folder import last_complete_checkpoint
from hf_modx.run.identity import changes

from tiny import quick_arguments, tiny_clip, tiny_pairs

TESTS = Path(__file__).parent


def make_stream(num_phases=2):
    data = tiny_pairs(48)
    parts = [
        Phase(f"part {k}", data.select(range(12 * k, 12 * k + 9)), data.select(range(12 * k + 9, 12 * k + 12)))
        for k in range(num_phases + 1)
    ]
    return PhaseStream(tuple(parts[1:]), base=parts[0])


@pytest.fixture
def run(model, processor, make_args):
    """Run with the tiny model; keywords go to ContinualRun."""

    def run(stream=None, recipe="modx", args=None, **options):
        continual = ContinualRun(
            stream or make_stream(),
            recipe,
            args or make_args(max_steps=3),
            model=options.pop("model", model),
            processing_class=options.pop("processing_class", processor),
            **options,
        )
        continual.run()
        return continual

    return run


@pytest.fixture(scope="module")
def finished(processor, tmp_path_factory):
    """A run of two phases with Mod-X; nobody changes it."""
    args = quick_arguments(tmp_path_factory.mktemp("finished"), max_steps=3)
    continual = ContinualRun(make_stream(), "modx", args, model=tiny_clip(processor), processing_class=processor)
    continual.returned = continual.run()
    return continual


@pytest.fixture
def started_again(finished, tmp_path):
    """Its copy in the folder where `run` runs."""
    shutil.copytree(finished.folder, tmp_path / "out")


def weights(run, number):
    return load_file(run.phase_folder(number) / "model.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def results(run):
    return json.loads((run.folder / "results.json").read_text())


@pytest.mark.parametrize("recipe", ["joint", "frozen"])
def test_recipe_fills_the_matrix(run, recipe):
    content = results(run(recipe=recipe))
    assert content["recipe"] == recipe
    assert_filled(content)


def assert_filled(content):
    assert content["tests"] == ["part 0", "part 1", "part 2"]
    assert content["phases"] == ["part 1", "part 2"]
    for metric, matrix in content["matrix"].items():
        assert len(matrix) == 3 and all(0 <= value <= 1 for row in matrix for value in row), metric
    assert set(content["summary"]["image_to_text_recall@1"]) >= {"average", "last", "backward_transfer", "forgetting"}


def test_matrix_that_run_returns_is_the_one_in_results(finished):
    assert_filled(results(finished))
    assert finished.returned.to_lists() == results(finished)["matrix"]["image_to_text_recall@1"]
    assert finished.returned.learned_at == [0, 1, 2]


def test_phase_zero_holds_the_model_before_the_first_phase(finished, model):
    assert same(model.state_dict(), weights(finished, 0))


def test_phases_load_without_warnings(finished, caplog):
    transformers_logging.enable_propagation()
    try:
        CLIPModel.from_pretrained(finished.phase_folder(2))
        CLIPProcessor.from_pretrained(finished.phase_folder(2))
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records


def test_zero_shot_pipeline_takes_a_phase(finished, pairs):
    classify = pipeline("zero-shot-image-classification", model=str(finished.phase_folder(2)))
    answer = classify(pairs[0]["image"], candidate_labels=["red circle", "blue bar"])
    assert {entry["label"] for entry in answer} == {"red circle", "blue bar"}


def test_each_phase_has_a_card_with_its_matrix(finished):
    card = (finished.phase_folder(1) / "README.md").read_text()
    assert "\n| part 1 |" in card and "\n| part 2 |" not in card
    assert "None" not in card


def test_no_pickle_lies_in_a_phase(finished):
    names = {path.name for path in finished.phase_folder(2).iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_teacher_of_a_phase_is_the_model_after_the_phase_before(run):
    teachers = {}

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            teachers[args.output_dir[-1]] = start

    continual = run(callbacks=[Keep()])
    assert same(teachers["1"], weights(continual, 0))
    assert same(teachers["2"], weights(continual, 1))


def test_joint_starts_from_the_base_and_sees_everything(run):
    seen = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
            number = args.output_dir[-1]
            start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            seen[number] = (start, state.max_steps, len(train_dataloader.dataset))

    continual = run(recipe="joint", callbacks=[Watch()])
    assert same(seen["2"][0], weights(continual, 0))
    assert [seen[number][1:] for number in "12"] == [(3, 18), (6, 27)]


def test_changed_callback_of_a_list_is_refused(run):
    run(make_stream(1), recipe=[ModX(alpha=2.0)])
    with pytest.raises(ValueError, match="alpha"):
        run(make_stream(1), recipe=[ModX(alpha=3.0)])


def test_tested_image_among_the_training_images_is_refused(run):
    data = tiny_pairs(20)
    leaky = Phase("leaky", data.select(range(12)), data.select(range(11, 15)))
    with pytest.raises(ValueError, match=r"row 11: the image is also in leaky \(test\)"):
        run(PhaseStream((leaky,)))


def test_tested_image_is_left_out_of_training_when_asked(run, make_args):
    data = tiny_pairs(20)
    leaky = Phase("leaky", data.select(range(12)), data.select(range(11, 15)))
    continual = run(PhaseStream((leaky,)), args=make_args(max_steps=3, bad_samples="skip"))
    assert results(continual)["training"][0]["pairs"] == 11
    assert results(continual)["bad_samples"]["leaky (train)"]["count"] == 1


def test_trained_images_in_a_test_of_labels_are_told_and_stay(model, processor, make_args, caplog):
    """Training and test parts of CIFAR and others share images: nothing is left out of a benchmark."""
    data = tiny_pairs(20)
    labels = Dataset.from_dict({"photo": data["image"][10:16], "label": [0, 1] * 3}, split="test")
    test = ZeroShotTest(labels.cast_column("photo", Image()), "photo", class_names=["circle", "square"])
    stream = PhaseStream((Phase("leaky", data.select(range(12))),))
    continual = ContinualRun(
        stream, "finetune", make_args(max_steps=1), model=model, processing_class=processor, tests={"shapes": test}
    )
    assert "leaky (train): 2 of 12 rows show an image of the test 'shapes' (first in row 10)" in caplog.text
    assert len(continual.stream.phases[0].train) == 12


@pytest.mark.parametrize("has_ids", [True, False])
def test_rows_of_one_image_without_ids_are_told(run, caplog, has_ids):
    """A table with a row for each caption: pairs of one image would be negatives of each other."""
    data = tiny_pairs(20)
    data = data if has_ids else data.remove_columns("pair_id")
    run(PhaseStream((Phase("flat", data.select([*range(10), 0, 0, 1]), data.select(range(12, 16))),)))
    told = "flat (train): 5 of 13 rows show an image that another row shows, and there is no column 'pair_id'"
    assert (told in caplog.text) == (not has_ids)


def test_new_month_does_not_change_the_months_before(run, make_args):
    """Its test shares an image with an old training part: the new test loses it, not the old part."""
    args = make_args(max_steps=3, bad_samples="skip")
    data = tiny_pairs(30)
    may = Phase("may", data.select(range(12)), data.select(range(12, 16)))
    run(PhaseStream((may,)), args=args)
    june = Phase("june", data.select(range(16, 26)), data.select([3, 26, 27]))
    content = results(run(PhaseStream((may, june)), args=args))
    assert content["bad_samples"] == {
        "june (test)": {"count": 1, "first": ["row 0: the image is also in may (train)"]}
    }
    assert [record["pairs"] for record in content["training"]] == [12, 10]


def test_run_can_be_called_again_after_an_error(model, processor, make_args):
    fail = StopAt(1, 2)
    continual = ContinualRun(
        make_stream(1), "modx", make_args(max_steps=3), model=model, processing_class=processor, callbacks=[fail]
    )
    with pytest.raises(SystemError):
        continual.run()
    fail.step = None
    assert continual.run().phases == ["part 1"]


def test_corrected_command_starts_over_where_nothing_was_trained(run, make_args, monkeypatch):
    monkeypatch.setattr(ContinualRun, "_train_phase", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(make_stream(1), args=make_args(max_steps=3, learning_rate=5.0))
    monkeypatch.undo()
    assert results(run(make_stream(1)))["phases"] == ["part 1"]


def test_phase_whose_folder_is_gone_is_not_trained_again(run, started_again, tmp_path):
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    shutil.rmtree(tmp_path / "out" / "phase-1")
    second = run(make_stream(3))
    assert results(second)["training"][:2] == before["training"]
    assert not second.phase_folder(1).exists() and second.phase_folder(3).exists()
    assert results(second)["matrix"]["image_to_text_recall@1"][1][3] is None


def test_run_of_which_only_the_results_are_left_keeps_them(run, started_again, tmp_path):
    before = (tmp_path / "out" / "results.json").read_bytes()
    for number in (1, 2):
        shutil.rmtree(tmp_path / "out" / f"phase-{number}")
    assert not run().phase_folder(1).exists()
    with pytest.raises(ValueError, match="recipe was 'modx' and is 'finetune'"):
        run(recipe="finetune")
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.slow
def test_interruption_after_the_last_step_takes_no_step_more(run, make_args, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    settings["logging_steps"] = 3

    class StopAtSave(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise SystemError("power cut")

    with pytest.raises(SystemError):
        run(args=make_args(**settings), callbacks=[StopAtSave()])
    resumed = run(args=make_args(**settings))
    whole = run(args=make_args(**settings, output_dir=str(tmp_path / "whole")))
    assert same(weights(resumed, 1), weights(whole, 1)) and same(weights(resumed, 2), weights(whole, 2))
    assert training_without_clocks(resumed) == training_without_clocks(whole)


def test_stream_without_tests_still_leaves_results_and_cards(run):
    data = tiny_pairs(20)
    continual = run(PhaseStream((Phase("only", data),)))
    assert results(continual)["tests"] == []
    assert (continual.phase_folder(1) / "README.md").exists()


@pytest.mark.parametrize(
    ("change", "named"), [({"caption_column": "title"}, "caption_column"), ({"bad_samples": "skip"}, None)]
)
def test_columns_are_part_of_a_run_and_the_policy_for_bad_samples_is_not(run, make_args, change, named):
    data = tiny_pairs(20)
    data = data.add_column("title", [captions[0] for captions in data["caption"]])
    stream = PhaseStream((Phase("only", data.select(range(15)), data.select(range(15, 20))),))
    run(stream)
    args = make_args(max_steps=3, **change)
    if named is None:
        run(stream, args=args)
    else:
        with pytest.raises(ValueError, match=named):
            run(stream, args=args)


def test_tokenizer_alone_is_no_processor(run, processor):
    with pytest.raises(TypeError, match="no image_processor"):
        run(processing_class=processor.tokenizer)


def test_recipe_without_a_contrastive_term_leaves_nothing_behind(run, tmp_path):
    with pytest.raises(ValueError, match="contrastive term"):
        run(recipe=[ModX(contrastive=False)])
    assert not (tmp_path / "out").exists()


def test_finished_run_is_not_done_again(run, started_again, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(stamps) == 3
    run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")} == stamps


def test_columns_that_are_not_trained_on_may_change(run, started_again, tmp_path):
    priced = make_stream().map_parts(lambda name, part: part.add_column("price", list(range(len(part)))))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    run(priced)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")} == stamps


def test_more_phases_train_only_the_new_ones(run, finished, started_again, tmp_path):
    stamp = (tmp_path / "out" / "phase-2" / "model.safetensors").stat().st_mtime_ns
    second = run(make_stream(3))
    assert (second.phase_folder(2) / "model.safetensors").stat().st_mtime_ns == stamp
    assert same(weights(second, 2), weights(finished, 2))
    old = results(finished)["matrix"]["text_to_image_recall@1"]
    new = results(second)["matrix"]["text_to_image_recall@1"]
    assert [row[:3] for row in new[:3]] == old
    assert len(new) == 4 and None not in [value for row in new for value in row]


@pytest.mark.slow
def test_more_phases_end_with_the_weights_of_one_long_run(run, started_again, make_args, tmp_path):
    grown = run(make_stream(3))
    whole = run(make_stream(3), args=make_args(max_steps=3, output_dir=str(tmp_path / "whole")))
    assert same(weights(grown, 3), weights(whole, 3))


KEEP_THE_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "part 1_loss"}
KEEP_THE_BEST |= dict.fromkeys(("eval_strategy", "save_strategy"), "steps") | dict.fromkeys(
    ("eval_steps", "save_steps"), 1
)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"args": {"learning_rate": 2e-3}}, "learning_rate was 0.001 and is 0.002"),
        ({"args": {"per_device_train_batch_size": 4}}, "contrastive_batch_size was 8 and is 4"),
        ({"args": KEEP_THE_BEST}, "load_best_model_at_end was False and is True"),
        ({"recipe": "finetune"}, "recipe was 'modx' and is 'finetune'"),
        ({"recipe_args": {"alpha": 3.0}}, "recipe_args"),
        ({"num_phases": 1}, "2 phases and 1 are given"),
    ],
)
def test_different_run_in_the_same_folder_is_refused(run, started_again, make_args, change, named):
    with pytest.raises(ValueError, match="holds a different run") as error:
        run(
            make_stream(change.get("num_phases", 2)),
            change.get("recipe", "modx"),
            make_args(max_steps=3, **change.get("args", {})),
            recipe_args=change.get("recipe_args"),
        )
    assert named in str(error.value)


def test_other_data_of_a_phase_is_refused(run, started_again):
    other = make_stream()
    other = PhaseStream((other.phases[1], other.phases[0]), base=other.base)
    with pytest.raises(ValueError, match="phase 1 was 'part 1'"):
        run(other)


@pytest.mark.parametrize("recipe", ["er", "cumulative"])
def test_types_that_make_no_one_table_are_refused_before_training(run, tmp_path, recipe):
    first, second = make_stream().phases
    other = replace(second, train=second.train.cast_column("pair_id", Value("int32")))
    with pytest.raises(
        TypeError, match=r"'pair_id' holds Value\('int64'\) in 'part 1' and Value\('int32'\) in 'part 2'"
    ):
        run(PhaseStream((first, other)), recipe=recipe)
    assert not (tmp_path / "out" / "phase-0").exists()


def test_phase_of_another_name_is_not_said_to_have_other_data():
    before = {"hyperparameters": {}, "phases": [{"name": "may", "rows": 9, "data": "x"}]}
    renamed = {**before, "phases": [{"name": "mai", "rows": 9, "data": "x"}]}
    assert changes(before, renamed) == ["phase 1 was 'may' and is 'mai'"]


def change_weights(phase):
    """Its folder was changed while the run was not going."""
    changed = load_file(phase / "model.safetensors")
    changed["visual_projection.weight"][0, 0] += 0.001
    save_file(changed, phase / "model.safetensors", metadata={"format": "pt"})


def test_model_that_is_not_what_the_run_began_with_is_no_teacher(run, make_args, tmp_path):
    args = make_args(max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.raises(SystemError):
        run(make_stream(1), args=args, callbacks=[StopAt(1, 3)])
    change_weights(tmp_path / "out" / "phase-0")
    with pytest.raises(ValueError, match="phase-0 holds other weights .* than the phase ended with"):
        run(make_stream(1), args=args)


def test_model_that_is_not_what_the_phase_before_has_left_is_no_teacher(run, started_again, tmp_path):
    change_weights(tmp_path / "out" / "phase-2")
    with pytest.raises(ValueError, match="phase-2 holds other weights .* than the phase ended with"):
        run(make_stream(3))


class StopAt(TrainerCallback):
    """Fall over at a step, as a machine does."""

    def __init__(self, phase, step):
        self.phase, self.step = phase, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"phase-{self.phase}") and state.global_step == self.step:
            raise SystemError("power cut")


# With the default of 100 steps the ensemble would be the first weights, whatever the five steps do.
ENSEMBLES = {"weight_ensemble": {"every": 2}, "zscl": {"ensemble_every": 2}, "zscl_star": {"ensemble_every": 2}}
SETTINGS_OF_INTERRUPTED = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}


def training_without_clocks(run):
    """What was logged and counted in each phase."""
    clocks = ("train_runtime", "train_samples_per_second", "resumed_at_step")
    records = results(run)["training"]
    return [{name: value for name, value in record.items() if name not in clocks} for record in records]


@pytest.mark.parametrize(
    "recipe",
    # "frozen" takes no steps.
    [name if name == "modx" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name != "frozen"],
)
def test_interrupted_run_ends_as_an_undisturbed_one(run, make_args, tmp_path, recipe):
    """After a checkpoint in the second phase, between two logs; once also before it, where the phase begins again."""
    options = {"recipe": recipe, "recipe_args": ENSEMBLES.get(recipe)}
    settings = {**SETTINGS_OF_INTERRUPTED, "logging_steps": 3}
    whole = run(**options, args=make_args(**settings, output_dir=str(tmp_path / "whole")))
    assert not same(weights(whole, 2), weights(whole, 1))
    for step in (1, 3) if recipe in ("modx", "incclip") else (3,):
        with pytest.raises(SystemError):
            run(**options, args=make_args(**settings), callbacks=[StopAt(2, step)])
    resumed = run(**options, args=make_args(**settings))
    assert same(weights(resumed, 2), weights(whole, 2))
    assert results(resumed)["matrix"] == results(whole)["matrix"]
    assert training_without_clocks(resumed) == training_without_clocks(whole)
    assert_filled(results(whole))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_only_model": True}, "save_only_model leaves checkpoints that nothing goes on from"),
        ({"resume_from_checkpoint": "elsewhere/checkpoint-4"}, "goes on by itself .* Leave resume_from_checkpoint"),
        ({"load_best_model_at_end": True}, "'loss' is measured of no test .* such as 'part 0_image_to_text_recall@1'"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "part 1_image_to_text_median_rank"},
            "less is better: .* greater_is_better",
        ),
    ],
)
def test_arguments_that_would_be_told_of_after_hours_are_refused(run, make_args, tmp_path, settings, message):
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match=message):
        run(args=make_args(**steps, **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [2, 3], ids=["while it waits", "after it has stopped"])
def test_early_stopping_stops_where_it_would_have_without_the_interruption(run, make_args, step):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"metric_for_best_model": "eval_part 1_loss", "load_best_model_at_end": True}

    class StopAtSave(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise SystemExit("power cut")

    def never_improved():
        """After three looks, the first of which has nothing before it, it stops."""
        return EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1e9)

    with pytest.raises(SystemExit):
        run(make_stream(1), args=make_args(**settings), callbacks=[never_improved(), StopAtSave()])
    resumed = run(make_stream(1), args=make_args(**settings), callbacks=[never_improved()])
    assert results(resumed)["training"][0]["steps"] == 3


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
def test_half_written_checkpoint_is_left_out(run, make_args, tmp_path):
    """Whatever of it is missing or cut short: the run goes on from the one before it."""
    with pytest.raises(SystemError):
        run(args=make_args(**SETTINGS_OF_INTERRUPTED), callbacks=[StopAt(1, 5)])
    checkpoints = tmp_path / "out" / "checkpoints" / "phase-1"
    kept = tmp_path / "kept"
    shutil.copytree(checkpoints, kept)
    assert last_complete_checkpoint(checkpoints) == str(checkpoints / "checkpoint-4")
    names = sorted(path.name for path in (kept / "checkpoint-4").iterdir() if path.name != "training_args.bin")
    assert {"complete.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        for damage in (Path.unlink, cut):
            damage(checkpoints / "checkpoint-4" / name)
            assert last_complete_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2"), (name, damage)
            shutil.copy(kept / "checkpoint-4" / name, checkpoints / "checkpoint-4" / name)
    cut(checkpoints / "checkpoint-4" / "optimizer.pt")
    resumed = run(args=make_args(**SETTINGS_OF_INTERRUPTED))
    whole = run(args=make_args(**SETTINGS_OF_INTERRUPTED, output_dir=str(tmp_path / "whole")))
    assert results(resumed)["training"][0]["resumed_at_step"] == 2
    assert same(weights(resumed, 2), weights(whole, 2))


def test_checkpoint_before_is_removed_when_the_new_one_is_on_the_disk(run, make_args, tmp_path, monkeypatch):
    """Not between the two: a single one is kept, and a power cut while it is flushed would leave none."""
    left = []

    def cut_the_power(folder):
        left.extend(sorted(path.name for path in folder.parent.iterdir()))
        if folder.name == "checkpoint-4":
            raise SystemError("power cut")
        seal(folder)

    monkeypatch.setattr("hf_modx.trainer.seal", cut_the_power)
    with pytest.raises(SystemError):
        run(args=make_args(**SETTINGS_OF_INTERRUPTED, save_total_limit=1))
    assert left == ["checkpoint-2", "checkpoint-2", "checkpoint-4"]
    folder = tmp_path / "out" / "checkpoints" / "phase-1"
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.slow
def test_killed_process_goes_on_with_the_same_command(tmp_path):
    command = [sys.executable, str(TESTS / "killed_run.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env={**environment, "KILL_IN_PHASE": "2"}, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL
    stamp = (tmp_path / "phase-1" / "model.safetensors").stat().st_mtime_ns
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "phase-1" / "model.safetensors").stat().st_mtime_ns == stamp
    assert len(json.loads((tmp_path / "results.json").read_text())["matrix"]["image_to_text_recall@1"]) == 3


def test_recipe_may_be_a_list_of_callbacks(run):
    content = results(run(make_stream(1), recipe=[Contrastive(), ModX(contrastive=False, alpha=2.0)]))
    assert content["recipe"] == "Contrastive+ModX"


@pytest.mark.slow
def test_resized_images_kept_on_the_disk_change_nothing(run, make_args, tmp_path):
    cached = run(args=make_args(image_cache=str(tmp_path / "images")))
    plain = run(args=make_args(output_dir=str(tmp_path / "plain")))
    assert list((tmp_path / "images").iterdir())
    assert same(weights(cached, 2), weights(plain, 2))
    assert results(cached)["matrix"] == results(plain)["matrix"]


def test_tests_can_be_evaluated_during_a_phase(run, make_args):
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.extend(name for name in metrics if name.endswith("image_to_text_recall@1") and name[:5] == "eval_")

    run(make_stream(1), args=make_args(max_steps=4, eval_strategy="steps", eval_steps=2), callbacks=[Watch()])
    assert seen.count("eval_part 1_image_to_text_recall@1") == 2


def test_kept_rows_of_each_phase_are_in_the_results(finished):
    training = results(finished)["training"]
    assert [record["steps"] for record in training] == [3, 3]
    assert all(0 <= record["image_rows_kept"]["mean"] <= 1 for record in training)


def test_model_may_be_given_by_path(run, model, processor, tmp_path):
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    continual = run(make_stream(1), model=str(tmp_path / "start"), processing_class=None)
    assert same(weights(continual, 0), model.state_dict())
    assert AutoProcessor.from_pretrained(continual.phase_folder(1)) is not None


# ---- Bad input, before any training ----


def broken(data: Dataset, row: int, **cells) -> Dataset:
    rows = data.cast_column("image", type(data.features["image"])(decode=False)).to_list()
    rows[row].update(cells)
    return Dataset.from_list(rows, features=data.features)


def stream_with(data):
    good = make_stream()
    return PhaseStream((good.phases[0], Phase("bad", data)), base=good.base)


def test_image_that_cannot_be_decoded_is_named(run):
    data = broken(tiny_pairs(9), 4, image={"bytes": b"\x89PNG but no more", "path": "cat.png"})
    with pytest.raises(ValueError, match=r"1 of 9 rows of bad \(train\).*row 4.*cat\.png.*bad_samples='skip'"):
        run(stream_with(data))


def test_caption_column_with_nulls_is_named(run):
    with pytest.raises(ValueError, match="row 2: the caption is null"):
        run(stream_with(broken(tiny_pairs(9), 2, caption=None)))


def test_bad_rows_are_skipped_and_counted_when_asked(run, make_args, tmp_path):
    data = broken(broken(tiny_pairs(12, start=36), 2, caption=[]), 5, image=None)
    data = broken(data, 6, image={"bytes": b"no image", "path": str(tmp_path / "cat.png")})
    continual = run(stream_with(data), args=make_args(max_steps=3, bad_samples="skip"))
    assert results(continual)["bad_samples"] == {
        "bad (train)": {
            "count": 3,
            "first": [
                "row 2: the caption is empty",
                "row 5: the image is null",
                "row 6: the image (cat.png) cannot be decoded: it has no known image format",
            ],
        }
    }
    assert results(continual)["training"][1]["pairs"] == 9


def test_phase_of_one_pair_is_refused(run):
    with pytest.raises(ValueError, match="Phase 'bad': a contrastive batch of one pair"):
        run(stream_with(tiny_pairs(1)))


def test_model_that_is_no_dual_encoder_is_refused(run):
    with pytest.raises(TypeError, match="Linear is no dual encoder"):
        run(model=torch.nn.Linear(2, 2))


def test_missing_column_is_named_before_training(run):
    with pytest.raises(ValueError, match=r"no column 'caption'.*columns are: image, text, pair_id"):
        run(stream_with(tiny_pairs(9).rename_column("caption", "text")))


def test_folder_with_phases_of_unknown_origin_is_refused(run, tmp_path):
    (tmp_path / "out" / "phase-0").mkdir(parents=True)
    with pytest.raises(ValueError, match="no run.json"):
        run()
