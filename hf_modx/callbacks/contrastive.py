"""Plain contrastive fine-tuning, on the new data or on all data so far."""

from torch import Tensor

from ..embeddings import PairEmbeddings
from ..losses import Shard, info_nce, sigmoid_loss
from .base import LossCallback, LossContext


def contrastive_loss(
    pairs: PairEmbeddings,
    *,
    pair_ids: Tensor,
    positives: bool = False,
    extra_text_embeds: Tensor | None = None,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """The loss that the model is made for: the sigmoid loss where it has a `logit_bias`, InfoNCE elsewhere."""
    rows = {"pair_ids": pair_ids, "positives": positives, "chunk_size": chunk_size, "shard": shard}
    options = {**rows, "extra_text_embeds": extra_text_embeds}
    if pairs.logit_bias is None:
        return info_nce(pairs.image, pairs.text, pairs.logit_scale, **options)
    return sigmoid_loss(pairs.image, pairs.text, pairs.logit_scale, pairs.logit_bias, **options)


class Contrastive(LossCallback):
    """Symmetric InfoNCE over the global batch, or the sigmoid loss of models that are made for it: plain fine-tuning,
    and the base of every combination.

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
        loss = contrastive_loss(student, **context.relations, chunk_size=self.chunk_size)
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
