"""Gathering rows from all processes, with gradient."""

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate every process's rows, in the order of the ranks; the number of rows may differ between processes.

    The gradient of a local row is the SUM over all processes of the gradients that reached it. With the whole loss
    computed on every process and gradients averaged over processes afterwards (DDP), the parameters get exactly the
    gradient of one big batch.

    Args:
        rows: (n, ...) on each process; the trailing shape is the same everywhere.

    Returns:
        (sum of n, ...). Without a process group, or with one process, the input itself.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    return _AllGatherRows.apply(rows, _row_counts(rows))


def _row_counts(rows: Tensor) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return torch.cat(counts).tolist()


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
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        rank = dist.get_rank()
        start = sum(ctx.counts[:rank])
        return gradient[start : start + ctx.counts[rank]], None
