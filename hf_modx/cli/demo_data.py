"""Save a built-in stream as a data set.

A DatasetDict with the splits NAME_train and NAME_test: first the base, which the small CLIP learns before the first
phase, then the phases. Needs `pip install "hf_modx[demo]"`.

    hf-modx demo-data --output_dir drawings
    hf-modx evaluate runs/modx-seed0/phase-3 --dataset_name drawings
"""

import argparse
from pathlib import Path

from datasets import DatasetDict

from ..demo import DEMO_STREAMS
from ..phases import TEST, TRAIN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for `datasets.load_from_disk`")
    parser.add_argument(
        "--demo_stream",
        default="domain",
        choices=DEMO_STREAMS,
        help="known concepts in new renderings (domain, the default), new groups of concepts, or new concepts",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which concepts are held out (default: 0)")


def run(options: argparse.Namespace) -> None:
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        raise ValueError(f"{options.output_dir} is not empty. Choose another --output_dir.")
    splits = DatasetDict()
    for phase in DEMO_STREAMS[options.demo_stream](options.seed).all_phases():
        splits[phase.name + TRAIN], splits[phase.name + TEST] = phase.train, phase.test
    splits.save_to_disk(options.output_dir)
    for name, part in splits.items():
        print(f"{name}: {len(part):,} pairs")
