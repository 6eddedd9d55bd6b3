"""Where things lie in the folder of a run, and what they say of how far it is."""

import logging
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME

from ..files import has_whole_seal, read_json
from ..training.checkpoint import LOSS_CALLBACKS_NAME

logger = logging.getLogger(__name__)

RECORD, RESULTS, MEMORY = "run.json", "results.json", "memory"
PUBLISHED = "hub.json"
"""What is known to be published, and where."""
JOURNAL = "rollback.json"
"""There while a rollback is not finished, and where to."""
DELETED = "deleted.json"
"""Requests to forget pairs: ids and hashes, never an image or a caption. It is not published."""


def phase_folder(run: Path, number: int) -> Path:
    """The model after a phase; 0 is the model before the first one."""
    return run / f"phase-{number}"


def state_file(run: Path, number: int) -> Path:
    """What the loss callbacks keep from a phase for the next ones; written before the phase is."""
    return run / "state" / f"phase-{number}.safetensors"


def checkpoints_folder(run: Path, number: int) -> Path:
    """The Trainer's checkpoints inside a phase."""
    return run / "checkpoints" / f"phase-{number}"


def finished_rows(run: Path) -> int:
    """Rows of the matrix, the one of phase 0 included: so many phases need not be trained or fetched."""
    results = read_json(run / RESULTS)
    return len(results["phases"]) + 1 if results is not None else 0


def has_trained(run: Path) -> bool:
    """A step of some phase was taken, or can have been."""
    return last_trained(run) > 0


def last_trained(run: Path) -> int:
    """The last phase of which a step was taken, or can have been; 0: none. What has a row in the results was trained,
    also where its folder was removed for room."""
    folders = [*run.glob("phase-[1-9]*"), *(path.parent for path in run.glob("checkpoints/*/checkpoint-*"))]
    found = [re.match(r"phase-(\d+)", folder.name) for folder in folders]
    return max(0, finished_rows(run) - 1, *(int(match[1]) for match in found if match))


def forget_start(run: Path) -> None:
    """Remove what a start has left that was given up, or corrected, before it trained."""
    shutil.rmtree(phase_folder(run, 0), ignore_errors=True)
    shutil.rmtree(run / MEMORY, ignore_errors=True)
    shutil.rmtree(run / "state", ignore_errors=True)
    (run / RESULTS).unlink(missing_ok=True)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to which nothing is missing, or None to start the phase afresh. The Trainer itself would
    go on from a part of one with a fresh optimizer, and say nothing."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        needed = ["trainer_state.json", "optimizer.pt", "scheduler.pt", LOSS_CALLBACKS_NAME]
        is_whole = has_whole_seal(checkpoint, may_lack=(TRAINING_ARGS_NAME,))  # the Hub does not get these
        if is_whole and all((checkpoint / name).exists() for name in needed):
            return str(checkpoint)
        logger.warning("%s is incomplete and left out.", checkpoint)
    return None


def refuse_unfinished_rollback(run: Path) -> None:
    """Raise a ValueError where a rollback of the run was interrupted."""
    journal = read_json(run / JOURNAL)
    if journal is not None:
        raise ValueError(
            f"A rollback of {run} was interrupted. Finish it first: hf-modx rollback {run} --to phase-{journal['to']}"
        )
