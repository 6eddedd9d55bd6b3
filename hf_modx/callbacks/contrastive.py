"""Plain contrastive fine-tuning, and the upper bound that trains on everything."""

from torch import Tensor

from ..embeddings import PairEmbeddings
from ..losses import info_nce
from .base import LossCallback, LossContext


class Contrastive(LossCallback):
    """Symmetric InfoNCE over the global batch: plain fine-tuning, and the base of every combination.

    Args:
        chunk_size: rows of the similarity matrix held at once; None chooses.
    """

    owns_contrastive = True

    def __init__(self, chunk_size: int | None = None):
        self.chunk_size = chunk_size

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        loss = info_nce(
            student.image,
            student.text,
            student.logit_scale,
            pair_ids=context.pair_ids,
            chunk_size=self.chunk_size,
            shard=context.shard,
        )
        return {"contrastive": loss}


class Joint(Contrastive):
    """The upper bound: from the base model on the union of all data so far, for the summed steps of the phases.

    It stores every pair and trains phase k for k times the steps of one phase: what is gained by never forgetting,
    at a price that continual learning does not pay.
    """

    trains_on = "all_phases_so_far"
    starts_from = "base"
