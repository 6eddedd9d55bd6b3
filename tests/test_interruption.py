"""SIGTERM and SIGINT: a checkpoint, a status, and a run that goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_modx import ContinualRun, ModXTrainingArguments
from hf_modx.distributed import process_index
from hf_modx.interruption import Interrupted, StopOnSignal

from launch import launch
from test_continual import make_stream
from tiny import tiny_clip, tiny_processor

TESTS = Path(__file__).parent


class Send(TrainerCallback):
    """Send one process a signal in a step of a phase, as a scheduler does."""

    def __init__(self, number, step=2, phase=2, rank=0, times=1):
        self.number, self.step, self.phase, self.rank, self.times = number, step, phase, rank, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"phase-{self.phase}") and state.global_step + 1 == self.step:
            for _ in range(self.times if process_index() == self.rank else 0):
                os.kill(os.getpid(), self.number)


def go(folder, callbacks=(), max_steps=5):
    """The whole run, or what is left of it."""
    args = ModXTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=max_steps,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        spatial_disorder=False,
    )
    processor = tiny_processor()
    model = tiny_clip(processor)
    ContinualRun(make_stream(), "modx", args, model=model, processing_class=processor, callbacks=callbacks).run()


def interrupted(folder, callbacks):
    """The status that the run ends with."""
    with pytest.raises(Interrupted) as ended:
        go(folder, callbacks)
    return ended.value.code


def checkpoints(folder):
    return [path.name for path in (folder / "checkpoints" / "phase-2").glob("checkpoint-*")]


def same_end(first, second):
    one, other = (load_file(run / "phase-2" / "model.safetensors") for run in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    go(folder)
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_step_it_came_in_and_the_run_goes_on_from_there(tmp_path, whole, number, code):
    assert interrupted(tmp_path, [Send(number)]) == code
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    go(tmp_path)
    assert same_end(tmp_path, whole)


def test_signal_in_the_last_step_of_a_phase(tmp_path, whole):
    assert interrupted(tmp_path, [Send(signal.SIGTERM, step=5)]) == 143
    assert checkpoints(tmp_path) == ["checkpoint-5"] and not (tmp_path / "phase-2").exists()
    go(tmp_path)
    assert same_end(tmp_path, whole)


def test_second_signal_does_not_wait_for_the_step(tmp_path):
    assert interrupted(tmp_path, [Send(signal.SIGINT, times=2)]) == 130
    assert checkpoints(tmp_path) == []


def test_signal_between_phases_ends_the_run_at_once(tmp_path, whole):
    class SendAtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    assert interrupted(tmp_path, [SendAtTheEnd()]) == 143
    assert not (tmp_path / "phase-2").exists()
    go(tmp_path)
    assert same_end(tmp_path, whole)


def test_signal_outside_training_raises_at_once_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), StopOnSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_of_a_run_die_of_sigterm_and_leave_sigint_to_it():
    with StopOnSignal():
        for number, expected in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)):
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), number)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == expected


@pytest.mark.slow
def test_status_of_the_process_is_that_of_the_signal(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    environment |= {"KILL_IN_PHASE": "1", "KILL_WITH": "SIGTERM"}
    command = [sys.executable, str(TESTS / "killed_run.py"), str(tmp_path)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 143


def signal_to_the_second_process(folder):
    assert interrupted(folder, [Send(signal.SIGTERM, rank=1)]) == 143


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_where_one_gets_the_signal(tmp_path):
    launch(2, signal_to_the_second_process, tmp_path / "cut")
    assert checkpoints(tmp_path / "cut") == ["checkpoint-2"]
    launch(2, go, tmp_path / "cut")
    launch(2, go, tmp_path / "whole")
    assert same_end(tmp_path / "cut", tmp_path / "whole")
