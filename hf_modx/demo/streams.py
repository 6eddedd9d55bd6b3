"""Built-in streams of new concepts, beside `demo_stream`, in which known concepts come in new renderings.

    stream = DEMO_STREAMS["class"](seed=0)

In both, a phase brings all drawings of some concepts, by three artists and in three renderings of one of them, and
tests each of these concepts on one drawing that was never trained on.
"""

from collections.abc import Callable, Mapping, Sequence

from accelerate import PartialState
from datasets import DatasetDict, concatenate_datasets

from ..phases import Phase, PhaseStream
from .base import VALIDATION_PHASES, demo_stream, hold_out
from .data import demo_dataset, fold_concepts
from .drawings import RENDERINGS, STYLES

GROUPS = {
    "objects_symbols": ("Objects", "Symbols"),
    "smileys_people": ("Smileys & Emotion", "People & Body"),
    "animals_food": ("Animals & Nature", "Food & Drink"),
    "travel_activities": ("Travel & Places", "Activities"),
}
"""Base and phases of the class-incremental stream: groups of emoji."""

PARTS = 4
TESTED = ("twemoji", "noto")
"""Artists whose drawings are held out for the tests."""

VALIDATED = "openmoji"
"""Artist whose drawings are held out for validation; the renderings are of these, and go with them."""


def class_stream(seed: int = 0, *, validation: bool = False) -> PhaseStream:
    """Class-incremental: the base has learned objects and symbols, every phase brings groups of emoji that are new.

    Args:
        seed: decides which drawing of a concept is held out.
        validation: for choosing options without a look at any test: half of the concepts are tested on a drawing that
            is in no seed's tests. Only the first two phases.

    Raises:
        ImportError: the packages that carry the drawings are missing.
    """
    data = _data()
    groups = data[STYLES[0]]["group"][:]
    parts = {name: [row for row, group in enumerate(groups) if group in some] for name, some in GROUPS.items()}
    return _stream_of_concepts(data, parts, seed, validation)


def instance_stream(seed: int = 0, *, validation: bool = False) -> PhaseStream:
    """Instance-incremental: base and phases are random equal parts of all concepts.

    Args:
        seed: decides which concepts a part has and which drawing of a concept is held out.
        validation: see `class_stream`.

    Raises:
        ImportError: the packages that carry the drawings are missing.
    """
    data = _data()
    folds = fold_concepts(data[STYLES[0]], PARTS, seed)
    parts = {f"part_{number}": fold for number, fold in enumerate(folds)}
    return _stream_of_concepts(data, parts, seed, validation)


DEMO_STREAMS: dict[str, Callable[..., PhaseStream]] = {
    "domain": demo_stream,
    "class": class_stream,
    "instance": instance_stream,
}
"""Name -> function of the seed and of `validation`."""


def _data() -> DatasetDict:
    with PartialState().main_process_first():
        return demo_dataset()


def _stream_of_concepts(
    data: DatasetDict, parts: Mapping[str, Sequence[int]], seed: int, validation: bool
) -> PhaseStream:
    base, *phases = (_phase(name, data, rows, seed, validation) for name, rows in parts.items())
    return PhaseStream(tuple(phases[:VALIDATION_PHASES] if validation else phases), base=base)


def _phase(name: str, data: DatasetDict, rows: Sequence[int], seed: int, validation: bool) -> Phase:
    """All drawings of the concepts in these rows. Half of the concepts are tested on the one artist's drawing, half on
    the other's; validation takes half of the concepts in the drawings of the third, which no test ever holds."""
    quarters = fold_concepts(data[STYLES[0]].select(rows), 4, seed)
    halves = [quarters[0] + quarters[1], quarters[2] + quarters[3]]
    held_out = {VALIDATED: halves[0]} if validation else dict(zip(TESTED, halves, strict=True))
    left_out = dict.fromkeys(RENDERINGS, halves[0]) if validation else {}
    trained, tested = [], []
    for style in STYLES:
        train, test = hold_out(data[style].select(rows), held_out.get(style, ()), left_out.get(style, ()))
        trained.append(train)
        if style in held_out:
            tested.append(test)
    return Phase(name, concatenate_datasets(trained), concatenate_datasets(tested))
