"""A worker of the data loader that hangs or dies, and a process of the run that dies."""

import os
import signal
import time
from multiprocessing import active_children

import pytest
import torch
from test_distributed import arguments
from torch.multiprocessing import start_processes
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from hf_modx import ModXTrainer
from hf_modx.data import PairDataset
from hf_modx.distributed import process_index

from launch import prepared
from tiny import tiny_clip, tiny_pairs, tiny_processor


@pytest.fixture
def train(model, processor, pairs, make_args, tmp_path):
    def train(**changes):
        args = make_args(dataloader_num_workers=1, dataloader_prefetch_factor=1, **changes)
        trainer = ModXTrainer(
            model=tiny_clip(processor),
            args=args,
            train_dataset=pairs,
            processing_class=processor,
            loss_callbacks="finetune",
        )
        trainer.train()
        return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}

    return train


def test_workers_end_with_the_training_in_the_midst_of_an_epoch(train):
    train(max_steps=2)
    assert active_children() == []


@pytest.fixture
def lose_worker(monkeypatch, tmp_path):
    """Let `what()` happen in workers at this batch of theirs, so many times."""
    read = PairDataset.__getitems__

    def lose_worker(what, times, batch):
        batches = []

        def lossy(self, indices):
            batches.append(indices)
            lost = tmp_path / "lost"
            before = len(lost.read_bytes()) if lost.exists() else 0
            if get_worker_info() is not None and len(batches) >= batch and before < times:
                lost.write_bytes(b"x" * (before + 1))
                what()
            return read(self, indices)

        monkeypatch.setattr(PairDataset, "__getitems__", lossy)

    return lose_worker


def test_batch_of_a_worker_that_hangs_is_read_again_by_another(train, lose_worker, caplog):
    whole = train()
    lose_worker(lambda: time.sleep(3), times=1, batch=3)
    patient = train(dataloader_timeout=1)
    assert "DataLoader timed out after 1 seconds Batch" in caplog.text and "of the epoch is read again" in caplog.text
    assert all(torch.equal(patient[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_worker_that_hangs_again_and_again_is_told_of(train, lose_worker):
    lose_worker(lambda: time.sleep(3), times=9, batch=1)
    with pytest.raises(RuntimeError, match=r"timed out after 1 seconds.*dataloader_timeout, now 1 seconds.*goes on"):
        train(dataloader_timeout=1)


def test_worker_that_is_killed_is_told_of(train, lose_worker):
    """Torch raises wherever the process is when the signal comes."""
    lose_worker(lambda: os.kill(os.getpid(), signal.SIGKILL), times=9, batch=1)
    with pytest.raises(RuntimeError, match=r"DataLoader worker.*lower dataloader_num_workers, now 1.*goes on from"):
        train()


class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder):
    processor = tiny_processor()
    trainer = ModXTrainer(
        model=tiny_clip(processor),
        args=arguments(folder, 4),
        train_dataset=tiny_pairs(24),
        processing_class=processor,
        loss_callbacks="finetune",
        callbacks=[Die()],
    )
    try:
        trainer.train()
    except RuntimeError as error:
        (folder / "said").write_text(str(error))
        raise


def test_process_whose_neighbour_dies_ends_too_and_says_why(tmp_path):
    with prepared(2, train_and_die) as function:
        others = start_processes(function, args=(tmp_path,), nprocs=2, join=False, start_method="fork")
        started = time.monotonic()
        for process in reversed(others.processes):
            process.join(120)
        assert [process.exitcode for process in others.processes] == [1, -signal.SIGKILL]
    assert "Another process of the run has ended" in (tmp_path / "said").read_text()
    assert time.monotonic() - started < 120
