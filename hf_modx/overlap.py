"""Test images that are trained on: a leak that makes recall look better than it is."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import datasets
from datasets import Dataset

from .bad_samples import BadSample


def image_digests(dataset: Dataset, image_column: str) -> list[bytes | None]:
    """A hash of each row's image as it is stored, undecoded; None where there is none. Costs one pass of reading."""
    raw = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return [_digest(example[image_column]) for example in raw]


def leaked_rows(train: Dataset, tests: Mapping[str, Dataset], image_column: str) -> list[BadSample]:
    """The rows of a training part whose image, byte for byte, is also an image of a test.

    Args:
        train: a training part.
        tests: test sets by name.
        image_column: in all of them.
    """
    tested = {digest: name for name, test in tests.items() for digest in image_digests(test, image_column)}
    tested.pop(None, None)
    return [
        BadSample(row, f"the image is also in the test {tested[digest]!r}")
        for row, digest in enumerate(image_digests(train, image_column))
        if digest in tested
    ]


def _digest(stored: dict | None) -> bytes | None:
    if stored is None:
        return None
    content = stored["bytes"]
    if content is None:
        path = Path(stored["path"] or "")
        content = path.read_bytes() if path.is_file() else None
    return None if content is None else hashlib.blake2b(content, digest_size=16).digest()
