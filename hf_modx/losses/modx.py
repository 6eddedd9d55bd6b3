"""The loss of Mod-X: contrastive learning plus screened distillation of the off-diagonal similarities."""

from dataclasses import dataclass

from torch import Tensor

from .affinity import Shard, affinity_losses
from .contrastive import check_pairs, full_precision, upcast
from .distillation import check_distillation, check_rows, rows_that_count


@dataclass(frozen=True)
class ModXLoss:
    """What `modx_loss` returns; `loss == contrastive + alpha * distillation`.

    Attributes:
        loss: scalar with gradient.
        contrastive: scalar, symmetric InfoNCE over the batch.
        distillation: scalar, KL(old || new) before it is weighted by alpha.
        image_rows_kept: scalar in [0, 1], fraction of images for which the old model ranks their own caption, or that
            of a positive, first.
        text_rows_kept: scalar in [0, 1], the same for captions and images.
        image_rows_rectified, text_rows_rectified: the fractions that were held to the pairs; 0 unless asked for.
    """

    loss: Tensor
    contrastive: Tensor
    distillation: Tensor
    image_rows_kept: Tensor
    text_rows_kept: Tensor
    image_rows_rectified: Tensor
    text_rows_rectified: Tensor


def modx_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    alpha: float = 20.0,
    distill_scale: float = 1.0,
    reduction: str = "sum",
    screen: bool | str = True,
    row_weights: Tensor | None = None,
    pair_ids: Tensor | None = None,
    positives: bool = False,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> ModXLoss:
    """`L = L_InfoNCE + alpha * L_KL` (Ni et al., "Continual Vision-Language Representation Learning with
    Off-Diagonal Information", ICML 2023, section 4; the defaults are those of the authors' code).

    Args:
        image_embeds, text_embeds: (N, D), unit-norm rows of the model in training.
        teacher_image_embeds, teacher_text_embeds: (N, D'), unit-norm rows of the old model on the same pairs.
        logit_scale: the factor on the cosines inside InfoNCE, already exponentiated, > 0; takes gradient. The
            distillation does not use it.
        alpha: weight of the distillation, >= 0. With `reduction="sum"` its pull grows with N: 20 at N = 280 (the
            paper's batch) equals 5,600 with "mean".
        distill_scale: factor on the cosines inside the distillation softmax, > 0.
        reduction: "sum" or "mean" over the N rows; concerns the distillation only.
        screen, row_weights: which rows the distillation keeps and which it rectifies, and what each counts, see
            `affinity_distillation`.
        pair_ids: (N,) or (N, K) integers; different rows that agree in an id are no negatives of each other, in both
            terms.
        positives: they are positives of each other, see `info_nce` and `affinity_distillation`. False: their columns
            leave both terms.
        chunk_size: rows of the similarity matrices held at once; None chooses. Bounds memory, never changes the
            result.
        shard: the rows that this process computes, where several share the loss (`LossContext.shard`).

    Raises:
        ValueError: shapes that do not fit, an unknown reduction or screening, a negative alpha, or a `distill_scale`
            that is not positive.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}.")
    check_distillation(image_embeds, text_embeds, teacher_image_embeds, teacher_text_embeds, distill_scale, reduction)
    check_rows(screen, row_weights, len(image_embeds))
    check_pairs(image_embeds, text_embeds, pair_ids)
    with full_precision(image_embeds):
        losses = affinity_losses(
            upcast(image_embeds),
            upcast(text_embeds),
            logit_scale,
            upcast(teacher_image_embeds.detach()),
            upcast(teacher_text_embeds.detach()),
            distill_scale=distill_scale,
            screen=screen,
            row_weights=row_weights,
            pair_ids=pair_ids,
            positives=positives,
            chunk_size=chunk_size,
            shard=shard,
        )
    number = rows_that_count(image_embeds, row_weights)
    distillation = losses.distillation / number if reduction == "mean" else losses.distillation
    return ModXLoss(
        loss=losses.contrastive + alpha * distillation,
        contrastive=losses.contrastive,
        distillation=distillation,
        image_rows_kept=losses.image_rows_kept / number,
        text_rows_kept=losses.text_rows_kept / number,
        image_rows_rectified=losses.image_rows_rectified / number,
        text_rows_rectified=losses.text_rows_rectified / number,
    )
