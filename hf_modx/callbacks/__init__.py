"""Loss callbacks: what a recipe is made of."""

from .base import LossCallback, LossContext, check_recipe
from .contrastive import Contrastive, Joint
from .logit_scale import LogitScaleClamp
from .modx import ModX

__all__ = ["Contrastive", "Joint", "LogitScaleClamp", "LossCallback", "LossContext", "ModX", "check_recipe"]
