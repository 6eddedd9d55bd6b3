"""What needs a GPU: every recipe trains there what it trains on a CPU, in half precision too, and goes on exactly.

All of it is skipped where there is no GPU.
"""

import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_modx import RECIPES, ContinualRun

from test_continual import make_stream
from tiny import tiny_clip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="about a GPU, and there is none here")


@pytest.fixture
def run(processor, make_args, tmp_path):
    def run(recipe, folder="out", callbacks=(), **changes):
        settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.05, "use_cpu": False, "tf32": False, **changes}
        continual = ContinualRun(
            make_stream(),
            recipe,
            make_args(output_dir=str(tmp_path / folder), **settings),
            model=tiny_clip(processor),
            processing_class=processor,
            callbacks=list(callbacks),
        )
        continual.run()
        return load_file(continual.phase_folder(2) / "model.safetensors")

    return run


def largest_difference(first, second):
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_gpu_trains_the_weights_of_the_cpu(run, recipe):
    assert largest_difference(run(recipe), run(recipe, folder="cpu", use_cpu=True)) < 2e-3


@pytest.mark.parametrize("changes", [{"gradient_cache_chunk_size": 3}, {"teacher_cache": "disk"}])
def test_chunks_and_cached_teacher_train_the_same_weights(run, changes):
    assert largest_difference(run("modx"), run("modx", folder="other", **changes)) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_half_precision_trains(run, recipe, precision):
    found = run(recipe, optim="adamw_torch", learning_rate=1e-3, **{precision: True})
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    single = run(recipe, folder="single", optim="adamw_torch", learning_rate=1e-3)
    assert largest_difference(found, single) < 2e-2


class Stop(TrainerCallback):
    """An interruption in the second phase."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("phase-2") and state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(run, recipe):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    with suppress(KeyboardInterrupt):
        run(recipe, callbacks=[Stop()], **saving)
    assert largest_difference(run(recipe, **saving), run(recipe, folder="undisturbed", **saving)) < 1e-5


def test_energy_of_a_phase_is_in_the_results(run, tmp_path):
    pytest.importorskip("pynvml", reason="the energy counters of the driver are read through nvidia-ml-py")
    run("modx")
    (first, second) = json.loads((tmp_path / "out" / "results.json").read_text())["training"]
    assert 0 < first["train_energy_joules"] < 1e6 and 0 < second["train_energy_joules"] < 1e6
