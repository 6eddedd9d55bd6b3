"""The interface of everything a recipe is made of."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data import PairCollator
from ..embeddings import PairEmbeddings
from ..losses import Shard
from ..replay import Replay
from ..training_args import ModXTrainingArguments


class ExtraEmbeddings(NamedTuple):
    """What the model makes of a callback's extra inputs, of all processes in the order of the ranks; with gradient.

    Attributes:
        image: (E, D), unit-norm rows.
        text: (M, D), unit-norm rows; E and M have nothing to do with each other.
    """

    image: Tensor
    text: Tensor


@dataclass(frozen=True)
class LossContext:
    """What a loss callback may know of the step besides the embeddings.

    Attributes:
        model: the unwrapped model in training, for terms on its weights.
        batch: this process's batch as the collator made it.
        pair_ids: (N,) or (N, K) int64, global, in the order of the embeddings' rows. Different rows that agree in an
            id belong together: they are no negatives of each other.
        row_ids: (N,) int64, global: the rows of the training set, those of the memory after the new ones.
        is_replay: (N,) bool, global: which rows come from the replay memory.
        step: optimizer steps done in this phase.
        epoch: the epoch, with fraction.
        positives: rows that belong together are positives of each other; passed on to the losses in `hf_modx.losses`.
        shard: the rows that this process computes of the losses in `hf_modx.losses`, passed on to them; a loss
            without it is computed whole on every process, which is as exact. None: there is nothing to share.
        phase_start: the `trained_weights` at the start of the phase by name, detached and never changed; empty unless
            some callback of the recipe needs them. Without an adapter these are the trainable parameters.
        stored: of the R replayed rows the (R, D) image and (R, D) text embeddings that are stored with them, in their
            order; None where there are none.
        extra: the embeddings of the extra inputs of the callback that is asked; None where it has none.
    """

    model: nn.Module
    batch: Mapping[str, Tensor]
    pair_ids: Tensor
    row_ids: Tensor
    is_replay: Tensor
    step: int
    epoch: float
    phase_start: Mapping[str, Tensor]
    positives: bool = False
    shard: Shard | None = None
    stored: tuple[Tensor, Tensor] | None = None
    extra: ExtraEmbeddings | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def relations(self) -> dict[str, Any]:
        """What a loss of `hf_modx.losses` is to know of the rows, as its keyword arguments."""
        return {"pair_ids": self.pair_ids, "positives": self.positives, "shard": self.shard}

    def report(self, name: str, value: Tensor) -> None:
        """Log a scalar beside the loss terms, averaged over the steps between two log lines."""
        self.metrics[name] = value.detach()


class BatchGradient(NamedTuple):
    """The gradient of a loss on one contrastive batch.

    Attributes:
        pairs: N, the pairs of the batch on all processes.
        gradient: by the names of the `trained_weights`; those that the loss does not reach are left out.
    """

    pairs: int
    gradient: dict[str, Tensor]


@dataclass(frozen=True)
class PhaseBoundary:
    """What a loss callback may use before the first and after the last step of a phase.

    Attributes:
        model: the unwrapped model on its device. At the start as the phase before has left it; at the end as the last
            step has left it, and a callback that `owns_weights` may change it.
        phase_start: see `LossContext`.
        train_dataset: the pairs of the phase.
        memory: the earlier pairs that are replayed; None where there are none.
        collator: its `pixels(images)` and `tokens(captions)` preprocess as evaluation does, without
            augmentation; None where a `data_collator` of the user's has taken its place.
        args: of the training.
        autocast: makes the context in which the training runs the model.
        gradients: `gradients(loss, batches)` goes through so many contrastive batches of the training, at most one
            pass, and yields the gradient of `loss(student, context)` on each, where student and context are those of
            `LossCallback.loss_terms`. The model is in eval mode; every process gets the same gradients.
        measure: the metrics of the model as it is at the moment of the call on a test, a table in the columns of the
            training set or a `LabelTest`; the same on every process. May be kept and called until the phase ends.
        callbacks: the recipe.
    """

    model: nn.Module
    phase_start: Mapping[str, Tensor]
    train_dataset: Dataset | None
    memory: Dataset | None
    collator: PairCollator | None
    args: ModXTrainingArguments
    autocast: Callable[[], AbstractContextManager]
    gradients: Callable[[Callable[[PairEmbeddings, LossContext], Tensor], int], Iterator[BatchGradient]]
    measure: Callable[[Any], dict[str, float]]
    callbacks: Sequence["LossCallback"]


class LossCallback(TrainerCallback):
    """A TrainerCallback that may own terms of the loss.

    A subclass overrides `loss_terms`, any event of `TrainerCallback`, or both. It sees the GLOBAL batch, gathered from
    all processes with gradient, and returns global values, so it is exact on any number of processes without knowing
    of them. It must be deterministic given its arguments: every process computes it.

    Class attributes:
        needs_teacher: the Trainer must provide the old model's embeddings.
        needs_phase_start: the Trainer must keep a copy of the trainable weights from the start of the phase.
        owns_contrastive: the callback brings the contrastive term. A recipe has exactly one owner.
        yields_contrastive: where recipes are combined by name, it leaves the contrastive term to another owner.
        owns_weights: the callback decides at the end of a phase which weights the phase leaves. At most one does.
        guards_weights: the callback may take back at the end of a phase what it has learned; it comes after the one
            that owns the weights and before all others.
        needs_budget: the callback is steered by a `RetentionBudget`.
        needs_replay: the callback concerns replayed pairs, and some callback of the recipe must replay.
        refuses_replay: the callback cannot do with replayed pairs: none of the recipe may replay.
        needs_merge: the weights it leaves are no adapter's: of an adapter that is trained, it leaves them in the base.
        trains: False trains nothing at all.
        trains_on: "phase", or "all_phases_so_far" to train on the union of all data up to this phase.
        starts_from: "previous" phase's weights, or "base": the weights before the first phase, trained for the summed
            steps of all phases so far.
        replay: what of earlier phases is to be mixed into the batches; None: nothing.
        learns_from_base: `finish_phase` wants to be called for the stream's base too, as if it were a phase that the
            start model has just learned.
    """

    needs_teacher: bool = False
    needs_phase_start: bool = False
    owns_contrastive: bool = False
    yields_contrastive: bool = False
    owns_weights: bool = False
    guards_weights: bool = False
    needs_budget: bool = False
    needs_replay: bool = False
    refuses_replay: bool = False
    needs_merge: bool = False
    trains: bool = True
    trains_on: str = "phase"
    starts_from: str = "previous"
    replay: Replay | None = None
    learns_from_base: bool = False

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

    def extra_inputs(self, context: LossContext) -> Mapping[str, Tensor]:
        """What the model is to embed beside the batch, in the same forward pass: this process's share of it.

        The shares of all processes, in the order of the ranks, come back embedded in `context.extra`. A share may be
        empty on one process and not on another.

        Returns:
            `image_inputs` of e images, as the collator's `pixels` gives them, or `text_inputs` of t texts, as its
            `tokens` does, or both; empty for nothing. With `token_embeds` (t, T, H) the texts are given as token
            embeddings, and their ids say where they end.
        """
        return {}

    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained along with the model, by name, for instance a projector that a term of the loss needs.

        Made in `start_phase`, the same on every process. Their parameters join the optimizer at its learning rate,
        their gradients are averaged over processes and clipped with the model's, and their weights are saved in the
        checkpoints inside a phase, but never with the model that a phase leaves.
        """
        return {}

    def start_run(self, base: Dataset | None) -> None:
        """Called by `ContinualRun`, once in each process's life, with the pairs that the start model has learned;
        None where the stream has no base.

        Raises:
            ValueError: the callback cannot do without; told before anything is trained.
        """

    def start_phase(self, phase: PhaseBoundary) -> None:
        """Called before the first step, and before what an interrupted phase has left is loaded."""

    def finish_phase(self, phase: PhaseBoundary) -> None:
        """Called after the last step, before the weights are saved and evaluated; first of all callbacks the one that
        `owns_weights`, then the one that guards them. Called again, from the last checkpoint, where a run was
        interrupted in between."""

    def results(self) -> Mapping[str, Any]:
        """What results.json is to say of the phase that has just finished, by names of its own, as JSON takes it."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that must survive an interruption, and from phase to phase; saved with every Trainer checkpoint and
        after every phase."""
        return {}

    def weights_in_state(self, model: nn.Module) -> Iterable[Tensor]:
        """Weights of which the state holds a copy each, or tensors of their shapes, in a phase that trains the model:
        the room that checkpoints need is counted from them."""
        return ()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned. An empty dict stands for a callback that has seen nothing yet."""


def pack_states(callbacks: Sequence[LossCallback]) -> dict[str, Tensor]:
    """The states of all callbacks as one dict that safetensors can save."""
    return {
        f"{_prefix(index, callback)}{name}": tensor.detach().cpu().contiguous()
        for index, callback in enumerate(callbacks)
        for name, tensor in callback.state_dict().items()
    }


def unpack_states(callbacks: Sequence[LossCallback], packed: Mapping[str, Tensor]) -> None:
    """Give the callbacks their states back; those that have none in it become as new. The only one of its class is
    known wherever it stood: after a rollback the recipe may have others before it."""
    classes = [type(callback).__name__ for callback in callbacks]
    parts = [(*name.split(".", 2), tensor) for name, tensor in packed.items()]
    for index, (callback, own_class) in enumerate(zip(callbacks, classes, strict=True)):
        own = [(place, name, tensor) for place, of_class, name, tensor in parts if of_class == own_class]
        if classes.count(own_class) > 1 or len({place for place, *_ in own}) > 1:
            own = [(place, name, tensor) for place, name, tensor in own if place == str(index)]
        callback.load_state_dict({name: tensor for _, name, tensor in own})


def module_prefix(index: int, callback: LossCallback) -> str:
    """What the names of a callback's modules begin with in a checkpoint."""
    return f"{_prefix(index, callback)}modules."


