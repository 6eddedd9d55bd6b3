"""Pairs that belong together, of one id or one caption: apart in different batches, or together in one."""

from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from ..training_args import ModXTrainingArguments
from .pairs import as_captions


class Arrangement:
    """The order in which rows that belong together come, for `GlobalBatches`.

    Args:
        how: "apart" or "together", see `apart` and `together`.
        dataset: the rows; those of one pair id belong together, directly or through others.
        pair_id_column: its column, where the data have it.
        caption_column: rows with an equal caption belong together too; None: they do not.

    Raises:
        ValueError: nothing says what belongs together.
    """

    def __init__(self, how: str, dataset: Dataset, pair_id_column: str, caption_column: str | None = None):
        columns = [pair_id_column] if pair_id_column in dataset.column_names else []
        if not columns and caption_column is None:
            raise ValueError(
                f"pairs_in_batch={how!r} needs a column {pair_id_column!r} (pair_id_column), or mask_duplicates for "
                "equal captions, to know which pairs belong together. The columns are: "
                f"{', '.join(dataset.column_names)}."
            )
        self.arrange = {"apart": apart, "together": together}[how]
        self.columns, self.caption_column = columns, caption_column
        self.dataset = dataset

    def __call__(self, rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """The rows in the order of batches of these sizes, which add up to their number."""
        return self.arrange(rows, self.groups[rows], sizes)

    @cached_property
    def groups(self) -> np.ndarray:
        """(rows of the data set,) the number of each row's group."""
        wanted = [*self.columns, *([self.caption_column] if self.caption_column is not None else [])]
        table = self.dataset.select_columns(wanted).with_format(None)[:]

        def keys(row: int) -> Iterator[Hashable]:
            yield from (int(table[column][row]) for column in self.columns)
            if self.caption_column is not None:
                yield from as_captions(table[self.caption_column][row])

        return connected(keys(row) for row in range(len(self.dataset)))


def arrangement_for(args: ModXTrainingArguments, dataset: Any, *, has_columns: bool) -> Arrangement | None:
    """What the arguments want; None for batches at random.

    Raises:
        ValueError: nothing says what belongs together, or a collator of the user's reads the columns.
    """
    if args.pairs_in_batch == "any":
        return None
    if not has_columns:
        raise ValueError(
            f"pairs_in_batch={args.pairs_in_batch!r} reads the columns, which a data_collator has taken over. Leave "
            "one of them out."
        )
    captions = args.caption_column if args.mask_duplicates else None
    return Arrangement(args.pairs_in_batch, dataset, args.pair_id_column, captions)


def connected(keys: Iterator[Iterator[Hashable]]) -> np.ndarray:
    """Of each row the number of its group: rows that share a key are in one, and so are those that others connect."""
    parents: list[int] = []
    first: dict[Hashable, int] = {}

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    for row, own in enumerate(keys):
        parents.append(row)
        for key in own:
            parents[root(row)] = root(first.setdefault(key, row))
    return np.array([root(row) for row in range(len(parents))], dtype=np.int64)


def together(rows: np.ndarray, groups: np.ndarray, sizes: Sequence[int] = ()) -> np.ndarray:
    """A group's rows one after the other, so that they share a batch unless its edge divides them; the groups in the
    order of their first rows."""
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    return rows[np.argsort(first[number], kind="stable")]


def apart(rows: np.ndarray, groups: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """No two rows of a group in one batch, where it has fewer rows than there are batches; a larger group is spread as
    evenly as it can be. Group after group is dealt out, a row to each batch in turn."""
    batches = np.repeat(np.arange(len(sizes)), sizes)
    rounds = np.concatenate([np.arange(size) for size in sizes])
    turns = batches[np.lexsort((batches, rounds))]
    return together(rows, groups)[np.argsort(turns, kind="stable")]
