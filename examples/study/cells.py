"""The runs of a study as they lie on the disk: `FOLDER/STREAM/RECIPE-seedN`, finished or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_modx.files import read_json

STUDY, FAILED = "study.json", "failed.json"
REFERENCE, BOUND, OURS = "finetune", "joint", "modx_plus"
"""What the others are compared with."""


@dataclass(frozen=True)
class Cell:
    """A run as it lies on the disk; `results` of a finished one."""

    stream: str
    recipe: str
    seed: int
    front: str | None
    folder: Path
    results: Mapping[str, Any] | None
    state: str


def read_cells(folder: Path) -> list[Cell]:
    cells = []
    for path in sorted(folder.glob(f"*/*/{STUDY}")):
        record, run = read_json(path), path.parent
        results = read_json(run / "results.json") if is_finished(run) else None
        cells.append(
            Cell(run.parent.name, record["recipe"], record["seed"], record.get("front"), run, results, state(run))
        )
    return cells


def is_finished(run: Path) -> bool:
    done, of = progress(run)
    return done > 0 and done == of


def progress(run: Path) -> tuple[int, int]:
    """Phases that are evaluated, and phases of the run."""
    record, results = read_json(run / "run.json"), read_json(run / "results.json")
    if record is None:
        return 0, 0
    return len(results["phases"]) if results is not None else 0, len(record["identity"]["phases"])


def failure(run: Path) -> str | None:
    """Why a run has failed; None where it has not."""
    record = read_json(run / FAILED)
    return record["reason"] if record is not None else None


def state(run: Path) -> str:
    if is_finished(run):
        return "finished"
    if (reason := failure(run)) is not None:
        return f"failed: {reason}"
    done, of = progress(run)
    return f"unfinished: {done} of {of} phases" if of else "unfinished: no phase yet"


def shows_validation(cell: Cell) -> bool:
    """Whether its numbers are of validation drawings, not of the tests."""
    return "--demo_validation" in read_json(cell.folder / STUDY)["flags"]


def finished(cells: Sequence[Cell]) -> dict[str, dict[int, Cell]]:
    """Recipe -> seed -> finished run, fine-tuning first and joint last."""
    place = {REFERENCE: 0, "frozen": 1, BOUND: 3}
    recipes: dict[str, dict[int, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (place.get(cell.recipe, 2), cell.front or "", cell.recipe, cell.seed)):
        if cell.results is not None:
            recipes.setdefault(cell.recipe, {})[cell.seed] = cell
    return recipes
