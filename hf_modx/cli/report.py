"""Compare runs: tables, pictures and one HTML page.

Writes report.md with its pictures, and report.html, one file that holds all in itself. Runs of several seeds of one
recipe are put together. All runs are of one stream and equally far.

    hf-modx report runs/finetune-seed0 runs/modx-seed0 runs/modx-seed1 --output_dir report
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from ..data.loading import load_splits
from ..demo import DEMO_STREAMS
from ..report import FlippedTest, RecordedRun, find_tests, flipped_tests, group_runs, read_run, write_report

logger = logging.getLogger(__name__)

REFERENCE = "finetune"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the report is written")
    parser.add_argument(
        "--metrics", help="of results.json, comma-separated; the matrices show the first. Default: recall@1 both ways"
    )
    parser.add_argument(
        "--reference",
        help="the recipe to which the others are compared. Default: finetune if it is there, or the first",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="show N images a test whose retrieval flipped: the models of one seed of each recipe look at the tests "
        "again (at most 1,000 pairs of each)",
    )
    parser.add_argument(
        "--dataset_name",
        help="where the tests of the examples are: a data set on the Hub, a folder, or parquet files, of which a "
        "split is a test as it stands. Default: the built-in streams",
    )
    parser.add_argument("--dataset_config_name", help="configuration of the data set")


def run(options: argparse.Namespace) -> None:
    if options.examples < 0:
        raise ValueError(f"--examples must not be negative, got {options.examples}.")
    groups = with_reference_first(group_runs([read_run(folder) for folder in options.runs]), options.reference)
    flips = {}
    if options.examples:
        flips = {name: flips_of(runs[0], options) for name, runs in groups.items()}
    metrics = options.metrics.split(",") if options.metrics else None
    page = write_report(groups, options.output_dir, metrics=metrics, flips={k: v for k, v in flips.items() if v})
    print(page)


def with_reference_first(groups: dict[str, list[RecordedRun]], reference: str | None) -> dict[str, list[RecordedRun]]:
    if reference is not None and reference not in groups:
        raise ValueError(f"There is no recipe {reference!r} among the runs. There are: {', '.join(groups)}.")
    first = reference or (REFERENCE if REFERENCE in groups else next(iter(groups)))
    return {first: groups[first], **groups}


def flips_of(recorded: RecordedRun, options: argparse.Namespace) -> list[FlippedTest]:
    tests = find_tests(recorded, data_of_tests(recorded, options))
    if not tests:
        logger.warning(
            "No examples of %s: its tests are not in %s.",
            recorded.name,
            options.dataset_name or "the built-in streams",
        )
    return flipped_tests(recorded, tests, options.examples)


def data_of_tests(recorded: RecordedRun, options: argparse.Namespace) -> Iterator[Dataset]:
    """What may be a test of the run."""
    if options.dataset_name is not None:
        column = recorded.identity["hyperparameters"]["image_column"]
        yield from load_splits(options.dataset_name, options.dataset_config_name, column).values()
        return
    for make_stream in DEMO_STREAMS.values():
        for validation in (False, True):
            stream = make_stream(recorded.seed[0], validation=validation).with_union_test()
            yield from (test for test, _ in stream.tests().values())
