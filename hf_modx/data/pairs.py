"""Image-caption pairs from a `datasets.Dataset` to tensors."""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..embeddings import caption_padding, image_inputs, longest_caption, text_inputs
from ..nearest import did_you_mean
from ..training_args import ModXTrainingArguments
from .images import augment_affine_color, to_rgb
from .loading import require_table

INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode's categories of control and format characters and of spaces."""


def as_captions(value: Any) -> list[str]:
    """The captions of one row: a list of strings from a string or a list; nulls, and those of which nothing would be
    seen, are left out."""
    values = value if isinstance(value, list) else [value]
    return [caption.strip() for caption in values if isinstance(caption, str) and _is_visible(caption)]


def _is_visible(caption: str) -> bool:
    return any(unicodedata.category(character) not in INVISIBLE for character in caption)


class PairDataset(torch.utils.data.Dataset):
    """Rows of a `datasets.Dataset` as pairs, decoded a batch at a time from the memory-mapped table.

    Item `epoch * len + row` is the row as it is in that epoch: the epoch travels in the index, so that every random
    choice made from it is the same in any worker process and after any interruption.
    """

    def __init__(self, dataset: Dataset, image_column: str, caption_column: str, pair_id_column: str):
        check_columns(dataset, image_column, caption_column)
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The data set has a transform (set_transform), which would not be applied: images and captions are "
                "read from their columns. Apply it with map, or pass a data_collator of your own."
            )
        columns = [image_column, caption_column]
        self.pair_id_column = pair_id_column if pair_id_column in dataset.column_names else None
        if self.pair_id_column:
            check_pair_ids(dataset, pair_id_column)
            columns.append(pair_id_column)
        self.dataset = dataset.select_columns(columns).with_format(None)
        self.image_column = image_column
        self.caption_column = caption_column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A whole batch in one look into the table, which is what the DataLoader asks for."""
        places = [divmod(int(index), len(self.dataset)) for index in indices]
        try:
            rows = self.dataset[[row for _, row in places]]
            images = [to_rgb(image) for image in rows[self.image_column]]
        except Exception as error:  # Pillow raises nearly anything on a broken file
            raise ValueError(
                f"An image among the rows {[row for _, row in places]} cannot be decoded: {error}"
            ) from error
        pair_ids = rows[self.pair_id_column] if self.pair_id_column else [row for _, row in places]
        return [
            {
                "row_id": row,
                "epoch": epoch,
                "pair_id": pair_id,
                "image": image,
                "captions": as_captions(captions),
            }
            for (epoch, row), pair_id, image, captions in zip(
                places, pair_ids, images, rows[self.caption_column], strict=True
            )
        ]


class NumberedRows(torch.utils.data.Dataset):
    """Any map-style data set under the indices of `GlobalBatches`, for collators of a user's own: items are
    (row, item)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        row = int(index) % len(self.dataset)
        return row, self.dataset[row]


