"""Where a step finds too little memory, the error says what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils.memory import should_reduce_batch_size

from ..training_args import ModXTrainingArguments


@contextmanager
def told_of_short_memory(args: ModXTrainingArguments) -> Iterator[None]:
    """A context in which a training step is taken.

    Raises:
        torch.OutOfMemoryError, RuntimeError: in the place of torch's, of the same type.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise type(error)(f"{error} {_advice(args)}") from error


def _advice(args: ModXTrainingArguments) -> str:
    batch, chunk = args.per_device_train_batch_size, args.gradient_cache_chunk_size
    if chunk is not None:
        return f"Lower gradient_cache_chunk_size (now {chunk}; per_device_train_batch_size is {batch})."
    return f"All {batch} pairs of a process are held at once: set gradient_cache_chunk_size to fewer."
