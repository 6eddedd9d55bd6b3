"""Whether a long stream stays as it begins: memory, open files and CPU time of many small phases in one process.

    python examples/benchmarks/long_stream.py
    python examples/benchmarks/long_stream.py --phases 400 --recipe modx+er+weight_ensemble

A CLIP of two layers of width 32 in each tower, 16 pairs and two steps with a checkpoint each a phase, one test. Each
row is the median over a part of the phases, measured where a phase's training begins; the first does not count. The
last line is the slope of a straight line through all phases but the first quarter. Linux only.

What rises by nature is the row that the results keep of each phase, some KiB. Resident memory goes up over the
first half of a hundred phases and then levels out. `tests/test_long_stream.py` counts objects, which is no matter of
allocators.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout

import torch
from measure import kibibytes, markdown_table
from training_step import pictures, processor
from transformers import CLIPConfig, CLIPModel, TrainerCallback

from hf_modx import ContinualRun, ModXTrainingArguments, Phase, PhaseStream

PAIRS = 16


class Watch(TrainerCallback):
    """What there is of everything when a phase begins to train."""

    def __init__(self):
        self.times: list[float] = []
        self.megabytes: list[float] = []
        self.open_files: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.times.append(time.process_time())
        self.megabytes.append(kibibytes("VmRSS") / 1024)
        self.open_files.append(len(os.listdir("/proc/self/fd")))

    def seconds(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]


def small_clip() -> CLIPModel:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 64, "patch_size": 16}, projection_dim=16)
    )


def watched(options: argparse.Namespace) -> Watch:
    data = pictures(PAIRS * options.phases + PAIRS)
    parts = [data.select(range(PAIRS * k, PAIRS * (k + 1))) for k in range(options.phases + 1)]
    phases = [Phase(f"phase {k}", part, parts[0] if k == 1 else None) for k, part in enumerate(parts[1:], start=1)]
    watch = Watch()
    # What the Trainer prints is not the benchmark's.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        args = ModXTrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=PAIRS,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not options.gpu,
        )
        stream = PhaseStream(tuple(phases))
        model = small_clip()
        ContinualRun(stream, options.recipe, args, model=model, processing_class=processor(), callbacks=[watch]).run()
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", type=int, default=100)
    parser.add_argument("--recipe", default="modx+er+weight_ensemble")
    parser.add_argument("--rows", type=int, default=10, help="of the table")
    parser.add_argument("--gpu", action="store_true", help="default: the CPU")
    options = parser.parse_args()
    watch = watched(options)
    columns = [watch.megabytes[1:], watch.open_files[1:], watch.seconds()]
    edges = [len(columns[0]) * row // options.rows for row in range(options.rows + 1)]
    rows = []
    for first, end in itertools.pairwise(edges):
        megabytes, files, seconds = (statistics.median(column[first:end]) for column in columns)
        rows.append([f"{first + 2} to {end + 1}", f"{megabytes:.0f} MiB", f"{files:.0f}", f"{1000 * seconds:.0f} ms"])
    print(markdown_table(["phases", "resident", "open files", "a phase"], rows))
    warm = len(columns[0]) // 4
    numbers = range(len(columns[0]) - warm)
    megabytes, files, seconds = (statistics.linear_regression(numbers, column[warm:]).slope for column in columns)
    print(f"\nA phase more: {1024 * megabytes:+.1f} KiB, {files:+.3f} open files, {1000 * seconds:+.2f} ms")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
