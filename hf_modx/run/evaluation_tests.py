"""What a run evaluates after every phase."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from datasets import Dataset

from ..evaluation.retrieval import RECALL_AT
from ..evaluation.suite import EvaluationTest, LabelTest, RetrievalTest, phase_number
from ..phases import PhaseStream

DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = [
    *(f"{direction}_recall@{k}" for direction in DIRECTIONS for k in RECALL_AT),
    *(f"{direction}_{name}" for name in ("mrr", "map") for direction in DIRECTIONS),
]
"""Of every retrieval test."""
RANKS = [f"{direction}_median_rank" for direction in DIRECTIONS]
"""No fractions: they have no place among the matrices, and forgetting means nothing for them."""


class RunTests:
    """The held-out pairs of the stream, further pairs, and tests of labels.

    Args:
        stream: the run's.
        further: tests by name beside the stream's own.
        columns: of the stream: images, captions, pair ids. Further pairs get the same.

    Attributes:
        stream: with the further pairs among its tests.
        pairs: name -> (retrieval test, the phase that teaches it); see `follow`.
        labels: the tests of labels by name.

    Raises:
        ValueError: a name is used twice, or a test is taught by a phase that is not there.
    """

    __test__ = False  # pytest takes it for tests

    def __init__(self, stream: PhaseStream, further: Mapping[str, EvaluationTest], columns: Sequence[str]):
        repeated = sorted(set(further) & set(stream.tests()))
        if repeated:
            raise ValueError(f"The stream has tests of the names {', '.join(repeated)} already. Choose other names.")
        phases = [phase.name for phase in stream]
        base = stream.base.name if stream.base is not None else None
        self._taught = {name: phase_number(test.learned_at, phases, base) for name, test in further.items()}
        self.labels = {name: test for name, test in further.items() if isinstance(test, LabelTest)}
        pairs = {
            name: test.with_columns(*columns) for name, test in further.items() if isinstance(test, RetrievalTest)
        }
        self.stream = replace(stream, extra_tests={**stream.extra_tests, **pairs}) if pairs else stream
        self.follow(self.stream)

    def follow(self, stream: PhaseStream) -> None:
        """Take the pairs as they are in the stream now: without bad samples, or resized."""
        self.pairs = stream.tests()

    @property
    def names(self) -> list[str]:
        return [*self.pairs, *self.labels]

    @property
    def metrics(self) -> list[str]:
        """Those of the tests, each of which makes a matrix."""
        of_labels = dict.fromkeys(metric for test in self.labels.values() for metric in test.metrics)
        return [*(METRICS if self.pairs or not of_labels else []), *of_labels]

    def learned_at(self, names: Iterable[str] | None = None) -> dict[str, int | str | None]:
        """The phase that teaches each of these tests, of all by default."""
        of_stream = {name: learned_at for name, (_, learned_at) in self.pairs.items()}
        return {name: {**of_stream, **self._taught}[name] for name in (self.names if names is None else names)}

    def measurements(self) -> dict[str, tuple[Dataset | LabelTest, Sequence[str]]]:
        """What `evaluate` takes of each test, and the metrics it gives."""
        of_pairs = {name: (dataset, [*METRICS, *RANKS]) for name, (dataset, _) in self.pairs.items()}
        return {**of_pairs, **{name: (test, test.metrics) for name, test in self.labels.items()}}

    def tables(self) -> dict[str, Dataset]:
        """The data of each test."""
        of_pairs = {name: dataset for name, (dataset, _) in self.pairs.items()}
        return {**of_pairs, **{name: test.dataset for name, test in self.labels.items()}}
