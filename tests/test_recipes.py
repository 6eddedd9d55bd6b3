"""Recipes by name, alone and added up."""

import inspect
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_modx import (
    RECIPES,
    ContinualRun,
    Contrastive,
    LossCallback,
    ModX,
    ModXTrainer,
    ModXTrainingArguments,
    PhaseStream,
    build_recipe,
)
from hf_modx.callbacks import EWC, L2SP, ExperienceReplay, ReferenceDistillation, WeightEnsemble, check_recipe
from hf_modx.recipes import recipe_name
from hf_modx.run.identity import run_identity

from launch import launch
from test_continual import StopAt, make_stream, weights
from tiny import tiny_clip, tiny_processor


def names(recipe, **options):
    return [type(callback).__name__ for callback in build_recipe(recipe, **options)]


def find(callbacks, kind):
    (found,) = (callback for callback in callbacks if isinstance(callback, kind))
    return found


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_stands_alone(recipe):
    callbacks = build_recipe(recipe)
    check_recipe(callbacks)
    assert build_recipe(recipe)[0] is not callbacks[0]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_option_that_a_recipe_shows_is_one_that_it_takes(recipe):
    parameters = inspect.signature(RECIPES[recipe]).parameters.values()
    assert build_recipe(recipe, **{parameter.name: parameter.default for parameter in parameters})


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (0.02, 0.1)),
        ({"alpha": 0}, (0, 0.1)),
        ({"replay_alpha": 0.3}, (0.02, 0.3)),
    ],
)
def test_modx_plus_holds_replayed_rows_harder(options, expected):
    modx = find(build_recipe("modx_plus", **options), ModX)
    assert (modx.alpha, modx.replay_alpha) == expected


def test_modx_plus_with_the_alpha_of_a_budget_is_refused_with_the_way_to_have_it():
    with pytest.raises(ValueError, match=r"leave out replay_alpha, or take modx\+er in the place of modx_plus"):
        build_recipe("modx_plus", alpha="auto")


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match="no recipe 'modix'.*finetune.*modx"):
        build_recipe("modx+modix")


@pytest.mark.parametrize("recipe", ["modx", "zscl", "zscl_star", "kl", "frozen"])
def test_unknown_option_names_those_there_are(recipe):
    known = list(inspect.signature(RECIPES[recipe]).parameters)
    with pytest.raises(ValueError, match=f"has no option beta. Options: {', '.join(known) or 'none'}"):
        build_recipe(recipe, beta=1)


def test_options_reach_the_callbacks_of_zscl():
    callbacks = build_recipe("zscl", consolidation=0.5, ensemble_every=7, images_per_step=3, teacher="previous")
    assert find(callbacks, L2SP).weight == 0.5
    assert find(callbacks, WeightEnsemble).every == 7
    reference = find(callbacks, ReferenceDistillation)
    assert (reference.images_per_step, reference.teacher) == (3, "previous")


def test_logit_scale_of_zscl_may_be_trained():
    assert "FixedLogitScale" in names("zscl") and "FixedLogitScale" not in names("zscl", freeze_logit_scale=False)


# ---- Combinations ----


