"""The matrices of several seeds as one: mean and spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .matrix import EvaluationMatrix


@dataclass(frozen=True)
class OverSeeds:
    """What n matrices of the same phases and tests say together.

    Attributes:
        mean: of each cell, over the seeds in which it was measured.
        spread: the sample standard deviation of each cell (n - 1 in the denominator); NaN of fewer than two values.
        summary: for each number of `EvaluationMatrix.summary` the mean and the sample standard deviation of the seeds'
            own numbers, None where there are too few. The forgetting of a mean is not the mean forgetting: a maximum
            is taken inside.
    """

    mean: EvaluationMatrix
    spread: EvaluationMatrix
    summary: dict[str, tuple[float | None, float | None]]


def mean_and_spread(matrices: Sequence[EvaluationMatrix]) -> OverSeeds:
    """Mean and spread of the matrices of several seeds.

    Raises:
        ValueError: no matrix, or matrices of different phases or tests.
    """
    if not matrices:
        raise ValueError("There is no matrix.")
    first = matrices[0]
    for other in matrices[1:]:
        for what in ("phases", "tests", "learned_at", "has_initial_row"):
            if getattr(other, what) != getattr(first, what):
                raise ValueError(
                    f"The matrices have different {what}: {getattr(first, what)} and {getattr(other, what)}."
                )
    stacked = np.stack([matrix.values for matrix in matrices])
    statistics = np.apply_along_axis(_mean_and_deviation, 0, stacked)
    mean, spread = (
        EvaluationMatrix(first.phases, first.tests, values.tolist(), first.learned_at, first.has_initial_row)
        for values in statistics
    )
    summaries = [matrix.summary() for matrix in matrices]
    summary = {
        name: tuple(
            None if math.isnan(value) else value
            for value in _mean_and_deviation([math.nan if s[name] is None else s[name] for s in summaries])
        )
        for name in summaries[0]
    }
    return OverSeeds(mean, spread, summary)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    measured = [value for value in values if not math.isnan(value)]
    mean = float(np.mean(measured)) if measured else math.nan
    return mean, float(np.std(measured, ddof=1)) if len(measured) > 1 else math.nan
