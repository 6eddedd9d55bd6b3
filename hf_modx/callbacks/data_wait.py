"""How long training waits for its data."""

import logging
import time

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class DataWait(TrainerCallback):
    """Measure the share of training time in which the step waits for its batches; warn once when it is large.

    Waiting is the wall time from the moment at which this process could go on to the next step, all logging,
    evaluation and saving done, to the moment at which the batches of that step are there. The share is waiting /
    (waiting + steps), in [0, 1]; logging, evaluation, saving and the first batch of a training, which starts the
    workers, count as neither. It is the share of this process alone: what another waits shows here as a longer step.

    The device is never synchronised for it. On an accelerator the copy of a batch waits for what is still queued
    there; of a step that is only the optimizer's update, because the Trainer looks at every loss before it
    (`logging_nan_inf_filter`, its default). Without that look the share would count the device's work as waiting, and
    nothing is measured.

    Add it after all other callbacks, so that their work at the same events is not taken for waiting.

    Args:
        warn_above: share above which it warns.
        min_steps, min_seconds: the share that may lead to a warning is taken over at least so many steps and seconds.
    """

    def __init__(self, warn_above: float = 0.25, min_steps: int = 20, min_seconds: float = 10.0):
        self.warn_above = warn_above
        self.min_steps = min_steps
        self.min_seconds = min_seconds
        self._start()

    def share(self) -> float | None:
        """The share since the last logged loss; None where no step was measured."""
        return self._since_log.share()

    def on_train_begin(self, args, state, control, **kwargs):
        self._start()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._go_on()

    def on_evaluate(self, args, state, control, **kwargs):
        self._go_on()

    def on_save(self, args, state, control, **kwargs):
        self._go_on()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self._since_log = _Times()
        self._go_on()

    def on_step_begin(self, args, state, control, **kwargs):
        self._begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self._free_since is not None and (args.device.type == "cpu" or args.logging_nan_inf_filter):
            for times in (self._since_log, self._since_look):
                times.add(waited=self._begun - self._free_since, worked=now - self._begun)
        self._free_since = now
        if self._since_look.steps >= self.min_steps and self._since_look.seconds >= self.min_seconds:
            self._look(args)

    def _start(self) -> None:
        self._since_log, self._since_look = _Times(), _Times()
        self._free_since: float | None = None  # None until the first step is done
        self._begun = 0.0
        self._warned = False

    def _go_on(self) -> None:
        if self._free_since is not None:
            self._free_since = time.perf_counter()

    def _look(self, args) -> None:
        """Warn if the last steps waited too long, and begin to count anew."""
        times, self._since_look = self._since_look, _Times()
        if self._warned or times.share() <= self.warn_above:
            return
        self._warned = True
        logger.warning(
            "Training waits for data: %.0f %% of the time of the last %d steps (%.0f s). Raise "
            "--dataloader_num_workers (now %d) or --dataloader_prefetch_factor (now %s), or keep the resized images "
            "on the disk with --image_cache.",
            100 * times.share(),
            times.steps,
            times.seconds,
            args.dataloader_num_workers,
            args.dataloader_prefetch_factor,
        )


class _Times:
    """Seconds of waiting and of work over some steps."""

    def __init__(self):
        self.steps = 0
        self.waited = 0.0
        self.seconds = 0.0

    def add(self, waited: float, worked: float) -> None:
        self.steps += 1
        self.waited += waited
        self.seconds += waited + worked

    def share(self) -> float | None:
        return self.waited / self.seconds if self.steps else None
