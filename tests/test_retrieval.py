"""Retrieval metrics against a loop over queries and candidates."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_modx.data import PairCollator, PairDataset
from hf_modx.evaluation import EncodedPairs, encode_pairs, retrieval_metrics, retrieval_ranks

from launch import launch
from tiny import tiny_pairs

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import retrieval as benchmark


def vectors_with_ties(rows: int, seed: int, dim: int = 4) -> torch.Tensor:
    """Unit vectors of entries +-1/2: few different ones, and their cosines are exact."""
    assert dim == 4
    return torch.randint(0, 2, (rows, dim), generator=torch.Generator().manual_seed(seed)) - 0.5


def vectors(rows: int, seed: int, dim: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def on_grid(rows: int, cells: int, dtype: torch.dtype, seed: int, dim: int = 4) -> torch.Tensor:
    """Vectors of multiples of 1 / cells in [-1/2, 1/2]: exact cosines, and many ties where cells are few."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-cells // 2, cells // 2 + 1, (rows, dim), generator=generator) / cells).to(dtype)


def reference_ranks(queries, candidates, query_ids, candidate_ids) -> list[int]:
    """By the definition: a tie is what differs by no more than 8 units in the last place of 1."""
    ranks = []
    for cosines, query_id in zip((queries.double() @ candidates.double().T).tolist(), query_ids.tolist(), strict=True):
        matches = [cosine for cosine, i in zip(cosines, candidate_ids.tolist(), strict=True) if i == query_id]
        others = [cosine for cosine, i in zip(cosines, candidate_ids.tolist(), strict=True) if i != query_id]
        best = math.nan if any(map(math.isnan, matches)) else max(matches)
        ranks.append(1 + sum(not cosine < best - 8 * torch.finfo(queries.dtype).eps for cosine in others))
    return ranks


def reference_map(queries, candidates, query_ids, candidate_ids) -> float:
    """Mean over queries of the mean over their matches, the k-th best at rank r, of k / r."""
    total = 0.0
    for cosines, query_id in zip((queries.double() @ candidates.double().T).tolist(), query_ids.tolist(), strict=True):
        matches = [cosine for cosine, i in zip(cosines, candidate_ids.tolist(), strict=True) if i == query_id]
        others = [cosine for cosine, i in zip(cosines, candidate_ids.tolist(), strict=True) if i != query_id]
        matches.sort(key=lambda cosine: math.inf if math.isnan(cosine) else -cosine)
        precisions = []
        for k, match in enumerate(matches, start=1):
            bound = match - 8 * torch.finfo(queries.dtype).eps
            precisions.append(k / (k + sum(not other < bound for other in others)))
        total += sum(precisions) / len(precisions)
    return total / len(queries)


@st.composite
def matched_ids(draw):
    """Ids of images and captions, in any order: any integers, several images and captions of one id."""
    pool = st.sampled_from(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20, unique=True)))
    image_ids = draw(st.lists(pool, min_size=1, max_size=30))
    further = draw(st.lists(st.sampled_from(image_ids), max_size=40))
    text_ids = draw(st.permutations(sorted(set(image_ids)) + further))
    return torch.tensor(image_ids), torch.tensor(text_ids)


