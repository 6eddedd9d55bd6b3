"""Published protocols as presets: which data in which order, with which prompts and hyper-parameters.

A protocol is a YAML file beside this one, or one of your own:

    title: what it is
    source: the paper
    notes: [what differs from it, which data set ids were never tried]
    settings: {learning_rate: 1e-5, ...}   # flags of examples/continual_clip.py, which those given override
    phases:
      - name: flowers                      # images with labels: learned as classes, tested zero-shot
        dataset: owner/name
        label_column: label
        templates: ["a photo of a {}, a type of flower."]
      - name: pairs                        # images with captions
        dataset: owner/other
        caption_column: caption
        parts: 5                           # contiguous; each is a phase. For other parts see `parts_of`
      - name: months
        dataset: owner/dated
        time_column: date
        period: month                      # a phase for each
        test_fraction: 0.1                 # held out of each, in the place of a test split
    tests: [...]                           # beside those of the phases, as in the files of `load_tests`
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..callbacks.classification import class_pairs
from ..data.loading import load_table, require_columns, with_images
from ..evaluation.suite import EvaluationTest, RetrievalTest, ZeroShotTest, declared_tests
from ..files import read_yaml
from ..phases import Phase, PhaseStream, hold_out
from ..prompts import TEMPLATES
from .parts import OF_PARTS, PERIODS, parts_of

FOLDER = Path(__file__).parent
PROTOCOLS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
KEYS = {"title", "source", "notes", "settings", "phases", "tests"}
OF_ALL = {"name", "dataset", "test_dataset", "config", "train_split", "test_split", "image_column"}
OF_LABELS = {"label_column", "templates", "class_names", "classes_per_phase", "first_classes"}
OF_CAPTIONS = {"caption_column", "test_fraction"} | OF_PARTS


@dataclass(frozen=True)
class Protocol:
    """What a file of a protocol says.

    Attributes:
        title, source, notes: for people.
        settings: flags of the main example.
        phases, tests: as in the file.
    """

    title: str
    source: str
    notes: tuple[str, ...]
    settings: dict[str, Any]
    phases: tuple[dict[str, Any], ...]
    tests: tuple[dict[str, Any], ...] = ()

    def load(
        self,
        data_root: str | Path | None = None,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        pair_id_column: str = "pair_id",
    ) -> tuple[PhaseStream, dict[str, EvaluationTest]]:
        """The stream, and the tests beside it, by name.

        Phases of labels are pairs of an image and the first template with its class's name, and a `ZeroShotTest` with
        all templates. Phases of captions have a retrieval test each, but for parts by number, which have one together.

        Args:
            data_root: a folder that holds every data set under its name, as `ROOT/owner/name`, in whatever form
                `load_table` takes. None: the names are those of the Hub.
            image_column, caption_column, pair_id_column: what the columns are called in the stream.

        Raises:
            FileNotFoundError: `data_root` does not have a data set.
            ValueError: a column, split or class that is missing; the message names the phase.
        """
        phases: list[Phase] = []
        tests: dict[str, EvaluationTest] = {}
        columns = (image_column, caption_column, pair_id_column)
        sources = list(dict.fromkeys(entry["dataset"] for entry in self.phases))
        for entry in self.phases:
            try:
                make = _of_captions
                if "label_column" in entry:
                    make = partial(_of_labels, first_id=sources.index(entry["dataset"]) << 32)
                for phase, named in make(entry, *_tables(entry, data_root), columns):
                    phases.append(phase)
                    tests |= named
            except ValueError as error:
                raise ValueError(f"Phase {entry['name']!r} of the protocol: {error}") from error
        tests |= declared_tests(list(self.tests), self.title, partial(source_of, data_root=data_root))
        return PhaseStream(tuple(phases)), tests


def read_protocol(name: str | Path) -> Protocol:
    """A protocol by its name in `PROTOCOLS`, or from a file.

    Raises:
        ValueError: no such protocol, or a file of another shape.
    """
    path = FOLDER / f"{name}.yaml" if str(name) in PROTOCOLS else Path(name)
    if not path.is_file():
        raise ValueError(f"There is no protocol {str(name)!r}, nor such a file. There are {', '.join(PROTOCOLS)}.")
    content = read_yaml(path)
    if not isinstance(content, dict) or not content.get("phases") or set(content) - KEYS:
        raise ValueError(f"{path} must hold a mapping with phases and, besides, {', '.join(sorted(KEYS))} alone.")
    for entry in content["phases"]:
        _check(entry, path)
        if isinstance(entry.get("class_names"), str):
            entry["class_names"] = read_yaml(path.parent / entry["class_names"])
    return Protocol(
        content.get("title", path.stem),
        content.get("source", ""),
        tuple(content.get("notes", ())),
        content.get("settings", {}),
        tuple(content["phases"]),
        tuple(content.get("tests", ())),
    )


def source_of(name: str, data_root: str | Path | None) -> str:
    """Where a data set is: on the Hub under its name, or under the root.

    Raises:
        FileNotFoundError: it is not there.
    """
    if data_root is None:
        return name
    path = Path(data_root) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the data root holds each data set under its name.")
    return str(path)


def _check(entry: Any, path: Path) -> None:
    if not isinstance(entry, dict) or not {"name", "dataset"} <= set(entry):
        raise ValueError(f"{path}: a phase needs a name and a dataset, got {entry!r}.")
    known = OF_ALL | (OF_LABELS if "label_column" in entry else OF_CAPTIONS)
    unknown = sorted(set(entry) - known)
    where = f"{path}, phase {entry['name']!r}"
    if unknown:
        raise ValueError(f"{where}: there is no {', '.join(unknown)}; {sorted(known)} are.")
    for one, other in (("group_column", "time_column"), ("test_fraction", "test_split")):
        if {one, other} <= set(entry):
            raise ValueError(f"{where}: {one} does not go with {other}.")
    if entry.get("period", "year") not in PERIODS or ("period" in entry and "time_column" not in entry):
        raise ValueError(f"{where}: period is that of a time_column, one of {', '.join(PERIODS)}.")
    if "label_column" in entry and entry.get("test_split", "test") is None:
        raise ValueError(f"{where}: classes need a test_split.")


def _tables(entry: Mapping[str, Any], data_root: str | Path | None) -> tuple[Dataset, Dataset | None]:
    """The training table, and the test table where there is one."""
    config, test_split = entry.get("config"), entry.get("test_split", "test")
    train = load_table(source_of(entry["dataset"], data_root), entry.get("train_split", "train"), config)
    if test_split is None or "test_fraction" in entry:
        return train, None
    test = load_table(source_of(entry.get("test_dataset", entry["dataset"]), data_root), test_split, config)
    if test._fingerprint == train._fingerprint:  # a folder of `save_to_disk` may hold a table without splits
        raise ValueError(f"{entry['dataset']} has no splits: the test would be the table that is trained on.")
    return train, test


Made = Iterator[tuple[Phase, dict[str, EvaluationTest]]]


def _of_labels(
    entry: Mapping[str, Any], train: Dataset, test: Dataset, columns: tuple[str, str, str], first_id: int
) -> Made:
    """The pair id of a class is its number, counted from `first_id`: phases of several data sets may be trained on
    together, and their classes do not belong together."""
    label_column, templates = entry["label_column"], entry.get("templates", TEMPLATES)
    image_column = entry.get("image_column", "image")
    whole = ZeroShotTest(test, image_column, label_column, entry.get("class_names"), templates=templates)
    require_columns(train, "The training part", image_column=image_column, label_column=label_column)
    labels, test_labels = whole.labels(train), whole.labels(test)
    numbered = train.select_columns([image_column]).add_column(label_column, labels.tolist())
    pairs = class_pairs(
        numbered, label_column, templates[:1], class_names=whole.names, caption_column=columns[1],
        pair_id_column=columns[2],
    )  # fmt: skip
    pairs = pairs.remove_columns(sorted({label_column, columns[2]} - set(columns[:2])))
    pairs = pairs.add_column(columns[2], (labels + first_id).tolist())
    pairs = _renamed(pairs, {image_column: columns[0]}, columns[0])
    for name, classes in _groups(entry, len(whole.names)):
        rows, test_rows = (np.flatnonzero(np.isin(part, classes)) for part in (labels, test_labels))
        if len(rows) == 0 or len(test_rows) == 0:
            raise ValueError(f"classes {min(classes)} to {max(classes)} have no rows in train or test.")
        own = test if len(test_rows) == len(test) else test.select(test_rows)
        names = entry.get("class_names") or (None if own is test else whole.names)
        found = ZeroShotTest(own, image_column, label_column, names, learned_at=name, templates=templates)
        yield Phase(name, pairs if len(rows) == len(pairs) else pairs.select(rows)), {name: found}


def _groups(entry: Mapping[str, Any], classes: int) -> Iterator[tuple[str, range]]:
    """Name and class numbers of each phase."""
    size = entry.get("classes_per_phase", classes)
    starts = [0, *range(entry.get("first_classes", size), classes, size)]
    for number, (start, end) in enumerate(pairwise([*starts, classes]), start=1):
        yield entry["name"] if len(starts) == 1 else f"{entry['name']} {number}", range(start, end)


def _of_captions(
    entry: Mapping[str, Any], train: Dataset, test: Dataset | None, columns: tuple[str, str, str]
) -> Made:
    names = {entry.get("image_column", "image"): columns[0], entry.get("caption_column", "caption"): columns[1]}
    image, caption = names
    require_columns(train, "The training part", image_column=image, caption_column=caption)
    parts = parts_of(entry, train, test)
    pairs = _renamed(train.select_columns(list(names)), names, columns[0])
    shared = None if test is None else RetrievalTest(test, image, caption)
    for part in parts:
        name = entry["name"] if len(parts) == 1 else f"{entry['name']} {part.name}"
        rows = pairs if len(parts) == 1 else pairs.select(part.rows)
        if shared is None:
            yield hold_out(name, rows, entry.get("test_fraction", 0), seed=0), {}
        elif len(parts) == 1:
            yield Phase(name, rows, shared.with_columns(*columns)), {}
        elif part.test_rows is not None:
            own = shared.with_columns(*columns).select(part.test_rows) if len(part.test_rows) else None
            yield Phase(name, rows, own), {}
        else:
            yield Phase(name, rows), {entry["name"]: replace(shared, learned_at=name)} if part is parts[0] else {}


def _renamed(table: Dataset, names: Mapping[str, str], image_column: str) -> Dataset:
    changed = {old: new for old, new in names.items() if old != new}
    return with_images(table.rename_columns(changed) if changed else table, image_column)
