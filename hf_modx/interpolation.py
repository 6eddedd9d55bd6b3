"""The straight line between the weights at the start of a phase and those that it has learned."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .teacher import ADAPTER
from .trained_weights import adapted_layers, out_factor, parameters_beside_adapters


def require_interpolation(model: nn.Module) -> None:
    """Raise a ValueError unless it can be gone back on to the model as it is now, before a phase: an adapter must be
    a fresh LoRA adapter of linear layers."""
    if any(out_factor(layer).any() for layer in adapted_layers(model).values()):
        raise ValueError(
            "The adapter has learned before, and the weights at the start of the phase are not those without it. "
            "Merge it, model.merge_and_unload(), and train a fresh one."
        )
    beside = [name for name in parameters_beside_adapters(model) if ADAPTER in name]
    if beside:
        raise ValueError(
            f"{beside[0]} belongs to an adapter whose effect on the weights is not in proportion to one of its "
            "factors (DoRA, embeddings, convolutions): it cannot be taken back in part. Train LoRA on linear layers."
        )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all trainable parameters; of an adapter these are its factors."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


class WeightInterpolation:
    """The models between the start of a phase and its end, one of which the model is made.

    With a LoRA adapter it is the line of what the adapter does: `W + w s B A`, for which B is multiplied by w. Where
    the base has taken up a part (`LossCallback.needs_merge`), it goes back to W along with it.

    Args:
        model: at the end of the phase; see `require_interpolation`.
        start: the `trained_weights` at its start, by name.
    """

    def __init__(self, model: nn.Module, start: Mapping[str, Tensor]):
        self._model, self._start = model, start
        layers = adapted_layers(model)
        self._bases = {name: layer.base_layer.weight for name, layer in layers.items()}
        self._base_ends = {
            name: base.detach().clone() for name, base in self._bases.items() if not torch.equal(base, start[name])
        }
        self._factors = [(out_factor(layer), out_factor(layer).detach().clone()) for layer in layers.values()]
        beside = parameters_beside_adapters(model)
        self._beside = [(weight, start[name], weight.detach().clone()) for name, weight in beside.items()]

    @torch.no_grad()
    def go_to(self, weight: float) -> None:
        """Make the model `(1 - weight) start + weight end`, exactly one of them at 0 and at 1."""
        for parameter, start, end in self._beside:
            parameter.copy_(torch.lerp(start, end, weight))
        for factor, end in self._factors:
            factor.copy_(weight * end)
        for name, end in self._base_ends.items():
            self._bases[name].copy_(torch.lerp(self._start[name], end, weight))

    @torch.no_grad()
    def go_back(self, weights: Mapping[str, Tensor]) -> None:
        """Make the model what it was in the phase when `snapshot` gave these weights."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
        for name in self._base_ends:
            self._bases[name].copy_(self._start[name])
