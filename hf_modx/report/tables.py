"""What several runs have measured, in tables: means and standard deviations over seeds, differences paired by seed."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..callbacks.modx import distils_replayed_alone
from ..evaluation import EvaluationMatrix
from ..markdown import escaped, table
from ..model_card.metadata import metric_name
from .runs import RecordedRun, shared_seeds

Groups = Mapping[str, Sequence[RecordedRun]]
Measure = Callable[[RecordedRun], float | None]

SUMMARY = ("forgetting", "last", "average")


@dataclass(frozen=True)
class Comparison:
    """One metric of all runs. All text is plain: whoever shows it escapes it.

    Attributes:
        title: name of the metric.
        setting: how to read the numbers.
        header, rows: of the table.
        notes: sentences to stand below it.
    """

    title: str
    setting: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        rows = [[escaped(cell) for cell in row] for row in self.rows]
        parts = [f"### {escaped(self.title)}", escaped(self.setting), table(list(map(escaped, self.header)), rows)]
        return "\n\n".join([*parts, *map(escaped, self.notes)]) + "\n"


def compare(groups: Groups, metric: str) -> Comparison:
    """The summary of each recipe, each test right after its phase and at the end, and below a row for the difference
    of each recipe to the first one, over the seeds that both have. What no run has measured is left out.

    Raises:
        ValueError: a run has no such metric.
    """
    first = next(iter(groups.values()))[0]
    measures = _measures(first, metric)
    rows = [[name, *(spread(map(measure, runs)) for measure in measures.values())] for name, runs in groups.items()]
    reference, *others = groups
    for name in others:
        pairs = shared_seeds(groups[name], groups[reference])
        if pairs:
            cells = [spread(_difference(measure, *pair) for pair in pairs) for measure in measures.values()]
            rows.append([f"{name} - {reference}", *cells])
    notes = [note for note in (_start(groups, metric), *_kept_rows(groups)) if note]
    header = ["recipe", *measures]
    filled = [column for column in range(len(header)) if any(row[column] for row in rows)]
    header, *rows = [[row[column] for column in filled] for row in (header, *rows)]
    return Comparison(metric_name(metric), _setting(groups, metric), header, rows, notes)


def spread(values: Iterable[float | None]) -> str:
    """`12.3 ± 0.4`: mean and standard deviation (of a sample) of fractions, in percent; what is not measured is left
    out, "" where that is all."""
    known = [100 * value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return ""
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{round(statistics.mean(known), 1) + 0.0:.1f}{deviation}"  # no -0.0


def plasticity(matrix: EvaluationMatrix) -> float | None:
    """Mean of the tests right after the phase that teaches each: what the model can still learn."""
    taught = [(test, phase) for test, phase in enumerate(matrix.learned_at) if isinstance(phase, int)]
    return _mean(matrix.at(phase, test) for test, phase in taught if phase > 0)


def stability(matrix: EvaluationMatrix) -> float | None:
    """Mean of the last row over the tests that the base or a phase before the last has taught: what it keeps."""
    last = len(matrix.phases)
    taught = [(test, phase) for test, phase in enumerate(matrix.learned_at) if isinstance(phase, int)]
    return _mean(matrix.at(last, test) for test, phase in taught if phase < last)


def mean_matrix(matrices: Sequence[EvaluationMatrix]) -> EvaluationMatrix:
    """The mean over seeds; a cell that some seed has not measured is not measured."""
    first = matrices[0]
    values = sum(matrix.values for matrix in matrices) / len(matrices)
    return EvaluationMatrix(first.phases, first.tests, values, first.learned_at, first.has_initial_row)


def _measures(run: RecordedRun, metric: str) -> dict[str, Measure]:
    measures: dict[str, Measure] = {name: partial(_summary, metric, name) for name in SUMMARY}
    measures |= {"plasticity": lambda run: plasticity(run.matrix(metric))}
    measures |= {"stability": lambda run: stability(run.matrix(metric))}
    for test, (name, phase) in enumerate(zip(run.results["tests"], run.results["learned_at"], strict=True)):
        if isinstance(phase, int) and phase > 0:
            measures[f"{name}, after its phase"] = partial(_cell, metric, phase, test)
    for test, name in enumerate(run.results["tests"]):
        measures[f"{name}, end"] = partial(_cell, metric, len(run.results["phases"]), test)
    return measures


def _summary(metric: str, name: str, run: RecordedRun) -> float | None:
    return run.matrix(metric).summary()[name]


def _cell(metric: str, phase: int, test: int, run: RecordedRun) -> float:
    return run.matrix(metric).at(phase, test)


def _difference(measure: Measure, run: RecordedRun, other: RecordedRun) -> float | None:
    ours, theirs = measure(run), measure(other)
    return None if ours is None or theirs is None else ours - theirs


def _setting(groups: Groups, metric: str) -> str:
    sizes = {len(runs) for runs in groups.values()}
    seeds = "one seed" if sizes == {1} else f"mean and standard deviation over {_numbers(sizes)} seeds"
    paired = ", differences paired by seed" if len(groups) > 1 and sizes != {1} else ""
    first = next(iter(groups.values()))[0]
    sizes_of_tests = {test: first.results["test_pairs"][test] for test in first.matrix(metric).measured().tests}
    return f"In percent, {seeds}{paired}. Pairs or images in the tests: {_listed(sizes_of_tests)}."


def _start(groups: Groups, metric: str) -> str:
    runs = next(iter(groups.values()))
    tests = runs[0].results["tests"]
    values = {name: spread(_cell(metric, 0, test, run) for run in runs) for test, name in enumerate(tests)}
    return f"Before the first phase: {_listed(values)}." if any(values.values()) else ""


def _kept_rows(groups: Groups) -> list[str]:
    notes = []
    for name, runs in groups.items():
        records = [run.results["training"] for run in runs]
        if all("image_rows_kept" in (record or {}) for phases in records for record in phases) and records[0]:
            phases = runs[0].results["phases"]
            kept = {
                phase: spread(record[k]["image_rows_kept"]["mean"] for record in records)
                for k, phase in enumerate(phases)
            }
            alone = distils_replayed_alone(runs[0].identity["recipe_args"].get("ModX", {}))
            of = " of the replayed ones" if alone else ""
            notes.append(f"Image rows distilled ({name}), percent{of}: {_listed(kept)}.")
    return notes


def _numbers(sizes: Iterable[int]) -> str:
    low, *_, high = [min(sizes), max(sizes)]
    return str(low) if low == high else f"{low} to {high}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != "")


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return statistics.mean(known) if known else None
