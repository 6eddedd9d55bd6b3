"""The checks of a stream before any training: rows that cannot be used, images that leak, parts that are too small."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from datasets import Dataset

from ..data import check_columns, check_pair_ids, refuse_unknown_pair_ids
from ..data.bad_samples import BadSample, drop_bad_samples, find_bad_samples
from ..data.overlap import image_digests, shared_rows
from ..data.pair_groups import arrangement_for
from ..distributed import on_each_process, on_main_process, world_size
from ..evaluation.suite import LabelTest
from ..nearest import did_you_mean
from ..phases import PhaseStream
from ..training_args import ModXTrainingArguments

logger = logging.getLogger(__name__)


class StreamChecks:
    """What of a stream can be used.

    Attributes:
        bad_samples: the rows left out so far, by the name of their part, as in "phase_1 (train)".
    """

    def __init__(self, args: ModXTrainingArguments):
        self.args = args
        self.bad_samples: dict[str, list[BadSample]] = {}

    def usable(self, stream: PhaseStream, labels: Mapping[str, LabelTest]) -> PhaseStream:
        """The stream without the rows that cannot be used.

        Args:
            stream: with the retrieval tests.
            labels: the tests of labels by name. No row of them is left out.

        Raises:
            TypeError, ValueError: columns that are missing or of another type; rows that cannot be used, unless
                `bad_samples="skip"`; parts that are too small. The message names them.
        """
        parts = [*(part.train for part in stream.all_phases()), *(dataset for dataset, _ in stream.tests().values())]
        refuse_unknown_pair_ids(parts, self.args.pair_id_column)
        for phase in stream:
            arrangement_for(self.args, phase.train, has_columns=True)  # a Trainer refuses when its phase begins
        stream = self._without_leaks(stream.map_parts(self._without_bad_samples), labels)
        _refuse_too_few_pairs(stream, self.args)
        if not stream.tests() and not labels:
            logger.warning("No phase has a test: nothing will tell what was forgotten. See test_fraction.")
        return stream

    def _without_bad_samples(self, name: str, part: Dataset) -> Dataset:
        columns = (self.args.image_column, self.args.caption_column)
        check_columns(part, *columns)
        if self.args.pair_id_column in part.column_names:
            check_pair_ids(part, self.args.pair_id_column)
        bad = on_each_process(lambda rank, number: find_bad_samples(part, *columns, name, (rank, number)))
        return self._leave_out(name, part, sorted(bad, key=lambda sample: sample.row))

    def _without_leaks(self, stream: PhaseStream, labels: Mapping[str, LabelTest]) -> PhaseStream:
        """No image is both learned and in a test of pairs. Where it is, the part that came first keeps it: with next
        month's data the months before stay as they were."""
        learned: dict[bytes | None, str] = {}
        tested: dict[bytes | None, str] = {}
        with_labels = {
            digest: name
            for name, test in labels.items()
            for digest in _digests(test.dataset, test.image_column)
            if digest is not None
        }

        def clean(name: str, part: Dataset) -> Dataset:
            digests = _digests(part, self.args.image_column)
            if self.args.pair_id_column not in part.column_names:
                _warn_of_repeated_images(name, digests, self.args.pair_id_column)
            own, others = (tested, learned) if name.endswith("(test)") else (learned, tested)
            if own is learned:
                _warn_of_images_with_labels(name, digests, with_labels)
            shared = shared_rows(digests, others)
            left_out = {sample.row for sample in shared}
            own.update((digest, name) for row, digest in enumerate(digests) if row not in left_out)
            return self._leave_out(name, part, shared)

        return stream.map_parts(clean)

    def _leave_out(self, name: str, part: Dataset, bad: list[BadSample]) -> Dataset:
        if bad:
            self.bad_samples[name] = self.bad_samples.get(name, []) + bad
        return drop_bad_samples(part, bad, self.args.bad_samples, name)


def _digests(part: Dataset, image_column: str) -> list[bytes | None]:
    return on_main_process(lambda: image_digests(part, image_column))


