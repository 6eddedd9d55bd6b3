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
    """Recall, mean reciprocal rank, mean average precision and median rank in both directions, with the ranks of
    `retrieval_ranks`.

    The average precision of a query is the mean over its matches, the k-th best of them at rank r, of k / r; with one
    match a query the mean average precision is the mean reciprocal rank. All ranks count a tie against the model.

    Args:
        image_embeds: (N, D), unit-norm. text_embeds: (C, D), unit-norm; several captions an image are normal.
        image_ids: (N,) integers. text_ids: (C,) integers.
        tile: images and captions compared at once; bounds memory.
        sharded: every process calls with the same tensors, each compares its share of the tiles, and all get the
            result of one process.

    Returns:
        `image_to_text_recall@1`, `@5`, `@10`, `image_to_text_mrr` (an image is right when ANY of its captions is that
        high), `image_to_text_map` (ALL of them count), fractions in [0, 1], `image_to_text_median_rank` in [1, C]; the
        same from `text_to_image`.

    Raises:
        ValueError: an image or a caption without a match, shapes that do not fit, or a tile below 1.
    """
    matrix = _SimilarityMatrix(image_embeds, text_embeds, image_ids, text_ids, tile)
    _require_matches(matrix.row_matches, "images")
    _require_matches(matrix.column_matches, "captions")
    image_ranks, text_ranks = matrix.ranks(sharded)
    image_precision, text_precision = matrix.average_precisions(sharded)
    metrics = {}
    for name, ranks, precision in (
        ("image_to_text", image_ranks, image_precision),
        ("text_to_image", text_ranks, text_precision),
    ):
        reciprocal = ranks.double().reciprocal().mean().item()
        for k in RECALL_AT:
            metrics[f"{name}_recall@{k}"] = (ranks <= k).double().mean().item()
        metrics[f"{name}_mrr"] = reciprocal
        metrics[f"{name}_map"] = reciprocal if precision is None else precision.mean().item()
        metrics[f"{name}_median_rank"] = _median(ranks)
    return metrics


def _median(ranks: Tensor) -> float:
    """`quantile` refuses more than 16 million values."""
    ordered = ranks.sort().values
    return (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]).item() / 2


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
        self.row_first, stop = _places(self.row_ids, self.column_ids)
        self.first, self.stop = self.row_first.tolist(), stop.tolist()
        self.row_matches = stop - self.row_first
        self.column_first, stop = _places(self.column_ids, self.row_ids)
        self.column_matches = stop - self.column_first

    @torch.no_grad()
    def ranks(self, sharded: bool = False) -> tuple[Tensor, Tensor]:
        """(N,) ranks of the rows' and (C,) of the columns' best matches, in the order in which they were given."""
        rank, number = _share(sharded)
        with full_precision(self.rows):
            less = self._count_less(*self._bounds(), rank, number)
        if number > 1:
            dist.all_reduce(less)
        row_less, column_less = less.split([len(self.rows), len(self.columns)])
        row_ranks = 1 + len(self.columns) - self.row_matches - row_less
        column_ranks = 1 + len(self.rows) - self.column_matches - column_less
        return row_ranks[self.row_order.argsort()], column_ranks[self.column_order.argsort()]

    @torch.no_grad()
    def average_precisions(self, sharded: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """(N,) of the rows and (C,) of the columns in fp64, ordered by id; None where each has one match."""
        found = []
        for queries, candidates, first, matches in (
            (self.rows, self.columns, self.row_first, self.row_matches),
            (self.columns, self.rows, self.column_first, self.column_matches),
        ):
            if matches.max() == 1:
                found.append(None)
                continue
            rank, number = _share(sharded)
            precision = torch.zeros(len(queries), dtype=torch.double, device=queries.device)
            # Bands of so many rows are not larger than a tile.
            bands = _slices(0, len(queries), max(1, self.tile**2 // len(candidates)))
            with full_precision(queries):
                for band in islice(bands, rank, None, number):
                    precision[band] = _average_precision(queries[band] @ candidates.T, first[band], matches[band])
            if number > 1:
                dist.all_reduce(precision)
            found.append(precision)
        return found[0], found[1]

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
        return best_of_row - _rounding(self.rows), best_of_column - _rounding(self.rows)

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


def _average_precision(cosines: Tensor, first: Tensor, matches: Tensor) -> Tensor:
    """Average precision of R queries from their (R, C) cosines, in which the matches of a query are the `matches`
    columns from `first` on. The cosines are overwritten."""
    steps = torch.arange(int(matches.max()), device=cosines.device)
    is_match = steps < matches[:, None]
    places = first[:, None] + steps * is_match
    bounds = (cosines.gather(1, places) - _rounding(cosines)).nan_to_num(nan=-torch.inf).where(is_match, -torch.inf)
    bounds = bounds.sort(dim=1).values  # ascending: what is no match comes first
    cosines.scatter_(1, places, -torch.inf)
    # How many bounds each candidate reaches; NaN reaches all. Then for each bound how many candidates reach it.
    reached = torch.searchsorted(bounds, cosines, right=True)
    width = len(steps) + 1
    reached += torch.arange(len(cosines), device=cosines.device)[:, None] * width
    histogram = torch.bincount(reached.flatten(), minlength=len(cosines) * width).view(-1, width)
    others = histogram.flip(1).cumsum(1)[:, :-1]  # from the best match down
    others = torch.minimum(others, (cosines.shape[1] - matches)[:, None])  # a match reaches the bound of a NaN
    hits = steps + 1.0
    precision = torch.where(is_match, hits.double() / (hits + others), 0.0)
    return precision.sum(dim=1) / matches


def _rounding(embeds: Tensor) -> float:
    return ROUNDING * torch.finfo(embeds.dtype).eps


def _share(sharded: bool) -> tuple[int, int]:
    """This process and the number of processes among which the work is dealt out."""
    return (dist.get_rank(), dist.get_world_size()) if sharded and world_size() > 1 else (0, 1)


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
