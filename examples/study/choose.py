"""Rank what a search has tried: `python examples/study/choose.py runs/study-tune`.

    python examples/study/run.py --tune --recipes search --streams domain,class --seeds 10
    python examples/study/choose.py runs/study-tune

The score of an entry is its mean reciprocal rank over the validation tests after the last phase, mean over the
streams. Settings are chosen by it alone, for every recipe alike. Entries that some stream lacks have no score. Writes
`search.md` into the folder.
"""

import statistics
import sys
from collections import Counter
from pathlib import Path

import tables

from hf_modx.files import read_json, write_text
from hf_modx.markdown import escaped, table

METRIC = "image_to_text_mrr"
BESIDE = ("plasticity", "forgetting")
NOT_A_TRIAL = "frozen"  # trains the bases


def main(folder: Path) -> None:
    cells = [cell for cell in tables.read_cells(folder) if cell.results is not None and cell.recipe != NOT_A_TRIAL]
    if not cells:
        raise SystemExit(f"There is no finished run in {folder}: run the search first.")
    text = "\n\n".join([counted(cells), ranking(cells)]) + "\n"
    write_text(folder / "search.md", text)
    print(text)


def counted(cells: list[tables.Cell]) -> str:
    """How many settings of each recipe were tried."""
    recipes = Counter({cell.recipe: recipe_of(cell) for cell in cells}.values())
    trials = ", ".join(f"{recipe} {number}" for recipe, number in sorted(recipes.items()))
    seeds = ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))
    return f"{recipes.total()} settings, {len(cells)} runs, seed {seeds}. Settings by recipe: {trials}."


def recipe_of(cell: tables.Cell) -> str:
    flags = read_json(cell.folder / tables.STUDY)["flags"]
    return flags[flags.index("--recipe") + 1]


def ranking(cells: list[tables.Cell]) -> str:
    """Entries from the best score to the worst; those without one come last."""
    streams = sorted({cell.stream for cell in cells})
    by_entry: dict[str, dict[str, dict[str, float]]] = {}
    for stream in streams:
        found = tables.summary([cell for cell in cells if cell.stream == stream])
        for name, by_metric in found.items():
            of_entry = {measure: by_metric[METRIC][measure]["mean"] for measure in ("last", *BESIDE)}
            by_entry.setdefault(name, {})[stream] = of_entry
    score = {name: mean(found, "last") if len(found) == len(streams) else -1.0 for name, found in by_entry.items()}
    header = ["entry", "score", *(f"{stream}: last" for stream in streams), *BESIDE]
    rows = [row(name, by_entry[name], score[name], streams) for name in sorted(score, key=score.get, reverse=True)]
    return "Mean reciprocal rank in percent; plasticity and forgetting: mean over the streams.\n\n" + table(
        header, rows
    )


def row(name: str, found: dict[str, dict[str, float]], score: float, streams: list[str]) -> list[str]:
    complete = score >= 0
    last = [f"{100 * found[stream]['last']:.1f}" if stream in found else "not run" for stream in streams]
    beside = [f"{100 * mean(found, measure):.1f}" if complete else "" for measure in BESIDE]
    return [escaped(name), f"{100 * score:.1f}" if complete else "", *last, *beside]


def mean(found: dict[str, dict[str, float]], measure: str) -> float:
    return statistics.mean(of_stream[measure] for of_stream in found.values())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
