"""Tables, figures and model cards of the runs of a study: `python examples/study/tables.py runs/study`.

Reads nothing but the folders of the runs, finished or not, and writes `tables.md`, `measures.csv`, `measures.json`,
figures (with the `plots` extra) and `cards/`.
"""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import OURS, Cell, finished, read_cells, shows_validation
from measures import METRIC, METRICS, UNION, has_collapsed, mean, measures, spread, summary

from hf_modx import callbacks
from hf_modx.callbacks.modx import distils_replayed_alone
from hf_modx.evaluation import EvaluationMatrix
from hf_modx.files import read_json, write_json, write_text
from hf_modx.markdown import table
from hf_modx.model_card import write_card_of_run
from hf_modx.model_card.metadata import metric_name
from hf_modx.plots import draw_curves, draw_tradeoffs

EXTRA = {
    "ReferenceDistillation": "{images_per_step} reference images a step ({image_source})",
    "IncCLIP": "a text made for each stored pair, and embedded with it",
    "EWC": "gradients of {batches} batches a phase",
}
"""What a callback takes that is no replayed pair and no pass of the teacher over the batch."""

SHOWN, BESIDE = (METRICS[0], METRICS[2]), (METRICS[1], METRICS[3])
"""Metrics with tables of their own, and those told of the end alone."""

DEFINITIONS = """\
In percent; mean ± standard deviation over the seeds. A test's gallery is the test itself; every test shows drawings
that were never trained on. Recall@1 counts the images whose own caption comes first; their mean reciprocal rank sees
every rank, so that seeds differ less in it (by chance it is about (ln N + 0.58) / N, 1.9 in a gallery of 341).

- plasticity: what a phase's test reaches right after its phase, mean over phases. Relative: over fine-tuning's.
- old, end: mean over the tests of the base and of all phases but the last, after the last phase.
- last: mean over all tests after the last phase. last - finetune, last - modx_plus: paired by seed, 95 % interval
  (Student's t).
- forgetting: mean over the old tests of their best value, from the phase that teaches them to the one before the
  last, less that after the last. Less finetune's: paired likewise; below zero, the recipe forgets less. Relative: over
  fine-tuning's, of means over seeds.
- forgetting removed: (last - finetune's last) / (finetune's mean right after its phases, base included, - its last),
  of means over seeds; not determined (n.d.) where the denominator is below three standard errors or there is one seed.
- gap to joint: joint's last - last. Joint starts from the base and trains on all pairs for the summed steps.
- union: the pairs of all tests in one gallery, after the last phase.
"""


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise SystemExit(__doc__)
    write(Path(argv[0]), figures=True, cards=True)


def write(folder: Path, *, figures: bool = False, cards: bool = False) -> None:
    """Write all that can be told of the runs below the folder."""
    cells = read_cells(folder)
    streams: dict[str, list[Cell]] = {}
    for cell in cells:
        streams.setdefault(cell.stream, []).append(cell)
    found = {stream: summary(of_stream) for stream, of_stream in streams.items()}
    parts = [DEFINITIONS, *all_streams(found), *map(chapter, streams.values())]
    write_text(folder / "tables.md", "\n".join(["# Study", "", *parts]))
    write_json(folder / "measures.json", found)
    write_csv(cells, folder / "measures.csv")
    if figures:
        draw(streams, folder)
    if cards:
        write_cards(cells, folder / "cards")


# ---- What they cost ----


