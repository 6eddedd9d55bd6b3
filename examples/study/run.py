"""A study on the built-in data: recipes x streams x seeds, with tables, figures and model cards.

    python examples/study/run.py --streams domain,class,instance --seeds 0,1,2,3,4 --output_dir runs/study

Recipes are those of the library, entries of `recipes.yaml` and sets of them: `--recipes main,er+modx-2`. Each
(stream, recipe, seed) is a run of `examples/continual_clip.py` in its own folder; all recipes of a stream and seed
start from the same base, see the same pairs in the same order and take as many steps of as many pairs. Replayed pairs
take places of the batch; `joint` trains for the summed steps.

Run the command again after an interruption: what is finished stays, what was begun goes on after its last finished
phase. A run that fails is in the tables with its reason and is tried again. `--jobs N` runs N at a time. Other flags
go to `examples/continual_clip.py`, as `--max_steps 400 --bf16 true`.

To choose options, `--tune --seeds 10,11` runs the first two phases and tests them on drawings that are in no seed's
tests.
`--short` takes about 20 minutes on two cores, `--tiny` tells in a few whether everything runs.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import tables  # noqa: E402
from cells import FAILED, STUDY, Cell, failure, is_finished, read_cells  # noqa: E402

from hf_modx.demo import DEMO_DEFAULTS  # noqa: E402
from hf_modx.files import read_json, write_json, write_text  # noqa: E402
from hf_modx.interruption import Interrupted  # noqa: E402

STREAMS = "domain,class,instance"
LOG = "log.txt"
INTERRUPTED = 130
BASE = "frozen"
"""The recipe that only trains the base: it runs first, so that the others find the base in the cache."""
ITS_MODEL = "{base}"
"""Value of an entry: the base that this recipe has trained, for runs with a batch size that would train another."""

FORMS = {
    "full": {},
    "short": {"max_steps": 60, "base_max_steps": 400},
    "tiny": {
        "max_steps": 2,
        "base_max_steps": 2,
        "per_device_train_batch_size": 16,
        "max_train_samples": 48,
        "max_eval_samples": 24,
    },
}
SHORT_RECIPES, SHORT_SEEDS = "finetune,er,modx,joint", "0"
TINY_RECIPES = "finetune,modx"
FLAGS = {"save_strategy": "no", "report_to": "none", "disable_tqdm": "true", "union_test": "true"}


@dataclass(frozen=True)
class Run:
    """One cell of the study: `flags` are those of `continual_clip.py`, but for the folder."""

    stream: str
    recipe: str
    seed: int
    front: str | None
    flags: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.stream}/{self.recipe}-seed{self.seed}"

    @property
    def argv(self) -> list[str]:
        return [*self.flags, "--output_dir", str(self.folder)]


def main(argv: Sequence[str]) -> int:
    options, further = parse(argv)
    runs = planned(options, further)
    refuse_other_settings(runs)
    try:
        if not options.tables_only:
            carry_out(runs, options)
    except KeyboardInterrupt:
        print("Interrupted: run the same command again to go on.", flush=True)
        return INTERRUPTED
    finally:
        tables.write(options.output_dir, figures=True, cards=True)
    print((options.output_dir / "tables.md").read_text(encoding="utf-8"))
    print(f"Tables, figures and cards: {options.output_dir}")
    return int(any(failure(run.folder) is not None for run in runs))


def with_report(
    argv: Sequence[str],
    defaults: Mapping[str, str],
    name: str,
    report: Callable[[Sequence[Cell]], str],
) -> int:
    """`main` with other defaults, and then a table of one's own as a file in the output folder."""
    argv = with_defaults(argv, defaults)
    options, _ = parse(argv)
    status = main(argv)
    found = report(read_cells(options.output_dir))
    write_text(options.output_dir / name, found)
    print(found)
    return status


