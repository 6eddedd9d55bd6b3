"""Staying near the weights that the phase began with."""

from torch import Tensor

from ..embeddings import PairEmbeddings
from ..trained_weights import trained_weights
from .base import LossCallback, LossContext


class L2SP(LossCallback):
    """`weight * sum_i (theta_i - theta0_i)^2` over all trained weights, theta0 being those at the phase's start. Of a
    LoRA adapter that is the squared norm of the change that it makes.

    L2-SP (Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018) without
    its factor of one half; with a weight of 1 it is the weight consolidation of ZSCL as in the authors' code.

    Args:
        weight: >= 0.

    Logs `l2sp` (weighted).
    """

    needs_phase_start = True

    def __init__(self, weight: float = 1.0):
        if weight < 0:
            raise ValueError(f"The weight of L2SP must not be negative, got {weight}.")
        self.weight = weight

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        now, start = trained_weights(context.model), context.phase_start
        distances = ((weight - start[name]).square().sum() for name, weight in now.items())
        return {"l2sp": self.weight * sum(distances)}
