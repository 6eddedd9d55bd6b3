"""The phase x test matrix and what it says about forgetting."""

import math
from collections.abc import Iterable, Sequence

import numpy as np


class EvaluationMatrix:
    """One metric of every test after every phase.

    Rows are `A[0]` (before the first phase, where there is such a row) and `A[1] .. A[T]` (after phase k).

    Args:
        phases: the T phases' names.
        tests: the tests' names.
        values: (T + 1, tests), or (T, tests) with `has_initial_row=False`. None or NaN: not measured.
        learned_at: for each test the phase that teaches it, 1 to T; 0: the base model; None: never. Default: test i is
            taught by phase i + 1, which needs as many tests as phases.
        has_initial_row: the first row was measured before the first phase.

    Raises:
        ValueError: shapes that do not fit, or a phase in `learned_at` that does not exist.
    """

    def __init__(
        self,
        phases: Sequence[str],
        tests: Sequence[str],
        values: Sequence[Sequence[float | None]],
        learned_at: Sequence[int | None] | None = None,
        has_initial_row: bool = True,
    ):
        self.phases = list(phases)
        self.tests = list(tests)
        self.has_initial_row = has_initial_row
        self.values = np.array([[math.nan if v is None else float(v) for v in row] for row in values], dtype=float)
        expected = (len(self.phases) + has_initial_row, len(self.tests))
        if self.values.shape != expected:
            raise ValueError(
                f"{len(self.phases)} phases and {len(self.tests)} tests "
                f"{'with' if has_initial_row else 'without'} an initial row need values of shape {expected}, "
                f"got {self.values.shape}."
            )
        self.learned_at = self._check_learned_at(learned_at)

    def _check_learned_at(self, learned_at: Sequence[int | None] | None) -> list[int | None]:
        if learned_at is None:
            if len(self.tests) != len(self.phases):
                raise ValueError(
                    f"{len(self.tests)} tests over {len(self.phases)} phases: say in learned_at which phase teaches "
                    "each test (0 = the base model, None = never)."
                )
            return list(range(1, len(self.phases) + 1))
        learned_at = list(learned_at)
        if len(learned_at) != len(self.tests):
            raise ValueError(f"learned_at has {len(learned_at)} entries for {len(self.tests)} tests.")
        for test, phase in zip(self.tests, learned_at, strict=True):
            if phase is not None and not 0 <= phase <= len(self.phases):
                raise ValueError(f"learned_at of {test!r} is {phase}; the phases are 1 to {len(self.phases)}.")
        return learned_at

    def at(self, phase: int, test: int) -> float:
        """`A[phase, test]`; phase 0 is the initial row. NaN where there is no such row."""
        row = phase if self.has_initial_row else phase - 1
        return float(self.values[row, test]) if row >= 0 else math.nan

    def summary(self) -> dict[str, float | None]:
        """The matrix in seven numbers; None where the matrix does not determine one.

        - `average`: mean of all rows after a phase. `last`: mean of the last row.
        - `backward_transfer`: mean of `A[T, i] - A[learned_at, i]` over tests learned before the last phase.
        - `forgetting`: mean of `max over learned_at <= j < T of A[j, i] - A[T, i]` over the same tests.
        - `transfer`: mean over tests of the mean of their rows 1 <= j < learned_at; all rows >= 1 where never taught
          (ZSCL, Zheng et al., ICCV 2023).
        - `forward_transfer`: mean of `A[learned_at - 1, i] - A[0, i]` over the tests that a phase teaches.
        - `zero_shot_retention`: mean of `A[T, i] / A[0, i]` over the tests that no phase teaches.
        """
        last = len(self.phases)
        learned = [(i, k) for i, k in enumerate(self.learned_at) if k is not None]
        earlier = [(i, k) for i, k in learned if k < last]
        untaught = [i for i, k in enumerate(self.learned_at) if k in (None, 0)]
        return {
            "average": _mean(self.values[int(self.has_initial_row) :].ravel()),
            "last": _mean(self.values[-1]),
            "backward_transfer": _mean(self.at(last, i) - self.at(k, i) for i, k in earlier),
            "forgetting": _mean(_max(self.at(j, i) for j in range(k, last)) - self.at(last, i) for i, k in earlier),
            "transfer": _mean(self._before(i) for i in range(len(self.tests))),
            "forward_transfer": _mean(self.at(k - 1, i) - self.at(0, i) for i, k in learned if k > 0),
            "zero_shot_retention": _mean(self.at(last, i) / self.at(0, i) for i in untaught if self.at(0, i) > 0),
        }

    def _before(self, test: int) -> float:
        """Mean of the test over the phases before the one that teaches it; NaN where there are none."""
        phase = self.learned_at[test]
        stop = len(self.phases) + 1 if phase is None else phase
        mean = _mean(self.at(j, test) for j in range(1, stop))
        return math.nan if mean is None else mean

    def to_lists(self) -> list[list[float | None]]:
        """The values as JSON takes them: None where not measured."""
        return [[None if math.isnan(value) else float(value) for value in row] for row in self.values]

    def to_markdown(self, percent: bool = True) -> str:
        """A table with a row for the start and each phase; a cell is bold in the phase that teaches its test."""
        names = (["start"] if self.has_initial_row else []) + self.phases
        lines = ["| after | " + " | ".join(map(_cell, self.tests)) + " |", "|---" * (len(self.tests) + 1) + "|"]
        for row, name in enumerate(names):
            phase = row if self.has_initial_row else row + 1
            cells = []
            for test, value in enumerate(self.values[row]):
                text = "-" if math.isnan(value) else f"{100 * value:.1f}" if percent else f"{value:.4f}"
                cells.append(f"**{text}**" if self.learned_at[test] == phase else text)
            lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _cell(name: str) -> str:
    return str(name).replace("|", "\\|").replace("\n", " ")


def _mean(values: Iterable[float]) -> float | None:
    measured = [float(value) for value in values if not math.isnan(value)]
    return float(np.mean(measured)) if measured else None


def _max(values: Iterable[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return max(measured) if measured else math.nan
