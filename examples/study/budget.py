"""What a retention budget costs: the ways to keep it, on the domain stream.

    python examples/study/budget.py --seeds 0,1,2

Options are those of `run.py`, whose entries of the set `budget` it runs (`--recipes` for others), in pieces that can
be interrupted and taken up again. The output folder gets `budget.md`: from the matrices alone, which phases kept the
budget of 20 %, what they learned, and the steps and evaluations that it took.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STUDY = Path(__file__).resolve().parent
sys.path.insert(0, str(STUDY))

import run  # noqa: E402
from cells import Cell, finished  # noqa: E402
from measures import METRIC, measures  # noqa: E402

from hf_modx.markdown import escaped, table  # noqa: E402

BUDGET = 0.2
ROUNDING = 1e-9
DEFAULTS = {"--recipes": "budget", "--streams": "domain", "--output_dir": "runs/study-budget"}


def main(argv: Sequence[str]) -> int:
    return run.with_report(argv, DEFAULTS, "budget.md", budget_table)


def budget_table(cells: Sequence[Cell]) -> str:
    """Markdown: a row for each recipe, means over its finished runs."""
    rows = []
    for recipe, runs in finished(cells).items():
        found = [cell.results for cell in runs.values()]
        lost = [loss for results in found for loss in losses(results)]
        learned = [measures(results, METRIC) for results in found]
        within = sum(loss <= BUDGET + ROUNDING for loss in lost)
        rows.append(
            [
                escaped(recipe),
                f"{within} of {len(lost)}",
                f"{100 * max(lost):.1f}",
                *(f"{100 * statistics.mean(one[name] for one in learned):.1f}" for name in ("plasticity", "last")),
                *(f"{statistics.mean(cost(results, name) for results in found):.0f}" for name in COSTS),
                ", ".join(kept(results) for results in found),
            ]
        )
    header = ["recipe", "phases within 20 %", "most lost in a phase", "plasticity", "last"]
    return table([*header, *COSTS, "what the phases kept of their training"], rows) + "\n"


def losses(results: Mapping[str, Any]) -> list[float]:
    """Of each phase: the part of the mean score on the tests taught before it that was lost in it."""
    matrix, taught = results["matrix"][METRIC], results["learned_at"]
    found = []
    for phase in range(1, len(matrix)):
        old = [test for test, learned_at in enumerate(taught) if isinstance(learned_at, int) and learned_at < phase]
        before, after = (statistics.mean(matrix[row][test] for test in old) for row in (phase - 1, phase))
        found.append(1 - after / before if before > 0 else 0.0)
    return found


COSTS = ("steps", "evaluations")


def cost(results: Mapping[str, Any], name: str) -> int:
    """Of all phases; the evaluations are those of the budget."""
    return sum(
        (record if name == "steps" else record.get("retention", {})).get(name, 0) for record in results["training"]
    )


def kept(results: Mapping[str, Any]) -> str:
    """For each phase the share of the way that is kept, or the step that it went back to."""
    said = []
    for record in results["training"]:
        found = record.get("retention", {})
        said.append(
            f"{found['weight']:.2f}" if "weight" in found else f"step {found.get('restored_step', record['steps'])}"
        )
    return " / ".join(said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
