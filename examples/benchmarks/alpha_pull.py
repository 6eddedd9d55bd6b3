"""How hard Mod-X's distillation pulls in batches of different sizes.

    python examples/benchmarks/alpha_pull.py

The student is the built-in small CLIP (seed 0, trained once, then cached) some steps into the first phase of a
built-in stream, the teacher is the model before it. For each batch size: the rows that the teacher has right, and the
norms of the mean gradients of the contrastive term and of the distillation (alpha 1) over all weights but the logit
scale.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator

import torch
from measure import markdown_table
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from hf_modx import ModXTrainingArguments
from hf_modx.data import PairCollator, PairDataset
from hf_modx.demo import BASE_MAX_STEPS, DEMO_DEFAULTS, DEMO_STREAMS, trained_base
from hf_modx.embeddings import PairEmbeddings, embed_pairs
from hf_modx.losses import affinity_distillation, info_nce

Batch = dict[str, Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=list(DEMO_STREAMS), default="domain")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, default=20, help="that the student has taken")
    parser.add_argument("--base_max_steps", type=int, default=BASE_MAX_STEPS)
    parser.add_argument("--batches", type=int, default=12, help="of each size, at most")
    options = parser.parse_args()

    stream = DEMO_STREAMS[options.stream](0)
    with tempfile.TemporaryDirectory() as scratch:
        args = ModXTrainingArguments(output_dir=scratch, report_to="none", **DEMO_DEFAULTS)
        base = trained_base(stream, args, options.base_max_steps)
    student, teacher = (AutoModel.from_pretrained(base).eval() for _ in range(2))
    pairs = PairDataset(stream.phases[0].train, args.image_column, args.caption_column, args.pair_id_column)
    collator = PairCollator.for_model(student, AutoProcessor.from_pretrained(base))
    batch = {
        name: value
        for name, value in collator(pairs.__getitems__(list(range(len(pairs))))).items()
        if isinstance(value, Tensor)
    }
    train(student, batch, options.steps)
    with torch.no_grad():
        old = embed_pairs(teacher, teacher, batch)
    rows = []
    for size in options.sizes:
        number = max(1, min(options.batches, 2 * len(pairs) // size))
        kept, contrastive, distillation = pull(student, old, batch, size, number)
        per_kept = distillation / (size * kept) if kept else float("nan")
        numbers = (f"{kept:.0%}", f"{contrastive:.2f}", f"{distillation:.2f}", f"{100 * per_kept:.2f}")
        rows.append([str(size), *numbers])
    gradients = ("contrastive gradient", "distillation gradient", "the same / (N x rows kept) x 100")
    print(markdown_table(("batch N", "rows kept", *gradients), rows))
    return 0


def train(student: nn.Module, batch: Batch, steps: int, size: int = 128) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-4)
    for own in drawn(batch, size, steps, seed=1):
        new = embed_pairs(student, student, own)
        optimizer.zero_grad()
        info_nce(new.image, new.text, new.logit_scale).backward()
        optimizer.step()


def pull(student: nn.Module, old: PairEmbeddings, batch: Batch, size: int, number: int) -> tuple[float, float, float]:
    """Rows kept, and the norms of the two gradients, each the mean over a number of batches."""
    weights = [weight for name, weight in student.named_parameters() if name != "logit_scale"]
    kept, total = 0.0, [0.0, 0.0]
    for own in drawn({**batch, "old_image": old.image, "old_text": old.text}, size, number, seed=0):
        teacher = own.pop("old_image"), own.pop("old_text")
        new = embed_pairs(student, student, own)
        found = affinity_distillation(new.image, new.text, *teacher)
        kept += (found.image_rows_kept + found.text_rows_kept).item() / 2 / number
        for place, loss in enumerate((info_nce(new.image, new.text, new.logit_scale), found.loss)):
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            filled = [w.new_zeros(w.shape) if g is None else g for w, g in zip(weights, gradients, strict=True)]
            total[place] = total[place] + torch.cat([gradient.flatten() for gradient in filled]) / number
    return kept, *(gradient.norm().item() for gradient in total)


def drawn(batch: Batch, size: int, number: int, seed: int) -> Iterator[Batch]:
    """Batches of random rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(batch["input_ids"])
    for _ in range(number):
        picked = torch.randperm(rows, generator=generator)[:size]
        yield {name: value[picked] for name, value in batch.items()}


if __name__ == "__main__":
    sys.exit(main())
