"""The kernel under every loss over the similarity matrix: InfoNCE and distillation in one pass over row blocks.

The (N, C) matrix is never held. A forward pass makes blocks of rows of the new and the old model's cosines and keeps
of them only running maxima and sums for rows and columns; the backward pass makes the blocks again. Six matrix
products in all: one for each model forward, the same two again backward, and one for each side's gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Stands for "this column is not a candidate". Finite, so that a masked column times a probability of zero is zero
# and not NaN; far below any logit, so that its probability underflows to exactly zero.
NOT_A_CANDIDATE = -1e30
RECTIFY = "rectify"  # a value of `screen`
# In units of the last place. Equal vectors multiplied in blocks of another shape differ by so much: without it a tie
# would be kept or not with the chunk size.
ROUNDING = 8
# With exponents up to this no sum of powers overflows, and none that matters underflows.
LARGEST_EXPONENT = 30.0
# Similarities a block, where the caller does not choose: what fits a cache, or keeps an accelerator busy.
BLOCK = {"cpu": 2**19}
ACCELERATOR_BLOCK = 2**25
FEWEST_ROWS = 128


@dataclass(frozen=True)
class Shard:
    """The rows of the matrix that this process computes, where several share one loss.

    Every process passes the same embeddings and its own rows. The loss it gets is the global one; the gradient is the
    number of processes times its own share, so that the SHARES SUMMED over processes (the backward of a gather) and
    averaged (what data-parallel training does) are the gradient of one big batch.

    Attributes:
        start, stop: the rows, of images and of texts alike; together the shards of all processes cover each once.
        processes: how many share the loss.
        gather: stacks a tensor over the processes, (...) to (number of processes, ...), without gradient.
    """

    start: int
    stop: int
    processes: int
    gather: Callable[[Tensor], Tensor]


class AffinityLosses(NamedTuple):
    """What `affinity_losses` returns: scalars.

    Attributes:
        contrastive: the mean over both directions of the cross-entropies' mean over rows.
        distillation: the mean over both directions of KL(old || new) summed over the kept rows, and of
            KL(pairs || new) summed over the rectified ones, each as often as it counts.
        image_rows_kept, text_rows_kept: number of rows that the distillation kept.
        image_rows_rectified, text_rows_rectified: number of rows held to the pairs themselves.
    """

    contrastive: Tensor
    distillation: Tensor
    image_rows_kept: Tensor
    text_rows_kept: Tensor
    image_rows_rectified: Tensor
    text_rows_rectified: Tensor


def affinity_losses(
    images: Tensor,
    texts: Tensor,
    scale: Tensor | float | None = None,
    old_images: Tensor | None = None,
    old_texts: Tensor | None = None,
    *,
    distill_scale: float = 1.0,
    screen: bool | str = True,
    row_weights: Tensor | None = None,
    pair_ids: Tensor | None = None,
    positives: bool = False,
    chunk_size: int | None = None,
    shard: Shard | None = None,
) -> AffinityLosses:
    """InfoNCE and KL(old || new) of the affinity matrix, both directions.

    Args:
        images: (N, D), unit-norm, fp32 or fp64; takes gradient.
        texts: (C, D) with C >= N; row i < N belongs to image i, the others are further candidates of every image and
            have no text-to-image row. Takes gradient.
        scale: factor on the cosines in InfoNCE; takes gradient. None: no contrastive term (a zero).
        old_images, old_texts: (N, D') and (C, D') of the old model. None: no distillation (a zero).
        distill_scale: factor on the cosines in the distillation, > 0.
        screen: keep only rows that the old model gets right. "rectify": of the others, rectify those that the new
            model gets wrong too (see `affinity_distillation`).
        row_weights: (N,), what the divergences of a pair's two rows count, >= 0; None: all one. Pairs of weight zero
            are neither kept nor rectified, and stay candidates.
        pair_ids: (N,) or (N, K) integers. Two rows that agree in any of the K ids belong together.
        positives: rows that belong together are positives of each other; False: they are no candidates of each other.
        chunk_size: rows of a block. None chooses.
        shard: the rows of this process; None: all.
    """
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=images.dtype, device=images.device).reshape(())
    if row_weights is not None:
        row_weights = row_weights.to(images.dtype)
    settings = _Settings(
        distill_scale, screen, row_weights, repeated(pair_ids), positives, block_rows(texts, chunk_size), shard
    )
    return AffinityLosses(*_AffinityLosses.apply(images, texts, scale, old_images, old_texts, settings))


def rows_ranked_first(
    images: Tensor,
    texts: Tensor,
    *,
    pair_ids: Tensor | None = None,
    positives: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """(2, N) bool, of images and of texts: the rows that `affinity_losses` screens as right, in one matrix product. A
    row with a cosine that is NaN is not.

    Args:
        images, texts: (N, D), unit-norm, fp32 or fp64; no gradient is computed.
        pair_ids, positives, chunk_size: as there.
    """
    settings = _Settings(1.0, True, None, repeated(pair_ids), positives, block_rows(texts, chunk_size), None)
    screen = _Screen(images)
    for place, block, _, right in _Blocks(images, texts, None, None, settings):
        screen.add_own(place, block, right)
        screen.add_highest(place, block)
    return screen.own_is_highest()


@dataclass(frozen=True)
class _Settings:
    distill_scale: float
    screen: bool | str
    row_weights: Tensor | None
    pair_ids: Tensor | None
    positives: bool
    block_rows: int
    shard: Shard | None

    @property
    def rectifies(self) -> bool:
        return self.screen == RECTIFY

    def rows(self, number: int) -> slice:
        """The rows of this process."""
        return slice(0, number) if self.shard is None else slice(self.shard.start, self.shard.stop)


class _AffinityLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, texts, scale, old_images, old_texts, settings):
        rows = settings.rows(len(images))
        distills = old_images is not None
        if distills:
            old_images, old_texts, usable = _without_nonfinite(old_images, old_texts)
        blocks = _Blocks(images, texts, old_images, old_texts, settings)
        sharp = _Softmax(images, texts, float(scale)) if scale is not None else None
        soft = _Softmax(images, texts, settings.distill_scale) if distills else None
        old = _Softmax(old_images, old_texts, settings.distill_scale) if distills else None
        for place, new_block, old_block, positives in blocks:
            if sharp is not None:
                sharp.add(place, new_block, blocks.spare)
                sharp.add_targets(place, new_block, positives)
            if distills:
                old.add_own(place, old_block, positives)
                if settings.rectifies:
                    soft.add_own(place, new_block, positives)
                    soft.add_targets(place, new_block, positives)
                soft.add(place, new_block, blocks.spare)
                old.add(place, old_block, blocks.spare, torch.sub(old_block, new_block, out=new_block))
        for softmax in (sharp, soft, old):
            if softmax is not None:
                softmax.finish(settings.shard)
        sums = images.new_zeros(6, dtype=torch.float64)
        if sharp is not None:
            sums[0] = sharp.cross_entropy(rows)
        if distills:
            kept, rectified = _kept_and_rectified(old, soft, usable, settings)
            sums[2:4], sums[4:] = kept[:, rows].sum(dim=1), rectified[:, rows].sum(dim=1)
            if settings.row_weights is not None:
                kept, rectified = kept * settings.row_weights, rectified * settings.row_weights
            sums[1] = _divergence(old, soft, kept, rows)
            if settings.rectifies:
                sums[1] += soft.divergence_from_targets(rectified, rows)
            soft.weigh_probabilities(kept + rectified)
            soft.weigh_targets(rectified)
            old.weigh_probabilities(kept)
        if settings.shard is not None:
            sums = settings.shard.gather(sums).sum(dim=0)
        ctx.save_for_backward(images, texts, old_images, old_texts)
        ctx.settings, ctx.softmaxes = settings, (sharp, soft, old)
        ctx.set_materialize_grads(False)
        losses = (sums / sums.new_tensor([2 * len(images), 2, 1, 1, 1, 1])).to(images.dtype).unbind()
        ctx.mark_non_differentiable(*losses[2:])
        return losses

    @staticmethod
    def backward(ctx, contrastive_grad, distillation_grad, *_):
        if torch.is_grad_enabled():
            raise RuntimeError("The gradient of these losses cannot be differentiated again (create_graph=True).")
        images, texts, old_images, old_texts = ctx.saved_tensors
        settings, (sharp, soft, old) = ctx.settings, ctx.softmaxes
        processes = 1 if settings.shard is None else settings.shard.processes
        image_grad, text_grad = torch.zeros_like(images), torch.zeros_like(texts)
        scale_grad = None
        if contrastive_grad is not None:
            contrastive_weight = contrastive_grad * processes * sharp.factor / (2 * len(images))
            scale_grad = images.new_zeros((), dtype=torch.float64)
        if distillation_grad is None:
            old_images = None
        else:
            distillation_weight = distillation_grad * processes * soft.factor / 2
        blocks = _Blocks(images, texts, old_images, old_texts, settings)
        buffer = torch.empty_like(blocks.spare)
        for place, new_block, old_block, positives in blocks:
            gradient = buffer[: len(new_block)].zero_()
            if contrastive_grad is not None:
                sharp.add_probabilities(gradient, contrastive_weight, place, new_block, blocks.spare)
                sharp.subtract_targets(gradient, contrastive_weight, place, positives)
                scale_grad += torch.dot(gradient.view(-1), new_block.view(-1))
            if distillation_grad is not None:
                soft.add_probabilities(gradient, distillation_weight, place, new_block, blocks.spare)
                old.add_probabilities(gradient, -distillation_weight, place, old_block, blocks.spare)
                if settings.rectifies:
                    soft.subtract_targets(gradient, distillation_weight, place, positives)
            torch.mm(gradient, texts, out=image_grad[place])
            text_grad.addmm_(gradient.T, images[place])
        if scale_grad is not None:
            scale_grad = (scale_grad / sharp.factor).to(images.dtype)
        return image_grad, text_grad, scale_grad, None, None, None


class _Blocks:
    """Blocks of rows of the new and the old model's cosines, in buffers that every block uses again, and of each which
    pairs are positives of its rows, (rows, N) bool; None: no row has other positives than its own pair."""

    def __init__(self, images: Tensor, texts: Tensor, old_images: Any, old_texts: Any, settings: _Settings):
        self.new, self.old = (images, texts), (old_images, old_texts)
        self.pair_ids, self.positives = settings.pair_ids, settings.positives
        rows = settings.rows(len(images))
        self.places = [
            slice(start, min(start + settings.block_rows, rows.stop))
            for start in range(rows.start, rows.stop, settings.block_rows)
        ]
        shape = (min(settings.block_rows, max(1, rows.stop - rows.start)), len(texts))
        self.spare, self.new_buffer = images.new_empty(shape), images.new_empty(shape)
        self.old_buffer = old_images.new_empty(shape) if old_images is not None else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
        for place in self.places:
            barred = positives = None
            if self.pair_ids is not None and self.positives:
                positives = _belong_together(self.pair_ids, place)
            elif self.pair_ids is not None:
                barred = _barred(self.pair_ids, place, len(self.new[1]))
            new = self._block(self.new, place, self.new_buffer, barred)
            yield place, new, self._old_block(place, barred), positives

    def _old_block(self, place: slice, barred: Tensor | None) -> Tensor | None:
        return None if self.old_buffer is None else self._block(self.old, place, self.old_buffer, barred)

    @staticmethod
    def _block(sides: tuple[Tensor, Tensor], place: slice, buffer: Tensor, barred: Tensor | None) -> Tensor:
        images, texts = sides
        block = torch.mm(images[place], texts.T, out=buffer[: place.stop - place.start])
        return block if barred is None else block.masked_fill_(barred, NOT_A_CANDIDATE)


class _Screen:
    """Of every row and every column how similar the most similar candidate is, and the most similar positive.

    Attributes:
        own: (2, N) the largest cosine of every row and of every column with its positives, as `add_own` was told.
        highest: (2, N) the largest cosine of every row and of every column, as `add_highest` was told.
    """

    def __init__(self, images: Tensor):
        self.own, self.highest = images.new_full((2, 2, len(images)), -torch.inf).unbind()

    def add_highest(self, place: slice, block: Tensor) -> None:
        """Take in the candidates of a block of rows."""
        self.highest[0, place] = block.amax(dim=1)
        torch.maximum(self.highest[1], block[:, : len(self.own[1])].amax(dim=0), out=self.highest[1])

    def add_own(self, place: slice, block: Tensor, positives: Tensor | None) -> None:
        """Take in how similar a block's rows and columns are to the most similar of their positives."""
        if positives is None:
            self.own[:, place] = block.diagonal(offset=place.start)
            return
        similar = torch.where(positives, block[:, : len(positives[0])], NOT_A_CANDIDATE)
        self.own[0, place] = similar.amax(dim=1)
        torch.maximum(self.own[1], similar.amax(dim=0), out=self.own[1])

    def own_is_highest(self) -> Tensor:
        """(2, N) for rows and for columns: no candidate is strictly more similar than a positive, up to rounding."""
        return self.highest <= self.own + ROUNDING * torch.finfo(self.own.dtype).eps


