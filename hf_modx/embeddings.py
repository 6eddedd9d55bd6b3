"""One way to embed pairs with any dual encoder of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PairEmbeddings:
    """A batch of N pairs as a dual encoder sees it.

    Attributes:
        image: (N, D), unit-norm rows.
        text: (N, D), unit-norm rows; row i belongs to image i.
        logit_scale: scalar, the factor on the cosines (already exponentiated).
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor


def check_dual_encoder(model: nn.Module) -> None:
    """Raise a TypeError if the model cannot embed images and texts into one space like `CLIPModel`."""
    missing = [name for name in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} is no dual encoder: it has no {', '.join(missing)}. Give a model with an image "
            "and a text tower in one space, for instance CLIPModel.from_pretrained(...)."
        )
    if hasattr(model, "logit_bias"):
        raise TypeError(f"{type(model).__name__} is made for the sigmoid loss, which this version does not have.")


def embed_pairs(model: nn.Module, dual_encoder: nn.Module, batch: Mapping[str, Tensor]) -> PairEmbeddings:
    """Embed a batch of pairs in one forward pass.

    Args:
        model: the module to call, possibly wrapped for distributed training or mixed precision.
        dual_encoder: the same model unwrapped; gives the logit scale.
        batch: `pixel_values` (N, C, H, W), `input_ids` and `attention_mask` (N, T).
    """
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    outputs = model(**inputs)
    return PairEmbeddings(outputs.image_embeds, outputs.text_embeds, dual_encoder.logit_scale.exp())


def embed_images(dual_encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """(N, C, H, W) to unit-norm (N, D)."""
    return F.normalize(dual_encoder.get_image_features(pixel_values=pixel_values).pooler_output.float(), dim=-1)


def embed_texts(dual_encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, T) to unit-norm (N, D)."""
    features = dual_encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(features.pooler_output.float(), dim=-1)