@pytest.mark.parametrize(
    ("recipe", "callbacks", "owner"),
    [
        ("modx+er+weight_ensemble", ["ModX", "ExperienceReplay", "WeightEnsemble"], "ModX"),
        ("er+modx", ["ExperienceReplay", "ModX"], "ModX"),
        ("ewc+er", ["EWC", "ExperienceReplay"], "ExperienceReplay"),
        ("modx+ewc", ["ModX", "EWC"], "ModX"),
        ("ewc+l2sp+wise_ft", ["Contrastive", "EWC", "L2SP", "WiseFT"], "Contrastive"),
        ("finetune + lwf", ["Contrastive", "LwF"], "Contrastive"),
        ("cumulative+lwf", ["Cumulative", "LwF"], "Cumulative"),
        (
            "zscl+er",
            ["ReferenceDistillation", "L2SP", "WeightEnsemble", "FixedLogitScale", "ExperienceReplay"],
            "ExperienceReplay",
        ),
    ],
)
def test_combination_has_one_contrastive_term(recipe, callbacks, owner):
    built = build_recipe(recipe)
    assert [type(callback).__name__ for callback in built] == callbacks
    assert [type(callback).__name__ for callback in built if callback.owns_contrastive] == [owner]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("joint+modx", "Joint and ModX each bring the contrastive term"),
        ("wise_ft+weight_ensemble", "WiseFT and WeightEnsemble each decide which weights"),
        ("zscl+wise_ft", "WeightEnsemble and WiseFT each decide which weights"),
        ("cclip+weight_ensemble", "WiseFT and WeightEnsemble each decide which weights"),
        ("cclip+wise_ft", "Two parts of the recipe bring WiseFT"),
        ("modx_plus+er", "Two parts of the recipe bring ExperienceReplay"),
        ("frozen+modx", "Frozen trains nothing: ModX"),
        ("modx+kl", "Two parts of the recipe bring ModX"),
        ("zscl+l2sp", "Two parts of the recipe bring L2SP"),
        ("zscl+zscl_star", "Two parts of the recipe bring ReferenceDistillation"),
        ("ewc+ewc", "Two parts of the recipe bring EWC"),
        ("modx+", "no recipe ''"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_with_the_reason(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        build_recipe(recipe)


def test_options_of_a_combination_are_given_by_part():
    callbacks = build_recipe("modx+ewc", modx={"alpha": 5}, ewc={"weight": 10.0})
    assert (find(callbacks, ModX).alpha, find(callbacks, EWC).weight) == (5, 10.0)


def test_options_of_a_single_recipe_may_be_given_by_part_too():
    assert find(build_recipe("modx", modx={"alpha": 5}), ModX).alpha == 5


@pytest.mark.parametrize("options", [{"alpha": 5}, {"modx": 5}, {"modx": {"alpha": 5}, "er": {}}])
def test_options_of_a_combination_that_name_no_part_are_refused(options):
    with pytest.raises(ValueError, match=r'given by part, modx, ewc: \{"modx": \{"option": value\}\}'):
        build_recipe("modx+ewc", **options)


def test_owner_that_is_told_to_leaves_the_term_to_another():
    callbacks = build_recipe("cumulative+modx", modx={"contrastive": False})
    assert [callback.owns_contrastive for callback in callbacks] == [True, False]


# ---- Lists ----


def test_list_of_parts_carries_their_options():
    callbacks = build_recipe([{"modx": {"alpha": 5}}, "weight_ensemble", {"ewc": None}])
    assert [type(callback).__name__ for callback in callbacks] == ["ModX", "WeightEnsemble", "EWC"]
    assert find(callbacks, ModX).alpha == 5


def test_mapping_of_several_parts_is_a_list_of_them():
    assert names([{"modx": {"alpha": 5}, "er": {"memory_size": 10}}]) == ["ModX", "ExperienceReplay"]


def test_callbacks_of_a_list_stay_as_they_are():
    own = L2SP(3.0)
    assert build_recipe(["modx", own])[1] is own
    callbacks = [Contrastive(), ModX(contrastive=False)]
    assert build_recipe(callbacks) == callbacks
    assert build_recipe([]) == []


def test_callback_that_gives_up_its_term_is_copied():
    own = ExperienceReplay(memory_size=7)
    found = build_recipe(["modx", own])[1]
    assert own.owns_contrastive and not found.owns_contrastive and found.memory_size == 7


def test_list_takes_no_options_beside_it():
    with pytest.raises(ValueError, match="beside their part"):
        build_recipe(["modx"], alpha=5)


@pytest.mark.parametrize(("part", "shown"), [(7, "not 7"), ({"er": 7}, "not {'er': 7}")])
def test_part_that_is_nothing_of_the_kind_is_refused(part, shown):
    with pytest.raises(ValueError, match=shown):
        build_recipe(["modx", part])


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("modx", "modx"),
        ("modx + er", "modx+er"),
        ([{"modx": {"alpha": 5}}, "er"], "modx+er"),
        ([Contrastive(), L2SP()], "Contrastive+L2SP"),
        (["ewc", L2SP()], "ewc+L2SP"),
    ],
)
def test_name_of_a_recipe_is_that_of_its_parts(recipe, name):
    assert recipe_name(recipe) == name


# ---- Where recipes go ----


def test_trainer_takes_a_combination(model, make_args, processor, pairs):
    trainer = ModXTrainer(
        model=model,
        args=make_args(max_steps=2),
        train_dataset=pairs,
        processing_class=processor,
        loss_callbacks="modx+l2sp+weight_ensemble",
    )
    trainer.train()
    assert {"contrastive", "modx_distillation", "l2sp"} <= set(trainer.state.log_history[0])


def test_settings_of_every_part_are_in_the_identity_of_a_run(make_args):
    recipe = "modx+ewc+weight_ensemble+er"
    changed = {
        "modx": {"alpha": 3.0},
        "ewc": {"gamma": 0.5},
        "weight_ensemble": {"every": 7},
        "er": {"memory_size": 9},
    }
    before = run_identity(recipe, build_recipe(recipe), make_args(), make_stream())["recipe_args"]
    now = run_identity(recipe, build_recipe(recipe, **changed), make_args(), make_stream())["recipe_args"]
    assert [name for name in before if before[name] != now[name]] == list(before)
    assert find(build_recipe(recipe), ExperienceReplay).memory_size == before["ExperienceReplay"]["memory_size"]


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "previous"},
        {"images_per_step": 8},
        {"texts_per_step": 8},
        {"temperature": 1.0},
        {"weight": 5.0},
        {"distill_text_tower": True},
        {"consolidation": 0.5},
        {"ensemble_every": 10},
        {"freeze_logit_scale": False},
        {"classes": True},
    ],
)
def test_every_option_of_zscl_is_in_the_identity_of_a_run(make_args, change):
    before, now = (
        run_identity("zscl", build_recipe("zscl", **options), make_args(), make_stream())["recipe_args"]
        for options in ({}, change)
    )
    assert before != now


