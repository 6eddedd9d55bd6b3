"""Runs on the disk, and which of them are seeds of one recipe."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..evaluation import EvaluationMatrix
from ..files import read_json
from ..run.folder import RECORD, RESULTS

SEEDS = ("seed", "data_seed")
NEEDED = ("recipe", "phases", "tests", "learned_at", "matrix", "training", "test_pairs")


@dataclass(frozen=True)
class RecordedRun:
    """What a run has written so far.

    Attributes:
        folder: of the run.
        identity: as in run.json.
        results: as in results.json.
    """

    folder: Path
    identity: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def seed(self) -> tuple[Any, ...]:
        """What pairs runs of different recipes."""
        return tuple(self.identity["hyperparameters"].get(name) for name in SEEDS)

    def matrix(self, metric: str) -> EvaluationMatrix:
        results = self.results
        if metric not in results["matrix"]:
            known = ", ".join(results["matrix"])
            raise ValueError(f"{self.folder} has no metric {metric!r}. It has: {known}.")
        return EvaluationMatrix(results["phases"], results["tests"], results["matrix"][metric], results["learned_at"])


def read_run(folder: Path) -> RecordedRun:
    """The run in a folder.

    Raises:
        ValueError: the folder holds no run, one that has evaluated nothing yet, or one of another version.
    """
    record, results = read_json(folder / RECORD), read_json(folder / RESULTS)
    if record is None:
        raise ValueError(f"{folder} holds no run: there is no {RECORD} in it.")
    if results is None:
        raise ValueError(f"{folder} has no results yet: there is no {RESULTS} in it.")
    missing = [name for name in NEEDED if name not in results] + ["identity"] * ("identity" not in record)
    if missing:
        raise ValueError(f"{folder} is no run that this version can read: it does not say {', '.join(missing)}.")
    return RecordedRun(folder, record["identity"], results)


def group_runs(runs: Sequence[RecordedRun]) -> dict[str, list[RecordedRun]]:
    """The runs by recipe, in the order given, each in the order of its seeds. Where runs of one recipe differ in more
    than the seed, the name says in what, as in "modx (alpha 5.0)".

    Raises:
        ValueError: no runs; runs of different streams, or not equally far; runs of one seed with other data in a
            test; one seed of a recipe twice.
    """
    if not runs:
        raise ValueError("There is no run to report.")
    _refuse_other_streams(runs)
    settings = {id(run): _settings(run) for run in runs}
    names = {id(run): _name(run, runs, settings) for run in runs}
    groups: dict[str, list[RecordedRun]] = {}
    for run in runs:
        groups.setdefault(names[id(run)], []).append(run)
    for name, group in groups.items():
        group.sort(key=lambda run: [-1 if number is None else number for number in run.seed])
        for one, other in pairwise(group):
            if one.seed == other.seed:
                raise ValueError(f"{one.folder} and {other.folder} are the same seed of {name}. Give one of them.")
    return groups


def shared_seeds(group: Iterable[RecordedRun], other: Iterable[RecordedRun]) -> list[tuple[RecordedRun, RecordedRun]]:
    """The runs of two recipes, paired by seed."""
    others = {run.seed: run for run in other}
    return [(run, others[run.seed]) for run in group if run.seed in others]


def _refuse_other_streams(runs: Sequence[RecordedRun]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for what in ("phases", "tests", "learned_at"):
            ours, theirs = first.results[what], run.results[what]
            if ours != theirs:
                raise ValueError(
                    f"{first.folder} and {run.folder} cannot be compared: the {what} are {ours} and {theirs}. Give "
                    "runs of one stream that are equally far."
                )
    of_seed: dict[tuple[Any, ...], RecordedRun] = {}
    for run in runs:
        other = of_seed.setdefault(run.seed, run)
        ours, theirs = (one.identity.get("tests", {}) for one in (other, run))
        if changed := [name for name, data in ours.items() if theirs.get(name, data) != data]:
            raise ValueError(
                f"{other.folder} and {run.folder} are of one seed and cannot be compared: the data of the test "
                f"{changed[0]!r} are not the same. Give runs that were tested on the same rows."
            )


def unequal_settings(groups: Mapping[str, Sequence[RecordedRun]]) -> dict[str, dict[str, Any]]:
    """What else than the recipe differs between the groups: the setting -> group -> its value; of each group the first
    run's, as runs of one group differ in the seed alone."""
    settings = {name: _beside_recipe(runs[0]) for name, runs in groups.items()}
    return {
        setting: {name: of_group.get(setting) for name, of_group in settings.items()}
        for setting in _differing(list(settings.values()))
    }


def _settings(run: RecordedRun) -> dict[str, Any]:
    """All that distinguishes a recipe from another, under short names."""
    options = {name: value for values in run.identity["recipe_args"].values() for name, value in values.items()}
    return {**_beside_recipe(run), **options}


def _beside_recipe(run: RecordedRun) -> dict[str, Any]:
    """The model that the run starts from and how it trains, but for the seed and the recipe's own options."""
    model = run.results.get("model") or {}
    start = {"model": model.get("repo_id", model.get("name")), "revision": model.get("revision")}
    others = {name: value for name, value in run.identity["hyperparameters"].items() if name not in SEEDS}
    changed = ", ".join(str(entry["until_phase"]) for entry in run.results.get("changed_settings", [])) or None
    start["settings changed after phase"] = changed  # a rollback permits it: earlier phases had another recipe
    return {**others, **start, "base_max_steps": run.identity.get("base_max_steps")}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names whose values are not the same in all."""
    return [
        name
        for name in dict.fromkeys(name for one in settings for name in one)
        if len({json.dumps(one.get(name), sort_keys=True) for one in settings}) > 1
    ]


def _name(run: RecordedRun, runs: Sequence[RecordedRun], settings: Mapping[int, Mapping[str, Any]]) -> str:
    """The recipe, with the settings in which the runs of this recipe differ."""
    recipe = run.results["recipe"]
    differing = _differing([settings[id(other)] for other in runs if other.results["recipe"] == recipe])
    said = ", ".join(f"{name} {settings[id(run)].get(name)}" for name in differing)
    return f"{recipe} ({said})" if said else recipe