def costs(cell: Cell) -> dict[str, str]:
    """What a recipe takes beside the student's own pairs, as many a step for all. Where every phase starts from the
    base, as joint's do, the steps are those to the last model."""
    training, parts = cell.results["training"], read_json(cell.folder / "run.json")["identity"]
    options = parts["recipe_args"]
    if all(record["starts_from"] == 0 for record in training):
        training = training[-1:]
    steps = sum(record["steps"] for record in training)
    timed = [record for record in training if record["train_runtime"] and "resumed_at_step" not in record]
    seconds, timed_steps = (sum(record[name] for record in timed) for name in ("train_runtime", "steps"))
    kept = [record["image_rows_kept"]["mean"] for record in training if "image_rows_kept" in record]
    stored = training[-1].get("memory_pairs", training[-1]["pairs"] - parts["phases"][-1]["rows"])
    live = [getattr(callbacks, name) for name in options if hasattr(callbacks, name)]
    which = " of replayed" if distils_replayed_alone(options.get("ModX", {})) else ""
    extra = [text.format(**options[name]) for name, text in EXTRA.items() if name in options]
    return {
        "steps": str(steps),
        "ms a step": f"{1000 * seconds / timed_steps:.0f}" if timed else "not known" if steps else "0",
        "teacher passes a pair": "1" if any(callback.needs_teacher for callback in live) else "0",
        "stored pairs": f"{stored:,}",
        "extra data and passes": ", ".join(extra) or "none",
        "rows distilled": f"{100 * mean(kept):.0f} %{which}" if kept else "not counted",
    }


# ---- Tables ----


