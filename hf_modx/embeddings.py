"""One way to embed pairs with any dual encoder of transformers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

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


def longest_caption(dual_encoder: nn.Module, tokenizer: Any) -> int | None:
    """Tokens that both the tokenizer and the model's position embeddings allow."""
    config = dual_encoder.config.get_text_config()
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit is not None), default=None)


def embed_pairs(
    model: nn.Module, dual_encoder: nn.Module, batch: Mapping[str, Tensor], token_embeds: Tensor | None = None
) -> PairEmbeddings:
    """Embed a batch of pairs in one forward pass.

    Args:
        model: the module to call, possibly wrapped for distributed training or mixed precision.
        dual_encoder: the same model unwrapped; gives the logit scale.
        batch: `pixel_values` (N, C, H, W), `input_ids` and `attention_mask` (N, T).
        token_embeds: (M, L, H) with L <= T: texts given as token embeddings. The batch then has `token_embeds_row`
            (N,) too: which of them each text is, or -1 if it is to be read by its ids.
    """
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    given = nullcontext()
    if token_embeds is not None:
        given = given_token_embeds(dual_encoder, token_embeds, batch["token_embeds_row"])
    with given:
        outputs = model(**inputs)
    return PairEmbeddings(outputs.image_embeds, outputs.text_embeds, dual_encoder.logit_scale.exp())


@contextmanager
def given_token_embeds(dual_encoder: nn.Module, token_embeds: Tensor, rows: Tensor) -> Iterator[None]:
    """A context in which the text tower reads some texts as given token embeddings. Their ids still say where a text
    ends, which is where it is pooled; position embeddings are added as to any text.

    CLIP's text tower takes no `inputs_embeds`: the output of its embedding table is replaced.

    Args:
        dual_encoder: unwrapped.
        token_embeds: (M, L, H); takes gradient.
        rows: (N,) int64, for each text of the forward pass which of the M it is, or -1 to be read by its ids.
    """

    def replace(table: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
        chosen = rows >= 0
        replaced = embedded.clone()
        replaced[chosen, : token_embeds.shape[1]] = token_embeds[rows[chosen]].to(embedded.dtype)
        return replaced

    handle = token_table(dual_encoder).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def token_table(dual_encoder: nn.Module) -> nn.Module:
    """The embedding table of the text tower's tokens."""
    return dual_encoder.text_model.get_input_embeddings()


def embed_images(dual_encoder: nn.Module, pixel_values: Tensor) -> Tensor:
    """(N, C, H, W) to unit-norm (N, D)."""
    return F.normalize(dual_encoder.get_image_features(pixel_values=pixel_values).pooler_output.float(), dim=-1)


def embed_texts(dual_encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(N, T) to unit-norm (N, D)."""
    features = dual_encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(features.pooler_output.float(), dim=-1)
