"""What a run records of the model it starts from, of its data and of the machine: the facts of a model card."""

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..adapter import ADAPTER_CONFIG

PACKAGES = ("hf_modx", "transformers", "accelerate", "datasets", "torch")
HUB_DATASET = re.compile(
    r"https://(?:huggingface|hf)\.co/datasets/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([\w.-]+))?/?"
)


def model_source(name_or_path: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """Where a model loaded with `from_pretrained` comes from; what is not known is left out.

    Call it after loading, on one process: the commit is read from the Hub's cache, and the licence from the model's
    own card, which is downloaded where it is not cached. Nothing is raised where there is no card or no network.

    Returns:
        `name` (the repository, or the last part of a local path and nothing else of it); for a model from the Hub
        also `repo_id`, `revision` and `commit`; `is_adapter` where it is one; `licence`, `licence_name` and
        `licence_link` as its card states them.
    """
    name = os.fspath(name_or_path)
    if not is_hub_id(name):
        return {"name": Path(name).resolve().name, **_kind(Path(name)), **_licence(name, revision)}
    folder, commit = _cached_folder(name, revision), cached_commit(name, revision)
    source = {"name": name, "repo_id": name, "revision": revision, "commit": commit}
    kind = _kind(folder) if folder is not None else {}
    return {key: value for key, value in source.items() if value} | kind | _licence(name, commit or revision)


def adapter_base(model: Mapping[str, Any], repo_id: str | None) -> tuple[str, str | None]:
    """Where the model lies that the adapters of a run belong to, by name and revision: the Hub, as the start model of
    the run or, where that was an adapter or did not come from the Hub, as phase 0 of the run's own repository; else
    the folder `phase-0` beside the adapter's.

    Args:
        model: what `model_source` says of the start model.
        repo_id: where the run is published, if it is.
    """
    if "repo_id" in model and not model.get("is_adapter"):
        return model["repo_id"], model.get("commit", model.get("revision"))
    return (repo_id, "phase-0") if repo_id is not None else ("phase-0", None)


def is_hub_id(name: str) -> bool:
    """`namespace/name`, and no such path on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not os.path.exists(name)


def cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    """SHA of the commit that the Hub's cache holds for a revision of a model; None where it holds none."""
    folder = _cached_folder(repo_id, revision)
    return folder.parts[folder.parts.index("snapshots") + 1] if folder is not None else None


def _cached_folder(repo_id: str, revision: str | None) -> Path | None:
    """Where the Hub's cache holds the configuration of a model or of an adapter."""
    found = (try_to_load_from_cache(repo_id, file, revision=revision) for file in ("config.json", ADAPTER_CONFIG))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def _kind(folder: Path) -> dict[str, bool]:
    is_adapter = (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists()
    return {"is_adapter": True} if is_adapter else {}


def data_source(dataset: Dataset) -> dict[str, Any]:
    """What a data set says of itself; what it does not say is left out.

    Returns:
        `rows`, `description`, `licence`, `homepage`; `dataset_id` and `revision` where the homepage is that of a data
        set on the Hub; `split` and `config` where the table is the whole of a split and not a part cut out of it.
    """
    info = dataset.info
    source = {
        "rows": len(dataset),
        "description": info.description,
        # Of data sets put together; `datasets` separates them by empty lines.
        "licence": ", ".join(line.strip() for line in (info.license or "").splitlines() if line.strip()),
        "homepage": info.homepage,
    }
    if on_the_hub := HUB_DATASET.fullmatch(info.homepage or ""):
        source["dataset_id"], source["revision"] = on_the_hub.groups()
    split = str(dataset.split)
    if info.splits is not None and split in info.splits and info.splits[split].num_examples == len(dataset):
        source["split"], source["config"] = split, info.config_name
    return {key: value for key, value in source.items() if value}


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What a phase was trained with: `versions` of packages and Python, `device` by name, number of `processes`."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"versions": versions, "device": _device_name(device), "processes": processes}


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads a process"
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name(device) if name is not None else device.type


def _licence(name: str, revision: str | None) -> dict[str, str]:
    data = _card_data(name, revision)
    keys = {"licence": "license", "licence_name": "license_name", "licence_link": "license_link"}
    found = {ours: data.get(theirs) for ours, theirs in keys.items()} if data is not None else {}
    return {key: value for key, value in found.items() if isinstance(value, str) and value != "unknown"}


def _card_data(name: str, revision: str | None) -> ModelCardData | None:
    try:
        path = Path(name) / "README.md"
        if not os.path.exists(name):
            path = hf_hub_download(name, "README.md", revision=revision)
        return ModelCard.load(Path(path), ignore_metadata_errors=True).data
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError, yaml.YAMLError):
        return None
