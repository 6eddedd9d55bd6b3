"""Tell whether an index of an old model's embeddings can be kept under a new model.

OLD has made the index, NEW embeds the queries from now on. Measured is the recall of the index as it stands, turned by
one orthogonal map (hf_modx.index.IndexAlignment), and built anew, on the tests that `hf-modx evaluate` would take:
texts ask for indexed images, images for indexed texts, and each kind of index has its own map. The last two lines say
what to do with each. The maps are fitted on pairs that are not tested: the training splits that belong to the tests,
those of --fit_split, or, where there are none, one half of each test at random; the other half is tested. Each model
is a folder or an id on the Hub, with @REVISION where it is not the main branch.

    hf-modx index-check runs/modx-seed0/phase-2 runs/modx-seed0/phase-3
    hf-modx index-check me/my_clip@phase-1 me/my_clip@phase-2 --dataset_name my_data --split january_test --json
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from accelerate import PartialState
from datasets import Dataset

from ..data import PairDataset
from ..data.loading import at_most, concatenate_shared, load_splits
from ..evaluation import EncodedPairs, fit_alignments, index_recalls
from ..files import as_json, write_json
from ..markdown import escaped, table
from ..model_card.metadata import metric_name
from ..phases import TEST, TRAIN
from . import evaluate
from .disorder import embeddings

TOLERANCE = 0.01
FITTED_ON = "the pairs that the maps are fitted on"  # no name of a split
ASKED = {"images": "text_to_image", "texts": "image_to_text"}
"""What an index holds, and who asks for it."""
SHOWN = [f"{direction}_recall@{k}" for direction in ASKED.values() for k in (1, 5)]
Recalls = Mapping[str, Mapping[str, Mapping[str, float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD[@REVISION]", help="the model of the index: folder, or id on the Hub")
    parser.add_argument("new", metavar="NEW[@REVISION]", help="the model of the queries")
    evaluate.add_test_arguments(parser)
    parser.add_argument("--fit_split", help="splits whose pairs the maps are fitted on, comma-separated")
    parser.add_argument("--fit_samples", type=int, default=5000, help="at most so many of them (default: 5000)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"recall@1 that may be lost, as a fraction, rather than turn or rebuild (default: {TOLERANCE})",
    )
    parser.add_argument("--save_map", type=Path, metavar="FILE", help="write the map of an index of images there")
    parser.add_argument("--json", action="store_true", help="print JSON at full precision in the place of a table")


def run(options: argparse.Namespace) -> None:
    for name in ("batch_size", "max_samples", "fit_samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if not 0 <= options.tolerance < 1:
        raise ValueError(f"--tolerance must be in [0, 1), got {options.tolerance}.")
    tests = {name: test for name, test in evaluate.chosen_tests(options).items() if isinstance(test, PairDataset)}
    if not tests:
        raise ValueError("An index needs tests with captions; there is none among them.")
    apart = pairs_to_fit(options, tests)
    parts = tests if apart is None else {**tests, FITTED_ON: apart}
    old, new = (embeddings(model, parts, options.batch_size) for model in (options.old, options.new))
    if apart is None:
        fitted, (old, new) = zip(*(halves(of_model, options.seed) for of_model in (old, new)), strict=True)
    else:
        fitted = [[of_model.pop(FITTED_ON)] for of_model in (old, new)]
    maps = fit_alignments(*fitted)
    values = {name: index_recalls(old[name], new[name], *maps, sharded=True) for name in tests}
    if not PartialState().is_main_process:
        return
    report = {
        "models": [options.old, options.new],
        "fitted_on": maps[0].pairs,
        "test_pairs": {name: len(old[name].image) for name in tests},
        "values": values,
        "advice": {of: advice(values, of, options.tolerance) for of in ASKED},
    }
    if options.save_map is not None:
        options.save_map.parent.mkdir(parents=True, exist_ok=True)
        maps[0].save(options.save_map)
    if options.output_file is not None:
        options.output_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output_file, report)
    said = [recalls_table(values), "", *report["advice"].values()]
    print(as_json(report).rstrip() if options.json else "\n".join(said))


# ---- What the maps are fitted on ----


def pairs_to_fit(options: argparse.Namespace, tests: Mapping[str, PairDataset]) -> PairDataset | None:
    """Pairs beside the tests; None where there are none."""
    found = training_splits(options)
    wanted = [name.removesuffix(TEST) + TRAIN for name in tests] + ["train"] * ("test" in tests)
    wanted = [name for name in wanted if name in found]
    if options.fit_split is not None:
        wanted = [name.strip() for name in options.fit_split.split(",")]
        unknown = [name for name in wanted if name not in found or name in tests]
        if unknown:
            known = ", ".join(name for name in found if name not in tests) or "none"
            raise ValueError(f"The maps cannot be fitted on {', '.join(unknown)}. Splits beside the tests: {known}.")
    if not wanted:
        return None
    columns = (options.image_column, options.caption_column, options.pair_id_column)
    together = concatenate_shared([found[name] for name in wanted], columns)
    return PairDataset(at_most(together, options.fit_samples, options.seed), *columns)


def training_splits(options: argparse.Namespace) -> dict[str, Dataset]:
    if options.tests is not None:
        return {}
    if options.dataset_name is not None:
        return dict(load_splits(options.dataset_name, options.dataset_config_name, options.image_column))
    return {phase.name + TRAIN: phase.train for phase in evaluate.stream_of_drawings(options).all_phases()}


def halves(encoded: Mapping[str, EncodedPairs], seed: int) -> tuple[list[EncodedPairs], dict[str, EncodedPairs]]:
    """A random half of each test, and the tests without it; the same rows under every model.

    Raises:
        ValueError: a test of one pair.
    """
    to_fit, to_test = [], {}
    for name, pairs in encoded.items():
        number = len(pairs.image)
        if number < 2:
            raise ValueError(f"Test {name!r} has one pair: give --fit_split, or a larger test.")
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
        one, other = (rows.sort().values.to(pairs.image.device) for rows in order.tensor_split([number // 2]))
        to_fit.append(pairs.select(one))
        to_test[name] = pairs.select(other)
    return to_fit, to_test


# ---- What is said ----


def advice(values: Recalls, of: str, tolerance: float) -> str:
    """One sentence: of the three ways with an index, the cheapest that loses no more recall@1 than this against a
    rebuilt one, mean over the tests.

    Args:
        values: by test what `index_recalls` returns.
        of: what the index holds, a key of `ASKED`.
        tolerance: a fraction.
    """
    metric = f"cross_phase_{ASKED[of]}_recall@1"
    stale, turned, rebuilt = (
        100 * mean(test[how][metric] for test in values.values()) for how in ("stale", "realigned", "rebuilt")
    )
    beside = f"recall@1 as it stands {stale:.1f} %, re-aligned {turned:.1f} %, rebuilt {rebuilt:.1f} %"
    if stale > rebuilt:
        return f"Keep the index of {of}: rebuilt it would lose {stale - rebuilt:.1f} points ({beside})."
    if rebuilt - stale <= 100 * tolerance:
        return f"Keep the index of {of}: as it stands it loses {rebuilt - stale:.1f} points ({beside})."
    if rebuilt - turned <= 100 * tolerance:
        return (
            f"Re-align the index of {of}: turned by one orthogonal map it loses {max(0, rebuilt - turned):.1f} "
            f"points, as it stands {rebuilt - stale:.1f} ({beside})."
        )
    return (
        f"Rebuild the index of {of}: as it stands it loses {rebuilt - stale:.1f} points, re-aligned "
        f"{rebuilt - turned:.1f} ({beside})."
    )


def recalls_table(values: Recalls) -> str:
    """Markdown: a row a test and metric; fractions in percent."""
    rows = [
        [
            escaped(name),
            escaped(metric_name(metric)),
            *(f"{100 * of_test[how][f'cross_phase_{metric}']:.1f}" for how in of_test),
        ]
        for name, of_test in values.items()
        for metric in SHOWN
    ]
    return table(["test", "metric", "old model, old index", "as it stands", "re-aligned", "rebuilt"], rows)
