"""How far the angles between embeddings have moved."""

from collections.abc import Mapping
from pathlib import Path

from .style import NORMAL, PALETTE, PLAIN_TEXT, add_legend, lines_of, new_figure, plain_axes, save_figure

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def draw_disorder(shares: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Bars side by side: the share of angles in each bin, a colour and a hatching for each name.

    Args:
        shares: by name (a recipe, or a pair of phases) and bin (as in "(5, 10]", degrees) fractions in [0, 1]; all
            names have the same bins in the same order.
        path: of the PNG; its folder is made if need be.
        title: stands above.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: names with other bins than the first.
    """
    bins = list(next(iter(shares.values())))
    for name, share in shares.items():
        if list(share) != bins:
            raise ValueError(f"{name!r} has the bins {list(share)}, others {bins}.")
    figure = new_figure(max(4.5, 0.22 * len(bins) * len(shares) + 2), 3.4)
    axes = figure.subplots()
    plain_axes(axes)
    width, handles = 0.8 / len(shares), {}
    for number, (name, share) in enumerate(shares.items()):
        places = [place - 0.4 + width * (number + 0.5) for place in range(len(bins))]
        look = {"color": PALETTE[number % len(PALETTE)], "hatch": HATCHES[number % len(HATCHES)]}
        handles[name] = axes.bar(
            places, [100 * share[b] for b in bins], width, edgecolor="white", linewidth=0.6, **look
        )
    axes.set_xticks(range(len(bins)), bins, fontsize=NORMAL, **PLAIN_TEXT)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("degrees", fontsize=NORMAL)
    axes.set_ylabel("share, %", fontsize=NORMAL)
    axes.set_title(lines_of(title, 60), fontsize=NORMAL, **PLAIN_TEXT)
    add_legend(figure, handles)
    save_figure(figure, path)
