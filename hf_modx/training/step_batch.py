"""The batch of one process as the forward pass takes it, and its way into the global batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..callbacks import LossCallback, LossContext
from ..callbacks.base import ExtraEmbeddings
from ..distributed import all_gather_rows, gather_stacked, process_index, row_counts
from ..embeddings import IMAGE_INPUTS, TEXT_INPUTS, PairEmbeddings
from ..gradcache import join_batches
from ..losses import Shard


@dataclass(frozen=True)
class ReadyBatch:
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


def with_extra_inputs(
    inputs: dict[str, Tensor], extra: Sequence[Mapping[str, Tensor]], pad_token_id: int
) -> dict[str, Tensor]:
    """The batch with the extra images below its images and the extra texts below its texts."""
    joined = dict(inputs)
    for names in (IMAGE_INPUTS, TEXT_INPUTS):
        own = [name for name in names if name in inputs]
        parts = [{name: part[name] for name in own} for part in (inputs, *extra) if own[0] in part]
        joined.update(join_batches(parts, pad_token_id))
    return joined


def given_texts(inputs: Mapping[str, Tensor], extra: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor | None, Tensor]:
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
    """The embeddings of the global batch, in one exchange."""
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
