"""An index of embeddings that an older model has made, turned so that a newer model can ask it."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data.loading import require_columns
from .files import publish_file
from .losses.contrastive import full_precision

Index = TypeVar("Index", Tensor, np.ndarray, Dataset)

TILE = 4096
TOWARDS_IDENTITY = 1e-9
"""Of the largest singular value: what the pairs say nothing about is left as it is."""


@dataclass(frozen=True)
class IndexAlignment:
    """One orthogonal map from an old model's embeddings to a new model's: lengths, and angles within the index, stay
    as they are, so it cannot repair more than a rotation of the modality as a whole (`rotation_share` of
    `spatial_disorder` says how much of the change that is).

    Attributes:
        rotation: (D, D) in fp32; a row of the index becomes `v @ rotation`.
        pairs: of how many samples it was fitted.
    """

    rotation: Tensor
    pairs: int

    @classmethod
    @torch.no_grad()
    def fit(cls, old: Tensor | np.ndarray, new: Tensor | np.ndarray) -> "IndexAlignment":
        """The orthogonal map R that minimises `sum |v_old R - v_new|^2` (Schönemann, 1966, "A generalized solution of
        the orthogonal Procrustes problem"). Of all that are equally good, as there are with fewer samples than
        dimensions, the one that is nearest to leaving vectors as they are.

        Args:
            old, new: (N, D) embeddings of the same samples, of the modality that the index holds, under the two
                models; a few thousand are enough for several hundred dimensions.

        Raises:
            ValueError: different samples or widths, none at all, or embeddings that are not finite.
        """
        old, new = torch.as_tensor(old), torch.as_tensor(new)
        if old.ndim != 2 or old.shape != new.shape or len(old) == 0:
            raise ValueError(
                "An alignment is fitted on the embeddings of the same samples under two models, two (N, D) matrices; "
                f"got {tuple(old.shape)} and {tuple(new.shape)}."
            )
        products = torch.zeros(old.shape[1], old.shape[1], dtype=torch.double, device=old.device)
        with full_precision(old):
            for start in range(0, len(old), TILE):
                rows = slice(start, start + TILE)
                products += old[rows].double().T @ new[rows].to(old.device).double()
            if not torch.isfinite(products).all():
                raise ValueError("An alignment cannot be fitted: some embeddings are not finite.")
            largest = torch.linalg.matrix_norm(products, 2)
            products.diagonal().add_(TOWARDS_IDENTITY * largest)
            left, _, right = torch.linalg.svd(products)
            return cls((left @ right).float(), len(old))

    def turn_index(self, embeds: Tensor) -> Tensor:
        """(N, D) embeddings of the old model as the new model's queries understand them."""
        return _product(embeds, self.rotation)

    def turn_queries(self, embeds: Tensor) -> Tensor:
        """(M, D) queries of the new model as the index understands them that is left as it stands: the same inner
        products and distances as with a turned index, for one whose vectors cannot be written again."""
        return _product(embeds, self.rotation.T)

    def save(self, path: str | PathLike) -> None:
        """As a file of safetensors that `load` reads."""
        final = Path(path)
        temporary = final.with_name(f".{final.name}.tmp")
        save_file({"rotation": self.rotation.cpu().contiguous(), "pairs": torch.tensor(self.pairs)}, temporary)
        publish_file(temporary, final)

    @classmethod
    def load(cls, path: str | PathLike) -> "IndexAlignment":
        """What `save` has written."""
        found = load_file(path)
        return cls(found["rotation"], int(found["pairs"]))


def align_index(
    index: Index, alignment: IndexAlignment, *, column: str = "embeddings", batch_size: int = 1000
) -> Index:
    """An old index for queries of the new model.

    Args:
        index: (N, D) embeddings as a tensor or an array, or a `datasets.Dataset` with a column of them; the result is
            of the same kind and type of numbers. A data set is written batch by batch, as by `Dataset.map`, its other
            columns as they are; FAISS indexes are added afterwards with `add_faiss_index(column)`.
        alignment: from the old to the new model, see `IndexAlignment.fit`.
        column: of the data set.
        batch_size: rows of the data set that are held at once.

    Raises:
        ValueError: the embeddings have another width than the map; there is no such column; a FAISS index is attached
            to the data set, which would go on holding the old vectors.
    """
    if isinstance(index, Tensor):
        return alignment.turn_index(index)
    if isinstance(index, np.ndarray):
        return alignment.turn_index(torch.from_numpy(index)).numpy()
    require_columns(index, "The index", column=column)
    if index.list_indexes():
        raise ValueError(
            f"The search indexes {', '.join(index.list_indexes())} are attached to the data set and hold the old "
            "vectors. Drop them first (drop_index) and add them again to the result."
        )

    def turn(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {column: align_index(np.asarray(batch[column]), alignment)}

    table = index.with_format("numpy", columns=[column])
    turned = table.map(turn, batched=True, batch_size=batch_size, features=index.features, desc="Turning the index")
    given = index.format
    return turned.with_format(given["type"], given["columns"], given["output_all_columns"], **given["format_kwargs"])


def _product(embeds: Tensor, rotation: Tensor) -> Tensor:
    if embeds.ndim != 2 or embeds.shape[1] != len(rotation):
        raise ValueError(f"The map is for embeddings of shape (N, {len(rotation)}), got {tuple(embeds.shape)}.")
    with full_precision(embeds):
        dtype = torch.promote_types(embeds.dtype, torch.float32)
        return (embeds.to(dtype) @ rotation.to(embeds.device, dtype)).to(embeds.dtype)
