"""Whole runs that replay: what is in the memory of which phase, interruptions, and more phases."""

import json
import shutil

import pytest
import torch
from datasets import Image, load_from_disk
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_modx import ContinualRun, ModXTrainingArguments, Phase, PhaseStream

from launch import launch
from test_continual import StopAt, make_stream, same, weights
from tiny import tiny_clip, tiny_pairs, tiny_processor

SMALL = {"memory_size": 6, "batch_share": 0.3}
REPLAYING = ["der", "incclip"]  # the first is "er" with embeddings beside the pairs


@pytest.fixture
def run(model, processor, make_args):
    def run(recipe="er", stream=None, callbacks=(), recipe_args=SMALL, **changes):
        continual = ContinualRun(
            stream or make_stream(),
            recipe,
            make_args(**{"max_steps": 3, **changes}),
            model=model,
            processing_class=processor,
            recipe_args=recipe_args,
            callbacks=callbacks,
        )
        continual.run()
        return continual

    return run


def table(run, number):
    return load_from_disk(run.folder / "memory" / f"phase-{number}")


def content(run, number):
    return table(run, number).cast_column("image", Image(decode=False)).to_list()


def test_memory_holds_pairs_of_the_base_and_of_the_phases_before(run, caplog):
    continual = run(stream=make_stream(3))
    assert sorted(path.name for path in (continual.folder / "memory").iterdir()) == ["phase-0", "phase-1", "phase-2"]
    assert set(table(continual, 0)["learned_in_phase"]) == {0}
    assert set(table(continual, 2)["learned_in_phase"]) <= {0, 1, 2}
    assert len(table(continual, 2)) == 6
    training = json.loads((continual.folder / "results.json").read_text())["training"]
    assert [record["memory_pairs"] for record in training] == [6, 6, 6]
    assert "nothing to replay" not in caplog.text


def test_first_phase_without_a_base_replays_nothing_and_is_told(run, caplog):
    stream = PhaseStream(make_stream(2).phases)
    continual = run(stream=stream)
    assert "There is nothing to replay in 'part 1', the first phase." in caplog.text
    assert sorted(path.name for path in (continual.folder / "memory").iterdir()) == ["phase-1"]
    training = json.loads((continual.folder / "results.json").read_text())["training"]
    assert [record.get("memory_pairs") for record in training] == [None, 6]


def test_new_pairs_are_stored_as_the_model_embeds_them_that_learned_them(run, processor):
    continual = run("der")
    for number in (0, 1):
        model = tiny_clip(processor)
        model.load_state_dict(weights(continual, number))
        origin = table(continual, 1)["learned_in_phase"]
        rows = table(continual, 1).select([row for row, phase in enumerate(origin) if phase == number])
        assert len(rows) > 0
        pixels = processor.image_processor(list(rows["image"]), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = model.eval().get_image_features(pixel_values=pixels).pooler_output
        expected = torch.nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(torch.tensor(rows["image_embedding"][:]), expected, rtol=0, atol=1e-5)


class StopInMemory(TrainerCallback):
    """Fall over when training is about to begin: the memory is there, nothing is trained yet."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith("phase-2"):
            raise SystemError("power cut")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", REPLAYING)
def test_interrupted_run_has_the_memory_and_the_weights_of_an_undisturbed_one(run, tmp_path, recipe):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    for stop in (StopInMemory(), StopAt(2, 3)):
        with pytest.raises(SystemError):
            run(recipe, callbacks=[stop], **settings)
    resumed = run(recipe, **settings)
    whole = run(recipe, **settings, output_dir=str(tmp_path / "whole"))
    assert content(resumed, 1) == content(whole, 1)
    assert same(weights(resumed, 2), weights(whole, 2))


@pytest.mark.slow
def test_lost_memory_is_made_again(run, tmp_path):
    recipe = "der"  # whose memory holds the most
    first = run(recipe)
    before = content(first, 1)
    shutil.rmtree(first.folder / "memory")
    grown = run(recipe, make_stream(3))
    whole = run(recipe, make_stream(3), output_dir=str(tmp_path / "whole"))
    assert content(grown, 1) == before
    assert same(weights(grown, 3), weights(whole, 3))


def test_memory_of_a_start_that_was_given_up_is_not_used(run):
    with pytest.raises(SystemError):
        run(callbacks=[StopAt(1, 1)])
    other = make_stream()
    other = PhaseStream(other.phases, base=Phase("other base", tiny_pairs(9, style="yellow", start=30)))
    continual = run(stream=other)
    assert set(table(continual, 0)["pair_id"]) <= {number % 48 for number in range(30, 39)}


def test_other_size_of_the_memory_is_another_run(run, monkeypatch):
    run()
    monkeypatch.setitem(SMALL, "memory_size", 5)
    with pytest.raises(ValueError, match="recipe_args"):
        run()


def run_phases(folder, batch_size, recipe):
    processor = tiny_processor()
    data = tiny_pairs(48)
    parts = [Phase(str(k), data.select(range(16 * k, 16 * k + 16))) for k in range(3)]
    stream = PhaseStream(tuple(parts[1:]), base=parts[0], extra_tests={"test": tiny_pairs(8, style="yellow")})
    args = ModXTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4,
        max_steps=5,
        optim="sgd",
        learning_rate=0.05,
        warmup_steps=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = tiny_clip(processor)
    ContinualRun(stream, recipe, args, model=model, processing_class=processor, recipe_args=SMALL).run()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", REPLAYING)
def test_two_processes_keep_and_train_what_one_does(tmp_path, recipe):
    launch(1, run_phases, tmp_path / "one", 8, recipe)
    launch(2, run_phases, tmp_path / "two", 4, recipe)
    for number in (0, 1):
        one, two = (load_from_disk(tmp_path / name / "memory" / f"phase-{number}") for name in ("one", "two"))
        assert one["pair_id"][:] == two["pair_id"][:]
    for number in (1, 2):
        one, two = (load_file(tmp_path / name / f"phase-{number}" / "model.safetensors") for name in ("one", "two"))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
