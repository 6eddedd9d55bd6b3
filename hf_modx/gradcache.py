"""A large contrastive batch in the memory of a small one."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .embeddings import PairEmbeddings


class GradientCache:
    """Backward through a batch that is too large to keep its activations (Gao et al., "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup", RepL4NLP 2021, section 3).

    The batch is embedded in chunks without gradient, the loss is computed once on all embeddings, and its gradient
    with respect to them is then carried back into the encoders chunk by chunk. The price is one more forward pass.
    The gradient is that of the whole batch: dropout is replayed, and what reaches parameters past the encoders (the
    logit scale, terms on weights) is added in the last chunk, the only one that synchronises processes.

    Args:
        chunk_size: pairs a chunk, on each process.
    """

    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size

    def backward(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        embed: Callable[[Mapping[str, Tensor]], PairEmbeddings],
        loss_of: Callable[[Tensor, Tensor], Tensor],
        along: Sequence[nn.Parameter] = (),
    ) -> Tensor:
        """Accumulate the gradient of the batch's loss into the parameters.

        Args:
            accelerator: of the training.
            model: as prepared by the accelerator.
            batch: what `embed` takes, `pixel_values` and `input_ids` among it. There may be more images than texts, or
                fewer; a chunk has at least one of each.
            embed: a forward pass through the model.
            loss_of: the loss of this process's (n, D) image and text embeddings; may gather those of the others.
            along: parameters of the loss that are none of the model's.

        Returns:
            The loss, without graph.
        """
        chunks = _chunks(batch, self.chunk_size)
        states, embeddings = _embed_without_gradient(chunks, embed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss, gradients, rest = _gradients([*trained, *along], embeddings, loss_of)
        for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            last = number == len(chunks) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with state.replayed():
                    embedded = embed(chunk)
                surrogate = sum(
                    (side * gradient[number]).sum()
                    for side, gradient in zip((embedded.image, embedded.text), gradients, strict=True)
                )
                accelerator.backward(surrogate + rest if last else surrogate)
        return loss


def join_batches(batches: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Batches of one process below each other; token ids and masks are padded to the longest."""
    if len(batches) == 1:
        return dict(batches[0])
    joined = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name in ("input_ids", "attention_mask"):
            width = max(part.shape[1] for part in parts)
            filler = pad_token_id if name == "input_ids" else 0
            parts = [nn.functional.pad(part, (0, width - part.shape[1]), value=filler) for part in parts]
        joined[name] = torch.cat(parts)
    return joined


def _chunks(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    sides = (len(batch["pixel_values"]), len(batch["input_ids"]))
    number = min(math.ceil(max(sides) / size), *sides)
    parts = {name: _cut(tensor, number, size) for name, tensor in batch.items()}
    return [{name: parts[name][place] for name in batch} for place in range(number)]


def _cut(tensor: Tensor, number: int, size: int) -> Sequence[Tensor]:
    """So many parts; full ones and the rest, where that is so many."""
    return tensor.split(size) if math.ceil(len(tensor) / size) == number else tensor.tensor_split(number)


@torch.no_grad()
def _embed_without_gradient(
    chunks: list[dict[str, Tensor]], embed: Callable[[Mapping[str, Tensor]], PairEmbeddings]
) -> tuple[list["_RandomState"], list[PairEmbeddings]]:
    states, embeddings = [], []
    for chunk in chunks:
        states.append(_RandomState.now(chunk["input_ids"].device))
        embeddings.append(embed(chunk))
    return states, embeddings


def _gradients(
    parameters: list[nn.Parameter],
    embeddings: list[PairEmbeddings],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor | float]:
    """The loss, its gradient with respect to each chunk's images and texts, and a term that carries its gradient with
    respect to parameters that it reaches by another way than the embeddings."""
    image, text = (
        torch.cat([getattr(chunk, side) for chunk in embeddings]).requires_grad_() for side in ("image", "text")
    )
    loss = loss_of(image, text)
    gradients = torch.autograd.grad(loss, [image, text, *parameters], allow_unused=True)
    sizes = [[len(getattr(chunk, side)) for chunk in embeddings] for side in ("image", "text")]
    sides = [
        (torch.zeros_like(side) if gradient is None else gradient).split(parts)
        for side, gradient, parts in zip((image, text), gradients[:2], sizes, strict=True)
    ]
    rest = sum(
        (parameter * gradient).sum()
        for parameter, gradient in zip(parameters, gradients[2:], strict=True)
        if gradient is not None
    )
    return loss.detach(), sides, rest


@dataclass(frozen=True)
class _RandomState:
    """The generators of dropout as they were at one moment."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "_RandomState":
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, on_device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """The same random numbers again; afterwards the generators go on as if nothing had been."""
        with torch.random.fork_rng(devices=[self.device] if self.on_device is not None else []):
            torch.set_rng_state(self.cpu)
            if self.on_device is not None:
                torch.cuda.set_rng_state(self.on_device, self.device)
            yield
