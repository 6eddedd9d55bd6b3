"""From runs to the files of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from ..evaluation import EvaluationMatrix
from ..files import write_text
from ..markdown import escaped, table
from .classes import LostClasses, lost_classes
from .flips import FlippedTest
from .page import render_page
from .pictures import Picture, draw_comparison, draw_flips, draw_matrices
from .runs import RecordedRun, unequal_settings
from .tables import Comparison, Groups, compare, mean_matrix

METRICS = (
    "image_to_text_recall@1",
    "text_to_image_recall@1",
    "zero_shot_top1",
    "cross_phase_text_to_image_recall@1",
)
TITLE = "Continual runs compared"


def default_metrics(groups: Groups) -> list[str]:
    """The headline metrics that all runs know and some cell of the first run has; its first metric where there are
    none."""
    matrix = next(iter(groups.values()))[0].results["matrix"]
    measured = [name for name, rows in matrix.items() if any(value is not None for row in rows for value in row)]
    of_all = set(METRICS).intersection(*(run.results["matrix"] for runs in groups.values() for run in runs))
    return [name for name in METRICS if name in of_all and name in measured] or measured[:1] or list(matrix)[:1]


def write_report(
    groups: Groups,
    folder: Path,
    *,
    metrics: Sequence[str] | None = None,
    flips: Mapping[str, Sequence[FlippedTest]] | None = None,
) -> Path:
    """Write `report.md` with its pictures, and `report.html`, which holds all in itself and asks nothing of a network.

    Args:
        groups: runs by recipe, see `group_runs`; differences are to the first recipe.
        folder: is made if need be.
        metrics: of results.json; the first is that of the matrices. Default: `default_metrics`.
        flips: by recipe, see `flipped_tests`.

    Returns:
        The path of report.html.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a run has no such metric.
    """
    metrics, flips = list(metrics or default_metrics(groups)), flips or {}
    comparisons = [compare(groups, metric) for metric in metrics]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_comparison(groups, metrics, folder)
    heat_maps = draw_matrices(groups, metrics[0], folder)
    matrices = {
        name: mean_matrix([run.matrix(metrics[0]) for run in runs]).measured() for name, runs in groups.items()
    }
    classes = {name: found for name, runs in groups.items() if (found := lost_classes(runs))}
    examples = [draw_flips(tests, name, number, folder) for number, (name, tests) in enumerate(flips.items(), start=1)]
    write_text(
        folder / "report.md",
        _markdown(groups, comparisons, matrices, [*pictures, *heat_maps, *filter(None, examples)], classes, flips),
    )
    page = render_page(
        title=TITLE,
        about=_about(groups),
        runs=_runs_table(groups),
        comparisons=comparisons,
        pictures=pictures,
        matrices=heat_maps,
        numbers={name: _cells(matrix) for name, matrix in matrices.items()},
        classes=classes,
        flips=flips,
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _about(groups: Groups) -> str:
    """The phases, and what may explain a difference beside the recipe."""
    phases = next(iter(groups.values()))[0].results["phases"]
    said = [f"Phases: {', '.join(phases)}." if phases else "Before the first phase."]
    for setting, values in unequal_settings(groups).items():
        said.append(f"Not alike, {setting}: {', '.join(f'{value} ({name})' for name, value in values.items())}.")
    return " ".join(said)


def _runs_table(groups: Groups) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, runs in groups.items():
        seeds = ", ".join(str(run.seed[0]) for run in runs)
        versions = ", ".join(dict.fromkeys(_versions(run.results["training"]) for run in runs))
        rows.append([name, seeds, ", ".join(run.name for run in runs), versions, _times(runs)])
    return ["recipe", "seeds", "runs", "trained with", "seconds of training, of evaluation"], rows


def _times(runs: Sequence[RecordedRun]) -> str:
    """Of all phases, the mean over the seeds that know both."""
    known = [seconds for run in runs if None not in (seconds := _seconds(run))]
    return ", ".join(f"{mean(of_runs):.0f}" for of_runs in zip(*known, strict=True))


def _seconds(run: RecordedRun) -> list[float | None]:
    """Of training and of evaluation, the evaluation of the start left out; None where a phase does not know, as one
    that was interrupted, whose log begins where it went on."""
    known = [record if record and "resumed_at_step" not in record else {} for record in run.results["training"]]
    training = [record.get("train_runtime") for record in known]
    evaluation = run.results.get("evaluation_seconds", [None, None])[1:]
    return [None if None in seconds else sum(seconds) for seconds in (training, evaluation)]


def _versions(training: Sequence[Mapping | None]) -> str:
    last = next((record["environment"] for record in reversed(training) if record and "environment" in record), None)
    if last is None:
        return ""
    packages = {name: last["versions"][name] for name in ("transformers", "torch") if name in last["versions"]}
    return " ".join([*(f"{name} {version}" for name, version in packages.items()), f"on {last['device']}"])


def _cells(matrix: EvaluationMatrix) -> tuple[list[str], list[list[str]]]:
    names = (["start"] if matrix.has_initial_row else []) + matrix.phases
    rows = [
        [name, *("" if value is None else f"{100 * value:.1f}" for value in values)]
        for name, values in zip(names, matrix.to_lists(), strict=True)
    ]
    return ["after", *matrix.tests], rows


def _markdown(
    groups: Groups,
    comparisons: Sequence[Comparison],
    matrices: Mapping[str, EvaluationMatrix],
    pictures: Sequence[Picture],
    classes: Mapping[str, Sequence[LostClasses]],
    flips: Mapping[str, Sequence[FlippedTest]],
) -> str:
    header, rows = _runs_table(groups)
    parts = [f"# {TITLE}", escaped(_about(groups)), table(header, [map(escaped, row) for row in rows])]
    parts += ["## What was learned and what was forgotten", *(comparison.to_markdown() for comparison in comparisons)]
    parts += ["## Pictures", *(f"![{escaped(picture.shows)}]({picture.file.name})" for picture in pictures)]
    parts += ["## Matrices", f"{escaped(comparisons[0].title)} in percent, before the first phase and after each one."]
    for name, matrix in matrices.items():
        columns, cells = _cells(matrix)
        parts += [f"### {escaped(name)}", table(list(map(escaped, columns)), [map(escaped, row) for row in cells])]
    if classes:
        parts += ["## Classes that lost most", _classes_table(classes)]
    if flips:
        parts += ["## Retrievals that flipped", _flips_table(flips)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _classes_table(classes: Mapping[str, Sequence[LostClasses]]) -> str:
    rows = [
        [escaped(name), escaped(test.test), escaped(label), f"{test.before} to {test.after}", *_percent(old, new)]
        for name, tests in classes.items()
        for test in tests
        for label, old, new in test.worst
    ]
    return table(["recipe", "test", "class", "phases", "before", "after"], rows)


def _percent(*values: float) -> list[str]:
    return [f"{100 * value:.1f}" for value in values]


def _flips_table(flips: Mapping[str, Sequence[FlippedTest]]) -> str:
    rows = [
        [
            escaped(name),
            escaped(test.test),
            f"{test.before} to {test.after}",
            *map(str, (test.pairs, test.lost, test.gained)),
        ]
        for name, tests in flips.items()
        for test in tests
    ]
    return table(["recipe", "test", "phases", "pairs", "lost", "gained"], rows)