def with_defaults(argv: Sequence[str], defaults: Mapping[str, str]) -> list[str]:
    """The command line with the flags that it does not give."""
    return [*(word for pair in defaults.items() if pair[0] not in argv for word in pair), *argv]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", help=f"comma-separated; default: {STREAMS}")
    parser.add_argument("--recipes", help="names, entries and sets of recipes.yaml, comma-separated; default: main")
    parser.add_argument("--recipe_file", type=Path, default=HERE / "recipes.yaml", help="entries and sets")
    parser.add_argument("--seeds", help="numbers, comma-separated; default: 0,1,2")
    parser.add_argument("--output_dir", type=Path, help="default: runs/study, runs/study-short and so on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 1: in this process")
    parser.add_argument("--threads", type=int, default=1, help="threads of each of several jobs")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", dest="form", action="store_const", const="short", help="four recipes, fewer steps")
    form.add_argument("--tiny", dest="form", action="store_const", const="tiny", help="two recipes, two steps")
    parser.add_argument("--tune", action="store_true", help="validation drawings of two phases, not the tests")
    parser.add_argument("--tables_only", action="store_true", help="write tables and figures of what is there")
    parser.set_defaults(form="full")
    options, further = parser.parse_known_args(argv)
    small = options.form != "full"
    options.streams = (options.streams or ("domain" if options.form == "tiny" else STREAMS)).split(",")
    default = {"full": "main", "short": SHORT_RECIPES, "tiny": TINY_RECIPES}[options.form]
    options.recipes = (options.recipes or default).split(",")
    seeds = options.seeds or ("10,11" if options.tune else SHORT_SEEDS if small else "0,1,2")
    options.seeds = [int(seed) for seed in seeds.split(",")]
    if options.tune and min(options.seeds) < 10:
        parser.error("--tune needs seeds of its own, 10 or more: those below are for the tables.")
    if options.output_dir is None:
        parts = ["study", *([options.form] if small else []), *(["tune"] if options.tune else [])]
        options.output_dir = Path("runs") / "-".join(parts)
    return options, further


# ---- What is to be run ----


def planned(options: argparse.Namespace, further: Sequence[str]) -> list[Run]:
    """All runs in the order in which they are begun: those that train the bases, then seed after seed."""
    content = yaml.safe_load(options.recipe_file.read_text(encoding="utf-8"))
    entries, sets = content.get("recipes", {}), content.get("sets", {})
    names = list(dict.fromkeys(name for asked in options.recipes for name in sets.get(asked, [asked])))
    order = [BASE, *sorted((name for name in names if name != BASE), key=lambda name: name != "joint")]
    cells = [(seed, stream, name) for seed in options.seeds for stream in options.streams for name in order]
    cells.sort(key=lambda cell: cell[2] != BASE)
    return [
        Run(
            stream,
            name,
            seed,
            entries.get(name, {}).get("front"),
            tuple(flags_of(entries.get(name, {}), name, stream, seed, options, further)),
            folder_of(name, stream, seed, options),
        )
        for seed, stream, name in cells
    ]


def folder_of(name: str, stream: str, seed: int, options: argparse.Namespace) -> Path:
    return options.output_dir / stream / f"{name}-seed{seed}"


