"""A run that is killed anywhere, and started again, ends as if nothing had been.

    KILL_POINTS=50 python -m pytest -m "" tests/test_kill_points.py

draws so many points for the main recipe and a tenth of it for every other. That takes an hour of one core; without it
there is one point, and in the full suite one for recipes that keep more than weights.
"""

import os

import pytest
from kill_points import differences, drawn, in_a_process, outcome

from hf_modx import RECIPES, ContinualRun, ModXTrainingArguments
from hf_modx.recipes import recipe_arguments

from test_continual import make_stream
from tiny import tiny_clip, tiny_processor

MAIN = "modx+er+weight_ensemble"
# An ensemble of the first weights alone would be the same whatever is done to the steps.
OPTIONS = {
    MAIN: {"weight_ensemble": {"every": 2}},
    "weight_ensemble": {"every": 2},
    "zscl": {"ensemble_every": 2},
    "zscl_star": {"ensemble_every": 2},
}
POINTS = int(os.environ.get("KILL_POINTS", "1"))
OTHERS = list(RECIPES) if "KILL_POINTS" in os.environ else ["ewc", "incclip"]


def run_of(recipe, folder):
    """The run as a function of the points that it comes by: two phases of which each saves twice, with all that is
    written beside."""
    processor, stream = tiny_processor(), make_stream()

    def run(points):
        args = ModXTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=5,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=1,
            logging_steps=3,
            teacher_cache="disk",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **recipe_arguments(recipe),
        )
        ContinualRun(
            stream,
            recipe,
            args,
            model=tiny_clip(processor),
            processing_class=processor,
            recipe_args=OPTIONS.get(recipe),
            callbacks=[points],
        ).run()

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By recipe: the points of a whole run and what it leaves."""
    known = {}

    def undisturbed(recipe):
        if recipe not in known:
            root = tmp_path_factory.mktemp("whole")
            status, names = in_a_process(root, run_of(recipe, root / "run"))
            assert status == 0
            whole = outcome(root / "run")
            weights = {digest for name, digest in whole["weights"].items() if name.startswith("phase-")}
            assert len(weights) == (1 if recipe == "frozen" else 3)  # there is something to be lost
            known[recipe] = names, whole
        return known[recipe]

    return undisturbed


def check(undisturbed, recipe, seed, root):
    names, whole = undisturbed(recipe)
    run = run_of(recipe, root / "run")
    cuts = drawn(names, f"{recipe} {seed}")
    told = [f"{cut} {names[cut.point]}" for cut in cuts[:1]] + [str(cut) for cut in cuts[1:]]
    for cut in cuts:
        in_a_process(root, run, cut)
    status, _ = in_a_process(root, run)
    assert status == 0
    assert not differences(outcome(root / "run"), whole), told


@pytest.mark.parametrize("seed", range(POINTS))
def test_main_recipe(undisturbed, tmp_path, seed):
    check(undisturbed, MAIN, seed, tmp_path)


@pytest.mark.parametrize("seed", range(max(1, POINTS // 10)))
@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_every_recipe(undisturbed, tmp_path, recipe, seed):
    check(undisturbed, recipe, seed, tmp_path)
