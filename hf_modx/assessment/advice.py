"""From measures to a recipe.

The rule has one quantity: the share of a batch's rows that hold what the old model knows. Plain fine-tuning holds
none, Mod-X the rows that the old model has right, and with replay old pairs are in the batch, most of which it has
right. Recipes are ranked by it.

The thresholds. `FEW` is that of Mod-X's own warning. `MOST` is its mirror: so many rows are right that a batch has
little to teach. `HALF` is a majority, and no more than that; below it the study on the built-in streams (model_cards)
has replay beside Mod-X ahead in every stream: it was chosen with a look at their results, at 1 to 23 % of kept rows.
What lies between 23 % and a half was not tried.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .measures import REPLAY_SHARE, Assessment

FEW, HALF, MOST = 0.05, 0.5, 0.95
MEMORY_SHARE = 0.05
"""Of the old pairs, what modx_plus remembers; at least what a batch replays."""
ALPHAS, REFERENCE_BATCH_SIZE = {"modx": 2.0, "modx_plus": 0.02}, 128
"""What the study on the built-in streams has chosen. (The paper has 20 for 280, which pulls ten times as hard.) Those
of modx_plus, which multiplies the cosines by ten, pull about as hard on new pairs."""
KL_ALPHA = 0.2
"""With which kl learned as much there as Mod-X, and kept more."""
MANY_DUPLICATES = 0.01
INDISTINGUISHABLE = 0.55


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        recipe: a name of `RECIPES`: "frozen", "modx" or "modx_plus".
        ranking: "finetune", "modx" and "modx_plus", the best first: by their expected mean over old and new tests
            after the phase. "modx_plus" stands in it only where there are old pairs.
        held: of each of these the share of rows that hold what the old model knows, in [0, 1].
        alike: recipes next to each other in the ranking between which the measures do not decide.
        alpha, reference_batch_size: to start with, options of the recipe; None where there is nothing to train.
        memory_pairs: to replay; None without replay, or where there are no old pairs yet.
        sentence: the advice.
        notes: what else to know.
    """

    recipe: str
    ranking: list[str]
    held: dict[str, float]
    alike: list[list[str]]
    alpha: float | None
    reference_batch_size: int | None
    memory_pairs: int | None
    sentence: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def advise(
    found: Assessment | Sequence[Assessment],
    *,
    target_recall: float | None = None,
) -> Advice:
    """Advice on a phase, or on the phases of a run, which have one recipe: it is that of the phase with the fewest
    rows kept.

    Args:
        found: what `assess` says.
        target_recall: image-to-text recall@1 that is good enough, in [0, 1].

    Raises:
        ValueError: nothing is given, or the target is out of its range.
    """
    phases = [found] if isinstance(found, Assessment) else list(found)
    if not phases:
        raise ValueError("There is no phase to give advice on.")
    if target_recall is not None and not 0 <= target_recall <= 1:
        raise ValueError(f"target_recall must be in [0, 1], got {target_recall}.")
    worst = min(phases, key=lambda phase: phase.kept[phase.batch_size])
    held = _held(worst)
    ranking = sorted(held, key=held.get, reverse=True)
    recipe = _recipe(worst, phases, target_recall)
    alpha, reference = (None, None) if recipe == "frozen" else (ALPHAS[recipe], REFERENCE_BATCH_SIZE)
    memory = None
    if recipe == "modx_plus" and worst.old_pairs:
        memory = min(worst.old_pairs, max(round(MEMORY_SHARE * worst.old_pairs), _replayed(worst)))
    return Advice(
        recipe=recipe,
        ranking=ranking,
        held=held,
        alike=[list(two) for two in pairwise(ranking) if held[two[0]] - held[two[1]] < FEW],
        alpha=alpha,
        reference_batch_size=reference,
        memory_pairs=memory,
        sentence=_sentence(worst, recipe, memory),
        notes=[note for phase in phases for note in _notes(phase)],
    )


def _held(phase: Assessment) -> dict[str, float]:
    held = {"finetune": 0.0, "modx": phase.kept[phase.batch_size]}
    return held if phase.kept_with_replay is None else held | {"modx_plus": phase.kept_with_replay}


def _recipe(worst: Assessment, phases: Sequence[Assessment], target_recall: float | None) -> str:
    kept = worst.kept[worst.batch_size]
    recall = min(phase.zero_shot["image_to_text_recall@1"] for phase in phases)
    if kept >= MOST or (target_recall is not None and recall >= target_recall):
        return "frozen"
    return "modx" if kept >= HALF else "modx_plus"


def _sentence(phase: Assessment, recipe: str, memory: int | None) -> str:
    kept = f"{100 * phase.kept[phase.batch_size]:.0f} % of the rows of {phase.phase} in a batch of {phase.batch_size}"
    if recipe == "frozen":
        recall = 100 * phase.zero_shot["image_to_text_recall@1"]
        return f"The frozen model is good enough: it has {kept} right, and a recall@1 of {recall:.1f} %."
    start = f"Start with alpha {ALPHAS[recipe]:g} for a reference_batch_size of {REFERENCE_BATCH_SIZE}."
    if recipe == "modx":
        return f"Mod-X will hold: the old model has {kept} right, and these are kept. {start}"
    few = phase.kept[phase.batch_size] < FEW
    alone = f"Mod-X alone has {'nothing' if few else 'little'} to keep here, {kept}: add replay"
    if memory is None:
        return (
            f"{alone}, {100 * REPLAY_SHARE:.0f} % of each batch, from old pairs or from public ones like those that "
            f"the model knows. {start} With nothing to replay, try kl with alpha {KL_ALPHA:g}: it distils all rows."
        )
    return (
        f"{alone}, {100 * REPLAY_SHARE:.0f} % of each batch from {memory:,} old pairs, with which "
        f"{100 * phase.kept_with_replay:.0f} % of the rows are kept. {start}"
    )


def _notes(phase: Assessment) -> Iterator[str]:
    if phase.duplicates.captions > MANY_DUPLICATES * phase.pairs and not phase.mask_duplicates:
        yield (
            f"{phase.phase}: {phase.duplicates.captions:,} of {phase.pairs:,} rows share a caption with a row of "
            "another pair id, whose negatives they are: set mask_duplicates."
        )
    if phase.duplicates.images > MANY_DUPLICATES * phase.pairs:
        yield (
            f"{phase.phase}: {phase.duplicates.images:,} of {phase.pairs:,} rows share an image, and are negatives of "
            "each other: give them one pair id."
        )
    if phase.bad_share:
        share = f"{100 * phase.bad_share:.1f} %"
        yield f"{phase.phase}: {share} of the rows cannot be used: bad_samples='skip' leaves them out."
    shift = phase.shift
    if shift is not None and shift.shared_images:
        yield f"{phase.phase}: {shift.shared_images:,} of its images are also among the old ones."
    if shift is not None and shift.recall_gap <= 0 and _is_alike(shift.image_classifier, shift.text_classifier):
        yield f"{phase.phase}: new and old pairs cannot be told apart: no recipe will forget much."


def _is_alike(*accuracies: float) -> bool:
    return max(accuracies) < INDISTINGUISHABLE


def _replayed(phase: Assessment) -> int:
    return max(1, round(REPLAY_SHARE * phase.batch_size))
