"""Image-text retrieval: ranks and recall."""

import torch
from torch import Tensor

from ..losses.contrastive import upcast

RECALL_AT = (1, 5, 10)
ROUNDING = 8  # in units of the last place: equal vectors multiplied in another order differ by so much


def retrieval_ranks(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, *, tile: int = 1024
) -> Tensor:
    """Rank of each query's best matching candidate, 1 being the first.

    A candidate matches where its id is the query's. The rank is one plus the number of NOT matching candidates that
    are not strictly less similar than the best match: a tie (up to rounding) counts against the model, so that a
    collapsed model has no recall, and a similarity that is NaN counts as not less.

    Args:
        queries: (Q, D), unit-norm. candidates: (C, D), unit-norm.
        query_ids: (Q,) integers. candidate_ids: (C,) integers.
        tile: queries compared at once; bounds memory to tile x C similarities.

    Returns:
        (Q,) int64 in [1, C].

    Raises:
        ValueError: a query without a matching candidate.
    """
    ranks = []
    for start in range(0, len(queries), tile):
        cosines = upcast(queries[start : start + tile]) @ upcast(candidates).T
        rounding = ROUNDING * torch.finfo(cosines.dtype).eps
        matches = query_ids[start : start + tile, None] == candidate_ids[None, :]
        if not matches.any(dim=1).all():
            raise ValueError("A query has no matching candidate: the ids of images and captions do not fit.")
        best = cosines.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + (~(cosines < best - rounding) & ~matches).sum(dim=1))
    return torch.cat(ranks)


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor, text_ids: Tensor, *, tile: int = 1024
) -> dict[str, float]:
    """Recall in both directions and the mean reciprocal rank.

    Args:
        image_embeds: (N, D), unit-norm. text_embeds: (C, D), unit-norm; several captions an image are normal.
        image_ids: (N,). text_ids: (C,).

    Returns:
        `image_to_text_recall@1`, `@5`, `@10`, `image_to_text_mrr` (an image is right when ANY of its captions is that
        high), `text_to_image_recall@1`, ..., `text_to_image_mrr`; fractions in [0, 1].
    """
    directions = {
        "image_to_text": retrieval_ranks(image_embeds, text_embeds, image_ids, text_ids, tile=tile),
        "text_to_image": retrieval_ranks(text_embeds, image_embeds, text_ids, image_ids, tile=tile),
    }
    metrics = {}
    for name, ranks in directions.items():
        for k in RECALL_AT:
            metrics[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
        metrics[f"{name}_mrr"] = ranks.double().reciprocal().mean().item()
    return metrics
