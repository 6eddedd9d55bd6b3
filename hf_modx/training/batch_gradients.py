"""The gradient of any loss on batches of the training, for callbacks that want to know it without taking a step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from accelerate import Accelerator
from torch import Tensor, nn

from ..callbacks import LossContext
from ..callbacks.base import BatchGradient
from ..distributed import gather_stacked, row_counts
from ..embeddings import PairEmbeddings, embed_pairs, pair_embeddings
from ..gradcache import GradientCache
from ..trained_weights import leaves_of_trained_weights
from .step_batch import gather_pairs

Loss = Callable[[PairEmbeddings, LossContext], Tensor]
ContextOf = Callable[[dict[str, Tensor], list[int]], tuple[LossContext, Tensor | None]]


def batch_gradients(
    loss: Loss,
    batches: Iterable[dict[str, Tensor]],
    model: nn.Module,
    accelerator: Accelerator,
    context_of: ContextOf,
    chunk_size: int | None,
) -> Iterator[BatchGradient]:
    """See `PhaseBoundary.gradients`.

    Args:
        loss: of the embeddings of a global batch and its context.
        batches: contrastive batches of this process.
        model: is called unwrapped and may be unprepared, the result is the same; in eval mode meanwhile.
        accelerator: of the training.
        context_of: the context of the global batch, given a batch and the pairs of every process, and which of the
            gathered rows belong to it.
        chunk_size: of the gradient cache; None: without it.
    """
    was_training = model.training
    model.eval()
    try:
        with leaves_of_trained_weights(model) as leaves:
            for inputs in batches:
                yield _gradient(loss, inputs, model, leaves, accelerator, context_of, chunk_size)
    finally:
        model.train(was_training)


def _gradient(
    loss: Loss,
    inputs: dict[str, Tensor],
    model: nn.Module,
    leaves: Mapping[str, nn.Parameter],
    accelerator: Accelerator,
    context_of: ContextOf,
    chunk_size: int | None,
) -> BatchGradient:
    """Of one batch. Where what fp16 multiplies the loss by is too much, it is halved; training would leave such a
    step out."""
    while True:
        model.zero_grad()
        context = _backward(loss, inputs, model, accelerator, context_of, chunk_size)
        scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
        found = {
            name: gather_stacked(parameter.grad).mean(dim=0) / scale
            for name, parameter in leaves.items()
            if parameter.grad is not None
        }
        model.zero_grad()
        if scale <= 1 or all(slope.isfinite().all() for slope in found.values()):
            return BatchGradient(len(context.row_ids), found)
        accelerator.scaler.update(scale / 2)


def _backward(
    loss: Loss,
    inputs: dict[str, Tensor],
    model: nn.Module,
    accelerator: Accelerator,
    context_of: ContextOf,
    chunk_size: int | None,
) -> LossContext:
    counts = row_counts(inputs["input_ids"])
    context, kept = context_of(inputs, counts)

    def embed(chunk: Mapping[str, Tensor]) -> PairEmbeddings:
        with accelerator.autocast():
            found = embed_pairs(model, model, chunk)
        if accelerator.mixed_precision == "no":
            return found
        return replace(found, image=found.image.float(), text=found.text.float())

    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        return loss(gather_pairs(pair_embeddings(model, image, text), counts, kept), context)

    if chunk_size is None:
        whole = embed(inputs)
        accelerator.backward(loss_of(whole.image, whole.text))
    else:
        GradientCache(chunk_size).backward(accelerator, model, inputs, embed, loss_of)
    return context
