"""How far the angles between embeddings have moved."""

from collections.abc import Mapping
from pathlib import Path

from .style import NORMAL, PALETTE, add_legend, new_panels, plain_axes, save_figure

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")

Shares = Mapping[str, Mapping[str, float]]
"""By name (of a recipe) and bin (as in "(5, 10]", degrees) fractions in [0, 1]."""


def draw_disorder(panels: Mapping[str, Shares], path: Path) -> None:
    """Bars side by side: the share of angles in each bin, a colour and a hatching for each name.

    Args:
        panels: by title the shares; inside a panel all names have the same bins in the same order.
        path: of the PNG; its folder is made if need be.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: names with other bins than the first of their panel.
    """
    for shares in panels.values():
        bins = list(next(iter(shares.values())))
        for name, share in shares.items():
            if list(share) != bins:
                raise ValueError(f"{name!r} has the bins {list(share)}, others {bins}.")
    names = list(dict.fromkeys(name for shares in panels.values() for name in shares))
    figure, axes_of = new_panels(len(panels), max(3.8, 0.5 * len(names) + 1.6), 2.4, columns=3, sharey=True)
    handles = {}
    for (title, shares), axes in zip(panels.items(), axes_of, strict=True):
        plain_axes(axes, title)
        axes.grid(visible=False, axis="x")
        bins, width = list(next(iter(shares.values()))), 0.8 / len(names)
        for number, name in enumerate(names):
            if name in shares:
                places = [place - 0.4 + width * (number + 0.5) for place in range(len(bins))]
                look = {"color": PALETTE[number % len(PALETTE)], "hatch": HATCHES[number % len(HATCHES)]}
                heights = [100 * shares[name][b] for b in bins]
                handles[name] = axes.bar(places, heights, width, edgecolor="white", linewidth=0.6, **look)
        axes.set_xticks(range(len(bins)), bins)
    figure.supxlabel("degrees", fontsize=NORMAL)
    figure.supylabel("share, %", fontsize=NORMAL)
    add_legend(figure, handles)
    save_figure(figure, path)
