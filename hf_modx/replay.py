"""The replay memory: some of the pairs seen so far, which later phases see again."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from torch import Tensor, nn

from .data import PairCollator, PairDataset
from .distributed import on_each_process, on_main_process
from .embeddings import embed_images, embed_texts, image_inputs, text_inputs
from .evaluation.encoding import AllCaptions
from .files import publish_folder, read_json, write_json

PHASE = "learned_in_phase"
IMAGE_EMBEDDING, TEXT_EMBEDDINGS = "image_embedding", "text_embeddings"
EMBEDDING_FEATURES = {IMAGE_EMBEDDING: List(Value("float32")), TEXT_EMBEDDINGS: List(List(Value("float32")))}
Embed = Callable[[int, Dataset], tuple[list, list]]
RESERVOIR = 1  # sets the draws of the memory apart from other draws by (seed, number)


@dataclass(frozen=True)
class Replay:
    """What a loss callback wants replayed.

    Attributes:
        memory_size: pairs that the memory holds. A whole number is a fixed size: a uniform sample of all pairs seen so
            far (reservoir sampling). A fraction in (0, 1] is that share of every phase, and the memory grows.
        batch_share: share of every contrastive batch that comes from the memory, in (0, 1).
        stores_embeddings: keep with each pair how the model embedded it when it entered the memory.

    Raises:
        ValueError: a value out of its range.
    """

    memory_size: int | float = 0.05
    batch_share: float = 0.25
    stores_embeddings: bool = False

    def __post_init__(self):
        whole = isinstance(self.memory_size, int)
        if not (self.memory_size >= 1 if whole else 0 < self.memory_size <= 1):
            raise ValueError(
                "memory_size must be a number of pairs (1, 2, ...) or a share of all pairs in (0, 1], got "
                f"{self.memory_size!r}."
            )
        if not 0 < self.batch_share < 1:
            raise ValueError(f"batch_share must be in (0, 1), got {self.batch_share}.")


def choose(
    memory_size: int | float, kept: int, seen: int, new: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs the memory holds after `new` more have gone by.

    With a fixed size every pair seen so far is in it with the same probability, `memory_size / (seen + new)`, and
    every set of that size equally likely (algorithm R: Vitter, "Random Sampling with a Reservoir", 1985).

    Args:
        memory_size: as in `Replay`.
        kept: pairs in the memory so far.
        seen: pairs that have gone by so far.

    Returns:
        Places of those of the `kept` that stay, and of those of the `new` that enter; both in ascending order.
    """
    if isinstance(memory_size, float):
        return np.arange(kept), np.sort(generator.permutation(new)[: max(1, round(memory_size * new))])
    filled = min(memory_size - kept, new)
    slots = np.arange(kept + filled)
    # The n-th pair of all takes a random one of n places; the memory has the first of them.
    numbers = np.arange(filled, new)
    places = generator.integers(0, seen + numbers + 1)
    for number, place in zip(numbers[places < memory_size], places[places < memory_size], strict=True):
        slots[place] = kept + number
    slots.sort()
    return slots[slots < kept], slots[slots >= kept] - kept


class ReplayMemory:
    """The memory of a run on disk: `folder/phase-K` is a `datasets` table of what is kept of all pairs up to phase K.

    A table is made from the one before it and the pairs of phase K, once, and is a pure function of these and the
    seed: where making it was interrupted, it is made again. Images lie in it as they were stored. Beside image,
    caption and pair id it has `learned_in_phase`, and with stored embeddings `image_embedding` (D) and
    `text_embeddings` (captions, D), fp32.

    Args:
        folder: of all the tables.
        replay: see there.
        columns: of the pairs that are kept, as far as the data have them.
        seed: of the draws.
    """

    def __init__(self, folder: Path, replay: Replay, columns: Sequence[str], seed: int):
        self.folder = folder
        self.replay = replay
        self.columns = list(columns)
        self.seed = seed

    def after(self, number: int, parts: Sequence[Dataset | None], embed: Embed) -> Dataset | None:
        """The table after phase `number`, made where it is not there; None where nothing is kept yet. All processes
        call it together.

        Args:
            parts: the pairs of the phases 0 to `number` at least; None of a phase 0 that is not known.
            embed: where embeddings are stored: number of a phase and rows that enter after it -> their embeddings
                under the model of then, as `embed_rows` returns them.
        """
        if number < 0 or parts[number] is None:
            return None
        found = self.find(number)
        if found is None:
            self.after(number - 1, parts, embed)
            found = self.extend(number, parts[number], embed)
        return found

    def find(self, number: int) -> Dataset | None:
        """The table after phase `number`; None where it is not made yet. All processes ask together."""
        place = self._place(number)
        return load_from_disk(str(place)) if on_main_process(place.exists) else None

    def extend(self, number: int, part: Dataset, embed: Embed | None = None) -> Dataset:
        """Make the table after phase `number` from the one before it, if there is one, and the pairs of the phase."""
        before = self.find(number - 1)
        seen = 0 if before is None else read_json(self._place(number - 1) / "memory.json")["pairs_seen"]
        known = part.column_names if before is None else set(part.column_names) & set(before.column_names)
        columns = [column for column in self.columns if column in known]
        kept = 0 if before is None else len(before)
        generator = np.random.default_rng([self.seed, number, RESERVOIR])
        staying, entering = choose(self.replay.memory_size, kept, seen, len(part), generator)
        new = part.with_format(None).select_columns(columns).select(entering)
        stored = {PHASE: [number] * len(new)}
        if self.replay.stores_embeddings:
            stored[IMAGE_EMBEDDING], stored[TEXT_EMBEDDINGS] = embed(number, new)
        old = None if before is None else before.select(staying).select_columns([*columns, *stored])
        on_main_process(lambda: self._write(number, old, new, stored, seen + len(part)))
        return self.find(number)

    def _place(self, number: int) -> Path:
        return self.folder / f"phase-{number}"

    def _write(self, number: int, old: Dataset | None, new: Dataset, stored: dict[str, list], seen: int) -> None:
        """All of it under a temporary name, then the table under its own in one step."""
        scratch = self.folder / f".phase-{number}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        features = {PHASE: Value("int64"), **EMBEDDING_FEATURES}
        beside = Dataset.from_dict(stored, features=Features({name: features[name] for name in stored}))
        new = concatenate_datasets([new.flatten_indices(cache_file_name=str(scratch / "new.arrow")), beside], axis=1)
        table = scratch / "table"
        (new if old is None else concatenate_datasets([old, new])).save_to_disk(str(table))
        write_json(table / "memory.json", {"pairs_seen": seen})
        publish_folder(table, self._place(number))
        shutil.rmtree(scratch)


