"""Recipes by name: a recipe is a list of loss callbacks, and recipes can be added up."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .callbacks import (
    EWC,
    L2SP,
    Anchor,
    Classification,
    Contrastive,
    Cumulative,
    DarkExperienceReplay,
    ExperienceReplay,
    FixedLogitScale,
    Frozen,
    IncCLIP,
    Joint,
    LossCallback,
    LwF,
    ModX,
    ProjectedDistillation,
    ReferenceDistillation,
    WeightEnsemble,
    WeightNormClip,
    WiseFT,
    check_recipe,
)

Recipe = Callable[..., list[LossCallback]]
Part = str | Mapping[str, Mapping[str, Any] | None] | LossCallback


def _with_options_of(other: Callable, *, but: Sequence[str] = ()) -> Callable[[Recipe], Recipe]:
    """Show, in the place of the recipe's `**options`, the options of what it passes them on to."""

    def decorate(recipe: Recipe) -> Recipe:
        own = [option for option in inspect.signature(recipe).parameters.values() if option.kind != option.VAR_KEYWORD]
        passed_on = [option for name, option in inspect.signature(other).parameters.items() if name not in but]
        recipe.__signature__ = inspect.Signature(
            [option.replace(kind=option.KEYWORD_ONLY) for option in [*own, *passed_on]]
        )
        return recipe

    return decorate


def _alone(callback: type[LossCallback]) -> Recipe:
    """A recipe of one callback; its options are the callback's."""

    @_with_options_of(callback)
    def recipe(**options: Any) -> list[LossCallback]:
        return [callback(**options)]

    return recipe


def _beside_contrastive(callback: type[LossCallback]) -> Recipe:
    """Plain contrastive fine-tuning and one callback more; its options are the callback's."""

    @_with_options_of(callback)
    def recipe(**options: Any) -> list[LossCallback]:
        return [Contrastive(), callback(**options)]

    return recipe


@_with_options_of(ModX, but=["screen"])
def kl(**options: Any) -> list[LossCallback]:
    """Mod-X without its screening: every row is distilled, also those that the old model has wrong."""
    return [ModX(screen=False, **options)]


@_with_options_of(ReferenceDistillation)
def zscl(
    *,
    consolidation: float = 1.0,
    ensemble_every: int = 100,
    freeze_logit_scale: bool = True,
    classes: bool = False,
    label_smoothing: float = 0.2,
    **reference: Any,
) -> list[LossCallback]:
    """ZSCL (Zheng et al., ICCV 2023) as in the authors' code: the task, distillation on reference data, weight
    consolidation and weight ensemble.

    Args:
        consolidation: weight of `L2SP`, >= 0.
        ensemble_every: steps between two weights that join the `WeightEnsemble`.
        freeze_logit_scale: do not train the logit scale.
        classes: the task is `Classification` over the classes of the phase, as in the original. False: the contrastive
            loss over image-caption pairs, our reading for data without labels.
        label_smoothing: of the classification.
        reference: options of `ReferenceDistillation`.
    """
    return [
        Classification(label_smoothing) if classes else Contrastive(),
        ReferenceDistillation(**reference),
        L2SP(consolidation),
        WeightEnsemble(ensemble_every),
        *([FixedLogitScale()] if freeze_logit_scale else []),
    ]


@_with_options_of(zscl, but=["consolidation"])
def zscl_star(**options: Any) -> list[LossCallback]:
    """ZSCL*: ZSCL without weight consolidation."""
    return [callback for callback in zscl(**options) if not isinstance(callback, L2SP)]


@_with_options_of(IncCLIP)
def incclip(**options: Any) -> list[LossCallback]:
    """IncCLIP, our reconstruction: replay, pseudo texts, distillation of replayed pairs, and weight-norm clipping."""
    return [IncCLIP(**options), WeightNormClip()]


@_with_options_of(ProjectedDistillation)
def cclip(*, merge_factor: float = 0.5, **options: Any) -> list[LossCallback]:
    """C-CLIP (ICLR 2025): the contrastive term, consolidation through a projector that is trained along,
    and LoRA adapters of which the base takes up a part at the end of each phase.

    The adapter is a matter of the training arguments: `recipe_arguments("cclip")` are those of the paper.

    Args:
        merge_factor: that part, in [0, 1], the weight of `WiseFT`: of an adapter it keeps so much of `s B A`.
        options: of `ProjectedDistillation`.
    """
    return [Contrastive(), ProjectedDistillation(**options), WiseFT(merge_factor)]


