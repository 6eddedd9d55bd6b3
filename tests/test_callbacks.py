"""The callbacks of the baselines: their formulas, and what they do before the first and after the last step."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_modx import Contrastive, LossCallback, LossContext, ModX, ModXTrainer, ModXTrainingArguments, PairEmbeddings
from hf_modx.callbacks import (
    EWC,
    L2SP,
    Anchor,
    Cumulative,
    FixedLogitScale,
    Frozen,
    LwF,
    WeightEnsemble,
    WiseFT,
    check_recipe,
)
from hf_modx.distributed import process_index, world_size
from hf_modx.losses import affinity_distillation, info_nce

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor


def trainer_of(model, args, processor, data, loss_callbacks, **options):
    return ModXTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=processor,
        loss_callbacks=loss_callbacks,
        **options,
    )


def train(*args, **options):
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class KeepWeights(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.after_step = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after_step.append(weights(model))


def unit(rows, width, seed):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double))


def random_pairs(rows, width, seed, log_scale):
    scale = torch.tensor(log_scale, dtype=torch.double, requires_grad=True)
    image, text = (unit(rows, width, seed + side).requires_grad_() for side in (0, 1))
    return PairEmbeddings(image, text, scale.exp()), scale


def context_of(rows, model=None, phase_start=None):
    return LossContext(
        model=model,
        batch={},
        pair_ids=torch.arange(rows),
        row_ids=torch.arange(rows),
        is_replay=torch.zeros(rows, dtype=torch.bool),
        step=0,
        epoch=0.0,
        phase_start=phase_start or {},
    )


# ---- Frozen ----


def test_frozen_takes_no_step_and_leaves_the_model_as_it_is(model, make_args, processor, pairs):
    before = weights(model)
    trainer = train(model, make_args(), processor, pairs, [Frozen()])
    assert largest_difference(before, weights(model)) == 0
    assert trainer.state.global_step == 0


# ---- Distillation on the batch ----


def test_lwf_is_the_divergence_of_the_scaled_logits_each_with_its_own_scale():
    student, log_scale = random_pairs(7, 5, seed=1, log_scale=2.0)
    teacher, _ = random_pairs(7, 3, seed=3, log_scale=2.5)

    def by_hand():
        found = 0.0
        for new, old in ((student, teacher), *((flipped(student), flipped(teacher)),)):
            log_new = (new.logit_scale * new.image @ new.text.T / 1.7).log_softmax(dim=1)
            log_old = (old.logit_scale * old.image @ old.text.T / 1.7).log_softmax(dim=1).detach()
            found = found + (log_old.exp() * (log_old - log_new)).sum(dim=1).mean() / 2
        return 0.3 * 1.7**2 * found

    inputs = [student.image, student.text, log_scale]
    term = LwF(weight=0.3, temperature=1.7).loss_terms(student, teacher, context_of(7))["lwf"]
    torch.testing.assert_close(term, by_hand(), rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (term, by_hand()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def flipped(pairs):
    return PairEmbeddings(pairs.text, pairs.image, pairs.logit_scale)


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_replayed_rows_have_an_alpha_of_their_own(alpha):
    student, _ = random_pairs(7, 5, seed=1, log_scale=2.0)
    teacher, _ = random_pairs(7, 3, seed=3, log_scale=2.0)
    replayed = torch.tensor([False, True, False, False, True, True, False])
    expected = 0.0
    for new, old in ((student, teacher), (flipped(student), flipped(teacher))):
        log_new, log_old = ((4 * pairs.image @ pairs.text.T).log_softmax(dim=1) for pairs in (new, old))
        divergences = (log_old.exp() * (log_old - log_new)).sum(dim=1)
        expected = expected + (3 * divergences[replayed].sum() + alpha * divergences[~replayed].sum()) / 2
    callback = ModX(alpha=alpha, distill_scale=4, screen=False, replay_alpha=3)
    terms = callback.loss_terms(student, teacher, replace(context_of(7), is_replay=replayed))
    torch.testing.assert_close(terms["modx_distillation"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["contrastive"], info_nce(student.image, student.text, student.logit_scale))


def test_replay_alpha_in_a_phase_that_replays_nothing_leaves_alpha_alone():
    student, _ = random_pairs(7, 5, seed=1, log_scale=2.0)
    teacher, _ = random_pairs(7, 3, seed=3, log_scale=2.0)
    with_its_own, plain = (
        callback.loss_terms(student, teacher, context_of(7))["modx_distillation"]
        for callback in (ModX(0.5, screen=False, replay_alpha=3), ModX(0.5, screen=False))
    )
    torch.testing.assert_close(with_its_own, plain, rtol=0, atol=1e-12)
    assert plain > 0


def test_replay_alpha_without_replay_is_refused():
    with pytest.raises(
        ValueError, match="ModX is set to concern replayed pairs, and nothing in the recipe replays any"
    ):
        check_recipe([ModX(replay_alpha=1.0)])


def test_kl_distils_rows_that_the_old_model_has_wrong():
    student, _ = random_pairs(6, 5, seed=1, log_scale=2.0)
    teacher, _ = random_pairs(6, 5, seed=3, log_scale=2.0)
    wrong = PairEmbeddings(teacher.image, -teacher.image, teacher.logit_scale)
    screened, unscreened = (
        ModX(alpha=1.0, screen=screen).loss_terms(student, wrong, context_of(6))["modx_distillation"]
        for screen in (True, False)
    )
    new, old = student.image @ student.text.T, wrong.image @ wrong.text.T
    both = [
        F.kl_div(a.log_softmax(dim=1), b.log_softmax(dim=1), reduction="sum", log_target=True)
        for a, b in ((new, old), (new.T, old.T))
    ]
    assert screened.item() == 0
    torch.testing.assert_close(unscreened, sum(both) / 2, rtol=0, atol=1e-12)


def test_unscreened_modx_has_the_terms_of_its_parts():
    student, _ = random_pairs(6, 5, seed=1, log_scale=2.0)
    teacher, _ = random_pairs(6, 5, seed=3, log_scale=2.0)
    whole = ModX(alpha=2.0, screen=False).loss_terms(student, teacher, context_of(6))
    part = ModX(alpha=2.0, screen=False, contrastive=False).loss_terms(student, teacher, context_of(6))
    assert whole.keys() == {"contrastive", "modx_distillation"}
    torch.testing.assert_close(whole["modx_distillation"], part["modx_distillation"], rtol=0, atol=1e-12)
    expected = info_nce(student.image, student.text, student.logit_scale)
    torch.testing.assert_close(whole["contrastive"], expected, rtol=0, atol=1e-12)


def test_rectifying_modx_tells_how_much_it_rectifies():
    """With and without its own contrastive term, the term is that of the loss; plain Mod-X says nothing of it."""
    student, _ = random_pairs(7, 5, seed=1, log_scale=2.0)
    teacher, _ = random_pairs(7, 5, seed=3, log_scale=2.0)
    found = affinity_distillation(student.image, student.text, teacher.image, teacher.text, screen="rectify")
    for contrastive in (True, False):
        context = context_of(7)
        callback = ModX(alpha=2.0, screen="rectify", contrastive=contrastive)
        term = callback.loss_terms(student, teacher, context)["modx_distillation"]
        torch.testing.assert_close(term, 2 * found.loss, rtol=0, atol=1e-12)
        assert context.metrics["text_rows_rectified"] == found.text_rows_rectified > 0
        assert context.metrics["image_rows_rectified"] == found.image_rows_rectified > 0
    context = context_of(7)
    ModX().loss_terms(student, teacher, context)
    assert set(context.metrics) == {"image_rows_kept", "text_rows_kept"}


# ---- Weights ----


def test_l2sp_is_the_squared_distance_to_the_start_of_the_phase(model, make_args, processor, pairs):
    start, keep = weights(model), KeepWeights()
    trainer = train(
        model,
        make_args(max_steps=3, warmup_steps=0),
        processor,
        pairs,
        [Contrastive(), L2SP(weight=0.7)],
        callbacks=[keep],
    )
    found = logged(trainer, "l2sp")
    assert found[0] == 0
    for value, now in zip(found[1:], keep.after_step, strict=False):
        distance = sum((now[name] - start[name]).square().sum().item() for name in start)
        assert value == pytest.approx(0.7 * distance, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_wise_ft_leaves_a_mixture_of_start_and_end(model, make_args, processor, pairs, weight):
    start, keep = weights(model), KeepWeights()
    train(model, make_args(), processor, pairs, [Contrastive(), WiseFT(weight)], callbacks=[keep])
    end = keep.after_step[-1]
    expected = {name: (1 - weight) * start[name] + weight * end[name] for name in start}
    assert largest_difference(weights(model), expected) < 1e-7


@pytest.mark.parametrize("every", [1, 2, 4, 100])
def test_weight_ensemble_leaves_the_running_mean_of_zscl(model, make_args, processor, pairs, every):
    mean, count, keep = weights(model), 0, KeepWeights()
    train(model, make_args(max_steps=7), processor, pairs, [Contrastive(), WeightEnsemble(every)], callbacks=[keep])
    for iteration, now in enumerate(keep.after_step):
        if iteration % every == 0:
            count += 1
            mean = {name: (mean[name] * count + now[name]) / (1.0 + count) for name in mean}
    assert count == {1: 7, 2: 4, 4: 2, 100: 1}[every]
    assert largest_difference(weights(model), mean) < 1e-7


def test_training_goes_on_from_the_weights_and_not_from_their_mean(model, make_args, processor, pairs):
    other = copy.deepcopy(model)
    plain, ensemble = KeepWeights(), KeepWeights()
    train(model, make_args(), processor, pairs, [Contrastive()], callbacks=[plain])
    train(other, make_args(), processor, pairs, [Contrastive(), WeightEnsemble(2)], callbacks=[ensemble])
    assert largest_difference(plain.after_step[-1], ensemble.after_step[-1]) == 0


def test_trainer_that_is_trained_again_starts_a_phase_again(model, make_args, processor, pairs):
    trainer = train(model, make_args(max_steps=2), processor, pairs, [Contrastive(), WeightEnsemble(1)])
    before = weights(model)
    keep = KeepWeights()
    trainer.add_callback(keep)
    trainer.train()
    mean = {name: torch.stack([before[name], *(each[name] for each in keep.after_step)]).mean(0) for name in before}
    assert largest_difference(weights(model), mean) < 1e-6


def test_weight_ensemble_refuses_the_best_model(model, make_args, processor, pairs):
    args = make_args(
        eval_strategy="steps", save_strategy="steps", save_steps=2, eval_steps=2, load_best_model_at_end=True
    )
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        train(model, args, processor, pairs, [Contrastive(), WeightEnsemble()], eval_dataset=pairs)


def test_fixed_logit_scale_is_not_trained(model, make_args, processor, pairs):
    model.logit_scale.data.fill_(4.6052)  # OpenAI's, a little above the bound of ln 100
    before = weights(model)
    train(model, make_args(), processor, pairs, [Contrastive(), FixedLogitScale()])
    assert torch.equal(model.logit_scale, before["logit_scale"])
    assert largest_difference(weights(model), before) > 0


# ---- EWC ----


def fisher_by_hand(model, trainer, batches):
    """The formula of the documentation, with the model's own forward pass and a loss written out."""
    total, count = {}, 0
    for batch in list(trainer.get_train_dataloader())[:batches]:
        outputs = model(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")})
        logits = model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.T
        rows = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        names = [name for name, _ in model.named_parameters()]
        for name, slope in zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] = total.get(name, 0) + len(logits) * slope.square()
        count += 1
    return {name: square / count for name, square in total.items()}


