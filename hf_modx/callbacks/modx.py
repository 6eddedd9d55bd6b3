"""Mod-X as a loss callback."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..embeddings import PairEmbeddings
from ..losses import AffinityDistillation, ModXLoss, affinity_distillation, modx_loss
from ..losses.affinity import RECTIFY, repeated, rows_ranked_first
from ..losses.contrastive import full_precision, upcast
from ..losses.distillation import check_screening
from .base import LossCallback, LossContext, PhaseBoundary
from .contrastive import contrastive_loss
from .retention import RetentionBudget

logger = logging.getLogger(__name__)

FEW_ROWS, NEARLY_ALL_ROWS = 0.05, 0.95
AUTO, PAPER_ALPHA = "auto", 20.0


class ModX(LossCallback):
    """Keep the off-diagonal information of the contrastive matrix aligned with the old model's, on the rows that the
    old model gets right (Ni et al., ICML 2023). Alone it is the complete method.

    `L = L_contrastive + alpha * (KL_image_to_text + KL_text_to_image) / 2`: KL(old || new) between the softmaxed rows
    of cosines of the two models, summed over the rows kept; see `modx_loss` and `affinity_distillation`.

    How hard the distillation pulls against the contrastive term grows with `alpha * N * kept`, N pairs in the global
    batch and `kept` the fraction of rows kept. The contrastive term is a mean over pairs. The distillation is a sum
    over kept rows, of which each, half the variance of the change of its cosines, does not depend on N; and `kept`
    falls with N, since the old model must find a partner among more candidates. With `reference_batch_size` R the
    weight in a batch of N is `alpha * (R kept_R) / (N kept_N)`: what alpha is in a batch of R. `kept_R` is counted in
    the batch itself, cut into batches of R, the same ones on any number of processes; in a batch smaller than R it
    cannot be, and the weight is `alpha * R / N`. With `replay_alpha` a row counts as much as it weighs.

    Args:
        alpha: weight of the distillation, >= 0; with `reduction="sum"` its pull grows with the global batch size. Or
            "auto": `alpha_start` times the price that the recipe's `RetentionBudget` sets on forgetting.
        distill_scale: factor on the cosines inside the distillation softmax (1.0 in the authors' code).
        reduction: "sum" (the authors' code) or "mean" over the rows of the global batch.
        contrastive: also bring the model's own contrastive loss: InfoNCE, or the sigmoid loss of a model made for it,
            which takes a pass of its own over the similarity matrix. False beside another owner of the term.
        screen: False distils every row, also those that the old model has wrong: the recipe "kl". "rectify": a row
            that the old model and the one in training both have wrong is held to the pairs themselves, our
            reconstruction of DKR (see `affinity_distillation`). At a `distill_scale` of 1 such a row pulls far
            harder than a kept one, with `reduction="sum"` also than the contrastive term: choose a smaller alpha, or
            "mean" and a scale near the logit scale.
        chunk_size: rows of the similarity matrices held at once; None chooses.
        reference_batch_size: the global batch size that alpha is meant for; None: whatever the batch is.
        alpha_start: what "auto" begins with, > 0. Default: 20.
        replay_alpha: the weight of the rows of pairs that come from a memory, >= 0; `alpha` is then that of the new
            ones alone. Default: `alpha`. A part of the recipe must replay. With an `alpha` of 0 the new pairs are
            candidates only: the fractions below are of replayed rows, "mean" is over them, and there is no warning.

    Logs `contrastive`, `modx_distillation` (weighted), the fractions `image_rows_kept` and `text_rows_kept` of rows
    that the old model has right, `image_rows_rectified` and `text_rows_rectified` with "rectify" and, where it is not
    always `alpha`, the weight `modx_alpha`, with `replay_alpha` also `modx_replay_alpha`. Warns once a phase when
    fewer than 5 % of the rows are kept and no others rectified, or with screening more than 95 %.
    """

    needs_teacher = True

    def __init__(
        self,
        alpha: float | str = 20.0,
        distill_scale: float = 1.0,
        reduction: str = "sum",
        contrastive: bool = True,
        screen: bool | str = True,
        chunk_size: int | None = None,
        reference_batch_size: int | None = None,
        alpha_start: float | None = None,
        replay_alpha: float | None = None,
    ):
        if isinstance(alpha, str) and alpha != AUTO:
            raise ValueError(f'alpha must be a number or "auto", got {alpha!r}.')
        if alpha != AUTO and alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}.")
        if replay_alpha is not None and replay_alpha < 0:
            raise ValueError(f"replay_alpha must not be negative, got {replay_alpha}.")
        if replay_alpha is not None and alpha == AUTO:
            raise ValueError(
                'alpha="auto" steers one weight of all rows: leave out replay_alpha, or take modx+er in the place of '
                "modx_plus."
            )
        if alpha_start is not None and (alpha != AUTO or not alpha_start > 0):
            raise ValueError(f'alpha_start is what alpha="auto" begins with, above 0; got {alpha_start}.')
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}.')
        if reference_batch_size is not None and reference_batch_size < 1:
            raise ValueError(f"reference_batch_size must be at least 1, got {reference_batch_size}.")
        if reference_batch_size is not None and reduction == "mean":
            raise ValueError('reduction="mean" and reference_batch_size both undo the batch size: leave one out.')
        check_screening(screen)
        if reference_batch_size is not None and screen == RECTIFY:
            raise ValueError(
                'reference_batch_size counts the rows that are kept, and screen="rectify" has others that pull too: '
                "leave one out."
            )
        self.alpha = alpha
        self.alpha_start = alpha_start
        self.reference_batch_size = reference_batch_size
        if alpha == AUTO:
            self.needs_budget = True
            self.alpha_start = PAPER_ALPHA if alpha_start is None else alpha_start
        self.owns_contrastive = contrastive
        self.distill_scale = distill_scale
        self.reduction = reduction
        self.screen = screen
        self.replay_alpha = replay_alpha
        self.chunk_size = chunk_size
        self._budget: RetentionBudget | None = None
        self._start_counting()

    @property
    def needs_replay(self) -> bool:
        return self.replay_alpha is not None

    @property
    def current_alpha(self) -> float:
        """What "auto" has come to, or alpha."""
        if self.alpha != AUTO:
            return self.alpha
        return self.alpha_start * (self._budget.price if self._budget is not None else 1.0)

    def start_phase(self, phase: PhaseBoundary) -> None:
        self._budget = next((c for c in phase.callbacks if isinstance(c, RetentionBudget)), None)

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        embeds = (student.image, student.text, teacher.image, teacher.text)
        relations = {**context.relations, "chunk_size": self.chunk_size}
        row_weights = self._row_weights(context)
        distillation = {
            "distill_scale": self.distill_scale,
            "reduction": self.reduction,
            "screen": self.screen,
            "row_weights": row_weights,
        }
        if self.owns_contrastive and student.logit_bias is None:
            result = modx_loss(*embeds, student.logit_scale, **distillation, **relations)
            terms, divergence = {"contrastive": result.contrastive}, result.distillation
        else:
            result = affinity_distillation(*embeds, **distillation, **relations)
            terms, divergence = {}, result.loss
            if self.owns_contrastive:
                terms["contrastive"] = contrastive_loss(student, **relations)
        weight = 1.0
        if self.reference_batch_size is not None:
            weight = self._weight_of_reference(teacher, context, row_weights, result)
        if self.reference_batch_size is not None or self.alpha == AUTO:
            self._report_weights(context, weight)
        alpha = self.current_alpha if row_weights is None else 1.0
        terms["modx_distillation"] = alpha * weight * divergence
        self._report_rows(context, result)
        return terms

    def _row_weights(self, context: LossContext) -> Tensor | None:
        """(N,): what the rows of each pair weigh, where not all weigh what alpha says."""
        if self.replay_alpha is None:
            return None
        return torch.where(context.is_replay, float(self.replay_alpha), float(self.alpha))

    def _report_weights(self, context: LossContext, weight: Tensor | float) -> None:
        device = context.is_replay.device
        context.report("modx_alpha", torch.as_tensor(self.current_alpha * weight, device=device))
        if self.replay_alpha is not None:
            context.report("modx_replay_alpha", torch.as_tensor(self.replay_alpha * weight, device=device))

    def _report_rows(self, context: LossContext, found: ModXLoss | AffinityDistillation) -> None:
        context.report("image_rows_kept", found.image_rows_kept)
        context.report("text_rows_kept", found.text_rows_kept)
        if self.screen == RECTIFY:
            context.report("image_rows_rectified", found.image_rows_rectified)
            context.report("text_rows_rectified", found.text_rows_rectified)
        self._kept = self._kept + (found.image_rows_kept + found.text_rows_kept).detach() / 2
        self._batches += 1

    @torch.no_grad()
    def _weight_of_reference(
        self,
        teacher: PairEmbeddings,
        context: LossContext,
        row_weights: Tensor | None,
        found: ModXLoss | AffinityDistillation,
    ) -> Tensor | float:
        """What the rows weigh that a batch of `reference_batch_size` would keep, over what those of this batch do."""
        size, pairs = self.reference_batch_size, len(teacher.image)
        if not self.screen or size >= pairs:
            return size / pairs
        pair_ids = repeated(context.pair_ids)

        def kept(rows: Tensor) -> Tensor:
            first = rows_ranked_first(
                upcast(teacher.image[rows]),
                upcast(teacher.text[rows]),
                pair_ids=None if pair_ids is None else pair_ids[rows],
                positives=context.positives,
                chunk_size=self.chunk_size,
            )
            return (first * (1.0 if row_weights is None else row_weights[rows])).sum()

        with full_precision(teacher.image):
            batches = reference_batches(context, size)
            if row_weights is None:  # the loss has ranked the whole batch already, and counted
                here = pairs * (found.image_rows_kept + found.text_rows_kept)
            else:
                here = kept(torch.arange(pairs, device=context.row_ids.device))
            return (sum(map(kept, batches)) / len(batches) / here).where(here > 0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._start_counting()

    def on_log(self, args, state, control, **kwargs):
        """Warn while there is still time to act; the logged step has synchronised with the device already."""
        if self._warned or self._batches == 0 or self.alpha == 0:
            return
        kept = float(self._kept) / self._batches
        if kept < FEW_ROWS and self.screen != RECTIFY:
            self._warned = True
            logger.warning(
                "The old model ranks only %.1f %% of the pairs first, and Mod-X distils only those: it has little "
                "to keep here. Replay some old pairs in the batch, use a smaller batch (fewer candidates a row), or "
                "expect a result close to plain fine-tuning.",
                100 * kept,
            )
        elif self.screen and kept > NEARLY_ALL_ROWS:
            self._warned = True
            logger.warning(
                "The old model ranks %.1f %% of the pairs first: Mod-X distils nearly every row, and holds the "
                "model to what it knows of the new pairs too. Where it learns too little, lower alpha or use a larger "
                "batch (more candidates a row).",
                100 * kept,
            )

    def _start_counting(self) -> None:
        self._kept = torch.zeros(())
        self._batches = 0
        self._warned = False


def distils_replayed_alone(options: Mapping[str, Any]) -> bool:
    """Whether a `ModX` of these options, as a run has written them down, counts the rows of replayed pairs alone."""
    return options.get("alpha") == 0 and "replay_alpha" in options


def reference_batches(context: LossContext, size: int) -> list[Tensor]:
    """The rows of as many batches of `size` as the global batch is enough for, at random, each with the global batch's
    share of replayed rows. The same rows in whatever order the processes have gathered them."""
    pairs = len(context.row_ids)
    shuffled = torch.randperm(pairs, generator=torch.Generator().manual_seed(context.step))
    rows = context.row_ids.argsort()[shuffled.to(context.row_ids.device)]
    rows = rows[context.is_replay[rows].int().argsort(stable=True)]
    batches = pairs // size
    # A batch takes its rows from all over the others, at whose end the replayed ones are.
    spread = torch.arange(batches * size, device=rows.device) * pairs // (batches * size)
    return list(rows[spread].view(size, batches).unbind(dim=1))
