"""What a checkpoint holds of a phase's training beside the model's own files and the Trainer's."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter import has_adapter
from ..callbacks import LossCallback
from ..callbacks.base import pack_states, unpack_states
from ..teacher import ADAPTER
from .callback_modules import CallbackModules

LOSS_CALLBACKS_NAME = "loss_callbacks.safetensors"
TRAINED_BESIDE_NAME = "trained_beside.safetensors"
"""In a checkpoint: what is trained and in none of the model's own files."""


def read_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Take all weights of a model without adapter back.

    The stock Trainer reads the file by its own names and goes on without what it does not find. `save_pretrained`
    writes other names than the model has, though, where those of a class were changed since (a ViT is one), which
    `from_pretrained` alone translates.

    Raises:
        RuntimeError: the checkpoint lacks some of them.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def write_loss_callbacks(callbacks: Sequence[LossCallback], path: str | os.PathLike) -> None:
    """Write the states of the loss callbacks to a safetensors file."""
    save_file(pack_states(callbacks), path)


def read_loss_callbacks(callbacks: Sequence[LossCallback], path: str | os.PathLike) -> None:
    """Give the loss callbacks their states back; where there is no such file, they become as new."""
    unpack_states(callbacks, load_file(path) if os.path.exists(path) else {})


def write_trained_beside(model: nn.Module, along: CallbackModules, checkpoint: Path) -> None:
    """Write the modules of the loss callbacks, and of a model with an adapter what is trained beside it."""
    beside = {**_beside_adapter(model), **along.state_dict()}
    if beside:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in beside.items()}
        save_file(tensors, checkpoint / TRAINED_BESIDE_NAME)


def read_trained_along(along: CallbackModules, checkpoint: str | os.PathLike) -> None:
    """Take the modules of the loss callbacks back.

    Raises:
        ValueError: the checkpoint lacks one of them.
    """
    wanted = along.state_dict()
    along.load_state_dict(_read(checkpoint, wanted) if wanted else {})


@torch.no_grad()
def read_beside_adapter(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Take back what is trained beside an adapter.

    Raises:
        ValueError: the checkpoint lacks some of it.
    """
    wanted = _beside_adapter(model)
    found = _read(checkpoint, wanted) if wanted else {}
    for name, weight in wanted.items():
        weight.copy_(found[name])


def _beside_adapter(model: nn.Module) -> dict[str, Tensor]:
    """Of a PEFT model the Trainer's checkpoints hold the adapter alone."""
    if not has_adapter(model):
        return {}
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad and ADAPTER not in name}


def _read(checkpoint: str | os.PathLike, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path = Path(checkpoint, TRAINED_BESIDE_NAME)
    found = load_file(path) if path.exists() else {}
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(
            f"{checkpoint} does not hold {', '.join(missing)}, which is trained: it is of another recipe. Start "
            "the phase anew, without this checkpoint."
        )
    return found
