"""Replay: pairs of earlier phases in every batch."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..embeddings import PairEmbeddings
from ..replay import Replay
from .base import LossCallback, LossContext
from .contrastive import Contrastive


class ExperienceReplay(Contrastive):
    """ER: a share of every batch comes from a memory of earlier pairs (Chaudhry et al., "On Tiny Episodic Memories in
    Continual Learning", 2019). To the loss they are pairs like the others, positives and negatives of all.

    A phase takes as many steps of as many pairs as without replay: pairs of the memory take the place of new ones. In
    the first phase of a stream without a base there is nothing to replay yet.

    Args:
        memory_size: a number of pairs, or a share of all pairs; see `Replay`.
        batch_share: share of every contrastive batch that comes from the memory, in (0, 1).
        contrastive: also bring the contrastive term. False beside another owner of it, for instance Mod-X, whose loss
            then sees the replayed pairs too.
        chunk_size: rows of the similarity matrix held at once; None chooses.
    """

    stores_embeddings = False

    def __init__(
        self,
        memory_size: int | float = 0.05,
        batch_share: float = 0.25,
        contrastive: bool = True,
        chunk_size: int | None = None,
    ):
        super().__init__(chunk_size)
        self.memory_size = memory_size
        self.batch_share = batch_share
        self.owns_contrastive = contrastive
        self.replay  # noqa: B018  refuses values out of range

    @property
    def replay(self) -> Replay:
        return Replay(self.memory_size, self.batch_share, self.stores_embeddings)

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        return super().loss_terms(student, teacher, context) if self.owns_contrastive else {}


def replay_of(callbacks: Sequence[LossCallback]) -> Replay | None:
    """What the callbacks of a recipe want replayed, together.

    Raises:
        ValueError: two of them want memories or shares of different sizes.
    """
    wanted = {type(callback).__name__: callback.replay for callback in callbacks if callback.replay is not None}
    if not wanted:
        return None
    if len({(replay.memory_size, replay.batch_share) for replay in wanted.values()}) > 1:
        raise ValueError(
            f"{' and '.join(wanted)} share one memory: give them the same memory_size and batch_share, not "
            + " and ".join(f"{replay.memory_size}, {replay.batch_share}" for replay in wanted.values())
            + "."
        )
    some = next(iter(wanted.values()))
    return replace(some, stores_embeddings=any(replay.stores_embeddings for replay in wanted.values()))
