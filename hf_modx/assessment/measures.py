"""What a frozen model says to new data, and how these differ from the old ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data import PairCollator, PairDataset, as_captions
from ..data.bad_samples import drop_bad_samples, find_bad_samples
from ..data.loading import at_most
from ..data.overlap import image_digests, shared_rows
from ..data.pair_groups import Arrangement
from ..data.sampling import GlobalBatches
from ..evaluation import EncodedPairs, Encoder, encode_pairs, linear_probe_accuracy, retrieval_metrics
from ..losses.affinity import rows_ranked_first
from ..phases import Phase

SAMPLE = 2048
"""Rows of a part that are decoded and embedded."""
REPLAY_SHARE = 0.25
"""Of a batch; what `ExperienceReplay` and the recipe modx_plus take by default."""
BATCHES = 8
"""In which the kept rows are counted, at least."""


@dataclass(frozen=True)
class Duplicates:
    """Rows of a training part that share something with a row of another pair id; without ids, with any other row.

    Attributes:
        captions: rows that share a caption, letter by letter.
        images: rows that share an image, byte by byte.
    """

    captions: int
    images: int


@dataclass(frozen=True)
class Shift:
    """How new pairs differ from old ones to the model. Of embeddings of as many pairs of both.

    Attributes:
        image_distance, text_distance: Euclidean distance between the means of unit-norm embeddings, in [0, 2].
        image_classifier, text_classifier: accuracy of a linear classifier that tells the two apart, on pairs that it
            has not seen: 0.5 where they cannot be told apart (a proxy of the A-distance: Ben-David et al., "A theory
            of learning from different domains", 2010).
        recall_gap: recall@1 on old less that on new tests, mean of both directions, in galleries of one size.
        shared_images: rows of the new training part whose image is also among the old ones.
    """

    image_distance: float
    text_distance: float
    image_classifier: float
    text_classifier: float
    recall_gap: float
    shared_images: int


@dataclass(frozen=True)
class Assessment:
    """What `assess` has found.

    Attributes:
        phase: its name.
        pairs: to learn.
        batch_size: the contrastive batch that is planned.
        zero_shot: the retrieval metrics of the frozen model on the test, or on training pairs where there is none.
        tested_pairs: the size of that gallery.
        kept: contrastive batch -> share of rows that Mod-X would keep with the frozen model as teacher, in [0, 1].
        kept_with_replay: the same at the planned batch with `REPLAY_SHARE` of it from old pairs; None without.
        old_pairs: that there are for replay.
        duplicates: in the training part.
        bad_share: share of rows that cannot be used, of those looked at.
        shift: from the old data; None without.
        mask_duplicates: rows of one caption are planned to belong together.
    """

    phase: str
    pairs: int
    batch_size: int
    zero_shot: dict[str, float]
    tested_pairs: int
    kept: dict[int, float]
    kept_with_replay: float | None
    old_pairs: int
    duplicates: Duplicates
    bad_share: float
    shift: Shift | None
    mask_duplicates: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def assess(
    encoder: Encoder,
    new: Phase,
    old: Phase | None = None,
    *,
    batch_size: int,
    columns: tuple[str, str, str] = ("image", "caption", "pair_id"),
    positives: bool = True,
    mask_duplicates: bool = False,
    pairs_in_batch: str = "any",
    sample: int = SAMPLE,
    seed: int = 0,
) -> Assessment:
    """Look at a phase with the model that is to learn it. Nothing is trained; images are not augmented.

    Args:
        encoder: the model, in eval mode.
        new: the phase; without a test, its recall is measured on training pairs.
        old: what the model has learned, or part of it.
        batch_size: the contrastive batch planned; kept rows are counted at a quarter and four times of it, too.
        columns: of images, captions and pair ids.
        positives: see `same_pair_id` in the training arguments.
        mask_duplicates, pairs_in_batch: as there.
        sample: at most so many rows of each part are decoded and embedded, at random.
        seed: of samples and batches.

    Raises:
        TypeError, ValueError: columns that are missing or of another type, a batch or a sample below 2, no row that
            can be used, or nothing that says what `pairs_in_batch` is about.
    """
    if sample < 2:
        raise ValueError(f"A sample of {sample} rows shows nothing: look at 2 at least.")
    if batch_size < 2:
        raise ValueError(f"A contrastive batch of {batch_size} has no negatives: plan 2 at least.")

    def arrangement(table: Dataset) -> Arrangement | None:
        captions = columns[1] if mask_duplicates else None
        return Arrangement(pairs_in_batch, table, columns[2], captions) if pairs_in_batch != "any" else None

    if old is not None and old.name == new.name:
        old = replace(old, name=f"{old.name} (old)")
    parts = _Parts(encoder, columns, sample, seed)
    whole_groups = arrangement(new.train) if pairs_in_batch == "together" else None
    train = parts.embedded(new.train, new.name, whole_groups)
    test = train if new.test is None else parts.embedded(new.test, f"{new.name} (test)")
    old_train = old_test = None
    if old is not None:
        old_train = parts.embedded(old.train, old.name)
        old_test = old_train if old.test is None else parts.embedded(old.test, f"{old.name} (test)")
        if not all(columns[2] in part.column_names for part in (new.train, old.train)):
            old_train = _with_other_ids(old_train)
    caption_ids = parts.caption_ids(new.name) if mask_duplicates else None
    counted = {"positives": positives, "arrange": arrangement(parts.usable[new.name]), "seed": seed}
    kept_with_replay = None
    if old_train is not None:
        both = torch.cat([caption_ids, parts.caption_ids(old.name)]) if mask_duplicates else None
        kept_with_replay = rows_kept(train, batch_size, old=old_train, caption_ids=both, **counted)
    sizes = sorted({max(2, batch_size // 4), batch_size, 4 * batch_size})
    return Assessment(
        phase=new.name,
        pairs=len(new.train),
        batch_size=batch_size,
        zero_shot=_recall(test),
        tested_pairs=len(test.image),
        kept={
            size: rows_kept(train, size, caption_ids=caption_ids, **counted)
            for size in sizes
            if size <= len(train.image) or size == batch_size
        },
        kept_with_replay=kept_with_replay,
        old_pairs=len(old.train) if old is not None else 0,
        duplicates=_duplicates(new.train, *columns),
        bad_share=parts.bad[new.name],
        shift=None if old is None else _shift(train, old_train, test, old_test, _shared_images(new, old, columns[0])),
        mask_duplicates=mask_duplicates,
    )


def rows_kept(
    pairs: EncodedPairs,
    batch_size: int,
    *,
    old: EncodedPairs | None = None,
    positives: bool = True,
    caption_ids: Tensor | None = None,
    arrange: Callable[[np.ndarray, Sequence[int]], np.ndarray] | None = None,
    seed: int = 0,
) -> float:
    """Share of image and text rows that Mod-X's screening keeps in random batches, in [0, 1]: those whose own partner,
    or a positive, the model that embedded the pairs ranks first. It falls with the batch, which has more candidates.

    Args:
        pairs: of which a row draws one of its captions.
        batch_size: of a contrastive batch; that of all pairs where there are fewer.
        old: pairs that take `REPLAY_SHARE` of every batch; None: new ones alone.
        positives: rows of one id are positives of each other; False: no candidates.
        caption_ids: (C,) of the captions, those of the old pairs at the end: equal ones make rows belong together as
            one id does. None: they do not.
        arrange: see `GlobalBatches`.
        seed: of batches and captions.
    """
    parts = [pairs] if old is None else [pairs, old]
    images, texts, ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("image", "text", "image_ids")
    )
    kept = []
    for number, rows in enumerate(_batches(len(pairs.image), len(images), batch_size, seed, arrange)):
        generator = np.random.default_rng([seed, number])
        places = _drawn(pairs, rows[rows < len(pairs.image)], generator)
        if old is not None:
            replayed = rows[rows >= len(pairs.image)] - len(pairs.image)
            places = torch.cat([places, len(pairs.text) + _drawn(old, replayed, generator)])
        together = ids[rows] if caption_ids is None else torch.stack([ids[rows], caption_ids[places]], dim=1)
        first = rows_ranked_first(images[rows], texts[places], pair_ids=together, positives=positives)
        kept.append(first.double().mean().item())
    return float(np.mean(kept))


def _batches(new: int, rows: int, batch_size: int, seed: int, arrange: Callable | None) -> Iterator[np.ndarray]:
    """Rows of the batches that training would see; the new ones come first in each."""
    number = 0
    for epoch in range(BATCHES):
        sampler = GlobalBatches(
            new,
            min(batch_size, new),
            seed=seed,
            current_epoch=lambda epoch=epoch: epoch,
            drop_last=True,
            memory_rows=rows - new,
            memory_share=REPLAY_SHARE if rows > new else 0.0,
            arrange=arrange,
        )
        for batch in sampler:
            yield np.array(batch) % rows
            number += 1
        if number >= BATCHES:
            return


def _drawn(pairs: EncodedPairs, rows: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Of each of these rows the place of one of its captions."""
    first = pairs.first_captions().cpu().numpy()
    number = np.diff(np.append(first, len(pairs.text)))
    return torch.from_numpy(first[rows] + generator.integers(number[rows]))


class _Parts:
    """Samples of tables, embedded; remembers which rows can be used, and the share of those that cannot."""

    def __init__(self, encoder: Encoder, columns: tuple[str, str, str], sample: int, seed: int):
        self.encoder, self.columns, self.sample, self.seed = encoder, columns, sample, seed
        self.bad: dict[str, float] = {}
        self.usable: dict[str, Dataset] = {}

    def embedded(self, table: Dataset, name: str, whole_groups: Arrangement | None = None) -> EncodedPairs:
        if whole_groups is not None and self.sample < len(table):  # at random, and each with all of its rows
            rows = np.random.default_rng(self.seed).permutation(len(table))
            table = table.select(whole_groups(rows, [len(rows)])[: self.sample])
        table = at_most(table, self.sample, self.seed)
        bad = find_bad_samples(table, *self.columns[:2], name)
        self.bad[name] = len(bad) / len(table)
        self.usable[name] = drop_bad_samples(table, bad, "skip", name)
        usable = PairDataset(self.usable[name], *self.columns)
        encoder = self.encoder
        settings = {"batch_size": encoder.batch_size, "num_workers": encoder.num_workers, "device": encoder.device}
        return encode_pairs(encoder.dual_encoder, usable, encoder.collator, **settings)

    def caption_ids(self, name: str) -> Tensor:
        """(C,) in the order of the embedded captions."""
        captions = (caption for value in self.usable[name][self.columns[1]] for caption in as_captions(value))
        return torch.tensor([PairCollator.caption_id(caption) for caption in captions], device=self.encoder.device)


def _with_other_ids(pairs: EncodedPairs) -> EncodedPairs:
    """The numbers of its rows, as a run gives them where one of the tables has no ids; none that both could share."""
    rows = torch.arange(len(pairs.image), device=pairs.image_ids.device)
    return EncodedPairs(pairs.image, pairs.text, -1 - rows, -1 - pairs.text_rows, pairs.text_rows)


def _recall(pairs: EncodedPairs) -> dict[str, float]:
    return retrieval_metrics(pairs.image, pairs.text, pairs.image_ids, pairs.text_ids, sharded=True)


def _recall_at_1(pairs: EncodedPairs, rows: int) -> float:
    """Mean of both directions, in a gallery of the first so many rows."""
    texts = pairs.text_rows < rows
    found = retrieval_metrics(
        pairs.image[:rows], pairs.text[texts], pairs.image_ids[:rows], pairs.text_ids[texts], sharded=True
    )
    return (found["image_to_text_recall@1"] + found["text_to_image_recall@1"]) / 2


def _shift(
    new: EncodedPairs, old: EncodedPairs, new_test: EncodedPairs, old_test: EncodedPairs, shared_images: int
) -> Shift:
    rows, tested = (min(len(one.image), len(other.image)) for one, other in ((new, old), (new_test, old_test)))
    sides = [
        [part.image[:rows].float().cpu() for part in (new, old)],
        [part.text[part.first_captions()[:rows]].float().cpu() for part in (new, old)],
    ]
    distances = [(one.mean(dim=0) - other.mean(dim=0)).norm().item() for one, other in sides]
    image_classifier, text_classifier = (_told_apart(one, other) for one, other in sides)
    gap = _recall_at_1(old_test, tested) - _recall_at_1(new_test, tested)
    return Shift(*distances, image_classifier, text_classifier, gap, shared_images)


def _told_apart(one: Tensor, other: Tensor) -> float:
    """Every other row teaches the classifier, the others test it."""
    features = torch.cat([one, other])
    labels = torch.cat([torch.zeros(len(one)), torch.ones(len(other))]).long()
    learned = torch.cat([torch.arange(len(part)) % 2 == 0 for part in (one, other)])
    if len(one) < 2:
        return 0.5
    return linear_probe_accuracy(features[learned], labels[learned], features[~learned], labels[~learned])


def _shared_images(new: Phase, old: Phase, image_column: str) -> int:
    known = dict.fromkeys(image_digests(old.train, image_column), old.name)
    return len(shared_rows(image_digests(new.train, image_column), known))


def _duplicates(table: Dataset, image_column: str, caption_column: str, pair_id_column: str) -> Duplicates:
    table = table.with_format(None)
    ids = table[pair_id_column] if pair_id_column in table.column_names else range(len(table))
    captions = [set(as_captions(value)) for value in table[caption_column]]
    images = [{digest} - {None} for digest in image_digests(table, image_column)]
    return Duplicates(captions=_sharing(captions, ids), images=_sharing(images, ids))


def _sharing(things: Sequence[set], ids: Iterable[int]) -> int:
    """Rows of which something is also in a row of another id."""
    found: dict[Any, set[int]] = {}
    for own, number in zip(things, ids, strict=True):
        for thing in own:
            found.setdefault(thing, set()).add(number)
    return sum(any(len(found[thing]) > 1 for thing in own) for own in things)
