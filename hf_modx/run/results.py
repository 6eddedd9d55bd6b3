"""What the evaluations of a run have found, phase by phase."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import EvaluationMatrix
from ..evaluation.cross_phase import CROSS_PHASE_METRICS
from .disorder import disorder_results
from .evaluation_notes import EvaluationNotes
from .evaluation_tests import RANKS, RunTests

logger = logging.getLogger(__name__)


class RunResults:
    """A row for each evaluated phase, 0 being the start, and what belongs to it.

    Args:
        phases: the names of all phases of the run.
        tests: of the run.
        results: what results.json holds so far; None of a new run.

    Attributes:
        rows: for each phase test -> metric -> value.
        notes: see `EvaluationNotes`.
        disorder: how far embeddings have moved, by phase.
    """

    def __init__(self, phases: Sequence[str], tests: RunTests, results: Mapping[str, Any] | None = None):
        self.phases, self.tests = list(phases), tests
        self.rows: list[dict[str, dict[str, float]]] = []
        self.notes = EvaluationNotes(results)
        self.disorder: dict[int, dict[str, Any] | None] = {}
        if results is not None:
            self._read(results)

    def _read(self, results: Mapping[str, Any]) -> None:
        self.disorder = dict(enumerate(results.get("spatial_disorder", {}).get("phases", [])))
        if lost := [test for test in results["tests"] if test not in self.tests.names]:
            logger.warning(
                "What was measured of %s leaves results.json with the next phase: the tests are not given any more. "
                "Given again, they are measured anew on the phases whose folders are there.",
                ", ".join(lost),
            )
        matrices = {**results["matrix"], **results.get("ranks", {})}
        for number in range(len(next(iter(matrices.values())))):
            row: dict[str, dict[str, float]] = {}
            for column, test in enumerate(results["tests"]):
                cell = {metric: matrix[number][column] for metric, matrix in matrices.items()}
                if test in self.tests.names:
                    row[test] = {metric: value for metric, value in cell.items() if value is not None}
            self.rows.append({test: cell for test, cell in row.items() if cell})

    def has(self, number: int) -> bool:
        """Whether anything of a phase was measured."""
        return number < len(self.rows) and bool(self.rows[number])

    def missing(self, number: int) -> list[str]:
        """Names of the tests that a row lacks, or lacks metrics of."""
        row = self.rows[number]
        return [
            name
            for name, (_, metrics) in self.tests.measurements().items()
            if any(metric not in row.get(name, {}) for metric in metrics)
        ]

    @property
    def metrics(self) -> list[str]:
        across = any(name in cell for row in self.rows for cell in row.values() for name in CROSS_PHASE_METRICS)
        return [*self.tests.metrics, *(CROSS_PHASE_METRICS if across else ())]

    def matrix(self, metric: str, number: int | None = None) -> EvaluationMatrix:
        """The matrix of a metric as far as it is measured, or as it is after phase `number`."""
        rows = self.rows if number is None else self.rows[: number + 1]
        learned_at = self.tests.learned_at()
        return EvaluationMatrix(
            self.phases[: len(rows) - 1],
            list(learned_at),
            [[row.get(test, {}).get(metric) for test in learned_at] for row in rows],
            [None if isinstance(k, int) and k >= len(rows) else k for k in learned_at.values()],
        )

    def results(self, number: int) -> dict[str, Any]:
        """What results.json holds of it after a phase."""
        matrices = {metric: self.matrix(metric, number) for metric in self.metrics}
        first = matrices[self.metrics[0]]
        disorder = [self.disorder.get(k) for k in range(number + 1)]
        return {
            "phases": first.phases,
            "tests": first.tests,
            "learned_at": first.learned_at,
            "matrix": {metric: matrix.to_lists() for metric, matrix in matrices.items()},
            "ranks": {metric: self.matrix(metric, number).to_lists() for metric in RANKS if self.tests.pairs},
            "summary": {metric: matrix.summary() for metric, matrix in matrices.items()},
            "test_pairs": {name: len(table) for name, table in self.tests.tables().items()},
            **self.notes.results(number, self.tests.labels),
            **({"spatial_disorder": disorder_results(disorder)} if any(disorder) else {}),
        }