def modx_plus(
    *,
    alpha: float = 0.02,
    replay_alpha: float = 0.1,
    reference_batch_size: int | None = None,
    memory_size: int | float = 0.05,
    batch_share: float = 0.25,
) -> list[LossCallback]:
    """Our own combination: Mod-X over batches of which a quarter comes from a memory of 5 % of the pairs seen. The old
    model has most replayed rows right, so that Mod-X has something to keep where everything new is unknown to it, and
    they may be held five times as hard as the new ones, since holding them hinders learning less.

    The cosines are multiplied by ten in the distillation, which looks at the nearest candidates then, and 0.02 pulls
    about as hard as an alpha of 2 does on the cosines themselves.

    Args:
        alpha, replay_alpha: of `ModX`, for batches of 128. In a phase that replays nothing, alpha alone counts.
        reference_batch_size: of `ModX`.
        memory_size, batch_share: of `ExperienceReplay`.
    """
    modx = ModX(alpha, distill_scale=10.0, reference_batch_size=reference_batch_size, replay_alpha=replay_alpha)
    return [modx, ExperienceReplay(memory_size, batch_share, contrastive=False)]


RECIPES: dict[str, Recipe] = {
    "frozen": _alone(Frozen),
    "finetune": _alone(Contrastive),
    "cumulative": _alone(Cumulative),
    "joint": _alone(Joint),
    "modx": _alone(ModX),
    "modx_plus": modx_plus,
    "kl": kl,
    "lwf": _beside_contrastive(LwF),
    "anchor": _beside_contrastive(Anchor),
    "ewc": _beside_contrastive(EWC),
    "l2sp": _beside_contrastive(L2SP),
    "wise_ft": _beside_contrastive(WiseFT),
    "weight_ensemble": _beside_contrastive(WeightEnsemble),
    "zscl": zscl,
    "zscl_star": zscl_star,
    "er": _alone(ExperienceReplay),
    "der": _alone(DarkExperienceReplay),
    "incclip": incclip,
    "cclip": cclip,
}
"""Name -> function of the recipe's options that returns fresh callbacks."""

RECIPE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "cclip": {"peft": "lora", "lora_rank": 16, "lora_dropout": 0.1, "text_learning_rate_factor": 10.0},
}
"""Name -> training arguments that belong to the method, see `recipe_arguments`. C-CLIP's text tower learns 10 to 80
times as fast as its image tower."""


def build_recipe(recipe: str | Sequence[Part], **options: Any) -> list[LossCallback]:
    """Fresh loss callbacks of a recipe, or of several added up.

    In a combination exactly one part keeps the contrastive term: Mod-X before replay, and either before plain
    contrastive fine-tuning, which the recipes of one penalty or one way with weights bring along.

    Args:
        recipe: a key of `RECIPES`, or several as in "modx+er+weight_ensemble". Or a list of parts, each a key, a
            mapping from keys to options as in `{"modx": {"alpha": 5}}`, or a `LossCallback`, which stays as it is; one
            that is to leave the contrastive term to another is copied.
        options: of a single recipe, for instance `alpha=20` for "modx". Of a combination by part, as in
            `modx={"alpha": 5}, ewc={"weight": 100}`.

    Raises:
        ValueError: an unknown name or option, or parts that do not go together, with the reason.
    """
    if isinstance(recipe, str):
        names = [name.strip() for name in recipe.split("+")]
        return _combined(_options_by_part(names, options))
    if options:
        raise ValueError(
            f"Options ({', '.join(options)}) belong to a recipe given by name; configure the callbacks of a list "
            'themselves, or write them beside their part: [{"modx": {"alpha": 5}}, "ewc"].'
        )
    if all(isinstance(part, LossCallback) for part in recipe):
        return list(recipe)
    return _combined([named for part in recipe for named in _named_parts(part)])


def recipe_name(recipe: str | Sequence[Part]) -> str:
    """What a recipe, as `build_recipe` takes it, is called: its parts with plus signs between them."""
    if isinstance(recipe, str):
        return "+".join(name.strip() for name in recipe.split("+"))
    parts = [part for whole in recipe for part, _ in _named_parts(whole)]
    return "+".join(part if isinstance(part, str) else type(part).__name__ for part in parts)


def recipe_arguments(recipe: str | Sequence[Part]) -> dict[str, Any]:
    """The fields of `ModXTrainingArguments` that belong to the methods of a recipe, as `build_recipe` takes it:
    `examples/continual_clip.py` has them as defaults."""
    names = recipe_name(recipe).split("+")
    return {field: value for name in names for field, value in RECIPE_ARGUMENTS.get(name, {}).items()}