def _prefix(index: int, callback: LossCallback) -> str:
    return f"{index}.{type(callback).__name__}."


def check_recipe(callbacks: Sequence[LossCallback]) -> None:
    """Raise a ValueError unless the callbacks go together: exactly one brings the contrastive term, at most one
    decides on the weights, one that trains nothing is alone, and one that needs replayed pairs gets some, one that
    refuses them none."""
    names = [type(callback).__name__ for callback in callbacks]
    frozen = [type(callback).__name__ for callback in callbacks if not callback.trains]
    if frozen and len(callbacks) > 1:
        others = [name for name in names if name != frozen[0]]
        raise ValueError(f"{frozen[0]} trains nothing: {', '.join(others)} would have no effect. Leave one out.")
    if frozen:
        return
    owners = [type(callback).__name__ for callback in callbacks if callback.owns_weights]
    if len(owners) > 1:
        raise ValueError(
            f"{' and '.join(owners)} each decide which weights a phase leaves: one would overwrite the other's. Keep "
            "one."
        )
    owners = [type(callback).__name__ for callback in callbacks if callback.owns_contrastive]
    if len(owners) > 1:
        raise ValueError(
            f"{' and '.join(owners)} each bring the contrastive term, so it would count {len(owners)} times. Keep "
            "one, or write ModX(contrastive=False) beside another owner."
        )
    if not owners:
        raise ValueError(
            f"No callback of the recipe ({', '.join(names) or 'nothing'}) brings the contrastive term. Add "
            "Contrastive()."
        )
    replaying = [type(callback).__name__ for callback in callbacks if callback.replay is not None]
    refusing = [type(callback).__name__ for callback in callbacks if callback.refuses_replay]
    if refusing and replaying:
        raise ValueError(
            f"{' and '.join(refusing)} knows the classes of one phase, and {' and '.join(replaying)} brings images of "
            "others: leave out the replay, or learn captions in the place of classes."
        )
    needing = [type(callback).__name__ for callback in callbacks if callback.needs_replay]
    if needing and not replaying:
        raise ValueError(
            f"{' and '.join(needing)} is set to concern replayed pairs, and nothing in the recipe replays any: add "
            "replay, as in modx+er."
        )


def check_budget(callbacks: Sequence[LossCallback]) -> None:
    """Raise a ValueError where a callback is steered by a retention budget that the recipe does not have, or where it
    has two."""
    budgets = [callback for callback in callbacks if callback.guards_weights]
    steered = [type(callback).__name__ for callback in callbacks if callback.needs_budget]
    if steered and not budgets:
        raise ValueError(
            f'{" and ".join(steered)} with alpha="auto" is steered by what is forgotten, and nothing measures that: '
            "give max_forgetting (--max_forgetting 0.1), or a RetentionBudget in the recipe."
        )
    if len(budgets) > 1:
        raise ValueError("Two retention budgets: leave out max_forgetting, or the RetentionBudget of the recipe.")
