"""Retrieval metrics against a loop over queries and candidates."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_modx.evaluation import retrieval_metrics, retrieval_ranks


def vectors_with_ties(rows: int, seed: int, dim: int = 4) -> torch.Tensor:
    """Unit vectors of entries +-1/2: few different ones, and their cosines are exact."""
    assert dim == 4
    return torch.randint(0, 2, (rows, dim), generator=torch.Generator().manual_seed(seed)) - 0.5


def vectors(rows: int, seed: int, dim: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def reference_ranks(queries, candidates, query_ids, candidate_ids) -> list[int]:
    ranks = []
    for query, query_id in zip(queries, query_ids.tolist(), strict=True):
        cosines = [float(query @ candidate) for candidate in candidates]
        matches = [cosine for cosine, i in zip(cosines, candidate_ids.tolist(), strict=True) if i == query_id]
        best = math.nan if any(map(math.isnan, matches)) else max(matches)
        others = [cosine for cosine, i in zip(cosines, candidate_ids.tolist(), strict=True) if i != query_id]
        ranks.append(1 + sum(not cosine < best for cosine in others))
    return ranks


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


def test_a_tie_among_matches_costs_nothing():
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert retrieval_ranks(candidates[:1], candidates, torch.tensor([0]), torch.tensor([0, 0, 1])).tolist() == [1]


@pytest.mark.parametrize("tile", [1, 1024])
def test_a_collapsed_model_has_no_recall(tile):
    # 1,025 rows leave a last tile of one row, which is multiplied by another kernel that rounds differently.
    rows = 1025 if tile == 1024 else 333
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


def test_a_perfect_model_has_full_recall():
    ids = torch.tensor([4, 2, 9])
    metrics = retrieval_metrics(torch.eye(3), torch.eye(3), ids, ids)
    assert set(metrics.values()) == {1.0}


def test_the_metrics_are_those_of_both_directions():
    ids = torch.arange(3)
    names = {
        f"{a}_to_{b}_{m}" for a, b in (("image", "text"), ("text", "image")) for m in ("recall@1", "recall@5", "mrr")
    }
    metrics = retrieval_metrics(torch.eye(3), torch.eye(3), ids, ids)
    assert set(metrics) == names | {"image_to_text_recall@10", "text_to_image_recall@10"}
