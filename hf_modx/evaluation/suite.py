"""Tests beside those of the stream: retrieval, zero-shot classification and linear probes, in code or declared in a
YAML file.

    - name: flowers
      kind: zero_shot
      dataset: my_folder
      split: test
      label_column: label
      templates: ["a photo of a {}, a type of flower."]
"""

import difflib
import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from ..data.loading import load_table, require_columns, with_images
from ..files import read_yaml
from ..phases import content_fingerprint
from ..prompts import TEMPLATES, check_templates
from .encoding import Encoder
from .linear_probe import linear_probe_accuracy
from .zero_shot import class_embeds, per_class_top1, zero_shot_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrievalTest:
    """A table of images with captions, tested as the tests of a stream are.

    Attributes:
        dataset: the table. image_column, caption_column: its columns; a caption is a string or a list of strings.
        pair_id_column: integers; rows of one id are each other's matches. None: every row has an id of its own.
        learned_at: the phase that teaches it: its number, 0 being the base, or its name; None: none does.
    """

    dataset: Dataset
    image_column: str = "image"
    caption_column: str = "caption"
    pair_id_column: str | None = None
    learned_at: int | str | None = None

    def __post_init__(self):
        given = {} if self.pair_id_column is None else {"pair_id_column": self.pair_id_column}
        columns = {"image_column": self.image_column, "caption_column": self.caption_column, **given}
        require_columns(self.dataset, "The retrieval test", **columns)

    def with_columns(self, image_column: str, caption_column: str, pair_id_column: str) -> Dataset:
        """The table with its columns under other names, and no others."""
        names = {self.image_column: image_column, self.caption_column: caption_column}
        if self.pair_id_column is not None:
            names[self.pair_id_column] = pair_id_column
        table = self.dataset.select_columns(list(names))
        changed = {old: new for old, new in names.items() if old != new}
        return with_images(table.rename_columns(changed) if changed else table, image_column)


@dataclass(frozen=True)
class Measured:
    """What a test of labels has found.

    Attributes:
        metrics: fractions in [0, 1].
        per_class: the accuracy of each class, in the order of the classes; None for one without images. None where
            the test does not tell.
    """

    metrics: dict[str, float]
    per_class: list[float | None] | None = None


@dataclass(frozen=True)
class LabelTest(ABC):
    """A table of images with labels.

    Attributes:
        dataset: the table. image_column, label_column: its columns.
        class_names: the classes in the order of their numbers; for labels that are strings, or numbers without a
            `ClassLabel`, also a mapping from label to name. None: the names of the `ClassLabel`, or the strings
            themselves in alphabetical order.
        learned_at: as in `RetrievalTest`.

    Raises:
        ValueError: columns that are missing, or labels that are null or no class.
    """

    metrics: ClassVar[tuple[str, ...]]

    dataset: Dataset
    image_column: str = "image"
    label_column: str = "label"
    class_names: Sequence[str] | Mapping[Any, str] | None = None
    learned_at: int | str | None = None
    classes: Mapping[Any, int] = field(init=False, repr=False)
    names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self):
        require_columns(self.dataset, "The test", image_column=self.image_column, label_column=self.label_column)
        classes, names = _classes(self.dataset, self.label_column, self.class_names)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "names", tuple(names))
        self.labels(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self, table: Dataset) -> Tensor:
        """(N,) the number of each row's class.

        Raises:
            ValueError: labels of no class, or classes of other names than the test's; a list of `class_names` says
                that the numbers mean the same.
        """
        ours, theirs = (getattr(part.features[self.label_column], "names", None) for part in (self.dataset, table))
        if ours and theirs and ours != theirs and (self.class_names is None or isinstance(self.class_names, Mapping)):
            one, other = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), (ours, theirs))
            raise ValueError(
                f"Column {self.label_column!r} of two tables has classes of other names or in another order: {one!r} "
                f"in one is {other!r} in the other. Where the numbers mean the same, give class_names as a list."
            )
        values = table.with_format(None)[self.label_column]
        unknown = [f"{value!r} (row {row})" for row, value in enumerate(values) if value not in self.classes]
        if unknown:
            raise ValueError(
                f"Column {self.label_column!r} holds {len(unknown)} labels of no class: {', '.join(unknown[:5])}."
            )
        return torch.tensor([self.classes[value] for value in values])

    def of_part(self, part: Dataset) -> "LabelTest":
        """The test on some of its rows, among the classes of all."""
        return replace(self, dataset=part, class_names=self.class_names or self.names)

    def images(self, table: Dataset) -> Dataset:
        """The images alone."""
        return with_images(table.select_columns([self.image_column]), self.image_column)

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """The metrics, fractions in [0, 1]; the same on every process."""
        return self.measured(encoder).metrics

    @abstractmethod
    def measured(self, encoder: Encoder) -> Measured:
        """The metrics, and the accuracy of each class where the test tells it; the same on every process."""

    def fingerprint(self) -> str:
        """A hash of all that decides the metrics besides the model."""
        return _fingerprint(type(self).__name__, content_fingerprint(self.dataset), self.names)


