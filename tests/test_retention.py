"""The retention budget: looks, policies, what is left after every owner of the weights, interruption, the price."""

import json
import warnings

import peft
import pytest
import torch
from datasets import Dataset, Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_modx import ContinualRun, Contrastive, ModX, ModXTrainer, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.adapter import add_adapter
from hf_modx.callbacks import RetentionBudget
from hf_modx.evaluation import RetrievalTest, ZeroShotTest
from hf_modx.interpolation import WeightInterpolation, require_interpolation, snapshot
from hf_modx.model_card.keeping import kept_rows_notes, retention_notes
from hf_modx.model_card.training import phases_table
from hf_modx.run.retention import load_retention_tests
from hf_modx.trained_weights import adapters_merged, trained_weights

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor

METRIC = "image_to_text_mrr"


def slow(*values):
    """A case of the full run."""
    return pytest.param(*values, marks=pytest.mark.slow)


BUDGET = 0.1


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Weights of a model that knows the first half of the pairs."""
    processor = tiny_processor()
    model = tiny_clip(processor)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = ModXTrainer(
            model,
            _args(tmp_path_factory.mktemp("known"), max_steps=40, learning_rate=5e-3, max_forgetting=None),
            train_dataset=tiny_pairs(24),
            processing_class=processor,
            loss_callbacks="finetune",
        )
        trainer.train()
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def _args(folder, **changes):
    settings = {
        "per_device_train_batch_size": 12,
        "max_steps": 10,
        "learning_rate": 3e-3,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "spatial_disorder": False,
        "max_forgetting": BUDGET,
        "retention_metric": METRIC,
        "retention_steps": 2,
    }
    return ModXTrainingArguments(output_dir=str(folder), **{**settings, **changes})


def unlearning_stream(phases=1):
    """Phases that call the known pictures by each other's names: whoever learns them forgets."""
    data = tiny_pairs(24)
    captions = data["caption"]
    parts = []
    for k in range(1, phases + 1):
        turned = [captions[(row + 5 * k) % 24] for row in range(24)]
        wrong = data.remove_columns("caption").add_column("caption", turned, feature=data.features["caption"])
        parts.append(Phase(f"wrong {k}", wrong, tiny_pairs(12, style="other", start=12 * k)))
    return PhaseStream(tuple(parts), base=Phase("right", tiny_pairs(24), tiny_pairs(24, style="other")))


@pytest.fixture(scope="module")
def run(known, tmp_path_factory, processor):
    """A run from the known weights. Without a folder and callbacks the same settings are run once for all tests."""
    done = {}

    def run(recipe="finetune", phases=1, folder=None, callbacks=(), recipe_args=None, **changes):
        settings = repr([recipe, phases, recipe_args, sorted(changes.items())])
        shared = folder is None and not callbacks
        if shared and settings in done:
            return done[settings]
        model = tiny_clip(processor)
        model.load_state_dict(known)
        continual = ContinualRun(
            unlearning_stream(phases),
            recipe,
            _args(folder or tmp_path_factory.mktemp("run"), **changes),
            model=model,
            processing_class=processor,
            callbacks=callbacks,
            recipe_args=recipe_args,
        )
        continual.run()
        if shared:
            done[settings] = continual
        return continual

    return run


def results(run):
    return json.loads((run.folder / "results.json").read_text())


def record(run, number=1):
    return results(run)["training"][number - 1]["retention"]


def weights(run, number=1):
    return load_file(run.phase_folder(number) / "model.safetensors")


def loss_in(run, number=1):
    """What the matrix says that a phase has forgotten."""
    matrix = results(run)["matrix"][METRIC]
    old = range(number)  # the base's test and those of the phases before
    before, after = (sum(matrix[row][test] for test in old) for row in (number - 1, number))
    return 1 - after / before


def test_without_a_budget_the_stream_makes_forget(run):
    assert loss_in(run(max_forgetting=None)) > 2 * BUDGET


@pytest.mark.parametrize("policy", ["stop", slow("restore"), "interpolate"])
def test_every_phase_ends_within_the_budget(run, policy):
    continual = run(phases=2, on_forgetting=policy)
    for number in (1, 2):
        found = record(continual, number)
        assert loss_in(continual, number) <= BUDGET + 1e-9
        assert found["forgetting"] == pytest.approx(loss_in(continual, number), abs=1e-9)
        assert found["evaluations"] == 2 + len(found["looks"]) + (6 if found["action"] == "interpolated" else 0)
    assert record(continual)["forgetting_of_training"] > BUDGET