def test_fisher_matrix_of_a_phase_is_the_one_computed_by_hand(make_args, processor, pairs):
    model, ewc = tiny_clip(processor).double(), EWC(batches=4)
    trainer = train(model, make_args(), processor, pairs, [Contrastive(), ewc])
    expected = fisher_by_hand(model, trainer, 4)
    found = ewc.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-15)


def test_fisher_matrix_is_that_of_one_pass_at_most(make_args, processor, pairs):
    model, ewc = tiny_clip(processor).double(), EWC(batches=1000)
    trainer = train(model, make_args(), processor, pairs, [Contrastive(), ewc])
    expected = fisher_by_hand(model, trainer, 6)
    torch.testing.assert_close(ewc.state_dict()["logit_scale"], expected["logit_scale"], rtol=1e-9, atol=0)


def test_fisher_matrices_of_the_phases_are_added_up(make_args, processor, pairs):
    model, ewc = tiny_clip(processor).double(), EWC(gamma=0.5, batches=3)
    train(model, make_args(), processor, pairs, [Contrastive(), ewc])
    first = ewc.state_dict()
    trainer = train(model, make_args(data_seed=1), processor, pairs, [Contrastive(), ewc])
    second = fisher_by_hand(model, trainer, 3)
    for name, found in ewc.state_dict().items():
        torch.testing.assert_close(found, 0.5 * first[name] + second[name], rtol=1e-9, atol=1e-15)


