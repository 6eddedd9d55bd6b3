"""The contrastive loss of CLIP on embeddings, and what every loss over a similarity matrix shares."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Stands for "this column is not a candidate". Finite, so that a masked column times a probability of zero is zero
# and not NaN; far below any logit, so that its probability underflows to exactly zero.
NOT_A_CANDIDATE = -1e30


def info_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    pair_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE: the mean of the image-to-text and the text-to-image cross-entropy.

    `L = (CE(s V L^T) + CE(s L V^T)) / 2`, each a mean over rows, the target of row i being column i
    (Radford et al., 2021, figure 3).

    Args:
        image_embeds: (N, D), unit-norm rows.
        text_embeds: (N, D), unit-norm rows; row i belongs to image i.
        logit_scale: the factor s itself, already exponentiated; takes gradient.
        pair_ids: (N,) integers. Different rows of one id are no negatives of each other: their columns leave the
            denominator. None: every other row is a negative.
        chunk_size: rows of the similarity matrix held at once. Bounds memory, never changes the result.

    Returns:
        A scalar in fp32 (fp64 for fp64 embeddings). Embeddings that are not finite make it not finite.

    Raises:
        ValueError: the embeddings are not two matrices of one shape, or the ids are not N integers.
    """
    check_pairs(image_embeds, text_embeds, pair_ids)

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        def rows(start: int, stop: int) -> Tensor:
            cosines = similarities(queries, keys, pair_ids, start, stop)
            targets = torch.arange(start, stop, device=cosines.device)
            return F.cross_entropy(logit_scale * cosines, targets, reduction="sum")

        return sum_over_rows(rows, len(queries), chunk_size)

    with full_precision(image_embeds):
        images, texts = upcast(image_embeds), upcast(text_embeds)
        return (direction(images, texts) + direction(texts, images)) / (2 * len(images))


def similarities(queries: Tensor, keys: Tensor, pair_ids: Tensor | None, start: int, stop: int) -> Tensor:
    """Rows `start:stop` of the (N, N) cosine matrix; columns of the same pair id as the row, but the row's own, are
    taken out of the candidates."""
    cosines = queries[start:stop] @ keys.T
    if pair_ids is None:
        return cosines
    same = pair_ids[start:stop, None] == pair_ids[None, :]
    own = torch.arange(start, stop, device=same.device)[:, None] == torch.arange(len(keys), device=same.device)
    return cosines.masked_fill(same & ~own, NOT_A_CANDIDATE)


def sum_over_rows(rows: Callable[[int, int], Tensor], num_rows: int, chunk_size: int | None) -> Tensor:
    """Sum of `rows(start, stop)` over blocks of `chunk_size` rows; a block's matrix is made again in the backward
    pass instead of being kept."""
    if chunk_size is None or chunk_size >= num_rows:
        return rows(0, num_rows)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    blocks = [
        checkpoint(rows, start, min(start + chunk_size, num_rows), use_reentrant=False)
        for start in range(0, num_rows, chunk_size)
    ]
    return torch.stack(blocks).sum(dim=0)


def upcast(embeds: Tensor) -> Tensor:
    """Half precision to fp32: sums over thousands of columns need it. fp32 and fp64 stay as they are."""
    return embeds.float() if embeds.dtype in (torch.float16, torch.bfloat16) else embeds


def full_precision(embeds: Tensor) -> torch.autocast:
    """A context in which autocast does not turn the similarity matrix back to half precision."""
    return torch.autocast(device_type=embeds.device.type, enabled=False)


def check_pairs(image_embeds: Tensor, text_embeds: Tensor, pair_ids: Tensor | None = None) -> None:
    """Raise a ValueError unless the embeddings are two (N, D) matrices with N >= 1 and the ids N integers."""
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or len(image_embeds) == 0:
        raise ValueError(
            "Image and text embeddings must be two (N, D) matrices of one shape with at least one row, got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    if pair_ids is not None and (pair_ids.shape != image_embeds.shape[:1] or pair_ids.is_floating_point()):
        raise ValueError(
            f"pair_ids must be {len(image_embeds)} integers, one a pair, got {pair_ids.dtype} of shape "
            f"{tuple(pair_ids.shape)}."
        )