def test_stop_takes_fewer_steps_and_leaves_the_weights_before_the_break(run):
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    continual = run(on_forgetting="stop", retention_steps=1, callbacks=[Keep()])
    found = record(continual)
    assert found["steps"] == found["stopped_at"] == max(seen) < found["planned_steps"] == 10
    assert 0 < found["restored_step"] == found["stopped_at"] - 1
    kept = weights(continual)
    assert all(torch.equal(kept[name], seen[found["restored_step"]][name]) for name in kept)


def test_interpolation_leaves_the_mixture_that_it_says(run):
    free, held = run(max_forgetting=None), run(phases=2, on_forgetting="interpolate")
    weight = record(held)["weight"]
    assert 0 < weight < 1
    start, end, kept = weights(free, 0), weights(free), weights(held)
    for name in kept:
        torch.testing.assert_close(kept[name], torch.lerp(start[name], end[name], weight), atol=1e-6, rtol=0)


def test_looks_change_nothing_in_training(run):
    free = run(max_forgetting=None)
    held = run(max_forgetting=0.99)
    assert record(held)["action"] == "none"
    assert all(torch.equal(tensor, weights(held)[name]) for name, tensor in weights(free).items())


class AtTheEnd(TrainerCallback):
    """The weights of the last step."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_looks_leave_the_random_numbers_of_training_alone(known, processor, tmp_path):
    found = []
    for every in (2, 10):  # ten: there is no look in between
        model = tiny_clip(processor)
        model.load_state_dict(known)
        for layer in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
            layer.self_attn.dropout = 0.2
        last = AtTheEnd()
        trainer, _ = watched(model, processor, tmp_path, every, callbacks=[last])
        trainer.train()
        found.append(last.weights)
    looked, free = found
    assert all(torch.equal(weight, free[name]) for name, weight in looked.items())


@pytest.mark.parametrize(
    ("owner", "policy"),
    [
        ("weight_ensemble", "interpolate"),
        slow("weight_ensemble", "restore"),
        slow("wise_ft", "interpolate"),
        slow("wise_ft", "restore"),
    ],
)
def test_promise_is_on_what_the_owner_of_the_weights_leaves(run, owner, policy):
    options = {"every": 1} if owner == "weight_ensemble" else {"weight": 0.8}
    continual = run(owner, recipe_args=options, on_forgetting=policy, max_steps=16)
    assert record(continual)["forgetting_of_training"] > BUDGET
    assert loss_in(continual) <= BUDGET + 1e-9


@pytest.mark.parametrize(
    ("recipe", "policy"),
    [
        ("weight_ensemble", "restore"),
        slow("finetune", "interpolate"),
        slow("finetune", "restore"),
        slow("wise_ft", "interpolate"),
    ],
)
def test_budget_is_kept_with_an_adapter(run, recipe, policy):
    options = {"weight_ensemble": {"every": 1}, "wise_ft": {"weight": 0.9}}.get(recipe)
    continual = run(
        recipe, recipe_args=options, on_forgetting=policy, peft="lora", learning_rate=2e-2, max_steps=14, lora_rank=4
    )
    assert record(continual)["forgetting_of_training"] > BUDGET
    assert loss_in(continual) <= BUDGET + 1e-9


def adapted(processor, folder):
    """A model with an adapter that has learned, and its trained weights before that."""
    model = add_adapter(tiny_clip(processor), _args(folder, peft="lora", lora_rank=2, train_logit_scale=True))
    require_interpolation(model)
    start = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, start


def test_line_is_that_of_what_an_adapter_does(processor, tmp_path):
    model, start = adapted(processor, tmp_path)
    end = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    line = WeightInterpolation(model, start)
    for weight in (0.3, 0.0, 1.0):
        line.go_to(weight)
        for name, found in trained_weights(model).items():
            torch.testing.assert_close(found, torch.lerp(start[name], end[name], weight), atol=1e-6, rtol=0)


def test_adapter_is_merged_for_a_look_and_as_it_was_after_it(processor, tmp_path):
    model, _ = adapted(processor, tmp_path)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    effect = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    with adapters_merged(model):
        merged = {name: weight.clone() for name, weight in trained_weights(model).items()}
        factors = [weight for name, weight in model.named_parameters() if "lora_B" in name]
        assert factors and not any(factor.any() for factor in factors)
    assert all(torch.equal(effect[name], weight) for name, weight in merged.items())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_going_back_takes_the_base_along(processor, tmp_path):
    model, start = adapted(processor, tmp_path)
    kept, effect = snapshot(model), {name: weight.detach().clone() for name, weight in trained_weights(model).items()}
    base = next(layer.base_layer.weight for layer in model.modules() if hasattr(layer, "base_layer"))
    with torch.no_grad():
        base.add_(1)  # as an owner of the weights may do
    WeightInterpolation(model, start).go_back(kept)
    assert all(torch.equal(effect[name], weight) for name, weight in trained_weights(model).items())


def test_adapters_that_cannot_be_taken_back_are_refused(processor, tmp_path):
    model, _ = adapted(processor, tmp_path)
    with pytest.raises(ValueError, match="has learned before"):
        require_interpolation(model)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own
        dora = peft.get_peft_model(tiny_clip(processor), config)
    with pytest.raises(ValueError, match="DoRA"):
        require_interpolation(dora)


STEERED = {
    "recipe": "modx",
    "recipe_args": {"alpha": "auto", "alpha_start": 1.0},
    "on_forgetting": "restore",
    "logging_steps": 1,
    "max_steps": 8,
    "retention_steps": 1,
}
"""Settings of a run whose alpha follows the price."""


class Die(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["restore", "interpolate"])
def test_killed_phase_goes_on_to_the_same_weights_and_record(run, policy, tmp_path):
    changes = STEERED | {"on_forgetting": policy}
    whole = run(phases=2, **changes)
    saving = {"save_strategy": "steps", "save_steps": 3, "folder": tmp_path, **changes}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Die(5)], **saving)
    resumed = run(**saving)
    assert record(resumed) == record(whole) and record(whole)["forgetting_of_training"] > BUDGET
    assert results(resumed)["training"][0]["resumed_at_step"] == 3
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_phase_that_was_stopped_is_not_trained_further_after_a_kill(run, tmp_path):
    class DieAtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    whole = run(phases=2, on_forgetting="stop")
    changes = {"on_forgetting": "stop", "save_strategy": "steps", "save_steps": 1, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[DieAtTheEnd()], **changes)
    resumed = run(**changes)
    assert record(resumed) == record(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def _two_processes(folder, known):
    torch.set_num_threads(1)
    processor = tiny_processor()
    model = tiny_clip(processor)
    model.load_state_dict(known)
    args = _args(folder, per_device_train_batch_size=6)
    ContinualRun(unlearning_stream(), "finetune", args, model=model, processing_class=processor).run()


@pytest.mark.slow
def test_two_processes_decide_alike(known, tmp_path, run):
    one = run(phases=2, on_forgetting="interpolate")
    launch(2, _two_processes, tmp_path / "two", known)
    two = json.loads((tmp_path / "two" / "results.json").read_text())["training"][0]["retention"]
    alone = record(one)
    assert two["weight"] == alone["weight"] and two["evaluations"] == alone["evaluations"]
    assert [look["step"] for look in two["looks"]] == [look["step"] for look in alone["looks"]]
    assert two["end"]["right"] == pytest.approx(alone["end"]["right"])


# ---- The price, and who pays it ----


def test_price_rises_beyond_the_budget_and_falls_within_it():
    budget = RetentionBudget(0.2)
    prices = []
    for forgetting in (0.4, 0.9, 0.2, 0.0, 0.1):
        budget._raise_price(forgetting)
        prices.append(budget.price)
    assert prices == pytest.approx([2, 4, 4, 2, 2**0.5])
    for _ in range(20):
        budget._raise_price(1.0)
    assert budget.price == 100


def test_price_is_carried_from_phase_to_phase_and_paid(run):
    continual = run(phases=2, **STEERED)
    first, second = (training["log"]["modx_alpha"] for training in results(continual)["training"])
    assert first[0] == 1.0 and max(first) > 1.0
    looks = record(continual)["looks"]  # after all steps but the last
    rises = [min(1, max(-1, look["forgetting"] / BUDGET - 1)) for look in looks]
    assert first == pytest.approx([2 ** sum(rises[:step]) for step in range(len(looks) + 1)], rel=1e-4)
    assert second[0] == pytest.approx(first[-1])


def test_auto_needs_a_budget(run):
    with pytest.raises(ValueError, match="--max_forgetting"):
        run("modx", recipe_args={"alpha": "auto"}, max_forgetting=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": "automatic"}, "number or"),
        ({"alpha": 2.0, "alpha_start": 1.0}, "alpha_start"),
        ({"reference_batch_size": 0}, "at least 1"),
        ({"reference_batch_size": 8, "reduction": "mean"}, "leave one out"),
        ({"alpha": "auto", "replay_alpha": 0.1}, "one weight of all rows"),
        ({"replay_alpha": -0.1}, "replay_alpha must not be negative"),
    ],
)
def test_options_of_alpha_that_do_not_go_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ModX(**options)


def test_nan_is_no_score(known, processor, tmp_path):
    """Of the start nothing can be promised; later all is forgotten, and the price stays a number."""
    model = tiny_clip(processor)
    model.load_state_dict(known)
    scores = [1.0] + 4 * [float("nan")]
    trainer, budget = watched(model, processor, tmp_path, compute_metrics=lambda _: {METRIC: scores.pop(0)})
    with pytest.raises(IndexError):  # the first of those after the training
        trainer.train()
    assert budget.price == 16 and budget._looks == [(step, 1.0) for step in (2, 4, 6, 8)]
    scores.append(float("nan"))
    trainer, _ = watched(model, processor, tmp_path, compute_metrics=lambda _: {METRIC: scores.pop(0)})
    with pytest.raises(ValueError, match="of the phase has NaN"):
        trainer.train()


# ---- Which tests ----


def test_named_test_is_the_one_that_counts(run):
    continual = run(retention_dataset="wrong 1", max_steps=2)
    assert record(continual)["tests"] == {"wrong 1": METRIC}
    with pytest.raises(ValueError, match="holds a different run: recipe_args was"):
        run(folder=continual.folder, retention_dataset="right", max_steps=2)


def test_bad_settings_are_told_before_training(run, tmp_path):
    with pytest.raises(ValueError, match="'elsewhere' .retention_dataset.. The tests are: right, wrong 1"):
        run(retention_dataset="elsewhere")
    with pytest.raises(ValueError, match="needs a budget"):
        _args(tmp_path, max_forgetting=None, retention_dataset="right")
    for changes in ({"max_forgetting": 1.0}, {"on_forgetting": "cry"}, {"retention_steps": 1.5}):
        with pytest.raises(ValueError):
            run(**changes)
    for metric in ("loss", "image_to_text_median_rank"):
        with pytest.raises(ValueError, match=f"Of {metric} less is better"):
            run(retention_metric=metric)


def test_metric_that_a_test_does_not_have_is_told_before_anything_is_trained(known, processor, tmp_path):
    """Also where only a later phase would ask for it."""
    model = tiny_clip(processor)
    labels = Dataset.from_dict({"image": tiny_pairs(4)["image"][:], "label": ["red", "green", "blue", "red"]})
    labels = labels.cast_column("image", Image())
    tests = {"colours": ZeroShotTest(labels, learned_at="wrong 1")}

    def start(**changes):
        return ContinualRun(
            unlearning_stream(2), "finetune", _args(tmp_path, max_steps=2, **changes), model=model,
            processing_class=processor, tests=tests,
        )  # fmt: skip

    with pytest.raises(ValueError, match="The test 'colours' has no metric 'image_to_text_mrr'"):
        start()
    with pytest.raises(ValueError, match="no metric 'image_to_text_mrr@5' .*It has image_to_text_recall@1,"):
        start(retention_metric="image_to_text_mrr@5", retention_dataset="right")
    continual = start(retention_metric=None)
    continual.run()
    assert record(continual, 2)["tests"] == {
        "right": "image_to_text_recall@1", "wrong 1": "image_to_text_recall@1", "colours": "zero_shot_top1"
    }  # fmt: skip


def test_budget_without_anything_old_is_refused(known, processor, tmp_path):
    model = tiny_clip(processor)
    stream = PhaseStream((Phase("new", tiny_pairs(24), tiny_pairs(12, start=24)),))
    with pytest.raises(ValueError, match="no phase has a test of what was learned before"):
        ContinualRun(stream, "finetune", _args(tmp_path), model=model, processing_class=processor)


def test_data_set_becomes_a_test(tmp_path):
    tiny_pairs(12).to_parquet(tmp_path / "old.parquet")
    args = _args(tmp_path / "out", retention_dataset=f"{tmp_path}/old.parquet, right")
    assert load_retention_tests(_args(tmp_path / "out", retention_dataset="right"), ["right"]) == {}
    with pytest.raises(ValueError, match="is no test of the run"):
        load_retention_tests(_args(tmp_path / "out", retention_dataset=f"{tmp_path}/nothing"), ["right"])
    for named in ("{0}/right", "{0}/old.parquet, {0}/again/old.parquet"):
        twice = _args(tmp_path / "out", retention_dataset=named.format(tmp_path))
        with pytest.raises(ValueError, match="which is another"):
            load_retention_tests(twice, ["right"])
    found = load_retention_tests(args, ["right"])
    assert list(found) == ["old.parquet"] and isinstance(found["old.parquet"], RetrievalTest)
    assert args.retention_dataset == "old.parquet,right"


def watched(model, processor, folder, every=2, **options):
    """A Trainer without a run, and its budget."""
    budget = RetentionBudget(BUDGET, every=every, metric=METRIC, tests={"right": tiny_pairs(24, style="other")})
    trainer = ModXTrainer(
        model,
        _args(folder, max_forgetting=None),
        train_dataset=unlearning_stream().phases[0].train,
        processing_class=processor,
        loss_callbacks=[Contrastive(), budget],
        **options,
    )
    return trainer, budget


def test_trainer_alone_takes_a_budget(known, processor, tmp_path):
    model = tiny_clip(processor)
    model.load_state_dict(known)
    trainer, budget = watched(model, processor, tmp_path)
    trainer.train()
    found = budget.results()["retention"]
    assert found["action"] == "interpolated"
    score = trainer.evaluate(tiny_pairs(24, style="other"))[f"eval_{METRIC}"]
    assert 1 - score / found["start"]["right"] <= BUDGET + 1e-9


# ---- What the card says ----


def test_card_states_the_promise_and_the_drift_of_the_scale(run):
    continual = run(phases=2, on_forgetting="interpolate")
    card = (continual.phase_folder(1) / "README.md").read_text()
    start, end = results(continual)["training"][0]["logit_scale"]
    assert start == pytest.approx(weights(continual, 0)["logit_scale"].exp().item())
    assert end == pytest.approx(weights(continual)["logit_scale"].exp().item())
    assert f"| {start:.4g} to {end:.4g} |" in card
    assert (
        "Phase 1: at most 10 % of the mean of Image-to-text MRR on right, which went from" in card
        and "10 of 10 steps, 12 evaluations." in card
    )
    assert retention_notes(results(continual), 1) in card


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.02, "replay_alpha": 0.1}, "| image rows kept | text rows kept |"),
        ({"alpha": 0, "replay_alpha": 0.1}, "| image rows kept, of replayed | text rows kept, of replayed |"),
    ],
)
def test_card_says_of_which_rows_those_kept_are_a_part(options, said):
    identity = {"recipe_args": {"ModX": options}, "phases": [{"name": "one", "rows": 8}]}
    training = [{"image_rows_kept": {"mean": 0.5}, "text_rows_kept": {"mean": 0.5}}]
    assert said in phases_table(identity, {"training": training}, 1)


@pytest.mark.parametrize(("kept", "said"), [(0.01, "fewer than 5 %"), (0.5, None), (0.99, "more than 95 %")])
def test_card_tells_of_phases_with_few_or_nearly_all_rows_kept(kept, said):
    training = [{"image_rows_kept": {"mean": kept}, "text_rows_kept": {"mean": kept}}]
    notes = kept_rows_notes({"recipe_args": {"ModX": {"screen": True, "alpha": 2}}}, {"training": training}, 1)
    assert [note for note in notes if said in note] == notes if said else notes == []
    assert len(notes) == (said is not None)
    assert kept_rows_notes({"recipe_args": {"ModX": {"screen": False}}}, {"training": training}, 1) == []
    of_memory = {"recipe_args": {"ModX": {"screen": True, "alpha": 0}}}
    assert kept_rows_notes(of_memory, {"training": training}, 1) == []
    rectifying = {"recipe_args": {"ModX": {"screen": "rectify", "alpha": 2}}}
    assert kept_rows_notes(rectifying, {"training": training}, 1) == [note for note in notes if "more than" in note]
