"""A stream of phases as a data set on the Hub: a split for each part, and `stream.json`, which says what each is."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from ..files import as_json
from ..markdown import escaped, table
from ..phases import TEST, TRAIN, Phase, PhaseStream
from ..run.provenance import data_source
from .faults import insist, limit_silence

LAYOUT = "stream.json"
HEADING = "# A stream of phases"
NOT_THERE = (RepositoryNotFoundError, RevisionNotFoundError)


class NotAStream(ValueError):
    """The data set on the Hub does not say which of its splits are phases."""


def push_stream(stream: PhaseStream, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """See `PhaseStream.push_to_hub`."""
    limit_silence()
    layout, splits = _layout(stream)
    features = {split: part.features for split, part in splits.items()}
    first, expected = next(iter(features.items()))
    for split, found in features.items():
        if found != expected:
            raise ValueError(
                f"The splits of a data set share their columns, but {split} has {found} and {first} {expected}."
            )
    return insist(lambda: _push(layout, splits, repo_id, private, token), secret=token)


def load_stream(repo_id: str, *, revision: str | None = None, token: str | None = None) -> PhaseStream:
    """See `PhaseStream.from_hub`."""
    limit_silence()
    api = HfApi(token=token)
    found = insist(lambda: api.dataset_info(repo_id, revision=revision), secret=token, final=NOT_THERE)
    # From here on by commit: what a cache holds of another one does not count.
    layout = insist(lambda: _read_layout(found.id, found.sha, token), secret=token)
    if layout is None:
        raise NotAStream(f"{repo_id} has no {LAYOUT}. PhaseStream.from_splits(load_dataset({repo_id!r})) may do.")
    splits = insist(lambda: load_dataset(found.id, revision=found.sha, token=token), secret=token)

    def part(split: str | None) -> Dataset | None:
        if split is None:
            return None
        dataset, source = splits[split], layout["sources"].get(split, {})
        dataset.info.homepage = f"https://huggingface.co/datasets/{found.id}/tree/{found.sha}"
        dataset.info.description, dataset.info.license = source.get("description", ""), source.get("licence", "")
        return dataset

    def phase(entry: dict[str, str | None]) -> Phase:
        return Phase(entry["name"], part(entry["train"]), part(entry["test"]))

    return PhaseStream(
        tuple(phase(entry) for entry in layout["phases"]),
        phase(layout["base"]) if layout["base"] is not None else None,
        {name: part(split) for name, split in layout["extra_tests"].items()},
        tuple(layout.get("union_tests", ())),
    )


def is_cached_stream(repo_id: str) -> bool:
    """Whether the Hub's cache holds what a data set says of its phases, of whatever commit."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="dataset")
    return any(folder.glob(f"snapshots/*/{LAYOUT}"))


def _layout(stream: PhaseStream) -> tuple[dict[str, Any], DatasetDict]:
    """What stream.json holds, and the parts under the names of their splits."""
    names = [phase.name for phase in stream.all_phases()] + list(stream.extra_tests)
    safe = dict(zip(names, _split_names(names), strict=True))
    splits = DatasetDict()

    def add(name: str, suffix: str, part: Dataset | None) -> str | None:
        if part is None:
            return None
        splits[safe[name] + suffix] = part
        return safe[name] + suffix

    def entry(phase: Phase) -> dict[str, str | None]:
        train = add(phase.name, TRAIN, phase.train)
        return {"name": phase.name, "train": train, "test": add(phase.name, TEST, phase.test)}

    layout = {
        "base": entry(stream.base) if stream.base is not None else None,
        "phases": [entry(phase) for phase in stream],
        "extra_tests": {name: add(name, TEST, part) for name, part in stream.extra_tests.items()},
        "union_tests": list(stream.union_tests),
        "sources": {split: data_source(part) for split, part in splits.items()},
    }
    return layout, splits


def _split_names(names: Iterable[str]) -> list[str]:
    """Letters, digits and underscores, as `datasets` wants them, and each once."""
    found: list[str] = []
    for name in names:
        safe = re.sub(r"\W+", "_", name).strip("_") or "phase"
        while safe in found:
            safe += "_"
        found.append(safe)
    return found


def _push(layout: dict[str, Any], splits: DatasetDict, repo_id: str, private: bool, token: str | None) -> str:
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    done = splits.push_to_hub(repo_id, private=private, token=token)
    readme = Path(hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=done.oid, token=token))
    card = DatasetCard(readme.read_text(encoding="utf-8"))
    files = {LAYOUT: as_json(layout)}
    if not card.text.strip() or card.text.lstrip().startswith(HEADING):  # else somebody has written a better one
        card.text = _description(layout, repo_id)
        files["README.md"] = str(card)
    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    api.create_commit(repo_id, operations, commit_message="Names and order of the phases", repo_type="dataset")
    return repo_id


def _read_layout(repo_id: str, commit: str, token: str | None) -> dict[str, Any] | None:
    try:
        path = hf_hub_download(repo_id, LAYOUT, repo_type="dataset", revision=commit, token=token)
    except LocalEntryNotFoundError:
        raise  # no answer
    except EntryNotFoundError:
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _description(layout: dict[str, Any], repo_id: str) -> str:
    roles = [("base", layout["base"])] if layout["base"] is not None else []
    roles += [(f"phase {number}", entry) for number, entry in enumerate(layout["phases"], start=1)]
    rows = [(role, entry["name"], entry[part]) for role, entry in roles for part in ("train", "test") if entry[part]]
    rows += [("test alone", name, split) for name, split in layout["extra_tests"].items()]
    sources = layout["sources"]
    listing = table(
        ["used as", "name", "split", "pairs", "licence", "description"],
        [
            (
                role,
                escaped(name),
                escaped(split),
                str(sources[split]["rows"]),
                *(escaped(sources[split].get(key, "")) for key in ("licence", "description")),
            )
            for role, name, split in rows
        ],
    )
    return f"""
{HEADING}

Images with captions that arrive in portions, for continual learning with hf_modx.

{listing}

```python
from hf_modx import PhaseStream

stream = PhaseStream.from_hub("{repo_id}")
```
"""
