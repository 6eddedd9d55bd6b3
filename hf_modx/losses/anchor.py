"""Distance of a new model's embeddings to the old model's of the same pairs."""

from torch import Tensor

from .contrastive import check_pairs, full_precision, upcast


def anchor_loss(
    image_embeds: Tensor, text_embeds: Tensor, teacher_image_embeds: Tensor, teacher_text_embeds: Tensor
) -> Tensor:
    """`(1 / 2N) sum_i (|v_i - v'_i|^2 + |l_i - l'_i|^2)`: the mean squared distance, which is 2 - 2 cos, over both
    modalities.

    Args:
        image_embeds, text_embeds: (N, D), unit-norm rows of the new model; take gradient.
        teacher_image_embeds, teacher_text_embeds: (N, D), unit-norm rows of the old model on the same pairs; no
            gradient is computed for them.

    Returns:
        A scalar in [0, 4], in fp32 (fp64 for fp64 embeddings).

    Raises:
        ValueError: the embeddings are not four matrices of one shape.
    """
    check_pairs(image_embeds, text_embeds)
    check_pairs(teacher_image_embeds, teacher_text_embeds)
    if image_embeds.shape != teacher_image_embeds.shape:
        raise ValueError(
            f"Both models must embed the same pairs in one width, got {tuple(image_embeds.shape)} of the new and "
            f"{tuple(teacher_image_embeds.shape)} of the old model."
        )
    sides = ((image_embeds, teacher_image_embeds), (text_embeds, teacher_text_embeds))
    with full_precision(image_embeds):
        distances = [(upcast(new) - upcast(old.detach())).square().sum(dim=1).mean() for new, old in sides]
        return (distances[0] + distances[1]) / 2
