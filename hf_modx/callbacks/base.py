"""The interface of everything a recipe is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import TrainerCallback

from ..embeddings import PairEmbeddings
from ..losses import Shard


@dataclass(frozen=True)
class LossContext:
    """What a loss callback may know of the step besides the embeddings.

    Attributes:
        model: the unwrapped model in training, for terms on its weights.
        batch: this process's batch as the collator made it.
        pair_ids: (N,) or (N, K) int64, global, in the order of the embeddings' rows. Different rows that agree in an
            id are no negatives of each other.
        row_ids: (N,) int64, global: the rows of the training set.
        step: optimizer steps done in this phase.
        epoch: the epoch, with fraction.
        shard: the rows that this process computes of the losses in `hf_modx.losses`, passed on to them; a loss
            without it is computed whole on every process, which is as exact. None: there is nothing to share.
        phase_start: the trainable weights at the start of the phase by parameter name, detached and never changed;
            empty unless some callback of the recipe needs them.
    """

    model: nn.Module
    batch: Mapping[str, Tensor]
    pair_ids: Tensor
    row_ids: Tensor
    step: int
    epoch: float
    phase_start: Mapping[str, Tensor]
    shard: Shard | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def report(self, name: str, value: Tensor) -> None:
        """Log a scalar beside the loss terms, averaged over the steps between two log lines."""
        self.metrics[name] = value.detach()


class LossCallback(TrainerCallback):
    """A TrainerCallback that may own terms of the loss.

    A subclass overrides `loss_terms`, any event of `TrainerCallback`, or both. It sees the GLOBAL batch, gathered from
    all processes with gradient, and returns global values, so it is exact on any number of processes without knowing
    of them. It must be deterministic given its arguments: every process computes it.

    Class attributes:
        needs_teacher: the Trainer must provide the old model's embeddings.
        needs_phase_start: the Trainer must keep a copy of the trainable weights from the start of the phase.
        owns_contrastive: the callback brings the contrastive term. A recipe has exactly one owner.
        trains_on: "phase", or "all_phases_so_far" to train on the union of all data up to this phase.
        starts_from: "previous" phase's weights, or "base": the weights before the first phase, trained for the summed
            steps of all phases so far.
    """

    needs_teacher: bool = False
    needs_phase_start: bool = False
    owns_contrastive: bool = False
    trains_on: str = "phase"
    starts_from: str = "previous"

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        """Named, already weighted terms; the Trainer adds them up and logs each under its name.

        Args:
            student: (N, D) embeddings of the global batch, with gradient.
            teacher: the old model's embeddings of the same rows, without gradient; None unless some callback of the
                recipe needs the teacher.
            context: see `LossContext`.
        """
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that must survive an interruption; saved with every Trainer checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""


def check_recipe(callbacks: list[LossCallback]) -> None:
    """Raise a ValueError unless exactly one callback owns the contrastive term."""
    owners = [type(callback).__name__ for callback in callbacks if callback.owns_contrastive]
    if len(owners) == 1:
        return
    names = ", ".join(type(callback).__name__ for callback in callbacks) or "nothing"
    if owners:
        raise ValueError(
            f"{' and '.join(owners)} each bring the contrastive term, so it would count {len(owners)} times. Keep "
            "one, or write ModX(contrastive=False) beside another owner."
        )
    raise ValueError(f"No callback of the recipe ({names}) brings the contrastive term. Add Contrastive().")
