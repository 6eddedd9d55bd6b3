"""Plain contrastive fine-tuning, on the new data or on all data so far."""

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
    yields_contrastive = True

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


class Cumulative(Contrastive):
    """Go on from the previous phase's weights on the union of all data so far, for the steps of ONE phase: all old
    data replayed at the price of plain fine-tuning (Garg et al., "TiC-CLIP: Continual Training of CLIP Models", ICLR
    2024: Cumulative-All).

    Where the stream has a base, its pairs are among the data.
    """

    yields_contrastive = False
    trains_on = "all_phases_so_far"


class Joint(Contrastive):
    """The upper bound: from the base model on the union of all data so far, for the summed steps of the phases.

    It stores every pair and trains phase k for k times the steps of one phase: what is gained by never forgetting,
    at a price that continual learning does not pay.
    """

    yields_contrastive = False
    trains_on = "all_phases_so_far"
    starts_from = "base"
