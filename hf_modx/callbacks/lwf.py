"""Learning without forgetting."""

from torch import Tensor

from ..embeddings import PairEmbeddings
from ..losses import affinity_distillation
from .base import LossCallback, LossContext


class LwF(LossCallback):
    """Keep the old model's answers to the new data, right or wrong: unscreened distillation of the logits (after Li
    and Hoiem, "Learning without Forgetting", ECCV 2016; the logits of a dual encoder are its scaled cosines).

    `weight * T^2 * mean_i KL(softmax(s' M'_i / T) || softmax(s M_i / T))`, the mean also over both directions, with M
    the cosines of the batch under the new and M' under the old model, s and s' each model's own logit scale, T the
    temperature. What the paper leaves open for image-text pairs is our reading: both directions, a mean over rows, and
    the factor T^2 of Hinton et al., with which the pull does not fade with T.

    Args:
        weight: >= 0.
        temperature: T, > 0; 2 in the paper.
        chunk_size: rows of the similarity matrices held at once; None chooses.

    Logs `lwf` (weighted).
    """

    needs_teacher = True

    def __init__(self, weight: float = 1.0, temperature: float = 2.0, chunk_size: int | None = None):
        if weight < 0:
            raise ValueError(f"The weight of LwF must not be negative, got {weight}.")
        if not temperature > 0:
            raise ValueError(f"The temperature of LwF must be positive, got {temperature}.")
        self.weight = weight
        self.temperature = temperature
        self.chunk_size = chunk_size

    def loss_terms(
        self, student: PairEmbeddings, teacher: PairEmbeddings | None, context: LossContext
    ) -> dict[str, Tensor]:
        # One factor serves both models in the loss: the student's embeddings carry what its scale has more than the
        # teacher's, and with it the gradient of the scale.
        old_scale = float(teacher.logit_scale.detach())
        more = student.logit_scale / old_scale
        divergence = affinity_distillation(
            student.image * more,
            student.text,
            teacher.image,
            teacher.text,
            distill_scale=old_scale / self.temperature,
            reduction="mean",
            screen=False,
            chunk_size=self.chunk_size,
            **context.relations,
        ).loss
        return {"lwf": self.weight * self.temperature**2 * divergence}
