"""The terms that the loss callbacks of a recipe make of one global batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..callbacks import LossCallback, LossContext
from ..callbacks.base import ExtraEmbeddings
from ..embeddings import PairEmbeddings

LOGGED_ANYWAY = ("loss", "grad_norm", "learning_rate", "epoch", "step", "data_wait", "logit_scale", "logit_bias")


def loss_terms(
    callbacks: Sequence[LossCallback],
    student: PairEmbeddings,
    teacher: PairEmbeddings | None,
    context: LossContext,
    extra: Mapping[LossCallback, ExtraEmbeddings],
) -> dict[str, Tensor]:
    """All terms () by name, in the order of the callbacks; their sum is the loss. What the callbacks report besides is
    in `context.metrics` afterwards.

    Args:
        callbacks: the recipe.
        student, teacher, context: see `LossCallback.loss_terms`.
        extra: the embeddings of the extra inputs, of each callback that has some.

    Raises:
        ValueError: a name is used twice, or the log has another value under it.
        TypeError: a term is no scalar tensor.
    """
    terms: dict[str, Tensor] = {}
    for callback in callbacks:
        own = replace(context, extra=extra[callback]) if callback in extra else context
        for name, term in callback.loss_terms(student, teacher, own).items():
            if name in terms:
                raise ValueError(f"Two loss callbacks name a term {name!r}: rename one of them.")
            if not isinstance(term, Tensor) or term.ndim != 0:
                raise TypeError(f"{type(callback).__name__} gives {name!r} as {term!r}: a term is a scalar tensor.")
            terms[name] = term.to(student.image.device)
    names = [*terms, *context.metrics, *LOGGED_ANYWAY]
    if taken := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two values are logged as {', '.join(taken)}: rename the loss term or what is reported.")
    return terms
