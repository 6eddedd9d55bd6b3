"""Spatial disorder: how the embeddings of the same samples have moved between two models.

Angles inside a modality tell its shape, angles between the phases how far it has moved (Ni et al., 2023, section 3):
where the shape stays and all has moved, the modality has turned as a whole. That costs nothing as long as both
modalities turn alike; `intermodal_rotation` says how far they do not.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import process_index, world_size
from ..losses.contrastive import full_precision
from .encoding import EncodedPairs
from .retrieval import retrieval_ranks

SHAPE_BINS = (5.0, 10.0, 15.0, 20.0)
MOVE_BINS = (15.0, 20.0, 25.0, 30.0)
"""Upper bounds of the bins in degrees, in each of which the bound is included; the last bin ends at 180."""
TILE = 1024
SPANNED = 1e-6  # of the largest singular value: smaller ones are rounding of fp32 embeddings
SHARED = 1e-6  # below 1: the cosine of a direction of one subspace with its nearest in the other


@dataclass(frozen=True)
class Histogram:
    """Angles in degrees.

    Attributes:
        shares: of the bins; they add up to 1.
        mean: of the angles.
    """

    shares: tuple[float, ...]
    mean: float


@dataclass(frozen=True)
class ModalityDisorder:
    """How one modality has moved.

    Attributes:
        sam: changes of the angles between two samples, over all pairs of samples (self-relative angle matrix; bins
            `SHAPE_BINS`).
        ram: angles between a sample's old and new embedding (rotation angle matrix; bins `MOVE_BINS`).
        rotation: mean angle by which the best orthogonal map R of the old embeddings onto the new ones turns them,
            in degrees.
        rotation_residual: mean angle between R v_old and v_new: what is no common rotation, in degrees.
        rotation_share: part of the squared change that R explains, in [0, 1]:
            1 - sum |R v_old - v_new|^2 / sum |v_old - v_new|^2; None where nothing has changed.
    """

    sam: Histogram
    ram: Histogram
    rotation: float
    rotation_residual: float
    rotation_share: float | None


@dataclass(frozen=True)
class SpatialDisorder:
    """What has moved between an old and a new model.

    Attributes:
        samples: their number.
        image, text: the two modalities.
        intermodal_rotation: mean angle between R_V v and R_L v over the old embeddings v of both modalities, in
            degrees; 0 where both have turned alike. They are projected on the directions that both modalities span,
            which are all where there are more samples than dimensions; None where they share none.
    """

    samples: int
    image: ModalityDisorder
    text: ModalityDisorder
    intermodal_rotation: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@torch.no_grad()
def spatial_disorder(
    old: EncodedPairs, new: EncodedPairs, *, tile: int = TILE, sharded: bool = False
) -> SpatialDisorder:
    """Compare what two models say to the same samples; of several captions the first counts.

    Args:
        old, new: the same samples in the same order (for plain embeddings see `EncodedPairs.of_pairs`).
        tile: samples compared at once; bounds memory to a few matrices of tile x tile in fp64.
        sharded: every process calls with the same embeddings, each compares its share of the tiles.

    Raises:
        ValueError: different samples or widths, or fewer than two samples.
    """
    if old.image.shape != new.image.shape or not torch.equal(old.image_ids.cpu(), new.image_ids.cpu()):
        raise ValueError(
            f"Spatial disorder compares the same samples under two models; these are {tuple(old.image.shape)} and "
            f"{tuple(new.image.shape)} embeddings{'' if old.image.shape != new.image.shape else ' of other samples'}."
        )
    if len(old.image) < 2:
        raise ValueError("Spatial disorder needs at least two samples.")
    with full_precision(old.image):
        before, after = _unit_pairs(old), _unit_pairs(new)
        maps = [_Rotation(*phases) for phases in zip(before, after, strict=True)]
        image, text = (
            _of_modality(*phases, rotation, tile, sharded)
            for *phases, rotation in zip(before, after, maps, strict=True)
        )
        return SpatialDisorder(len(old.image), image, text, _intermodal(*maps, torch.cat(before)))


@torch.no_grad()
def imav(old: EncodedPairs, new: EncodedPairs) -> tuple[Histogram | None, int]:
    """Changes of the angle between an image and its caption (inter-modal angle variation; bins `SHAPE_BINS`) over the
    pairs whose image finds its caption first under the old model.

    Args:
        old, new: the same pairs, of which the first caption counts; in the paper training pairs of the earlier phase.

    Returns:
        The histogram, None where the old model finds no pair, and the number of pairs that it finds.
    """
    found = retrieval_ranks(old.image, old.text, old.image_ids, old.text_ids) == 1
    if not found.any():
        return None, 0
    before, after = (angles(*(side[found] for side in _unit_pairs(pairs))) for pairs in (old, new))
    return _histogram(before - after, SHAPE_BINS), int(found.sum())


def angles(first: Tensor, second: Tensor) -> Tensor:
    """(N,) angles in degrees between the rows of two (N, D) matrices of unit vectors.

    `2 atan2(|a - b|, |a + b|)` is exact to rounding where arccos loses half of the digits, near 0 and 180 degrees
    (Kahan, 2006, "How futile are mindless assessments of roundoff", section 12).
    """
    half = torch.atan2((first - second).norm(dim=-1), (first + second).norm(dim=-1))
    return torch.rad2deg(2 * half)


def _unit_pairs(pairs: EncodedPairs) -> tuple[Tensor, Tensor]:
    """(N, D) images and their first captions in fp64."""
    sides = (pairs.image.double(), pairs.text[pairs.first_captions()].double())
    image, text = (side / side.norm(dim=1, keepdim=True) for side in sides)
    return image, text


class _Rotation:
    """The orthogonal map R that minimises sum |R v_old - v_new|^2 (Schönemann, 1966), uncentred, on the directions
    that the embeddings span: elsewhere nothing determines it."""

    def __init__(self, old: Tensor, new: Tensor):
        left, values, right = torch.linalg.svd(new.T @ old)
        rank = int((values > SPANNED * values[0]).sum())
        self.left, self.right = left[:, :rank], right[:rank]
        """R = left @ right; the rows of `right` are an orthonormal basis of where it is determined."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """(M, D) to (M, D)."""
        return vectors @ self.right.T @ self.left.T


def _of_modality(old: Tensor, new: Tensor, rotation: _Rotation, tile: int, sharded: bool) -> ModalityDisorder:
    turned = rotation(old)
    turned = turned / turned.norm(dim=1, keepdim=True).clamp(min=1e-12)
    change, rest = (new - old).square().sum().item(), (new - turned).square().sum().item()
    return ModalityDisorder(
        sam=_shape_change(old, new, tile, sharded),
        ram=_histogram(angles(old, new), MOVE_BINS),
        rotation=angles(old, turned).mean().item(),
        rotation_residual=angles(turned, new).mean().item(),
        rotation_share=1 - rest / change if change > 1e-12 * len(old) else None,
    )


def _intermodal(of_images: _Rotation, of_texts: _Rotation, vectors: Tensor) -> float | None:
    inside = vectors
    if min(len(of_images.right), len(of_texts.right)) < vectors.shape[1]:  # else both span everything
        directions, cosines, _ = torch.linalg.svd(of_images.right @ of_texts.right.T, full_matrices=False)
        shared = directions[:, cosines > 1 - SHARED].T @ of_images.right
        inside = vectors @ shared.T @ shared
    norms = inside.norm(dim=1, keepdim=True)
    if not (norms > SPANNED).any():
        return None
    inside = (inside / norms)[norms[:, 0] > SPANNED]
    return angles(of_images(inside), of_texts(inside)).mean().item()


def _shape_change(old: Tensor, new: Tensor, tile: int, sharded: bool) -> Histogram:
    """Over all unordered pairs of different samples. In fp64 an arccos is good to 1e-6 degrees everywhere."""
    rank, number = (process_index(), world_size()) if sharded else (0, 1)
    counts = torch.zeros(len(SHAPE_BINS) + 1, dtype=torch.double, device=old.device)
    total = torch.zeros((), dtype=torch.double, device=old.device)
    starts = range(0, len(old), tile)
    tiles = [(row, column) for row in starts for column in starts if row <= column]
    for row, column in tiles[rank::number]:
        rows, columns = slice(row, row + tile), slice(column, column + tile)
        change = _arccos(old[rows] @ old[columns].T).sub_(_arccos(new[rows] @ new[columns].T)).abs_()
        if row == column:
            change = change[torch.ones_like(change, dtype=torch.bool).triu(1)]
        counts += _counts(change, SHAPE_BINS)
        total += change.sum()
    if number > 1:
        dist.all_reduce(counts)
        dist.all_reduce(total)
    pairs = math.comb(len(old), 2)
    return Histogram(tuple((counts / pairs).tolist()), total.item() / pairs)


def _arccos(cosines: Tensor) -> Tensor:
    return cosines.clamp_(-1, 1).arccos_().rad2deg_()


def bin_names(bins: Sequence[float]) -> list[str]:
    """What the bins up to these bounds are called, as in "(5, 10]", the last one up to 180 degrees."""
    bounds = [0, *bins, 180]
    return [f"{'(' if number else '['}{low:g}, {high:g}]" for number, (low, high) in enumerate(pairwise(bounds))]


def _histogram(degrees: Tensor, bins: Sequence[float]) -> Histogram:
    degrees = degrees.abs()
    return Histogram(tuple((_counts(degrees, bins) / len(degrees)).tolist()), degrees.mean().item())


def _counts(degrees: Tensor, bins: Sequence[float]) -> Tensor:
    places = torch.bucketize(degrees.flatten(), torch.tensor(bins, dtype=degrees.dtype, device=degrees.device))
    return torch.bincount(places, minlength=len(bins) + 1).double()
