"""Mod-X as a loss callback."""

import logging

import torch
from torch import Tensor

from ..embeddings import PairEmbeddings
from ..losses import affinity_distillation, modx_loss
from .base import LossCallback, LossContext
from .contrastive import contrastive_loss

logger = logging.getLogger(__name__)

FEW_ROWS = 0.05


class ModX(LossCallback):
    """Keep the off-diagonal information of the contrastive matrix aligned with the old model's, on the rows that the
    old model gets right (Ni et al., ICML 2023). Alone it is the complete method.

    `L = L_contrastive + alpha * (KL_image_to_text + KL_text_to_image) / 2`: KL(old || new) between the softmaxed rows
    of cosines of the two models, summed over the rows kept; see `modx_loss` and `affinity_distillation`.

    Args:
        alpha: weight of the distillation, >= 0; with `reduction="sum"` its pull grows with the global batch size.
        distill_scale: factor on the cosines inside the distillation softmax (1.0 in the authors' code).
        reduction: "sum" (the authors' code) or "mean" over the rows of the global batch.
        contrastive: also bring the model's own contrastive loss: InfoNCE, or the sigmoid loss of a model made for it,
            which takes a pass of its own over the similarity matrix. False beside another owner of the term.
        screen: False distils every row, also those that the old model has wrong: the recipe "kl". Two passes over the
            similarity matrix instead of one.
        chunk_size: rows of the similarity matrices held at once; None chooses.

    Logs `contrastive`, `modx_distillation` (weighted) and the fractions `image_rows_kept` and `text_rows_kept` of rows
    that the old model has right. Warns once a phase when fewer than 5 % of the rows are kept.
    """

    needs_teacher = True

    def __init__(
        self,
        alpha: float = 20.0,
        distill_scale: float = 1.0,
        reduction: str = "sum",
        contrastive: bool = True,
        screen: bool = True,
        chunk_size: int | None = None,
    ):
        if alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}.")
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}.')
        self.alpha = alpha
        self.owns_contrastive = contrastive
        self.distill_scale = distill_scale
        self.reduction = reduction
        self.screen = screen
        self.chunk_size = chunk_size
        self._start_counting()

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        embeds = (student.image, student.text, teacher.image, teacher.text)
        rows = {**context.relations, "chunk_size": self.chunk_size}
        distillation = {"distill_scale": self.distill_scale, "reduction": self.reduction}
        if self.owns_contrastive and self.screen and student.logit_bias is None:
            result = modx_loss(*embeds, student.logit_scale, alpha=self.alpha, **distillation, **rows)
            terms = {"contrastive": result.contrastive, "modx_distillation": self.alpha * result.distillation}
        else:
            result = affinity_distillation(*embeds, screen=self.screen, **distillation, **rows)
            terms = {"modx_distillation": self.alpha * result.loss}
            if self.owns_contrastive:
                terms["contrastive"] = contrastive_loss(student, **rows)
        context.report("image_rows_kept", result.image_rows_kept)
        context.report("text_rows_kept", result.text_rows_kept)
        self._kept = self._kept + (result.image_rows_kept + result.text_rows_kept).detach() / 2
        self._batches += 1
        return terms

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_counting()

    def on_log(self, args, state, control, **kwargs):
        """Warn while there is still time to act; the logged step has synchronised with the device already."""
        if self._warned or self._batches == 0:
            return
        kept = float(self._kept) / self._batches
        if kept < FEW_ROWS:
            self._warned = True
            logger.warning(
                "The old model ranks only %.1f %% of the new pairs first, and Mod-X distils only those: it has little "
                "to keep here. Replay some old pairs in the batch, use a smaller batch (fewer candidates a row), or "
                "expect a result close to plain fine-tuning.",
                100 * kept,
            )

    def _start_counting(self) -> None:
        self._kept = torch.zeros(())
        self._batches = 0
        self._warned = False
