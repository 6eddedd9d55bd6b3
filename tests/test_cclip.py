"""C-CLIP, and the modules of loss callbacks that are trained along."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, TrainerCallback

from hf_modx import (
    Contrastive,
    LossCallback,
    LossContext,
    ModXTrainer,
    ModXTrainingArguments,
    PairEmbeddings,
    build_recipe,
)
from hf_modx.callbacks import ProjectedDistillation, WiseFT
from hf_modx.losses import contrastive_distillation
from hf_modx.recipes import recipe_arguments
from hf_modx.training.checkpoint import TRAINED_BESIDE_NAME

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor

# ---- The loss ----


def unit(rows, seed, width=5):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.double))


def transcription(image, text, old_image, old_text, scale, ids=None):
    """2N x 2N as it is written down."""
    new, old = torch.cat([image, text]), torch.cat([old_image, old_text])
    logits = scale * new @ old.T
    rows = len(image)
    if ids is not None:
        same = ids[:, None] == ids[None, :]
        nothing = torch.zeros_like(same)
        alike = torch.cat([torch.cat([same, nothing], dim=1), torch.cat([nothing, same], dim=1)])
        logits = logits.masked_fill(alike & ~torch.eye(2 * rows, dtype=torch.bool), -torch.inf)
    targets = torch.arange(2 * rows)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 0, 2, 2, 3, 4])], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_loss_is_info_nce_over_the_features_of_both_modalities(ids, chunk_size):
    new, old = [unit(7, seed).requires_grad_() for seed in (1, 2)], [unit(7, seed) for seed in (3, 4)]
    loss = contrastive_distillation(*new, *old, 7.0, pair_ids=ids, chunk_size=chunk_size)
    expected = transcription(*new, *old, 7.0, ids)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(loss, new), torch.autograd.grad(expected, new), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_models_of_two_widths_are_refused():
    with pytest.raises(ValueError, match=r"in one width, got \(4, 5\) of the new and \(4, 3\) of the old"):
        contrastive_distillation(unit(4, 1), unit(4, 2), unit(4, 3, 3), unit(4, 4, 3), 1.0)


def test_old_features_are_found_again_where_nothing_has_moved():
    old = [unit(7, seed) for seed in (3, 4)]
    assert contrastive_distillation(*old, *old, 100.0) < contrastive_distillation(*old[::-1], *old, 100.0)


# ---- The recipe ----


def test_recipe_brings_the_terms_of_the_paper_and_merges_half():
    callbacks = build_recipe("cclip")
    assert [type(callback) for callback in callbacks] == [Contrastive, ProjectedDistillation, WiseFT]
    assert callbacks[2].weight == 0.5 and build_recipe("cclip", merge_factor=0.8)[2].weight == 0.8
    assert recipe_arguments(["er", {"cclip": {"merge_factor": 0.8}}])["lora_rank"] == 16
    assert recipe_arguments("modx+er") == {}


def trainer_of(model, args, recipe, **options):
    return ModXTrainer(
        model,
        args,
        train_dataset=tiny_pairs(48),
        processing_class=tiny_processor(),
        loss_callbacks=recipe,
        **options,
    )


def test_projector_is_trained_along_and_in_no_file_of_the_model(model, make_args, tmp_path):
    trainer = trainer_of(model, make_args(save_strategy="steps", save_steps=6), "cclip")
    trainer._start_phase()
    projector = trainer.loss_callbacks[1].modules()["projector"]
    before = copy.deepcopy(projector.state_dict())
    trainer.train()
    assert all(not torch.equal(before[name], tensor) for name, tensor in projector.state_dict().items())
    checkpoint = tmp_path / "out" / "checkpoint-6"
    CLIPModel.from_pretrained(checkpoint)
    beside = load_file(checkpoint / TRAINED_BESIDE_NAME)
    assert torch.equal(beside["1.ProjectedDistillation.modules.projector.0.weight"], projector[0].weight)
    assert not any("projector" in name for name in load_file(checkpoint / "model.safetensors"))


def test_projector_is_made_anew_from_the_seed_of_the_phase(model, make_args):
    def projector(seed):
        trainer = trainer_of(model, make_args(data_seed=seed), "cclip")
        trainer._start_phase()
        return trainer.loss_callbacks[1].modules()["projector"][0].weight

    assert torch.equal(projector(1), projector(1)) and not torch.equal(projector(1), projector(2))


def test_trainer_that_is_trained_again_trains_the_projector_made_anew(model, make_args):
    trainer = trainer_of(model, make_args(max_steps=2), "cclip")
    trainer.train()
    first = copy.deepcopy(trainer.loss_callbacks[1].modules()["projector"].state_dict())
    trainer.train()
    second = trainer.loss_callbacks[1].modules()["projector"].state_dict()
    trainer._start_phase()
    untrained = trainer.loss_callbacks[1].modules()["projector"].state_dict()
    assert all(not torch.equal(second[name], other[name]) for other in (first, untrained) for name in second)


def test_model_without_adapter_is_warned_of(model, make_args, caplog):
    trainer_of(model, make_args(), "cclip")._start_phase()
    assert 'Set peft="lora"' in caplog.text
    caplog.clear()
    trainer_of(tiny_clip(tiny_processor()), make_args(peft="lora"), "cclip")._start_phase()
    assert 'Set peft="lora"' not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projected_features_are_compared_in_full_precision(model, make_args, dtype):
    trainer = trainer_of(model.to(dtype), make_args(), "cclip")
    trainer._start_phase()
    distillation = trainer.loss_callbacks[1]
    student, teacher = (
        PairEmbeddings(*(unit(7, seed, 16).float() for seed in seeds), torch.tensor(9.0)) for seeds in ((1, 2), (3, 4))
    )
    context = LossContext(model, {}, torch.arange(7), torch.arange(7), torch.zeros(7, dtype=torch.bool), 0, 0.0, {})
    expected = distillation.loss_terms(student, teacher, context)["projected_distillation"]
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation.loss_terms(student, teacher, context)["projected_distillation"]
    assert torch.equal(found, expected)


# ---- Modules of any callback ----


class Drift(LossCallback):
    """A module whose gradient is known: one in every coordinate, of each batch."""

    def start_phase(self, phase):
        self.layer = torch.nn.Linear(2, 3)
        with torch.no_grad():
            self.layer.weight.zero_()

    def modules(self):
        return {"layer": self.layer}

    def loss_terms(self, student, teacher, context):
        return {"drift": self.layer.weight.sum()}


SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 3}


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"max_grad_norm": 0}, 3 * 0.5),
        ({"max_grad_norm": 0, "gradient_cache_chunk_size": 3}, 3 * 0.5),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, 3 * 0.5),
        ({"max_grad_norm": 0, "weight_decay": 0.2}, 0.5 * (1 + 0.9 + 0.81)),
    ],
)
def test_module_takes_a_step_of_its_own_gradient_each_time(model, make_args, changes, moved):
    drift = Drift()
    trainer_of(model, make_args(**{**SGD, "weight_decay": 0, **changes}), [Contrastive(), drift]).train()
    torch.testing.assert_close(drift.layer.weight, torch.full((3, 2), -moved))


def test_gradient_of_a_module_is_clipped_with_the_model_s(model, make_args):
    drift, norms = Drift(), []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients = [p.grad for p in [*model.parameters(), drift.layer.weight] if p.grad is not None]
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    args = make_args(**{**SGD, "max_grad_norm": 0.01})
    trainer_of(model, args, [Contrastive(), drift], callbacks=[Look()]).train()
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_optimizer_of_one_s_own_that_does_not_train_the_modules_is_refused(model, make_args):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"does not train 1.Drift.modules.layer.*Leave out optimizers"):
        trainer_of(model, make_args(), [Contrastive(), Drift()], optimizers=(optimizer, None)).train()


def test_checkpoint_without_the_projector_is_refused(make_args, tmp_path):
    processor = tiny_processor()
    args = make_args(save_strategy="steps", save_steps=6)
    trainer_of(tiny_clip(processor), args, "finetune").train()
    checkpoint = str(tmp_path / "out" / "checkpoint-6")
    with pytest.raises(
        ValueError, match="checkpoint-6 does not hold 1.ProjectedDistillation.modules.projector.0.bias"
    ):
        trainer_of(tiny_clip(processor), args, "cclip").train(resume_from_checkpoint=checkpoint)


# ---- Several processes ----

WAYS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "cached": {"gradient_cache_chunk_size": 3},
    "uneven": {"dataloader_drop_last": False},
}


def train_cclip(folder, batch_size):
    for name, changes in WAYS.items():
        place = Path(folder) / name
        args = ModXTrainingArguments(
            output_dir=str(place),
            per_device_train_batch_size=batch_size,
            max_steps=3,
            learning_rate=1e-2,
            warmup_steps=0,
            adam_epsilon=1e-4,
            max_grad_norm=0.2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            peft="lora",
            lora_rank=4,
            train_logit_scale=True,
            **changes,
        )
        processor = tiny_processor()
        trainer = ModXTrainer(
            tiny_clip(processor).double(),
            args,
            train_dataset=tiny_pairs(21 if name == "uneven" else 32),
            processing_class=processor,
            loss_callbacks="cclip",
        )
        trainer.train()
        tensors = {**trainer.model.state_dict(), **trainer.loss_callbacks[1].modules()["projector"].state_dict()}
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / f"rank-{args.process_index}")


@pytest.mark.slow
def test_two_processes_train_adapter_and_projector_of_one(tmp_path):
    launch(1, train_cclip, tmp_path / "one", 8)
    launch(2, train_cclip, tmp_path / "two", 4)
    for name in WAYS:
        one = load_file(tmp_path / "one" / name / "rank-0")
        first, second = (load_file(tmp_path / "two" / name / f"rank-{rank}") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        assert max((first[key] - one[key]).abs().max().item() for key in one) < 1e-9, name
