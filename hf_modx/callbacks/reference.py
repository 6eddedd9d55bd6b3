"""Reference images and texts: what a frozen teacher is asked about while the student learns something else."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import PairCollator, as_captions
from ..data.images import to_rgb
from ..data.loading import with_images
from ..data.overlap import image_digests
from ..distributed import all_gather_rows, on_each_process, process_index, world_size
from ..embeddings import embed_images, embed_texts


def reference_images(table: Dataset, column: str) -> Dataset:
    """The column alone, as images; paths and bytes, as parquet files hold them, become images.

    Raises:
        ValueError: there is no such column.
    """
    return with_images(_column(table, column), column)


def reference_texts(table: Dataset, column: str) -> list[str]:
    """Every different text of the column once, of strings or lists of strings.

    Raises:
        ValueError: there is no such column, or no text in it.
    """
    texts = list(dict.fromkeys(text for value in _column(table, column)[column] for text in as_captions(value)))
    if not texts:
        raise ValueError(f"Column {column!r} holds no texts.")
    return texts


def row_keys(contents: Iterable[bytes]) -> Tensor:
    """(N,) 63-bit hashes of the contents of N rows."""
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def stored_images(images: Dataset) -> Iterator[bytes]:
    """What tells each image of the one column from others: a hash of it as it is stored; its address, where it lies on
    no disk."""
    (column,) = images.column_names
    stored = images.cast_column(column, datasets.Image(decode=False))
    for row, digest in enumerate(image_digests(images, column)):
        yield digest or str(stored[row][column]["path"]).encode()


def _column(table: Dataset, column: str) -> Dataset:
    if column not in table.column_names:
        raise ValueError(
            f"The reference data have no column {column!r}. The columns are: {', '.join(table.column_names)}."
        )
    return table.select_columns([column]).with_format(None)


@dataclass(frozen=True)
class Draw:
    """The rows that a step sees: a pure function of (seed, step), each row at most once a step.

    Attributes:
        rows: of the table.
        number: rows a step; all where there are fewer.
        seed: of the phase; different draws of one phase have different ones.
    """

    rows: int
    number: int
    seed: tuple[int, ...]

    def __call__(self, step: int) -> np.ndarray:
        if self.number >= self.rows:
            return np.arange(self.rows)
        return np.random.default_rng([*self.seed, step]).choice(self.rows, self.number, replace=False)

    def own(self, step: int) -> np.ndarray:
        """This process's share; the shares, in the order of the ranks, are the rows of the step."""
        return self(step)[own_share(min(self.number, self.rows))]


def own_share(number: int) -> slice:
    """Which of so many items are this process's."""
    rank, processes = process_index(), world_size()
    return slice(number * rank // processes, number * (rank + 1) // processes)


def reference_pixels(
    images: Dataset,
    rows: Callable[[int], Sequence[int]],
    items: range,
    collator: PairCollator,
    num_workers: int,
) -> Iterator[dict[str, Tensor]]:
    """Of each item k the preprocessed images `rows(k)`; empty for none."""
    loader = DataLoader(
        _Pictures(images, rows, collator),
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        generator=torch.Generator(),  # its seed is drawn from the global one otherwise, which dropout uses
    )
    return iter(loader)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, images: Dataset, rows: Callable[[int], Sequence[int]], collator: PairCollator):
        self.images = images
        self.rows = rows
        self.collator = collator

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        rows = list(self.rows(item))
        if not rows:
            return {}
        (column,) = self.images.column_names
        return self.collator.pixels([to_rgb(image) for image in self.images[rows][column]])


@torch.no_grad()
def embed_references(
    model: nn.Module,
    images: Dataset,
    texts: Sequence[str],
    collator: PairCollator,
    *,
    autocast: Callable[[], AbstractContextManager],
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """What a model says to reference images and texts, in eval mode, shared by all processes; the same on each.

    Returns:
        `image` (R, D) and `text` (M, D), unit-norm fp32 on the CPU, and `logit_scale`, the factor on the cosines.
    """
    was_training = model.training
    model.eval()

    def of_images(batches: list[range]) -> Iterator[Tensor]:
        pictures = reference_pixels(images, batches.__getitem__, range(len(batches)), collator, num_workers)
        for pixels in pictures:
            with autocast():
                yield embed_images(model, **_on(device, pixels))

    def of_texts(batches: list[range]) -> Iterator[Tensor]:
        for batch in batches:
            tokens = collator.tokens([texts[place] for place in batch])
            with autocast():
                yield embed_texts(model, **_on(device, tokens))

    tables = {
        "image": _embed_together(len(images), batch_size, of_images),
        "text": _embed_together(len(texts), batch_size, of_texts),
        "logit_scale": model.logit_scale.detach().exp().float().cpu().reshape(()),
    }
    model.train(was_training)
    return tables


def _on(device: torch.device | str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _embed_together(number: int, batch_size: int, embed: Callable[[list[range]], Iterator[Tensor]]) -> Tensor:
    """Each process embeds a run of batches; an error on one is raised on all."""
    starts = range(0, number, batch_size)
    batches = [range(start, min(start + batch_size, number)) for start in starts]
    parts: list[Tensor] = []

    def share(rank: int, processes: int) -> list:
        parts.extend(embed(batches[own_share(len(batches))]))
        if not parts:
            parts.append(next(embed([range(1)]))[:0])  # it still takes part in the gathering
        return []

    on_each_process(share)
    return all_gather_rows(torch.cat(parts).float()).cpu()
