"""Classes whose zero-shot accuracy a run has lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from .flips import span_of
from .runs import RecordedRun

SHOWN = 10


@dataclass(frozen=True)
class LostClasses:
    """What has become of the classes of a test between two phases, in the mean over the seeds.

    Attributes:
        test: its name.
        before, after: numbers of the phases.
        classes: that have images.
        lost, gained: of them, with lower and with higher accuracy after.
        worst: name, accuracy before and after of those that have lost most, the worst first; fractions.
    """

    test: str
    before: int
    after: int
    classes: int
    lost: int
    gained: int
    worst: list[tuple[str, float, float]]


def lost_classes(runs: Sequence[RecordedRun]) -> list[LostClasses]:
    """One for each zero-shot test: from the phase that taught it (else the start) to the last.

    Args:
        runs: seeds of one recipe; one that does not know the accuracies is left out.
    """
    results = runs[0].results
    learned_at = dict(zip(results["tests"], results["learned_at"], strict=True))
    tests = dict.fromkeys(test for run in runs for test in run.results.get("per_class", {}))
    found = (_of_test(runs, test, span_of(learned_at[test], len(results["phases"]))) for test in tests)
    return [lost for lost in found if lost is not None]


def _of_test(runs: Sequence[RecordedRun], test: str, span: tuple[int, int]) -> LostClasses | None:
    known = [run.results["per_class"][test] for run in runs if test in run.results.get("per_class", {})]
    seeds = [[found["zero_shot_top1"][phase] for phase in span] for found in known]
    seeds = [seed for seed in seeds if None not in seed]
    if not seeds or span[0] == span[1]:
        return None
    before, after = (_mean_of_classes([seed[which] for seed in seeds]) for which in (0, 1))
    changes = [
        (name, old, new) for name, old, new in zip(known[0]["classes"], before, after, strict=True) if old is not None
    ]
    worst = sorted((change for change in changes if change[2] < change[1]), key=lambda change: change[2] - change[1])
    gained = sum(new > old for _, old, new in changes)
    return LostClasses(test, *span, len(changes), len(worst), gained, worst[:SHOWN])


def _mean_of_classes(seeds: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Whether a class has images is the same for all seeds."""
    return [None if None in of_class else mean(of_class) for of_class in zip(*seeds, strict=True)]
