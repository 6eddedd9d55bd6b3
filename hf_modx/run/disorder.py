"""Spatial disorder of every phase of a run, relative to the phase before and to the start."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..evaluation.disorder import MOVE_BINS, SHAPE_BINS, imav, spatial_disorder
from ..evaluation.encoding import EncodedPairs

logger = logging.getLogger(__name__)

MAX_SAMPLES = 5000


def evenly(rows: int, most: int) -> np.ndarray:
    """At most so many row numbers, evenly spaced."""
    return np.arange(rows) if rows <= most else np.linspace(0, rows - 1, most, dtype=int)


class RunDisorder:
    """Measures how far the tests' embeddings, and those of training pairs, have moved.

    The embeddings of the start and of the phase before stay in memory, of at most 5,000 samples each; what is not
    there, because the run was interrupted, `encode` makes again.

    Args:
        encode: (number of a phase, what) -> the embeddings by the model after this phase; `what` is the name of a
            test, or the number of the phase whose training pairs are meant.
    """

    def __init__(self, encode: Callable[[int, str | int], EncodedPairs]):
        self._encode = encode
        self._kept: dict[tuple[int, str | int], EncodedPairs] = {}

    def keep(self, number: int, what: str | int, encoded: EncodedPairs) -> None:
        """Remember what the model after phase `number` says."""
        rows = torch.from_numpy(evenly(len(encoded.image), MAX_SAMPLES)).to(encoded.image.device)
        ids = encoded.image_ids[rows]
        text = encoded.text[encoded.first_captions()[rows]]
        self._kept[number, what] = EncodedPairs(encoded.image[rows], text, ids, ids, torch.arange(len(rows)))

    def measure(self, number: int, tests: Iterable[str], trained: Iterable[int]) -> dict[str, Any] | None:
        """Of the model after phase `number`, as results.json takes it; None for the start, which has nothing before.

        Args:
            tests: names of the tests.
            trained: phases of which training pairs are to be compared (`imav`); 0 is the base.
        """
        tests, trained = list(tests), set(trained)
        for phase in trained & {0, number}:
            self._of(number, phase)  # for the phases to come
        if number == 0:
            return None
        found = {earlier: self._compare(earlier, number, tests, trained) for earlier in {number - 1, 0}}
        self._kept = {key: encoded for key, encoded in self._kept.items() if key[0] in (0, number)}
        return {"since_previous": found[number - 1], "since_start": found[0]}

    def _compare(self, earlier: int, number: int, tests: list[str], trained: set[int]) -> dict[str, Any]:
        found: dict[str, Any] = {"tests": {name: self._of_test(earlier, number, name) for name in tests}}
        if earlier in trained:
            old, new = self._of(earlier, earlier), self._of(number, earlier)
            histogram, pairs = imav(old, new)
            found["imav"] = {"pairs": pairs, **(asdict(histogram) if histogram is not None else {})}
        return found

    def _of_test(self, earlier: int, number: int, name: str) -> dict[str, Any] | None:
        old, new = self._of(earlier, name), self._of(number, name)
        finite = all(torch.isfinite(side).all() for pairs in (old, new) for side in (pairs.image, pairs.text))
        if not finite or len(old.image) < 2:
            logger.warning(
                "Test %r has %s: no spatial disorder.", name, "one row" if finite else "embeddings that are not finite"
            )
            return None
        return spatial_disorder(old, new, sharded=True).to_dict()

    def _of(self, number: int, what: str | int) -> EncodedPairs:
        if (number, what) not in self._kept:
            self.keep(number, what, self._encode(number, what))
        return self._kept[number, what]


def disorder_results(phases: list[dict[str, Any] | None]) -> dict[str, Any]:
    """What results.json holds: the upper bounds of the bins, and an entry for each phase."""
    return {"bins": {"sam": SHAPE_BINS, "imav": SHAPE_BINS, "ram": MOVE_BINS}, "phases": phases}


def training_sample(dataset: Dataset, most: int) -> Dataset:
    """At most so many rows, evenly spaced."""
    return dataset.select(evenly(len(dataset), most))
