"""Ending a run at the n-th thing it does: an event of its Trainers, or what is about to be done to a file.

A run is a function that a forked process calls, so that its end is a real one. `cut` says how it ends: "kill" sends
SIGKILL, "term" sends SIGTERM, and "power" is a SIGKILL after which no file that was not flushed is sure to be whole:
each is cut to a length drawn at random. (A file system that keeps the order of names loses no rename without losing
all that came after it; that is an earlier "kill".)
"""

import gc
import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  # once, and not in every process
from transformers import TrainerCallback

STEP = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end")
EVENTS = sorted(name for name in vars(TrainerCallback) if name.startswith("on_"))
OF_FILES = {
    "os.rename": 2,
    "os.remove": 1,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
}
"""Audit events, and how many of their arguments come before the folder that a relative path begins from."""
CUTS = ("kill", "power", "term")


@dataclass(frozen=True)
class Cut:
    """At which point of a process, and how."""

    point: int
    how: str


class Points(TrainerCallback):
    """The points that this process comes by. A forked process makes one, and is ended at the point of the cut."""

    def __init__(self, root: Path, cut: Cut | None = None):
        self.names: list[str] = []
        self._root, self._cut = str(root), cut
        self._flushed = dict(self._state_of_files())
        self._flush = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._audit)

    def _pass(self, name: str) -> None:
        self.names.append(name)
        if self._cut is None or len(self.names) - 1 != self._cut.point:
            return
        if self._cut.how == "power":
            self._lose_what_is_not_flushed()
        os.kill(os.getpid(), signal.SIGTERM if self._cut.how == "term" else signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._file("open", path)
        elif event in OF_FILES:
            begins = arguments[OF_FILES[event]] if len(arguments) > OF_FILES[event] else -1
            self._file(event, arguments[0], begins)

    def _file(self, what: str, path, begins: int = -1) -> None:
        path = os.fsdecode(path)
        if not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{begins}") if begins != -1 else os.getcwd(), path)
        if path.startswith(self._root):
            self._pass(f"{what} {os.path.relpath(path, self._root)}")

    def _fsync(self, file) -> None:
        number = file if isinstance(file, int) else file.fileno()
        self._file("os.fsync", os.readlink(f"/proc/self/fd/{number}"))
        self._flush(number)
        state = os.fstat(number)
        self._flushed[state.st_ino] = (state.st_mtime_ns, state.st_size)

    def _state_of_files(self):
        for folder, _, names in os.walk(self._root):
            for name in names:
                state = os.lstat(os.path.join(folder, name))
                yield state.st_ino, (state.st_mtime_ns, state.st_size)

    def _lose_what_is_not_flushed(self) -> None:
        draw = random.Random(len(self.names))
        for folder, _, names in os.walk(self._root):
            for path in (os.path.join(folder, name) for name in sorted(names)):
                state = os.lstat(path)
                if self._flushed.get(state.st_ino) != (state.st_mtime_ns, state.st_size):
                    with open(path, "r+b") as file:
                        file.truncate(draw.choice([0, draw.randint(0, state.st_size)]))


def _event(name: str) -> Callable:
    def passed(self, args, state, control, **kwargs):
        self._pass(f"{name} {Path(args.output_dir).name} step {state.global_step}")

    return passed


for name in EVENTS:
    if name != "on_init_end":  # of a Trainer that is not yet there
        setattr(Points, name, _event(name))


def in_a_process(root: Path, run: Callable[[Points], None], cut: Cut | None = None) -> tuple[int, list[str]]:
    """Call `run(points)` in a forked process.

    Returns:
        Its status, negative for a signal, and the points that it came by.
    """
    log = root / f"log-{sum(1 for _ in root.glob('log-*'))}"
    child = os.fork()
    if child == 0:
        _be(log, root, run, cut)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
        raise AssertionError(f"{cut}: status {status}\n{log.read_text()}")
    names = Path(f"{log}.points")
    return status, json.loads(names.read_text()) if names.exists() else []


def _be(log: Path, root: Path, run: Callable[[Points], None], cut: Cut | None) -> None:
    """The child's life; it never returns."""
    status = 1
    gc.freeze()  # what the parent has imported need not be looked through every time
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
        points = Points(root / "run", cut)
        run(points)
        Path(f"{log}.points").write_text(json.dumps(points.names))
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kind(name: str) -> str:
    """Of a point: "step", "event" or "file"."""
    first = name.split()[0]
    return "step" if first in STEP else "event" if first in EVENTS else "file"


def drawn(names: list[str], seed: str) -> list[Cut]:
    """One cut, or a second one of the process that goes on after the first; of every kind of point as often."""
    draw = random.Random(seed)
    wanted = draw.choice(["step", "event", "file"])
    of_kind = [number for number, name in enumerate(names) if kind(name) == wanted]
    first = draw.choice(of_kind or range(len(names)))
    cuts = [Cut(first, draw.choice(CUTS))]
    if draw.random() < 0.4:
        cuts.append(Cut(draw.randrange(max(1, len(names) - first)), draw.choice(CUTS)))
    return cuts


CLOCKS = ("train_runtime", "train_samples_per_second", "resumed_at_step")


def outcome(run: Path) -> dict:
    """All that a run leaves but for its clocks: the hash of every file of weights and states, the results and the
    names of all files outside the checkpoints."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and "checkpoints" not in path.parts]
    results = json.loads((run / "results.json").read_text())
    results.pop("evaluation_seconds", None)
    for record in results["training"]:
        for clock in CLOCKS:
            record.pop(clock, None)
    weights = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix == ".safetensors"}
    return {
        "weights": {str(path.relative_to(run)): digest for path, digest in weights.items()},
        "results": results,
        "files": [str(path.relative_to(run)) for path in files],
    }


def differences(found, expected, where: str = "") -> list[str]:
    """Places in nested dicts and lists where two outcomes differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted({*found, *expected})
        return [line for name in names for line in differences(found.get(name), expected.get(name), f"{where}/{name}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{where}/{number}")]
    return [] if found == expected else [f"{where}: {found!r} in the place of {expected!r}"]
