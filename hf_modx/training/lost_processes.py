"""Where a worker of the data loader is gone or hangs, its batches are read again; where another process of the run is,
the error says so."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)

ATTEMPTS = 3
OF_WORKERS = ("DataLoader worker", "DataLoader timed out")
OF_PROCESSES = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Timed out waiting")
"""How torch's messages tell: of its data loader, and of gloo and NCCL."""


class PatientBatches:
    """The batches of an epoch, in an iterator that workers cannot end: one that dies or takes longer than
    `dataloader_timeout` costs new workers, which go on with the batch that was asked for.

    Args:
        batches: of the epoch.
        again: what they are from a number on, with workers of their own.
        taken: how many of the epoch are done, where it was interrupted.
    """

    def __init__(self, batches: Iterator, again: Callable[[int], Iterator], taken: int = 0):
        self._batches, self._again, self._taken = batches, again, taken
        self.of_epoch = batches  # kept, so that no other iterator is taken for it

    def __iter__(self) -> "PatientBatches":
        return self

    def __next__(self) -> Any:
        left = ATTEMPTS
        while True:
            try:
                batch = next(self._batches)
            except RuntimeError as error:
                left -= 1
                if not (left and any(sign in str(error) for sign in OF_WORKERS)):
                    raise
                logger.warning("%s Batch %d of the epoch is read again.", error, self._taken + 1)
                self._batches = self._again(self._taken)
            else:
                self._taken += 1
                return batch


@contextmanager
def told_of_lost_processes(args: ModXTrainingArguments) -> Iterator[None]:
    """A context in which batches are read and processes exchange; an error about one that is lost says what helps.

    Raises:
        RuntimeError: in the place of torch's.
    """
    try:
        yield
    except RuntimeError as error:
        advice = _advice(str(error), args)
        if advice is None:
            raise
        again = f"The checkpoints in {args.output_dir} are good: the same command goes on from the last one."
        raise RuntimeError(f"{error} {advice} {again}") from error


def _advice(message: str, args: ModXTrainingArguments) -> str | None:
    if any(sign in message for sign in OF_WORKERS):
        return (
            "A process that reads the training data was killed, which the system does where memory is short (lower "
            f"dataloader_num_workers, now {args.dataloader_num_workers}), or a disk did not answer within "
            f"dataloader_timeout, now {args.dataloader_timeout} seconds."
        )
    if any(sign in message for sign in OF_PROCESSES):
        return "Another process of the run has ended or hangs: its own messages say why."
    return None
