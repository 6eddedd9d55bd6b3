"""Loss callbacks: what a recipe is made of."""

from .anchor import Anchor
from .base import BatchGradient, ExtraEmbeddings, LossCallback, LossContext, PhaseBoundary, check_budget, check_recipe
from .classification import Classification, class_pairs
from .contrastive import Contrastive, Cumulative, Joint
from .dark_replay import DarkExperienceReplay
from .data_wait import DataWait
from .ewc import EWC
from .fixed_logit_scale import FixedLogitScale
from .frozen import Frozen
from .incclip import IncCLIP
from .l2sp import L2SP
from .logit_scale import LogitScaleClamp
from .lwf import LwF
from .modx import ModX
from .projected_distillation import ProjectedDistillation
from .reference_distillation import ReferenceDistillation
from .replay import ExperienceReplay, replay_of
from .retention import RetentionBudget
from .weight_ensemble import WeightEnsemble
from .weight_norm_clip import WeightNormClip
from .wise_ft import WiseFT

__all__ = [
    "EWC",
    "L2SP",
    "Anchor",
    "BatchGradient",
    "Classification",
    "Contrastive",
    "Cumulative",
    "DarkExperienceReplay",
    "DataWait",
    "ExperienceReplay",
    "ExtraEmbeddings",
    "FixedLogitScale",
    "Frozen",
    "IncCLIP",
    "Joint",
    "LogitScaleClamp",
    "LossCallback",
    "LossContext",
    "LwF",
    "ModX",
    "PhaseBoundary",
    "ProjectedDistillation",
    "ReferenceDistillation",
    "RetentionBudget",
    "WeightEnsemble",
    "WeightNormClip",
    "WiseFT",
    "check_budget",
    "check_recipe",
    "class_pairs",
    "replay_of",
]
