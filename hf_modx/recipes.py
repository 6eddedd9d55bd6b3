"""Recipes by name: a recipe is a list of loss callbacks."""

import inspect
from collections.abc import Callable
from typing import Any

from .callbacks import Contrastive, Joint, LossCallback, ModX

RECIPES: dict[str, Callable[..., list[LossCallback]]] = {
    "finetune": lambda **options: [Contrastive(**options)],
    "joint": lambda **options: [Joint(**options)],
    "modx": lambda **options: [ModX(**options)],
}
"""Name -> function of the recipe's options that returns fresh callbacks."""

_OPTIONS_OF: dict[str, type[LossCallback]] = {"finetune": Contrastive, "joint": Joint, "modx": ModX}


def build_recipe(name: str, **options: Any) -> list[LossCallback]:
    """Fresh loss callbacks of a named recipe.

    Args:
        name: a key of `RECIPES`.
        options: passed to the recipe's callback, for instance `alpha=20` for "modx".

    Raises:
        ValueError: an unknown name, or an option that the recipe does not have.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}. Recipes: {', '.join(sorted(RECIPES))}.")
    known = list(inspect.signature(_OPTIONS_OF[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"Recipe {name!r} has no option {', '.join(unknown)}. Options: {', '.join(known)}.")
    return RECIPES[name](**options)
