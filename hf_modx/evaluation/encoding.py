"""Embedding a whole test set, sharded over processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import EvalPrediction

from ..data import PairCollator, PairDataset
from ..data.images import to_rgb
from ..distributed import all_gather_rows, process_index, world_size
from ..embeddings import embed_images, embed_texts, image_inputs, text_inputs, vision_features


@dataclass(frozen=True)
class EncodedPairs:
    """A test set of N images and C >= N captions as unit-norm embeddings.

    Attributes:
        image: (N, D), in the order of the rows.
        text: (C, D), every caption of every row.
        image_ids: (N,), the pair id of each image.
        text_ids: (C,), the pair id of each caption.
        text_rows: (C,), the row that each caption belongs to.
    """

    image: Tensor
    text: Tensor
    image_ids: Tensor
    text_ids: Tensor
    text_rows: Tensor

    @classmethod
    def of_pairs(cls, image: Tensor, text: Tensor) -> "EncodedPairs":
        """N images with one caption each, (N, D) and (N, D)."""
        numbers = torch.arange(len(image), device=image.device)
        return cls(image, text, numbers, numbers, numbers)

    def first_captions(self) -> Tensor:
        """(N,) indices into `text`: the first caption of each row."""
        return torch.searchsorted(self.text_rows, torch.arange(len(self.image), device=self.text_rows.device))

    def select(self, rows: Tensor) -> "EncodedPairs":
        """Some of the rows, by ascending numbers, with all of their captions."""
        places = torch.full_like(self.image_ids, -1)
        places[rows] = torch.arange(len(rows), device=places.device)
        of_captions = places[self.text_rows]
        kept = of_captions >= 0
        return EncodedPairs(
            self.image[rows], self.text[kept], self.image_ids[rows], self.text_ids[kept], of_captions[kept]
        )

    def as_predictions(self) -> EvalPrediction:
        """What a `compute_metrics` function receives."""
        return EvalPrediction(
            predictions=(self.image.cpu().numpy(), self.text.cpu().numpy()),
            label_ids=(self.image_ids.cpu().numpy(), self.text_ids.cpu().numpy()),
        )


@torch.no_grad()
def encode_pairs(
    dual_encoder: nn.Module,
    dataset: PairDataset,
    collator: PairCollator,
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> EncodedPairs:
    """Embed all images and ALL captions of a test set. The result is the same on every process.

    The model is used unwrapped and is neither prepared nor switched to another mode.

    Raises:
        ValueError: the test set has fewer rows than there are processes, or a row without caption or image.
    """
    number = world_size()
    rank = dist.get_rank() if number > 1 else 0
    if len(dataset) < number:
        raise ValueError(f"A test set of {len(dataset)} rows is too small for {number} processes.")
    loader = DataLoader(
        Subset(dataset, range(rank, len(dataset), number)),
        batch_size=batch_size,
        collate_fn=AllCaptions(collator),
        num_workers=num_workers,
    )
    shards: dict[str, list[Tensor]] = {name: [] for name in ("image", "text", "rows", "ids", "text_rows", "text_ids")}
    for batch in loader:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        shards["image"].append(embed_images(dual_encoder, **image_inputs(batch)))
        texts = [embed_texts(dual_encoder, **part) for part in _slices(text_inputs(batch), batch_size)]
        shards["text"].append(torch.cat(texts))
        for name in ("rows", "ids", "text_rows", "text_ids"):
            shards[name].append(batch[name])
    whole = {name: all_gather_rows(torch.cat(parts)) for name, parts in shards.items()}
    order, text_order = whole["rows"].argsort(), whole["text_rows"].argsort(stable=True)
    return EncodedPairs(
        image=whole["image"][order],
        text=whole["text"][text_order],
        image_ids=whole["ids"][order],
        text_ids=whole["text_ids"][text_order],
        text_rows=whole["text_rows"][text_order],
    )


def _slices(inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    starts = range(0, len(inputs["input_ids"]), size)
    return [{name: tensor[at : at + size] for name, tensor in inputs.items()} for at in starts]


class AllCaptions:
    """Collate with every caption of a row instead of one; no augmentation.

    Returns, when called with N items of `PairDataset` that have C captions: the collator's `pixels` of N images and
    `tokens` of C captions, `rows` and `ids` (N,) of the images, `text_rows` and `text_ids` (C,) of the captions.
    """

    def __init__(self, collator: PairCollator):
        self.collator = collator

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        self.collator.refuse_missing_captions([pair["row_id"] for pair in pairs if not pair["captions"]])
        captions = [(caption, pair) for pair in pairs for caption in pair["captions"]]
        return {
            **self.collator.pixels([pair["image"] for pair in pairs]),
            **self.collator.tokens([caption for caption, _ in captions]),
            "rows": torch.tensor([pair["row_id"] for pair in pairs]),
            "ids": torch.tensor([pair["pair_id"] for pair in pairs]),
            "text_rows": torch.tensor([pair["row_id"] for _, pair in captions]),
            "text_ids": torch.tensor([pair["pair_id"] for _, pair in captions]),
        }


@dataclass(frozen=True)
class Encoder:
    """A dual encoder and how to feed it: what a test without captions needs. The work is shared by all processes, and
    each gets the whole.

    Attributes:
        dual_encoder: unwrapped, in eval mode.
        collator: gives what the two towers read.
        batch_size: images or texts embedded at once.
        num_workers: processes that decode images.
        device: where the model is.
    """

    dual_encoder: nn.Module
    collator: PairCollator
    batch_size: int
    num_workers: int = 0
    device: torch.device | str = "cpu"

    def image_embeds(self, images: Dataset) -> Tensor:
        """(N, D), unit-norm, of a table whose only column are N images, in their order."""
        return self._images(images, lambda **inputs: embed_images(self.dual_encoder, **inputs))

    def vision_features(self, images: Dataset) -> Tensor:
        """(N, H), what the vision tower says of N images before the projection into the common space: the features of
        CLIP's linear probes (Radford et al., 2021, appendix A.3)."""
        return self._images(images, lambda **inputs: vision_features(self.dual_encoder, **inputs))

    def text_embeds(self, texts: Sequence[str]) -> Tensor:
        """(M, D), unit-norm, of M texts."""

        def embed(places: Sequence[int]) -> Iterator[Tensor]:
            for start in range(0, len(places), self.batch_size):
                tokens = self.collator.tokens([texts[place] for place in places[start : start + self.batch_size]])
                yield embed_texts(self.dual_encoder, **{name: part.to(self.device) for name, part in tokens.items()})

        return self._together(len(texts), embed)

    def _images(self, images: Dataset, function: Callable[..., Tensor]) -> Tensor:
        pictures = _Pictures(images)

        def embed(places: Sequence[int]) -> Iterator[Tensor]:
            loader = DataLoader(
                Subset(pictures, places),
                batch_size=self.batch_size,
                collate_fn=self.collator.pixels,
                num_workers=self.num_workers,
                generator=torch.Generator(),  # its seed is drawn from the global one otherwise
            )
            for inputs in loader:
                yield function(**{name: part.to(self.device) for name, part in inputs.items()})

        return self._together(len(images), embed)

    @torch.no_grad()
    def _together(self, number: int, embed: Callable[[Sequence[int]], Iterator[Tensor]]) -> Tensor:
        own = range(process_index(), number, world_size())
        # A process without a share embeds one item, for the shape, and gives none.
        rows = torch.cat(list(embed(own or range(1))))[: len(own)].float()
        places = torch.tensor(own, dtype=torch.long, device=rows.device)
        return all_gather_rows(rows)[all_gather_rows(places).argsort()]


class _Pictures(torch.utils.data.Dataset):
    """The RGB images of a table of one column."""

    def __init__(self, images: Dataset):
        self.images = images.with_format(None)
        (self.column,) = images.column_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> list[Any]:
        try:
            return [to_rgb(image) for image in self.images[rows][self.column]]
        except Exception as error:  # Pillow raises nearly anything on a broken file
            raise ValueError(f"An image among the rows {rows} is null or cannot be decoded: {error}") from error
