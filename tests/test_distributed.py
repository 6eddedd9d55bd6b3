"""Several processes: the same weights as one."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_modx import ContinualRun, Contrastive, LossCallback, ModX, ModXTrainer, ModXTrainingArguments, PhaseStream
from hf_modx.distributed import all_gather_rows

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor


class PullToStart(LossCallback):
    """A term on the weights: every process computes it whole."""

    needs_phase_start = True

    def loss_terms(self, student, teacher, context):
        weights = context.model.named_parameters()
        return {"pull": 0.1 * sum((p - context.phase_start[n]).square().sum() for n, p in weights)}


def arguments(folder, batch_size, **changes):
    settings = {
        "per_device_train_batch_size": batch_size,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "adam_epsilon": 1e-4,  # the key biases have a true gradient of zero: AdamW would blow up its rounding noise
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ModXTrainingArguments(output_dir=str(folder), **{**settings, **changes})


def train_and_save(folder, batch_size, rows, evaluate_first, changes, double=True):
    processor = tiny_processor()
    model = tiny_clip(processor)
    trainer = ModXTrainer(
        model=model.double() if double else model,
        args=arguments(folder, batch_size, **changes),
        train_dataset=tiny_pairs(rows),
        eval_dataset=tiny_pairs(11),
        processing_class=processor,
        loss_callbacks=[Contrastive(), ModX(contrastive=False), PullToStart()],
    )
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    recall = trainer.evaluate()["eval_image_to_text_mrr"]
    logged = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    tensors = {**trainer.model.state_dict(), "logged": logged, "recall": torch.tensor(recall)}
    save_file(tensors, f"{folder}/rank-{trainer.args.process_index}.safetensors")


def largest_difference(first, second):
    first, second = load_file(first), load_file(second)
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.mark.parametrize(
    ("evaluate_first", "changes"),
    [(False, {}), pytest.param(True, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow)],
    ids=["plain", "accumulated"],
)
def test_two_processes_train_the_weights_of_one(tmp_path, evaluate_first, changes):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch(1, train_and_save, tmp_path / "one", 8, 48, evaluate_first, changes)
    launch(2, train_and_save, tmp_path / "two", 4, 48, evaluate_first, changes)
    ranks = [tmp_path / "two" / f"rank-{rank}.safetensors" for rank in (0, 1)]
    assert largest_difference(*ranks) == 0
    assert largest_difference(tmp_path / "one" / "rank-0.safetensors", ranks[0]) < 1e-9


# (processes, batch of each, accumulation steps, chunk): all have a contrastive batch of 8 pairs.
SAME_TRAINING = [
    (1, 8, 1, 3),
    (1, 4, 2, 3),
    (2, 4, 1, None),
    (2, 2, 2, 1),
    (4, 2, 1, 1),
    (4, 1, 2, 1),
]
PRECISIONS = {"double": ({}, True, 1e-9), "single": ({"optim": "sgd", "learning_rate": 0.05}, False, 1e-5)}
# Five steps over two epochs: batches of 8, 8 and 5 (which four processes share unevenly); of 8, 8 and 2 (which leaves
# nothing for two of four processes).
UNEVEN_ROWS = [21, 18]
TRAININGS = [(48, "double"), (48, "single"), *((rows, "double") for rows in UNEVEN_ROWS)]


def train_all(folder, batch_size, accumulation, chunk):
    for rows, name in TRAININGS:
        changes, double, _ = PRECISIONS[name]
        place = Path(folder) / f"{name}-{rows}"
        place.mkdir(parents=True, exist_ok=True)
        changes = {
            **changes,
            "gradient_accumulation_steps": accumulation,
            "gradient_cache_chunk_size": chunk,
            "dataloader_drop_last": rows == 48,
        }
        train_and_save(place, batch_size, rows, False, changes, double)


@pytest.fixture(scope="module")
def one_big_batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(1, train_all, folder, 8, 1, None)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("setting", SAME_TRAINING, ids=str)
def test_processes_chunks_and_accumulation_train_the_same_weights(tmp_path, one_big_batch, setting):
    processes, batch_size, accumulation, chunk = setting
    launch(processes, train_all, tmp_path, batch_size, accumulation, chunk)
    for rows, name in TRAININGS:
        ranks = [tmp_path / f"{name}-{rows}" / f"rank-{rank}.safetensors" for rank in range(processes)]
        for other in ranks[1:]:
            assert largest_difference(ranks[0], other) == 0, (name, rows)
        reference = one_big_batch / f"{name}-{rows}" / "rank-0.safetensors"
        assert largest_difference(reference, ranks[0]) < PRECISIONS[name][2], (name, rows)


class OwnCollator:
    """A user's: it knows of no rows."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items):
        captions = [item["caption"][0] for item in items]
        images = [item["image"] for item in items]
        batch = dict(self.processor(text=captions, images=images, padding=True, return_tensors="pt"))
        return {**batch, "pixel_values": batch["pixel_values"].double()}


