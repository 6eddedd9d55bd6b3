"""What the benchmarks share: times side by side, peak memory, a table."""

import ctypes
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def median_seconds(runs: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """The median time of each run. Every round runs all of them, so that a busy machine slows them alike; a first
    round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def peak_extra_megabytes(prepare: Callable[..., Callable[[], object]], *args) -> float:
    """How far the resident memory rises while `prepare(*args)()` runs, in MiB, on Linux.

    `prepare` makes the inputs and returns what is measured, in a fresh process: memory that an earlier run has left to
    the allocator would hide that of a later one. Memory that is free is handed back and the kernel's high-water mark
    reset between the two. Everything counts, the libraries' own buffers too. `prepare` is a function of a module.
    """
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["hf_modx"])  # imported once, not in every process
    with fresh.Pool(1) as pool:
        return pool.apply(_peak_extra_megabytes, (prepare, *args))


def _peak_extra_megabytes(prepare: Callable[..., Callable[[], object]], *args) -> float:
    run = prepare(*args)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS, see proc(5)
    before = kibibytes("VmRSS")
    run()
    return (kibibytes("VmHWM") - before) / 1024


def kibibytes(name: str) -> int:
    """What Linux says of this process's memory: VmRSS is what is resident."""
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
