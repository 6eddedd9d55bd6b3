"""Test images that are trained on: a leak that makes recall look better than it is."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
from datasets import Dataset

from .bad_samples import BadSample


def image_digests(dataset: Dataset, image_column: str) -> list[bytes | None]:
    """A hash of each row's image as it is stored, undecoded; None where there is none. Costs one pass of reading."""
    raw = dataset.with_format(None).select_columns([image_column])
    raw = raw.cast_column(image_column, datasets.Image(decode=False))
    return [_digest(example[image_column]) for example in raw]


def shared_rows(digests: Iterable[bytes | None], others: Mapping[bytes | None, str]) -> list[BadSample]:
    """The rows whose image, byte for byte, is also in another part.

    Args:
        digests: of the rows, from `image_digests`.
        others: digest -> name of the part that holds it.
    """
    return [
        BadSample(row, f"the image is also in {others[digest]}")
        for row, digest in enumerate(digests)
        if digest is not None and digest in others
    ]


def _digest(stored: dict | None) -> bytes | None:
    if stored is None:
        return None
    content = stored["bytes"]
    if content is None:
        path = Path(stored["path"] or "")
        content = path.read_bytes() if path.is_file() else None
    return None if content is None else image_digest(content)


def image_digest(content: bytes) -> bytes:
    """A hash of an image's bytes as they are stored."""
    return hashlib.blake2b(content, digest_size=16).digest()
