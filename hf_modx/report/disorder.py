"""The spatial disorder of several runs, as their results keep it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from .runs import RecordedRun
from .tables import Groups

WORDS = {"sam": "SAM: shape of {}", "ram": "RAM: movement of {}"}


def disorder_panels(groups: Groups) -> dict[str, dict[str, dict[str, float]]]:
    """By title, recipe and bin the share of angles from the start to the last phase: the mean over the tests and the
    seeds of those recipes whose runs have all measured it. Empty where none has."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in groups.items():
        found = [_histograms(run) for run in runs]
        for title in found[0]:
            if all(title in histograms for histograms in found):
                shares = [shares for histograms in found for shares in histograms[title]]
                panels.setdefault(title, {})[name] = {b: mean(share[b] for share in shares) for b in shares[0]}
    return panels


def _histograms(run: RecordedRun) -> dict[str, list[dict[str, float]]]:
    """By title the shares of each test."""
    disorder = run.results.get("spatial_disorder") or {"phases": []}
    last = (disorder["phases"] or [None])[-1]
    if last is None:
        return {}
    found: dict[str, list[dict[str, float]]] = {}
    for title, kind, histogram in _of_phase(last["since_start"]):
        found.setdefault(title, []).append(dict(zip(_bins(disorder["bins"][kind]), histogram["shares"], strict=True)))
    return found


def _of_phase(measured: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for test in filter(None, measured["tests"].values()):
        for kind, title in WORDS.items():
            for modality in ("image", "text"):
                yield title.format(f"{modality}s"), kind, test[modality][kind]
    if "shares" in measured.get("imav", {}):
        yield "ImAV: image to caption", "imav", measured["imav"]


def _bins(bounds: Sequence[float]) -> list[str]:
    ends = [0, *bounds, 180]
    return [f"{'(' if low else '['}{low:g}, {high:g}]" for low, high in pairwise(ends)]