def test_ewc_penalty_is_the_weighted_distance_to_the_start_of_the_phase(model, make_args, processor, pairs):
    ewc, keep = EWC(weight=3.0, batches=2), KeepWeights()
    train(model, make_args(), processor, pairs, [Contrastive(), ewc])
    start, fisher = weights(model), ewc.state_dict()
    args = make_args(max_steps=3, warmup_steps=0)
    trainer = train(model, args, processor, pairs, [Contrastive(), ewc], callbacks=[keep])
    found = logged(trainer, "ewc")
    assert found[0] == 0
    for value, now in zip(found[1:], keep.after_step, strict=False):
        distance = sum((fisher[name] * (now[name] - start[name]).square()).sum().item() for name in fisher)
        assert value == pytest.approx(1.5 * distance, rel=1e-4)


def test_ewc_without_a_phase_before_is_plain_fine_tuning(model, make_args, processor, pairs):
    other = copy.deepcopy(model)
    train(model, make_args(), processor, pairs, [Contrastive(), EWC(weight=1e6)])
    train(other, make_args(), processor, pairs, [Contrastive()])
    assert largest_difference(weights(model), weights(other)) == 0


def test_fisher_matrix_is_finite_where_the_scaled_loss_of_fp16_overflows(model, make_args, processor, pairs):
    ewc = EWC(batches=2)
    trainer = trainer_of(model, make_args(), processor, pairs, [Contrastive(), ewc])
    # A scale at which fp32 overflows as fp16 does at the usual one, for want of fp16 on this machine.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.learn_from_base()
    expected = fisher_by_hand(model.eval(), trainer, 2)
    for name, found in ewc.state_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-6)


