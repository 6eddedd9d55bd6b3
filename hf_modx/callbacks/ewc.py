"""Elastic weight consolidation."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..embeddings import PairEmbeddings
from ..trained_weights import trained_weights
from .base import LossCallback, LossContext, PhaseBoundary
from .contrastive import contrastive_loss


class EWC(LossCallback):
    """Hold each weight to its value at the end of the phase before, the more the more that phase's loss depends on it:
    `weight / 2 * sum_i F_i (theta_i - theta0_i)^2`, theta0 being the weights at the start of the phase (Kirkpatrick et
    al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, equation 3; online, with one Fisher matrix
    for all phases: Schwarz et al., "Progress & Compress", ICML 2018).

    At the end of phase k `F <- gamma F + F_k`, with F_k the diagonal Fisher information of the contrastive loss over
    batches b of N pairs, `F_k = mean_b N (d L_b / d theta)^2`: the gradient of a mean over N pairs has an N-th
    of the variance of one pair's. (A contrastive loss is no sum over pairs, so there are no gradients of single ones
    to take it from: the formula is our reading.) It is taken at the weights that the phase leaves.

    With a LoRA adapter theta are the weights with its change added, and F_k is taken with respect to those: what the
    factors of one adapter are worth says nothing of the next one's.

    Where the stream has a base, its Fisher matrix protects it in the first phase; otherwise the first phase is plain
    fine-tuning.

    Args:
        weight: >= 0. With 1 the penalty stands, to second order, for what the old data's loss would rise by, which
            holds nothing back. The default of 1,000 was chosen on one phase of the built-in stream with one seed; over
            its three phases it halves forgetting and what is learned alike (`model_cards/others.md`).
        gamma: what of the Fisher matrix of the phases before is kept, in [0, 1]; 1 adds up all phases.
        batches: contrastive batches that a phase's Fisher matrix is taken over, >= 1; at most one pass over the phase.

    Logs `ewc` (weighted).
    """

    needs_phase_start = True
    learns_from_base = True

    def __init__(self, weight: float = 1000.0, gamma: float = 1.0, batches: int = 50):
        if weight < 0:
            raise ValueError(f"The weight of EWC must not be negative, got {weight}.")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}.")
        if batches < 1 or not isinstance(batches, int):  # which would be told at the end of the first phase
            raise ValueError(f"EWC takes the Fisher matrix over a whole number of batches, at least 1, got {batches}.")
        self.weight = weight
        self.gamma = gamma
        self.batches = batches
        self._fisher: dict[str, Tensor] = {}

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        if not self._fisher:
            return {}
        penalty = torch.zeros((), device=student.image.device)
        for name, weight in trained_weights(context.model).items():
            if name in self._fisher:
                self._fisher[name] = self._fisher[name].to(weight.device)
                penalty = penalty + (self._fisher[name] * (weight - context.phase_start[name]).square()).sum()
        return {"ewc": self.weight / 2 * penalty}

    def finish_phase(self, phase: PhaseBoundary) -> None:
        fisher = _fisher(phase, self.batches)
        for name, before in self._fisher.items():
            kept = self.gamma * before
            fisher[name] = fisher[name] + kept.to(fisher[name].device) if name in fisher else kept
        self._fisher = fisher

    def state_dict(self) -> dict[str, Tensor]:
        return self._fisher

    def weights_in_state(self, model: nn.Module) -> Iterable[Tensor]:
        return trained_weights(model).values()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._fisher = dict(state)


def _fisher(phase: PhaseBoundary, batches: int) -> dict[str, Tensor]:
    """The diagonal Fisher information of the contrastive loss by the names of the weights."""

    def contrastive(student: PairEmbeddings, context: LossContext) -> Tensor:
        return contrastive_loss(student, **context.relations)

    total: dict[str, Tensor] = {}
    count = 0
    for pairs, gradient in phase.gradients(contrastive, batches):
        count += 1
        for name, slope in gradient.items():
            square = pairs * slope.square()
            total[name] = total[name] + square if name in total else square
    return {name: square / count for name, square in total.items()}
