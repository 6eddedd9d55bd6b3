"""Images decoded and resized once and kept on the disk: training then only rescales and normalises them."""

import hashlib
import io
import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import torch
from datasets import Dataset, Features, concatenate_datasets
from PIL import Image
from transformers import BaseImageProcessor

from .images import to_rgb
from .overlap import image_digests

FORMAT = 1  # counts up when this file, or `to_rgb`, stores other pixels for the same images
TRIED_IMAGES = 4
GIVEN_UP_SECONDS = 3600


def cache_resized_images(
    dataset: Dataset, image_column: str, processing_class: Any, folder: str | Path, num_proc: int | None = None
) -> Dataset:
    """The same data set with every image as the processor resizes and crops it, read from a file in `folder`.

    The first call writes the file, later ones find it. The pixel values that the processor makes of the result are bit
    for bit those of the original images. It is a plain `datasets.Image` column of uncompressed 8-bit RGB (PPM), for
    which decoding is a copy; a row takes 3 x height x width bytes on the disk, 147 KiB at 224 x 224.

    The file belongs to the stored images, in their order, and to the processor's class and settings: other images or
    another processor get a file of their own, other captions do not. Every call reads the stored images once to tell.
    An interrupted call leaves nothing that is used, except the finished parts of `num_proc` processes, with which the
    next call goes on. Several processes that call it at once do not harm each other, but each does the whole work:
    call it inside `with args.main_process_first(local=True)`. Files that are not needed any more stay: delete
    `folder`, or what is in it, when nothing reads from it.

    Args:
        dataset: with any other columns, which stay as they are.
        image_column: a column of `datasets.Image`.
        processing_class: a processor with an image processor, as `CLIPProcessor`.
        folder: made where it does not exist.
        num_proc: processes that decode and resize; None is this one.

    Raises:
        ValueError: an image is null or cannot be decoded; the processor changes an image that it has resized before,
            or makes other than 8-bit values; the file is damaged.
        OSError: the file does not fit on the disk.
    """
    if len(dataset) == 0:
        return dataset
    images = dataset.select_columns([image_column]).with_format(None)
    resize = _Resize(image_column, images.features[image_column], processing_class.image_processor)
    images = images.cast_column(image_column, datasets.Image(decode=False))
    row_bytes = _try_out(resize, images)
    key = _key(images, image_column, resize)
    place = Path(folder) / key
    place.mkdir(parents=True, exist_ok=True)
    _remove_interrupted(place)
    _refuse_damaged(place)
    _refuse_full_disk(place, len(images) * row_bytes)
    resized = images.map(
        resize,
        with_indices=True,
        features=Features({image_column: datasets.Image()}),
        cache_file_name=str(place / "images.arrow"),  # written under a temporary name and renamed when complete
        load_from_cache_file=True,
        new_fingerprint=key,
        writer_batch_size=100,
        num_proc=num_proc,
        desc="Resizing images",
    )
    if len(resized) != len(images):
        raise _damaged(place)
    return _with_column(dataset, image_column, resized)


def holds_resized_images(dataset: Dataset, image_column: str) -> bool:
    """Whether some of the images are such as `cache_resized_images` makes them."""
    raw = dataset.with_format(None).select_columns([image_column])
    stored = (row[image_column] or {} for row in raw.cast_column(image_column, datasets.Image(decode=False)))
    return any((image.get("bytes") or b"").startswith(b"P6") and image["path"] is None for image in stored)


