"""A dual encoder with its processor, from a folder or from the Hub."""

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoProcessor

from .data import check_processor
from .embeddings import check_dual_encoder


def split_revision(model: str) -> tuple[str, str | None]:
    """`NAME@REVISION` to both; a folder that is there is a folder, whatever its name."""
    if os.path.exists(model):
        return model, None
    name, at, revision = model.rpartition("@")
    return (name, revision) if at else (model, None)


def load_dual_encoder(
    model: str, device: torch.device | str = "cpu", dtype: torch.dtype | str = torch.float32
) -> tuple[nn.Module, Any]:
    """The model in evaluation mode, and its processor.

    Args:
        model: a folder, or an id on the Hub, with `@REVISION` where it is not the main branch.
        device: where the model goes.
        dtype: of its weights; "auto": as they are stored.

    Raises:
        OSError: there is no such model.
        TypeError: it is no dual encoder, or its processor has no image processor or no tokenizer.
    """
    name, revision = split_revision(model)
    encoder = AutoModel.from_pretrained(name, revision=revision, dtype=dtype)
    check_dual_encoder(encoder)
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    check_processor(processor)
    return encoder.eval().to(device), processor
