"""A logit scale that is not trained."""

from .base import LossCallback, PhaseBoundary


class FixedLogitScale(LossCallback):
    """Do not train the logit scale, as the ZSCL code does not: the optimizer gets the other weights only."""

    def start_phase(self, phase: PhaseBoundary) -> None:
        phase.model.logit_scale.requires_grad_(False)
