"""Which rows each process sees in which batch."""

from collections.abc import Callable, Iterator

import numpy as np
import torch


class GlobalBatches(torch.utils.data.Sampler[list[int]]):
    """All rows in random order, cut into global batches of which each process takes its share.

    The order is a pure function of (seed, epoch) and the global batches are the same on any number of processes. A
    batch that does not divide is shared unevenly; a process for which a small last batch leaves nothing takes a row
    that another process has, so that it takes part in the step: whoever gathers the rows leaves the second one out.

    Args:
        num_rows: rows of the data set.
        batch_size: rows a process and batch.
        seed: of this phase's order.
        current_epoch: asked at the start of each pass.
        drop_last: leave out the rows at the end of an epoch that do not fill a contrastive batch.
        batches_held: how many global batches in a row form one contrastive batch.
        process_index, num_processes: this process, and of how many.

    Yields:
        Indices `epoch * num_rows + row`, as `PairDataset` takes them.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        current_epoch: Callable[[], int],
        drop_last: bool,
        batches_held: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.current_epoch = current_epoch
        self.global_batch_size = batch_size * num_processes
        self.process_index = process_index
        self.num_processes = num_processes
        contrastive_batch_size = self.global_batch_size * batches_held
        self.used_rows = num_rows - num_rows % contrastive_batch_size if drop_last else num_rows

    def __len__(self) -> int:
        return -(-self.used_rows // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.current_epoch()
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)[: self.used_rows]
        for start in range(0, self.used_rows, self.global_batch_size):
            yield self._share(order[start : start + self.global_batch_size] + epoch * self.num_rows)

    def _share(self, batch: np.ndarray) -> list[int]:
        start, stop = (len(batch) * k // self.num_processes for k in (self.process_index, self.process_index + 1))
        return (batch[start:stop] if stop > start else batch[:1]).tolist()
