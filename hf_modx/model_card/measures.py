"""What the card says of what was measured: matrices, their summaries, scores, and how embeddings have moved."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import EvaluationMatrix
from ..markdown import escaped, table
from .metadata import metric_name

HEADLINES = ("image_to_text_recall@1", "text_to_image_recall@1", "zero_shot_top1")
OF_LABELS = ("zero_shot_top1", "linear_probe_top1")
"""Metrics of tests of labels that have a matrix of their own below the first one."""
MOVEMENTS = (
    "images turned",
    "angles between images",
    "texts turned",
    "angles between texts",
    "images against texts",
)
MEANINGS = {
    "average": "mean of all values after a phase",
    "last": "mean of the last row",
    "backward_transfer": "mean change of a test since the phase that taught it",
    "forgetting": "mean loss of a test since its best",
    "transfer": "mean of the tests before the phase that teaches them",
    "forward_transfer": "mean change of a test from the start to right before the phase that teaches it",
    "zero_shot_retention": "part of the start's value that is kept, mean over the tests that no phase has taught",
}


def headlines_of(results: Mapping[str, Any]) -> list[str]:
    return [metric for metric in HEADLINES if metric in results["matrix"]] or list(results["matrix"])[:1]


def matrix_after(results: Mapping[str, Any], number: int, metric: str, name=str) -> EvaluationMatrix:
    """The matrix as it was after phase `number`, of the tests that have the metric; `name` changes the names of phases
    and tests."""
    rows = results["matrix"][metric][: number + 1]
    learned_at = [None if isinstance(k, int) and k > number else k for k in results["learned_at"]]
    phases, tests = results["phases"][:number], results["tests"]
    return EvaluationMatrix(list(map(name, phases)), list(map(name, tests)), rows, learned_at).measured()


def is_empty(matrix: EvaluationMatrix) -> bool:
    return all(math.isnan(value) for value in matrix.values.ravel())


def matrix_table(results: Mapping[str, Any], number: int, metric: str) -> str:
    matrix = matrix_after(results, number, metric, escaped)
    return "" if is_empty(matrix) else matrix.to_markdown()


def matrices_of_labels(results: Mapping[str, Any], number: int, headline: str) -> list[tuple[str, str]]:
    """Name and table of each metric of tests of labels; the headline's stands above them."""
    metrics = [metric for metric in OF_LABELS if metric in results["matrix"] and metric != headline]
    tables = [(metric_name(metric), matrix_table(results, number, metric)) for metric in metrics]
    return [(name, table) for name, table in tables if table]


def summary_table(results: Mapping[str, Any], number: int, metrics: Sequence[str]) -> str:
    summaries = [matrix_after(results, number, metric).summary() for metric in metrics]
    rows = []
    for name in summaries[0]:
        values = ["" if summary[name] is None else f"{100 * summary[name]:.1f}" for summary in summaries]
        if any(values):
            rows.append([name.replace("_", " "), *values, MEANINGS.get(name, "")])
    return table(["measure", *map(metric_name, metrics), "meaning"], rows)


def scores_table(results: Mapping[str, Any], number: int) -> str:
    rows = [
        [escaped(metric_name(metric)), *(_score(metric, value) for value in values[number])]
        for metric, values in {**results["matrix"], **results.get("ranks", {})}.items()
    ]
    return table(["metric", *map(escaped, results["tests"])], [row for row in rows if any(row[1:])])


def _score(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if metric.endswith("_rank") else f"{100 * value:.1f}"


def disorder_table(results: Mapping[str, Any], number: int) -> str:
    """Mean angles in degrees; see `hf_modx.evaluation.disorder`."""
    phases = results.get("spatial_disorder", {}).get("phases", [])
    found = phases[number] if number < len(phases) else None
    rows = []
    for since, name in (("since_previous", "the phase before"), ("since_start", "the start")):
        if found is None or (since == "since_start" and number == 1):  # the same
            continue
        for test, measured in found[since]["tests"].items():
            if measured is not None:
                angles = [measured[side][kind]["mean"] for side in ("image", "text") for kind in ("ram", "sam")]
                angles.append(measured["intermodal_rotation"])
                rows.append([name, escaped(test), *("" if angle is None else f"{angle:.1f}" for angle in angles)])
    return table(["compared with", "test", *MOVEMENTS], rows)
