"""The weights that training changes, whether the parameters of the model or a low-rank change of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."  # of every name inside a PeftModel


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name and with gradient.

    Of a layer with a LoRA adapter (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022) that is
    `W + s B A` by the name of W in the model without the adapter: A and B of two adapters are no more comparable than
    their initial A is, what they do to W is. Of all else, and of adapters of other kinds, it is the trainable
    parameters themselves.
    """
    found: dict[str, Tensor] = dict(parameters_beside_adapters(model))
    for name, layer in adapted_layers(model).items():
        found[name] = layer.base_layer.weight.detach() + layer.get_delta_weight(layer.active_adapters[0])
    return found


@torch.no_grad()
def set_trained_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make `trained_weights` these. Of a layer with an adapter the base takes them up and the adapter becomes zero: no
    adapter of its rank could hold them."""
    layers = adapted_layers(model)
    others = {_plain(name): parameter for name, parameter in model.named_parameters()}
    for name, weight in weights.items():
        if name in layers:
            layers[name].base_layer.weight.copy_(weight)
            out_factor(layers[name]).zero_()
        else:
            others[name].copy_(weight)


@contextmanager
def adapters_merged(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes as it will once its adapter is merged: in half precision `W + s B A` is
    rounded as one. Afterwards it is what it was, to the last bit."""
    layers = adapted_layers(model)
    before = {
        parameter: parameter.detach().clone()
        for layer in layers.values()
        for parameter in (layer.base_layer.weight, out_factor(layer))
    }
    try:
        set_trained_weights(model, {name: weight for name, weight in trained_weights(model).items() if name in layers})
        yield
    finally:
        for parameter, weight in before.items():
            parameter.data.copy_(weight)


@contextmanager
def leaves_of_trained_weights(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """A context in which a backward pass leaves the gradient of each of the `trained_weights` in a parameter; gives
    these by the same names. The gradient of `W + s B A` is that of W."""
    bases = {name: layer.base_layer.weight for name, layer in adapted_layers(model).items()}
    leaves = {**parameters_beside_adapters(model), **bases}
    for base in bases.values():
        base.requires_grad_(True)
    try:
        yield leaves
    finally:
        for base in bases.values():
            base.requires_grad_(False)
            base.grad = None


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's linear layers with one LoRA adapter that is trained, by the name of their weight without the adapter."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import Linear

    return {
        f"{_plain(name)}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and _is_understood(module)
    }


def out_factor(layer: Any) -> nn.Parameter:
    """B of an adapted layer, which the change of its weight is proportional to."""
    return layer.lora_B[layer.active_adapters[0]].weight


def _is_understood(layer: Any) -> bool:
    """`W + s B A` is all that the layer does."""
    if len(layer.active_adapters) != 1 or layer.merged or type(layer.base_layer) is not nn.Linear:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_B or name in getattr(layer, "lora_variant", {}):  # DoRA and other variants
        return False
    return layer.lora_B[name].bias is None and layer.lora_B[name].weight.requires_grad


def parameters_beside_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters that belong to none of the `adapted_layers`."""
    inside = {
        id(parameter)
        for layer in adapted_layers(model).values()
        for factor in (layer.lora_A, layer.lora_B)
        for parameter in factor.parameters()
    }
    return {
        _plain(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in inside
    }


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX)
