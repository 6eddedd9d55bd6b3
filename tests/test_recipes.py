"""Recipes by name, alone and added up."""

import inspect

import pytest

from hf_modx import RECIPES, Contrastive, ModX, ModXTrainer, build_recipe
from hf_modx.callbacks import EWC, L2SP, ExperienceReplay, ReferenceDistillation, WeightEnsemble, check_recipe
from hf_modx.identity import run_identity
from hf_modx.recipes import recipe_name

from test_continual import make_stream


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
            "zscl+modx",
            ["ReferenceDistillation", "L2SP", "WeightEnsemble", "FixedLogitScale", "ModX"],
            "ModX",
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


def test_list_takes_no_options_beside_it():
    with pytest.raises(ValueError, match="beside their part"):
        build_recipe(["modx"], alpha=5)


def test_part_that_is_nothing_of_the_kind_is_refused():
    with pytest.raises(ValueError, match="not 7"):
        build_recipe(["modx", 7])


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
