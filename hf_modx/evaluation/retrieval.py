"""Image-text retrieval: ranks and recall, in tiles of the similarity matrix and shared by processes.

One pass over the tiles serves both directions, and nothing is sorted by similarity: a rank is one plus the number of
candidates before the best match, so comparing with the best match and counting is enough.
"""

from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import world_size
from ..losses.contrastive import full_precision, upcast

RECALL_AT = (1, 5, 10)
ROUNDING = 8  # in units of the last place: equal vectors multiplied in another order differ by so much
TILE = 2048
BAND = 64  # rows whose matches are looked for at once: few, so that little else is in their columns


def retrieval_ranks(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, *, tile: int = TILE
) -> Tensor:
    """Rank of each query's best matching candidate, 1 being the first.

    A candidate matches where its id is the query's. The rank is one plus the number of NOT matching candidates that
    are not strictly less similar than the best match: a tie (up to rounding) counts against the model, so that a
    collapsed model has no recall, and a similarity that is NaN counts as not less, on either side.

    Args:
        queries: (Q, D), unit-norm. candidates: (C, D), unit-norm. Half precision is compared in fp32.
        query_ids: (Q,) integers. candidate_ids: (C,) integers. Any values; an id may stand for several of each.
        tile: queries and candidates compared at once; bounds memory to two matrices of tile x tile beside a copy of
            the embeddings.

    Returns:
        (Q,) int64 in [1, C].

    Raises:
        ValueError: a query without a matching candidate, shapes that do not fit, or a tile below 1.
    """
    matrix = _SimilarityMatrix(queries, candidates, query_ids, candidate_ids, tile)
    _require_matches(matrix.row_matches, "queries")
    return matrix.ranks()[0]