def test_fisher_matrix_is_taken_at_the_weights_that_the_phase_leaves(make_args, processor, pairs):
    model, ewc = tiny_clip(processor).double(), EWC(batches=2)
    trainer = train(model, make_args(), processor, pairs, [Contrastive(), ewc, WiseFT(0.3)])
    expected = fisher_by_hand(model, trainer, 2)
    found = ewc.state_dict()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9, atol=1e-15) for name in expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC(weight=-1), "weight"),
        (lambda: EWC(gamma=1.5), "gamma"),
        (lambda: EWC(batches=0), "at least 1"),
        (lambda: EWC(batches=2.5), "whole number of batches"),
        (lambda: L2SP(-1), "weight"),
        (lambda: WiseFT(1.5), "weight"),
        (lambda: WeightEnsemble(0), "at least 1"),
        (lambda: LwF(weight=-1), "weight"),
        (lambda: ModX(screen="kept"), "screen must be"),
        (lambda: ModX(screen="rectify", reference_batch_size=8), "reference_batch_size counts the rows"),
        (lambda: LwF(temperature=0), "temperature"),
    ],
)
def test_value_out_of_its_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- The boundaries of a phase ----


class Watch(LossCallback):
    """What happened, in order."""

    def __init__(self, events, name, owns_weights=False):
        self.events = events
        self.name = name
        self.owns_weights = owns_weights

    def start_phase(self, phase):
        self.events.append(f"{self.name} starts")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step}")

    def finish_phase(self, phase):
        self.events.append(f"{self.name} finishes")


