"""Whether alpha means the same in batches of 128, 256 and 512: as it is, and with `reference_batch_size`.

    python examples/study/batch_size.py --seeds 0,1,2

Options are those of `run.py`, whose entries of the set `batch` it runs on the domain stream, in pieces that can be
interrupted and taken up again. All runs of a seed start from the same base and take equally many steps. The output
folder gets `batch_size.md`: forgetting and plasticity, and how far the batch sizes are apart.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STUDY = Path(__file__).resolve().parent
sys.path.insert(0, str(STUDY))

import run  # noqa: E402
from cells import Cell, finished  # noqa: E402
from measures import METRIC, measures, spread  # noqa: E402
from tables import plus_minus  # noqa: E402

from hf_modx.markdown import escaped, table  # noqa: E402

DEFAULTS = {"--recipes": "batch", "--streams": "domain", "--output_dir": "runs/study-batch"}
GROUPS = {
    "fine-tuning": ("finetune-b128", "finetune-b256", "finetune-b512"),
    "plain alpha": ("modx-b128", "modx-b256", "modx-b512"),
    "reference_batch_size 128": ("modx-b128", "modx-ref128-b256", "modx-ref128-b512"),
}
SIZES = (128, 256, 512)


def main(argv: Sequence[str]) -> int:
    return run.with_report(argv, DEFAULTS, "batch_size.md", batch_table)


def batch_table(cells: Sequence[Cell]) -> str:
    """Markdown: forgetting and plasticity by batch size, and the largest difference beside the largest spread."""
    found = finished(cells)
    rows = []
    for group, recipes in GROUPS.items():
        if any(recipe not in found for recipe in recipes):
            continue
        for measure in ("forgetting", "plasticity"):
            by_size = [
                spread({seed: measures(cell.results, METRIC)[measure] for seed, cell in found[recipe].items()})
                for recipe in recipes
            ]
            means = [of_size["mean"] for of_size in by_size]
            apart = f"{100 * (max(means) - min(means)):.1f}"
            rows.append([escaped(group), measure, *map(plus_minus, by_size), apart, largest_deviation(by_size)])
    header = ["alpha", "in percent", *(f"batch {size}" for size in SIZES), "apart", "largest spread"]
    return table(header, rows) + "\n"


def largest_deviation(by_size: Sequence[Mapping[str, Any]]) -> str:
    """Over the seeds of one size."""
    deviations = [of_size["deviation"] for of_size in by_size if of_size["deviation"] is not None]
    return f"{100 * max(deviations):.1f}" if deviations else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
