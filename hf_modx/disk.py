"""Room on the disk: asked for before a phase, and told of where it was not there after all."""

import errno
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from .callbacks import LossCallback
from .training_args import ModXTrainingArguments


def bytes_of_phase(model: nn.Module, args: ModXTrainingArguments, loss_callbacks: Sequence[LossCallback] = ()) -> int:
    """About what a phase leaves on the disk at most: its model and, without `save_total_limit` two, checkpoints, and
    one more while it is written. A checkpoint is the model, two moments of each trained weight (Adam's), and the
    weights that loss callbacks keep."""
    of_model = _bytes(model.parameters())
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    beside = sum(_bytes(callback.weights_in_state(model)) for callback in loss_callbacks)
    kept = 0 if args.save_strategy == "no" else args.save_total_limit or 2
    return of_model + (kept + 1) * (of_model + 2 * trained + beside)


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise an OSError unless so many bytes are free where the folder is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs about {_readable(needed)} in {folder}, and {_readable(free)} are free. Make room, or lower "
            "save_total_limit",
        )


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def removed_on_failure(folder: Path, what: str) -> Iterator[None]:
    """A context in which a folder is written. Where that fails, what there is of it gives its room back, and an
    OSError says what was not written, and where."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is what torch.save raises
        shutil.rmtree(folder, ignore_errors=True)
        free = _readable(shutil.disk_usage(folder.parent).free)
        raise OSError(
            f"{what} could not be written to {folder.parent}, where {free} are free: {error}. What was saved before "
            "is whole: make room, and run the same command again."
        ) from error


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