def flags_of(
    entry: Mapping[str, Any], name: str, stream: str, seed: int, options: argparse.Namespace, further: Sequence[str]
) -> list[str]:
    """The flags of `continual_clip.py`: an entry's come before those of the command line, which override them."""
    entry = {**entry, **entry.get("streams", {}).get(stream, {})}
    own = {key: value for key, value in entry.items() if key not in ("front", "streams")}
    settings = {
        **FLAGS,
        **(DEMO_DEFAULTS if ITS_MODEL in own.values() else {}),  # not those of a run that is given its model
        **FORMS[options.form],
        "demo_stream": stream,
        "seed": seed,
        **({"demo_validation": True} if options.tune else {}),
        "recipe": name,
        **own,
    }
    flags = []
    for key, value in settings.items():
        if value == ITS_MODEL:
            value = folder_of(BASE, stream, seed, options) / "phase-0"
        flags += [f"--{key}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return [*flags, *further]


def refuse_other_settings(runs: Sequence[Run]) -> None:
    """A folder with runs of other settings is not gone on with: the table would mix them. One that failed before it
    began may be corrected."""
    for run in runs:
        before = read_json(run.folder / STUDY)
        has_begun = (run.folder / "run.json").exists()
        if before is not None and has_begun and before["flags"] != list(run.flags):
            changed = sorted(set(before["flags"]) ^ set(run.flags))
            raise SystemExit(
                f"{run.folder} holds a run with other settings ({', '.join(changed)}). Choose another --output_dir, "
                "or remove that folder."
            )


# ---- Running it ----


def carry_out(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Bases first, then the rest; tables are written whenever a run has ended."""
    logging.basicConfig(format="%(message)s")  # before a run in this process ties it to its own log
    unfinished = [run for run in runs if not is_finished(run.folder)]
    bases = [run for run in unfinished if run.recipe == BASE]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished", flush=True)
    with Workers(options.jobs, options.threads) as workers:
        for part in (bases, [run for run in unfinished if run not in bases]):
            for run, reason in workers.carry_out(part):
                print(f"{run.name}: {reason or 'finished'}", flush=True)
                tables.write(options.output_dir)


ENDED_BY_SIGNAL = (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Status of a process that a signal has ended, before and after the run has begun to listen for it."""

FAILURES = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
"""What `ContinualRun` and torch say to bad settings, NaN and too little room. Anything else is a mistake in the code,
which ends the study."""


class Workers:
    """Carry out runs, several at a time each in a process of its own; SIGTERM is an interruption as Ctrl-C is, and
    ends those processes."""

    def __init__(self, jobs: int, threads: int):
        self.jobs, self.threads = jobs, threads
        self.live: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def __enter__(self) -> "Workers":
        self.handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.handler)
        self.stop()

    def stop(self) -> None:
        self.stopped.set()
        for process in list(self.live):
            process.terminate()

    def carry_out(self, runs: Sequence[Run]):
        """Yields each run as it ends, with the reason why it failed or None."""
        if self.jobs == 1:
            yield from ((run, self._record(run, self._here)) for run in runs)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            jobs = {pool.submit(self._record, run, self._apart): run for run in runs}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
            except BaseException:  # an interruption of this process, or of who asks for the runs
                self.stop()
                raise

    def _record(self, run: Run, carry_out) -> str | None:
        if self.stopped.is_set():
            return "not begun"
        run.folder.mkdir(parents=True, exist_ok=True)
        record = {"recipe": run.recipe, "seed": run.seed, "front": run.front, "flags": list(run.flags)}
        write_json(run.folder / STUDY, record)
        (run.folder / FAILED).unlink(missing_ok=True)
        reason = carry_out(run)
        if reason is not None and not self.stopped.is_set():
            write_json(run.folder / FAILED, {"reason": reason})
        return reason

    @staticmethod
    def _here(run: Run) -> str | None:
        import continual_clip  # takes seconds, which the processes of several jobs spend anyway

        with open(run.folder / LOG, "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                continual_clip.main(run.argv)
            except Interrupted as error:
                raise KeyboardInterrupt from error  # a signal that the run has taken ends the study, too
            except SystemExit as error:
                print(error.code if isinstance(error.code, str) else "", file=log)
            except FAILURES:  # why a run has failed stands in the tables; the others go on
                traceback.print_exc(file=log)
            else:
                return None
        return last_words(run.folder / LOG, status=1)

    def _apart(self, run: Run) -> str | None:
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        command = [sys.executable, str(HERE.parent / "continual_clip.py"), *run.argv]
        with open(run.folder / LOG, "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
            self.live.add(process)
            status = process.wait()
            self.live.discard(process)
        if status in ENDED_BY_SIGNAL:  # whoever ends the jobs may tell them before this process
            self.stopped.set()
        return None if status == 0 else last_words(run.folder / LOG, status)


def last_words(log: Path, status: int) -> str:
    """Why a process has ended: the last line of its log, which is that of the exception, or the signal."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if status < 0:
        return f"ended by signal {-status}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
    return lines[-1] if lines else f"ended with status {status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
