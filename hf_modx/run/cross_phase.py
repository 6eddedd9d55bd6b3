"""Retrieval across the phases of a run: what a test's index, made when the test was taught, says to later models."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..evaluation.cross_phase import CROSS_PHASE_METRICS, PREFIX, cross_phase_metrics
from ..evaluation.encoding import EncodedPairs

logger = logging.getLogger(__name__)


class RunCrossPhase:
    """Fills the `CROSS_PHASE_METRICS` of the rows of a run's matrix.

    A test is indexed by the model after the phase that teaches it; what no phase teaches, by the start model. From
    then on every model asks that index. The embeddings of the indexes stay in memory; what is not there, because the
    run was interrupted, `encode` makes again.

    Args:
        encode: (number of a phase, test) -> the embeddings by the model after this phase; raises a FileNotFoundError
            where that model is gone.
    """

    def __init__(self, encode: Callable[[int, str], EncodedPairs]):
        self._encode = encode
        self._kept: dict[tuple[int, str], EncodedPairs] = {}

    def keep(self, number: int, test: str, encoded: EncodedPairs) -> None:
        """Remember what the model after phase `number` says, until `complete` was called."""
        self._kept[number, test] = encoded

    def complete(self, number: int, row: Mapping[str, dict[str, float]], learned_at: Mapping[str, Any]) -> bool:
        """Measure what the row of phase `number` lacks. Whether anything was measured.

        Args:
            row: by test the metrics so far, to which these are added.
            learned_at: of the retrieval tests, the phase that teaches each, 0 being the base. Where no single phase
                does, the index is that of the start.
        """
        indexed_at = {test: phase if isinstance(phase, int) else 0 for test, phase in learned_at.items()}
        asked = [test for test, phase in indexed_at.items() if phase <= number and test in row]
        asked = [test for test in asked if CROSS_PHASE_METRICS[0] not in row[test]]
        for test in asked:
            try:
                row[test].update(self._measure(number, indexed_at[test], test, row[test]))
            except FileNotFoundError as error:
                logger.warning("The index of %r cannot be asked. %s", test, error)
        self._kept = {key: encoded for key, encoded in self._kept.items() if indexed_at.get(key[1]) == key[0]}
        return bool(asked)

    def _measure(self, number: int, indexed_at: int, test: str, values: Mapping[str, float]) -> dict[str, float]:
        if number == indexed_at:
            return {name: values[name.removeprefix(PREFIX)] for name in CROSS_PHASE_METRICS}
        return cross_phase_metrics(self._of(indexed_at, test), self._of(number, test), sharded=True)

    def _of(self, number: int, test: str) -> EncodedPairs:
        if (number, test) not in self._kept:
            self.keep(number, test, self._encode(number, test))
        return self._kept[number, test]
