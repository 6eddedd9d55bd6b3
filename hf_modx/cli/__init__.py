"""The command `hf-modx`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from datasets.utils import disable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..hub.faults import HubError
from ..markdown import one_line
from . import assess, demo_data, disorder, evaluate, forget, index_check, merge, report, rollback

COMMANDS = {
    "assess": assess,
    "forget": forget,
    "report": report,
    "evaluate": evaluate,
    "disorder": disorder,
    "index-check": index_check,
    "merge": merge,
    "rollback": rollback,
    "demo-data": demo_data,
}
"""By name a module with a docstring, which is its help, `add_arguments(parser)` and `run(options)`."""

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
EXPECTED = (OSError, ValueError, TypeError, ImportError, SafetensorError, HubError)
"""What wrong input, missing packages and the network raise; the message says what to do."""

EXIT_CODES = """
exit codes:
  0    done
  1    it cannot be done; one line on standard error says why
  2    wrong usage
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, those of the program by default. Returns the exit code.

    Raises:
        SystemExit: wrong usage, told on standard error, or help was asked for.
    """
    options = make_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        COMMANDS[options.command].run(options)
    except EXPECTED as error:
        if options.traceback:
            raise
        print(f"hf-modx {options.command}: {one_line(error) or type(error).__name__}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def make_parser() -> argparse.ArgumentParser:
    from .. import __version__

    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXIT_CODES}
    parser = argparse.ArgumentParser("hf-modx", description="Continual fine-tuning of CLIP models.", **look)
    parser.add_argument("--version", action="version", version=f"hf_modx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n")[0].rstrip(".")
        command = commands.add_parser(name, help=summary[:1].lower() + summary[1:], description=module.__doc__, **look)
        module.add_arguments(command)
        command.add_argument("--traceback", action="store_true", help="show where in the program an error comes from")
    return parser