def train_with_own_collator(folder, batch_size, rows):
    processor = tiny_processor()
    trainer = ModXTrainer(
        model=tiny_clip(processor).double(),
        args=arguments(folder, batch_size, dataloader_drop_last=False),
        data_collator=OwnCollator(processor),
        train_dataset=tiny_pairs(rows),
        processing_class=processor,
        loss_callbacks="modx",
    )
    trainer.train()
    save_file(trainer.model.state_dict(), f"{folder}/rank-{trainer.args.process_index}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 9])
def test_collator_of_ones_own_is_exact_too(tmp_path, rows):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch(1, train_with_own_collator, tmp_path / "one", 8, rows)
    launch(2, train_with_own_collator, tmp_path / "two", 4, rows)
    files = [tmp_path / run / "rank-0.safetensors" for run in ("one", "two")]
    assert largest_difference(*files) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_cached_teacher_trains_the_weights_of_a_live_one(tmp_path, mode):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch(1, train_and_save, tmp_path / "one", 8, 21, False, {"teacher_cache": "off"})
    launch(2, train_and_save, tmp_path / "two", 4, 21, False, {"teacher_cache": mode})
    ranks = [tmp_path / "two" / f"rank-{rank}.safetensors" for rank in (0, 1)]
    assert largest_difference(*ranks) == 0
    assert largest_difference(tmp_path / "one" / "rank-0.safetensors", ranks[0]) < 1e-9
    assert (tmp_path / "two" / "teacher_cache").exists() == (mode == "disk")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 6])
def test_phase_smaller_than_a_batch_is_exact_too(tmp_path, rows):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch(1, train_and_save, tmp_path / "one", 8, rows, False, {})
    launch(2, train_and_save, tmp_path / "two", 4, rows, False, {})
    files = [tmp_path / run / "rank-0.safetensors" for run in ("one", "two")]
    assert largest_difference(*files) < 1e-9


def gather_uneven(folder):
    torch.manual_seed(dist.get_rank())
    rows = torch.randn(5 - 2 * dist.get_rank(), 4, dtype=torch.double, requires_grad=True)
    everything = all_gather_rows(rows)
    weights = torch.arange(everything.numel(), dtype=torch.double).view_as(everything)
    (everything * weights).sum().backward()
    tensors = {"rows": rows.detach(), "gradient": rows.grad, "everything": everything.detach()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/{dist.get_rank()}")


def test_uneven_rows_are_gathered_in_the_order_of_ranks(tmp_path):
    launch(2, gather_uneven, tmp_path)
    first, second = load_file(tmp_path / "0"), load_file(tmp_path / "1")
    expected = torch.cat([first["rows"], second["rows"]])
    assert torch.equal(first["everything"], expected) and torch.equal(second["everything"], expected)


def test_gradient_of_gathered_rows_is_the_sum_over_processes(tmp_path):
    launch(2, gather_uneven, tmp_path)
    gradients = [load_file(tmp_path / str(rank))["gradient"] for rank in (0, 1)]
    weights = 2 * torch.arange(32, dtype=torch.double).view(8, 4)
    assert torch.equal(torch.cat(gradients), weights)


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert all_gather_rows(rows) is rows


class KeepWeights(TrainerCallback):
    """What each process holds at the end of each phase."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        run, phase = Path(args.output_dir).parents[1], Path(args.output_dir).name
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, run / f"{phase}-rank-{args.process_index}.safetensors")


def run_phases(folder, batch_size, callbacks=(), **changes):
    processor = tiny_processor()
    stream = PhaseStream.random(tiny_pairs(48), 2, test_fraction=0.25)
    args = arguments(folder, batch_size, optim="sgd", learning_rate=0.05, **changes)
    model, callbacks = tiny_clip(processor), [KeepWeights(), *callbacks]
    ContinualRun(stream, "modx", args, model=model, processing_class=processor, callbacks=callbacks).run()


@pytest.mark.slow
def test_every_phase_of_two_processes_is_that_of_one(tmp_path):
    launch(1, run_phases, tmp_path / "one", 8)
    launch(2, run_phases, tmp_path / "two", 4)
    for phase in ("phase-1", "phase-2"):
        one = tmp_path / "one" / f"{phase}-rank-0.safetensors"
        ranks = [tmp_path / "two" / f"{phase}-rank-{rank}.safetensors" for rank in (0, 1)]
        assert largest_difference(*ranks) == 0, phase
        assert largest_difference(one, ranks[0]) < 1e-5, phase
        assert largest_difference(tmp_path / "two" / phase / "model.safetensors", ranks[0]) == 0, phase


class PowerCut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("phase-2") and state.global_step == 4:
            raise SystemError("power cut")


def go_on_with_two(folder):
    run_phases(folder, 4, save_strategy="steps", save_steps=3)


@pytest.mark.slow
def test_run_of_one_process_goes_on_with_two_and_the_same_global_batch(tmp_path):
    with pytest.raises(SystemError):
        run_phases(tmp_path / "cut", 8, [PowerCut()], save_strategy="steps", save_steps=3)
    launch(2, go_on_with_two, tmp_path / "cut")
    run_phases(tmp_path / "whole", 8)
    record = json.loads((tmp_path / "cut" / "phase-2" / "training.json").read_text())
    assert record["resumed_at_step"] == 3
    cut, whole = (tmp_path / name / "phase-2" / "model.safetensors" for name in ("cut", "whole"))
    assert largest_difference(cut, whole) < 1e-5