def retrieval_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    tile: int = TILE,
    sharded: bool = False,
) -> dict[str, float]:
    """Recall, mean reciprocal rank and median rank in both directions, with the ranks of `retrieval_ranks`.

    Args:
        image_embeds: (N, D), unit-norm. text_embeds: (C, D), unit-norm; several captions an image are normal.
        image_ids: (N,) integers. text_ids: (C,) integers.
        tile: images and captions compared at once; bounds memory.
        sharded: every process calls with the same tensors, each compares its share of the tiles, and all get the
            result of one process.

    Returns:
        `image_to_text_recall@1`, `@5`, `@10`, `image_to_text_mrr` (an image is right when ANY of its captions is that
        high), fractions in [0, 1], `image_to_text_median_rank` in [1, C]; the same from `text_to_image`.

    Raises:
        ValueError: an image or a caption without a match, shapes that do not fit, or a tile below 1.
    """
    matrix = _SimilarityMatrix(image_embeds, text_embeds, image_ids, text_ids, tile)
    _require_matches(matrix.row_matches, "images")
    _require_matches(matrix.column_matches, "captions")
    image_ranks, text_ranks = matrix.ranks(sharded)
    metrics = {}
    for name, ranks in {"image_to_text": image_ranks, "text_to_image": text_ranks}.items():
        for k in RECALL_AT:
            metrics[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
        metrics[f"{name}_mrr"] = ranks.double().reciprocal().mean().item()
        metrics[f"{name}_median_rank"] = ranks.double().quantile(0.5).item()
    return metrics


class _SimilarityMatrix:
    """N rows and C columns, ordered by id, of which only a tile is held at once.

    In this order the matches of a row are neighbours, columns `first` to `stop`, and those of neighbouring rows lie in
    a band around the diagonal. Only there it has to be asked which pairs match.
    """

    def __init__(self, rows: Tensor, columns: Tensor, row_ids: Tensor, column_ids: Tensor, tile: int):
        _check(rows, row_ids)
        _check(columns, column_ids)
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}.")
        self.tile = tile
        self.row_ids, self.row_order = row_ids.to(rows.device, torch.long).sort()
        self.column_ids, self.column_order = column_ids.to(columns.device, torch.long).sort()
        self.rows, self.columns = upcast(rows[self.row_order]), upcast(columns[self.column_order])
        first, stop = _places(self.row_ids, self.column_ids)
        self.first, self.stop = first.tolist(), stop.tolist()
        self.row_matches = stop - first
        first, stop = _places(self.column_ids, self.row_ids)
        self.column_matches = stop - first

    @torch.no_grad()
    def ranks(self, sharded: bool = False) -> tuple[Tensor, Tensor]:
        """(N,) ranks of the rows' and (C,) of the columns' best matches, in the order in which they were given."""
        sharded = sharded and world_size() > 1
        rank, number = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
        with full_precision(self.rows):
            less = self._count_less(*self._bounds(), rank, number)
        if sharded:
            dist.all_reduce(less)
        row_less, column_less = less.split([len(self.rows), len(self.columns)])
        row_ranks = 1 + len(self.columns) - self.row_matches - row_less
        column_ranks = 1 + len(self.rows) - self.column_matches - column_less
        return row_ranks[self.row_order.argsort()], column_ranks[self.column_order.argsort()]

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """(N,) and (C,): what is less than this is less similar than the best match, even with another rounding."""
        best_of_row = self.rows.new_full((len(self.rows),), -torch.inf)
        best_of_column = self.rows.new_full((len(self.columns),), -torch.inf)
        for tile in self._tiles():
            for rows, columns in self._bands(*tile):
                cosines = self.rows[rows] @ self.columns[columns].T
                cosines = torch.where(self._matches(rows, columns), cosines, -torch.inf)
                best_of_row[rows] = torch.maximum(best_of_row[rows], cosines.amax(dim=1))
                best_of_column[columns] = torch.maximum(best_of_column[columns], cosines.amax(dim=0))
        rounding = ROUNDING * torch.finfo(self.rows.dtype).eps
        return best_of_row - rounding, best_of_column - rounding

    def _count_less(self, row_bounds: Tensor, column_bounds: Tensor, rank: int, number: int) -> Tensor:
        """(N + C,) int64: how many similarities of each row, then of each column, are below its bound and no match,
        in this process's tiles. The tiles are dealt out in turn: they are the same for any number of processes."""
        row_counts, column_counts = (
            torch.zeros_like(bounds, dtype=torch.long) for bounds in (row_bounds, column_bounds)
        )
        # Reused, and the truth as 0.0 and 1.0: new memory and counting booleans cost as much as the product itself.
        height, width = min(self.tile, len(self.rows)), min(self.tile, len(self.columns))
        memory, truth = self.rows.new_empty(height, width), self.rows.new_empty(height, width)
        for rows, columns in islice(self._tiles(), rank, None, number):
            part = slice(rows.stop - rows.start), slice(columns.stop - columns.start)
            cosines = torch.mm(self.rows[rows], self.columns[columns].T, out=memory[part])
            for band in self._bands(rows, columns):
                inside = cosines[_shifted(band[0], rows.start), _shifted(band[1], columns.start)]
                inside.masked_fill_(self._matches(*band), torch.nan)  # less than nothing
            less = torch.lt(cosines, row_bounds[rows, None], out=truth[part])
            row_counts[rows] += less.sum(dim=1).long()
            less = torch.lt(cosines, column_bounds[columns], out=truth[part])
            column_counts[columns] += less.sum(dim=0).long()
        return torch.cat([row_counts, column_counts])

    def _tiles(self) -> Iterator[tuple[slice, slice]]:
        for rows in _slices(0, len(self.rows), self.tile):
            for columns in _slices(0, len(self.columns), self.tile):
                yield rows, columns

    def _bands(self, rows: slice, columns: slice) -> Iterator[tuple[slice, slice]]:
        """Parts of a tile that hold all of its matches and little else."""
        for part in _slices(rows.start, rows.stop, BAND):
            start, stop = max(columns.start, self.first[part.start]), min(columns.stop, self.stop[part.stop - 1])
            if start < stop:
                yield part, slice(start, stop)

    def _matches(self, rows: slice, columns: slice) -> Tensor:
        return self.row_ids[rows, None] == self.column_ids[columns]


def _places(ids: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Where in `ordered` the equals of each id start and stop."""
    return torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))


def _shifted(place: slice, start: int) -> slice:
    return slice(place.start - start, place.stop - start)


def _check(embeds: Tensor, ids: Tensor) -> None:
    if embeds.ndim != 2 or ids.shape != embeds.shape[:1] or ids.is_floating_point():
        raise ValueError(
            f"Embeddings must be (N, D) with N integer ids, got {tuple(embeds.shape)} with {ids.dtype} ids of shape "
            f"{tuple(ids.shape)}."
        )


def _require_matches(matches: Tensor, what: str) -> None:
    lonely = int((matches == 0).sum())
    if lonely:
        raise ValueError(
            f"{lonely} of {len(matches)} {what} have no matching candidate: the ids of images and captions do not fit."
        )
