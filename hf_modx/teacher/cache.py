"""The old model's embeddings of every training image and caption: computed once a phase, looked up by row."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import PairCollator, PairDataset, as_captions
from ..distributed import all_gather_rows, on_each_process, on_main_process
from ..embeddings import PairEmbeddings, embedding_width, image_inputs, text_inputs
from ..evaluation.encoding import AllCaptions
from ..training_args import ModXTrainingArguments
from .cache_files import CacheFiles, create, delete, meta_of, refuse_other_disk, usable_meta
from .fingerprint import ROWS_READ_AT_ONCE, cache_identity, digest_of
from .frozen import AdapterOffTeacher, Teacher

MODES = ("auto", "off", "memory", "disk")
MEMORY_LIMIT = 2**30


class CachedTeacher:
    """The old model as a table of its embeddings of one data set of R rows and C captions. Make one with
    `build_teacher_cache`.

    Args:
        image: (R, D), unit-norm rows, fp32 or float64; an array in memory or mapped from a file.
        text: (C, D), likewise: the captions of row 0, then those of row 1, and so on.
        offsets: (R + 1,) int64; the captions of row i are `text[offsets[i] : offsets[i + 1]]`.
        logit_scale, logit_bias: the old model's; see `PairEmbeddings`.
        dtype: in which the old model itself returns embeddings.
        folder: where the arrays lie, if on disk.
    """

    def __init__(
        self,
        image: np.ndarray,
        text: np.ndarray,
        offsets: np.ndarray,
        logit_scale: Tensor,
        dtype: torch.dtype,
        folder: Path | None = None,
        logit_bias: Tensor | None = None,
    ):
        self.image = image
        self.text = text
        self.offsets = offsets
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.dtype = dtype
        self.folder = folder

    def prepare(self, accelerator: Accelerator) -> None:
        """There is nothing to place and nothing to cast."""

    def embed(self, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        """The old model's embeddings of this process's batch, found by `row_id` and `caption_index` (N,); on the
        device of `input_ids`. To read the two waits for the device: ask before the student's forward pass."""
        rows, captions = torch.stack([batch["row_id"], batch["caption_index"]]).cpu().numpy()
        device = batch["input_ids"].device

        def found(array: np.ndarray, places: np.ndarray) -> Tensor:
            return torch.from_numpy(array[places]).to(device, self.dtype)

        return PairEmbeddings(
            found(self.image, rows),
            found(self.text, self.offsets[rows] + captions),
            self.logit_scale.to(device),
            None if self.logit_bias is None else self.logit_bias.to(device),
        )

    def remove(self) -> None:
        """Delete the files, if there are any; all processes call it together. What is mapped stays readable."""
        if self.folder is not None:
            on_main_process(lambda: delete(self.folder))


def cache_obstacle(collator: Any) -> str | None:
    """Why the old model's embeddings cannot be cached with this collator, with the remedy; None if they can."""
    if type(collator) is not PairCollator:
        return (
            f"teacher_cache needs the built-in collator: {type(collator).__name__} may change what the old model sees "
            "from one epoch to the next. Set teacher_cache to 'off', or leave data_collator out."
        )
    if collator.image_augmentation != "none":
        return (
            f"teacher_cache needs images that are the same in every epoch, and image_augmentation is "
            f"{collator.image_augmentation!r}. Set teacher_cache to 'off', or image_augmentation to 'none'."
        )
    return None


