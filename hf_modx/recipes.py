"""Recipes by name: a recipe is a list of loss callbacks."""

import inspect
from collections.abc import Callable
from typing import Any

from .callbacks import Contrastive, Joint, LossCallback, ModX


def _alone(callback: type[LossCallback]) -> Callable[..., list[LossCallback]]:
    """A recipe of one callback; its options are the callback's."""

    def recipe(**options: Any) -> list[LossCallback]:
        return [callback(**options)]

    recipe.__signature__ = inspect.signature(callback)
    return recipe


RECIPES: dict[str, Callable[..., list[LossCallback]]] = {
    "finetune": _alone(Contrastive),
    "joint": _alone(Joint),
    "modx": _alone(ModX),
}
"""Name -> function of the recipe's options that returns fresh callbacks."""


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
    known = list(inspect.signature(RECIPES[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"Recipe {name!r} has no option {', '.join(unknown)}. Options: {', '.join(known)}.")
    return RECIPES[name](**options)
