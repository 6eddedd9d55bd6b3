"""Interpolate the weights of two models (WiSE-FT).

(1 - weight) A + weight B, for two phases of a run, or any two models of one architecture. Each is a folder or an id on
the Hub, with @REVISION where it is not the main branch. The processor is A's.

    hf-modx merge runs/modx-seed0/phase-0 runs/modx-seed0/phase-3 --weight 0.5 --output_dir merged
    hf-modx merge me/my_clip@phase-1 me/my_clip@phase-2 --output_dir merged
"""

import argparse
from pathlib import Path

from ..merging import merge_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A[@REVISION]", help="folder, or id on the Hub")
    parser.add_argument("second", metavar="B[@REVISION]", help="folder, or id on the Hub")
    parser.add_argument("--weight", type=float, default=0.5, help="of B, from 0 to 1 (default: 0.5)")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for model, processor and card")


def run(options: argparse.Namespace) -> None:
    merge_models(options.first, options.second, options.weight, options.output_dir)
    print(options.output_dir)
