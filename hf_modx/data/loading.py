"""Tables of images with captions or labels, from wherever users have them."""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

from ..nearest import did_you_mean


def load_splits(name: str, config: str | None = None, image_column: str = "image") -> DatasetDict:
    """The splits of a data set on the Hub, of a folder written by `save_to_disk`, of an image folder with metadata, or
    of parquet files. Paths and bytes in the image column, as parquet files hold them, become images."""
    path = Path(name)
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        data = load_from_disk(name)
        data = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    elif path.suffix == ".parquet":
        data = load_dataset("parquet", data_files=name)
    else:
        data = load_dataset(name, config)
    return DatasetDict(
        {
            split: with_images(dataset, image_column) if image_column in dataset.column_names else dataset
            for split, dataset in data.items()
        }
    )


def concatenate_shared(parts: Sequence[Dataset], columns: Sequence[str]) -> Dataset:
    """The rows of all parts, in those of the columns that every part has."""
    shared = [column for column in columns if all(column in part.column_names for part in parts)]
    return concatenate_datasets([part.select_columns(shared) for part in parts])


def at_most(part: Dataset, limit: int | None, seed: int) -> Dataset:
    """All of a part, or so many of its rows at random."""
    if limit is None or limit >= len(part):
        return part
    return part.shuffle(seed=seed).select(range(limit))


def load_table(source: Dataset | str | os.PathLike, split: str, config: str | None = None) -> Dataset:
    """A table from a folder written by `save_to_disk`, a parquet file, an image folder, or the Hub.

    Args:
        source: the table itself, a path, or a name.
        split: of a source that has several; "a+b" puts two together. May be cut, as in "train[:10000]", but not of a
            folder of `save_to_disk`.
        config: of a data set that has several.

    Raises:
        ValueError: the source has no such split.
    """
    if isinstance(source, Dataset):
        return source
    path = Path(source)
    if (path / "dataset_info.json").exists():
        return load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        splits, asked = load_from_disk(str(path)), split.split("+")
        if missing := [name for name in asked if name not in splits]:
            raise ValueError(f"{source} has no split {', '.join(missing)!r}. The splits are: {', '.join(splits)}.")
        return splits[split] if len(asked) == 1 else concatenate_datasets([splits[name] for name in asked])
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split=split)
    return load_dataset(str(source), config, split=split)


def with_images(table: Dataset, column: str) -> Dataset:
    """The table with paths and bytes in a column, as parquet files hold them, as images."""
    if getattr(table.features[column], "decode", False):
        return table
    return table.cast_column(column, datasets.Image())


def require_table(table: Dataset) -> None:
    """Raise a TypeError unless it is a `datasets.Dataset`, not several splits and not streamed."""
    if not isinstance(table, Dataset):
        raise TypeError(
            f"Expected a datasets.Dataset, got {type(table).__name__}. Pass one split, not streamed: "
            "load_dataset(..., split='train')."
        )


def require_columns(table: Dataset, name: str, **columns: str) -> None:
    """Raise a ValueError unless the table has all columns; its name and those of the options stand in the message."""
    for option, column in columns.items():
        if column not in table.column_names:
            near = did_you_mean(column, table.column_names)
            raise ValueError(
                f"{name} has no column {column!r} ({option}).{near} The columns are: {', '.join(table.column_names)}."
            )
