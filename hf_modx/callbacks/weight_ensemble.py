"""The mean of the weights along the way."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..trained_weights import set_trained_weights, trained_weights
from .base import LossCallback, PhaseBoundary


class WeightEnsemble(LossCallback):
    """The uniform mean of the weights along a phase, which is what the phase leaves (Zheng et al., "Preventing
    Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models", ICCV 2023, details as in the
    authors' code).

    The mean begins with the weights at the start of the phase; after the optimizer steps number 0, every, 2 every, ...
    the weights join it: `mean <- (n mean + theta) / (n + 1)` for the n-th of them. Training itself goes on from the
    weights as they are, and an evaluation in the middle of a phase sees those; the mean is what is saved, evaluated
    and learned on from at its end.

    With a LoRA adapter the mean is over the weights with its change added. No adapter of its rank holds that: the mean
    is left in the base, and the adapter becomes zero.

    Args:
        every: optimizer steps between two that join, >= 1. 100 in the authors' code for 1,000 steps a phase, 10 in
            their class-incremental one.

    Raises:
        ValueError: with `load_best_model_at_end`, whose weights would be thrown away.
    """

    owns_weights = True
    needs_merge = True

    def __init__(self, every: int = 100):
        if every < 1:
            raise ValueError(f"Weights join the ensemble every so many steps, at least 1, got {every}.")
        self.every = every
        self._mean: dict[str, Tensor] = {}
        self._joined = 0

    @torch.no_grad()
    def start_phase(self, phase: PhaseBoundary) -> None:
        if phase.args.load_best_model_at_end:
            raise ValueError(
                "WeightEnsemble leaves a mean of weights, not the best ones: unset load_best_model_at_end."
            )
        self._mean = {name: weight.detach().clone() for name, weight in trained_weights(phase.model).items()}
        self._joined = 0

    @torch.no_grad()
    def on_step_end(self, args, state, control, model: nn.Module = None, **kwargs):
        if (state.global_step - 1) % self.every != 0:
            return
        self._joined += 1
        for name, weight in trained_weights(model).items():
            mean = self._mean[name].to(weight.device)
            self._mean[name] = (self._joined * mean + weight) / (self._joined + 1)

    @torch.no_grad()
    def finish_phase(self, phase: PhaseBoundary) -> None:
        set_trained_weights(phase.model, self._mean)
        self._mean = {}

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._mean, "joined": torch.tensor(self._joined)} if self._mean else {}

    def weights_in_state(self, model: nn.Module) -> Iterable[Tensor]:
        return trained_weights(model).values()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._mean = dict(state)
        self._joined = int(self._mean.pop("joined", 0))