class NumberingCollator:
    """A user's own collator on the items of `NumberedRows`; adds `row_id` (N,) where it gives none."""

    def __init__(self, collator: Callable):
        self.collator = collator

    def __call__(self, items: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        batch = self.collator([item for _, item in items])
        return {"row_id": torch.tensor([row for row, _ in items]), **batch}


class PairCollator:
    """Pairs to tensors: one caption of several and the augmentation drawn from (seed, epoch, row) alone.

    Args:
        processing_class: a processor with an image processor and a tokenizer, as `CLIPProcessor`.
        seed: of this phase's random choices.
        image_augmentation: "none" or "affine_color".
        max_length: tokens to which a caption is cut; default: what the tokenizer says.
        mask_duplicates: also return `caption_id`, by which equal captions are known on all processes.
        padding: "longest" caption of the batch, or "max_length".

    `for_model` chooses max_length and padding.

    Returns, when called with N items of `PairDataset`: what `pixels` and `tokens` give of N images and captions,
    `row_id` and `pair_id` (N,), `caption_index` (N,): which of its row's captions was drawn, and with
    `mask_duplicates` `caption_id` (N,): a 63-bit hash of the caption.

    Raises:
        ValueError: augmentation of images that the processor cuts into patches.
    """

    def __init__(
        self,
        processing_class: Any,
        seed: int = 0,
        image_augmentation: str = "none",
        max_length: int | None = None,
        mask_duplicates: bool = False,
        padding: str = "longest",
    ):
        check_processor(processing_class)
        self.max_length = max_length
        self.padding = padding
        self.image_processor = processing_class.image_processor
        self.tokenizer = processing_class.tokenizer
        self.seed = seed
        self.image_augmentation = image_augmentation
        self.mask_duplicates = mask_duplicates
        if image_augmentation != "none" and "spatial_shapes" in getattr(self.image_processor, "model_input_names", ()):
            raise ValueError(
                f"image_augmentation={image_augmentation!r} moves whole images, and "
                f"{type(self.image_processor).__name__} gives patches. Leave it out."
            )

    @classmethod
    def for_model(cls, dual_encoder: nn.Module, processing_class: Any, **options: Any) -> "PairCollator":
        """With captions as long and padded as the model wants them; options are those of the class."""
        check_processor(processing_class)
        longest = longest_caption(dual_encoder, processing_class.tokenizer)
        return cls(processing_class, max_length=longest, padding=caption_padding(dual_encoder), **options)

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        generators = [np.random.default_rng([self.seed, pair["epoch"], pair["row_id"]]) for pair in pairs]
        self.refuse_missing_captions([pair["row_id"] for pair in pairs if not pair["captions"]])
        drawn = [
            int(generator.integers(len(pair["captions"]))) for pair, generator in zip(pairs, generators, strict=True)
        ]
        captions = [pair["captions"][index] for pair, index in zip(pairs, drawn, strict=True)]
        pixels = self.pixels([pair["image"] for pair in pairs])
        if self.image_augmentation == "affine_color":
            pixels["pixel_values"] = augment_affine_color(pixels["pixel_values"], generators)
        batch = {
            **pixels,
            **self.tokens(captions),
            "row_id": torch.tensor([pair["row_id"] for pair in pairs]),
            "pair_id": torch.tensor([pair["pair_id"] for pair in pairs]),
            "caption_index": torch.tensor(drawn),
        }
        if self.mask_duplicates:
            batch["caption_id"] = torch.tensor([self.caption_id(caption) for caption in captions])
        return batch

    @staticmethod
    def refuse_missing_captions(rows: list[int]) -> None:
        """Raise a ValueError that names the rows, if there are any."""
        if rows:
            raise ValueError(f"Rows {rows} have no caption: null, empty or blank. Leave them out.")

    @staticmethod
    def caption_id(caption: str) -> int:
        """63 bits of BLAKE2b: Python's own hash of a string is another one in every process."""
        return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "big") >> 1

    def pixels(self, images: list) -> dict[str, Tensor]:
        """`pixel_values` (N, C, H, W); of a processor that cuts images into P patches (N, P, values of a patch), with
        `pixel_attention_mask` (N, P) and `spatial_shapes` (N, 2)."""
        return image_inputs(self.image_processor(images, return_tensors="pt"))

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """`input_ids` (N, T), cut and padded, and `attention_mask` (N, T) where the tokenizer gives one."""
        return text_inputs(
            self.tokenizer(
                captions, padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        )

    def words(self, input_ids: Tensor) -> Tensor:
        """Bool of the same shape: the tokens that are no special ones as start, end and padding."""
        special = torch.tensor(self.tokenizer.all_special_ids, device=input_ids.device)
        return ~torch.isin(input_ids, special)


def check_columns(dataset: Dataset, image_column: str, caption_column: str) -> None:
    """Raise unless the data set is a table with an image column and a caption column.

    Raises:
        TypeError: not a `datasets.Dataset`, or a column of a wrong type.
        ValueError: a column is missing; the message names those that there are.
    """
    require_table(dataset)
    for option, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column not in dataset.column_names:
            near = did_you_mean(column, dataset.column_names)
            raise ValueError(
                f"There is no column {column!r} ({option}).{near} The columns are: {', '.join(dataset.column_names)}."
            )
    image_feature = dataset.features[image_column]
    if not isinstance(image_feature, datasets.Image) or not image_feature.decode:
        raise TypeError(
            f"Column {image_column!r} holds {image_feature}, not images. Cast it first: "
            f"dataset.cast_column({image_column!r}, datasets.Image())."
        )
    caption_feature = dataset.features[caption_column]
    inner = getattr(caption_feature, "feature", caption_feature)
    if isinstance(caption_feature, list):
        inner = caption_feature[0]
    if getattr(inner, "dtype", None) not in ("string", "large_string"):
        raise TypeError(f"Column {caption_column!r} holds {caption_feature}, not strings or lists of strings.")


def check_pair_ids(dataset: Dataset, pair_id_column: str) -> None:
    """Raise a TypeError unless the column holds integers below 2^63 without nulls."""
    feature = dataset.features[pair_id_column]
    # Not `dataset.data`: that has the rows, too, from which the data set was selected.
    column = dataset.with_format("arrow").select_columns([pair_id_column])[:].column(0)
    whole = getattr(feature, "dtype", "").startswith(("int", "uint"))
    if whole and column.null_count == 0 and (len(column) == 0 or pc.max(column).as_py() < 2**63):
        return
    raise TypeError(
        f"Column {pair_id_column!r} must hold integers below 2^63 without nulls, it holds {feature}. Make a number of "
        "each id that is the same in all parts and in data to come (a numbering within a part is not), as "
        "int(hashlib.blake2b(str(id).encode(), digest_size=7).hexdigest(), 16), and one of its own for a row without; "
        "rename the column, or name another with pair_id_column."
    )


def refuse_unknown_pair_ids(parts: Sequence[Dataset], column: str) -> None:
    """Raise a ValueError where no part has the column of pair ids, unless its name is the default one: then no data
    need to have it."""
    known = {name: None for part in parts for name in part.column_names}
    if column not in known and column != ModXTrainingArguments.pair_id_column:
        near = did_you_mean(column, known)
        raise ValueError(
            f"There is no column {column!r} (pair_id_column) in any part.{near} The columns are: {', '.join(known)}."
        )


def check_processor(processing_class: Any) -> None:
    """Raise unless the processor has an image processor and a tokenizer that can pad.

    Raises:
        TypeError: one of the two is missing.
        ValueError: the tokenizer has no padding token.
    """
    missing = [name for name in ("image_processor", "tokenizer") if not hasattr(processing_class, name)]
    if missing:
        raise TypeError(
            f"processing_class must be a processor for images and texts like CLIPProcessor; "
            f"{type(processing_class).__name__} has no {' and no '.join(missing)}."
        )
    if getattr(processing_class.tokenizer, "pad_token", "") is None:
        raise ValueError(
            "The tokenizer has no padding token, and the captions of a batch are not of one length. Set "
            "tokenizer.pad_token to the token that the model was trained with; where there was none, to "
            "tokenizer.eos_token."
        )