class _Resize:
    """What `Dataset.map` applies to every row: the stored image -> the resized one as PPM."""

    def __init__(self, column: str, feature: datasets.Image, processor: BaseImageProcessor):
        self.column = column
        self.feature = feature
        self.processor = processor

    def __call__(self, example: dict[str, Any], row: int) -> dict[str, Any]:
        return {self.column: {"bytes": self.as_ppm(self.decoded(example, row)), "path": None}}

    def decoded(self, example: dict[str, Any], row: int) -> Image.Image:
        stored = example[self.column]
        if stored is None:
            raise ValueError(f"The image in row {row} is null.")
        try:
            return to_rgb(self.feature.decode_example(stored))
        except Exception as error:  # Pillow raises nearly anything on a broken file
            raise ValueError(f"The image in row {row} cannot be decoded: {error}") from error

    def as_ppm(self, image: Image.Image) -> bytes:
        pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) != 3:
            raise ValueError(
                f"{_described(self.processor)} gives {tuple(pixels.shape)} values of {pixels.dtype} without rescaling "
                "and normalising, not 8-bit RGB: its images cannot be cached. Train without the image cache."
            )
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(file, "PPM")
        return file.getvalue()

    def settings(self) -> dict[str, Any]:
        """All that the stored pixels depend on besides the images."""
        kind = type(self.processor)
        return {
            "format": FORMAT,
            "pillow": PIL.__version__,
            "feature": repr(self.feature),
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "processor": self.processor.to_json_string(),
        }


def _with_column(dataset: Dataset, image_column: str, resized: Dataset) -> Dataset:
    """The data set with another image column."""
    if dataset.column_names == [image_column]:
        return resized
    others = dataset.remove_columns(image_column).with_format(None)
    if others._indices is not None:
        # `concatenate_datasets` would do it for both, which copies all the images.
        others = others.flatten_indices(keep_in_memory=True)
    whole = concatenate_datasets([others, resized], axis=1, split=dataset.split)
    return whole.select_columns(dataset.column_names)


def _try_out(resize: _Resize, images: Dataset) -> int:
    """Raise unless the pixel values of resized images are those of the images themselves, on noise of two shapes and
    the first rows; the largest number of bytes that one of these rows takes."""
    noise = np.random.default_rng(0)
    for height, width in ((480, 640), (53, 37)):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        _refuse_change(resize.processor, image, resize.as_ppm(image))
    sizes = []
    for row in range(min(TRIED_IMAGES, len(images))):
        image = resize.decoded(images[row], row)
        stored = resize.as_ppm(image)
        _refuse_change(resize.processor, image, stored)
        sizes.append(len(stored))
    return max(sizes)


def _refuse_change(processor: BaseImageProcessor, image: Image.Image, stored: bytes) -> None:
    again = to_rgb(Image.open(io.BytesIO(stored)))
    before, after = (processor(x, return_tensors="pt")["pixel_values"] for x in (image, again))
    if not torch.equal(before, after):
        raise ValueError(
            f"{_described(processor)} changes an image that it has resized and cropped before, so the cache would not "
            "give the same pixels. Train without the image cache, or choose a crop_size that is the resized size."
        )


def _described(processor: BaseImageProcessor) -> str:
    settings = {name: getattr(processor, name, None) for name in ("size", "crop_size")}
    return f"{type(processor).__name__} ({', '.join(f'{name} {value}' for name, value in settings.items() if value)})"


def _key(images: Dataset, image_column: str, resize: _Resize) -> str:
    key = hashlib.blake2b(json.dumps(resize.settings(), sort_keys=True).encode(), digest_size=16)
    for row, digest in enumerate(image_digests(images, image_column)):
        if digest is None:
            raise ValueError(f"The image in row {row} is null or its file is not there.")
        key.update(digest)
    return key.hexdigest()


def _remove_interrupted(place: Path) -> None:
    """Delete what a killed process has left; a file that grows belongs to one that is alive."""
    for file in place.glob("tmp*"):
        with suppress(FileNotFoundError):  # finished, or deleted, by another process in this very moment
            if time.time() - file.stat().st_mtime > GIVEN_UP_SECONDS:
                file.unlink()


def _refuse_full_disk(place: Path, needed: int) -> None:
    missing = needed - sum(file.stat().st_size for file in place.glob("*.arrow"))
    free = shutil.disk_usage(place).free
    if missing > free:
        raise OSError(
            f"The resized images take {missing / 1e9:.2f} GB and {place.parent} has {free / 1e9:.2f} GB free. Make "
            "room, name a folder on another disk, or train without the image cache."
        )


def _refuse_damaged(place: Path) -> None:
    for file in place.glob("*.arrow"):
        try:
            Dataset.from_file(str(file))
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged(place) from error


def _damaged(place: Path) -> ValueError:
    return ValueError(f"The cached images in {place} are damaged: delete that folder and start again.")