@dataclass(frozen=True)
class ZeroShotTest(LabelTest):
    """Zero-shot classification: see `zero_shot_metrics`.

    Attributes:
        templates: each with one `{}` for the name of the class; several are averaged (`class_embeds`).
    """

    metrics: ClassVar[tuple[str, ...]] = ("zero_shot_top1", "zero_shot_top5", "zero_shot_mean_per_class")

    templates: Sequence[str] = TEMPLATES

    def __post_init__(self):
        super().__post_init__()
        check_templates(self.templates)

    def measured(self, encoder: Encoder) -> Measured:
        texts = class_embeds(encoder, self.names, self.templates)
        embeds = encoder.image_embeds(self.images(self.dataset)), texts, self.labels(self.dataset)
        per_class = [None if math.isnan(share) else share for share in per_class_top1(*embeds).tolist()]
        return Measured(zero_shot_metrics(*embeds), per_class)

    def fingerprint(self) -> str:
        return _fingerprint(super().fingerprint(), tuple(self.templates))


@dataclass(frozen=True)
class LinearProbeTest(LabelTest):
    """A linear classifier on the frozen vision tower: see `linear_probe_accuracy`.

    Attributes:
        train: the table that the classifier learns, with the columns of the other.
    """

    metrics: ClassVar[tuple[str, ...]] = ("linear_probe_top1",)

    train: Dataset | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.train is None:
            raise ValueError("A linear probe needs a table to learn from: give train.")
        if self.train._fingerprint == self.dataset._fingerprint:
            raise ValueError("A linear probe learns from other rows than it is tested on: train is the test's table.")
        require_columns(self.train, "train", image_column=self.image_column, label_column=self.label_column)
        if len(self.labels(self.train).unique()) < 2:
            raise ValueError("A linear probe needs at least two classes to learn.")

    def measured(self, encoder: Encoder) -> Measured:
        train, test = (encoder.vision_features(self.images(table)) for table in (self.train, self.dataset))
        labels = (self.labels(table).to(train.device) for table in (self.train, self.dataset))
        train_labels, test_labels = labels
        return Measured({"linear_probe_top1": linear_probe_accuracy(train, train_labels, test, test_labels)})

    def fingerprint(self) -> str:
        return _fingerprint(super().fingerprint(), content_fingerprint(self.train))


EvaluationTest = RetrievalTest | LabelTest


def load_tests(path: str | Path) -> dict[str, EvaluationTest]:
    """The tests that a YAML file declares, by name.

    The file holds a list of mappings. Each has `name`, `kind` (`retrieval`, `zero_shot` or `linear_probe`) and
    `dataset`: whatever `load_table` takes, a relative path counting from the working directory. All may have
    `config`, `split` (default "test"), `image_column`, `max_samples` (the first so many rows) and `learned_at`;
    retrieval has `caption_column` and `pair_id_column`, the others `label_column` and `class_names`, zero_shot
    `templates`, linear_probe `train_split` (default "train"). The meaning is that of the classes here.

    Raises:
        ValueError: not such a file; a key, a kind, a column or a split that does not exist; names used twice. The
            message names the test.
    """
    return declared_tests(read_yaml(Path(path)), str(path))


def declared_tests(declared: Any, where: str, source_of: Callable[[str], str] = str) -> dict[str, EvaluationTest]:
    """The tests of a list as `load_tests` describes it.

    Args:
        where: it stands, for messages.
        source_of: from the name of a data set to what `load_table` takes.
    """
    if not isinstance(declared, list) or not all(isinstance(entry, dict) and "name" in entry for entry in declared):
        raise ValueError(f"{where} must hold a list of tests, each a mapping with a name.")
    names = [str(entry["name"]) for entry in declared]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: the names {', '.join(repeated)} are used more than once.")
    tests = {}
    for name, entry in zip(names, declared, strict=True):
        try:
            tests[name] = _declared({key: value for key, value in entry.items() if key != "name"}, source_of)
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"{where}, test {name!r}: {error}") from error
    return tests


