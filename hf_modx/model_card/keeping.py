"""What the card says of how a phase was kept from forgetting: its retention budget, and what Mod-X had to keep."""

from collections.abc import Mapping
from typing import Any

from ..callbacks.modx import FEW_ROWS, NEARLY_ALL_ROWS
from ..markdown import escaped
from .metadata import metric_name


def retention_notes(results: Mapping[str, Any], number: int) -> str:
    """A list of sentences, one for each phase up to this one that had a budget (see `RetentionBudget.results`)."""
    records = [(record or {}).get("retention") for record in results["training"][:number]]
    return "\n".join(f"- Phase {k}: {_promise(found)}" for k, found in enumerate(records, start=1) if found)


def _promise(found: Mapping[str, Any]) -> str:
    allowed = f"at most {100 * found['max_forgetting']:g} %"
    if "end" not in found:
        return f"{allowed}; there was no test of what was learned before, so nothing is promised."
    before, after = (_mean(found[when]) for when in ("start", "end"))
    return (
        f"{allowed} of the mean of {_scores(found['tests'])}, which went from {100 * before:.1f} to "
        f"{100 * after:.1f} percent: {_change(found['forgetting'])}. {_how(found)} "
        f"{found['steps']} of {found['planned_steps']} steps, {found['evaluations']} evaluations."
    )


def _scores(tests: Mapping[str, str]) -> str:
    """Each metric with the tests that it is of."""
    metrics = dict.fromkeys(tests.values())
    of_metric = {metric: [escaped(name) for name, own in tests.items() if own == metric] for metric in metrics}
    return " and ".join(f"{metric_name(metric)} on {', '.join(names)}" for metric, names in of_metric.items())


def _how(found: Mapping[str, Any]) -> str:
    if found["action"] == "interpolated":
        return (
            f"Training had ended with {_change(found['forgetting_of_training'])}; of the way from the weights before "
            f"the phase to those, {100 * found['weight']:.1f} % is kept."
        )
    said = f"Training was stopped after step {found['stopped_at']}. " if "stopped_at" in found else ""
    if "restored_step" in found:
        if not found["restored_step"]:
            return f"{said}No look found the budget kept: the weights are those before the phase."
        return f"{said}The weights are those after step {found['restored_step']}, the newest found within the budget."
    return f"{said}The weights are those of the training."


def _change(forgetting: float) -> str:
    return f"{100 * forgetting:.1f} % forgotten" if forgetting >= 0 else f"{-100 * forgetting:.1f} % gained"


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def kept_rows_notes(identity: Mapping[str, Any], results: Mapping[str, Any], number: int) -> list[str]:
    """Sentences on the phases in which Mod-X had nearly nothing to keep, or kept nearly everything, of new pairs."""
    options = identity["recipe_args"].get("ModX", {})
    screen = options.get("screen", False)
    if number == 0 or not screen or options["alpha"] == 0:
        return []
    few, many = [], []
    for k, record in enumerate(results["training"][:number], start=1):
        sides = [record[side]["mean"] for side in ("image_rows_kept", "text_rows_kept") if side in (record or {})]
        kept = sum(sides) / len(sides) if sides else 0.5
        few += [str(k)] if kept < FEW_ROWS and screen is True else []
        many += [str(k)] if kept > NEARLY_ALL_ROWS else []
    notes = []
    if few:
        notes.append(
            f"In phase {' and '.join(few)} the old model had fewer than {100 * FEW_ROWS:g} % of the rows right, "
            "and Mod-X distils no others: what it says of forgetting there is close to plain fine-tuning."
        )
    if many:
        notes.append(
            f"In phase {' and '.join(many)} the old model had more than {100 * NEARLY_ALL_ROWS:g} % of the rows "
            "right: Mod-X held it to nearly all it knew of the new pairs, and may have learned less than it could."
        )
    return notes
