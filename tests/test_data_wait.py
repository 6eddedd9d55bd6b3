"""Training that waits for its data says so."""

import logging

import pytest
from transformers import TrainerCallback

from hf_modx import ModXTrainer
from hf_modx.callbacks import data_wait
from hf_modx.callbacks.data_wait import DataWait

SLOW = 0.1
EAGER = {"warn_above": 0.4, "min_steps": 3, "min_seconds": 0.0}


class Clock:
    """Stands but for those who sleep: on a busy machine real time says little."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


time = Clock()


@pytest.fixture(autouse=True)
def stands(monkeypatch):
    monkeypatch.setattr(data_wait, "time", time)


class Batches:
    """A collator that takes so many seconds a batch, and no more: what it returns was made before.

    Args:
        seconds: of the batches from the `slow_from`-th to before the `slow_to`-th; the others take none.
    """

    def __init__(self, collator, seconds: float, slow_from: int = 0, slow_to: int = 1000):
        self.collator = collator
        self.seconds = seconds
        self.slow = range(slow_from, slow_to)
        self.made = None
        self.count = 0

    def __call__(self, rows):
        if self.made is None:
            self.made = self.collator(rows)
        time.sleep(self.seconds if self.count in self.slow else 0)
        self.count += 1
        return self.made


class StepsOfSomeLength(TrainerCallback):
    """The time that a step takes."""

    def __init__(self, seconds: float = 0.03):
        self.seconds = seconds

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


class Watched(ModXTrainer):
    """Logs the share as a Trainer that owns the callback does."""

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["share"] = self.wait.share()
        super().log(logs, start_time)


@pytest.fixture
def run(model, processor, pairs, make_args, caplog):
    """Twelve steps; returns the logged shares and the warnings."""

    def run(seconds, wait, slow_from=0, slow_to=1000, callbacks=(), **arguments):
        args = make_args(**{"max_steps": 12, "logging_steps": 3, **arguments})
        trainer = Watched(
            model,
            args,
            train_dataset=pairs,
            eval_dataset=pairs,
            processing_class=processor,
            callbacks=[StepsOfSomeLength(), *callbacks],
        )
        trainer.data_collator = Batches(trainer.data_collator, seconds, slow_from, slow_to)
        trainer.wait = wait
        trainer.add_callback(wait)
        with caplog.at_level(logging.WARNING, logger="hf_modx"):
            trainer.train()
        shares = [entry["share"] for entry in trainer.state.log_history if "share" in entry]
        return shares, [record.getMessage() for record in caplog.records if "waits for data" in record.getMessage()]

    return run


def test_slow_data_are_warned_about_once_with_number_and_remedies(run):
    shares, warnings = run(SLOW, DataWait(**EAGER))
    assert len(shares) == 4 and all(0.4 < share < 1 for share in shares)
    assert len(warnings) == 1
    for part in (
        "of the time of the last 3 steps",
        "--dataloader_num_workers (now 0)",
        "--dataloader_prefetch_factor (now None)",
        "--image_cache",
    ):
        assert part in warnings[0]


def test_number_in_the_warning_is_the_share(run):
    shares, warnings = run(SLOW, DataWait(**EAGER), logging_steps=4, max_steps=4)
    assert f" {100 * shares[0]:.0f} %" in warnings[0]


def test_fast_data_are_not_warned_about(run):
    shares, warnings = run(0.0, DataWait(**EAGER))
    assert all(0 <= share < 0.4 for share in shares)
    assert warnings == []


def test_share_is_waiting_by_waiting_and_work(run):
    shares, _ = run(0.2, DataWait(), callbacks=[StepsOfSomeLength(0.17)], max_steps=3, logging_steps=3)
    assert shares[0] == pytest.approx(0.5)


def test_both_batches_of_an_accumulated_step_count(run):
    shares, _ = run(0.15, DataWait(), gradient_accumulation_steps=2, max_steps=3)
    assert shares[0] > 0.55  # one of them alone could not be more than half


@pytest.mark.parametrize("limits", [{"min_steps": 30}, {"min_seconds": 60.0}, {"warn_above": 1.0}])
def test_no_warning_below_the_limits(run, limits):
    assert run(SLOW, DataWait(**{**EAGER, **limits}), max_steps=6)[1] == []


def test_data_that_become_slow_later_are_warned_about(run):
    assert len(run(SLOW, DataWait(**EAGER), slow_from=9, slow_to=11)[1]) == 1


def test_each_share_is_of_the_steps_since_the_log_before(run):
    shares, _ = run(2 * SLOW, DataWait(), slow_to=7)
    assert shares[-1] < 0.4 < shares[0]


def test_first_batches_are_no_waiting(run):
    """One batch is fetched ahead, so the first step needs two."""
    shares, warnings = run(0.5, DataWait(**EAGER), slow_to=2)
    assert shares[0] < 0.4
    assert warnings == []


@pytest.mark.parametrize(
    ("event", "arguments"),
    [
        ("on_log", {"logging_steps": 1}),
        ("on_evaluate", {"eval_strategy": "steps", "eval_steps": 1}),
        ("on_save", {"save_strategy": "steps", "save_steps": 1}),
        ("on_epoch_end", {"per_device_train_batch_size": 48}),
    ],
)
def test_logging_evaluation_and_saving_are_no_waiting(run, event, arguments):
    slow = TrainerCallback()
    setattr(slow, event, lambda *args, **kwargs: time.sleep(0.1))
    _, warnings = run(0.0, DataWait(**EAGER), callbacks=[slow], max_steps=4, **arguments)
    assert warnings == []


def test_every_training_begins_anew(run):
    wait = DataWait(**EAGER)
    assert len(run(SLOW, wait, max_steps=6)[1]) == 1
    shares, warnings = run(SLOW, wait, max_steps=6)
    assert len(shares) == 2 and len(warnings) == 2
