"""What a phase will take, from a few steps of it."""

import copy
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from ..callbacks import replay_of
from ..data.bad_samples import drop_bad_samples, find_bad_samples
from ..data.loading import at_most
from ..recipes import Part, build_recipe, check_teachers
from ..trainer import PartTrainer
from ..training_args import ModXTrainingArguments

TIMED = 5


@dataclass(frozen=True)
class Cost:
    """Of a phase on this machine.

    Attributes:
        steps: of the phase.
        seconds_a_step: the median of the timed ones, data included; the old model runs in every step, as it does
            where its embeddings are not cached.
        seconds: of all steps; evaluation and saving are not in it.
        peak_bytes: of memory: what tensors take at once on an accelerator; what the process has taken so far, data
            included, where there is none.
    """

    steps: int
    seconds_a_step: float
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def measure_cost(
    model: nn.Module,
    processing_class: Any,
    train: Dataset,
    recipe: str | Sequence[Part],
    args: ModXTrainingArguments,
    *,
    old: Dataset | None = None,
    recipe_args: Mapping[str, Any] | None = None,
    timed_steps: int = TIMED,
) -> Cost:
    """Train a copy of the model for a few steps and throw it away.

    Args:
        model, processing_class: that the phase starts from; the model stays as it is.
        train: the pairs of the phase.
        recipe, recipe_args: as `build_recipe` takes them. A recipe that replays does so where there are old pairs.
        args: of the training; its `output_dir` is not used.
        old: pairs to replay.
        timed_steps: beside a first one, which is not counted.

    Raises:
        ValueError: fewer than one step to be timed, or a teacher that the recipe cannot have.
    """
    if timed_steps < 1:
        raise ValueError(f"timed_steps must be at least 1, got {timed_steps}.")
    watch = _Watch()
    callbacks = build_recipe(recipe, **(recipe_args or {}))
    check_teachers(recipe, callbacks, args.teacher)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PartTrainer(
            model=copy.deepcopy(model).to(args.device),
            args=_short(args, timed_steps + 1, folder),
            train_dataset=_usable(train, (timed_steps + 1) * args.contrastive_batch_size, args),
            processing_class=processing_class,
            callbacks=[watch],
            loss_callbacks=callbacks,
            teacher=model if args.teacher == "initial" else None,
        )
        if old is not None and (replay := replay_of(callbacks)) is not None:
            size = replay.memory_size
            pairs = size if isinstance(size, int) else max(1, round(size * len(old)))
            trainer.use_memory(_usable(old, pairs, args))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    steps = args.phase_steps(len(train))
    seconds = statistics.median(watch.seconds)
    return Cost(steps, seconds, steps * seconds, _peak_bytes(args.device))


def _usable(table: Dataset, rows: int, args: ModXTrainingArguments) -> Dataset:
    """At most so many rows at random, without those that cannot be used."""
    sample = at_most(table, rows, seed=0)
    bad = find_bad_samples(sample, args.image_column, args.caption_column, "the timed steps")
    return drop_bad_samples(sample, bad, "skip", "the timed steps")


def _short(args: ModXTrainingArguments, steps: int, folder: str) -> ModXTrainingArguments:
    short = copy.copy(args)
    short.output_dir, short.max_steps, short.push_to_hub = folder, steps, False
    short.save_strategy = short.eval_strategy = short.logging_strategy = "no"
    short.report_to, short.disable_tqdm, short.teacher_cache = [], True, "off"
    return short


class _Watch(TrainerCallback):
    """From the end of one step to that of the next."""

    def __init__(self):
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows has not
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
