"""The pairwise sigmoid loss of SigLIP on embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .affinity import Shard, block_rows, repeated
from .contrastive import check_pairs, full_precision, upcast, with_extra


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    pair_ids: Tensor | None = None,
    positives: bool = True,
    extra_text_embeds: Tensor | None = None,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """Every image and every text, do they belong together: a yes-or-no question for each of the N x N pairs.

    `L = -1/N sum_ij log sigmoid(z_ij (t v_i . l_j + b))`, z_ij being 1 where image i and text j belong together and -1
    elsewhere (Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, section 3.2).

    The (N, N) matrix is never held: its gradient is taken along with the loss, block by block of rows.

    Args:
        image_embeds: (N, D), unit-norm rows.
        text_embeds: (N, D), unit-norm rows; row i belongs to image i.
        logit_scale: the factor t itself, already exponentiated; takes gradient.
        logit_bias: b; takes gradient.
        pair_ids: (N,) or (N, K) integers. Different rows that agree in an id belong together too. None: every other
            row is a negative.
        positives: False: nothing is asked about those that belong together and are not one pair.
        extra_text_embeds: (M, D), unit-norm rows: texts that belong to none of the images.
        chunk_size: rows of the similarity matrix held at once; None chooses. Bounds memory, never changes the result.
        shard: the rows that this process computes, where several share the loss (`LossContext.shard`).

    Returns:
        A scalar in fp32 (fp64 for fp64 embeddings). Embeddings that are not finite make it not finite.

    Raises:
        ValueError: the embeddings are not two matrices of one shape, or the ids are not N integers.
    """
    check_pairs(image_embeds, text_embeds, pair_ids)
    with full_precision(image_embeds):
        images, texts = upcast(image_embeds), upcast(with_extra(text_embeds, extra_text_embeds))
        scale, bias = (
            torch.as_tensor(value, dtype=images.dtype, device=images.device).reshape(())
            for value in (logit_scale, logit_bias)
        )
        settings = _Settings(repeated(pair_ids), positives, block_rows(texts, chunk_size), shard)
        return _SigmoidLoss.apply(images, texts, scale, bias, settings)


@dataclass(frozen=True)
class _Settings:
    pair_ids: Tensor | None
    positives: bool
    block_rows: int
    shard: Shard | None

    def blocks(self, number: int) -> Iterator[slice]:
        """The rows of this process, in blocks."""
        start, stop = (0, number) if self.shard is None else (self.shard.start, self.shard.stop)
        return (slice(at, min(at + self.block_rows, stop)) for at in range(start, stop, self.block_rows))

    def belong_together(self, place: slice, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(rows, C) bool: what belongs together, and what is not asked about (None: nothing)."""
        together = torch.zeros(shape, dtype=torch.bool, device=device)
        if self.pair_ids is not None:
            same = (self.pair_ids[place, None] == self.pair_ids[None]).any(dim=-1)
            together[:, : len(self.pair_ids)] = same
        together.diagonal(offset=place.start).fill_(True)
        if self.pair_ids is None or self.positives:
            return together, None
        left_out = together.clone()
        left_out.diagonal(offset=place.start).fill_(False)
        return together, left_out


class _SigmoidLoss(torch.autograd.Function):
    """Forward takes the gradient along: the loss is a scalar, so that backward has only to scale it. That is three
    matrix products instead of the four of a backward pass that makes the blocks again."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, settings: _Settings) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        total, scale_grad, bias_grad = images.new_zeros(3, dtype=torch.float64).unbind()
        image_grad, text_grad = (torch.zeros_like(side) if with_gradient else None for side in (images, texts))
        for place in settings.blocks(len(images)):
            cosines = images[place] @ texts.T
            together, left_out = settings.belong_together(place, cosines.shape, cosines.device)
            logits = torch.addcmul(bias, cosines, scale)
            answers = F.logsigmoid(torch.where(together, logits, -logits))
            if left_out is not None:
                answers.masked_fill_(left_out, 0)
            total -= answers.sum(dim=1).double().sum()
            if not with_gradient:
                continue
            slopes = logits.sigmoid_().sub_(together.to(logits.dtype))
            if left_out is not None:
                slopes.masked_fill_(left_out, 0)
            torch.mm(slopes, texts, out=image_grad[place])
            text_grad.addmm_(slopes.T, images[place])
            bias_grad += slopes.sum(dim=1).double().sum()
            scale_grad += cosines.mul_(slopes).sum(dim=1).double().sum()
        if settings.shard is not None:
            total = settings.shard.gather(total).sum(dim=0)
        if with_gradient:
            weight = (1 if settings.shard is None else settings.shard.processes) / len(images)
            ctx.save_for_backward(
                image_grad.mul_(weight * scale),
                text_grad.mul_(weight * scale),
                (weight * scale_grad).to(scale.dtype),
                (weight * bias_grad).to(bias.dtype),
            )
        return (total / len(images)).to(images.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError("The gradient of this loss cannot be differentiated again (create_graph=True).")
        return *(slope * gradient for gradient in ctx.saved_tensors), None
