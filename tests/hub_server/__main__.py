"""`python tests/hub_server --root DIR [--port N]` prints the endpoint and serves until it is ended."""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder is run and not imported as a package

from hub_server import ACCOUNTS, LoopbackHub

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", required=True, help="folder of the repositories; what is there is served")
parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
arguments = parser.parse_args()

ending = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, ending)
with LoopbackHub(arguments.root, arguments.port) as hub:
    print(hub.endpoint, flush=True)
    print(f"tokens: {', '.join(ACCOUNTS)}", file=sys.stderr)
    signal.sigwait(ending)