def test_boundaries_come_before_the_first_and_after_the_last_step(model, make_args, processor, pairs):
    events = []
    train(model, make_args(max_steps=2), processor, pairs, [Contrastive(), Watch(events, "it")])
    assert events == ["it starts", "step 1", "step 2", "it finishes"]


def test_owner_of_the_weights_finishes_first(model, make_args, processor, pairs):
    events = []
    callbacks = [Watch(events, "one"), Contrastive(), Watch(events, "owner", owns_weights=True)]
    train(model, make_args(max_steps=1), processor, pairs, callbacks)
    assert events[-2:] == ["owner finishes", "one finishes"]


def test_base_is_a_phase_only_for_callbacks_that_learn_from_it(model, make_args, processor, pairs):
    events, ewc = [], EWC(batches=1)
    trainer_of(model, make_args(), processor, pairs, [Contrastive(), ewc, Watch(events, "it")]).learn_from_base()
    assert events == [] and ewc.state_dict().keys() == weights(model).keys()


def test_phase_starts_with_the_weights_as_handed_over_also_when_it_is_resumed(model, make_args, processor, pairs):
    seen = []

    class Look(LossCallback):
        def start_phase(self, phase):
            seen.append(weights(phase.model))

    start = copy.deepcopy(model)
    args = make_args(save_strategy="steps", save_steps=4)
    train(model, args, processor, pairs, [Contrastive(), Look()])
    trainer = trainer_of(start, args, processor, pairs, [Contrastive(), Look()])
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4")
    assert largest_difference(*seen) == 0


RECIPES = {
    "weight_ensemble": lambda: [Contrastive(), WeightEnsemble(2)],
    "wise_ft": lambda: [Contrastive(), WiseFT()],
    "ewc": lambda: [Contrastive(), EWC(batches=2)],
    "ewc of a mean": lambda: [Contrastive(), WeightEnsemble(3), EWC(batches=2)],
}


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"bf16": True}, marks=pytest.mark.slow), {"bf16": True, "gradient_cache_chunk_size": 3}],
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_phase_interrupted_before_its_end_is_finished_from_the_last_checkpoint(
    model, make_args, processor, pairs, recipe, changes
):
    start = copy.deepcopy(model)
    args = make_args(save_strategy="steps", save_steps=6, **changes)
    done = train(model, args, processor, pairs, RECIPES[recipe]())
    late = trainer_of(start, args, processor, pairs, RECIPES[recipe]())
    late.finish_from(f"{args.output_dir}/checkpoint-6")
    assert largest_difference(weights(late.model), weights(done.model)) == 0
    for one, other in zip(done.loss_callbacks, late.loss_callbacks, strict=True):
        state = one.state_dict()
        assert other.state_dict().keys() == state.keys()
        assert all(torch.equal(other.state_dict()[name], state[name]) for name in state)


def test_phase_that_keeps_its_best_weights_keeps_them_interrupted_before_its_end(model, make_args, processor, pairs):
    start = copy.deepcopy(model)
    looks = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best = {"metric_for_best_model": "loss", "greater_is_better": True}  # which falls
    args = make_args(max_steps=3, save_strategy="steps", save_steps=1, **looks, **best)
    done = train(model, args, processor, pairs, [Contrastive()], eval_dataset=pairs)
    assert done.state.best_model_checkpoint.endswith("checkpoint-1")
    late = trainer_of(start, args, processor, pairs, [Contrastive()], eval_dataset=pairs)
    late.finish_from(f"{args.output_dir}/checkpoint-3")
    assert largest_difference(weights(late.model), weights(done.model)) == 0


