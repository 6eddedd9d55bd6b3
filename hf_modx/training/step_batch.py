"""The batch of one process as the forward pass takes it, and its way into the global batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..callbacks import LossCallback, LossContext
from ..callbacks.base import ExtraEmbeddings
from ..distributed import all_gather_rows, gather_stacked, process_index, row_counts, world_size
from ..embeddings import IMAGE_INPUTS, TEXT_INPUTS, PairEmbeddings
from ..gradcache import join_batches
from ..losses import Shard
from ..training_args import ModXTrainingArguments


@dataclass(frozen=True)
class GlobalRows:
    """What the N rows of the global batch are.

    Attributes:
        row_ids: (N,), see `LossContext`.
        pair_ids: (N,) or (N, K), likewise.
        caption_index: (N,), which of its row's captions was drawn; None where the batch does not say.
        kept: which of the gathered rows belong to the global batch; None: all.
    """

    row_ids: Tensor
    pair_ids: Tensor
    caption_index: Tensor | None
    kept: Tensor | None

    @classmethod
    def gather(cls, inputs: Mapping[str, Tensor], counts: list[int], args: ModXTrainingArguments) -> "GlobalRows":
        """Of the batches of all processes, which have so many pairs each.

        Raises:
            ValueError: equal captions are to be masked, and the batch does not say which are equal.
        """
        names = [name for name in ("row_id", "pair_id", "caption_id", "caption_index") if name in inputs]
        if names:
            ids = all_gather_rows(torch.stack([inputs[name] for name in names], dim=1), counts)
            ids = dict(zip(names, ids.unbind(dim=1), strict=True))
        else:
            ids = {}
        row_ids = ids.get("row_id", torch.arange(sum(counts), device=inputs["input_ids"].device))
        pair_ids = ids.get("pair_id", row_ids)
        caption_index = ids.get("caption_index")
        if args.mask_duplicates and "caption_id" not in ids:
            raise ValueError(
                "mask_duplicates needs a caption_id (N,) of integers in the batches of your data_collator."
            )
        if "caption_id" in ids:
            pair_ids = torch.stack([pair_ids, ids["caption_id"]], dim=1)
        # Only a batch that is not full can hold filled-in rows; looking for them costs a synchronisation.
        may_repeat = world_size() > 1 and not args.dataloader_drop_last
        kept = first_occurrences(row_ids) if may_repeat else None
        if kept is not None:
            row_ids, pair_ids = row_ids[kept], pair_ids[kept]
            caption_index = caption_index[kept] if caption_index is not None else None
        return cls(row_ids, pair_ids, caption_index, kept)

    def shard(self, counts: list[int]) -> Shard | None:
        """Those that came from this process; None where there is nothing to share."""
        return own_shard(counts) if world_size() > 1 and self.kept is None else None


@dataclass(frozen=True)
class StepBatch:
    """This process's batch, ready for the forward pass.

    Attributes:
        inputs: the batch, with the extra images and texts below its own.
        token_embeds: the extra texts that are given as token embeddings; None: there are none.
        counts: pairs of every process.
        kept: which of the gathered pairs belong to the global batch; None: all.
        context: of the global batch.
        extra: how many images and texts each callback has added.
    """

    inputs: dict[str, Tensor]
    token_embeds: Tensor | None
    counts: list[int]
    kept: Tensor | None
    context: LossContext
    extra: dict[LossCallback, tuple[int, int]]

    @classmethod
    def join(
        cls,
        inputs: dict[str, Tensor],
        added: Mapping[LossCallback, Mapping[str, Tensor]],
        counts: list[int],
        kept: Tensor | None,
        context: LossContext,
        pad_token_id: int,
    ) -> "StepBatch":
        """A batch and the extra inputs that callbacks have added to it, their texts padded with `pad_token_id`; the
        other arguments as above."""
        extra = {
            callback: (len(own.get("pixel_values", ())), len(own.get("input_ids", ())))
            for callback, own in added.items()
        }
        joined = _with_extra_inputs(inputs, added.values(), pad_token_id)
        token_embeds, rows = _given_texts(inputs, added.values())
        if token_embeds is not None:
            joined["token_embeds_row"] = rows
        return cls(joined, token_embeds, counts, kept, context, extra)

    def pairs(self, local: PairEmbeddings) -> PairEmbeddings:
        """The embeddings without those of the extra inputs."""
        rows = len(self.context.batch["input_ids"])
        return replace(local, image=local.image[:rows], text=local.text[:rows])

    def gather_extra(self, local: PairEmbeddings) -> dict[LossCallback, ExtraEmbeddings]:
        """The embeddings of the extra inputs, from all processes with gradient."""
        found = {}
        image_at = text_at = len(self.context.batch["input_ids"])
        for callback, (images, texts) in self.extra.items():
            image, text = local.image[image_at : image_at + images], local.text[text_at : text_at + texts]
            found[callback] = ExtraEmbeddings(_gather_some(image), _gather_some(text))
            image_at, text_at = image_at + images, text_at + texts
        return found


def _with_extra_inputs(
    inputs: dict[str, Tensor], extra: Sequence[Mapping[str, Tensor]], pad_token_id: int
) -> dict[str, Tensor]:
    """The batch with the extra images below its images and the extra texts below its texts."""
    joined = dict(inputs)
    for names in (IMAGE_INPUTS, TEXT_INPUTS):
        own = [name for name in names if name in inputs]
        parts = [{name: part[name] for name in own} for part in (inputs, *extra) if own[0] in part]
        joined.update(join_batches(parts, pad_token_id))
    return joined


def _given_texts(inputs: Mapping[str, Tensor], extra: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor | None, Tensor]:
    """The extra texts that are given as token embeddings, and for each text of the joined batch which of them it is,
    or -1."""
    given = [part["token_embeds"] for part in extra if "token_embeds" in part]
    rows = [torch.full((len(inputs["input_ids"]),), -1)]
    before = 0
    for part in extra:
        texts = len(part.get("input_ids", ()))
        rows.append(torch.arange(before, before + texts) if "token_embeds" in part else torch.full((texts,), -1))
        before += texts if "token_embeds" in part else 0
    width = max((part.shape[1] for part in given), default=0)
    padded = [nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in given]
    return torch.cat(padded) if padded else None, torch.cat(rows).to(inputs["input_ids"].device)


def _gather_some(rows: Tensor) -> Tensor:
    """`all_gather_rows` of what may be nothing everywhere."""
    counts = row_counts(rows)
    return all_gather_rows(rows, counts) if any(counts) else rows


def gather_pairs(local: PairEmbeddings, counts: list[int], kept: Tensor | None) -> PairEmbeddings:
    """From this process's embeddings, (n, D), to those of the global batch, (N, D), in one exchange and with gradient.

    Args:
        local: those of the pairs alone.
        counts: pairs of every process.
        kept: which of the gathered rows belong to the global batch; None: all.
    """
    width = local.image.shape[1]
    both = all_gather_rows(torch.cat([local.image, local.text], dim=1), counts)
    if kept is not None:
        both = both[kept]
    return replace(local, image=both[:, :width], text=both[:, width:])


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch without what a collator may add for the model's own loss, as `return_loss`."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def own_shard(counts: list[int]) -> Shard:
    """The rows of the global batch that came from this process."""
    start = sum(counts[: process_index()])
    return Shard(start, start + counts[process_index()], len(counts), gather_stacked)


def first_occurrences(row_ids: Tensor) -> Tensor | None:
    """Positions of the rows without those that give a process something to do in a batch too small for all; None where
    there are no such rows."""
    ordered, places = row_ids.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return None if first.all() else places[first].sort().values