def phase_number(learned_at: int | str | None, phases: Sequence[str], base: str | None) -> int | None:
    """The number of the phase that teaches a test, 0 being the base.

    Raises:
        ValueError: there is no such phase.
    """
    if learned_at is None or (isinstance(learned_at, int) and 0 <= learned_at <= len(phases)):
        return learned_at
    if learned_at in phases:
        return phases.index(learned_at) + 1
    if learned_at == base:
        return 0
    raise ValueError(f"learned_at is {learned_at!r}; the phases are 1 to {len(phases)}: {', '.join(phases)}.")


KINDS = {
    "retrieval": (RetrievalTest, ("caption_column", "pair_id_column")),
    "zero_shot": (ZeroShotTest, ("label_column", "class_names", "templates")),
    "linear_probe": (LinearProbeTest, ("label_column", "class_names")),
}
PAIR_IDS = "pair_id"
"""What the column of pair ids is called in a stream unless told otherwise."""
SOURCE = ("kind", "dataset", "config", "split", "max_samples")


def _declared(entry: dict[str, Any], source_of: Callable[[str], str]) -> EvaluationTest:
    if entry.get("kind") not in KINDS:
        raise ValueError(f"kind is {entry.get('kind')!r}; there are {', '.join(KINDS)}.")
    if "dataset" not in entry:
        raise ValueError("there is no dataset.")
    test, own = KINDS[entry["kind"]]
    further = ("train_split",) if test is LinearProbeTest else ()
    _refuse_unknown(entry, (*SOURCE, *further, "image_column", "learned_at", *own))
    options = {key: value for key, value in entry.items() if key in ("image_column", "learned_at", *own)}
    source, config = source_of(entry["dataset"]), entry.get("config")
    if test is LinearProbeTest:
        options["train"] = load_table(source, entry.get("train_split", "train"), config)
    table = load_table(source, entry.get("split", "test"), config)
    if test is RetrievalTest and "pair_id_column" not in entry and PAIR_IDS in table.column_names:
        logger.warning(
            "%s has a column %r, of which the test makes nothing: where rows of one id are right answers to each "
            "other, declare pair_id_column: %s.",
            source, PAIR_IDS, PAIR_IDS,
        )  # fmt: skip
    whole = test(table, **options)
    limit = entry.get("max_samples")
    if limit is None or limit >= len(whole.dataset):
        return whole
    part = whole.dataset.select(range(limit))
    return whole.of_part(part) if isinstance(whole, LabelTest) else replace(whole, dataset=part)


def _refuse_unknown(entry: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(known)}."
            raise ValueError(f"there is no key {key!r} for {entry['kind']}.{hint}")


def _classes(
    table: Dataset, column: str, class_names: Sequence[str] | Mapping[Any, str] | None
) -> tuple[dict[Any, int], list[str]]:
    """The number of each label's class, and the classes' names."""
    feature = table.features[column]
    if isinstance(class_names, str) or (class_names is not None and not class_names):
        raise ValueError(f"class_names must be a list, or a mapping from label to name, got {class_names!r}.")
    if isinstance(feature, ClassLabel):
        if isinstance(class_names, Mapping):
            unknown = set(class_names) ^ set(feature.names)
            if unknown:
                raise ValueError(f"class_names must name each class of {column!r}; {sorted(unknown)[:5]} do not fit.")
            class_names = [class_names[name] for name in feature.names]
        names = feature.names if class_names is None else list(class_names)
        if len(names) != len(feature.names):
            raise ValueError(f"Column {column!r} has {len(feature.names)} classes and class_names {len(names)}.")
        return dict(enumerate(range(len(names)))), names
    if isinstance(class_names, Mapping):
        return {label: number for number, label in enumerate(class_names)}, list(class_names.values())
    if feature.dtype in ("string", "large_string"):
        found = sorted({value for value in table.with_format(None)[column] if value is not None})
        names = found if class_names is None else list(class_names)
        return {name: number for number, name in enumerate(names)}, names
    if class_names is None:
        raise ValueError(f"Column {column!r} holds {feature.dtype} and no names: give class_names.")
    return dict(enumerate(range(len(class_names)))), list(class_names)


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
