"""Go back to an earlier phase of a run, on the disk and on the Hub.

The phase is the last one again, as it was when it was finished. Models, checkpoints, replay memory, states of the loss
callbacks and results of all later phases are removed, and what --report_to has logged of them stays. Where the run was
published, main holds the phase again in a commit of its own, and the branches and tags of later phases are removed.
Killed at any point, the same command finishes it; until then the run is refused.

Then start the run again as ever. With the same settings it trains the same weights. From the phase after this one on
it may have other settings, another recipe and other data: run.json keeps under `history` what the phases before were
trained with, and results.json and the cards tell what was changed (`changed_settings`). The start model, the data of
the phases that stay and their tests must be the same. To change settings for next month without training anything
again, go back to the last finished phase.

    hf-modx rollback runs/catalogue --to phase-2
"""

import argparse
import re
from pathlib import Path

from ..rollback import rollback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run in which nobody is training")
    parser.add_argument("--to", type=phase, required=True, metavar="phase-K", help="the phase to go back to")


def phase(text: str) -> int:
    """`phase-2` or `2` to 2."""
    match = re.fullmatch(r"(?:phase-)?(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no phase; write phase-2")
    return int(match[1])


def run(options: argparse.Namespace) -> None:
    removed = rollback(options.run, options.to)
    print(f"{options.run} is back at phase-{options.to}. Removed: {', '.join(removed) or 'nothing'}.")
