"""Noticing NaN and infinity where they come up, before they are saved."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..distributed import gather_stacked
from ..embeddings import PairEmbeddings
from ..training_args import ModXTrainingArguments

ROWS_NAMED = 64


def require_finite_weights(model: nn.Module, what: str) -> None:
    """Raise a FloatingPointError that names the first parameters with NaN or infinite values, if there are any.

    Args:
        model: looked through in one pass, with one wait for its device.
        what: begins the message, as in "The model has".
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        return
    finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters.values()]).tolist()
    names = [name for name, is_finite in zip(parameters, finite, strict=True) if not is_finite]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FloatingPointError(f"{what} NaN or infinite values in {', '.join(names[:3])}{more}.")


def is_finite_everywhere(loss: Tensor) -> bool:
    """Of the losses () of all processes, the same answer on each: none goes on without the others."""
    return bool(gather_stacked(loss).isfinite().all())


def loss_not_finite(
    step: int,
    args: ModXTrainingArguments,
    terms: Mapping[str, Tensor],
    student: PairEmbeddings,
    row_ids: Tensor,
    new_rows: int | None,
) -> FloatingPointError:
    """The error of a step that is not taken, with what helps; see `why_not_finite`."""
    return FloatingPointError(
        f"The loss of step {step} is not finite: {why_not_finite(terms, student, row_ids, new_rows)} The step is not "
        f"taken, and the checkpoints in {args.output_dir} are good. Look at these rows; lower learning_rate (now "
        f"{args.learning_rate:g}) or max_grad_norm (now {args.max_grad_norm:g})"
        + ("; use bf16 in the place of fp16." if args.fp16 else ".")
    )


def why_not_finite(terms: Mapping[str, Tensor], student: PairEmbeddings, row_ids: Tensor, new_rows: int | None) -> str:
    """Which loss terms are not finite, and on which rows.

    Args:
        terms: the loss terms () of a batch on this process. student: its embeddings, (N, D). row_ids: (N,).
        new_rows: rows of the training set; ids from here on are rows of the memory. None: there is no memory.
    """
    values = gather_stacked(torch.stack([term.detach().float() for term in terms.values()])).mean(dim=0).tolist()
    told = ", ".join(f"{name} = {value:g}" for name, value in zip(terms, values, strict=True))
    broken = ~(student.image.isfinite().all(dim=1) & student.text.isfinite().all(dim=1))
    if broken.any() and not broken.all():
        rows, of_rows = row_ids[broken].tolist(), "The embeddings are not finite of"
    else:
        rows, of_rows = row_ids.tolist(), "The batch holds"
    named = [f"row {row}" if new_rows is None or row < new_rows else f"memory row {row - new_rows}" for row in rows]
    more = f" and {len(named) - ROWS_NAMED} more" if len(named) > ROWS_NAMED else ""
    return f"{told}. {of_rows} {', '.join(named[:ROWS_NAMED])}{more}."
