"""Going back to an earlier phase of a run, on the disk and on the Hub.

    rollback.json is written     from here on the run is refused until the same rollback has been finished
    the Hub goes back            main in one commit, then tags and branches, the last first
    run.json, results.json       are those of the phase
    later phases                 their models, checkpoints, states and memories are removed
    rollback.json is removed

Every step looks at what is there and does what is missing.
"""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .deletion import Deletions
from .evaluation import EvaluationMatrix
from .files import publish_file, read_json, write_json
from .hub.publisher import HubPublisher
from .hub.run import revision_of_phase
from .run.folder import (
    JOURNAL,
    MEMORY,
    PUBLISHED,
    RECORD,
    RESULTS,
    finished_rows,
    phase_folder,
    refuse_unfinished_rollback,
    state_file,
)
from .run.identity import identity_of_phase, setting_changes
from .run.lock import alone_in

logger = logging.getLogger(__name__)

PLACES = ("", "checkpoints", "state", MEMORY)
"""Folders of a run in which something is named after a phase."""


def rollback(run: Path, number: int) -> list[str]:
    """Make phase `number` the last one of a run again, as it was when it was finished; 0 is the start.

    Where the run was published, its repository goes back too. Killed at any point, the same call finishes it. The run
    may then go on with other settings and other data for the phases after this one (see `reopen`).

    Args:
        run: its folder.
        number: of a finished phase.

    Returns:
        What was removed from the folder: paths relative to it.

    Raises:
        ValueError: the folder holds no run, the phase is not finished or its model is gone, or another rollback has to
            be finished first.
        BlockingIOError: another process is training in the folder, or changing it.
        RepositoryConflict: another folder has gone on with the run on the Hub, or is publishing.
        HubError: the Hub refuses it, or does not answer.
    """
    if not (run / RECORD).exists():
        raise ValueError(f"{run} holds no run: there is no {RECORD} in it.")
    with alone_in(run):
        return _rollback(run, number)


def _rollback(run: Path, number: int) -> list[str]:
    _check(run, number)
    deletions = Deletions(run, ("", ""))  # which asks for no columns
    record = _record_after(read_json(run / RECORD), number, len(deletions))
    results = _results_after(read_json(run / RESULTS), number) | deletions.results(number)
    results["recipe"] = record["identity"]["recipe"]
    published = read_json(run / PUBLISHED)
    if published is None:
        write_json(run / JOURNAL, {"to": number})
    else:
        _go_back_on_hub(HubPublisher(published["repo_id"], run), run, number, record, results)
    removed = _go_back_on_disk(run, number, record, results)
    (run / JOURNAL).unlink()
    return removed


def reopen(run: Path, identity: Mapping[str, Any], keepers: list[str]) -> dict[str, Any]:
    """Make a run that goes on with other settings after a rollback ready for them; nothing where they are the same.
    Can be repeated until `run.json` holds the new identity.

    What was made with the settings before is removed and made anew: the replay memory, and what loss callbacks have
    learned of the base. Tests of later phases whose data are others leave the results, to be measured again.

    Args:
        identity: of the run as it goes on.
        keepers: the loss callbacks that keep something from phase to phase.

    Returns:
        The `history` for run.json: for each of the settings before the last phase that was trained with them
        (`until_phase`), and the identity of then.
    """
    record, last = read_json(run / RECORD) or {}, finished_rows(run) - 1
    if "identity" not in record:
        return {}
    before, history = record["identity"], record.get("history", [])
    _forget_other_tests(run, before.get("tests", {}), identity["tests"])
    if before["recipe_args"] != identity["recipe_args"]:
        _forget_other_recipe(run)
        _begin_to_keep(run, last, [name for name in keepers if name not in before["recipe_args"]])
    if history and history[-1]["until_phase"] == last:  # with the settings since then nothing was trained
        before, history = history[-1]["identity"], history[:-1]
    if last > 0 and setting_changes(before, identity):
        history = [*history, {"until_phase": last, "identity": before}]
    return {"history": history} if history or "history" in record else {}