@pytest.mark.parametrize(("step", "way"), [(4, "train"), (6, "finish_from")])
def test_phase_that_was_moved_finds_its_best_weights(model, make_args, processor, pairs, tmp_path, step, way):
    """The best that were kept: at step 3, which was better, nothing was saved."""
    start, scores = copy.deepcopy(model), [0.1, 0.8, 0.9, 0.1, 0.1, 0.1]
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    settings |= {"save_total_limit": 3, "load_best_model_at_end": True, "metric_for_best_model": "score"}

    def scored(scores):
        return {"eval_dataset": pairs.select(range(8)), "compute_metrics": lambda _: {"score": scores.pop(0)}}

    done = train(model, make_args(**settings), processor, pairs, [Contrastive()], **scored(scores.copy()))
    assert done.state.best_model_checkpoint.endswith("checkpoint-2")
    (tmp_path / "out").rename(tmp_path / "moved")
    args = make_args(**settings, output_dir=str(tmp_path / "moved"))
    moved = trainer_of(start, args, processor, pairs, [Contrastive()], **scored(scores[step:]))
    getattr(moved, way)(f"{args.output_dir}/checkpoint-{step}")
    assert largest_difference(weights(moved.model), weights(done.model)) == 0


@pytest.mark.parametrize(("step", "way", "kept"), [(4, "train", 6), (8, "finish_from", 8)])
def test_phase_whose_best_weights_are_gone_keeps_the_best_from_there_on(
    model, make_args, processor, pairs, tmp_path, caplog, step, way, kept
):
    """A checkpoint that comes from the Hub comes alone."""
    start, scores = copy.deepcopy(model), [0.1, 0.9, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1]
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    args = make_args(**settings, save_total_limit=4, load_best_model_at_end=True, metric_for_best_model="score")

    def trained_from(model, scores):
        scored = {"eval_dataset": pairs.select(range(8)), "compute_metrics": lambda _: {"score": scores.pop(0)}}
        return trainer_of(model, args, processor, pairs, [Contrastive()], **scored)

    trained_from(model, scores.copy()).train()
    of_step = load_file(tmp_path / "out" / f"checkpoint-{kept}" / "model.safetensors")
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    alone = trained_from(start, scores[step:])
    getattr(alone, way)(f"{args.output_dir}/checkpoint-{step}")
    assert f"checkpoint-2, is not there: the best one from step {step} on counts" in caplog.text
    assert all(torch.equal(alone.model.state_dict()[name], saved) for name, saved in of_step.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_phase_ends_with_the_same_weights(model, make_args, processor, pairs, recipe):
    start = copy.deepcopy(model)
    args = make_args(save_strategy="steps", save_steps=3)
    train(model, args, processor, pairs, RECIPES[recipe]())
    resumed = trainer_of(start, args, processor, pairs, RECIPES[recipe]())
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-3")
    assert largest_difference(weights(resumed.model), weights(model)) == 0


def test_states_go_from_trainer_to_trainer_in_a_file(model, make_args, processor, pairs, tmp_path):
    trainer = train(model, make_args(), processor, pairs, [Contrastive(), EWC(batches=2)])
    trainer.save_loss_callbacks(tmp_path / "state.safetensors")
    ewc = EWC(batches=2)
    other = trainer_of(model, make_args(), processor, pairs, [Contrastive(), ewc])
    other.load_loss_callbacks(tmp_path / "state.safetensors")
    kept = trainer.loss_callbacks[1].state_dict()
    assert kept and all(torch.equal(ewc.state_dict()[name], kept[name]) for name in kept)
    other.load_loss_callbacks(tmp_path / "nothing.safetensors")
    assert ewc.state_dict() == {}


# ---- Extra inputs ----


class Extra(LossCallback):
    """Some images and texts of its own beside the batch, pulled apart."""

    def __init__(self, processor, images, texts):
        data = tiny_pairs(images, style="other")
        self.inputs = {}
        if images:
            self.inputs = dict(processor(images=list(data["image"]), return_tensors="pt"))
        if texts:
            captions = [f"one ring in {color} a" for color in ("red", "blue", "pink", "green")[:texts]]
            self.inputs |= dict(processor(text=captions, return_tensors="pt", padding=True))
        self.seen = []

    def extra_inputs(self, context):
        return self.inputs

    def loss_terms(self, student, teacher, context):
        self.seen.append((context.extra, len(student.image), len(student.text)))
        image, text = context.extra
        return {"extra": (image.sum(dim=0) - 2 * text.sum(dim=0)).square().sum()}


@pytest.mark.parametrize(("images", "texts"), [(3, 0), (0, 2), (5, 2), (1, 4), (20, 1)])
def test_extra_inputs_are_embedded_beside_the_batch(model, make_args, processor, pairs, images, texts):
    extra = Extra(processor, images, texts)
    before = copy.deepcopy(model).eval()
    train(model, make_args(max_steps=1), processor, pairs, [Contrastive(), extra])
    found, *rows = extra.seen[0]
    assert rows == [8, 8]
    assert found.image.shape == (images, 16) and found.text.shape == (texts, 16)
    with torch.no_grad():
        if images:
            expected = before.get_image_features(pixel_values=extra.inputs["pixel_values"]).pooler_output
            torch.testing.assert_close(found.image, F.normalize(expected), rtol=0, atol=1e-6)
        if texts:
            tokens = {name: extra.inputs[name] for name in ("input_ids", "attention_mask")}
            expected = before.get_text_features(**tokens).pooler_output
            torch.testing.assert_close(found.text, F.normalize(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("images", "texts"), [(3, 0), (0, 2), (5, 2), (1, 4), (20, 1)])
def test_extra_inputs_train_the_same_weights_in_chunks(make_args, processor, pairs, images, texts):
    found = {}
    for chunk in (None, 3):
        model = tiny_clip(processor).double()
        args = make_args(optim="sgd", learning_rate=0.05, max_steps=3, gradient_cache_chunk_size=chunk)
        train(model, args, processor, pairs, [Contrastive(), Extra(processor, images, texts)])
        found[chunk] = weights(model)
    assert largest_difference(found[None], found[3]) < 1e-12


def test_each_callback_gets_its_own_extra_inputs(model, make_args, processor, pairs):
    class Other(Extra):
        def loss_terms(self, student, teacher, context):
            return {"other": super().loss_terms(student, teacher, context)["extra"]}

    first, second = Extra(processor, 2, 3), Other(processor, 4, 0)
    train(model, make_args(max_steps=1), processor, pairs, [first, Contrastive(), second])
    assert [len(part) for part in first.seen[0][0]] == [2, 3]
    assert [len(part) for part in second.seen[0][0]] == [4, 0]


# ---- Several processes ----


class SharedExtra(Extra):
    """Of two processes the first brings the texts and the second the images."""

    def extra_inputs(self, context):
        rank = process_index()
        images, texts = (slice(3 * rank), slice(2 - 2 * rank)) if world_size() == 2 else (slice(3), slice(2))
        own = {name: rows[images if name == "pixel_values" else texts] for name, rows in self.inputs.items()}
        return {name: rows for name, rows in own.items() if len(rows)}


def run_on_processes(folder, batch_size, chunk):
    processor = tiny_processor()
    model = tiny_clip(processor).double()
    args = ModXTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_cache_chunk_size=chunk,
        max_steps=4,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [Contrastive(), EWC(batches=3), WeightEnsemble(2), LwF(), Anchor(), SharedExtra(processor, 3, 2)]
    for seed in (0, 1):  # two phases: in the second one EWC has something to hold to
        args.data_seed = seed
        trainer = train(model, args, processor, tiny_pairs(48), callbacks)
    tensors = {**weights(model), **{f"fisher.{name}": value for name, value in callbacks[1].state_dict().items()}}
    save_file(tensors, f"{folder}/rank-{trainer.args.process_index}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 2])
def test_two_processes_end_a_phase_as_one_does(tmp_path, chunk):
    folders = {number: Path(tmp_path / str(number)) for number in (1, 2)}
    for number, folder in folders.items():
        folder.mkdir()
        launch(number, run_on_processes, folder, 8 // number, None if number == 1 else chunk)
    one, first, second = (
        load_file(folders[number] / f"rank-{rank}.safetensors") for number, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert largest_difference(first, second) == 0
    assert largest_difference(one, first) < 1e-9


def test_cumulative_goes_on_from_the_phase_before_on_all_data():
    assert (Cumulative.trains_on, Cumulative.starts_from) == ("all_phases_so_far", "previous")