def choose_cache(
    mode: str, *, obstacle: str | None = None, rows: int = 0, captions: int = 0, width: int = 0, pairs_seen: int = 0
) -> str:
    """Where the old model's embeddings go in this phase: "off" (computed for every batch), "memory" or "disk".

    A mode other than "auto" is taken as it is. "auto" is "off" where there is an obstacle, and where the phase sees no
    more images and captions than the cache has to embed; otherwise "memory" up to 1 GiB of embeddings, which every
    process holds, and "disk" above. Give the numbers of the whole phase, also when it goes on after an interruption:
    the choice is then the same.

    Args:
        mode: "auto", "off", "memory" or "disk".
        obstacle: what `cache_obstacle` says.
        rows, captions: of the training set, all captions counted.
        width: D of the embeddings.
        pairs_seen: pairs of all steps of the phase, over all processes.

    Raises:
        ValueError: no such mode; or "memory" or "disk" in spite of an obstacle.
    """
    if mode not in MODES:
        raise ValueError(f"teacher_cache must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    if mode in ("memory", "disk") and obstacle is not None:
        raise ValueError(obstacle)
    if mode != "auto":
        return mode
    if obstacle is not None or 2 * pairs_seen <= rows + captions:
        return "off"
    return "memory" if (rows + captions) * width * 4 <= MEMORY_LIMIT else "disk"


def caption_offsets(dataset: PairDataset) -> np.ndarray:
    """(R + 1,) int64: the captions of row i, as `as_captions` lists them, have the numbers `offsets[i]` to
    `offsets[i + 1]`. Reads the captions alone.

    Raises:
        ValueError: rows without a caption; the first five are named.
    """
    column = dataset.caption_column
    batches = dataset.dataset.select_columns([column]).iter(ROWS_READ_AT_ONCE)
    counts = np.array([len(as_captions(value)) for batch in batches for value in batch[column]], dtype=np.int64)
    PairCollator.refuse_missing_captions(np.flatnonzero(counts == 0)[:5].tolist())
    return np.concatenate([[0], counts.cumsum()])


def cache_for_phase(
    teacher: Teacher | AdapterOffTeacher,
    dataset: PairDataset | None,
    collator: Any,
    accelerator: Accelerator,
    args: ModXTrainingArguments,
    pairs_seen: int,
) -> CachedTeacher | None:
    """The old model as a table of its embeddings of a phase, where `args.teacher_cache` wants it and `choose_cache`
    finds that it pays; None: ask the model itself. All processes call it together.

    Args:
        teacher: prepared.
        dataset: the training set; None where `cache_obstacle` has something against the collator.
        collator, accelerator: those of the training.
        args: of the training.
        pairs_seen: see `choose_cache`.

    Raises:
        ValueError, OSError: see `choose_cache` and `build_teacher_cache`.
    """
    numbers = {}
    if dataset is not None:
        numbers = {
            "rows": len(dataset),
            "captions": int(caption_offsets(dataset)[-1]),
            "width": embedding_width(teacher.model),
            "pairs_seen": pairs_seen,
        }
    mode = choose_cache(args.teacher_cache, obstacle=cache_obstacle(collator), **numbers)
    if mode == "off":
        return None
    return build_teacher_cache(
        teacher,
        dataset,
        collator,
        accelerator,
        mode=mode,
        folder=Path(args.output_dir) / "teacher_cache",
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )


def build_teacher_cache(
    teacher: Teacher | AdapterOffTeacher,
    dataset: PairDataset,
    collator: PairCollator,
    accelerator: Accelerator,
    *,
    mode: str,
    folder: Path | str | None = None,
    batch_size: int,
    num_workers: int = 0,
) -> CachedTeacher:
    """Embed all images and ALL captions of a training set with the old model, sharded over processes. All processes
    call it together, and each gets the whole table.

    The same batches are embedded whatever the number of processes and wherever a pass on disk was interrupted, so the
    embeddings are the same to the bit. They differ from the live teacher's by the rounding of other batch shapes.

    Args:
        teacher: prepared; it is not needed any more afterwards.
        dataset: the training set, as the collator gets it.
        collator: that of the training batches.
        accelerator: that of the training.
        mode: "memory": every process holds the table, and it is gone with the process. "disk": it lies in
            `folder/FINGERPRINT`, which all processes must see, and is mapped into memory. A table that is there
            already for the same old model, processor, data and precision is opened, and finished where it is damaged
            or incomplete.
        folder: for "disk".
        batch_size: rows embedded at once; also the captions, but for rows with more than that.
        num_workers: of the data loader, per process.

    Raises:
        ValueError: `cache_obstacle` has something against the collator, the mode is no cache, or rows lack captions.
        OSError: the disk has too little room, or a process does not see the folder.
    """
    obstacle = cache_obstacle(collator)
    if obstacle is not None:
        raise ValueError(obstacle)
    if mode not in ("memory", "disk"):
        raise ValueError(f"A teacher cache is in 'memory' or on 'disk', not {mode!r}.")
    offsets = caption_offsets(dataset)
    embedding = _Embedding(teacher, dataset, collator, accelerator.device, batch_size, num_workers)
    if mode == "memory":
        return _in_memory(embedding, offsets)
    if folder is None:
        raise ValueError("A teacher cache on disk needs a folder.")
    identity = cache_identity(teacher, dataset, collator, accelerator)
    return _on_disk(embedding, offsets, Path(folder), identity)


class _Embedding:
    """The pass of the old model over a data set, in batches of neighbouring rows with all their captions."""

    def __init__(
        self,
        teacher: Teacher | AdapterOffTeacher,
        dataset: PairDataset,
        collator: PairCollator,
        device: torch.device,
        batch_size: int,
        num_workers: int,
    ):
        self.teacher = teacher
        self.dataset = dataset
        self.collate = AllCaptions(collator)
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        starts = range(0, len(dataset), batch_size)
        self.batches = [range(start, min(start + batch_size, len(dataset))) for start in starts]

    def first_row(self) -> PairEmbeddings:
        """To learn width and dtype."""
        return self._embeds(self.collate([self.dataset[0]]))

    def run(self, batches: Sequence[range], write: Callable[[range, Tensor, Tensor], None]) -> None:
        """Embed this process's share of the batches, and `write(rows, images, texts)` each; an error on one process
        is raised on all."""

        def share(rank: int, number: int) -> list:
            start, stop = (len(batches) * k // number for k in (rank, rank + 1))
            for rows, embeds in self._embedded(batches[start:stop], show=rank == 0):
                write(rows, *(_storable(tensor) for tensor in (embeds.image, embeds.text)))
            return []

        on_each_process(share)

    def _embedded(self, batches: Sequence[range], show: bool) -> Iterator[tuple[range, PairEmbeddings]]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # its seed is drawn from the global one otherwise, which dropout uses
        )
        shown = tqdm(loader, desc="Embedding with the old model", leave=False, delay=2, disable=not show)
        for rows, batch in zip(batches, shown, strict=True):
            yield rows, self._embeds(batch)

    def _embeds(self, batch: dict[str, Tensor]) -> PairEmbeddings:
        """(N, D) images and (C, D) captions. The forward pass takes unequal numbers of both: what runs is what the
        live teacher runs."""
        inputs = {**image_inputs(batch), **text_inputs(batch)}
        slices = min(len(batch["pixel_values"]), math.ceil(len(batch["input_ids"]) / self.batch_size))
        columns = [tensor.to(self.device).tensor_split(slices) for tensor in inputs.values()]
        embeds = [self.teacher.embed(dict(zip(inputs, parts, strict=True))) for parts in zip(*columns, strict=True)]
        image = torch.cat([part.image for part in embeds])
        text = torch.cat([part.text for part in embeds])
        return replace(embeds[0], image=image, text=text)


def _storable(embeds: Tensor) -> Tensor:
    """NumPy has no bf16; fp32 holds it exactly."""
    return embeds if embeds.dtype == torch.float64 else embeds.float()


# ---- In memory ----


def _in_memory(embedding: _Embedding, offsets: np.ndarray) -> CachedTeacher:
    first = embedding.first_row()
    # A process may have no batch of its own, and still takes part in the gathering.
    images, texts = [_storable(first.image[:0])], [_storable(first.text[:0])]

    def keep(rows: range, image: Tensor, text: Tensor) -> None:
        images.append(image)
        texts.append(text)

    embedding.run(embedding.batches, keep)
    image, text = (all_gather_rows(torch.cat(parts)).cpu().numpy() for parts in (images, texts))
    return CachedTeacher(image, text, offsets, first.logit_scale, first.image.dtype, logit_bias=first.logit_bias)


# ---- On disk ----


def _on_disk(embedding: _Embedding, offsets: np.ndarray, folder: Path, identity: dict[str, Any]) -> CachedTeacher:
    location = folder / digest_of(json.dumps(identity, sort_keys=True))
    meta = on_main_process(lambda: usable_meta(location, identity, offsets))
    if meta is None:
        meta = meta_of(embedding.first_row(), identity)
        on_main_process(lambda: create(location, meta, offsets))
        left = embedding.batches
    else:
        table = CacheFiles(location, meta, offsets)

        def damaged(rank: int, number: int) -> list[range]:
            return [rows for rows in embedding.batches[rank::number] if not table.is_whole(rows)]

        left = sorted(on_each_process(damaged), key=lambda rows: rows.start)
    on_each_process(lambda rank, number: refuse_other_disk(location))
    table = CacheFiles(location, meta, offsets)
    embedding.run(left, lambda rows, image, text: table.write(rows, image.cpu().numpy(), text.cpu().numpy()))
    image, text = table.arrays()
    dtype = getattr(torch, meta["dtype"])
    scale, bias = (
        None if meta[name] is None else torch.tensor(meta[name], dtype=dtype) for name in ("logit_scale", "logit_bias")
    )
    return CachedTeacher(image, text, offsets, scale, dtype, location, bias)
