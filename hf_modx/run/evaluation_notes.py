"""What a run notes of its evaluations beside the matrices: the accuracy of every class, and the time they took."""

from collections.abc import Mapping
from typing import Any

from ..evaluation.suite import LabelTest


class EvaluationNotes:
    """By phase, 0 being the start. In results.json:

    - `evaluation_seconds`: of each phase, spatial disorder included; null where it is not known. The time of its
      training is `train_runtime` in `training`.
    - `per_class`: by test `classes`, their names, and `zero_shot_top1`, for each phase a list of fractions in the
      order of the classes; null for a phase that was not measured and for a class without images.

    Args:
        results: of the run so far; None of a new one.
    """

    def __init__(self, results: Mapping[str, Any] | None):
        results = results or {}
        self._seconds = _by_phase(results.get("evaluation_seconds", []))
        self._classes = {
            name: _by_phase(found["zero_shot_top1"]) for name, found in results.get("per_class", {}).items()
        }

    def add_seconds(self, number: int, seconds: float) -> None:
        """Time that the evaluation of a phase has taken, more where a test came later."""
        self._seconds[number] = round(self._seconds.get(number, 0) + seconds, 3)

    def keep_classes(self, number: int, name: str, per_class: list[float | None]) -> None:
        """What the model after a phase reaches in the classes of a test."""
        self._classes.setdefault(name, {})[number] = [v if v is None else round(v, 4) for v in per_class]

    def results(self, number: int, tests: Mapping[str, LabelTest]) -> dict[str, Any]:
        """What results.json holds after a phase, of these tests."""
        phases = range(number + 1)
        per_class = {
            name: {"classes": list(test.names), "zero_shot_top1": [self._classes[name].get(k) for k in phases]}
            for name, test in tests.items()
            if name in self._classes
        }
        seconds = {"evaluation_seconds": [self._seconds.get(k) for k in phases]}
        return seconds | ({"per_class": per_class} if per_class else {})


def _by_phase(values: list) -> dict[int, Any]:
    return {number: value for number, value in enumerate(values) if value is not None}
