"""The contrastive loss of CLIP on embeddings."""

import torch
from torch import Tensor

from .affinity import Shard, affinity_losses


def info_nce(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    pair_ids: Tensor | None = None,
    positives: bool = False,
    extra_text_embeds: Tensor | None = None,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Symmetric InfoNCE: the mean of the image-to-text and the text-to-image cross-entropy.

    `L = (CE(s V L^T) + CE(s L V^T)) / 2`, each a mean over rows, the target of row i being column i
    (Radford et al., 2021, figure 3).

    Args:
        image_embeds: (N, D), unit-norm rows.
        text_embeds: (N, D), unit-norm rows; row i belongs to image i.
        logit_scale: the factor s itself, already exponentiated, > 0; takes gradient.
        pair_ids: (N,) or (N, K) integers. Different rows that agree in an id are no negatives of each other. None:
            every other row is a negative.
        positives: rows that agree in an id are positives of each other: the target of a row is an equal share for each
            of them and for its own pair, and all stay in the denominator (UniCL: Yang et al., "Unified Contrastive
            Learning in Image-Text-Label Space", CVPR 2022, section 3; the mean over positives outside the logarithm
            is that of SupCon, Khosla et al., NeurIPS 2020). False: their columns leave the denominator.
        extra_text_embeds: (M, D), unit-norm rows: further negatives of every image, for instance generated texts.
            They widen the image-to-text denominators and have no row of their own.
        chunk_size: rows of the similarity matrix held at once; None chooses. Bounds memory, never changes the result.
        shard: the rows that this process computes, where several share the loss (`LossContext.shard`).

    Returns:
        A scalar in fp32 (fp64 for fp64 embeddings). Embeddings that are not finite make it not finite.

    Raises:
        ValueError: the embeddings are not two matrices of one shape, or the ids are not N integers.
    """
    check_pairs(image_embeds, text_embeds, pair_ids)
    with full_precision(image_embeds):
        images, texts = upcast(image_embeds), upcast(with_extra(text_embeds, extra_text_embeds))
        return affinity_losses(
            images, texts, logit_scale, pair_ids=pair_ids, positives=positives, chunk_size=chunk_size, shard=shard
        ).contrastive


def with_extra(embeds: Tensor, extra: Tensor | None) -> Tensor:
    """The embeddings and the extra ones below them.

    Raises:
        ValueError: the extra embeddings are no (M, D) matrix of the same D.
    """
    if extra is None:
        return embeds
    if extra.ndim != 2 or extra.shape[1] != embeds.shape[1]:
        raise ValueError(f"Extra text embeddings must be (M, {embeds.shape[1]}), got {tuple(extra.shape)}.")
    return torch.cat([embeds, extra])


def upcast(embeds: Tensor) -> Tensor:
    """Half precision to fp32: sums over thousands of columns need it. fp32 and fp64 stay as they are."""
    return embeds.float() if embeds.dtype in (torch.float16, torch.bfloat16) else embeds


def full_precision(embeds: Tensor) -> torch.autocast:
    """A context in which autocast does not turn the similarity matrix back to half precision."""
    return torch.autocast(device_type=embeds.device.type, enabled=False)


def check_pairs(image_embeds: Tensor, text_embeds: Tensor, pair_ids: Tensor | None = None) -> None:
    """Raise a ValueError unless the embeddings are two (N, D) matrices with N >= 1 and the ids N integers, or N rows
    of them."""
    if image_embeds.ndim != 2 or image_embeds.shape != text_embeds.shape or len(image_embeds) == 0:
        raise ValueError(
            "Image and text embeddings must be two (N, D) matrices of one shape with at least one row, got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    if pair_ids is None:
        return
    if pair_ids.ndim not in (1, 2) or len(pair_ids) != len(image_embeds) or pair_ids.is_floating_point():
        raise ValueError(
            f"pair_ids must be {len(image_embeds)} integers, one a pair, or as many rows of them, got "
            f"{pair_ids.dtype} of shape {tuple(pair_ids.shape)}."
        )
