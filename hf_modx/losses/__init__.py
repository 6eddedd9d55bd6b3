"""Losses as pure functions of embeddings: no model, no Trainer, no process group."""

from .affinity import Shard
from .anchor import anchor_loss
from .contrastive import info_nce
from .contrastive_distillation import contrastive_distillation
from .distillation import AffinityDistillation, affinity_distillation
from .modx import ModXLoss, modx_loss
from .sigmoid import sigmoid_loss

__all__ = [
    "AffinityDistillation",
    "ModXLoss",
    "Shard",
    "affinity_distillation",
    "anchor_loss",
    "contrastive_distillation",
    "info_nce",
    "modx_loss",
    "sigmoid_loss",
]
