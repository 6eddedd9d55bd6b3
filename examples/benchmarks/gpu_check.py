"""Check on a GPU that what is exact on a CPU is exact there too, and time the loss.

    python examples/benchmarks/gpu_check.py
    accelerate launch --multi_gpu --num_processes 2 examples/benchmarks/gpu_check.py     gathering as well
    python examples/benchmarks/gpu_check.py --device cpu --sizes 256 --repeats 1

Prints a line for each check, with the largest error and what it may be at most, then a table: the Mod-X loss beside
plain PyTorch, forward and backward, time and peak memory. Exits with 1 if a check fails.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from gradient_cache import clip, random_pairs
from loss import embeddings, ours, plain
from measure import markdown_table
from torch import Tensor

from hf_modx.distributed import all_gather_rows, gather_stacked, process_index, world_size
from hf_modx.embeddings import embed_pairs
from hf_modx.gradcache import GradientCache
from hf_modx.losses import Shard, info_nce, modx_loss

PAIRS, DIMENSIONS = 256, 128


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.double().cpu() - exact.cpu()).norm() / exact.norm().cpu()).item()


def exact_gradient() -> Tensor:
    """Of the images, in float64 on the CPU."""
    inputs = embeddings(PAIRS, DIMENSIONS, torch.float64)
    return torch.autograd.grad(ours(*inputs), inputs[0])[0]


def on(device: torch.device, dtype: torch.dtype, rows: slice = slice(None)) -> list[Tensor]:
    *embeds, scale = [tensor.detach().to(device, dtype) for tensor in embeddings(PAIRS, DIMENSIONS)]
    return [*(tensor[rows].requires_grad_(number < 2) for number, tensor in enumerate(embeds)), scale]


def loss_in(dtype: torch.dtype) -> Callable[[torch.device], float]:
    def error(device: torch.device) -> float:
        inputs = on(device, dtype)
        return relative(torch.autograd.grad(ours(*inputs), inputs[0])[0], exact_gradient())

    return error


def loss_is_deterministic(device: torch.device) -> float:
    gradients = []
    for _ in range(2):
        inputs = on(device, torch.float32)
        gradients.append(torch.autograd.grad(ours(*inputs), inputs[0])[0])
    return (gradients[0] - gradients[1]).abs().max().item()


def gathered_gradient(device: torch.device) -> float:
    """Each process has its part; their gradients averaged, as data-parallel training does, against one big batch."""
    number, rank = world_size(), process_index()
    start, stop = PAIRS * rank // number, PAIRS * (rank + 1) // number
    images, texts, old_images, old_texts, scale = on(device, torch.float64, slice(start, stop))
    counts = [PAIRS * (k + 1) // number - PAIRS * k // number for k in range(number)]
    whole = [all_gather_rows(tensor, counts) for tensor in (images, texts, old_images, old_texts)]
    shard = Shard(start, stop, number, gather_stacked) if number > 1 else None
    loss = modx_loss(*whole, scale, shard=shard).loss
    gradient = torch.autograd.grad(loss, images)[0] / number
    exact = exact_gradient_of_single_rounded()[start:stop]
    return relative(gradient, exact)


def exact_gradient_of_single_rounded() -> Tensor:
    inputs = on(torch.device("cpu"), torch.float64)
    return torch.autograd.grad(ours(*inputs), inputs[0])[0]


def gradient_cache(device: torch.device) -> float:
    """Of a small CLIP in chunks, against the batch in one piece."""
    model = clip().to(device).double()
    batch = {name: tensor.to(device) for name, tensor in random_pairs(24).items()}
    batch["pixel_values"] = batch["pixel_values"].double()
    whole = copy.deepcopy(model)
    embeds = embed_pairs(whole, whole, batch)
    info_nce(embeds.image, embeds.text, embeds.logit_scale).backward()
    GradientCache(5).backward(
        Accelerator(),
        model,
        batch,
        embed=lambda chunk: embed_pairs(model, model, chunk),
        loss_of=lambda image, text: info_nce(image, text, model.logit_scale.exp()),
    )
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max((first.grad - second.grad).abs().max().item() for first, second in pairs)


# What is checked, and the error that it may have at most.
CHECKS: dict[str, tuple[Callable[[torch.device], float], float]] = {
    "gradient of the loss in float64": (loss_in(torch.float64), 1e-6),  # the inputs are rounded to single precision
    "gradient of the loss in float32": (loss_in(torch.float32), 1e-5),
    "gradient of the loss in bfloat16": (loss_in(torch.bfloat16), 5e-2),  # so is a cosine in bfloat16
    "the same bits twice": (loss_is_deterministic, 0.0),
    "gathered over processes": (gathered_gradient, 1e-12),
    "gradient cache": (gradient_cache, 1e-10),
}


def seconds_and_mebibytes(loss: Callable[..., Tensor], number: int, device: torch.device, repeats: int) -> tuple:
    inputs = [tensor.detach().to(device) for tensor in embeddings(number, 512)]
    for tensor in (*inputs[:2], inputs[4]):
        tensor.requires_grad_()
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        loss(*inputs).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else None
    return statistics.median(times[1:]), peak


def table(options: argparse.Namespace, device: torch.device) -> str:
    rows = []
    for number in options.sizes:
        (our_time, our_peak), (their_time, their_peak) = (
            seconds_and_mebibytes(loss, number, device, options.repeats) for loss in (ours, plain)
        )
        memory = ["-", "-"] if our_peak is None else [f"{our_peak:.0f} MiB", f"{our_peak / their_peak:.3f}"]
        rows.append([f"{number:,}", f"{1000 * our_time:.1f} ms", f"{our_time / their_time:.2f}", *memory])
    return markdown_table(["pairs", "ours", "/ plain", "memory", "/ plain"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu runs the checks without one")
    accelerator = Accelerator(cpu=options.device == "cpu")
    device, failed = accelerator.device, []
    for name, (check, most) in CHECKS.items():
        error = check(device)
        if not error <= most:
            failed.append(name)
        accelerator.print(f"{'ok    ' if error <= most else 'FAILED'} {name}: {error:.1e}, at most {most:.0e}")
    if accelerator.is_main_process:
        print(f"\n{table(options, device)}")
    accelerator.wait_for_everyone()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
