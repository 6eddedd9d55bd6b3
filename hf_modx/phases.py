"""A stream of phases: data that arrives in portions, each with a training and a test part."""

import hashlib
import logging
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from .data.loading import concatenate_shared, require_table
from .data.replay_dataset import like_stream
from .nearest import did_you_mean

logger = logging.getLogger(__name__)

TRAIN, TEST = "_train", "_test"
FINGERPRINT_ROWS = 64
ORDER_SHOWN = 12
ALL = "all"
"""In the place of the number of the phase that teaches a test: all of them together do."""


@dataclass(frozen=True)
class Phase:
    """One portion of the stream.

    Attributes:
        name: stands in the matrix, on cards and in trackers; each only once in a stream.
        train: the pairs to learn.
        test: held-out pairs; None where the phase brings no test of its own.
    """

    name: str
    train: Dataset
    test: Dataset | None = None

    def __post_init__(self):
        for part in (self.train, self.test):
            if not isinstance(part, Dataset | None):
                raise TypeError(f"Phase {self.name!r}: expected a datasets.Dataset, got {type(part).__name__}.")
            if part is not None and len(part) == 0:
                which = "training" if part is self.train else "test"
                raise ValueError(f"Phase {self.name!r} has an empty {which} part.")


@dataclass(frozen=True)
class PhaseStream:
    """Phases in the order in which they are learned.

    Make one with `from_splits`, `from_column`, `from_time` or `random`; all are deterministic, and the data stay in
    their memory-mapped tables.

    Attributes:
        phases: at least one.
        base: what the model knew before the first phase, where that is known: its test becomes part of the matrix and
            joint training uses its pairs.
        extra_tests: tests that no phase teaches, by name.
        union_tests: names of those among them that hold the pairs of all tests.
    """

    phases: tuple[Phase, ...]
    base: Phase | None = None
    extra_tests: Mapping[str, Dataset] = field(default_factory=dict)
    union_tests: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise ValueError("A stream needs at least one phase.")
        names = [phase.name for phase in self.all_phases()] + list(self.extra_tests)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"The names {', '.join(map(repr, repeated))} stand for more than one phase or test.")
        self._refuse_overlap()

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def all_phases(self) -> list[Phase]:
        """The base, if there is one, and the phases."""
        return [*([self.base] if self.base else []), *self.phases]

    def tests(self) -> dict[str, tuple[Dataset, int | str | None]]:
        """Name -> (test set, number of the phase that teaches it; 0 the base, `ALL` a union of tests, None never)."""
        found: dict[str, tuple[Dataset, int | str | None]] = {}
        if self.base is not None and self.base.test is not None:
            found[self.base.name] = (self.base.test, 0)
        for number, phase in enumerate(self.phases, start=1):
            if phase.test is not None:
                found[phase.name] = (phase.test, number)
        for name, dataset in self.extra_tests.items():
            found[name] = (dataset, ALL if name in self.union_tests else None)
        return found

    def map_parts(self, change) -> "PhaseStream":
        """The same stream with `change(name, part)` in the place of every training and test set; the name is the
        phase's and the part's, as in "phase_1 (train)". In the order of the stream, a test before its training part.
        """

        def changed(phase: Phase | None) -> Phase | None:
            if phase is None:
                return None
            test = None if phase.test is None else change(f"{phase.name} (test)", phase.test)
            return replace(phase, train=change(f"{phase.name} (train)", phase.train), test=test)

        base = changed(self.base)
        phases = tuple(changed(phase) for phase in self.phases)
        extra = {name: change(f"{name} (test)", dataset) for name, dataset in self.extra_tests.items()}
        return PhaseStream(phases, base, extra, self.union_tests)

    def with_replay(
        self,
        pairs: Dataset,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        pair_id_column: str = "pair_id",
    ) -> "PhaseStream":
        """The same stream with old pairs, or public ones, as its base: recipes that replay start with a memory of
        them, and mix it with what the phases bring (see `Replay`).

        Args:
            pairs: with images and captions in the columns of the stream. Pair ids count as the stream's own; where
                they are others, leave the column out.
            image_column, caption_column, pair_id_column: of both.

        Raises:
            ValueError: the stream has a base already, or a column is missing.
            TypeError: a column of a wrong type.
        """
        if self.base is not None:
            raise ValueError(f"The stream has a base, {self.base.name!r}, whose pairs are replayed: give no others.")
        table = like_stream(pairs, self.phases[0].train, (image_column, caption_column, pair_id_column))
        return replace(self, base=Phase("replay", table))

    def with_union_test(self, name: str = "union") -> "PhaseStream":
        """The same stream with one test more: the pairs of all tests in one gallery, where what one phase has taught
        can be taken for what another has. It is in the matrix and in no number of its summary."""
        tests = [dataset for dataset, _ in self.tests().values()]
        union = concatenate_shared(tests, tests[0].column_names)
        extra = {**self.extra_tests, name: union}
        return replace(self, extra_tests=extra, union_tests=(*self.union_tests, name))

    def _refuse_overlap(self) -> None:
        """The same table twice among the phases' parts, or as training part and as extra test, is a mistake in the
        split."""
        seen: dict[str, str] = {}
        for phase in self.all_phases():
            for part in filter(None, (phase.train, phase.test)):
                other = seen.setdefault(part._fingerprint, phase.name)
                if other != phase.name or (part is phase.test and part._fingerprint == phase.train._fingerprint):
                    raise ValueError(f"Phases {other!r} and {phase.name!r} overlap: a part of both is the same table.")
        trained = {phase.train._fingerprint: phase.name for phase in self.all_phases()}
        for name, dataset in self.extra_tests.items():
            if dataset._fingerprint in trained:
                raise ValueError(f"Test {name!r} is the table that phase {trained[dataset._fingerprint]!r} trains on.")

    @classmethod
    def from_splits(
        cls,
        splits: DatasetDict | Mapping[str, Dataset],
        phase_splits: Sequence[str] | None = None,
        test_splits: Sequence[str] | None = None,
        test_fraction: float = 0.0,
        seed: int = 0,
    ) -> "PhaseStream":
        """Phases from named splits.

        Args:
            splits: the data. Without `phase_splits`, splits named `X_train` and `X_test` are the parts of phase X, in
                the order stored; an `X_test` without `X_train` is a test that no phase teaches.
            phase_splits: the training splits in order.
            test_splits: as many test splits, in the order of the phases.
            test_fraction: without test splits, the random share of each phase that is held out.
            seed: of the held-out share.

        Raises:
            ValueError: unknown or repeated splits, test splits without phase splits, empty or overlapping parts.
        """
        if not isinstance(splits, Mapping):
            raise TypeError(f"Expected splits by name (a DatasetDict), got {type(splits).__name__}.")
        if phase_splits is None:
            if test_splits is not None:
                raise ValueError("test_splits need phase_splits: say which training split each of them belongs to.")
            return cls._from_named_pairs(splits, test_fraction, seed)
        for names in (phase_splits, test_splits or []):
            unknown = [name for name in names if name not in splits]
            if unknown:
                raise ValueError(f"There is no split {', '.join(unknown)}. The splits are: {', '.join(splits)}.")
        used = [*phase_splits, *(test_splits or [])]
        repeated = sorted({name for name in used if used.count(name) > 1})
        if repeated:
            raise ValueError(f"The splits {', '.join(repeated)} are used more than once: the parts would overlap.")
        if test_splits is not None and len(test_splits) != len(phase_splits):
            raise ValueError(f"{len(phase_splits)} phase splits need as many test splits, got {len(test_splits)}.")
        if test_splits is None:
            return cls(tuple(hold_out(name, splits[name], test_fraction, seed) for name in phase_splits))
        parts = zip(phase_splits, test_splits, strict=True)
        return cls(tuple(Phase(name, splits[name], splits[test]) for name, test in parts))

    @classmethod
    def _from_named_pairs(cls, splits: Mapping[str, Dataset], test_fraction: float, seed: int) -> "PhaseStream":
        names = [name.removesuffix(TRAIN) for name in splits if name.endswith(TRAIN)]
        if not names:
            raise ValueError(
                f"No split is named ..._train. The splits are: {', '.join(splits)}. Name the phases with "
                "phase_splits, or cut one of these into phases with phase_column or num_phases."
            )
        phases = []
        for name in names:
            if name + TEST in splits:
                phases.append(Phase(name, splits[name + TRAIN], splits[name + TEST]))
            else:
                phases.append(hold_out(name, splits[name + TRAIN], test_fraction, seed))
        extra = {
            split.removesuffix(TEST): splits[split]
            for split in splits
            if split.endswith(TEST) and split.removesuffix(TEST) not in names
        }
        return cls(tuple(phases), extra_tests=extra)

    @classmethod
    def from_column(
        cls,
        dataset: Dataset,
        column: str,
        *,
        order: Sequence | None = None,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> "PhaseStream":
        """One phase for each value of a column: class- or domain-incremental.

        Args:
            dataset: all pairs.
            column: strings, integers or class labels (which count by name), without nulls.
            order: the values in the order of the phases; values left out are not used. Default: in the order of their
                first appearance.
            test_fraction: random share of each phase that is held out.
            seed: of the held-out share.

        Raises:
            TypeError: several splits, or one that is streamed.
            ValueError: no such column, nulls in it, or a value of `order` that does not occur.
        """
        values = column_values(dataset, column)
        feature = dataset.features[column]
        if isinstance(feature, ClassLabel):
            values = [feature.int2str(value) for value in values]
        if order is None:
            order = list(dict.fromkeys(values))
            _warn_of_mixed_times(column, order)
        order = list(order)
        rows: dict = {value: [] for value in order}
        for row, value in enumerate(values):
            if value in rows:
                rows[value].append(row)
        absent = [value for value in order if not rows[value]]
        if absent:
            raise ValueError(f"Column {column!r} never holds {', '.join(map(repr, absent))}: those phases are empty.")
        return cls(tuple(hold_out(str(v), dataset.select(rows[v]), test_fraction, seed) for v in order))

    @classmethod
    def from_time(
        cls, dataset: Dataset, column: str, num_phases: int, *, test_fraction: float = 0.1, seed: int = 0
    ) -> "PhaseStream":
        """Equal portions in the order of a time column (dates, timestamps, numbers, or texts that sort as these do,
        as ISO dates); rows of one time stay in the order stored.

        Raises:
            TypeError: several splits, or one that is streamed.
            ValueError: no such column, nulls in it, texts whose alphabetical order is not that of time, or fewer rows
                than phases.
        """
        times = column_values(dataset, column)
        texts = [time for time in times if isinstance(time, str)]
        if not _sort_by_time(set(texts)):
            raise ValueError(
                f"Column {column!r} holds texts such as {texts[0]!r}, and their alphabetical order is not that of "
                "time. Write dates as 2024-01-31, or give a column of dates or numbers."
            )
        order = np.argsort(np.array(times), kind="stable")
        return cls._equal_parts(dataset, order, num_phases, test_fraction, seed)

    @classmethod
    def random(cls, dataset: Dataset, num_phases: int, seed: int = 0, *, test_fraction: float = 0.1) -> "PhaseStream":
        """Random equal parts: instance-incremental, as the Mod-X paper's Flickr30K stream.

        Raises:
            TypeError: several splits, or one that is streamed.
            ValueError: fewer rows than phases.
        """
        require_table(dataset)
        order = np.random.default_rng(seed).permutation(len(dataset))
        return cls._equal_parts(dataset, order, num_phases, test_fraction, seed)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Publish the stream as a data set on the Hub that `from_hub` reads again.

        Every part is a split, named after its phase as far as names of splits permit: `NAME_train`, `NAME_test`. So
        `load_dataset(repo_id, split="NAME_train", streaming=True)` works as with any data set. Names, order, base and
        licences are in `stream.json`; images are stored with the data. What fails is tried again a few times.

        Args:
            repo_id: "namespace/name", or a name in your own namespace; what is there is replaced.
            private: visibility of a data set that is new.
            token: default: that of `hf auth login` or HF_TOKEN.

        Returns:
            The complete name.

        Raises:
            ValueError: the parts do not have the same columns.
            HubError: the Hub refuses it, or does not answer.
        """
        from .hub.stream import push_stream  # which knows what a stream is

        return push_stream(self, repo_id, private=private, token=token)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> "PhaseStream":
        """The stream that `push_to_hub` has published: same names, order, base and rows.

        The data are downloaded: a phase is read in a random order many times. To look at a few rows, stream a split
        with `load_dataset(..., streaming=True)`.

        Args:
            repo_id: name of the data set.
            revision: branch, tag or commit.
            token: default: that of `hf auth login` or HF_TOKEN.

        Raises:
            NotAStream: a data set, but not one that `push_to_hub` has published (a ValueError).
            RepositoryNotFoundError, RevisionNotFoundError: there is no such data set, or no such revision.
            HubError: the Hub does not answer.
        """
        from .hub.stream import load_stream  # which knows what a stream is

        return load_stream(repo_id, revision=revision, token=token)

    @classmethod
    def _equal_parts(
        cls, dataset: Dataset, order: np.ndarray, num_phases: int, test_fraction: float, seed: int
    ) -> "PhaseStream":
        if not 1 <= num_phases <= len(dataset):
            raise ValueError(f"{len(dataset)} rows cannot make {num_phases} phases.")
        parts = np.array_split(order, num_phases)
        return cls(
            tuple(
                hold_out(f"phase_{number}", dataset.select(rows), test_fraction, seed)
                for number, rows in enumerate(parts, start=1)
            )
        )


def content_fingerprint(dataset: Dataset, columns: Sequence[str] | None = None) -> str:
    """A hash of what a table holds, whatever file it comes from: the number of rows, the columns, and up to 64 rows
    spread evenly over it (images as stored, undecoded; a file that the table only points to is read).

    Args:
        columns: those of them that the table has are looked at. Default: all.
    """
    if columns is not None:
        dataset = dataset.select_columns([column for column in columns if column in dataset.column_names])
    stored = dataset.with_format("arrow")
    digest = hashlib.sha256(repr((len(dataset), dataset.column_names)).encode())
    for row in np.linspace(0, len(dataset) - 1, min(FINGERPRINT_ROWS, len(dataset)), dtype=int):
        (values,) = stored[int(row) : int(row) + 1].to_pylist()
        digest.update(repr(sorted((name, _stored(value)) for name, value in values.items())).encode())
    return digest.hexdigest()[:16]


def _stored(value):
    """An undecoded image as its bytes, wherever they lie; the file's name where there are none."""
    if isinstance(value, list):
        return [_stored(item) for item in value]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        try:
            return value["bytes"] or Path(value["path"] or "").read_bytes()
        except OSError:
            return os.path.basename(value["path"] or "")
    return value


def column_values(dataset: Dataset, column: str) -> list:
    """The values of a column; a ValueError where there is no such column, or nulls (NaN, a ClassLabel's -1) in it."""
    require_table(dataset)
    if column not in dataset.column_names:
        near = did_you_mean(column, dataset.column_names)
        raise ValueError(f"There is no column {column!r}.{near} The columns are: {', '.join(dataset.column_names)}.")
    values = list(dataset.with_format(None)[column])
    if not all(isinstance(value, Hashable) for value in values):
        raise ValueError(f"Column {column!r} holds {dataset.features[column]}: a row's phase is one text or number.")
    row = next((row for row, value in enumerate(values) if value is None or value != value), None)
    if row is not None:
        raise ValueError(f"Column {column!r} has nulls (first in row {row}): every row needs a phase.")
    if isinstance(dataset.features[column], ClassLabel) and -1 in values:
        raise ValueError(
            f"Column {column!r} has no class (-1) in {values.count(-1)} of {len(values)} rows (first in row "
            f"{values.index(-1)}): every row needs a phase. Leave these rows out, for instance with "
            f"dataset.filter(lambda label: label >= 0, input_columns={column!r})."
        )
    return values


def _sort_by_time(texts: set[str]) -> bool:
    """Whether alphabetical order is that of time: each text begins with a year or is a number, and all are written
    alike, digit for digit, only that some may end earlier (2024-01, 2024-01-31)."""
    shapes = {re.sub(r"\d", "0", text) for text in texts}
    longest = max(shapes, key=len, default="")
    return all(
        re.match(r"0000|0+$", shape) and longest.startswith(shape) and longest[len(shape) :][:1] != "0"
        for shape in shapes
    )


def _warn_of_mixed_times(column: str, order: list) -> None:
    """Say so where the values are dates and come in another order than that of time."""
    texts = all(isinstance(value, str) and re.match(r"\d{4}", value) for value in order) and _sort_by_time(set(order))
    if (texts or all(isinstance(value, date) for value in order)) and order != sorted(order):
        logger.warning(
            "The phases are learned in the order in which the values of column %r first appear, which is not that of "
            "time: %s. Sort the table by it if that is not meant.",
            column,
            ", ".join(map(str, order[:ORDER_SHOWN])) + (" ..." if len(order) > ORDER_SHOWN else ""),
        )


def hold_out(name: str, dataset: Dataset, test_fraction: float, seed: int) -> Phase:
    """Split a random share off as test part; a share of 0 means no test."""
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must be in [0, 1), got {test_fraction}.")
    if test_fraction == 0:
        return Phase(name, dataset)
    num_test = max(1, round(len(dataset) * test_fraction))
    if num_test >= len(dataset):
        raise ValueError(
            f"Phase {name!r} has {len(dataset)} rows: too few to hold out {test_fraction:.0%} of them. Put them into "
            "another phase, or give tests of your own and a test_fraction of 0."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    return Phase(name, dataset.select(np.sort(order[num_test:])), dataset.select(np.sort(order[:num_test])))
