"""Between the weights before a phase and those after it."""

import torch

from .base import LossCallback, PhaseBoundary


class WiseFT(LossCallback):
    """At the end of a phase `theta <- (1 - weight) theta0 + weight theta`, theta0 being the weights at its start; the
    mixture is what is saved, evaluated and learned on from (Wortsman et al., "Robust fine-tuning of zero-shot models",
    CVPR 2022; there once, here in every phase).

    Args:
        weight: of the new weights, in [0, 1]; 0 keeps the old, 1 is plain fine-tuning.
    """

    needs_phase_start = True
    owns_weights = True

    def __init__(self, weight: float = 0.5):
        if not 0 <= weight <= 1:
            raise ValueError(f"The weight of WiseFT must be in [0, 1], got {weight}.")
        self.weight = weight

    @torch.no_grad()
    def finish_phase(self, phase: PhaseBoundary) -> None:
        now = dict(phase.model.named_parameters())
        for name, start in phase.phase_start.items():
            now[name].copy_((1 - self.weight) * start + self.weight * now[name])
