"""What makes two teacher caches the same: the old model, what it reads, and how exactly it computes."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import PairCollator, PairDataset
from ..data.overlap import image_digests
from ..distributed import on_each_process, on_main_process
from .frozen import AdapterOffTeacher, Teacher

ROWS_READ_AT_ONCE = 1024
# A tokenizer remembers how it padded and truncated last, and with what it was saved: no properties of it.
REMEMBERED = ("padding", "truncation", "processor_class")
LAYOUT = 2  # of the files; a cache of another layout is not read


def cache_identity(
    teacher: Teacher | AdapterOffTeacher, dataset: PairDataset, collator: PairCollator, accelerator: Accelerator
) -> dict[str, Any]:
    """Everything that decides the embeddings, as JSON takes it."""

    def of_the_teacher() -> dict[str, Any]:
        return {
            "layout": LAYOUT,
            "weights": _weights_digest(teacher.weights()),
            "config": _config_digest(teacher.model),
            "processor": _processor_digest(collator),
            "mixed_precision": accelerator.mixed_precision,
        }

    return {**on_main_process(of_the_teacher), "data": _data_digest(dataset)}


def digest_of(content: str | bytes) -> str:
    """128 bits in hexadecimal digits."""
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Over names, types and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config_digest(model: nn.Module) -> str:
    """The same weights are another model with another number of heads; where they came from does not count."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return digest_of(json.dumps(config, sort_keys=True, default=str))


def _processor_digest(collator: PairCollator) -> str:
    """What `save_pretrained` writes of image processor and tokenizer."""
    parts = (collator.image_processor, collator.tokenizer)
    contents: list[Any] = [
        collator.max_length,
        collator.padding,
        *(f"{type(part).__module__}.{type(part).__qualname__}" for part in parts),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            content: Any = file.read_text(encoding="utf-8")
            if file.suffix == ".json":
                content = {name: value for name, value in json.loads(content).items() if name not in REMEMBERED}
            contents.append((file.name, content))
    return digest_of(json.dumps(contents, sort_keys=True))


def _data_digest(dataset: PairDataset) -> str:
    """Over every image as it is stored and every caption; costs one pass of reading, shared by all processes."""

    def digests(rank: int, number: int) -> list[tuple[int, str]]:
        starts = range(0, len(dataset), ROWS_READ_AT_ONCE)[rank::number]
        shown = tqdm(starts, desc="Reading the training set", leave=False, delay=2, disable=rank > 0)
        return [(start, _rows_digest(dataset, start)) for start in shown]

    return digest_of(repr((len(dataset), sorted(on_each_process(digests)))))


def _rows_digest(dataset: PairDataset, start: int) -> str:
    stop = min(start + ROWS_READ_AT_ONCE, len(dataset))
    rows = dataset.dataset.select(range(start, stop))
    captions = rows.select_columns([dataset.caption_column])[:][dataset.caption_column]
    decoding = repr(rows.features[dataset.image_column])  # the same bytes in another mode are other images
    return digest_of(repr((image_digests(rows, dataset.image_column), decoding, captions)))
