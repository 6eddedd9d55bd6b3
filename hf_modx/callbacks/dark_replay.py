"""Replay with the embeddings that the pairs had when they entered the memory."""

from torch import Tensor

from ..embeddings import PairEmbeddings
from .base import LossContext
from .replay import ExperienceReplay


class DarkExperienceReplay(ExperienceReplay):
    """DER: replayed pairs are also held to the embeddings that are stored with them.

    `L = L_replay + alpha (mean_i (1 - <v_i, v'_i>) + mean_i (1 - <l_i, l'_i>))` over the replayed pairs i of the
    batch, with `v'_i` and `l'_i` the unit-norm image and text embedding under the model that had just learned them.
    Our reconstruction for a dual encoder, not a published formula: the original (Buzzega et al., "Dark Experience for
    General Continual Learning", NeurIPS 2020) stores the logits of a classifier and takes their squared difference.

    The stored image embedding is that of the image without augmentation.

    Args:
        alpha: weight of the term, >= 0.
        memory_size, batch_share, contrastive, chunk_size: as in `ExperienceReplay`.
    """

    stores_embeddings = True

    def __init__(
        self,
        alpha: float = 1.0,
        memory_size: int | float = 0.05,
        batch_share: float = 0.25,
        contrastive: bool = True,
        chunk_size: int | None = None,
    ):
        super().__init__(memory_size, batch_share, contrastive, chunk_size)
        if alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}.")
        self.alpha = alpha

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        terms = super().loss_terms(student, teacher, context)
        if context.stored is None:
            return terms
        image, text = context.stored
        drift = sum(
            (1 - (new[context.is_replay] * stored).sum(dim=1)).mean()
            for new, stored in ((student.image, image), (student.text, text))
        )
        return {**terms, "dark_replay": self.alpha * drift}