@settings(max_examples=150, deadline=None)
@given(
    ids=matched_ids(),
    cells=st.sampled_from([2, 16, 1024]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tile=st.sampled_from([1, 7, 1024]),
    seed=st.integers(0, 2**32),
    nan_share=st.sampled_from([0, 0, 0.1]),
)
def test_ranks_equal_a_loop_for_any_ids_ties_and_tiles(ids, cells, dtype, tile, seed, nan_share):
    image_ids, text_ids = ids
    images, texts = on_grid(len(image_ids), cells, dtype, seed), on_grid(len(text_ids), cells, dtype, seed + 1)
    lost = torch.rand(len(texts), generator=torch.Generator().manual_seed(seed)) < nan_share
    texts[lost] = torch.nan
    image_ranks = reference_ranks(images, texts, image_ids, text_ids)
    text_ranks = reference_ranks(texts, images, text_ids, image_ids)
    assert retrieval_ranks(images, texts, image_ids, text_ids, tile=tile).tolist() == image_ranks
    assert retrieval_ranks(texts, images, text_ids, image_ids, tile=tile).tolist() == text_ranks
    assert retrieval_metrics(images, texts, image_ids, text_ids, tile=tile) == pytest.approx(
        {
            **metrics_of(image_ranks, "image_to_text"),
            **metrics_of(text_ranks, "text_to_image"),
            "image_to_text_map": reference_map(images, texts, image_ids, text_ids),
            "text_to_image_map": reference_map(texts, images, text_ids, image_ids),
        },
        abs=1e-12,
    )


def metrics_of(ranks: list[int], name: str) -> dict[str, float]:
    middle = sorted(ranks)[(len(ranks) - 1) // 2 : len(ranks) // 2 + 1]
    return {
        **{f"{name}_recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)},
        f"{name}_mrr": sum(1 / rank for rank in ranks) / len(ranks),
        f"{name}_median_rank": sum(middle) / len(middle),
    }


@pytest.mark.parametrize("tile", [100, 1024])
def test_ranks_equal_a_loop_where_some_ids_stand_for_hundreds(tile):
    draws = torch.randint(0, 60, (1500,), generator=torch.Generator().manual_seed(0)) ** 2 // 40
    image_ids, text_ids = torch.cat([draws[:500], draws.unique()]), torch.cat([draws.unique(), draws[500:]])
    images, texts = on_grid(len(image_ids), 64, torch.float32, 0), on_grid(len(text_ids), 64, torch.float32, 1)
    for arguments in ((images, texts, image_ids, text_ids), (texts, images, text_ids, image_ids)):
        assert retrieval_ranks(*arguments, tile=tile).tolist() == reference_ranks(*arguments)


@pytest.mark.parametrize("make", [vectors, vectors_with_ties], ids=["random", "ties"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_equal_a_loop_with_several_captions_an_image(make, seed):
    image_ids = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    text_ids = image_ids.repeat_interleave(3)[torch.randperm(39, generator=torch.Generator().manual_seed(seed + 1))]
    images, texts = make(13, seed + 2), make(39, seed + 3)
    for arguments in ((images, texts, image_ids, text_ids), (texts, images, text_ids, image_ids)):
        assert retrieval_ranks(*arguments).tolist() == reference_ranks(*arguments)


@pytest.mark.parametrize("make", [vectors, vectors_with_ties], ids=["random", "ties"])
def test_ranks_equal_a_loop_where_several_images_share_an_id(make):
    image_ids, text_ids = torch.tensor([3, 3, 5, 8, 8, 8, 1]), torch.tensor([8, 3, 5, 5, 1, 3, 8, 1, 3])
    images, texts = make(7, 0), make(9, 1)
    for arguments in ((images, texts, image_ids, text_ids), (texts, images, text_ids, image_ids)):
        assert retrieval_ranks(*arguments).tolist() == reference_ranks(*arguments)


@pytest.mark.parametrize("make", [vectors, vectors_with_ties], ids=["random", "ties"])
@pytest.mark.parametrize("tile", [1, 3, 12, 13, 50])
def test_the_tile_does_not_change_the_ranks(make, tile):
    ids = torch.arange(13)
    images, texts = make(13, 0), make(13, 1)
    assert torch.equal(retrieval_ranks(images, texts, ids, ids, tile=tile), retrieval_ranks(images, texts, ids, ids))


def test_the_best_of_several_matches_counts():
    candidates = torch.eye(3)
    query = F.normalize(torch.tensor([[3.0, 2.0, 1.0]]), dim=1)
    assert retrieval_ranks(query, candidates, torch.tensor([7]), torch.tensor([7, 1, 7])).tolist() == [1]


def test_a_tie_counts_against_the_model():
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ids = torch.arange(3)
    assert retrieval_ranks(candidates[:1], candidates, ids[:1], ids).tolist() == [2]


def test_a_tie_ends_8_units_in_the_last_place_below_the_best_match():
    unit = torch.finfo(torch.float32).eps
    queries = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    candidates = torch.tensor([[0.5, 0.0], [0.5 - 8 * unit, 0.0], [0.5 - 9 * unit, 0.0]])
    ids = torch.arange(3)
    assert retrieval_ranks(queries, candidates, ids, ids).tolist() == [2, 3, 3]
    metrics = retrieval_metrics(candidates, queries, ids, ids)
    assert metrics["text_to_image_mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)


def test_a_tie_among_matches_costs_nothing():
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert retrieval_ranks(candidates[:1], candidates, torch.tensor([0]), torch.tensor([0, 0, 1])).tolist() == [1]


@pytest.mark.parametrize("tile", [1, 1024])
def test_a_collapsed_model_has_no_recall(tile):
    # 1,025 rows leave a last tile of one row, which is multiplied by another kernel that rounds differently.
    rows = 1025 if tile == 1024 else 60
    images, texts = vectors(1, 0, 512, torch.float32), vectors(1, 1, 512, torch.float32)
    ids = torch.arange(rows)
    metrics = retrieval_metrics(images.repeat(rows, 1), texts.repeat(rows, 1), ids, ids, tile=tile)
    assert {name: value for name, value in metrics.items() if "recall" in name and value > 0} == {}


def test_candidate_that_is_nan_counts_against():
    candidates = torch.eye(3)
    candidates[2] = torch.nan
    ids = torch.arange(3)
    assert retrieval_ranks(torch.eye(3)[:2], candidates, ids[:2], ids).tolist() == [2, 2]


def test_query_that_is_nan_ranks_last():
    ids = torch.arange(4)
    queries = torch.full((4, 4), torch.nan)
    assert retrieval_ranks(queries, torch.eye(4), ids, ids).tolist() == [4, 4, 4, 4]


def test_model_of_nothing_but_nan_has_no_recall():
    ids = torch.arange(12)
    embeds = torch.full((12, 4), torch.nan)
    metrics = retrieval_metrics(embeds, embeds, ids, ids)
    assert max(value for name, value in metrics.items() if "recall" in name) == 0


def test_half_precision_is_compared_in_fp32():
    ids = torch.arange(40)
    images, texts = vectors(40, 0, dtype=torch.bfloat16), vectors(40, 1, dtype=torch.bfloat16)
    expected = retrieval_ranks(images.float(), texts.float(), ids, ids)
    assert torch.equal(retrieval_ranks(images, texts, ids, ids), expected)


def test_ranks_are_whole_numbers():
    """Counted in fp32 they would be exact up to 16.7 million candidates only."""
    ids = torch.arange(3)
    assert retrieval_ranks(vectors(3, 0, dtype=torch.float32), vectors(3, 1).float(), ids, ids).dtype == torch.int64


def test_a_query_without_a_match_is_refused():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="no matching candidate"):
        retrieval_ranks(torch.eye(3), torch.eye(3), ids, torch.tensor([0, 1, 1]))


def test_recall_cuts_at_1_5_and_10():
    # Every image is the same and likes caption 0 best, 11 least: image k finds its caption at rank k + 1.
    images = F.normalize(torch.arange(12.0, 0.0, -1.0), dim=0).repeat(12, 1)
    ids = torch.arange(12)
    metrics = retrieval_metrics(images, torch.eye(12), ids, ids)
    assert metrics["image_to_text_recall@1"] == pytest.approx(1 / 12)
    assert metrics["image_to_text_recall@5"] == pytest.approx(5 / 12)
    assert metrics["image_to_text_recall@10"] == pytest.approx(10 / 12)
    assert metrics["image_to_text_mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 13)) / 12)
    # For a caption all images tie, so that each has all others before it.
    assert metrics["text_to_image_recall@10"] == 0
    assert metrics["text_to_image_mrr"] == pytest.approx(1 / 12)


def test_average_precision_counts_every_match():
    # The captions of the image, 0 and 1, are at ranks 1 and 4: (1 / 1 + 2 / 4) / 2.
    texts = torch.eye(4)
    images = torch.stack([F.normalize(torch.tensor([0.9, 0.1, 0.5, 0.4]), dim=0), texts[2], texts[3]])
    metrics = retrieval_metrics(images, texts, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 2]))
    assert metrics["image_to_text_map"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert metrics["image_to_text_mrr"] == 1


def test_a_perfect_model_has_full_recall():
    ids = torch.tensor([4, 2, 9])
    metrics = retrieval_metrics(torch.eye(3), torch.eye(3), ids, ids)
    assert set(metrics.values()) == {1.0}


def test_candidates_that_no_query_matches_may_stand_in_the_way():
    candidates = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert retrieval_ranks(candidates[:1], candidates, torch.tensor([7]), torch.tensor([8, 7, 9])).tolist() == [2]


def test_embeddings_with_their_ids_are_the_predictions_that_metrics_take():
    images, texts = vectors(3, 0), vectors(3, 1)
    found = EncodedPairs.of_pairs(images, texts).as_predictions()
    assert [side.tolist() for side in found.predictions] == [images.tolist(), texts.tolist()]
    assert [ids.tolist() for ids in found.label_ids] == [[0, 1, 2]] * 2


def test_a_test_set_of_one_row_is_embedded(model, processor):
    pairs = PairDataset(tiny_pairs(1), "image", "caption", "pair_id")
    found = encode_pairs(model, pairs, PairCollator(processor), batch_size=4)
    assert (len(found.image), len(found.text)) == (1, 2)


def test_a_row_without_caption_is_named(model, processor):
    rows = tiny_pairs(3).remove_columns(["caption", "pair_id"]).add_column("caption", ["a ring", None, "a bar"])
    with pytest.raises(ValueError, match=r"Rows \[1\] have no caption"):
        encode_pairs(model, PairDataset(rows, "image", "caption", "pair_id"), PairCollator(processor), batch_size=4)


def test_the_metrics_name_the_side_that_has_no_match():
    ids, short = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="1 of 3 images have no matching"):
        retrieval_metrics(torch.eye(3), torch.eye(3), ids, short)
    with pytest.raises(ValueError, match="1 of 3 captions have no matching"):
        retrieval_metrics(torch.eye(3), torch.eye(3), short, ids)


def test_bad_shapes_and_tiles_are_refused():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match=r"\(3, 3\) with torch.int64 ids of shape \(2,\)"):
        retrieval_metrics(torch.eye(3), torch.eye(3), ids, ids[:2])
    with pytest.raises(ValueError, match="integer ids"):
        retrieval_ranks(torch.eye(3), torch.eye(3), ids.float(), ids)
    with pytest.raises(ValueError, match="tile must be at least 1"):
        retrieval_ranks(torch.eye(3), torch.eye(3), ids, ids, tile=-1)


def test_neither_autocast_nor_gradients_change_the_metrics():
    ids = torch.arange(60)
    images, texts = vectors(60, 0, dtype=torch.float32), vectors(60, 1, dtype=torch.float32)
    expected = retrieval_metrics(images, texts, ids, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(images.requires_grad_(), texts.requires_grad_(), ids, ids) == expected


class Watch(TorchDispatchMode):
    """Counts the tiles that are multiplied and keeps the size of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.tiles, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.tiles += function is torch.ops.aten.mm.out
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("number_of_ids", [300, 1])
def test_nothing_larger_than_a_tile_or_the_embeddings_is_made(number_of_ids):
    image_ids, text_ids = torch.arange(300) % number_of_ids, torch.arange(900) % number_of_ids
    with Watch() as watch:
        retrieval_metrics(vectors(300, 0), vectors(900, 1), image_ids, text_ids, tile=80)
    assert watch.largest == 900 * 8


def save_sharded_metrics(folder, tile):
    image_ids = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    text_ids = torch.cat([image_ids, image_ids, image_ids[:4]])
    images, texts = vectors(11, 0, dtype=torch.float32), vectors(26, 1, dtype=torch.float32)
    with Watch() as watch:
        metrics = retrieval_metrics(images, texts, image_ids, text_ids, tile=tile, sharded=True)
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"rank-{rank}.json").write_text(json.dumps({"metrics": metrics, "tiles": watch.tiles}))


@pytest.mark.parametrize(("tile", "shares"), [(4, [11, 10]), (5, [9, 9]), (1024, [1, 0])])
def test_processes_share_the_tiles_and_get_the_metrics_of_one(tmp_path, tile, shares):
    save_sharded_metrics(tmp_path, tile)
    alone = json.loads((tmp_path / "rank-0.json").read_text())
    launch(2, save_sharded_metrics, tmp_path, tile)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["metrics"] for rank in ranks] == [alone["metrics"]] * 2
    assert [rank["tiles"] for rank in ranks] == shares
    assert alone["tiles"] == sum(shares)


@pytest.mark.slow
def test_the_benchmark_measures_time_memory_and_recall(capsys):
    benchmark.main(["--images", "900", "--captions_per_image", "3", "--dim", "32", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    table = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines)}
    matrix_mib = 900 * 2700 * 4 / 2**20
    assert matrix_mib <= float(table["the same, new matrix"][2]) < matrix_mib + 20
    assert table["hf_modx"][3:] == table["reference, two passes"][3:]
    assert lines[-1] == "Ranks unlike the reference's: 0 of 3,600"
