"""Zero-shot classification: images against the texts of classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..prompts import check_templates, class_prompts
from .encoding import Encoder
from .retrieval import retrieval_ranks

TOP = (1, 5)


def class_embeds(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One embedding a class: the mean of the unit-norm embeddings of its prompts, one a template, made unit-norm again
    (Radford et al., 2021, section 3.1.4, and the authors' prompt-engineering notebook).

    Returns:
        (K, D), unit-norm.

    Raises:
        ValueError: a template without a place for the name.
    """
    check_templates(templates)
    prompts = [prompt for name in class_names for prompt in class_prompts(name, templates)]
    embeds = encoder.text_embeds(prompts)
    return F.normalize(embeds.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)


def zero_shot_metrics(image_embeds: Tensor, class_embeds: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the class whose text is nearest to the image.

    A tie counts against the model, as in `retrieval_ranks`: classes with the same prompts are never told apart, and a
    collapsed model is never right.

    Args:
        image_embeds: (N, D), unit-norm. class_embeds: (K, D), unit-norm.
        labels: (N,) integers in [0, K).

    Returns:
        `zero_shot_top1`, `zero_shot_top5`: the share of images whose class is among the 1 or 5 nearest;
        `zero_shot_mean_per_class`: the mean of `per_class_top1` over the classes that occur. Fractions in [0, 1].

    Raises:
        ValueError: a label that is no class, or shapes that do not fit.
    """
    ranks = _ranks(image_embeds, class_embeds, labels)
    per_class = _per_class_top1(ranks, labels, len(class_embeds))
    return {
        **{f"zero_shot_top{k}": (ranks <= k).double().mean().item() for k in TOP},
        "zero_shot_mean_per_class": per_class[~per_class.isnan()].mean().item(),
    }


def per_class_top1(image_embeds: Tensor, class_embeds: Tensor, labels: Tensor) -> Tensor:
    """(K,) fp64: the share of each class's images for which the class is the nearest; NaN where it has no images.

    The arguments and errors are those of `zero_shot_metrics`.
    """
    return _per_class_top1(_ranks(image_embeds, class_embeds, labels), labels, len(class_embeds))


def _ranks(image_embeds: Tensor, class_embeds: Tensor, labels: Tensor) -> Tensor:
    numbers = torch.arange(len(class_embeds), device=class_embeds.device)
    return retrieval_ranks(image_embeds, class_embeds, labels, numbers)


def _per_class_top1(ranks: Tensor, labels: Tensor, classes: int) -> Tensor:
    labels = labels.to(ranks.device, torch.long)
    right = torch.bincount(labels, weights=(ranks == 1).double(), minlength=classes)
    return right / torch.bincount(labels, minlength=classes)
