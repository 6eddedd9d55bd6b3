"""A bound on the length of weights."""

import logging

import torch
from torch import Tensor, nn

from ..trained_weights import adapted_layers
from .base import LossCallback, PhaseBoundary

logger = logging.getLogger(__name__)


class WeightNormClip(LossCallback):
    """Clip the Frobenius norm of every weight matrix to its norm at the start of the phase, after each optimizer step:
    `W <- W min(1, ||W_start|| / ||W||)`, which keeps its direction and bounds its length (after Yan et al., IncCLIP,
    ECCV 2022; which weights it concerns is our reading).

    Embedding tables, vectors and scalars are left alone, and so are matrices that start at zero. So are the factors of
    a LoRA adapter, of which neither is a weight of the model: there is then nothing to clip, and a warning says so.
    """

    def __init__(self):
        self._bounds: dict[str, Tensor] = {}

    def start_phase(self, phase: PhaseBoundary) -> None:
        norms = {name: matrix.detach().norm() for name, matrix in weight_matrices(phase.model).items()}
        self._bounds = {name: norm for name, norm in norms.items() if norm > 0}
        if not self._bounds:
            logger.warning(
                "The model has no weight matrix to clip: with a LoRA adapter this part of IncCLIP does nothing."
            )

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        matrices = weight_matrices(model)
        for name, bound in self._bounds.items():
            matrices[name].mul_((bound / matrices[name].norm()).clamp(max=1))


def weight_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights with two dimensions or more, by name, that belong to no embedding table and no adapter."""
    factors = {id(parameter) for layer in adapted_layers(model).values() for parameter in layer.parameters()}
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.ndim >= 2 and id(parameter) not in factors
    }
