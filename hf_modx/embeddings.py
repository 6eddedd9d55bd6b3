"""One way to embed pairs with any dual encoder of transformers.

What the architectures differ in stands here: which inputs they take, how long captions are and how they are padded,
and what their loss has beside the cosines.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
TEXT_INPUTS = ("input_ids", "attention_mask")
# They pool the last place of the context, whatever stands there: they learned from captions padded to the full length.
POOLED_AT_THE_LAST_PLACE = ("siglip_text_model", "siglip2_text_model")


@dataclass(frozen=True)
class PairEmbeddings:
    """A batch of N pairs as a dual encoder sees it.

    Attributes:
        image: (N, D), unit-norm rows.
        text: (N, D), unit-norm rows; row i belongs to image i.
        logit_scale: scalar, the factor on the cosines (already exponentiated).
        logit_bias: scalar, what is added to the scaled cosines in the sigmoid loss; None where the model is not made
            for that loss.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None


def check_dual_encoder(model: nn.Module) -> None:
    """Raise a TypeError if the model cannot embed images and texts into one space like `CLIPModel`."""
    missing = [name for name in ("get_image_features", "get_text_features", "logit_scale") if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(model).__name__} is no dual encoder: it has no {', '.join(missing)}. Give a model with an image "
            "and a text tower in one space, for instance CLIPModel.from_pretrained(...)."
        )


def logit_scale_of(dual_encoder: nn.Module) -> float:
    """The factor on the cosines."""
    return dual_encoder.logit_scale.detach().exp().item()


def longest_caption(dual_encoder: nn.Module, tokenizer: Any) -> int | None:
    """Tokens that both the tokenizer and the model's position embeddings allow."""
    places = getattr(dual_encoder.config.get_text_config(), "max_position_embeddings", None)
    table = getattr(getattr(dual_encoder.text_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if places is not None and padding is not None:
        places -= padding + 1  # RoBERTa and its kin begin behind the place of the padding
    limits = (tokenizer.model_max_length, places)
    return min((limit for limit in limits if limit is not None), default=None)


def caption_padding(dual_encoder: nn.Module) -> str:
    """How the text tower wants captions padded: to the "longest" of a batch or, as SigLIP, to "max_length"."""
    is_full = dual_encoder.config.get_text_config().model_type in POOLED_AT_THE_LAST_PLACE
    return "max_length" if is_full else "longest"


def embedding_width(dual_encoder: nn.Module) -> int:
    """D of the embeddings."""
    width = getattr(dual_encoder.config, "projection_dim", None)
    return width if width is not None else dual_encoder.config.get_text_config().projection_size  # SigLIP


def image_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an image tower reads of a batch: `pixel_values`, of SigLIP 2 also `pixel_attention_mask` and
    `spatial_shapes`."""
    return {name: batch[name] for name in IMAGE_INPUTS if name in batch}


def text_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a text tower reads of a batch: `input_ids` and, where the tokenizer gives one, `attention_mask`."""
    return {name: batch[name] for name in TEXT_INPUTS if name in batch}


def pair_embeddings(dual_encoder: nn.Module, image: Tensor, text: Tensor) -> PairEmbeddings:
    """Embeddings with the model's own scale and bias, which take gradient."""
    bias = getattr(dual_encoder, "logit_bias", None)
    return PairEmbeddings(
        image, text, dual_encoder.logit_scale.exp().reshape(()), bias.reshape(()) if bias is not None else None
    )


def embed_pairs(
    model: nn.Module, dual_encoder: nn.Module, batch: Mapping[str, Tensor], token_embeds: Tensor | None = None
) -> PairEmbeddings:
    """Embed a batch of pairs in one forward pass.

    Args:
        model: the module to call, possibly wrapped for distributed training or mixed precision.
        dual_encoder: the same model unwrapped; gives the logit scale.
        batch: `image_inputs` and `text_inputs` of N images and N texts; what else is in it is not read.
        token_embeds: (M, L, H) with L <= T: texts given as token embeddings. The batch then has `token_embeds_row`
            (N,) too: which of them each text is, or -1 if it is to be read by its ids.
    """
    inputs = {**image_inputs(batch), **text_inputs(batch)}
    given = nullcontext()
    if token_embeds is not None:
        given = given_token_embeds(dual_encoder, token_embeds, batch["token_embeds_row"])
    with given:
        outputs = model(**inputs)
    return pair_embeddings(dual_encoder, outputs.image_embeds, outputs.text_embeds)


@contextmanager
def given_token_embeds(dual_encoder: nn.Module, token_embeds: Tensor, rows: Tensor) -> Iterator[None]:
    """A context in which the text tower reads some texts as given token embeddings. Their ids still say where a text
    ends, which is where CLIP pools it; position embeddings are added as to any text.

    Not every text tower takes `inputs_embeds`: the output of the embedding table is replaced.

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


def embed_images(dual_encoder: nn.Module, pixel_values: Tensor, **more: Tensor) -> Tensor:
    """The `image_inputs` of N images to unit-norm (N, D)."""
    features = dual_encoder.get_image_features(pixel_values=pixel_values, **more)
    return F.normalize(features.pooler_output.float(), dim=-1)


def vision_features(dual_encoder: nn.Module, pixel_values: Tensor, **more: Tensor) -> Tensor:
    """What the vision tower says of N images before the projection into the common space, (N, H)."""
    return dual_encoder.vision_model(pixel_values=pixel_values, **more).pooler_output


def embed_texts(dual_encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The `text_inputs` of N texts to unit-norm (N, D)."""
    features = dual_encoder.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(features.pooler_output.float(), dim=-1)
