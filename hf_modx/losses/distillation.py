"""Distillation of the similarity matrix: the new model's rows of cosines follow the old model's."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .affinity import RECTIFY, Shard, affinity_losses
from .contrastive import check_pairs, full_precision, upcast, with_extra


@dataclass(frozen=True)
class AffinityDistillation:
    """What `affinity_distillation` returns.

    Attributes:
        loss: scalar, the mean of the two directions.
        image_rows_kept: scalar in [0, 1], the fraction of image rows that took part; no gradient.
        text_rows_kept: the same for text rows.
        image_rows_rectified, text_rows_rectified: the same of rows that were held to the pairs; 0 unless asked for.
    """

    loss: Tensor
    image_rows_kept: Tensor
    text_rows_kept: Tensor
    image_rows_rectified: Tensor
    text_rows_rectified: Tensor


def affinity_distillation(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    *,
    distill_scale: float = 1.0,
    reduction: str = "sum",
    screen: bool | str = True,
    row_weights: Tensor | None = None,
    pair_ids: Tensor | None = None,
    positives: bool = False,
    extra_text_embeds: Tensor | None = None,
    teacher_extra_text_embeds: Tensor | None = None,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> AffinityDistillation:
    """KL(old || new) between the rows of the two similarity matrices, in both directions.

    For the image-to-text direction, with `M = V L^T` of the new and `M'` of the old model,
    `KL_i = sum_j softmax(c M'_i)_j (log softmax(c M'_i)_j - log softmax(c M_i)_j)`; the text-to-image direction is
    the same on the transposed matrices, and the loss is the mean of the two (Mod-X, Ni et al., ICML 2023, section 4;
    both directions and the temperature of 1 as in the authors' code).

    Screening: row i takes part if the old model gets it right, that is if no other candidate of the row is STRICTLY
    more similar than its own partner. A tie (up to rounding) is kept. A row in which the old model's similarities are
    not finite is not kept. A row that is not kept has value 0 and gradient 0, which equals the paper's replacement of
    the old row by the current one. New embeddings that are not finite make the loss not finite.

    Rectifying, `screen="rectify"`, is our RECONSTRUCTION of DKR (Cui et al., "Continual Vision-Language Retrieval via
    Dynamic Knowledge Rectification", AAAI 2024) from what its abstract says; the formula is ours. A row that the old
    model gets right is kept. One that only the new model gets right, found as for the old one, is left alone, as
    above. One that both get wrong has the pairs as its target in the old model's place:
    `KL_i = -log softmax(c M_i)_i`, at the same c. Which case a row is takes no part in the gradient.

    Args:
        image_embeds, text_embeds: (N, D), unit-norm rows, the new model's; take gradient.
        teacher_image_embeds, teacher_text_embeds: (N, D'), unit-norm rows, the old model's on the same pairs; no
            gradient is computed for them. D' may differ from D.
        distill_scale: the factor c on the cosines inside the softmax, > 0.
        reduction: "sum" over rows, or "mean", which divides by N (not by the number of kept rows).
        screen: False keeps every row; "rectify" rectifies rows that both models get wrong.
        row_weights: (N,) of floats >= 0 or booleans: what the rows of each pair count, in both directions. Pairs of
            weight zero are not distilled and stay candidates; N, in "mean" and in the fractions, is then the number of
            the others. None: every row counts 1.
        pair_ids: (N,) or (N, K) integers; other rows that agree in an id are no wrong answers.
        positives: they are right answers: a row takes part if the old model's most similar candidate is its partner or
            any of theirs, all stay in both softmaxes, and the target of a rectified row is shared out equally among
            them. False: they are no candidates, in screening and in both softmaxes.
        extra_text_embeds, teacher_extra_text_embeds: (M, D) and (M, D'): further candidates of every image, for
            instance generated texts; they have no row of their own.
        chunk_size: rows held at once; None chooses. Bounds memory, never changes the result.
        shard: the rows that this process computes, where several share the loss (`LossContext.shard`).

    Raises:
        ValueError: shapes that do not fit, an unknown reduction or screening, or a `distill_scale` that is not
            positive.
    """
    check_distillation(image_embeds, text_embeds, teacher_image_embeds, teacher_text_embeds, distill_scale, reduction)
    check_rows(screen, row_weights, len(image_embeds))
    check_pairs(image_embeds, text_embeds, pair_ids)
    texts = with_extra(text_embeds, extra_text_embeds)
    teacher_texts = with_extra(teacher_text_embeds, teacher_extra_text_embeds)
    if len(texts) != len(teacher_texts):
        raise ValueError("Extra text embeddings are needed of both models, row for row, or of neither.")
    with full_precision(image_embeds):
        losses = affinity_losses(
            upcast(image_embeds),
            upcast(texts),
            None,
            upcast(teacher_image_embeds.detach()),
            upcast(teacher_texts.detach()),
            distill_scale=distill_scale,
            screen=screen,
            row_weights=row_weights,
            pair_ids=pair_ids,
            positives=positives,
            chunk_size=chunk_size,
            shard=shard,
        )
    number = rows_that_count(image_embeds, row_weights)
    loss = losses.distillation / number if reduction == "mean" else losses.distillation
    return AffinityDistillation(loss, *(rows_of_a_kind / number for rows_of_a_kind in losses[2:]))


def check_screening(screen: bool | str) -> None:
    """Raise a ValueError unless it is one of the three ways to choose rows."""
    if screen not in (True, False, RECTIFY):
        raise ValueError(f'screen must be true, false or "{RECTIFY}", got {screen!r}.')


def check_rows(screen: bool | str, weights: Tensor | None, number: int) -> None:
    """Raise a ValueError unless both say how much of so many rows is distilled."""
    check_screening(screen)
    if weights is None:
        return
    if weights.shape != (number,) or not (weights.is_floating_point() or weights.dtype == torch.bool):
        raise ValueError(
            f"row_weights must be {number} floats or booleans, got {weights.dtype} of shape {tuple(weights.shape)}."
        )


def rows_that_count(embeds: Tensor, weights: Tensor | None) -> Tensor | int:
    """How many pairs are distilled, at least 1."""
    return len(embeds) if weights is None else (weights > 0).sum().clamp(min=1)


def check_distillation(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    distill_scale: float,
    reduction: str,
) -> None:
    """Raise a ValueError unless both models embedded the same pairs and the settings are known."""
    check_pairs(image_embeds, text_embeds)
    check_pairs(teacher_image_embeds, teacher_text_embeds)
    if len(teacher_image_embeds) != len(image_embeds):
        raise ValueError(
            f"The old model embedded {len(teacher_image_embeds)} pairs and the new one {len(image_embeds)}: both must "
            "see the same batch."
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}.')
    if not 0 < distill_scale < math.inf:
        raise ValueError(f"distill_scale must be positive and finite, got {distill_scale}.")
