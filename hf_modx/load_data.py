"""Pairs from where users have them."""

from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


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
    return DatasetDict({split: _with_images(dataset, image_column) for split, dataset in data.items()})


def at_most(part: Dataset, limit: int | None, seed: int) -> Dataset:
    """All of a part, or so many of its rows at random."""
    if limit is None or limit >= len(part):
        return part
    return part.shuffle(seed=seed).select(range(limit))


def _with_images(dataset: Dataset, column: str) -> Dataset:
    feature = dataset.features.get(column)
    if feature is None or isinstance(feature, datasets.Image):
        return dataset
    return dataset.cast_column(column, datasets.Image())