@torch.no_grad()
def embed_rows(
    model: nn.Module, rows: PairDataset, collator: PairCollator, *, batch_size: int, device: torch.device
) -> tuple[list, list]:
    """Embed all images and ALL captions of some rows, in fp32 and eval mode, shared by all processes.

    The same batches are embedded whatever the number of processes.

    Returns:
        For each row its unit-norm image embedding (D), and those of its captions (captions, D).
    """
    model.to(device).eval()
    collate = AllCaptions(collator)
    starts = range(0, len(rows), batch_size)

    def share(rank: int, number: int) -> list[tuple[int, list, list]]:
        return [(start, *_embed_slice(model, rows, collate, start, batch_size)) for start in starts[rank::number]]

    slices = sorted(on_each_process(share), key=lambda found: found[0])
    return [row for _, images, _ in slices for row in images], [row for _, _, texts in slices for row in texts]


def _embed_slice(
    model: nn.Module, rows: PairDataset, collate: AllCaptions, start: int, batch_size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    batch = collate(rows.__getitems__(list(range(start, min(start + batch_size, len(rows))))))
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    images = embed_images(model, **image_inputs(batch))
    texts = embed_texts(model, **text_inputs(batch))
    counts = torch.bincount(batch["text_rows"] - start).tolist()
    return list(images.float().cpu().numpy()), [part.numpy() for part in texts.float().cpu().split(counts)]


def replayed_rows(
    row_ids: Tensor, caption_index: Tensor | None, new_rows: int | None, stored: "StoredEmbeddings | None"
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Which rows of a global batch come from the memory, (N,) bool, and the embeddings stored with them.

    Args:
        row_ids: (N,), those of the memory from `new_rows` on; None: there is no memory.
        caption_index: (N,), the caption of each row.
        stored: with the memory; None: nothing.
    """
    if new_rows is None:
        return torch.zeros_like(row_ids, dtype=torch.bool), None
    is_replay = row_ids >= new_rows
    if stored is None or not is_replay.any():
        return is_replay, None
    return is_replay, stored.look_up(row_ids[is_replay] - new_rows, caption_index[is_replay])


class StoredEmbeddings:
    """The embeddings of a memory of M pairs, found by row and caption.

    Raises:
        ValueError: the memory holds none.
    """

    def __init__(self, memory: Dataset):
        missing = [name for name in EMBEDDING_FEATURES if name not in memory.column_names]
        if missing:
            raise ValueError(f"The memory has no column {' and no '.join(missing)}: it was made without embeddings.")
        table: pa.Table = memory.select_columns(list(EMBEDDING_FEATURES)).with_format("arrow")[:]
        images, texts = (table.column(name).combine_chunks() for name in EMBEDDING_FEATURES)
        self.image = images.flatten().to_numpy().reshape(len(memory), -1)
        self.text = texts.flatten().flatten().to_numpy().reshape(-1, self.image.shape[1])
        self.offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(texts).to_numpy())])

    def look_up(self, rows: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D) image and text embeddings, fp32, of R rows of the memory and, of each, one of its captions."""
        places, numbers = rows.cpu().numpy(), captions.cpu().numpy()
        found = self.image[places], self.text[self.offsets[places] + numbers]
        image, text = (torch.from_numpy(embeds).to(rows.device) for embeds in found)
        return image, text
