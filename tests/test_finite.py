"""NaN and infinity are noticed before they are saved."""

import pytest
import torch
from test_distributed import arguments
from transformers import TrainerCallback

from hf_modx import ContinualRun, Contrastive, LossCallback, ModXTrainer
from hf_modx.distributed import process_index

from launch import launch
from test_continual import make_stream
from tiny import tiny_clip, tiny_pairs, tiny_processor


class BreaksOn(LossCallback):
    """A term that is NaN in one step, on one process."""

    def __init__(self, step, rank=0):
        self.step, self.rank = step, rank

    def loss_terms(self, student, teacher, context):
        breaks = context.step + 1 == self.step and process_index() == self.rank
        return {
            "steady": student.image.sum() * 0 + 0.5,
            "broken": student.text.sum() * (float("nan") if breaks else 0),
        }


class BreaksAGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == 2:
            model.visual_projection.weight.grad[0, 0] = float("nan")


@pytest.fixture
def train(model, processor, pairs, make_args):
    def train(loss_callbacks="finetune", callbacks=(), **changes):
        args = make_args(save_strategy="steps", save_steps=1, **changes)
        trainer = ModXTrainer(
            model=model,
            args=args,
            train_dataset=pairs,
            processing_class=processor,
            loss_callbacks=loss_callbacks,
            callbacks=list(callbacks),
        )
        trainer.train()

    return train


def saved(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").glob("**/checkpoint-*"))


@pytest.mark.parametrize("chunk", [None, 2])
def test_step_and_term_and_rows_are_named(train, tmp_path, chunk):
    with pytest.raises(FloatingPointError) as error:
        train([Contrastive(), BreaksOn(3)], gradient_cache_chunk_size=chunk, dataloader_drop_last=False)
    message = str(error.value)
    assert "step 3" in message and "broken = nan" in message and "steady = 0.5" in message
    assert message.count("row ") == 8
    assert saved(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_exploding_weights_stop_the_run_before_they_are_saved(train, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 2 is not finite: contrastive = .*lower learning_rate"):
        train(learning_rate=1e30, max_grad_norm=0, optim="sgd", warmup_steps=0, weight_decay=0)
    assert saved(tmp_path) == ["checkpoint-1"]


def test_step_that_breaks_the_weights_is_not_saved(train, tmp_path):
    with pytest.raises(FloatingPointError, match=r"Step 2 is not saved: after it the model has .* in visual_proj"):
        train(callbacks=[BreaksAGradient()], max_grad_norm=0)
    assert saved(tmp_path) == ["checkpoint-1"]


def test_phase_whose_last_step_breaks_the_weights_is_not_kept(model, processor, make_args, tmp_path):
    run = ContinualRun(
        make_stream(1),
        "finetune",
        make_args(max_steps=2, max_grad_norm=0),
        model=model,
        processing_class=processor,
        callbacks=[BreaksAGradient()],
    )
    with pytest.raises(FloatingPointError, match="Phase 1 is not kept: .* visual_projection"):
        run.run()
    assert not run.phase_folder(1).exists() and run.phase_folder(0).exists()


def test_model_that_is_broken_is_refused_before_anything_is_written(model, processor, make_args, tmp_path):
    with torch.no_grad():
        model.text_projection.weight[3, 1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"the model has NaN or infinite values in text_projection\.weight"):
        ContinualRun(make_stream(1), "finetune", make_args(), model=model, processing_class=processor)
    assert not (tmp_path / "out").exists()


class OneRow(LossCallback):
    """Broken embeddings of row 5 alone, as an image of no content may give them."""

    def loss_terms(self, student, teacher, context):
        broken = torch.where(context.row_ids == 5, float("nan"), 0.0)
        student.image.data += broken[:, None]
        return {"norms": student.image.sum()}


def test_only_the_rows_with_broken_embeddings_are_named(train):
    with pytest.raises(FloatingPointError, match=r"norms = nan\. The embeddings are not finite of row 5\. The step"):
        train([Contrastive(), OneRow()])


def train_in_two(folder):
    processor = tiny_processor()
    trainer = ModXTrainer(
        model=tiny_clip(processor),
        args=arguments(folder, 4),
        train_dataset=tiny_pairs(16),
        processing_class=processor,
        loss_callbacks=[Contrastive(), BreaksOn(2, rank=1)],
    )
    with pytest.raises(FloatingPointError, match="step 2 .*broken = nan"):
        trainer.train()


def test_no_process_waits_for_one_whose_loss_is_broken(tmp_path):
    launch(2, train_in_two, tmp_path)
