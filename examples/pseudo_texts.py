"""Make pseudo texts, the hard negatives of the recipe "incclip", and draw where they lie.

    python examples/pseudo_texts.py

takes the built-in small CLIP (trained once, then cached) and some of the drawings that it knows as memory. Of a run
with replay it takes the model and the memory after a phase:

    python examples/pseudo_texts.py --run runs/incclip-seed0 --phase 2

Writes `pseudo_texts.png` and `pseudo_texts.json`. The left panel shows how far below the image's own caption a text
lies in the old model's eyes, in units of the caption's lead over other captions: 0 is the caption, 1 is any caption.
The right panel shows how near the texts come to that caption.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from matplotlib.figure import Figure
from torch import Tensor

from hf_modx import ModXTrainingArguments
from hf_modx.data import PairCollator, PairDataset
from hf_modx.demo import DEMO_DEFAULTS, demo_stream, trained_base
from hf_modx.pretrained import load_dual_encoder
from hf_modx.pseudo_texts import Inversion, PseudoTexts, PseudoTextSearch

COLOURS = {"pseudo text": "#0072B2", "caption it started from": "#E69F00", "other captions": "#999999"}


def main(argv: list[str]) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run with replay; default: the built-in base")
    parser.add_argument("--phase", type=int, default=0, help="of the run")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="caption")
    parser.add_argument("--pair_id_column", default="pair_id")
    parser.add_argument("--memory_size", type=int, default=256, help="pairs, at most")
    parser.add_argument("--inversion_steps", type=int, default=Inversion.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/pseudo_texts"))
    options = parser.parse_args(argv)

    folder, memory = old_model_and_memory(options)
    model, processor = load_dual_encoder(str(folder))
    pairs = PairDataset(memory, options.image_column, options.caption_column, options.pair_id_column)
    collator = PairCollator.for_model(model, processor)
    search = PseudoTextSearch(model, pairs, collator, batch_size=64)
    inversion = Inversion(steps=options.inversion_steps)
    texts = search(inversion, options.seed)
    numbers = summary(search, texts)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "pseudo_texts.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw(search, texts, inversion, options.output_dir / "pseudo_texts.png")
    print(json.dumps(numbers, indent=2))
    return numbers


def old_model_and_memory(options: argparse.Namespace) -> tuple[Path | str, Dataset]:
    if options.run is not None:
        folder = options.run / f"phase-{options.phase}"
        memory = load_from_disk(str(options.run / "memory" / folder.name))
    else:
        stream = demo_stream(options.seed)
        settings = {name: value for name, value in DEMO_DEFAULTS.items() if name != "max_steps"}
        settings |= {"output_dir": str(options.output_dir), "seed": options.seed, "report_to": "none"}
        args = ModXTrainingArguments(**settings)
        folder, memory = trained_base(stream, args), stream.base.train
    chosen = np.random.default_rng(options.seed).permutation(len(memory))[: options.memory_size]
    return folder, memory.select(np.sort(chosen))


def summary(search: PseudoTextSearch, texts: PseudoTexts) -> dict[str, float]:
    captions = search.captions @ search.captions.T
    means = {
        "in_band": texts.in_band,
        "in_band_and_no_rewording": texts.in_band & ~texts.is_rewording,
        "similarity_to_image": texts.similarity,
        "similarity_of_own_caption_to_image": texts.own_similarity,
        "similarity_of_other_captions_to_image": others(search.images @ search.captions.T),
        "cosine_to_own_caption": texts.to_own_caption,
        "cosine_of_start_to_own_caption": at_start(captions, texts),
        "cosine_of_other_captions_to_own_caption": others(captions),
    }
    return {"images": len(texts), **{name: round(float(value.float().mean()), 4) for name, value in means.items()}}


def draw(search: PseudoTextSearch, texts: PseudoTexts, inversion: Inversion, path: Path) -> None:
    similarities, captions = search.images @ search.captions.T, search.captions @ search.captions.T
    own, lead = texts.own_similarity, texts.lead
    below = [
        (own - texts.similarity) / lead,
        (own - at_start(similarities, texts)) / lead,
        others((own[:, None] - similarities) / lead[:, None]),
    ]
    near = [texts.to_own_caption, at_start(captions, texts), others(captions)]
    figure = Figure(figsize=(10, 3.8), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, bins in ((left, below, np.linspace(-0.2, 1.6, 55)), (right, near, np.linspace(-0.5, 1, 46))):
        for numbers, (name, colour) in zip(values, COLOURS.items(), strict=True):
            share = np.full(len(numbers), 100 / len(numbers))
            axes.hist(numbers.numpy(), bins, weights=share, color=colour, alpha=0.2)
            axes.hist(numbers.numpy(), bins, weights=share, color=colour, histtype="step", lw=1.8, label=name)
        axes.set_ylabel("share, %")
        axes.grid(alpha=0.3)
    left.axvspan(inversion.positive_margin, inversion.negative_margin, color="#009E73", alpha=0.15, label="the band")
    left.axvline(0, color="black", lw=1)
    left.set_xlabel("(s(image, own caption) - s(image, text)) / lead")
    left.set_title(f"{100 * texts.in_band.float().mean():.1f} % of {len(texts)} pseudo texts lie in the band")
    right.set_xlabel("cosine to the own caption")
    right.set_title(f"{100 * (~texts.is_rewording).float().mean():.1f} % are no rewording of it")
    left.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def at_start(matrix: Tensor, texts: PseudoTexts) -> Tensor:
    """(M,): of each row the column of the caption that its search started from."""
    return matrix.gather(1, texts.start_rows[:, None])[:, 0]


def others(matrix: Tensor) -> Tensor:
    """All that is not on the diagonal."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


if __name__ == "__main__":
    main(sys.argv[1:])