# ---- Whole runs: what goes from phase to phase, and what an interruption leaves ----

OPTIONS = {
    "ewc": {"weight": 50.0, "batches": 2},
    "weight_ensemble": {"every": 2},
    "zscl": {"ensemble_every": 2, "images_per_step": 4},
    "zscl+ewc": {"zscl": {"ensemble_every": 2, "images_per_step": 4}, "ewc": {"batches": 2}},
}
EVERYTHING_KEPT = "zscl+ewc"
"""A teacher's answers, a mean of weights and a Fisher matrix."""


@pytest.fixture
def run(model, processor, make_args):
    def run(recipe, stream=None, callbacks=(), recipe_args=None, **changes):
        continual = ContinualRun(
            stream or make_stream(),
            recipe,
            make_args(**{"max_steps": 4, **changes}),
            model=model,
            processing_class=processor,
            recipe_args=OPTIONS.get(recipe) if recipe_args is None and isinstance(recipe, str) else recipe_args,
            callbacks=callbacks,
        )
        continual.run()
        return continual

    return run


def state(run, number):
    path = run.folder / "state" / f"phase-{number}.safetensors"
    return load_file(path) if path.exists() else {}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Watch(TrainerCallback):
    """Where each phase starts, its steps and its data."""

    def __init__(self):
        self.seen = {}

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.seen[int(args.output_dir[-1])] = (start, state.max_steps, len(train_dataloader.dataset))


def test_frozen_leaves_the_start_model_after_every_phase(run):
    continual = run("frozen")
    assert same(weights(continual, 1), weights(continual, 0)) and same(weights(continual, 2), weights(continual, 0))
    results = json.loads((continual.folder / "results.json").read_text())
    assert [record["steps"] for record in results["training"]] == [0, 0]
    for matrix in results["matrix"].values():
        assert matrix[0] == matrix[1] == matrix[2]


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}])
def test_cumulative_goes_on_with_all_data_for_the_steps_of_one_phase(run, length):
    watch = Watch()
    continual = run("cumulative", callbacks=[watch], **length)
    assert same(watch.seen[2][0], weights(continual, 1))
    steps = 3 if length["max_steps"] == 3 else 2
    assert [watch.seen[number][1:] for number in (1, 2)] == [(steps, 18), (steps, 27)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["wise_ft", EVERYTHING_KEPT])
