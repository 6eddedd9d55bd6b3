"""Make a run forget pairs, from its next phase on.

Takes them out of the replay memory and keeps them out of the training data of all phases that come, whether the data
still hold them or not. A phase that was begun starts again without them. results.json and the cards of later phases
count them and never name them. Models of phases that were trained before may still know them; hf-modx rollback and the
training command train them again without. Stop the run first.

No pairs are published with a run. Its repository on the Hub is told how often the run was asked, so that nobody goes
on with it elsewhere who does not know of it, and loses the checkpoint of a phase begun.

    hf-modx forget runs/modx_plus --pair_id 1017 2044
    hf-modx forget runs/modx_plus --image portrait.jpg --pair_id_file requests.txt
"""

import argparse
from pathlib import Path

from ..deletion import forget, tell_hub

IMAGE = "pairs of these images, byte for byte as the data store them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--pair_id", type=int, nargs="+", default=[], metavar="ID", help="pairs of these ids")
    parser.add_argument("--pair_id_file", type=Path, help="text file of ids, one a line")
    parser.add_argument("--image", type=Path, nargs="+", default=[], metavar="FILE", help=IMAGE)


def run(options: argparse.Namespace) -> None:
    listed = ids_in(options.pair_id_file) if options.pair_id_file is not None else []
    request = forget(options.run, [*options.pair_id, *listed], options.image)
    print(f"Asked for: {len(request.pair_ids)} by id, {len(request.images)} by image.")
    print(f"Rows taken out of the replay memory: {request.from_memory}.")
    if request.after_phase:
        known = "phase 1" if request.after_phase == 1 else f"phases 1 to {request.after_phase}"
        print(f"The models of {known} were trained before and may still know them. To train them again without:")
        print(f"hf-modx rollback {options.run} --to phase-0, and the training command.")
    if repository := tell_hub(options.run):
        print(f"{repository} on the Hub knows that it was asked. It holds no pairs, and models as they are here.")


def ids_in(file: Path) -> list[int]:
    try:
        return [int(line) for line in file.read_text(encoding="utf-8").split()]
    except ValueError as error:
        raise ValueError(f"{file} must hold ids, whole numbers one a line: {error}") from error
