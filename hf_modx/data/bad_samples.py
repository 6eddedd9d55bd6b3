"""Finding the rows that cannot be trained on, before any training."""

import io
import os
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from .images import to_rgb
from .pairs import as_captions, check_columns

EXAMPLES_NAMED = 5


@dataclass(frozen=True)
class BadSample:
    """One row that cannot be used.

    Attributes:
        row: its number in the table that was checked.
        problem: what is wrong, in words.
        file: of the image as the data name it, with its folder; "" where they name none.
    """

    row: int
    problem: str
    file: str = ""

    def __str__(self) -> str:
        return f"row {self.row}: {self.problem}"

    def without_folder(self) -> str:
        """The same in words that may leave this machine."""
        return str(self).replace(self.file, os.path.basename(self.file)) if self.file else str(self)


def find_bad_samples(
    dataset: Dataset, image_column: str, caption_column: str, name: str = "", shard: tuple[int, int] = (0, 1)
) -> list[BadSample]:
    """Check every row: the image must decode, and there must be a caption that is not empty.

    Images of any mode, size and number of frames are good (see `to_rgb`); one of more pixels than Pillow decodes, 179
    million, is not. Captions of any length and script are good (the tokenizer cuts them); one of spaces, control and
    format characters alone is an empty one.

    It costs one pass of decoding, which is what one epoch pays for it too.

    Args:
        dataset: the table. image_column, caption_column: its columns.
        name: shown beside the progress bar.
        shard: (index, number): check only the rows whose number leaves this rest.

    Raises:
        ValueError, TypeError: see `check_columns`.
    """
    check_columns(dataset, image_column, caption_column)
    raw = dataset.select_columns([image_column, caption_column])
    raw = raw.cast_column(image_column, datasets.Image(decode=False)).with_format(None)
    index, number = shard
    rows = range(index, len(raw), number)
    bad = []
    for row in tqdm(rows, desc=f"Checking {name}", leave=False, delay=2, disable=index > 0):
        example = raw[row]
        problem = _caption_problem(example[caption_column]) or _image_problem(example[image_column])
        if problem:
            bad.append(BadSample(row, problem, (example[image_column] or {}).get("path") or ""))
    return bad


def drop_bad_samples(dataset: Dataset, bad: list[BadSample], policy: str, name: str) -> Dataset:
    """The rows that are left.

    Args:
        policy: "skip" leaves the bad rows out; "error" refuses them.
        name: of the part, for the message.

    Raises:
        ValueError: there are bad rows and the policy is "error", or no row is left.
    """
    if not bad:
        return dataset
    shown = "; ".join(map(str, bad[:EXAMPLES_NAMED])) + (" ..." if len(bad) > EXAMPLES_NAMED else "")
    if policy == "error":
        raise ValueError(
            f"{len(bad)} of {len(dataset)} rows of {name} cannot be used: {shown}. Mend them, or leave them out with "
            "bad_samples='skip'."
        )
    bad_rows = {sample.row for sample in bad}
    if len(bad_rows) == len(dataset):
        raise ValueError(f"No row of {name} can be used: {shown}.")
    return dataset.select([row for row in range(len(dataset)) if row not in bad_rows])


def _caption_problem(value: Any) -> str | None:
    if value is None:
        return "the caption is null"
    return None if as_captions(value) else "the caption is empty"


def _image_problem(stored: dict[str, Any] | None) -> str | None:
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        return "the image is null"
    where = f" ({stored['path']})" if stored.get("path") else ""
    if stored["bytes"] is None and "://" in stored["path"]:
        return f"the image{where} is an address and no file: fetch the images first"
    try:
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as image:
            to_rgb(image)
    except UnidentifiedImageError:
        return f"the image{where} cannot be decoded: it has no known image format"
    except Exception as error:  # Pillow raises nearly anything on a broken file, TypeError and struct.error included
        return f"the image{where} cannot be decoded: {error}"
    return None
