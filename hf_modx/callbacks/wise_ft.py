"""Between the weights before a phase and those after it."""

import torch

from ..trained_weights import adapted_layers, out_factor, set_trained_weights, trained_weights
from .base import LossCallback, PhaseBoundary


class WiseFT(LossCallback):
    """At the end of a phase `theta <- (1 - weight) theta0 + weight theta`, theta0 being the weights at its start; the
    mixture is what is saved, evaluated and learned on from (Wortsman et al., "Robust fine-tuning of zero-shot models",
    CVPR 2022; there once, here in every phase).

    With a LoRA adapter this is `W + weight s B A`: the adapter keeps that part of the change that it makes.

    Args:
        weight: of the new weights, in [0, 1]; 0 keeps the old, 1 is plain fine-tuning.
    """

    needs_phase_start = True
    owns_weights = True

    def __init__(self, weight: float = 0.5):
        if not 0 <= weight <= 1:
            raise ValueError(f"The weight of WiseFT must be in [0, 1], got {weight}.")
        self.weight = weight

    def start_phase(self, phase: PhaseBoundary) -> None:
        if any(out_factor(layer).any() for layer in adapted_layers(phase.model).values()):
            raise ValueError(
                "WiseFT goes back to the weights at the start of a phase, which an adapter that has learned before is "
                "no part of. Merge it, model.merge_and_unload(), and train a fresh one."
            )

    @torch.no_grad()
    def finish_phase(self, phase: PhaseBoundary) -> None:
        layers = adapted_layers(phase.model)
        for layer in layers.values():
            out_factor(layer).mul_(self.weight)
        others = {name: weight for name, weight in trained_weights(phase.model).items() if name not in layers}
        mixed = {
            name: (1 - self.weight) * phase.phase_start[name] + self.weight * weight for name, weight in others.items()
        }
        set_trained_weights(phase.model, mixed)
