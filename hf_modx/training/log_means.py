"""The means of what training steps report, from one log to the next, across interruptions."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LOG_MEANS_NAME = "log_means.safetensors"
"""In a checkpoint: what was reported since the last log. Without it an interrupted run, and the results with it, would
show the mean over some of the steps where an undisturbed one shows that over all."""


class LogMeans:
    """Sums of scalars by name, and how often each came."""

    def __init__(self):
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take the values () of one step; there is no wait for their device."""
        for name, value in values.items():
            total, count = self._sums.get(name, (torch.zeros((), device=value.device), 0))
            self._sums[name] = total + value.detach(), count + 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty where nothing came."""
        means = {name: (total / count).item() for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def write(self, checkpoint: Path) -> None:
        """Keep the sums in a checkpoint."""
        totals = {f"total.{name}": total.cpu() for name, (total, _) in self._sums.items()}
        counts = {f"count.{name}": torch.tensor(count) for name, (_, count) in self._sums.items()}
        save_file({**totals, **counts}, checkpoint / LOG_MEANS_NAME)

    def read(self, checkpoint: Path) -> None:
        """Go on from the sums in a checkpoint; afresh where it has none, as one of a stock Trainer."""
        path = checkpoint / LOG_MEANS_NAME
        kept = load_file(path) if path.exists() else {}
        names = [name.removeprefix("total.") for name in kept if name.startswith("total.")]
        self._sums = {name: (kept[f"total.{name}"], int(kept[f"count.{name}"])) for name in names}
