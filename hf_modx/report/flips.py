"""Retrievals that are right before and wrong after, and the other way round."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL.Image import Image

from ..data import PairCollator, PairDataset, as_captions
from ..data.images import to_rgb
from ..data.loading import at_most
from ..evaluation import encode_pairs
from ..phases import content_fingerprint
from ..plots import Retrieved
from ..pretrained import load_dual_encoder
from ..run.folder import phase_folder
from .runs import RecordedRun

logger = logging.getLogger(__name__)

MAX_PAIRS = 1000
"""A larger test is looked at in so many rows of it: examples to look through need no more."""

THUMBNAIL = (96, 96)
LONGEST_CAPTION = 200


@dataclass(frozen=True)
class FlippedTest:
    """What has become of a test between two phases.

    Attributes:
        test: its name.
        before, after: numbers of the phases.
        pairs: that were looked at.
        lost, gained: images whose first caption was right before only, and after only.
        examples: some of both.
    """

    test: str
    before: int
    after: int
    pairs: int
    lost: int
    gained: int
    examples: list[Retrieved]


def find_tests(run: RecordedRun, found: Iterable[Dataset]) -> dict[str, Dataset]:
    """Those tests of a run that are among these data sets, as they are or cut with the run's seed to the size that the
    run has recorded. They are told by their content."""
    seed, sizes = run.seed[0], run.results["test_pairs"].values()
    names = {content: name for name, content in run.identity["tests"].items()}
    tests: dict[str, Dataset] = {}
    for dataset in found:
        for size in {len(dataset), *(size for size in sizes if size < len(dataset))}:
            part = at_most(dataset, size, seed)
            if (name := names.get(content_fingerprint(part, _columns(run)))) is not None:
                tests[name] = part
        if len(tests) == len(names):
            break
    return tests


def flipped_tests(
    run: RecordedRun, tests: Mapping[str, Dataset], number: int, batch_size: int = 64
) -> list[FlippedTest]:
    """Compare, for each of these tests, the model after the phase that taught it with the model after the last phase;
    for tests that the last phase or none has taught, the model before the first phase.

    Args:
        run: whose folders `phase-K` are there; tests that need one that is gone are left out, and the log says so.
        tests: by name, as `find_tests` finds them.
        number: of examples a test, of lost and gained images as many as there are of both.
        batch_size: images embedded at once.
    """
    last = len(run.results["phases"])
    spans = {}
    for name, learned_at in zip(run.results["tests"], run.results["learned_at"], strict=True):
        if name in tests and last > 0:
            spans[name] = span_of(learned_at, last)
    tests = {name: _some_rows(dataset) for name, dataset in tests.items() if name in spans}
    first = _first_captions(run, tests, spans, batch_size)
    return [
        _flipped(run, name, dataset, spans[name], [first[phase, name] for phase in spans[name]], number)
        for name, dataset in tests.items()
        if all((phase, name) in first for phase in spans[name])
    ]


def span_of(learned_at: int | str | None, last: int) -> tuple[int, int]:
    """The phases between which a test can be forgotten: from the one that teaches it (else the start) to the last."""
    return (learned_at if isinstance(learned_at, int) and learned_at < last else 0, last)


@dataclass(frozen=True)
class _First:
    """For each image the place of the caption that is found first among all captions, and whether it is right."""

    caption: list[int]
    is_right: list[bool]


def _some_rows(dataset: Dataset) -> Dataset:
    step = -(-len(dataset) // MAX_PAIRS)
    return dataset.select(range(0, len(dataset), step))


def _first_captions(
    run: RecordedRun, tests: Mapping[str, Dataset], spans: Mapping[str, tuple[int, int]], batch_size: int
) -> dict[tuple[int, str], _First]:
    """One model at a time is in memory."""
    first = {}
    for phase in sorted({phase for span in spans.values() for phase in span}):
        folder = phase_folder(run.folder, phase)
        if not folder.exists():
            logger.warning("%s is gone: examples that need it are left out.", folder)
            continue
        device = PartialState().device
        model, processor = load_dual_encoder(str(folder), device)
        collator = PairCollator.for_model(model, processor)
        for name, dataset in tests.items():
            if phase in spans[name]:
                pairs = PairDataset(dataset, *_columns(run))
                encoded = encode_pairs(model, pairs, collator, batch_size=batch_size, device=device)
                best = torch.cat([(part @ encoded.text.T).argmax(dim=1) for part in encoded.image.split(batch_size)])
                is_right = encoded.text_ids[best] == encoded.image_ids
                first[phase, name] = _First(best.tolist(), is_right.tolist())
    return first


def _flipped(
    run: RecordedRun, name: str, dataset: Dataset, span: tuple[int, int], first: Sequence[_First], number: int
) -> FlippedTest:
    before, after = first
    image_column, caption_column, _ = _columns(run)
    captions = [as_captions(value) for value in dataset[caption_column]]
    every_caption = [_short(caption) for own in captions for caption in own]
    rows = range(len(dataset))
    lost = [row for row in rows if before.is_right[row] and not after.is_right[row]]
    gained = [row for row in rows if after.is_right[row] and not before.is_right[row]]
    few_gained = min(len(gained), number // 2)
    chosen = spaced(lost, number - few_gained)
    chosen += spaced(gained, number - len(chosen))
    examples = [
        Retrieved(
            test=name,
            image=_thumbnail(dataset[row][image_column]),
            caption=_short(captions[row][0]),
            before=every_caption[before.caption[row]],
            after=every_caption[after.caption[row]],
            is_lost=before.is_right[row],
        )
        for row in chosen
    ]
    return FlippedTest(name, *span, len(dataset), len(lost), len(gained), examples)


def _columns(run: RecordedRun) -> list[str]:
    return [run.identity["hyperparameters"][f"{name}_column"] for name in ("image", "caption", "pair_id")]


def spaced(items: Sequence[Any], number: int) -> list[Any]:
    """So many of the items, from all over them."""
    number = min(number, len(items))
    return [items[k * len(items) // number] for k in range(number)]


def _short(caption: str) -> str:
    return caption if len(caption) <= LONGEST_CAPTION else f"{caption[:LONGEST_CAPTION]} …"


def _thumbnail(image: Image) -> Image:
    small = to_rgb(image).copy()
    small.thumbnail(THUMBNAIL)
    return small
