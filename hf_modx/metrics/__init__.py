"""Metrics for the library `evaluate`: each folder is a module with its card.

evaluate.load(metric_path("retrieval_recall"))
"""

from pathlib import Path

METRICS = ("retrieval_recall", "continual_learning")


def metric_path(name: str) -> str:
    """What `evaluate.load` takes to load one of `METRICS`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
