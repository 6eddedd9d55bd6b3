"""Run several recipes over several seeds on the built-in stream and compare them.

    python examples/compare_recipes.py --recipes finetune,modx,joint --seeds 0,1,2 --output_dir runs/comparison

All recipes of a seed start from the same base weights and see the same data in the same order; every phase has the
same number of steps (joint trains phase k for k times as many). Further flags go to `examples/continual_clip.py`.
Runs that are finished are not done again. Writes `comparison.md` and, with the `plots` extra, `comparison.png`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import continual_clip

METRICS = "image_to_text_recall@1,image_to_text_recall@5"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="finetune,modx,joint", help="names, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    parser.add_argument("--output_dir", default="runs/comparison", type=Path)
    parser.add_argument("--metrics", default=METRICS, help="metrics of results.json, comma-separated")
    options, flags = parser.parse_known_args(argv)
    results: dict[str, list[dict]] = {}
    for seed in options.seeds.split(","):
        for recipe in options.recipes.split(","):
            folder = options.output_dir / f"{recipe}-seed{seed}"
            run_flags = ["--recipe", recipe, "--seed", seed, "--output_dir", str(folder), "--save_strategy", "no"]
            continual_clip.main([*flags, *run_flags])
            results.setdefault(recipe, []).append(json.loads((folder / "results.json").read_text()))
    metrics = options.metrics.split(",")
    text = "\n".join(tables(results, metric) for metric in metrics)
    (options.output_dir / "comparison.md").write_text(text)
    draw(results, metrics[0], options.output_dir / "comparison.png")
    print(text)


def tables(results: dict[str, list[dict]], metric: str) -> str:
    """Markdown: the summary of each recipe, each test right after its phase and at the end, and the kept rows."""
    first = next(iter(results.values()))[0]
    tests, phases = first["tests"], first["phases"]
    columns: dict[str, Callable[[dict], float]] = {
        name: lambda run, name=name: run["summary"][metric][name] for name in ("forgetting", "last", "average")
    }
    for number, phase in enumerate(phases, start=1):
        columns[f"{phase}, after its phase"] = lambda run, k=number: right_after(run, metric, k)
    for column, test in enumerate(tests):
        columns[f"{test}, end"] = lambda run, i=column: run["matrix"][metric][-1][i]
    lines = [f"### {metric}", "", setting(results, metric), "", table(results, columns)]
    start = [
        f"{test} {spread(next(iter(results.values())), lambda run, i=i: run['matrix'][metric][0][i])}"
        for i, test in enumerate(tests)
    ]
    lines += ["", f"Before the first phase: {', '.join(start)}."]
    for recipe, runs in results.items():
        if all("image_rows_kept" in record for run in runs for record in run["training"]):
            kept = [
                f"{phase} {spread(runs, lambda run, k=k: run['training'][k]['image_rows_kept']['mean'])}"
                for k, phase in enumerate(phases)
            ]
            lines += ["", f"Image rows that the old model has right ({recipe}), percent: {', '.join(kept)}."]
    return "\n".join(lines) + "\n"


def setting(results: dict[str, list[dict]], metric: str) -> str:
    runs = next(iter(results.values()))
    pairs = runs[0]["test_pairs"]
    seeds = "one seed" if len(runs) == 1 else f"mean and standard deviation of {len(runs)} seeds"
    return f"In percent, {seeds}. Pairs in the tests: {', '.join(f'{name} {n}' for name, n in pairs.items())}."


def table(results: dict[str, list[dict]], columns: dict[str, Callable[[dict], float]]) -> str:
    """A row a recipe, and a row for its difference to the first recipe, paired by seed."""
    recipes = list(results)
    lines = ["| recipe | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for recipe in recipes:
        lines.append(
            f"| {recipe} | " + " | ".join(spread(results[recipe], value) for value in columns.values()) + " |"
        )
    for recipe in recipes[1:]:
        pairs = list(zip(results[recipe], results[recipes[0]], strict=True))
        cells = [spread(pairs, lambda pair, v=value: v(pair[0]) - v(pair[1])) for value in columns.values()]
        lines.append(f"| {recipe} - {recipes[0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def right_after(run: dict, metric: str, phase: int) -> float:
    """The test that phase `phase` teaches, right after it."""
    return run["matrix"][metric][phase][run["learned_at"].index(phase)]


def spread(runs: list, value: Callable[[Any], float]) -> str:
    values = [100 * value(run) for run in runs]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def draw(results: dict[str, list[dict]], metric: str, path: Path) -> None:
    """One panel a test: its recall after every phase, a line a recipe with the range over seeds."""
    try:
        import matplotlib
    except ImportError:
        print("No picture: pip install 'hf_modx[plots]'")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = next(iter(results.values()))[0]
    styles = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v")]
    figure, axes = plt.subplots(
        1, len(first["tests"]), figsize=(3 * len(first["tests"]), 3.2), sharey=True, constrained_layout=True
    )
    ticks = range(len(first["phases"]) + 1)
    for test, axis in enumerate(axes):
        for (recipe, runs), (color, marker) in zip(results.items(), styles, strict=False):
            curves = [[100 * row[test] for row in run["matrix"][metric]] for run in runs]
            columns = list(zip(*curves, strict=True))
            axis.plot(ticks, [statistics.mean(c) for c in columns], color=color, marker=marker, label=recipe)
            axis.fill_between(
                ticks, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0
            )
        learned_at = first["learned_at"][test]
        axis.axvline(learned_at, color="grey", lw=1, ls=":")
        axis.set_title(f"test: {first['tests'][test]}")
        axis.set_xticks(ticks, ["start", *first["phases"]], rotation=40, ha="right")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{metric.replace('_', '-')}, %")
    axes[0].legend(frameon=False)
    figure.supxlabel("after phase (dotted: the phase that teaches the test)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
