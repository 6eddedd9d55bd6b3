"""The files of a teacher cache: written by several processes, found whole or damaged by whoever opens them."""

import math
import shutil
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..embeddings import PairEmbeddings
from ..files import read_json, write_json


class CacheFiles:
    """Three files that all processes share: `image` and `text`, rows of D numbers, and `checksum`, one number for each
    row of the data set, written after its embeddings. A row is whole if its checksum fits, whatever has happened
    between."""

    def __init__(self, folder: Path, meta: dict[str, Any], offsets: np.ndarray):
        self.folder = folder
        self.offsets = offsets
        dtype = np.float64 if meta["dtype"] == "float64" else np.float32
        self.layout = {
            "image": (np.dtype(dtype), (len(offsets) - 1, meta["width"])),
            "text": (np.dtype(dtype), (int(offsets[-1]), meta["width"])),
            "checksum": (np.dtype(np.uint32), (len(offsets) - 1, 1)),
        }

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in self.layout.items()}

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(R, D) images and (C, D) captions, mapped into memory, read-only."""
        return self._array("image"), self._array("text")

    def write(self, rows: range, image: np.ndarray, text: np.ndarray) -> None:
        """Ordinary writes, not through a map: neighbours on one page belong to other processes, perhaps on another
        machine."""
        self._write("image", rows.start, image)
        self._write("text", self.offsets[rows.start], text)
        self._write("checksum", rows.start, self._checksums(rows, image, text))

    def is_whole(self, rows: range) -> bool:
        """Whether the checksums of these rows fit."""
        image, text = self.arrays()
        first, last = self.offsets[rows.start], self.offsets[rows.stop]
        found = self._checksums(rows, image[rows.start : rows.stop], text[first:last])
        return np.array_equal(found, self._array("checksum")[rows.start : rows.stop])

    def _checksums(self, rows: range, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        starts = self.offsets[rows.start : rows.stop + 1] - self.offsets[rows.start]
        sums = [
            zlib.crc32(text[start:stop], zlib.crc32(image[row])) for row, (start, stop) in enumerate(pairwise(starts))
        ]
        return np.array(sums, dtype=np.uint32)[:, None]

    def _array(self, name: str) -> np.ndarray:
        dtype, shape = self.layout[name]
        return np.asarray(np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape))

    def _write(self, name: str, row: int, values: np.ndarray) -> None:
        dtype, (_, width) = self.layout[name]
        with open(self.folder / name, "r+b") as file:
            file.seek(int(row) * width * dtype.itemsize)
            file.write(values.tobytes())


def meta_of(first: PairEmbeddings, identity: dict[str, Any]) -> dict[str, Any]:
    """What meta.json says of a cache, given the embeddings of some row."""
    return {
        "identity": identity,
        "width": first.image.shape[1],
        "dtype": str(first.image.dtype).removeprefix("torch."),
        "logit_scale": first.logit_scale.item(),
        "logit_bias": None if first.logit_bias is None else first.logit_bias.item(),
    }


def usable_meta(location: Path, identity: dict[str, Any], offsets: np.ndarray) -> dict[str, Any] | None:
    """What meta.json says, if it is whole and the files beside it have their sizes."""
    try:
        meta = read_json(location / "meta.json")
    except ValueError:
        return None
    if meta is None or meta.get("identity") != identity:
        return None
    sizes = CacheFiles(location, meta, offsets).sizes()
    found = {name: (location / name).stat().st_size for name in sizes if (location / name).exists()}
    return meta if found == sizes else None


def create(location: Path, meta: dict[str, Any], offsets: np.ndarray) -> None:
    """Empty files of full size; meta.json last."""
    delete(location)
    location.mkdir(parents=True)
    sizes = CacheFiles(location, meta, offsets).sizes()
    needed, free = sum(sizes.values()), shutil.disk_usage(location).free
    if needed > free:
        delete(location)
        raise OSError(
            f"The teacher cache needs {needed / 2**30:.2f} GiB in {location.parent}, where {free / 2**30:.2f} GiB are "
            "free. Make room, or set teacher_cache to 'off'."
        )
    for name, size in sizes.items():
        with open(location / name, "wb") as file:
            file.truncate(size)
    write_json(location / "meta.json", meta)


def refuse_other_disk(location: Path) -> list:
    """Raise an OSError where this process does not see the cache; nothing to gather otherwise."""
    if not (location / "meta.json").exists():
        raise OSError(
            f"A process does not see {location}, which another has made: the processes share no disk there. Set "
            "teacher_cache to 'memory' or 'off', or give a folder that all of them see."
        )
    return []


def delete(location: Path) -> None:
    """The cache, and the folder of caches if it was the last one."""
    shutil.rmtree(location, ignore_errors=True)
    if location.parent.exists() and not any(location.parent.iterdir()):
        location.parent.rmdir()
