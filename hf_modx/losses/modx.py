"""The loss of Mod-X: contrastive learning plus screened distillation of the off-diagonal similarities."""

from dataclasses import dataclass

from torch import Tensor

from .contrastive import info_nce
from .distillation import affinity_distillation


@dataclass(frozen=True)
class ModXLoss:
    """What `modx_loss` returns; `loss == contrastive + alpha * distillation`.

    Attributes:
        loss: scalar with gradient.
        contrastive: scalar, symmetric InfoNCE over the batch.
        distillation: scalar, KL(old || new) before it is weighted by alpha.
        image_rows_kept: scalar in [0, 1], fraction of images whose own caption the old model ranks first.
        text_rows_kept: scalar in [0, 1], fraction of captions whose own image the old model ranks first.
    """

    loss: Tensor
    contrastive: Tensor
    distillation: Tensor
    image_rows_kept: Tensor
    text_rows_kept: Tensor


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
    pair_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> ModXLoss:
    """`L = L_InfoNCE + alpha * L_KL` (Ni et al., "Continual Vision-Language Representation Learning with
    Off-Diagonal Information", ICML 2023, section 4; the defaults are those of the authors' code).

    Args:
        image_embeds, text_embeds: (N, D), unit-norm rows of the model in training.
        teacher_image_embeds, teacher_text_embeds: (N, D'), unit-norm rows of the old model on the same pairs.
        logit_scale: the factor on the cosines inside InfoNCE, already exponentiated; takes gradient. The
            distillation does not use it.
        alpha: weight of the distillation, >= 0. With `reduction="sum"` its pull grows with N: 20 at N = 280 (the
            paper's batch) equals 5,600 with "mean".
        distill_scale: factor on the cosines inside the distillation softmax.
        reduction: "sum" or "mean" over the N rows; concerns the distillation only.
        pair_ids: (N,) integers; different rows of one id are no negatives of each other, in both terms.
        chunk_size: rows of the similarity matrices held at once. Bounds memory, never changes the result.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, or a negative alpha.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}.")
    contrastive = info_nce(image_embeds, text_embeds, logit_scale, pair_ids=pair_ids, chunk_size=chunk_size)
    distilled = affinity_distillation(
        image_embeds,
        text_embeds,
        teacher_image_embeds,
        teacher_text_embeds,
        distill_scale=distill_scale,
        reduction=reduction,
        pair_ids=pair_ids,
        chunk_size=chunk_size,
    )
    return ModXLoss(
        loss=contrastive + alpha * distilled.loss,
        contrastive=contrastive,
        distillation=distilled.loss,
        image_rows_kept=distilled.image_rows_kept,
        text_rows_kept=distilled.text_rows_kept,
    )
