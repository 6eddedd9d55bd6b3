"""Evaluate a model: retrieval on any data, zero-shot classification and linear probes.

The model is a folder or an id on the Hub, with @REVISION where it is not the main branch. A YAML file (--tests)
declares tests of all kinds. Without it and without a data set the tests are those of a built-in stream.

    hf-modx evaluate openai/clip-vit-base-patch32 --dataset_name my_data --split test --caption_column text
    hf-modx evaluate me/my_clip@phase-2 --dataset_name my_data --split january_test,february_test
    hf-modx evaluate me/my_clip@phase-2 --tests tests.yaml
    hf-modx evaluate runs/modx-seed0/phase-3
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from ..data import PairCollator, PairDataset, refuse_unknown_pair_ids
from ..data.loading import at_most, load_splits
from ..demo import DEMO_STREAMS
from ..evaluation import Encoder, LabelTest, RetrievalTest, encode_pairs, load_tests, retrieval_metrics
from ..files import write_json
from ..markdown import escaped, table
from ..model_card.metadata import metric_name
from ..phases import TEST, PhaseStream
from ..pretrained import load_dual_encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL[@REVISION]", help="folder, or id on the Hub")
    add_test_arguments(parser)


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """What is tested, and where the values go."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tests", help="YAML file of tests, as hf_modx.evaluation.load_tests reads it")
    source.add_argument(
        "--dataset_name",
        help="on the Hub, a folder written by save_to_disk, an image folder with metadata, or parquet files",
    )
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--demo_stream", choices=DEMO_STREAMS, help="the built-in stream (default: domain)")
    parser.add_argument(
        "--split", help="the tests, comma-separated. Default: all splits named test or ..._test, or the only split"
    )
    parser.add_argument("--image_column", default="image", help="column of the images (default: image)")
    parser.add_argument(
        "--caption_column", default="caption", help="column of strings or of lists of strings (default: caption)"
    )
    parser.add_argument(
        "--pair_id_column", default="pair_id", help="rows of one id match each other, where there is such a column"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images embedded at once (default: 64)")
    parser.add_argument("--max_samples", type=int, help="at most so many rows of each test, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice, and of the built-in stream (default: 0)")
    parser.add_argument("--output_file", type=Path, help="JSON file for the values at full precision")


def run(options: argparse.Namespace) -> None:
    for name in ("batch_size", "max_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    tests = chosen_tests(options)
    device = PartialState().device
    model, processor = load_dual_encoder(options.model, device)
    encoder = Encoder(model, PairCollator.for_model(model, processor), options.batch_size, device=device)
    values = {name: measured(test, encoder) for name, test in tests.items()}
    if PartialState().is_main_process:
        if options.output_file is not None:
            options.output_file.parent.mkdir(parents=True, exist_ok=True)
            sizes = {name: len(test) for name, test in tests.items()}
            write_json(options.output_file, {"model": options.model, "test_pairs": sizes, "values": values})
        print(values_table(values))


def chosen_tests(options: argparse.Namespace) -> dict[str, PairDataset | LabelTest]:
    """The tests by name."""
    refuse_contradictions(options)
    columns = (options.image_column, options.caption_column, options.pair_id_column)
    if options.tests is None:
        tables = tables_with_captions(options)
        refuse_unknown_pair_ids(list(tables.values()), options.pair_id_column)
    else:
        declared = load_tests(options.tests)
        tables = {
            name: test.with_columns(*columns) if isinstance(test, RetrievalTest) else test
            for name, test in declared.items()
        }

    def limited(table: Dataset) -> Dataset:
        return at_most(table, options.max_samples, options.seed)

    return {
        name: test.of_part(limited(test.dataset))
        if isinstance(test, LabelTest)
        else PairDataset(limited(test), *columns)
        for name, test in tables.items()
    }


def refuse_contradictions(options: argparse.Namespace) -> None:
    """Raise a ValueError where an option would be without effect on the numbers."""
    if options.tests is not None:
        for name in ("split", "dataset_config_name"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} does not go with --tests: the file says it of each test.")
    if options.demo_stream is not None and (options.tests or options.dataset_name) is not None:
        raise ValueError("--demo_stream does not go with --tests or --dataset_name.")


def stream_of_drawings(options: argparse.Namespace) -> PhaseStream:
    return DEMO_STREAMS[options.demo_stream or "domain"](options.seed)


def tables_with_captions(options: argparse.Namespace) -> dict[str, Dataset]:
    """By name the splits of the data set that are tests, or the tests of a built-in stream."""
    if options.dataset_name is None:
        found = {name: test for name, (test, _) in stream_of_drawings(options).tests().items()}
        wanted = list(found)
    else:
        found = dict(load_splits(options.dataset_name, options.dataset_config_name, options.image_column))
        wanted = [name for name in found if name == "test" or name.endswith(TEST)]
        wanted = wanted or list(found) * (len(found) == 1)
    if options.split is not None:
        wanted = [name.strip() for name in options.split.split(",")]
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        what = f"There is no split {', '.join(unknown)}." if unknown else "Say with --split what to test."
        raise ValueError(f"{what} The splits are: {', '.join(found)}.")
    return {name: found[name] for name in wanted}


def measured(test: PairDataset | LabelTest, encoder: Encoder) -> dict[str, float]:
    if isinstance(test, LabelTest):
        return test.measure(encoder)
    encoded = encode_pairs(
        encoder.dual_encoder, test, encoder.collator, batch_size=encoder.batch_size, device=encoder.device
    )
    return retrieval_metrics(encoded.image, encoded.text, encoded.image_ids, encoded.text_ids, sharded=True)


def values_table(values: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row a metric, a column a test; fractions in percent."""
    rows = [
        [escaped(metric_name(metric)), *(shown(metric, test.get(metric)) for test in values.values())]
        for metric in dict.fromkeys(metric for test in values.values() for metric in test)
    ]
    return table(["metric", *map(escaped, values)], rows)


def shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if metric.endswith("_rank") else f"{100 * value:.1f}"
