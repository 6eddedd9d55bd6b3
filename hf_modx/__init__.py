"""Continual fine-tuning of CLIP models, phase by phase, with Mod-X and its relatives."""

from .callbacks import Contrastive, LossCallback, LossContext, ModX
from .continual import ContinualRun
from .embeddings import PairEmbeddings
from .phases import Phase, PhaseStream
from .recipes import RECIPES, build_recipe
from .trainer import ModXTrainer
from .training_args import ModXTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "ContinualRun",
    "Contrastive",
    "LossCallback",
    "LossContext",
    "ModX",
    "ModXTrainer",
    "ModXTrainingArguments",
    "PairEmbeddings",
    "Phase",
    "PhaseStream",
    "build_recipe",
]
