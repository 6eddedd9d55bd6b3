"""The pictures of a report."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.disorder import bin_names
from ..model_card.metadata import metric_name
from ..plots import (
    draw_curves,
    draw_disorder,
    draw_matrix,
    draw_retrieved,
    draw_tradeoff,
    draw_training,
    largest_value,
)
from .flips import FlippedTest, spaced
from .runs import RecordedRun
from .tables import Groups, mean_matrix, plasticity, stability

DRAWN = 12
"""About so many retrievals are in a picture."""


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows, in words for those who do not see it."""

    file: Path
    shows: str


def draw_comparison(groups: Groups, metrics: Sequence[str], folder: Path) -> list[Picture]:
    """Curves of each metric; of the first one what is learned against what is kept; the terms of the loss, where
    the runs have kept their log.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures = []
    for metric in metrics:
        matrices = {name: [run.matrix(metric) for run in runs] for name, runs in groups.items()}
        file, named = folder / f"curves-{_slug(metric)}.png", metric_name(metric)
        draw_curves(matrices, file, f"{named}, %")
        pictures.append(Picture(file, f"{named} of every test after every phase"))
    points = _tradeoff(groups, metrics[0])
    if points:
        file = folder / "tradeoff.png"
        draw_tradeoff(points, file, metric_name(metrics[0]))
        pictures.append(Picture(file, "What is learned against what is kept"))
    logs = _logs(groups)
    if logs:
        steps = {name: [record["steps"] for record in groups[name][0].results["training"]] for name in logs}
        file, phases = folder / "training.png", next(iter(groups.values()))[0].results["phases"]
        draw_training(logs, steps, phases, file)
        pictures.append(Picture(file, "Loss and its terms while training"))
    return pictures + _draw_disorder(groups, folder)


def draw_matrices(groups: Groups, metric: str, folder: Path) -> list[Picture]:
    """The matrix of each recipe, the mean over its seeds, all in the same colours.

    Raises:
        ImportError: matplotlib is not installed.
    """
    means = {name: mean_matrix([run.matrix(metric) for run in runs]).measured() for name, runs in groups.items()}
    brightest = largest_value(*means.values())
    pictures = []
    for number, (name, matrix) in enumerate(means.items(), start=1):
        file = folder / f"matrix-{number}-{_slug(name)}.png"
        seeds = ", mean over seeds" if len(groups[name]) > 1 else ""
        draw_matrix(matrix, file, f"{name}: {metric_name(metric)}, %{seeds}", brightest)
        pictures.append(Picture(file, f"Matrix of {name}"))
    return pictures


def draw_flips(flipped: Sequence[FlippedTest], name: str, number: int, folder: Path) -> Picture | None:
    """Some examples of one recipe; None without any."""
    each = max(1, DRAWN // max(1, len(flipped)))
    examples = [example for test in flipped for example in spaced(test.examples, each)]
    if not examples:
        return None
    file = folder / f"retrieved-{number}-{_slug(name)}.png"
    draw_retrieved(examples, file)
    return Picture(file, f"Retrievals that {name} lost and gained")


DISORDER = {
    "ram": "Angles between embeddings before the first phase and after the last (RAM)",
    "sam": "Changes of the angles within a modality from before the first phase to after the last (SAM)",
}


IMAV = {"since_start": "from before the first phase to after the last", "since_previous": "over the last phase"}
"""Of training pairs of the earlier one; where the start has no such pairs, those of the last phase but one."""


def _draw_disorder(groups: Groups, folder: Path) -> list[Picture]:
    """Means over the tests and the seeds, of the recipes that have measured it."""
    pictures = []
    for measure, title in DISORDER.items():
        shares = {
            f"{name}, {modality}s": share
            for name, runs in groups.items()
            for modality in ("image", "text")
            if (share := _shares(runs, modality, measure))
        }
        if shares:
            file = folder / f"disorder-{measure}.png"
            draw_disorder(shares, file, title)
            pictures.append(Picture(file, title))
    for since, span in IMAV.items():
        found = {name: _imav_shares(runs, since) for name, runs in groups.items()}
        shares = {f"{name} ({pairs} pairs)": share for name, (pairs, share) in found.items() if pairs}
        if shares:
            file, title = folder / "disorder-imav.png", f"Changes of the angle between image and caption {span} (ImAV)"
            draw_disorder(shares, file, title)
            return [*pictures, Picture(file, title)]
    return pictures


def _shares(runs: Sequence[RecordedRun], modality: str, measure: str) -> dict[str, float]:
    """By bin; empty where no run knows."""
    tests = [test for last in _last_phases(runs) for test in last["since_start"]["tests"].values()]
    return _mean_shares(runs, measure, [test[modality][measure] for test in tests if test is not None])


def _imav_shares(runs: Sequence[RecordedRun], since: str) -> tuple[int, dict[str, float]]:
    """Training pairs that the older model retrieved, their number over all seeds, and the shares of their changes by
    bin."""
    found = [last[since].get("imav", {}) for last in _last_phases(runs)]
    known = [histogram for histogram in found if "shares" in histogram]
    return sum(histogram["pairs"] for histogram in known), _mean_shares(runs, "imav", known)


def _last_phases(runs: Sequence[RecordedRun]) -> list[Mapping]:
    """What each run knows of the disorder after its last phase."""
    known = [run.results.get("spatial_disorder", {}).get("phases", []) for run in runs]
    return [phases[-1] for phases in known if phases and phases[-1]]


def _mean_shares(runs: Sequence[RecordedRun], measure: str, histograms: Sequence[Mapping]) -> dict[str, float]:
    if not histograms:
        return {}
    bins = next(run.results["spatial_disorder"]["bins"] for run in runs if "spatial_disorder" in run.results)
    means = [statistics.mean(share) for share in zip(*(found["shares"] for found in histograms), strict=True)]
    return dict(zip(bin_names(bins[measure]), means, strict=True))


def _tradeoff(groups: Groups, metric: str) -> Mapping[str, list[tuple[float, float]]]:
    points = {}
    for name, runs in groups.items():
        pairs = [(plasticity(run.matrix(metric)), stability(run.matrix(metric))) for run in runs]
        pairs = [pair for pair in pairs if None not in pair]
        if pairs:
            points[name] = pairs
    return points


def _logs(groups: Groups) -> dict[str, list[list[Mapping]]]:
    """By recipe the logs of each seed's phases, of those recipes that have logged anything."""
    logs = {
        name: [[(record or {}).get("log", {}) for record in run.results["training"]] for run in runs]
        for name, runs in groups.items()
    }
    return {name: seeds for name, seeds in logs.items() if any(log for phases in seeds for log in phases)}


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name, flags=re.ASCII).strip("-").lower()[:40]
