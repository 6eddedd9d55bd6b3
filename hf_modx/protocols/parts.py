"""How one table becomes the parts that are phases: in its order, at random, by the values of a column, or by time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
from datasets import Dataset

from ..phases import column_values

PERIODS = {"year": "%Y", "month": "%Y-%m", "day": "%Y-%m-%d"}
OF_PARTS = {"parts", "shuffle", "group_column", "time_column", "period"}


@dataclass(frozen=True)
class Part:
    """The rows of one phase.

    Attributes:
        name: what tells it from the other parts.
        rows: of the training table.
        test_rows: of the test table; None where all parts share the whole of it.
    """

    name: str
    rows: np.ndarray
    test_rows: np.ndarray | None = None


def parts_of(entry: Mapping[str, Any], train: Dataset, test: Dataset | None) -> list[Part]:
    """The parts of a table, as the keys of a protocol's phase say:

    - `parts: N`: so many contiguous ones; with `shuffle: SEED` random ones.
    - `group_column`: one for each value in the values' order, or with `parts: N` for N groups of as many values;
      `shuffle: SEED` puts the values in a random order.
    - `time_column`, with `period: year` (the default), `month` or `day`: one for each period that occurs. Times are
      dates, ISO strings, or numbers of seconds since 1970. Grouped by `parts`, too.

    By group and by time the test table is cut in the same way.

    Raises:
        ValueError: a column that is missing or holds nulls, what is no time, fewer rows or values than parts.
    """
    rng = np.random.default_rng(entry["shuffle"]) if "shuffle" in entry else None
    if not {"group_column", "time_column"} & set(entry):
        order = np.arange(len(train)) if rng is None else rng.permutation(len(train))
        return [Part(str(number), rows) for number, rows in enumerate(_split(order, entry.get("parts", 1)), start=1)]
    values, test_values = (None if table is None else _values(entry, table) for table in (train, test))
    groups = np.unique(values) if rng is None else rng.permutation(np.unique(values))
    named = {str(group): [group] for group in groups}
    if "parts" in entry:
        named = {str(number): group for number, group in enumerate(_split(groups, entry["parts"]), start=1)}
    return [
        Part(name, *(None if of is None else np.flatnonzero(np.isin(of, group)) for of in (values, test_values)))
        for name, group in named.items()
    ]


def _split(items: np.ndarray, number: int) -> list[np.ndarray]:
    if not 1 <= number <= len(items):
        raise ValueError(f"{len(items)} rows or values cannot make {number} parts.")
    return np.array_split(items, number)


def _values(entry: Mapping[str, Any], table: Dataset) -> np.ndarray:
    if "group_column" in entry:
        return np.array(column_values(table, entry["group_column"]))
    times = pandas.Series(column_values(table, entry["time_column"]))
    unit = {"unit": "s"} if pandas.api.types.is_numeric_dtype(times) else {}
    if unit and times.abs().max() < 10_000:
        raise ValueError(
            f"Column {entry['time_column']!r} holds numbers up to {times.max()}, which are no seconds since 1970. For "
            "years, months or other numbers of periods give group_column."
        )
    try:
        times = pandas.to_datetime(times, utc=True, **unit)
    except (ValueError, TypeError) as error:
        raise ValueError(f"Column {entry['time_column']!r} holds what is no time: {error}") from error
    return times.dt.strftime(PERIODS[entry.get("period", "year")]).to_numpy(str)
