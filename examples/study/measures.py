"""What the runs of a study say: the measures of each, their mean and spread over the seeds, and paired differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cells import BOUND, OURS, REFERENCE, Cell, finished

UNION = "union"
METRIC = "image_to_text_recall@1"
METRICS = (METRIC, "image_to_text_recall@5", "image_to_text_mrr", "text_to_image_recall@1")

# Quantile 0.975 of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def measures(results: Mapping[str, Any], metric: str) -> dict[str, float | None]:
    """The numbers of `tables.DEFINITIONS` for one run, as fractions; `reached` is every test right after what teaches
    it, the base included. None of old tests where there is none: in one phase without a base."""
    matrix, last = results["matrix"][metric], len(results["phases"])
    taught = [(test, phase) for test, phase in enumerate(results["learned_at"]) if isinstance(phase, int)]
    old = [(test, phase) for test, phase in taught if phase < last]
    found = {
        "plasticity": mean(matrix[phase][test] for test, phase in taught if phase > 0),
        "reached": mean(matrix[phase][test] for test, phase in taught),
        "old": mean(matrix[last][test] for test, _ in old),
        "last": mean(matrix[last][test] for test, _ in taught),
        "forgetting": mean(max(row[test] for row in matrix[phase:last]) - matrix[last][test] for test, phase in old),
    }
    if UNION in results["tests"]:
        found[UNION] = matrix[last][results["tests"].index(UNION)]
    return found


def summary(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Recipe -> metric -> measure -> values by seed, mean, spread; and the comparisons with fine-tuning, joint and
    modx_plus."""
    recipes = finished(cells)
    found: dict[str, dict[str, Any]] = {}
    for recipe, runs in recipes.items():
        found[recipe] = {}
        for metric in METRICS:
            by_seed = {seed: measures(cell.results, metric) for seed, cell in runs.items()}
            names = list(next(iter(by_seed.values())))
            found[recipe][metric] = {name: spread({s: m[name] for s, m in by_seed.items()}) for name in names}
    for by_metric in found.values():
        for metric, own in by_metric.items():
            own.update(comparisons(own, *(found.get(other, {}).get(metric) for other in (REFERENCE, BOUND))))
            if OURS in found:
                own[f"last_less_{OURS}"] = paired(own["last"], found[OURS][metric]["last"])
    return found


def comparisons(own: Mapping, finetune: Mapping | None, joint: Mapping | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if joint is not None:
        found["gap_to_joint"] = paired(joint["last"], own["last"])
    if finetune is None:
        return found
    shared = own["last"]["by_seed"].keys() & finetune["last"]["by_seed"].keys()
    if not shared:
        return found
    found["last_less_finetune"] = paired(own["last"], finetune["last"])
    found["forgetting_less_finetune"] = paired(own["forgetting"], finetune["forgetting"])
    for measure in ("plasticity", "forgetting"):
        by_seeds = (part[measure]["by_seed"] for part in (own, finetune))
        both = (mean(by_seed[seed] for seed in shared if seed in by_seed) for by_seed in by_seeds)
        found[f"relative_{measure}"] = ratio(*both)
    lost = paired(spread({seed: finetune["reached"]["by_seed"][seed] for seed in shared}), finetune["last"])
    gained = found["last_less_finetune"]
    if lost["error"] is not None and gained["mean"] is not None and lost["mean"] >= 3 * lost["error"] > 0:
        found["forgetting_removed"] = gained["mean"] / lost["mean"]
    else:
        found["forgetting_removed"] = None
    return found


def spread(by_seed: Mapping[int, float | None]) -> dict[str, Any]:
    """Over the seeds that have the measure; a mean of None where none has."""
    found = {seed: value for seed, value in by_seed.items() if value is not None}
    deviation = statistics.stdev(found.values()) if len(found) > 1 else None
    return {"mean": mean(found.values()), "deviation": deviation, "by_seed": found}


def paired(one: Mapping, other: Mapping) -> dict[str, Any]:
    """The difference over the seeds that both have: mean, standard error and half the 95 % interval."""
    seeds = [seed for seed in one["by_seed"] if seed in other["by_seed"]]
    differences = [one["by_seed"][seed] - other["by_seed"][seed] for seed in seeds]
    error = interval = None
    if len(seeds) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        interval = error * (STUDENT[len(seeds) - 2] if len(seeds) <= len(STUDENT) + 1 else STUDENT[-1])
    return {"mean": mean(differences), "error": error, "interval": interval, "seeds": len(seeds)}


def mean(values) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def has_collapsed(results: Mapping[str, Any]) -> bool:
    """Chance alone would find some."""
    return not any(results["matrix"]["image_to_text_recall@10"][-1])
