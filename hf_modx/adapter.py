"""LoRA: the fresh adapter of a phase, and what becomes of it at the end.

A phase trains a fresh adapter on top of the model that it starts from. At its end the adapter is merged into that
model, or it stays apart: then the phase's folder holds ONE adapter of the model before the first phase, in which the
adapters of all phases up to this one lie side by side. With `A = [A_1; ...; A_k]` and `B = [B_1 ... B_k]` the sum of
their changes is `s B A` again, of k times the rank, so a reader needs the base and this folder and no phase between.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.peft_utils import find_adapter_config_file

from .files import read_json
from .training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCALES = ("logit_scale", "logit_bias")


def add_adapter(model: nn.Module, args: ModXTrainingArguments) -> nn.Module:
    """A fresh LoRA adapter on a dual encoder, as `args` describe it; all else is frozen. The same seed gives the same
    adapter, on every process.

    Returns:
        A `PeftModel`; the model itself is changed.

    Raises:
        ImportError: PEFT is missing.
        ValueError: the model has an adapter already, or `args.lora_targets` names no linear layer of it.
    """
    peft = load_peft()
    if has_adapter(model):
        raise ValueError(
            "The model has an adapter already: leave out peft to train that one, or give model.merge_and_unload()."
        )
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_targets(model, args.lora_targets),
    )
    with torch.random.fork_rng(devices=[]), _without_peft_warnings():
        # Weights are drawn on the CPU, wherever the model is.
        torch.default_generator.manual_seed(args.effective_data_seed)
        adapted = peft.get_peft_model(model, config)
    if args.train_logit_scale:
        for name in SCALES:
            if isinstance(getattr(model, name, None), nn.Parameter):
                getattr(model, name).requires_grad_(True)
    else:
        logger.info(
            "LoRA of rank %d: the logit scale stays at %.4g; train_logit_scale would train it.",
            args.lora_rank,
            model.logit_scale.detach().exp().item(),
        )
    return adapted


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter on the model."""
    return getattr(model, "peft_config", None) is not None


def merged(model: nn.Module) -> nn.Module:
    """The plain model with the adapter merged into its weights; the `PeftModel` is of no use any more."""
    plain = model.merge_and_unload()
    vars(plain).pop("peft_config", None)  # not every version of PEFT takes it away
    return plain


def save_adapter(
    model: nn.Module, folder: Path, before: Path | None, base: str, base_revision: str | None = None
) -> None:
    """Write the adapter of a phase on top of those of the phases before, for `PeftModel.from_pretrained`.

    Args:
        model: a `PeftModel` whose base is what the phase started from.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`. It must hold no `config.json`, or
            transformers would take it for a whole model and not load the base.
        before: folder that this function has written for what the phase started from; None: that was the base itself.
        base, base_revision: of the model before the first phase, for whoever loads the adapter.
    """
    peft = load_peft()
    own = {name: tensor.detach().cpu() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    earlier = load_file(before / ADAPTER_WEIGHTS) if before is not None else {}
    stacked = {name: _beside(earlier.get(name), tensor, name) for name, tensor in own.items()}
    config = copy.copy(model.peft_config["default"])
    rank = next(len(tensor) for name, tensor in stacked.items() if "lora_A" in name)
    config.r, config.lora_alpha = rank, config.lora_alpha * rank / config.r
    config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, base_revision, True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stacked, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)


def adapter_settings(name: str | os.PathLike, revision: str | None = None) -> dict[str, Any] | None:
    """What `adapter_config.json` holds where a folder or a repository on the Hub is an adapter; None for a model."""
    file = find_adapter_config_file(os.fspath(name), revision=revision)
    if file is None or (Path(name) / "config.json").exists():
        return None
    return read_json(Path(file))


def load_merged(base: nn.Module, adapter: str | os.PathLike, revision: str | None = None) -> nn.Module:
    """The base with the adapter of a folder, or of a repository on the Hub, merged into its weights."""
    peft = load_peft()
    with _without_peft_warnings():
        return merged(peft.PeftModel.from_pretrained(base, adapter, revision=revision))


def _beside(earlier: Tensor | None, own: Tensor, name: str) -> Tensor:
    if earlier is None:
        return own.contiguous()
    return torch.cat([earlier, own], dim=0 if "lora_A" in name else 1)


def load_peft() -> ModuleType:
    """PEFT, or an ImportError that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install 'hf_modx[peft]'") from error
    return peft


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """PEFT asks every model whether it checkpoints activations, by a name that transformers has given up."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _targets(model: nn.Module, chosen: str | None) -> list[str]:
    """Names of the layers that get an adapter."""
    linear = _linear_layers(model)
    if chosen is None:
        # The projections beside the towers are layers of the model itself.
        inside = [name for name in linear if "." in name]
        if not inside:
            raise ValueError(
                f"No linear layer found in the towers of {type(model).__name__}. Name some: lora_targets."
            )
        return inside
    targets = [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not targets:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"lora_targets: {type(model).__name__} has no linear layer {', '.join(unknown) or 'without a name'}. Its "
            f"linear layers are named {', '.join(known)}."
        )
    return targets


def _linear_layers(model: nn.Module) -> list[str]:
    """All but those inside torch's own attention, which reads their weights and does not call them."""
    attention = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(attention))
    ]
