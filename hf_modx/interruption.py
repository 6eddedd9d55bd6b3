"""Ending a run on SIGTERM or SIGINT so that nothing is lost."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from .distributed import gather_stacked, world_size

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A signal has ended the run, and the same command goes on with it.

    Not caught, it ends the process with the status that shells give to signals, which is `code`: 143 for SIGTERM, 130
    for SIGINT.
    """

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


class StopOnSignal(TrainerCallback):
    """A context in which SIGTERM and SIGINT raise `Interrupted`: between training steps at once, in a step when it is
    done and a checkpoint of it is saved. The second signal does not wait for that.

    It is the callback of every Trainer in the context. A signal to one process ends all of them at the same step.
    (`enable_jit_checkpoint` knows SIGTERM only, waits some seconds before it does anything, and each process does it
    for itself: where one gets the signal later than another, they wait for each other for ever.)
    """

    def __init__(self):
        self._before: dict[int, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._received = 0
        self._agreed = 0  # what some process has received, known to all
        self._is_stepping = False

    def raise_if_asked(self) -> None:
        """Between phases: raise `Interrupted` where a signal came after the last step of one."""
        if self._received:
            raise Interrupted(self._received)

    def __enter__(self) -> "StopOnSignal":
        self._forget()
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        self._is_stepping = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._receive_in_worker(number)
            return
        is_first, self._received = not self._received, number
        if not (self._is_stepping and is_first):
            raise Interrupted(number)
        logger.warning("%s: a checkpoint is saved after this step.", signal.Signals(number).name)

    def _receive_in_worker(self, number: int) -> None:
        """Ctrl-C reaches the data loader's workers too, which the step may still need: the run ends them with
        SIGTERM."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # ---- In training ----

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_stepping = True

    def on_step_end(self, args, state, control, **kwargs):
        self._agreed = _largest(self._received, args.device)
        if self._agreed:
            # Not `should_training_stop`: a checkpoint that says so is the last one of its phase.
            control.should_save = control.should_epoch_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # After a stop within an epoch as well; other callbacks have seen the checkpoint by now.
        if self._agreed:
            logger.warning("Stopped after step %d. The same command goes on from there.", state.global_step)
            raise Interrupted(self._agreed)

    def on_train_end(self, args, state, control, **kwargs):
        self._is_stepping = False


def _largest(number: int, device: torch.device) -> int:
    """Of those of all processes."""
    if world_size() == 1:
        return number
    return int(gather_stacked(torch.tensor(number, device=device)).max())
