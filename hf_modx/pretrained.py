"""A dual encoder with its processor, from a folder or from the Hub."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoProcessor

from .adapter import adapter_settings, load_merged
from .data import check_processor
from .embeddings import check_dual_encoder


def split_revision(model: str) -> tuple[str, str | None]:
    """`NAME@REVISION` to both; a folder that is there is a folder, whatever its name."""
    if os.path.exists(model):
        return model, None
    name, at, revision = model.rpartition("@")
    return (name, revision) if at else (model, None)


def load_model(
    name: str | os.PathLike, revision: str | None = None, dtype: torch.dtype | str = torch.float32
) -> nn.Module:
    """A model from a folder or from the Hub. An adapter is merged into its base, which may be a folder beside that of
    the adapter, as in a run."""
    adapter = adapter_settings(name, revision)
    if adapter is None:
        return AutoModel.from_pretrained(name, revision=revision, dtype=dtype)
    base, base_revision = adapter["base_model_name_or_path"], adapter.get("revision")
    beside = Path(name).resolve().parent / base
    if os.path.isdir(name) and beside.is_dir():
        base, base_revision = beside, None
    return load_merged(AutoModel.from_pretrained(base, revision=base_revision, dtype=dtype), name, revision)


def load_dual_encoder(
    model: str, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> tuple[nn.Module, Any]:
    """The model in evaluation mode, and its processor; see `load_model` for adapters.

    Args:
        model: a folder, or an id on the Hub, with `@REVISION` where it is not the main branch.
        device: where the model goes.
        dtype: of its weights; "auto": as they are stored.

    Raises:
        OSError: there is no such folder, or no such model on the Hub.
        ImportError: it is an adapter, and PEFT is missing.
        TypeError: it is no dual encoder, or its processor has no image processor or no tokenizer.
    """
    name, revision = split_revision(model)
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"There is no folder {name}, and an id on the Hub is NAME or OWNER/NAME.")
    encoder = load_model(name, revision, dtype)
    check_dual_encoder(encoder)
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    check_processor(processor)
    return encoder.eval().to(device), processor
