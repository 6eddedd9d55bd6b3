"""Time and memory of the Mod-X loss, forward and backward, beside plain PyTorch and beside its own matrix products.

    python examples/benchmarks/loss.py
    python examples/benchmarks/loss.py --sizes 512 --repeats 1 --dimensions 64

Plain PyTorch is `cross_entropy` and `kl_div` on whole matrices, as one would write it. The limit are the six matrix
products that a loss without an N x N matrix cannot do without: each model's cosines forward and backward, and one
product for the gradient of each side. Times are medians of runs that take turns. Memory is what a fresh process needs
above its inputs. The error is that of the gradient, relative, against float64. Last, the authors' way of replacing
rows, in a Python loop, with all rows replaced.
"""

import argparse

import torch
import torch.nn.functional as F
from measure import markdown_table, median_seconds, peak_extra_megabytes
from torch import Tensor

from hf_modx.losses import modx_loss

ALPHA, SCALE = 20.0, 14.3


def embeddings(number: int, dimensions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Images and texts of a new model, with gradient, and of an old one that it has moved away from a little."""
    generator = torch.Generator().manual_seed(0)

    def near(centre: Tensor | float, distance: float) -> Tensor:
        noise = torch.randn(number, dimensions, generator=generator)
        return F.normalize(centre + distance * F.normalize(noise, dim=1), dim=1)

    old_images = near(0.0, 1.0)
    old_texts = near(old_images, 1.0)
    images, texts = near(old_images, 0.3), near(old_texts, 0.3)
    return (
        images.to(dtype).requires_grad_(),
        texts.to(dtype).requires_grad_(),
        old_images.to(dtype),
        old_texts.to(dtype),
        torch.tensor(SCALE, dtype=dtype, requires_grad=True),
    )


def ours(images: Tensor, texts: Tensor, old_images: Tensor, old_texts: Tensor, scale: Tensor) -> Tensor:
    return modx_loss(images, texts, old_images, old_texts, scale, alpha=ALPHA).loss


def plain(images: Tensor, texts: Tensor, old_images: Tensor, old_texts: Tensor, scale: Tensor) -> Tensor:
    new, old, target = images @ texts.T, old_images @ old_texts.T, torch.arange(len(images), device=images.device)
    contrastive = (F.cross_entropy(scale * new, target) + F.cross_entropy(scale * new.T, target)) / 2
    return contrastive + ALPHA * (screened_kl(new, old, target) + screened_kl(new.T, old.T, target)) / 2


def screened_kl(new: Tensor, old: Tensor, target: Tensor) -> Tensor:
    kept = old.argmax(dim=1) == target
    old = torch.where(kept[:, None], old, new.detach())
    return F.kl_div(F.log_softmax(new, dim=1), F.log_softmax(old, dim=1), log_target=True, reduction="sum")


def row_by_row(images: Tensor, texts: Tensor, old_images: Tensor, old_texts: Tensor, scale: Tensor) -> Tensor:
    """As the authors have it: each direction's matrices by products of their own, wrong rows of the old one
    overwritten one after the other, within the graph."""
    target = torch.arange(len(images))
    loss = torch.zeros(())
    for queries, keys, old_queries, old_keys in (
        (images, texts, old_images, old_texts),
        (texts, images, old_texts, old_images),
    ):
        new, old = queries @ keys.T, old_queries @ old_keys.T
        highest = old.max(dim=1).indices
        for i in range(len(new)):
            if highest[i] != i:
                old[i] = new[i]
        divergence = F.kl_div(new.softmax(dim=1).log(), old.softmax(dim=1), reduction="sum")
        loss = loss + (F.cross_entropy(scale * new, target) + ALPHA * divergence) / 2
    return loss


LOSSES = {"ours": ours, "plain": plain, "row by row": row_by_row}


def matrix_products(images: Tensor, texts: Tensor, *_) -> None:
    """The six products in blocks that stay in the cache, and nothing else."""
    rows = max(64, 2**20 // len(texts))
    block, image_grad, text_grad = torch.empty(rows, len(texts)), torch.empty_like(images), torch.zeros_like(texts)
    with torch.no_grad():
        for start in range(0, len(images), rows):
            part = images[start : start + rows]
            for _ in range(4):
                torch.mm(part, texts.T, out=block[: len(part)])
            torch.mm(block[: len(part)], texts, out=image_grad[start : start + rows])
            text_grad.addmm_(block[: len(part)].T, part)


def forward_and_backward(name: str, number: int, dimensions: int):
    """Ready to run, for a process of its own."""
    inputs = embeddings(number, dimensions)
    return lambda: LOSSES[name](*inputs).backward()


def gradient(name: str, number: int, dimensions: int, dtype: torch.dtype) -> Tensor:
    inputs = embeddings(number, dimensions, dtype)
    return torch.autograd.grad(LOSSES[name](*inputs), inputs[0])[0].double()


def wrong_teacher(number: int, dimensions: int) -> tuple[Tensor, ...]:
    """An old model that has every row wrong."""
    images, texts, old_images, old_texts, scale = embeddings(number, dimensions)
    return images, texts, old_images, old_texts.roll(1, dims=0), scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 8192, 16384], help="pairs a batch")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest_timed", type=int, default=8192, help="beyond, only memory is measured")
    options = parser.parse_args()
    rows = []
    for number in options.sizes:
        memory = {
            name: peak_extra_megabytes(forward_and_backward, name, number, options.dimensions)
            for name in ("ours", "plain")
        }
        rows.append([f"{number:,}", *timed_cells(number, options), *memory_cells(memory)])
    print(
        markdown_table(
            ["pairs", "ours", "/ plain", "/ six products", "error", "plain's error", "memory", "/ plain"], rows
        )
    )
    print(f"\nRow by row, 1,024 pairs, all replaced: {loop_ratio(options):.0f} times our time.")


def timed_cells(number: int, options: argparse.Namespace) -> list[str]:
    if number > options.largest_timed:
        return ["-"] * 5
    inputs = embeddings(number, options.dimensions)
    seconds = median_seconds(
        {
            "ours": lambda: ours(*inputs).backward(),
            "plain": lambda: plain(*inputs).backward(),
            "products": lambda: matrix_products(*inputs),
        },
        options.repeats,
    )
    exact = gradient("ours", number, options.dimensions, torch.float64)
    errors = [
        ((gradient(name, number, options.dimensions, torch.float32) - exact).norm() / exact.norm()).item()
        for name in ("ours", "plain")
    ]
    return [
        f"{seconds['ours']:.3f} s",
        f"{seconds['ours'] / seconds['plain']:.2f}",
        f"{seconds['ours'] / seconds['products']:.2f}",
        *(f"{error:.0e}" for error in errors),
    ]


def memory_cells(megabytes: dict[str, float]) -> list[str]:
    return [f"{megabytes['ours']:.0f} MiB", f"{megabytes['ours'] / megabytes['plain']:.3f}"]


def loop_ratio(options: argparse.Namespace) -> float:
    inputs = wrong_teacher(min(1024, max(options.sizes)), options.dimensions)
    seconds = median_seconds(
        {name: lambda name=name: LOSSES[name](*inputs).backward() for name in ("ours", "row by row")}, options.repeats
    )
    return seconds["row by row"] / seconds["ours"]


if __name__ == "__main__":
    main()
