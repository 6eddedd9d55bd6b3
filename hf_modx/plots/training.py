"""The terms of the loss while training, phase after phase."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .style import NORMAL, add_legend, line_styles, name_ticks, new_panels, plain_axes, save_figure

Log = Mapping[str, Sequence[float | None]]
"""Of a phase, as `thinned_log` makes it: `step` and other values of the same length."""


def draw_training(
    runs: Mapping[str, Sequence[Sequence[Log]]], steps: Mapping[str, Sequence[int]], phases: Sequence[str], path: Path
) -> None:
    """One panel a value that was logged: a line a recipe, the mean over its seeds with their range shaded. Every phase
    is as wide as the others, however many steps a recipe takes in it.

    Args:
        runs: by recipe, of each seed, the log of each phase.
        steps: by recipe, the steps of each phase.
        phases: their names.
        path: of the PNG; its folder is made if need be.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no phase of any run has a log.
    """
    names = list(dict.fromkeys(name for seeds in runs.values() for logs in seeds for log in logs for name in log))
    names = [name for name in names if name != "step"]
    if not names:
        raise ValueError("No phase has a log: there is nothing to draw.")
    looks = line_styles(list(runs))
    width = min(max(3.2, 0.7 * len(phases)), 8)
    figure, panels = new_panels(len(names), width, 2.2, columns=max(1, int(13 / width)))
    handles: dict[str, Any] = {}
    for name, axes in zip(names, panels, strict=True):
        plain_axes(axes, name.replace("_", " "))
        for recipe, seeds in runs.items():
            look = {key: looks[recipe][key] for key in ("color", "linestyle")}
            for number in range(len(phases)):
                line = _draw_phase(axes, [logs[number] for logs in seeds], name, number, steps[recipe][number], look)
                handles.setdefault(recipe, line)
        for boundary in range(1, len(phases)):
            axes.axvline(boundary, color="dimgrey", linewidth=1, linestyle=":", zorder=1)
        axes.set_xlim(0, len(phases))
        axes.tick_params(axis="x", length=0)
    name_ticks(figure, panels, [number + 0.5 for number in range(len(phases))], phases)
    figure.supxlabel("steps of each phase", fontsize=NORMAL)
    add_legend(figure, {recipe: line for recipe, line in handles.items() if line is not None})
    save_figure(figure, path)


def _draw_phase(axes, logs: Sequence[Log], name: str, number: int, steps: int, look: Mapping) -> Any:
    """The line, or None where no seed has the value; steps that only some seeds have logged are left out."""
    by_step: dict[int, list[float]] = {}
    for log in logs:
        for step, value in zip(log.get("step", []), log.get(name, []), strict=False):
            if value is not None:
                by_step.setdefault(step, []).append(value)
    shared = {step: values for step, values in by_step.items() if len(values) == len(logs)}
    if not shared:
        return None
    places = [number + step / max(steps, 1) for step in shared]
    (line,) = axes.plot(places, [mean(values) for values in shared.values()], linewidth=1.6, **look)
    if len(logs) > 1:
        low, high = ([extreme(values) for values in shared.values()] for extreme in (min, max))
        axes.fill_between(places, low, high, color=look["color"], alpha=0.18, linewidth=0)
    return line
