"""Images a second from the disk to pixel values: JPEG files that are decoded and resized in every epoch against the
image cache, with and without worker processes.

    OMP_NUM_THREADS=1 python examples/benchmarks/input_pipeline.py
    python examples/benchmarks/input_pipeline.py --images 16 --size 64x48 --image_size 32 --workers 0 --repeats 1

Prints images/s of whole passes through the DataLoader that `ModXTrainer` uses (median of runs side by side, workers
started before) and how many times that of JPEG files with the first number of workers; then what the cache costs once.
With workers that have cores of their own, training reaches the smaller of these images/s and the model's own.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Value
from measure import markdown_table, median_seconds
from PIL import Image
from torch.utils.data import DataLoader

from hf_modx.data import PairCollator, PairDataset
from hf_modx.data.image_cache import cache_resized_images
from hf_modx.demo.small_clip import demo_processor

FILES, CACHE = "JPEG files", "image cache"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", default="640x480", help="width x height of the JPEG files")
    parser.add_argument("--image_size", type=int, default=224, help="pixels a side that the model takes")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", default="0,1,2", help="numbers of workers, comma-separated")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is shown")
    options = parser.parse_args(argv)
    workers = [int(number) for number in options.workers.split(",")]
    width, height = map(int, options.size.split("x"))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        processor = demo_processor(["a photograph"], image_size=options.image_size)
        sources = {FILES: jpeg_files(Path(folder), options.images, width, height)}
        start = time.perf_counter()
        sources[CACHE] = cache_resized_images(sources[FILES], "image", processor, Path(folder) / "cache")
        seconds_to_write = time.perf_counter() - start
        loaders = {
            (name, number): loader(source, processor, options.batch_size, number)
            for name, source in sources.items()
            for number in workers
        }
        seconds = median_seconds(
            {key: lambda loader=loader: sum(1 for _ in loader) for key, loader in loaders.items()}, options.repeats
        )
        rates = {key: options.images / value for key, value in seconds.items()}
        print(f"{options.images} images of {width} x {height} to {options.image_size} x {options.image_size}\n")
        print(table(rates, workers))
        print(
            f"\nThe cache: written at {options.images / seconds_to_write:.0f} images/s, "
            f"{size_on_disk(folder, 'cache/**/*.arrow') / options.images / 1024:.0f} KiB an image (JPEG: "
            f"{size_on_disk(folder, '*.jpg') / options.images / 1024:.0f}); pixel values "
            f"{'the same to the last bit' if same_pixels(*sources.values(), processor) else 'DIFFERENT'}"
        )


def jpeg_files(folder: Path, number: int, width: int, height: int) -> Dataset:
    """Random soft shapes with some grain, which compress about as photographs do."""
    random = np.random.default_rng(0)
    paths = [folder / f"{index}.jpg" for index in range(number)]
    for path in paths:
        shapes = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        grain = random.integers(-8, 9, (height, width, 3))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    columns = {"image": [str(path) for path in paths], "caption": ["a photograph"] * number}
    return Dataset.from_dict(columns, features=Features({"image": datasets.Image(), "caption": Value("string")}))


def loader(source: Dataset, processor: Any, batch_size: int, workers: int) -> DataLoader:
    return DataLoader(
        PairDataset(source, "image", "caption", "pair_id"),
        batch_size=batch_size,
        collate_fn=PairCollator(processor),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def table(rates: dict[tuple[str, int], float], workers: list[int]) -> str:
    slowest = rates[FILES, workers[0]]
    rows = [
        [str(number), *(text for name in (FILES, CACHE) for text in _rate(rates[name, number], slowest))]
        for number in workers
    ]
    return markdown_table(["workers", f"{FILES}, images/s", "times", f"{CACHE}, images/s", "times"], rows)


def _rate(rate: float, slowest: float) -> tuple[str, str]:
    return f"{rate:.0f}", f"{rate / slowest:.1f}"


def size_on_disk(folder: str, pattern: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob(pattern))


def same_pixels(first: Dataset, second: Dataset, processor: Any) -> bool:
    batches = zip(*(loader(source, processor, 64, 0) for source in (first, second)), strict=True)
    return all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in batches)


if __name__ == "__main__":
    main()
