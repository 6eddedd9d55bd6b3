"""What the log of a phase says, short enough to be kept with its results."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .provenance import environment

if TYPE_CHECKING:
    from ..trainer import ModXTrainer

POINTS = 50
"""A curve has at most so many points."""

NOT_A_CURVE = ("step", "epoch", "learning_rate", "data_wait")


def training_record(trainer: "ModXTrainer") -> dict[str, Any]:
    """What the log of a phase says in short: how many rows were kept or rectified, the time, and the curves."""
    history = trainer.state.log_history
    record: dict[str, Any] = {"steps": trainer.state.global_step, "pairs": len(trainer.train_dataset)}
    if trainer.memory is not None:
        record["memory_pairs"] = len(trainer.memory)
    for name in ("image_rows_kept", "text_rows_kept", "image_rows_rectified", "text_rows_rectified"):
        values = [entry[name] for entry in history if name in entry]
        if values:
            record[name] = {"first": values[0], "mean": sum(values) / len(values), "last": values[-1]}
    record["environment"] = environment(trainer.args.device, trainer.args.world_size)
    for name in ("train_runtime", "train_samples_per_second"):
        record[name] = next((entry[name] for entry in reversed(history) if name in entry), None)
    joules = [entry["train_energy_joules"] for entry in history if "train_energy_joules" in entry]
    if joules:
        record["train_energy_joules"] = joules[-1]
    record["log"] = thinned_log(history)
    for callback in trainer.loss_callbacks:
        record |= callback.results()
    return record


def thinned_log(history: Sequence[Mapping[str, Any]], points: int = POINTS) -> dict[str, list[float | None]]:
    """Loss, its terms and all else that a training step logs, over the steps of one phase.

    Neighbouring entries become one, with the mean of their values at the last one's step: what a Trainer logs is
    already the mean since the entry before.

    Args:
        history: `log_history` of a Trainer's state; only the entries of training steps count.
        points: at most so many are left.

    Returns:
        `step` and, as long, each value by name; None where an entry does not have it or it is not finite. Empty where
        nothing was logged.
    """
    entries = [entry for entry in history if "loss" in entry]
    if not entries:
        return {}
    size = math.ceil(len(entries) / points)
    groups = [entries[at : at + size] for at in range(0, len(entries), size)]
    names = dict.fromkeys(name for entry in entries for name in entry if name not in NOT_A_CURVE)
    curves = {name: [_mean(entry.get(name) for entry in group) for group in groups] for name in names}
    return {"step": [group[-1]["step"] for group in groups], **curves}


def _mean(values) -> float | None:
    finite = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return float(f"{sum(finite) / len(finite):.6g}") if finite else None
