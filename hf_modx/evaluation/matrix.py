"""The phase x test matrix and what it says about forgetting."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..phases import ALL

if TYPE_CHECKING:
    import pandas

START = "start"
"""Name of the row before the first phase."""
LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
)


class EvaluationMatrix:
    """One metric of every test after every phase.

    Rows are `A[0]` (before the first phase, where there is such a row) and `A[1] .. A[T]` (after phase k).

    Args:
        phases: the T phases' names.
        tests: the tests' names.
        values: (T + 1, tests), or (T, tests) with `has_initial_row=False`. None or NaN: not measured.
        learned_at: for each test the phase that teaches it, 1 to T; 0: the base model; None: never; `ALL` ("all"): all
            phases together, a union of the other tests. Default: test i is taught by phase i + 1, which needs as many
            tests as phases.
        has_initial_row: the first row was measured before the first phase.

    Raises:
        ValueError: shapes that do not fit, or a phase in `learned_at` that does not exist.
    """

    def __init__(
        self,
        phases: Sequence[str],
        tests: Sequence[str],
        values: Sequence[Sequence[float | None]],
        learned_at: Sequence[int | str | None] | None = None,
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

    def _check_learned_at(self, learned_at: Sequence[int | str | None] | None) -> list[int | str | None]:
        if learned_at is None:
            if len(self.tests) != len(self.phases):
                raise ValueError(
                    f"{len(self.tests)} tests over {len(self.phases)} phases: say in learned_at which phase teaches "
                    "each test (0 = the base model, None = never)."
                )
            return list(range(1, len(self.phases) + 1))
        learned_at = [k if k is None or isinstance(k, str) else int(k) for k in learned_at]
        if len(learned_at) != len(self.tests):
            raise ValueError(f"learned_at has {len(learned_at)} entries for {len(self.tests)} tests.")
        for test, phase in zip(self.tests, learned_at, strict=True):
            if phase not in (None, ALL) and (isinstance(phase, str) or not 0 <= phase <= len(self.phases)):
                raise ValueError(f"learned_at of {test!r} is {phase}; the phases are 1 to {len(self.phases)}.")
        return learned_at

    def at(self, phase: int, test: int) -> float:
        """`A[phase, test]`; phase 0 is the initial row. NaN where there is no such row."""
        row = phase if self.has_initial_row else phase - 1
        return float(self.values[row, test]) if row >= 0 else math.nan

    def summary(self) -> dict[str, float | None]:
        """The matrix in seven numbers; None where the matrix does not determine one. A union of tests (`ALL`) is in
        none of them: its pairs are there already, in the tests that it is made of.

        - `average`: mean of all rows after a phase. `last`: mean of the last row.
        - `backward_transfer`: mean of `A[T, i] - A[learned_at, i]` over tests learned before the last phase.
        - `forgetting`: mean of `max over learned_at <= j < T of A[j, i] - A[T, i]` over the same tests.
        - `transfer`: mean over tests of the mean of their rows 1 <= j < learned_at; all rows >= 1 where never taught
          (ZSCL, Zheng et al., ICCV 2023).
        - `forward_transfer`: mean of `A[learned_at - 1, i] - A[0, i]` over the tests that a phase teaches.
        - `zero_shot_retention`: mean of `A[T, i] / A[0, i]` over the tests that no phase teaches.
        """
        if ALL in self.learned_at:
            return self._of([test for test, phase in enumerate(self.learned_at) if phase != ALL]).summary()
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

    def measured(self) -> "EvaluationMatrix":
        """The matrix of those tests that have the metric: a retrieval test has no accuracy. All, where none has it."""
        kept = [test for test in range(len(self.tests)) if not np.isnan(self.values[:, test]).all()]
        return self._of(kept) if kept else self

    def _of(self, kept: Sequence[int]) -> "EvaluationMatrix":
        """The matrix of some of its tests."""
        tests, learned_at = ([of_all[test] for test in kept] for of_all in (self.tests, self.learned_at))
        return EvaluationMatrix(self.phases, tests, self.values[:, kept], learned_at, self.has_initial_row)

    # ---- Formats ----

    def to_lists(self) -> list[list[float | None]]:
        """The values as JSON takes them: None where not measured."""
        return [[None if math.isnan(value) else float(value) for value in row] for row in self.values]

    def to_dict(self) -> dict[str, Any]:
        """All of the matrix as JSON takes it; `from_dict` makes it again."""
        return {
            "phases": self.phases,
            "tests": self.tests,
            "values": self.to_lists(),
            "learned_at": self.learned_at,
            "has_initial_row": self.has_initial_row,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EvaluationMatrix":
        """What `to_dict` has given.

        Raises:
            ValueError: a key is missing or not known.
        """
        expected = {"phases", "tests", "values", "learned_at", "has_initial_row"}
        if set(content) != expected:
            raise ValueError(f"A matrix has the keys {sorted(expected)}, got {sorted(content)}.")
        return cls(**content)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "EvaluationMatrix":
        """What `to_json` has written."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_results(cls, results: Mapping[str, Any], metric: str) -> "EvaluationMatrix":
        """The matrix of one metric in the content of a run's `results.json`.

        Raises:
            ValueError: there is no such metric.
        """
        if metric not in results["matrix"]:
            raise ValueError(f"There is no metric {metric!r}. The metrics are: {', '.join(results['matrix'])}.")
        return cls(results["phases"], results["tests"], results["matrix"][metric], results["learned_at"])

    def to_csv(self) -> str:
        """A line for each row with its name first, and a header; at full precision, empty where not measured."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["after", *self.tests])
        for name, row in zip(self._row_names, self.to_lists(), strict=True):
            writer.writerow([name, *("" if value is None else repr(value) for value in row)])
        return file.getvalue()

    @classmethod
    def from_csv(
        cls, text: str, learned_at: Sequence[int | None] | None = None, has_initial_row: bool = True
    ) -> "EvaluationMatrix":
        """What `to_csv` has written, which does not say when the tests are taught.

        Raises:
            ValueError: lines of different lengths, or what is no number.
        """
        (_, *tests), *rows = filter(None, csv.reader(io.StringIO(text)))  # without empty lines
        values = [[float(value) if value.strip() else None for value in row[1:]] for row in rows]
        phases = [row[0] for row in rows][int(has_initial_row) :]
        return cls(phases, tests, values, learned_at, has_initial_row)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A `pandas.DataFrame` with the tests as columns and the phases as index; NaN where not measured.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self.values, pandas.Index(self._row_names, name="after"), self.tests)

    @classmethod
    def from_dataframe(
        cls,
        frame: "pandas.DataFrame",
        learned_at: Sequence[int | None] | None = None,
        has_initial_row: bool = True,
    ) -> "EvaluationMatrix":
        """What `to_dataframe` has made, which does not say when the tests are taught."""
        names = [str(name) for name in frame.index]
        values = frame.to_numpy(dtype=float, na_value=math.nan).tolist()
        return cls(names[int(has_initial_row) :], list(map(str, frame.columns)), values, learned_at, has_initial_row)

    def to_markdown(self, percent: bool = True) -> str:
        """A table with a row for the start and each phase; a cell is bold in the phase that teaches its test."""
        lines = ["| after | " + " | ".join(map(_cell, self.tests)) + " |", "|---" * (len(self.tests) + 1) + "|"]
        for name, cells in self._texts("**{}**", "-", percent):
            lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def to_latex(self, percent: bool = True) -> str:
        """The same table as a LaTeX `tabular` with the rules of the package booktabs."""
        lines = [rf"\begin{{tabular}}{{l{'r' * len(self.tests)}}}", r"\toprule"]
        lines += [" & ".join(["after", *map(_latex, self.tests)]) + r" \\", r"\midrule"]
        for name, cells in self._texts(r"\textbf{{{}}}", "--", percent):
            lines.append(" & ".join([_latex(name), *cells]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])

    @property
    def _row_names(self) -> list[str]:
        return [*([START] if self.has_initial_row else []), *self.phases]

    def _texts(self, bold: str, nothing: str, percent: bool) -> Iterable[tuple[str, list[str]]]:
        """Name and cells of each row."""
        for row, name in enumerate(self._row_names):
            phase = row if self.has_initial_row else row + 1
            cells = []
            for test, value in enumerate(self.values[row]):
                text = nothing if math.isnan(value) else f"{100 * value:.1f}" if percent else f"{value:.4f}"
                cells.append(bold.format(text) if self.learned_at[test] == phase else text)
            yield name, cells


def _latex(name: str) -> str:
    return str(name).translate(LATEX)


def _cell(name: str) -> str:
    return str(name).replace("|", "\\|").replace("\n", " ")


def _mean(values: Iterable[float]) -> float | None:
    measured = [float(value) for value in values if not math.isnan(value)]
    return float(np.mean(measured)) if measured else None


def _max(values: Iterable[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return max(measured) if measured else math.nan
