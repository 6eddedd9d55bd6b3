"""Retrieval across phases: what one model has indexed, asked by another one."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..index import IndexAlignment
from ..losses.contrastive import full_precision
from .encoding import EncodedPairs
from .retrieval import RECALL_AT, retrieval_metrics

PREFIX = "cross_phase_"
CROSS_PHASE_METRICS = tuple(
    f"{PREFIX}{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in RECALL_AT
)


def cross_phase_metrics(index: EncodedPairs, queries: EncodedPairs, *, sharded: bool = False) -> dict[str, float]:
    """Recall of an index under one model with queries under another, with the ranks of `retrieval_ranks`.

    Args:
        index: a test set under the model that was there when it was indexed: its images are what texts ask for, its
            captions what images ask for.
        queries: the same test set under the model that asks now.
        sharded: every process calls with the same embeddings, each compares its share.

    Returns:
        `CROSS_PHASE_METRICS`, fractions in [0, 1]; those of `retrieval_metrics` where both are of one model.

    Raises:
        ValueError: other samples, or embeddings of different widths.
    """
    if index.image.shape[1] != queries.image.shape[1] or not torch.equal(
        index.image_ids.cpu(), queries.image_ids.cpu()
    ):
        raise ValueError(
            f"An index of {len(index.image)} images of width {index.image.shape[1]} cannot be asked with the "
            f"{len(queries.image)} of width {queries.image.shape[1]}: the same samples in one width are needed."
        )
    with full_precision(index.image):
        of_texts = retrieval_metrics(index.image, queries.text, index.image_ids, queries.text_ids, sharded=sharded)
        of_images = retrieval_metrics(queries.image, index.text, queries.image_ids, index.text_ids, sharded=sharded)
    found = {"text_to_image": of_texts, "image_to_text": of_images}
    names = [name.removeprefix(PREFIX) for name in CROSS_PHASE_METRICS]
    return {f"{PREFIX}{name}": found[name.partition("_recall")[0]][name] for name in names}


def index_recalls(
    old: EncodedPairs, new: EncodedPairs, of_images: IndexAlignment, of_texts: IndexAlignment, *, sharded: bool = False
) -> dict[str, dict[str, float]]:
    """What is lost by keeping an index when the model changes: `cross_phase_metrics` by the names

    - `before`: the old model asks its own index,
    - `stale`: the new model asks the old index,
    - `realigned`: the new model asks the old index turned,
    - `rebuilt`: the new model asks its own index.

    Args:
        old, new: a test set under the two models.
        of_images, of_texts: the maps for an index of images and for one of texts, fitted on other samples than these
            (see `fit_alignments`).
        sharded: see `cross_phase_metrics`.
    """
    turned = replace(old, image=of_images.turn_index(old.image), text=of_texts.turn_index(old.text))
    asked = {"before": (old, old), "stale": (old, new), "realigned": (turned, new), "rebuilt": (new, new)}
    return {name: cross_phase_metrics(*models, sharded=sharded) for name, models in asked.items()}


def fit_alignments(old: Sequence[EncodedPairs], new: Sequence[EncodedPairs]) -> tuple[IndexAlignment, IndexAlignment]:
    """The map of an index of images and that of an index of texts, each fitted on all samples of these sets.

    Raises:
        ValueError: see `IndexAlignment.fit`.
    """
    images, texts = (
        [torch.cat([getattr(pairs, side) for pairs in sets]) for sets in (old, new)] for side in ("image", "text")
    )
    return IndexAlignment.fit(*images), IndexAlignment.fit(*texts)
