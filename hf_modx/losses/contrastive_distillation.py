"""Contrastive distillation: a new model's features find the old model's among those of the whole batch."""

import torch
from torch import Tensor

from .affinity import Shard
from .contrastive import check_pairs, info_nce


def contrastive_distillation(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    pair_ids: Tensor | None = None,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Symmetric InfoNCE between the 2N features of a batch under the new and under the old model.

    With `Z = [V; L]` of the new and `Z' = [V'; L']` of the old model, images above texts,
    `L = (CE(s Z Z'^T) + CE(s Z' Z^T)) / 2`, each a mean over 2N rows, the target of row i being column i: each feature
    is drawn to what it was and pushed from what all others were, of either modality, its own pair's other half
    included (the consolidation term of C-CLIP, ICLR 2025, on projected features).

    Args:
        image_embeds: (N, D), unit-norm rows of the new model, projected or not; take gradient.
        text_embeds: (N, D), likewise; row i belongs to image i.
        teacher_image_embeds, teacher_text_embeds: (N, D), unit-norm rows of the old model.
        logit_scale: the factor s, already exponentiated, > 0.
        pair_ids: (N,) or (N, K) integers >= 0. Different rows of one modality that agree in an id are no negatives of
            each other. None: every other row is one.
        chunk_size: rows of the similarity matrix held at once; None chooses.
        shard: the pairs that this process computes, where several share the loss.

    Returns:
        A scalar in fp32 (fp64 for fp64 embeddings).

    Raises:
        ValueError: the embeddings are not four matrices of one shape, or the ids are not N integers.
    """
    check_pairs(image_embeds, text_embeds, pair_ids)
    check_pairs(teacher_image_embeds, teacher_text_embeds)
    if image_embeds.shape != teacher_image_embeds.shape:
        raise ValueError(
            f"Both models must embed the same pairs in one width, got {tuple(image_embeds.shape)} of the new and "
            f"{tuple(teacher_image_embeds.shape)} of the old model."
        )
    new, old = _alternating(image_embeds, text_embeds), _alternating(teacher_image_embeds, teacher_text_embeds)
    # An image's id is even and a text's is odd, so that the two are never told to be the same.
    ids = None if pair_ids is None else _alternating(2 * pair_ids, 2 * pair_ids + 1)
    if shard is not None:
        shard = Shard(2 * shard.start, 2 * shard.stop, shard.processes, shard.gather)
    return info_nce(new, old.to(new.dtype), logit_scale, pair_ids=ids, chunk_size=chunk_size, shard=shard)


def _alternating(images: Tensor, texts: Tensor) -> Tensor:
    """Row 0 of the images, row 0 of the texts, row 1 of the images and so on: the loss does not depend on the order,
    and the pairs of one process stay together."""
    return torch.stack([images, texts], dim=1).flatten(0, 1)
