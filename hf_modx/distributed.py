"""Gathering rows from all processes with gradient, and doing something on one of them for all."""

import pickle  # nosec B403 # nothing is read but what the same line has written
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The rank of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def row_counts(rows: Tensor) -> list[int]:
    """How many rows each process holds, in the order of the ranks."""
    if world_size() == 1:
        return [len(rows)]
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return torch.cat(counts).tolist()


def all_gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """Concatenate every process's rows, in the order of the ranks; the number of rows may differ between processes.

    The gradient of a local row is the SUM over all processes of the gradients that reached it. With the whole loss
    computed on every process and gradients averaged over processes afterwards (DDP), the parameters get exactly the
    gradient of one big batch.

    Args:
        rows: (n, ...) on each process; the trailing shape is the same everywhere.
        counts: what `row_counts` says of these rows, where it is known; spares an exchange.

    Returns:
        (sum of n, ...). With one process, the input itself.
    """
    if world_size() == 1:
        return rows
    return _AllGatherRows.apply(rows, row_counts(rows) if counts is None else counts)


def gather_stacked(tensor: Tensor) -> Tensor:
    """Stack the processes' tensors of one shape, (...) to (number of processes, ...), without gradient."""
    if world_size() == 1:
        return tensor.detach()[None]
    stacked = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(stacked, tensor.detach().contiguous())
    return torch.stack(stacked)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; all must have it, or none."""
    for parameter in parameters:
        if world_size() > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def copy_from_main_process(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of the main process."""
    for tensor in tensors:
        if world_size() > 1:
            dist.broadcast(tensor, src=0)


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call the function on the main process alone; every process gets its result, or raises its error: one that
    raised alone would leave the others waiting for ever."""
    answer = [_attempt(function)] if PartialState().is_main_process else [None]
    return _raise_or_return(broadcast_object_list(answer))[0]


def on_each_process(function: Callable[[int, int], list]) -> list:
    """Call `function(rank, number of processes)` everywhere and join the lists, in the order of the ranks; an error on
    one process is raised on all."""
    state = PartialState()
    answers = gather_object([_attempt(lambda: function(state.process_index, state.num_processes))])
    return [item for answer in _raise_or_return(answers) for item in answer]


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # whatever it is: the other processes wait for this one, and it is raised on all
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or its text where it cannot travel to the other processes."""
    try:
        pickle.loads(pickle.dumps(error))  # nosec B301 # its own words
    except Exception:
        # Of any class's `__reduce__` or `__init__`. Let through here, the other processes would wait for ever.
        return RuntimeError(repr(error))
    return error


def _raise_or_return(answers: list) -> list:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Collectives want equal shapes: pad to the longest, cut afterwards.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([block[:count] for block, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hold it for others as well
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        start = sum(ctx.counts[:rank])
        return gradient[start : start + ctx.counts[rank]], None
