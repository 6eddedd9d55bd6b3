"""Run several recipes over several seeds on the built-in stream and compare them.

    python examples/compare_recipes.py --recipes finetune,modx,joint --seeds 0,1,2 --output_dir runs/comparison

All recipes of a seed start from the same base weights and see the same data in the same order; every phase has the
same number of steps (joint trains phase k for k times as many). Further flags go to `examples/continual_clip.py`.
Runs that are finished are not done again. Writes `comparison.md` and, with the `plots` extra, `comparison.png`; the
same runs make a whole report with `hf-modx report runs/comparison/*-seed* --output_dir report`.

With `--cards FOLDER` the comparison is written there too, and beside it the card of each recipe's last phase for the
first seed:

    python examples/compare_recipes.py --recipes finetune,modx,joint --seeds 0,1,2 --cards runs/cards
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_modx.card_metadata import metric_name
from hf_modx.model_card import PICTURE, write_card_of_run
from hf_modx.plots import draw_curves
from hf_modx.report import RecordedRun, compare, read_run

import continual_clip

METRICS = "image_to_text_recall@1,image_to_text_recall@5"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="finetune,modx,joint", help="names, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    parser.add_argument("--output_dir", default="runs/comparison", type=Path)
    parser.add_argument("--metrics", default=METRICS, help="metrics of results.json, comma-separated")
    parser.add_argument("--cards", type=Path, metavar="FOLDER", help="for cards of the runs and the comparison")
    options, flags = parser.parse_known_args(argv)
    runs: dict[str, list[RecordedRun]] = {}
    for seed in options.seeds.split(","):
        for recipe in options.recipes.split(","):
            folder = options.output_dir / f"{recipe}-seed{seed}"
            run_flags = ["--recipe", recipe, "--seed", seed, "--output_dir", str(folder), "--save_strategy", "no"]
            continual_clip.main([*flags, *run_flags])
            runs.setdefault(recipe, []).append(read_run(folder))
    made_by = ["examples/compare_recipes.py", "--recipes", options.recipes, "--seeds", options.seeds, *flags]
    text = "\n".join(compare(runs, metric).to_markdown() for metric in options.metrics.split(","))
    for folder in filter(None, (options.output_dir, options.cards)):
        write_comparison(
            runs, options.metrics.split(",")[0], f"<!-- Written by: python {shlex.join(made_by)} -->\n{text}", folder
        )
    if options.cards is not None:
        for first, *_ in runs.values():
            write_card(first, options.cards)
    print(text)


def write_comparison(runs: dict[str, Sequence[RecordedRun]], metric: str, text: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(text, encoding="utf-8")
    matrices = {recipe: [run.matrix(metric) for run in seeds] for recipe, seeds in runs.items()}
    try:
        draw_curves(matrices, folder / "comparison.png", f"{metric_name(metric)}, %")
    except ImportError as error:
        print(f"No picture. {error}")


def write_card(run: RecordedRun, folder: Path) -> None:
    """The card of a run's last phase as RUN-phase-K.md, its picture beside it under the same name."""
    number = len(run.results["phases"])
    name = f"{run.name}-phase-{number}"
    with TemporaryDirectory() as scratch:
        write_card_of_run(run.folder, number, Path(scratch))
        card = (Path(scratch) / "README.md").read_text(encoding="utf-8")
        (folder / f"{name}.md").write_text(card.replace(f"]({PICTURE})", f"]({name}.png)"), encoding="utf-8")
        if (Path(scratch) / PICTURE).exists():
            shutil.copy(Path(scratch) / PICTURE, folder / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