def check_teachers(recipe: str | Sequence[Part], callbacks: Sequence[LossCallback], teacher: str) -> None:
    """Raise a ValueError where no part of a recipe asks for this old model, or where parts would ask different ones.

    Args:
        recipe: as `build_recipe` takes it. Of one that is a list of loss callbacks two teachers may be meant.
        callbacks: what it has made of that.
        teacher: of `ModXTrainingArguments`.
    """
    asking = [type(callback).__name__ for callback in callbacks if callback.needs_teacher]
    if teacher == "initial" and not asking:
        raise ValueError(
            f"teacher='initial' has no effect: nothing in the recipe {recipe_name(recipe)} asks the old model about "
            "the new pairs. Leave it out. (ReferenceDistillation has an option teacher of its own.)"
        )
    if teacher == "initial" and any(isinstance(callback, IncCLIP) for callback in callbacks):
        raise ValueError(
            "IncCLIP makes pseudo texts with the model that a phase starts from, and the teacher it distils them from "
            "must be the same one. Leave out teacher='initial'."
        )
    if not isinstance(recipe, str) and all(isinstance(part, LossCallback) for part in recipe):
        return
    for callback in callbacks:
        if asking and isinstance(callback, ReferenceDistillation) and callback.teacher != teacher:
            which = "after the phase before" if teacher == "previous" else "that the run began with"
            raise ValueError(
                f"Two teachers: that of {' and '.join(asking)} is the model {which}, that of ReferenceDistillation "
                f"{callback.teacher!r}. They differ from the second phase on. Give ReferenceDistillation "
                f"teacher={teacher!r}{_or_the_run(callback.teacher)}, or keep one of them."
            )


def _or_the_run(teacher: str) -> str:
    return f" or the training arguments teacher={teacher!r}" if teacher in ("previous", "initial") else ""


def _options_by_part(names: list[str], options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    by_part = set(options) <= set(names) and all(isinstance(value, Mapping) for value in options.values())
    if len(names) == 1 and not (options and by_part):
        return [(names[0], options)]
    if not by_part:
        raise ValueError(
            f"The options of a combination are given by part, {', '.join(names)}: "
            f'{{"{names[0]}": {{"option": value}}}}; got {", ".join(options)}.'
        )
    return [(name, dict(options.get(name, {}))) for name in names]


def _named_parts(part: Part) -> list[tuple[str | LossCallback, dict[str, Any]]]:
    if isinstance(part, Mapping) and all(isinstance(options or {}, Mapping) for options in part.values()):
        return [(name, dict(options or {})) for name, options in part.items()]
    if isinstance(part, str | LossCallback):
        return [(part, {})]
    raise ValueError(
        f'A part of a recipe is a name, a mapping like {{"modx": {{"alpha": 5}}}} or a LossCallback, not {part!r}.'
    )


def _combined(parts: Sequence[tuple[str | LossCallback, dict[str, Any]]]) -> list[LossCallback]:
    brought = {}
    for number, (part, options) in enumerate(parts):
        brought[number] = [part] if isinstance(part, LossCallback) else _build(part, options)
    callbacks = [callback for part in brought.values() for callback in part]
    if len(parts) > 1:
        callbacks = _with_one_contrastive_term(callbacks)
        _refuse_twice(callbacks)
        check_recipe(callbacks)
    return callbacks


def _build(name: str, options: dict[str, Any]) -> list[LossCallback]:
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}. Recipes: {', '.join(sorted(RECIPES))}.")
    known = list(inspect.signature(RECIPES[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"Recipe {name!r} has no option {', '.join(unknown)}. Options: {', '.join(known) or 'none'}.")
    try:
        return RECIPES[name](**options)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"Recipe {name!r} does not take the options {options}: {error}.") from error


def _with_one_contrastive_term(callbacks: list[LossCallback]) -> list[LossCallback]:
    """One owner of the contrastive term stays, the others that yield give it up; a plain `Contrastive`, which has
    nothing else, is left out."""
    owners = [callback for callback in callbacks if callback.owns_contrastive]
    first = sorted(owners, key=lambda callback: (callback.yields_contrastive, type(callback) is Contrastive))[:1]
    yielding = [callback for callback in owners if callback.yields_contrastive and callback not in first]
    kept = [callback for callback in callbacks if not (callback in yielding and type(callback) is Contrastive)]
    return [_without_contrastive_term(callback) if callback in yielding else callback for callback in kept]


def _without_contrastive_term(callback: LossCallback) -> LossCallback:
    other = copy.copy(callback)
    other.owns_contrastive = False
    return other


def _refuse_twice(callbacks: list[LossCallback]) -> None:
    names = [type(callback).__name__ for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two parts of the recipe bring {name}. Keep one of them.")
