"""Staying near the embeddings that the old model would give."""

from torch import Tensor

from ..embeddings import PairEmbeddings
from ..losses import anchor_loss
from .base import LossCallback, LossContext


class Anchor(LossCallback):
    """Hold every embedding near the one that the old model gives to the same image or text, so that an index of its
    embeddings can still be asked: `weight * anchor_loss`.

    `LwF`, `ModX` and "kl" keep the old model's SIMILARITIES: a rotation that both towers share costs them nothing, and
    makes an old index useless. `ProjectedDistillation` keeps what can be read off the new embeddings. This term keeps
    the embeddings themselves (less-forget constraint: Hou et al., "Learning a Unified Classifier Incrementally via
    Rebalancing", CVPR 2019, here of both modalities of a dual encoder); `DarkExperienceReplay` has the same form on
    stored pairs.

    The term is a mean over rows, as InfoNCE is, so one weight serves all batch sizes and all widths. The gradient of
    InfoNCE for an embedding is at most about s / N, s being the logit scale, and that of this term is
    `weight * |v - v'| / N`: what a pair can move is of the order of s / weight.

    Args:
        weight: >= 0.

    Logs `anchor` (weighted), and `anchor_distance`, the mean squared distance itself, in [0, 4].
    """

    needs_teacher = True

    def __init__(self, weight: float = 50.0):
        if weight < 0:
            raise ValueError(f"The weight of Anchor must not be negative, got {weight}.")
        self.weight = weight

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        distance = anchor_loss(student.image, student.text, teacher.image, teacher.text)
        context.report("anchor_distance", distance)
        return {"anchor": self.weight * distance}