def test_run_interrupted_after_a_last_step_still_ends_its_phase(run, tmp_path, recipe):
    class StopAtSave(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise SystemError("power cut")

    settings = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(SystemError):
        run(recipe, callbacks=[StopAtSave()], **settings)
    resumed = run(recipe, **settings)
    whole = run(recipe, output_dir=str(tmp_path / "whole"), **settings)
    for number in (1, 2):
        assert same(weights(resumed, number), weights(whole, number)), number
        assert same(state(resumed, number), state(whole, number)), number


@pytest.mark.slow
def test_run_interrupted_before_publishing_writes_the_same_state_again(run, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2}
    publish = ContinualRun._publish

    def fail(self, number, *args):
        if number == 2:
            raise SystemError("power cut")
        publish(self, number, *args)

    monkeypatch.setattr(ContinualRun, "_publish", fail)
    with pytest.raises(SystemError):
        run("ewc", **settings)
    monkeypatch.undo()
    resumed, whole = run("ewc", **settings), run("ewc", output_dir=str(tmp_path / "whole"), **settings)
    assert same(state(resumed, 2), state(whole, 2)) and same(weights(resumed, 2), weights(whole, 2))


@pytest.mark.slow
def test_more_phases_end_with_the_weights_of_one_long_run(run, tmp_path):
    run(EVERYTHING_KEPT, make_stream(2))
    grown = run(EVERYTHING_KEPT, make_stream(3))
    whole = run(EVERYTHING_KEPT, make_stream(3), output_dir=str(tmp_path / "whole"))
    assert same(weights(grown, 3), weights(whole, 3))


@pytest.mark.slow
def test_run_that_fell_over_starts_its_phase_with_the_state_from_before(run, model, processor, make_args, tmp_path):
    fail = StopAt(2, 2)
    settings = {"model": model, "processing_class": processor, "recipe_args": OPTIONS["ewc"]}
    continual = ContinualRun(make_stream(), "ewc", make_args(max_steps=4), callbacks=[fail], **settings)
    with pytest.raises(SystemError):
        continual.run()
    fail.step = None
    continual.run()
    assert same(weights(continual, 2), weights(run("ewc", output_dir=str(tmp_path / "whole")), 2))


@pytest.mark.slow
def test_teacher_of_zscl_is_the_initial_model_after_a_restart(run):
    kept = state(run("zscl", make_stream(1)), 1)
    assert kept and same(kept, state(run("zscl", make_stream(2)), 2))


@pytest.mark.slow
def test_base_is_protected_in_the_first_phase(run, tmp_path):
    with_base, without = run("ewc"), run("ewc", PhaseStream(make_stream().phases), output_dir=str(tmp_path / "other"))
    finetuned = run("finetune", output_dir=str(tmp_path / "finetune"))
    assert not same(weights(with_base, 1), weights(finetuned, 1))
    assert same(weights(without, 1), weights(finetuned, 1))
    assert any(tensor.any() for tensor in state(with_base, 0).values())


def test_zscl_without_a_base_wants_reference_data_before_anything_is_trained(run, tmp_path):
    with pytest.raises(ValueError, match="no reference images"):
        run("zscl", PhaseStream(make_stream().phases))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_lost_state_is_named(run):
    continual = run("ewc", make_stream(2))
    shutil.rmtree(continual.folder / "state")
    with pytest.raises(FileNotFoundError, match=r"phase-2\.safetensors is needed to go on.*EWC"):
        run("ewc", make_stream(3))


def test_recipe_that_keeps_nothing_writes_no_state(run):
    continual = run("modx")
    assert not (continual.folder / "state").exists()


def test_what_a_phase_leaves_is_its_ensemble(run):
    raw = {}

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            raw[args.output_dir[-1]] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    watch = Watch()
    continual = run("weight_ensemble", callbacks=[Keep(), watch])
    assert not same(weights(continual, 1), raw["1"])
    assert same(watch.seen[2][0], weights(continual, 1))


def test_combination_and_its_options_are_those_of_the_run(run):
    continual = run("modx+ewc", recipe_args={"modx": {"alpha": 5}, "ewc": {"batches": 2}})
    record = json.loads((continual.folder / "run.json").read_text())["identity"]
    assert record["recipe"] == "modx+ewc"
    assert record["recipe_args"]["ModX"]["alpha"] == 5 and record["recipe_args"]["EWC"]["batches"] == 2


def test_list_of_parts_is_the_same_run_as_its_name(run):
    run("modx+ewc", recipe_args={"ewc": {"batches": 2}})
    assert run(["modx", {"ewc": {"batches": 2}}]).recipe_name == "modx+ewc"


def test_callbacks_of_ones_own_see_the_boundaries_of_every_phase(run):
    events = []

    class Own(LossCallback):
        def start_run(self, base):
            events.append(f"run on {len(base)}")

        def start_phase(self, phase):
            events.append("start")

        def finish_phase(self, phase):
            events.append("finish")

    run(["finetune", Own()])
    assert events == ["run on 9", "start", "finish", "start", "finish"]


@pytest.mark.slow
def test_run_goes_on_from_the_hub_with_its_state(run, hub, tmp_path):
    published = {"push_to_hub": True, "hub_model_id": "owner/run"}
    run(EVERYTHING_KEPT, make_stream(1), **published)
    elsewhere = run(EVERYTHING_KEPT, make_stream(2), output_dir=str(tmp_path / "elsewhere"), **published)
    whole = run(EVERYTHING_KEPT, make_stream(2), output_dir=str(tmp_path / "whole"))
    assert same(weights(elsewhere, 2), weights(whole, 2))
    assert not (elsewhere.phase_folder(1) / "loss_callbacks.safetensors").exists()


def run_on_processes(folder, batch_size):
    processor = tiny_processor()
    args = ModXTrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=4,
        optim="sgd",
        learning_rate=0.02,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model, recipe = tiny_clip(processor), "zscl+ewc"
    ContinualRun(
        make_stream(), recipe, args, model=model, processing_class=processor, recipe_args=OPTIONS[recipe]
    ).run()


@pytest.mark.slow
def test_two_processes_run_the_phases_of_one(tmp_path):
    for number in (1, 2):
        launch(number, run_on_processes, tmp_path / str(number), 8 // number)
    for file in ("phase-1/model.safetensors", "phase-2/model.safetensors", "state/phase-2.safetensors"):
        one, two = (load_file(tmp_path / str(number) / file) for number in (1, 2))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=f"{file}: {name}")
