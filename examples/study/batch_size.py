"""Whether alpha means the same in batches of other sizes: as it is, and with `reference_batch_size`.

    python examples/study/batch_size.py --seeds 0,1 --max_steps 100
    python examples/study/batch_size.py --seeds 2 --recipes batch_pairs

The first takes as many steps in batches of 128, 256 and 512, the second sees as many pairs in batches of 64, 256 and
1,024. Options are those of `run.py`, whose entries of the sets `batch` and `batch_pairs` it runs on the domain stream,
in pieces that can be interrupted and taken up again. All runs of a seed start from the same base. The output folder
gets `batch_size.md`: forgetting, plasticity and what is left, and how far the batch sizes are apart.
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
AS_MANY_STEPS = {
    "fine-tuning": {128: "finetune-b128", 256: "finetune-b256", 512: "finetune-b512"},
    "plain alpha": {128: "modx-b128", 256: "modx-b256", 512: "modx-b512"},
    "reference_batch_size 128": {128: "modx-b128", 256: "modx-ref128-b256", 512: "modx-ref128-b512"},
}
AS_MANY_PAIRS = {
    "fine-tuning": {64: "finetune-p64", 256: "finetune-p256", 1024: "finetune-p1024"},
    "plain alpha": {64: "modx-p64", 256: "modx-p256", 1024: "modx-p1024"},
    "reference_batch_size 64": {64: "modx-p64", 256: "modx-ref64-p256", 1024: "modx-ref64-p1024"},
}
MEASURES = ("forgetting", "plasticity", "last")


def main(argv: Sequence[str]) -> int:
    return run.with_report(argv, DEFAULTS, "batch_size.md", batch_tables)


def batch_tables(cells: Sequence[Cell]) -> str:
    """Markdown, a table for each of the two comparisons: measures by batch size over the seeds that all sizes have,
    and the largest difference beside the largest spread. Groups without such a seed are left out."""
    found = finished(cells)
    return "\n".join(filter(None, (batch_table(found, groups) for groups in (AS_MANY_STEPS, AS_MANY_PAIRS))))


def batch_table(found: Mapping[str, Mapping[int, Cell]], groups: Mapping[str, Mapping[int, str]]) -> str:
    """Markdown, empty where no group has a seed of all sizes.

    Args:
        found: by recipe and seed.
        groups: recipes by batch size.
    """
    rows = []
    for group, recipes in groups.items():
        # A seed that one size alone has would stand as a difference between sizes.
        seeds = set.intersection(*(set(found.get(recipe, ())) for recipe in recipes.values()))
        if not seeds:
            continue
        for measure in MEASURES:
            by_size = [
                spread({seed: measures(found[recipe][seed].results, METRIC)[measure] for seed in sorted(seeds)})
                for recipe in recipes.values()
            ]
            means = [of_size["mean"] for of_size in by_size]
            apart = f"{100 * (max(means) - min(means)):.1f}"
            rows.append([escaped(group), measure, *map(plus_minus, by_size), apart, largest_deviation(by_size)])
    sizes = (f"batch {size:,}" for size in groups["fine-tuning"])
    header = ["alpha", "in percent", *sizes, "apart", "largest spread"]
    return table(header, rows) + "\n" if rows else ""


def largest_deviation(by_size: Sequence[Mapping[str, Any]]) -> str:
    """Over the seeds of one size."""
    deviations = [of_size["deviation"] for of_size in by_size if of_size["deviation"] is not None]
    return f"{100 * max(deviations):.1f}" if deviations else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