class _Softmax(_Screen):
    """The softmax of `factor * cosines` over every row and over every column, while the blocks of rows go by: of each
    the shift and the sum of its powers, `sum_j exp(factor * cosine_j - shift)`.

    Where no power can overflow, which is so for unit-norm embeddings and a factor up to 30, the shifts are zero and
    rows and columns share their powers.

    Attributes:
        targets: (2, N) the mean cosine of every row and of every column with its positives, as `add_targets` was told.
        positives: (N,) their number.
        shares: (2, N) of one positive in the target of every row and of every column; zero where none is kept.
        shifts, sums: (2, N) for rows and for columns. A process has its shard of the rows, and at the end all columns.
        differences: (2, N) expectations of the difference that the blocks came with.
    """

    def __init__(self, images: Tensor, texts: Tensor, factor: float):
        super().__init__(images)
        self.factor = factor
        largest = images.norm(dim=1).max() * texts.norm(dim=1).max()
        self.shares_powers = bool(factor * largest <= LARGEST_EXPONENT)
        size = (2, len(images))
        self.targets, self.positives = images.new_zeros(size), images.new_zeros(size[1:])
        self.shifts, self.sums, self.differences = images.new_zeros((3, *size)).unbind()
        if not self.shares_powers:
            self.shifts = torch.full_like(self.shifts, -torch.inf)

    def add(self, place: slice, block: Tensor, spare: Tensor, difference: Tensor | None = None) -> None:
        """Take in a block of rows; the difference, of the block's shape, is weighted by the probabilities."""
        number = len(self.positives)  # further candidates have no text-to-image row, so no column here
        pairs = block[:, :number]
        self.add_highest(place, block)
        if not self.shares_powers:
            self.shifts[0, place] = self.factor * self.highest[0, place]
        powers = self._powers(block, self.shifts[0, place, None], spare)
        self.sums[0, place] = powers.sum(dim=1)
        if self.shares_powers:
            self.sums[1] += powers[:, :number].sum(dim=0)
        if difference is not None:
            powers.mul_(difference)
            self.differences[0, place] = powers.sum(dim=1)
            if self.shares_powers:
                self.differences[1] += powers[:, :number].sum(dim=0)
        if not self.shares_powers:
            self._add_columns(pairs, spare, None if difference is None else difference[:, :number])

    def add_targets(self, place: slice, block: Tensor, positives: Tensor | None) -> None:
        """Take in the cosines of a block's rows and columns with their positives."""
        if positives is None:
            self.targets[:, place] = block.diagonal(offset=place.start)
            self.positives[place] = 1
            return
        similar = torch.where(positives, block[:, : len(positives[0])], 0)
        self.targets[0, place] = similar.sum(dim=1)
        self.targets[1] += similar.sum(dim=0)
        self.positives[place] = positives.sum(dim=1).to(block.dtype)

    def subtract_targets(self, total: Tensor, weight: Tensor, place: slice, positives: Tensor | None) -> None:
        """Subtract the weighted targets of rows and of columns: each an equal share for every positive."""
        if positives is None:
            total.diagonal(offset=place.start).sub_(weight * self.shares[:, place].sum(dim=0))
            return
        shares = weight * (self.shares[0, place, None] + self.shares[1])
        total[:, : len(positives[0])].sub_(torch.where(positives, shares, 0))

    def _add_columns(self, pairs: Tensor, spare: Tensor, difference: Tensor | None) -> None:
        """Columns of a block with a running shift; a column may have had no candidate so far."""
        shift = self.factor * self.highest[1].clamp(min=0.1 * NOT_A_CANDIDATE)
        decay = (self.shifts[1] - shift).exp()
        self.shifts[1] = shift
        powers = self._powers(pairs, shift, spare)
        self.sums[1] = self.sums[1] * decay + powers.sum(dim=0)
        if difference is not None:
            self.differences[1] = self.differences[1] * decay + powers.mul_(difference).sum(dim=0)

    def _powers(self, block: Tensor, shift: Tensor, spare: Tensor) -> Tensor:
        """`exp(factor * block - shift)`, written into the spare buffer."""
        out = spare[: len(block), : block.shape[1]]
        if self.shares_powers:
            return torch.mul(block, self.factor, out=out).exp_() if self.factor != 1 else torch.exp(block, out=out)
        return torch.add(-shift, block, alpha=self.factor, out=out).exp_()

    def finish(self, shard: Shard | None) -> None:
        """Put the columns of all processes together."""
        if shard is not None:
            columns = [self.shifts[1], self.sums[1], self.differences[1], self.highest[1], self.own[1]]
            columns += [self.targets[1], self.positives]
            shifts, sums, differences, highest, own, *added = shard.gather(torch.stack(columns)).unbind(dim=1)
            self.own[1], self.highest[1], self.shifts[1] = own.amax(dim=0), highest.amax(dim=0), shifts.amax(dim=0)
            self.targets[1], self.positives = (part.sum(dim=0) for part in added)
            weights = (shifts - self.shifts[1]).exp()
            self.sums[1], self.differences[1] = (weights * sums).sum(dim=0), (weights * differences).sum(dim=0)
        self.log_sums = self.shifts.double() + self.sums.double().log()
        self.differences = self.differences.double() / self.sums.double()
        self.weights = self.sums.reciprocal()
        self.positives = self.positives.clamp(min=1)
        self.targets = self.targets / self.positives
        self.shares = (1 / self.positives).expand(2, -1)

    def cross_entropy(self, rows: slice) -> Tensor:
        """Sum over the rows and the columns of these pairs, of each the mean over its positives."""
        return self._cross_entropies().sum(dim=0)[rows].sum()

    def divergence_from_targets(self, rectified: Tensor, rows: slice) -> Tensor:
        """Sum of KL(target || new) over the rows and columns of these pairs, (2, N) of which each is rectified."""
        divergences = self._cross_entropies() - self.positives.double().log()
        return (divergences * rectified)[:, rows].sum()

    def _cross_entropies(self) -> Tensor:
        return self.log_sums - self.factor * self.targets

    def weigh_probabilities(self, by: Tensor) -> None:
        """Let those of every row and column count so much, (2, N); zero: not at all, whatever they are."""
        self.weights = (self.weights * by).where(by > 0, 0)

    def weigh_targets(self, by: Tensor) -> None:
        """Let those of every row and column count so much, (2, N)."""
        self.shares = self.shares * by

    def add_probabilities(self, total: Tensor, weight: Tensor, place: slice, block: Tensor, spare: Tensor) -> None:
        """Add the weighted softmax over rows and the weighted softmax over columns, as far as they are kept."""
        number = len(self.positives)
        row_weights, column_weights = weight * self.weights[0, place, None], weight * self.weights[1]
        powers = self._powers(block, self.shifts[0, place, None], spare)
        if self.shares_powers and number == len(block[0]):
            total.addcmul_(powers, row_weights + column_weights)
            return
        total.addcmul_(powers, row_weights)
        if not self.shares_powers:
            powers = self._powers(block[:, :number], self.shifts[1], spare)
        total[:, :number].addcmul_(powers[:, :number], column_weights)