def _warn_of_images_with_labels(name: str, digests: Sequence[bytes | None], tested: Mapping[bytes, str]) -> None:
    """No row is left out: the training and test parts of well-known benchmarks share some images, and published
    numbers have been measured with them."""
    rows: dict[str, list[int]] = {}
    for row, digest in enumerate(digests):
        if digest in tested:
            rows.setdefault(tested[digest], []).append(row)
    for test, found in rows.items():
        logger.warning(
            "%s: %d of %d rows show an image of the test %r (first in row %d), which is then no test of what was not "
            "seen. Leave them out, unless that is how the benchmark is made.",
            name,
            len(found),
            len(digests),
            test,
            found[0],
        )


def _warn_of_repeated_images(name: str, digests: Sequence[bytes | None], pair_id_column: str) -> None:
    """Tables with a row for each caption, as COCO's, have every image several times."""
    times = Counter(digest for digest in digests if digest is not None)
    repeated = sum(count for count in times.values() if count > 1)
    if repeated:
        logger.warning(
            "%s: %d of %d rows show an image that another row shows, and there is no column %r, so that they are "
            "negatives of each other, and in a test each other's wrong answer. Give the rows of one image one id, or "
            "make one row of them with a list of captions.",
            name,
            repeated,
            len(digests),
            pair_id_column,
        )


def refuse_other_types(stream: PhaseStream, columns: Sequence[str]) -> None:
    """Raise a TypeError unless each of the columns has one type in all training parts: what a recipe needs that puts
    pairs of several phases into one table."""
    known: dict[str, tuple[str, object]] = {}
    for phase in stream.all_phases():
        for column in set(columns) & set(phase.train.column_names):
            feature = phase.train.features[column]
            name, first = known.setdefault(column, (phase.name, feature))
            if feature != first:
                raise TypeError(
                    f"Column {column!r} holds {first} in {name!r} and {feature} in {phase.name!r}, and this recipe "
                    "puts pairs of several phases together. Give both one type, for instance with dataset.cast_column."
                )


def warn_of_lost_pair_ids(stream: PhaseStream, column: str) -> None:
    """Say so where some phases have pair ids and others none: in one table of both there are none."""
    without = [phase.name for phase in stream.all_phases() if column not in phase.train.column_names]
    if 0 < len(without) < len(stream.all_phases()):
        logger.warning(
            "There is no column %r in %s. This recipe puts pairs of several phases together, and where some have no "
            "ids, those of the others do not count: rows of one id are negatives of each other. Give the column to "
            "all, with an id of its own for every row that belongs to no other.",
            column,
            ", ".join(map(repr, without)),
        )


def refuse_phases_without_classes(stream: PhaseStream, column: str) -> None:
    """Raise a ValueError unless the pair ids of each phase number at least two classes, as `Classification` needs,
    which itself tells only when the phase begins."""
    for phase in stream:
        if column not in phase.train.column_names:
            near = did_you_mean(column, phase.train.column_names)
            raise ValueError(
                f"Phase {phase.name!r} has no column {column!r} (pair_id_column), which numbers the classes that "
                f"Classification learns.{near} Make its table of labels with hf_modx.callbacks.class_pairs, or learn "
                "captions (of ZSCL: classes=False)."
            )
        check_pair_ids(phase.train, column)
        if len(set(phase.train.with_format(None)[column])) < 2:
            raise ValueError(
                f"Phase {phase.name!r} has one class alone in column {column!r}, and Classification needs at least "
                "two. Put it into another phase."
            )


def _refuse_too_few_pairs(stream: PhaseStream, args: ModXTrainingArguments) -> None:
    for phase in stream:
        if min(len(phase.train), args.contrastive_batch_size) < 2:
            raise ValueError(
                f"Phase {phase.name!r}: a contrastive batch of one pair has no negatives "
                f"({len(phase.train)} pairs, per_device_train_batch_size {args.per_device_train_batch_size})."
            )
    for name, (dataset, _) in stream.tests().items():
        if len(dataset) < world_size():
            raise ValueError(f"Test {name!r} has {len(dataset)} rows, too few for {world_size()} processes.")
