"""Distillation of the similarity matrix: the new model's rows of cosines follow the old model's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrastive import check_pairs, full_precision, similarities, sum_over_rows, upcast

# In units of the last place. Equal vectors multiplied in blocks of another shape differ by so much: without it a tie
# would be kept or not with the chunk size.
ROUNDING = 8


@dataclass(frozen=True)
class AffinityDistillation:
    """What `affinity_distillation` returns.

    Attributes:
        loss: scalar, the mean of the two directions.
        image_rows_kept: scalar in [0, 1], the fraction of image rows that took part; no gradient.
        text_rows_kept: the same for text rows.
    """

    loss: Tensor
    image_rows_kept: Tensor
    text_rows_kept: Tensor


def affinity_distillation(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    *,
    distill_scale: float = 1.0,
    reduction: str = "sum",
    screen: bool = True,
    pair_ids: Tensor | None = None,
    chunk_size: int | None = None,
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

    Args:
        image_embeds, text_embeds: (N, D), unit-norm rows, the new model's; take gradient.
        teacher_image_embeds, teacher_text_embeds: (N, D'), unit-norm rows, the old model's on the same pairs; no
            gradient is computed for them. D' may differ from D.
        distill_scale: the factor c on the cosines inside the softmax.
        reduction: "sum" over rows, or "mean", which divides by N (not by the number of kept rows).
        screen: False keeps every row.
        pair_ids: (N,) integers; other rows of the same id are no candidates, in screening and in both softmaxes.
        chunk_size: rows held at once. Bounds memory, never changes the result.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    check_pairs(image_embeds, text_embeds, pair_ids)
    check_pairs(teacher_image_embeds, teacher_text_embeds)
    if len(teacher_image_embeds) != len(image_embeds):
        raise ValueError(
            f"The old model embedded {len(teacher_image_embeds)} pairs and the new one {len(image_embeds)}: both must "
            "see the same batch."
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}.')

    def direction(queries: Tensor, keys: Tensor, old_queries: Tensor, old_keys: Tensor) -> tuple[Tensor, Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            new = similarities(queries, keys, pair_ids, start, stop)
            old = similarities(old_queries, old_keys, pair_ids, start, stop)
            return torch.stack(_screened_kl(new, old, start, distill_scale, screen))

        total = sum_over_rows(rows, len(queries), chunk_size)
        return total[0], total[1].detach() / len(queries)

    with full_precision(image_embeds):
        images, texts = upcast(image_embeds), upcast(text_embeds)
        old_images, old_texts = upcast(teacher_image_embeds.detach()), upcast(teacher_text_embeds.detach())
        image_loss, image_rows_kept = direction(images, texts, old_images, old_texts)
        text_loss, text_rows_kept = direction(texts, images, old_texts, old_images)
        loss = (image_loss + text_loss) / 2
    if reduction == "mean":
        loss = loss / len(images)
    return AffinityDistillation(loss, image_rows_kept, text_rows_kept)


def _screened_kl(new: Tensor, old: Tensor, start: int, distill_scale: float, screen: bool) -> tuple[Tensor, Tensor]:
    """Sum of the kept rows' KL, and their number, for rows `start:` of the matrices (rows, N)."""
    partner = old.diagonal(offset=start)
    kept = torch.isfinite(old).all(dim=1)
    if screen:
        kept = kept & (old.amax(dim=1) <= partner + ROUNDING * torch.finfo(old.dtype).eps)
    # Where a row is not kept its old similarities are replaced before the softmax, not its KL after it: zero times
    # the gradient of an old row that is not finite would be NaN. The product with `kept` makes such a row exactly 0
    # and lets a new row that is not finite through.
    old = torch.where(kept[:, None], old, new.detach())
    old_log_probs = F.log_softmax(distill_scale * old, dim=1)
    new_log_probs = F.log_softmax(distill_scale * new, dim=1)
    kl = F.kl_div(new_log_probs, old_log_probs, log_target=True, reduction="none").sum(dim=1)
    return (kl * kept).sum(), kept.to(new.dtype).sum()
