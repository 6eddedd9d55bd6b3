"""Retrieval recall in both directions against the one matrix product that it needs at least.

    OMP_NUM_THREADS=2 python examples/benchmarks/retrieval.py
    python examples/benchmarks/retrieval.py --images 500 --captions_per_image 3 --dim 64 --repeats 1

Prints a table: seconds (median of runs side by side), how many times the product's, how far the resident memory rises
above the embeddings (`measure.peak_extra_megabytes`), and recall at 1, 5 and 10 in percent. The product is made into
memory that is there already, the second line is the same with a new matrix. The reference masks the matches of whole
rows and makes a pass for each direction; its ranks are compared with ours, one by one.

The embeddings are random, captions being noisy copies of their image, and all numbers are multiples of 1/1024: sums of
their products are exact in any order, so the ranks have to agree to the last one, and many similarities are tied.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import markdown_table, median_seconds, peak_extra_megabytes
from torch import Tensor

from hf_modx.evaluation import retrieval_metrics, retrieval_ranks
from hf_modx.evaluation.retrieval import RECALL_AT, ROUNDING

NOISE = 6.0
GRID = 1024
PRODUCT, NEW_MATRIX, OURS, REFERENCE = "one matrix product", "the same, new matrix", "hf_modx", "reference, two passes"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions_per_image", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is shown")
    options = parser.parse_args(argv)
    size = (options.images, options.captions_per_image, options.dim)
    names = [PRODUCT, NEW_MATRIX, OURS, REFERENCE]
    memory = {name: peak_extra_megabytes(prepare, name, *size) for name in names}
    pairs = make_pairs(*size)
    seconds = median_seconds({name: method(name, pairs) for name in names}, options.repeats)
    ranks = {OURS: both_ways(retrieval_ranks, *pairs), REFERENCE: both_ways(reference_ranks, *pairs)}
    print(
        f"{len(pairs[0]):,} images x {len(pairs[1]):,} captions x {options.dim}, {torch.get_num_threads()} threads, "
        f"median of {options.repeats}\n"
    )
    recalls = [f"{way}, R@{'/'.join(map(str, RECALL_AT))}" for way in ("image to text", "text to image")]
    rows = [
        [
            name,
            f"{seconds[name]:.3f}",
            f"{seconds[name] / seconds[PRODUCT]:.2f}",
            f"{memory[name]:.0f}",
            *(map(recall, ranks[name]) if name in ranks else "--"),
        ]
        for name in names
    ]
    print(markdown_table(["", "seconds", "products", "extra MiB", *recalls], rows))
    unlike = sum(int((a != b).sum()) for a, b in zip(*ranks.values(), strict=True))
    print(f"\nRanks unlike the reference's: {unlike} of {len(pairs[0]) + len(pairs[1]):,}")


def make_pairs(images: int, captions_per_image: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, captions, and the ids of both, in an order of their own."""
    generator = torch.Generator().manual_seed(0)
    image_embeds = F.normalize(torch.randn(images, dim, generator=generator), dim=1)
    image_ids = torch.randperm(images, generator=generator)
    rows = torch.arange(images).repeat(captions_per_image)
    noise = torch.randn(len(rows), dim, generator=generator).mul_(NOISE / dim**0.5)
    text_embeds = F.normalize(noise.add_(image_embeds[rows]), dim=1)
    return _on_grid(image_embeds), _on_grid(text_embeds), image_ids, image_ids[rows]


def _on_grid(embeds: Tensor) -> Tensor:
    return embeds.mul_(GRID).round_().div_(GRID)


def prepare(name: str, *size: int) -> Callable[[], object]:
    return method(name, make_pairs(*size))


def method(name: str, pairs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], object]:
    images, texts, *_ = pairs
    if name == OURS:
        return lambda: retrieval_metrics(*pairs)
    if name == REFERENCE:
        return lambda: both_ways(reference_ranks, *pairs)
    if name == NEW_MATRIX:
        return lambda: images @ texts.T
    matrix = torch.zeros(len(images), len(texts))
    return lambda: torch.mm(images, texts.T, out=matrix)


def both_ways(
    ranks: Callable[..., Tensor], images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor
) -> list[Tensor]:
    return [ranks(images, texts, image_ids, text_ids), ranks(texts, images, text_ids, image_ids)]


def reference_ranks(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    ranks = []
    for some, ids in zip(queries.split(1024), query_ids.split(1024), strict=True):
        cosines = some @ candidates.T
        matches = ids[:, None] == candidate_ids[None, :]
        best = cosines.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
        not_less = ~(cosines < best - ROUNDING * torch.finfo(cosines.dtype).eps)
        ranks.append(1 + (not_less & ~matches).sum(dim=1))
    return torch.cat(ranks)


def recall(ranks: Tensor) -> str:
    return " / ".join(f"{100 * (ranks <= k).double().mean().item():.1f}" for k in RECALL_AT)


if __name__ == "__main__":
    main()
