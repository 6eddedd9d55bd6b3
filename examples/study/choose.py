"""Rank what a search has tried: `python examples/study/choose.py runs/study-tune`.

    python examples/study/run.py --tune --recipes search --streams domain,class --seeds 10

The score of an entry is its mean reciprocal rank over the validation tests after the last phase, mean over the
streams. Settings are chosen by it alone, for every recipe alike. Entries that have not finished every stream and seed
of the search have no score. Writes `search.md` into the folder.
"""

import statistics
import sys
from collections import Counter
from pathlib import Path

from cells import STUDY, Cell, read_cells, shows_validation
from measures import summary

from hf_modx.files import read_json, write_text
from hf_modx.markdown import escaped, table

METRIC = "image_to_text_mrr"
BESIDE = ("plasticity", "forgetting")
NOT_A_TRIAL = "frozen"  # trains the bases


def main(folder: Path) -> None:
    cells = [cell for cell in read_cells(folder) if cell.recipe != NOT_A_TRIAL]
    if all(cell.results is None for cell in cells):
        raise SystemExit(f"There is no finished run in {folder}: run the search first.")
    for cell in cells:
        if not shows_validation(cell):
            raise SystemExit(f"{cell.folder} was measured on the tests: settings are chosen with run.py --tune.")
    text = "\n\n".join(["# What the search has tried", counted(cells), ranking(cells)]) + "\n"
    write_text(folder / "search.md", text)
    print(text)


def flags_of(cell: Cell) -> list[str]:
    return read_json(cell.folder / STUDY)["flags"]


def counted(cells: list[Cell]) -> str:
    """How many settings of each recipe were tried, those that failed among them."""
    recipes = Counter({cell.recipe: recipe_of(cell) for cell in cells}.values())
    trials = ", ".join(f"{recipe} {number}" for recipe, number in sorted(recipes.items()))
    seeds = ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))
    finished = sum(cell.results is not None for cell in cells)
    runs = f"{len(cells)} runs" + (f", {finished} of them finished" if finished < len(cells) else "")
    return (
        f"{recipes.total()} settings, {runs}, seed {seeds}. Settings by recipe: {trials}. "
        "What an entry stands for is in the study's `recipes.yaml`."
    )


def recipe_of(cell: Cell) -> str:
    flags = flags_of(cell)
    return flags[flags.index("--recipe") + 1]


def ranking(cells: list[Cell]) -> str:
    """Entries from the best score to the worst; those without one come last."""
    streams = sorted({cell.stream for cell in cells})
    by_entry: dict[str, list[Cell]] = {}
    for cell in cells:
        by_entry.setdefault(cell.recipe, []).append(cell)
    found = {name: [means(own, stream) for stream in streams] for name, own in by_entry.items()}
    runs = {name: sum(cell.results is not None for cell in own) for name, own in by_entry.items()}
    all_runs = len({(cell.stream, cell.seed) for cell in cells})
    score = {name: mean(found[name], "last") if runs[name] == all_runs else -1.0 for name in by_entry}
    header = ["entry", "score", *(f"{stream}: last" for stream in streams), *BESIDE]
    rows = []
    for name in sorted(score, key=score.get, reverse=True):
        last = [
            percent(of_stream["last"]) if of_stream else why_missing(by_entry[name], stream)
            for stream, of_stream in zip(streams, found[name], strict=True)
        ]
        scored = score[name] >= 0
        beside = [percent(mean(found[name], measure)) if scored else "" for measure in BESIDE]
        rows.append([escaped(name), percent(score[name]) if scored else "", *last, *beside])
    said = "Mean reciprocal rank in percent; plasticity and forgetting: mean over the streams."
    return f"{said}\n\n{table(header, rows)}"


def means(own: list[Cell], stream: str) -> dict[str, float]:
    """Of an entry's finished runs on a stream, over their seeds; empty where there is none."""
    for by_metric in summary([cell for cell in own if cell.stream == stream]).values():
        return {measure: by_metric[METRIC][measure]["mean"] for measure in ("last", *BESIDE)}
    return {}


def why_missing(own: list[Cell], stream: str) -> str:
    states = [cell.state.partition(":")[0] for cell in own if cell.stream == stream]
    return states[0] if states else "not run"


def mean(found: list[dict[str, float]], measure: str) -> float:
    return statistics.mean(of_stream[measure] for of_stream in found)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
