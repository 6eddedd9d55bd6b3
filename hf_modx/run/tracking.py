"""Trackers (TensorBoard, W&B, trackio and what else `report_to` takes) see a run of many phases as one training."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

TENSORBOARD_FOLDER = "logs"


def track_as_one_run(
    trainer: Trainer, folder: Path, phase: str, tests: Sequence[str], *, steps_before: int, steps: int
) -> None:
    """Give the trackers of a phase's Trainer steps that go on from the phase before, and names that tell phases and
    tests: `train/PHASE/loss`, `eval/TEST/image_to_text_recall@1`.

    Every phase has a Trainer of its own, which counts from 0. TensorBoard's files of all phases go to `logs/` in the
    folder of the run, unless TENSORBOARD_LOGGING_DIR says otherwise.

    Args:
        trainer: of the phase.
        folder: of the run.
        phase: its name in the trackers.
        tests: names of all tests.
        steps_before: that the phases before have taken.
        steps: of this phase; where nothing is trained, its end is where an evaluation stands.
    """
    for callback in trainer.callback_handler.callbacks:
        if not isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            continue
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / TENSORBOARD_FOLDER)
        # The method of its class: a callback that serves several phases is not to be shifted twice.
        log = partial(type(callback).on_log, callback)
        callback.on_log = partial(_log, log, phase, tests, steps_before, steps)


def _log(
    log: Any,
    phase: str,
    tests: Sequence[str],
    steps_before: int,
    steps: int,
    args: Any,
    state: TrainerState,
    control: Any,
    logs: dict[str, Any],
    **kwargs: Any,
) -> None:
    was_trained = state.max_steps > 0
    shifted = copy.copy(state)
    shifted.global_step = steps_before + (state.global_step if was_trained else steps)
    log(args, shifted, control, logs=_named(logs, phase, tests), **kwargs)


def _named(logs: dict[str, Any], phase: str, tests: Sequence[str]) -> dict[str, Any]:
    """The integrations make `train/` of every name, and `eval/` of what begins with `eval_`."""
    tests = [] if {"loss", "total_flos", "logit_scale"} & set(logs) else sorted(tests, key=len, reverse=True)
    named = {}
    for key, value in logs.items():
        metric = key.removeprefix("eval_")
        test = next((test for test in tests if metric.startswith(f"{test}_")), None)
        if test is None:
            named[key if key.startswith("eval_") else f"{phase}/{key}"] = value
        else:
            named[f"eval_{test}/{metric.removeprefix(f'{test}_')}"] = value
    return named
