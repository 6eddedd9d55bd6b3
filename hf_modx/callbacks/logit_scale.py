"""The bound on the logit scale."""

import torch
from transformers import TrainerCallback


class LogitScaleClamp(TrainerCallback):
    """Clamp the (logarithmic) `logit_scale` parameter after every optimizer step. Models with a sigmoid loss are left
    alone: they are trained without a bound. So is a scale that is not trained.

    Args:
        maximum: upper bound of the parameter; the lower is 0. 4.6052 = ln 100 in CLIP and in the Mod-X code.
    """

    def __init__(self, maximum: float):
        self.maximum = maximum

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if getattr(model, "logit_bias", None) is not None or not model.logit_scale.requires_grad:
            return
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, self.maximum)
