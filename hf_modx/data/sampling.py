"""Which rows each process sees in which batch."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

MEMORY_ORDER = 1  # sets the random order of the memory apart from that of the new rows


class GlobalBatches(torch.utils.data.Sampler[list[int]]):
    """All rows in random order, cut into global batches of which each process takes its share; with a memory, a share
    of every contrastive batch comes from there.

    The order is a pure function of (seed, epoch) and the global batches are the same on any number of processes. A
    batch that does not divide is shared unevenly; a process for which a small last batch leaves nothing takes a row
    that another process has, so that it takes part in the step: whoever gathers the rows leaves the second one out.

    Number and sizes of the batches are the same with and without a memory: its rows take the place of new ones, of
    which an epoch then shows fewer, and every epoch others. The memory is gone through in random order again and
    again: no row of it is seen twice in a batch, and all are seen about equally often.

    Args:
        num_rows: new rows, the first ones of the data set.
        batch_size: rows a process and batch.
        seed: of this phase's order.
        current_epoch: asked at the start of each pass.
        drop_last: leave out the rows at the end of an epoch that do not fill a contrastive batch.
        batches_held: how many global batches in a row form one contrastive batch.
        memory_rows: rows of the memory; they follow the new ones in the data set.
        memory_share: of every contrastive batch, in [0, 1), rounded; above 0 it is one row at least.
        arrange: `arrange(rows, sizes)` puts the new rows of an epoch, which come in random order, into the order of
            contrastive batches with so many new rows (see `Arrangement`). None: at random.
        process_index, num_processes: this process, and of how many.

    Yields:
        Indices `epoch * (num_rows + memory_rows) + row`, as `PairDataset` takes them; for a row of the memory the
        number of passes through the memory stands for the epoch.
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
        memory_rows: int = 0,
        memory_share: float = 0.0,
        arrange: Callable[[np.ndarray, list[int]], np.ndarray] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.num_rows = num_rows
        self.memory_rows = memory_rows
        self.memory_share = memory_share
        self.arrange = arrange
        self.seed = seed
        self.current_epoch = current_epoch
        self.global_batch_size = batch_size * num_processes
        self.contrastive_batch_size = self.global_batch_size * batches_held
        self.process_index = process_index
        self.num_processes = num_processes
        self.used_rows = num_rows - num_rows % self.contrastive_batch_size if drop_last else num_rows
        self._memory_pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return -(-self.used_rows // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.current_epoch()
        order = self._indices(epoch, self._new_rows(epoch))
        starts = range(0, self.used_rows, self.contrastive_batch_size)
        used = 0
        for number, start in enumerate(starts, start=epoch * len(starts)):
            size = min(self.contrastive_batch_size, self.used_rows - start)
            replayed = self._replayed(number, size)
            new = order[used : used + size - len(replayed)]
            used += len(new)
            batch = np.concatenate([new, replayed])
            for at in range(0, size, self.global_batch_size):
                yield self._share(batch[at : at + self.global_batch_size])

    def _new_rows(self, epoch: int) -> np.ndarray:
        """The new rows in the order in which the batches of an epoch take them."""
        rows = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        if self.arrange is None:
            return rows
        whole, rest = divmod(self.used_rows, self.contrastive_batch_size)
        sizes = [self.contrastive_batch_size] * whole + ([rest] if rest else [])
        sizes = [size - self._memory_places(size) for size in sizes]
        return self.arrange(rows[: sum(sizes)], sizes)

    def _replayed(self, number: int, size: int) -> np.ndarray:
        """Indices of the memory's rows in contrastive batch `number` of the phase, which holds `size` rows."""
        wanted = self._memory_places(size)
        if wanted == 0:
            return np.empty(0, dtype=np.int64)
        # A pass leaves out the rest of the memory that does not fill a batch, another rest each time: so no batch
        # lies across two passes.
        places = self._memory_places(min(self.contrastive_batch_size, self.used_rows))
        memory_pass, batch = divmod(number, self.memory_rows // places)
        order = self._memory_order(memory_pass)
        return self._indices(memory_pass, self.num_rows + order[batch * places :][:wanted])

    def _memory_places(self, size: int) -> int:
        if self.memory_share == 0:
            return 0
        return min(max(1, round(self.memory_share * size)), self.memory_rows, size - 1)

    def _memory_order(self, memory_pass: int) -> np.ndarray:
        if self._memory_pass is None or self._memory_pass[0] != memory_pass:
            generator = np.random.default_rng([self.seed, memory_pass, MEMORY_ORDER])
            self._memory_pass = memory_pass, generator.permutation(self.memory_rows)
        return self._memory_pass[1]

    def _indices(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        return rows + epoch * (self.num_rows + self.memory_rows)

    def _share(self, batch: np.ndarray) -> list[int]:
        start, stop = (len(batch) * k // self.num_processes for k in (self.process_index, self.process_index + 1))
        return (batch[start:stop] if stop > start else batch[:1]).tolist()
