"""Which tests of a run its retention budget is about."""

import logging
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..callbacks import LossCallback, RetentionBudget
from ..data.loading import load_splits
from ..evaluation.suite import EvaluationTest, RetrievalTest
from ..training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)

SPLIT = "test"


def retention_budget(args: ModXTrainingArguments) -> list[LossCallback]:
    """The callback that the arguments ask for, or none."""
    if args.max_forgetting is None:
        return []
    budget = RetentionBudget(args.max_forgetting, args.on_forgetting, args.retention_steps, args.retention_metric)
    budget.asked = args.retention_dataset
    return [budget]


class RetentionTests:
    """The tests that the budget of each phase is about; nothing where no budget is among the callbacks.

    Args:
        callbacks: of the run.
        asked: names of tests, comma-separated; None: in each phase the tests of what was learned before it.
        learned_at: name -> the phase that teaches the test, 0 being the base; no number: none does alone.
        phases: their number.
        metrics: name -> those of the test.

    Raises:
        ValueError: there is no such test, one of them does not have the metric, or no phase has an old test.
    """

    def __init__(
        self,
        callbacks: Sequence[LossCallback],
        asked: str | None,
        learned_at: Mapping[str, int | str | None],
        phases: int,
        metrics: Mapping[str, Sequence[str]],
    ):
        self.budgets = [callback for callback in callbacks if isinstance(callback, RetentionBudget)]
        self.asked = None if asked is None else names_of(asked)
        self.learned_at = learned_at
        if self.budgets:
            self._check(phases)
            self._check_metrics({name for number in range(1, phases + 1) for name in self.of_phase(number)}, metrics)

    def _check(self, phases: int) -> None:
        unknown = [name for name in self.asked or () if name not in self.learned_at]
        if unknown:
            raise ValueError(
                f"There is no test {', '.join(map(repr, unknown))} (retention_dataset). The tests are: "
                f"{', '.join(self.learned_at)}."
            )
        if not any(self.of_phase(number) for number in range(1, phases + 1)):
            raise ValueError(
                "max_forgetting needs something that can be forgotten: no phase has a test of what was learned before "
                "it. Name one of the tests, or a data set, in retention_dataset."
            )

    def _check_metrics(self, watched: Container[str], metrics: Mapping[str, Sequence[str]]) -> None:
        for wanted in [budget.metric for budget in self.budgets if budget.metric is not None]:
            for name, known in metrics.items():
                if name in watched and wanted not in known:
                    raise ValueError(
                        f"The test {name!r} has no metric {wanted!r} (retention_metric). It has {', '.join(known)}. "
                        "Take one that all tests of the budget have, or name in retention_dataset those that have it."
                    )

    def of_phase(self, number: int) -> list[str]:
        """Names of the tests."""
        if self.asked is not None:
            return self.asked
        return [
            name for name, learned_at in self.learned_at.items() if isinstance(learned_at, int) and learned_at < number
        ]

    def watch(self, number: int, tests: Mapping[str, Any]) -> None:
        """Let the budget be about the tests of a phase, of all tests by name."""
        watched = self.of_phase(number)
        if self.budgets and not watched:
            logger.warning("Phase %d has no test of what was learned before it: its budget promises nothing.", number)
        for budget in self.budgets:
            budget.tests = {name: tests[name] for name in watched}


def load_retention_tests(args: ModXTrainingArguments, known: Sequence[str]) -> dict[str, EvaluationTest]:
    """Tests of the data sets that `args.retention_dataset` names beside the known tests: retrieval in the columns of
    the arguments, on the split "test" or the only one. The argument then names these tests.

    Raises:
        ValueError: it names neither a test nor a data set with these columns, or the last part of its name is that of
            another test.
    """
    found: dict[str, EvaluationTest] = {}
    names = []
    for asked in names_of(args.retention_dataset or ""):
        name = asked if asked in known else Path(asked).name
        if name in names or (name in known and name != asked):
            raise ValueError(f"retention_dataset: {asked!r} would be the test {name!r}, which is another. Rename it.")
        names.append(name)
        if name not in known:
            found[name] = _load(asked, args, known)
    args.retention_dataset = ",".join(names) or None
    return found


def names_of(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _load(source: str, args: ModXTrainingArguments, known: Sequence[str]) -> RetrievalTest:
    try:
        splits = load_splits(source, image_column=args.image_column)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"retention_dataset: {source!r} is no test of the run ({', '.join(known)}), and no data set: {error}"
        ) from error
    if SPLIT not in splits and len(splits) > 1:
        raise ValueError(f"retention_dataset: {source!r} has no split {SPLIT!r}, but {', '.join(splits)}.")
    table = splits[SPLIT] if SPLIT in splits else next(iter(splits.values()))
    pair_ids = args.pair_id_column if args.pair_id_column in table.column_names else None
    return RetrievalTest(table, args.image_column, args.caption_column, pair_ids)