def _kept_and_rectified(old: _Softmax, new: _Softmax, usable: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """(2, N) bool each: of the usable rows and columns those that follow the old model, and those that follow the
    pairs, as both models get them wrong."""
    if settings.row_weights is not None:
        usable = usable & (settings.row_weights > 0)
    right = old.own_is_highest()
    kept = usable & right if settings.screen else usable
    rectified = usable & ~right & ~new.own_is_highest() if settings.rectifies else torch.zeros_like(usable)
    return kept, rectified


def _divergence(old: _Softmax, new: _Softmax, kept: Tensor, rows: slice) -> Tensor:
    """Sum of KL(old || new) over the rows and columns of these pairs, (2, N) as far as each is kept. The product lets
    a new model that is not finite through."""
    divergences = old.factor * old.differences - old.log_sums + new.log_sums
    return (divergences * kept)[:, rows].sum()


def _without_nonfinite(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The old model's embeddings with zeros for rows that are not finite, and (2, N) which image rows and which text
    rows have finite similarities only."""
    image_finite, text_finite = images.isfinite().all(dim=1), texts.isfinite().all(dim=1)
    usable = torch.stack([image_finite & text_finite.all(), text_finite[: len(images)] & image_finite.all()])
    return images.where(image_finite[:, None], 0), texts.where(text_finite[:, None], 0), usable


def _barred(pair_ids: Tensor, place: slice, columns: int) -> Tensor:
    """(rows, C): the columns that are no candidates of a row: they share an id with it and are not its own."""
    same = _belong_together(pair_ids, place)
    same.diagonal(offset=place.start).fill_(False)
    return torch.nn.functional.pad(same, (0, columns - len(pair_ids)))


def _belong_together(pair_ids: Tensor, place: slice) -> Tensor:
    """(rows, N): the pairs that share an id with a row, its own among them."""
    return (pair_ids[place, None] == pair_ids[None]).any(dim=-1)


def repeated(pair_ids: Tensor | None) -> Tensor | None:
    """(N, K) ids, or None where all differ: no two pairs share one."""
    if pair_ids is None:
        return None
    pair_ids = pair_ids.reshape(len(pair_ids), -1)
    differ = all(len(ids.unique()) == len(ids) for ids in pair_ids.unbind(dim=1))
    return None if differ else pair_ids


def block_rows(texts: Tensor, chunk_size: int | None) -> int:
    """Rows of a block of similarities to so many texts."""
    if chunk_size is None:
        return max(FEWEST_ROWS, BLOCK.get(texts.device.type, ACCELERATOR_BLOCK) // len(texts))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    return chunk_size
