"""C-CLIP's contrastive knowledge consolidation."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embeddings import PairEmbeddings, embedding_width
from ..losses import contrastive_distillation
from ..losses.contrastive import full_precision, upcast
from ..trained_weights import adapted_layers
from .base import LossCallback, LossContext, PhaseBoundary

logger = logging.getLogger(__name__)


class ProjectedDistillation(LossCallback):
    """Contrastive knowledge consolidation: features of the new model, put through a projector that is trained along,
    have to find the old model's features of the same images and texts among those of the whole batch (Liu et al.,
    "C-CLIP: Multimodal Continual Learning for Vision-Language Model", ICLR 2025). The new features
    may move, as long as the old ones can be read off them.

    `weight * L(h(V), h(L), V', L')`, see `contrastive_distillation`, with h the projector, V and L the features of the
    model in training, V' and L' those of the old model.

    That an MLP projects the new features is the paper's; all else of it is our reconstruction: one h for both
    modalities, one hidden layer as wide as the features, ReLU, its output normalised, made anew in every phase. So is
    s, the old model's logit scale, without gradient.

    Args:
        weight: >= 0; 1 in the paper.
        chunk_size: rows of the similarity matrices held at once; None chooses.

    Logs `projected_distillation` (weighted). Warns where the student has no LoRA adapter, which is half of C-CLIP.
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0, chunk_size: int | None = None):
        if weight < 0:
            raise ValueError(f"The weight of ProjectedDistillation must not be negative, got {weight}.")
        self.weight = weight
        self.chunk_size = chunk_size
        self._projector: nn.Module | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"projector": self._projector} if self._projector is not None else {}

    def start_phase(self, phase: PhaseBoundary) -> None:
        if not adapted_layers(phase.model):
            logger.warning(
                "C-CLIP trains LoRA adapters, and this model has none: all of its weights are trained. Set "
                'peft="lora" for the method of the paper.'
            )
        seed = phase.args.effective_data_seed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            projector = _projector(embedding_width(phase.model))
        self._projector = projector.to(upcast(phase.model.logit_scale).dtype)

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        with full_precision(student.image):
            image, text = (
                F.normalize(self._projector(upcast(side)), dim=-1) for side in (student.image, student.text)
            )
        loss = contrastive_distillation(
            image,
            text,
            teacher.image,
            teacher.text,
            teacher.logit_scale.detach(),
            pair_ids=context.pair_ids,
            chunk_size=self.chunk_size,
            shard=context.shard,
        )
        return {"projected_distillation": self.weight * loss}


def _projector(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