def history_in_words(history: list[Mapping[str, Any]], identity: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What results.json says after phase `number` of settings that earlier phases were trained with: the last of those
    phases, and what was changed after it."""
    settings = [entry["identity"] for entry in history] + [identity]
    found = [
        {"until_phase": entry["until_phase"], "changes": setting_changes(settings[place], settings[place + 1])}
        for place, entry in enumerate(history)
        if entry["until_phase"] < number
    ]
    return {"changed_settings": found} if found else {}


# ---- The steps ----


def _check(run: Path, number: int) -> None:
    journal, finished = read_json(run / JOURNAL), finished_rows(run) - 1
    if journal is not None and number != journal["to"]:
        refuse_unfinished_rollback(run)
    if not 0 <= number <= finished:
        known = f"phase-0 to phase-{finished}" if finished > 0 else "phase-0" if finished == 0 else "none"
        raise ValueError(f"There is no finished phase-{number} in {run} to go back to. Finished phases: {known}.")
    if not phase_folder(run, number).exists():
        raise ValueError(f"{phase_folder(run, number)} is gone: nothing could go on from it.")


def _record_after(record: Mapping[str, Any], number: int, deletions: int) -> dict[str, Any]:
    """run.json with the settings that the phase was trained with, and open for others from the next one on. What the
    run was asked to forget since then stays asked: without deleted.json it is refused here and elsewhere."""
    history = record.get("history", [])
    kept = [entry for entry in history if entry["until_phase"] < number]
    of_phase = identity_of_phase(history, record["identity"], number)
    asked = max(deletions, record["identity"].get("deletions", 0))
    return {**record, "identity": {**of_phase, "deletions": asked}, "history": kept, "rolled_back_to": number}


def _results_after(results: Mapping[str, Any], number: int) -> dict[str, Any]:
    """results.json as it was after the phase."""
    rows = slice(number + 1)
    found = dict(results)
    found["phases"], found["training"] = results["phases"][:number], results["training"][:number]
    found.pop("deleted_pairs", None)
    found["learned_at"] = [None if isinstance(k, int) and k > number else k for k in results["learned_at"]]
    for name in ("matrix", "ranks"):
        found[name] = {metric: values[rows] for metric, values in results[name].items()}
    matrices = {metric: EvaluationMatrix.from_results(found, metric) for metric in found["matrix"]}
    found["summary"] = {metric: matrix.summary() for metric, matrix in matrices.items()}
    if "evaluation_seconds" in results:
        found["evaluation_seconds"] = results["evaluation_seconds"][rows]
    if "per_class" in results:
        found["per_class"] = {
            test: {**of_test, "zero_shot_top1": of_test["zero_shot_top1"][rows]}
            for test, of_test in results["per_class"].items()
        }
    if "spatial_disorder" in results:
        phases = results["spatial_disorder"]["phases"][rows]
        found["spatial_disorder"] = {**results["spatial_disorder"], "phases": phases}
        if not any(phases):
            del found["spatial_disorder"]
    changed = [entry for entry in found.pop("changed_settings", []) if entry["until_phase"] < number]
    return {**found, "changed_settings": changed} if changed else found


def _go_back_on_hub(
    publisher: HubPublisher, run: Path, number: int, record: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """The journal is written as soon as it is known that the Hub lets this folder write."""
    publisher.lock()
    try:
        publisher.claim(record, is_new=False, goes_back=True)
        write_json(run / JOURNAL, {"to": number})
        title = f"Back to phase {number}"
        publisher.go_back(revision_of_phase(run, number, None, title, run=record, results=results))
    finally:
        publisher.unlock()


def _go_back_on_disk(run: Path, number: int, record: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    if record["identity"]["recipe_args"] != read_json(run / RECORD)["identity"]["recipe_args"]:
        _forget_other_recipe(run)
    write_json(run / RESULTS, results)
    write_json(run / RECORD, record)
    removed = []
    for path in _later(run, number):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        removed.append(path.relative_to(run).as_posix())
    return removed


def _later(run: Path, number: int) -> list[Path]:
    """What belongs to later phases, finished or not, the last first: a model goes before what it was trained from."""
    found = []
    for place in PLACES:
        for path in (run / place).glob("*phase-*"):
            match = re.fullmatch(r"\.?phase-(\d+)(\.safetensors)?(\.tmp)?", path.name)
            if match and int(match[1]) > number:
                found.append((-int(match[1]), PLACES.index(place), path))
    return [path for *_, path in sorted(found)]


def _forget_other_recipe(run: Path) -> None:
    shutil.rmtree(run / MEMORY, ignore_errors=True)
    state_file(run, 0).unlink(missing_ok=True)


def _begin_to_keep(run: Path, last: int, names: list[str]) -> None:
    """Loss callbacks that the phases so far were trained without have seen nothing yet."""
    if last < 1 or not names:
        return
    logger.warning("%s: nothing is known of the phases up to phase-%d, trained without.", ", ".join(names), last)
    if not state_file(run, last).exists():
        state_file(run, last).parent.mkdir(exist_ok=True)
        temporary = state_file(run, last).with_name(f".{state_file(run, last).name}.tmp")
        save_file({}, temporary)
        publish_file(temporary, state_file(run, last))


def _forget_other_tests(run: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Take the columns of tests with other data out of the results."""
    other = {name for name, data in before.items() if now.get(name, data) != data}
    results = read_json(run / RESULTS)
    if results is None or not other:
        return
    kept = [column for column, test in enumerate(results["tests"]) if test not in other]
    for name in ("matrix", "ranks"):
        results[name] = {
            metric: [[row[column] for column in kept] for row in rows] for metric, rows in results[name].items()
        }
    for name in ("tests", "learned_at"):
        results[name] = [results[name][column] for column in kept]
    for name in other:
        results.get("per_class", {}).pop(name, None)
        for phase in filter(None, results.get("spatial_disorder", {}).get("phases", [])):
            for since in phase.values():
                since["tests"].pop(name, None)
    write_json(run / RESULTS, results)
