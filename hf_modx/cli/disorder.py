"""Measure what has moved between two models: angles within and between the modalities.

Spatial disorder (Ni et al., ICML 2023) of model B against model A, on the tests that `hf-modx evaluate` would take:
changes of the angles within a modality (SAM), angles between old and new embeddings (RAM), and how much of the change
is one rotation of a modality. Each model is a folder or an id on the Hub, with @REVISION where it is not the main
branch.

    hf-modx disorder runs/modx-seed0/phase-0 runs/modx-seed0/phase-3
    hf-modx disorder me/my_clip@phase-1 me/my_clip@phase-2 --dataset_name my_data --split january_test
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from accelerate import PartialState

from ..data import PairCollator, PairDataset
from ..evaluation import EncodedPairs, SpatialDisorder, encode_pairs, spatial_disorder
from ..evaluation.disorder import MOVE_BINS, SHAPE_BINS, bin_names
from ..files import write_json
from ..markdown import escaped, table
from ..plots import draw_disorder
from ..pretrained import load_dual_encoder
from . import evaluate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A[@REVISION]", help="the older model: folder, or id on the Hub")
    parser.add_argument("second", metavar="B[@REVISION]", help="the newer model")
    evaluate.add_test_arguments(parser)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the histograms there")


def run(options: argparse.Namespace) -> None:
    tests = {name: test for name, test in evaluate.chosen_tests(options).items() if isinstance(test, PairDataset)}
    if not tests:
        raise ValueError("Spatial disorder needs tests with captions; there is none among them.")
    old, new = (embeddings(model, tests, options.batch_size) for model in (options.first, options.second))
    found = {name: spatial_disorder(old[name], new[name], sharded=True) for name in tests}
    if not PartialState().is_main_process:
        return
    if options.output_file is not None:
        options.output_file.parent.mkdir(parents=True, exist_ok=True)
        values = {name: disorder.to_dict() for name, disorder in found.items()}
        write_json(options.output_file, {"models": [options.first, options.second], "values": values})
    if options.plots is not None:
        draw(found, options.plots)
    print(disorder_table(found))


def embeddings(model: str, tests: Mapping[str, PairDataset], batch_size: int) -> dict[str, EncodedPairs]:
    """One model at a time is in memory."""
    device = PartialState().device
    encoder, processor = load_dual_encoder(model, device)
    collator = PairCollator.for_model(encoder, processor)
    return {
        name: encode_pairs(encoder, test, collator, batch_size=batch_size, device=device)
        for name, test in tests.items()
    }


def disorder_table(found: Mapping[str, SpatialDisorder]) -> str:
    """Markdown: a row a test; angles in degrees, shares in percent."""
    rows = [
        [
            escaped(name),
            *(
                cell
                for modality in (disorder.image, disorder.text)
                for cell in (
                    f"{modality.sam.mean:.1f}",
                    f"{modality.ram.mean:.1f}",
                    f"{modality.rotation:.1f}",
                    "-" if modality.rotation_share is None else f"{100 * modality.rotation_share:.0f}",
                )
            ),
            "-" if disorder.intermodal_rotation is None else f"{disorder.intermodal_rotation:.1f}",
        ]
        for name, disorder in found.items()
    ]
    columns = ("SAM", "RAM", "rotation", "of the change, %")
    header = [f"{modality}: {column}" for modality in ("images", "texts") for column in columns]
    return table(["test", *header, "between the modalities"], rows)


def draw(found: Mapping[str, SpatialDisorder], folder: Path) -> None:
    """A picture for each of SAM and RAM: images and texts of every test side by side."""
    for measure, bins in (("sam", SHAPE_BINS), ("ram", MOVE_BINS)):
        shares = {
            f"{name}, {side}s": dict(
                zip(bin_names(bins), getattr(getattr(disorder, side), measure).shares, strict=True)
            )
            for name, disorder in found.items()
            for side in ("image", "text")
        }
        draw_disorder(shares, folder / f"{measure}.png", measure.upper())