def all_streams(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Recipes that every stream has, by means over the streams (of forgetting removed, over those in which it is
    determined, with their number); nothing where there is one stream."""
    if len(found) < 2:
        return []
    shared = [name for name in next(iter(found.values())) if all(name in recipes for recipes in found.values())]
    columns = ["recipe", "forgetting removed", "relative forgetting", "relative plasticity", "last", "union"]
    lines = [f"## Mean over {', '.join(found)}", ""]
    for metric in SHOWN:
        rows = [[name, *means([recipes[name][metric] for recipes in found.values()])] for name in shared]
        lines += [f"{metric_name(metric)}:", "", table(columns, rows), ""]
    return lines


def means(streams: Sequence[Mapping[str, Any]]) -> list[str]:
    removed = [own["forgetting_removed"] for own in streams if own.get("forgetting_removed") is not None]
    relative = [[own.get(f"relative_{measure}") for own in streams] for measure in ("forgetting", "plasticity")]
    ends = [[own[name]["mean"] for own in streams if name in own] for name in ("last", UNION)]
    return [
        f"{percent(mean(removed))} ({len(removed)} of {len(streams)})" if removed else "n.d.",
        *(percent(mean(values)) if None not in values else "n.d." for values in relative),
        *(f"{100 * mean(values):.1f}" if len(values) == len(streams) else "n.d." for values in ends),
    ]


def chapter(cells: Sequence[Cell]) -> str:
    """All of one stream."""
    found, recipes = summary(cells), finished(cells)
    lines = [f"## {cells[0].stream}", ""]
    if recipes:
        some = next(iter(next(iter(recipes.values())).values()))
        lines += [
            f"{setting(some)}{other_settings(recipes)} Device: {devices(recipes)}.",
            "",
            *overview(found, recipes),
            "",
            f"{metric_name(METRIC)} of each test:",
            "",
            by_test(recipes),
            "",
            *prices(recipes),
            "",
        ]
    unfinished = [cell for cell in cells if cell.results is None]
    if unfinished:
        lines += ["Not in these tables:", ""]
        lines += [f"- {cell.recipe}, seed {cell.seed}: {cell.state}" for cell in unfinished]
    collapsed = [cell for cell in cells if cell.results is not None and has_collapsed(cell.results)]
    if collapsed:
        lines += [
            "",
            "At the end no image finds its caption among the first ten, diverged or collapsed to one point:",
            "",
        ]
        lines += [f"- {cell.recipe}, seed {cell.seed}" for cell in collapsed]
    return "\n".join([*lines, ""])


def setting(cell: Cell) -> str:
    record, results = read_json(cell.folder / "run.json"), cell.results
    hyper = record["identity"]["hyperparameters"]
    tests = ", ".join(f"{name} {n} ({100 / n:.2f})" for name, n in results["test_pairs"].items())
    phases = ", ".join(f"{phase['name']} {phase['rows']:,}" for phase in record["identity"]["phases"])
    return (
        f"{'Validation drawings in the place of the tests. ' if shows_validation(cell) else ''}"
        f"Pairs to learn: {phases}. Gallery sizes of the tests (recall@1 by chance, percent): {tests}. "
        f"{hyper['contrastive_batch_size']} pairs a step, learning rate {hyper['learning_rate']:g}, "
        f"{hyper['max_steps']} steps a phase, base {record['identity'].get('base_max_steps')} steps."
    )


def other_settings(recipes: Mapping[str, Mapping[int, Cell]]) -> str:
    """A sentence on the recipes whose hyper-parameters are not those of the first one."""
    known = {
        name: read_json(next(iter(runs.values())).folder / "run.json")["identity"]["hyperparameters"]
        for name, runs in recipes.items()
    }
    first = next(iter(known.values()))
    compared = [name for name in first if name not in ("seed", "data_seed")]
    found = []
    for recipe, own in known.items():
        other = [f"{name} {own.get(name)}" for name in compared if own.get(name) != first[name]]
        found += [f"{recipe} ({', '.join(other)})"] if other else []
    return f" With other settings: {', '.join(found)}." if found else ""


def devices(recipes: Mapping[str, Mapping[int, Cell]]) -> str:
    """Where the runs trained; by seed, where not all did on the same."""
    found: dict[str, set[int]] = {}
    for seed, cell in (item for runs in recipes.values() for item in runs.items()):
        for record in cell.results["training"][:1]:
            found.setdefault(record["environment"]["device"], set()).add(seed)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{device} (seed {', '.join(map(str, sorted(of)))})" for device, of in found.items()) or "unknown"


def overview(found: Mapping[str, Any], recipes: Mapping[str, Mapping[int, Cell]]) -> list[str]:
    """A table a metric, and what of other metrics is told at the end."""
    lines = []
    for metric in SHOWN:
        rows = [[name, seeds(recipes[name]), *measured(own[metric]).values()] for name, own in found.items()]
        columns = measured(next(iter(found.values()))[metric])
        lines += [f"{metric_name(metric)}:", "", table(["recipe", "seeds", *columns], rows), ""]
    rows = [[name, *(plus_minus(own[metric]["last"]) for metric in BESIDE)] for name, own in found.items()]
    lines += ["At the end, all tests:", "", table(["recipe", *map(metric_name, BESIDE)], rows)]
    return lines


def measured(own: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a recipe in one metric, under the names of `DEFINITIONS`."""
    return {
        "plasticity": plus_minus(own["plasticity"]),
        "old, end": plus_minus(own["old"]),
        "last": plus_minus(own["last"]),
        "last - finetune": difference(own.get("last_less_finetune")),
        "forgetting": plus_minus(own["forgetting"]),
        "forgetting - finetune": difference(own.get("forgetting_less_finetune")),
        "relative forgetting": percent(own.get("relative_forgetting")),
        "forgetting removed": percent(own.get("forgetting_removed")),
        "relative plasticity": percent(own.get("relative_plasticity")),
        f"last - {OURS}": difference(own.get(f"last_less_{OURS}")),
        "gap to joint": difference(own.get("gap_to_joint")),
        "union": plus_minus(own[UNION]) if UNION in own else "no such test",
    }


def by_test(recipes: Mapping[str, Mapping[int, Cell]]) -> str:
    """Each test right after the phase that teaches it, and at the end."""
    some = next(iter(next(iter(recipes.values())).values())).results
    tests, learned_at, last = some["tests"], some["learned_at"], len(some["phases"])

    def cell(runs: Mapping[int, Cell], row: int, test: int) -> str:
        return plus_minus(spread({s: run.results["matrix"][METRIC][row][test] for s, run in runs.items()}))

    places = [(f"{tests[i]}, learned", k, i) for i, k in enumerate(learned_at) if isinstance(k, int)]
    places += [(f"{test}, end", last, i) for i, test in enumerate(tests)]
    rows = [[name, *(cell(runs, row, test) for _, row, test in places)] for name, runs in recipes.items()]
    return table(["recipe", *(title for title, _, _ in places)], rows)


def prices(recipes: Mapping[str, Mapping[int, Cell]]) -> list[str]:
    found = {name: costs(next(iter(runs.values()))) for name, runs in recipes.items()}
    columns = list(next(iter(found.values())))
    rows = [[name, *of_recipe.values()] for name, of_recipe in found.items()]
    note = "Of the first seed; the time is that of a machine with as many runs at once as `--jobs` said."
    return [note, "", table(["recipe", *columns], rows)]


def seeds(runs: Mapping[int, Cell]) -> str:
    return " ".join(map(str, runs))


def plus_minus(value: Mapping[str, Any]) -> str:
    if value["mean"] is None:
        return "n.d."
    deviation = f" ± {100 * value['deviation']:.1f}" if value["deviation"] is not None else ""
    return f"{100 * value['mean']:.1f}{deviation}"


def difference(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return "n.d."
    middle = 100 * value["mean"]
    if value["interval"] is None:
        return f"{middle:+.1f}"
    half = 100 * value["interval"]
    return f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"


def percent(value: float | None) -> str:
    return "n.d." if value is None else f"{100 * value:.0f} %"


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """A line a run and metric, fractions."""
    names = ["plasticity", "reached", "old", "last", "forgetting", UNION]
    with open(path, "w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, ["stream", "recipe", "seed", "state", "metric", *names])
        lines.writeheader()
        for cell in cells:
            who = {"stream": cell.stream, "recipe": cell.recipe, "seed": cell.seed, "state": cell.state}
            if cell.results is None:
                lines.writerow(who)
                continue
            for metric in METRICS:
                lines.writerow({**who, "metric": metric, **measures(cell.results, metric)})


def write_cards(cells: Sequence[Cell], folder: Path) -> None:
    """The card after the last phase of every recipe's first finished seed."""
    done = set()
    for cell in cells:
        if cell.results is not None and (cell.stream, cell.recipe) not in done:
            done.add((cell.stream, cell.recipe))
            write_card_of_run(cell.folder, len(cell.results["phases"]), folder / cell.stream / cell.folder.name)


# ---- Figures ----


def draw(streams: Mapping[str, Sequence[Cell]], folder: Path) -> None:
    """Stability against plasticity of all streams, and the curves of each."""
    runs = {stream: recipes for stream, cells in streams.items() if (recipes := finished(cells))}
    if not runs:
        return
    try:
        draw_tradeoffs(
            {f"{stream}, image-to-text recall@1": points(recipes) for stream, recipes in runs.items()},
            folder / "front.png",
            fronts(runs.values()),
        )
        for stream, recipes in runs.items():
            draw_curves(curves(recipes), folder / f"curves-{stream}.png", f"{metric_name(METRIC)}, %")
    except ImportError as error:
        print(f"No figures. {error}")


def points(recipes: Mapping[str, Mapping[int, Cell]]) -> dict[str, list[tuple[float, float]]]:
    """Plasticity and stability of every seed; none of a stream of one phase without a base, which has no old test."""
    found = {recipe: [measures(cell.results, METRIC) for cell in runs.values()] for recipe, runs in recipes.items()}
    return {
        recipe: [(own["plasticity"], own["old"]) for own in seeds]
        for recipe, seeds in found.items()
        if all(own["old"] is not None for own in seeds)
    }


def fronts(streams: Iterable[Mapping[str, Mapping[int, Cell]]]) -> list[list[str]]:
    """The recipes of each front."""
    found: dict[str, list[str]] = {}
    for recipes in streams:
        for recipe, runs in recipes.items():
            front = next(iter(runs.values())).front
            if front is not None and recipe not in found.setdefault(front, []):
                found[front].append(recipe)
    return list(found.values())


def curves(recipes: Mapping[str, Mapping[int, Cell]]) -> dict[str, list[EvaluationMatrix]]:
    """The matrices of each recipe; of fronts only where there is nothing else, as their lines lie close together."""
    alone = {name: runs for name, runs in recipes.items() if next(iter(runs.values())).front is None}
    return {
        name: [EvaluationMatrix.from_results(run.results, METRIC) for run in runs.values()]
        for name, runs in (alone or recipes).items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
