"""Distillation on reference images and texts that have nothing to do with each other."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .contrastive import full_precision, upcast


class ReferenceDistillation(NamedTuple):
    """What `reference_distillation` returns.

    Attributes:
        image: scalar, the image-to-text direction.
        text: scalar, the text-to-image direction.
    """

    image: Tensor
    text: Tensor


def reference_distillation(
    image_embeds: Tensor,
    text_embeds: Tensor,
    teacher_image_embeds: Tensor,
    teacher_text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    temperature: float = 2.0,
) -> ReferenceDistillation:
    """The distillation of ZSCL (Zheng et al., ICCV 2023, as in the authors' code).

    With `A = s V L^T` of the student and `A' = s V' L'^T` of the teacher, the image-to-text direction is
    `T^2 mean_i CE(A_i / T, softmax(A'_i / T))`, a mean over the rows of the images; text-to-image is the same on the
    transposed matrices, a mean over the texts. CE is the cross-entropy with soft targets: its gradient is that of the
    KL divergence, its value higher by the teacher's entropy.

    Args:
        image_embeds: (E, D), unit-norm rows, the student's; take gradient.
        text_embeds: (M, D), unit-norm rows; take gradient. In the authors' code these are the teacher's, so that the
            student's text tower is not distilled.
        teacher_image_embeds: (E, D'), unit-norm rows, of the same images.
        teacher_text_embeds: (M, D'), unit-norm rows, of the same texts.
        logit_scale: s, already exponentiated, > 0, of both sides.
        temperature: T, > 0.

    Raises:
        ValueError: the two models have embedded different numbers of images or texts, or none; or their widths differ
            where text embeddings of the one meet images of the other.
    """
    _check(image_embeds, text_embeds, teacher_image_embeds, teacher_text_embeds, temperature)
    with full_precision(image_embeds):
        student = logit_scale * upcast(image_embeds) @ upcast(text_embeds).T
        teacher = logit_scale * upcast(teacher_image_embeds) @ upcast(teacher_text_embeds).T
        return ReferenceDistillation(
            _soft_cross_entropy(student, teacher, temperature), _soft_cross_entropy(student.T, teacher.T, temperature)
        )


def _soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    targets = (teacher.detach() / temperature).softmax(dim=1)
    return temperature**2 * F.cross_entropy(student / temperature, targets)


def _check(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, temperature: float) -> None:
    shapes = f"{tuple(image.shape)}, {tuple(text.shape)}, {tuple(teacher_image.shape)}, {tuple(teacher_text.shape)}"
    if len(image) != len(teacher_image) or len(text) != len(teacher_text) or len(image) == 0 or len(text) == 0:
        raise ValueError(f"Both models must embed the same images and texts, at least one of each; got {shapes}.")
    if image.shape[1] != text.shape[1] or teacher_image.shape[1] != teacher_text.shape[1]:
        raise ValueError(f"Images and texts that are compared must be embedded in one width; got {shapes}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
