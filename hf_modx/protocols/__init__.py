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
        parts: 5                           # contiguous; each is a phase
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..callbacks.classification import class_pairs
from ..evaluation.suite import EvaluationTest, RetrievalTest, ZeroShotTest
from ..files import read_yaml
from ..load_data import load_table, require_columns, with_images
from ..phases import Phase, PhaseStream
from ..prompts import TEMPLATES

FOLDER = Path(__file__).parent
PROTOCOLS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
KEYS = {"title", "source", "notes", "settings", "phases"}
OF_ALL = {"name", "dataset", "test_dataset", "config", "train_split", "test_split", "image_column"}
OF_LABELS = {"label_column", "templates", "class_names", "classes_per_phase"}
OF_CAPTIONS = {"caption_column", "parts"}


@dataclass(frozen=True)
class Protocol:
    """What a file of a protocol says.

    Attributes:
        title, source, notes: for people.
        settings: flags of the main example.
        phases: as in the file.
    """

    title: str
    source: str
    notes: tuple[str, ...]
    settings: dict[str, Any]
    phases: tuple[dict[str, Any], ...]

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
        all templates. Phases of captions have a retrieval test, their parts one together.

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
        for entry in self.phases:
            try:
                make = _of_labels if "label_column" in entry else _of_captions
                for phase, named in make(entry, *_tables(entry, data_root), columns):
                    phases.append(phase)
                    tests |= named
            except ValueError as error:
                raise ValueError(f"Phase {entry['name']!r} of the protocol: {error}") from error
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
    return Protocol(
        content.get("title", path.stem),
        content.get("source", ""),
        tuple(content.get("notes", ())),
        content.get("settings", {}),
        tuple(content["phases"]),
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
    if unknown:
        raise ValueError(f"{path}, phase {entry['name']!r}: there is no {', '.join(unknown)}; {sorted(known)} are.")


def _tables(entry: Mapping[str, Any], data_root: str | Path | None) -> tuple[Dataset, Dataset]:
    config = entry.get("config")
    test_source = entry.get("test_dataset", entry["dataset"])
    train = load_table(source_of(entry["dataset"], data_root), entry.get("train_split", "train"), config)
    return train, load_table(source_of(test_source, data_root), entry.get("test_split", "test"), config)


Made = Iterator[tuple[Phase, dict[str, EvaluationTest]]]


def _of_labels(entry: Mapping[str, Any], train: Dataset, test: Dataset, columns: tuple[str, str, str]) -> Made:
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
    pairs = _renamed(pairs.remove_columns({label_column} - set(columns)), {image_column: columns[0]}, columns[0])
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
    for number, start in enumerate(range(0, classes, size), start=1):
        name = entry["name"] if size >= classes else f"{entry['name']} {number}"
        yield name, range(start, min(start + size, classes))


def _of_captions(entry: Mapping[str, Any], train: Dataset, test: Dataset, columns: tuple[str, str, str]) -> Made:
    names = {entry.get("image_column", "image"): columns[0], entry.get("caption_column", "caption"): columns[1]}
    image, caption = names
    require_columns(train, "The training part", image_column=image, caption_column=caption)
    train = _renamed(train.select_columns(list(names)), names, columns[0])
    held_out = RetrievalTest(test, image, caption)
    number = entry.get("parts", 1)
    if number == 1:
        yield Phase(entry["name"], train, held_out.with_columns(*columns)), {}
        return
    for part, rows in enumerate(np.array_split(np.arange(len(train)), number), start=1):
        phase = Phase(f"{entry['name']} {part}", train.select(rows))
        yield phase, {entry["name"]: replace(held_out, learned_at=phase.name)} if part == 1 else {}


def _renamed(table: Dataset, names: Mapping[str, str], image_column: str) -> Dataset:
    changed = {old: new for old, new in names.items() if old != new}
    return with_images(table.rename_columns(changed) if changed else table, image_column)
