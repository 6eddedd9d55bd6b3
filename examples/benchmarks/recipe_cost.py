"""What a step of every recipe costs beside plain fine-tuning.

    python examples/benchmarks/recipe_cost.py
    python examples/benchmarks/recipe_cost.py --recipes modx,zscl --steps 3 --rounds 1 --batch 8 --reference_texts 100
    python examples/benchmarks/recipe_cost.py --recipes 'modx,{"modx": {"reference_batch_size": 32}}' --batch 128

A CLIP of 4 + 4 layers of width 256 on 64 x 64 pixels, phase 1 of a stream with a base, through `ContinualRun`: replay
has its memory, ZSCL its references, 64 images and all captions of the base a step, C-CLIP its adapter. A round trains
every recipe once and takes the median time from one step's end to the next, input included; a ratio is the median over
the rounds of the ratio within a round. The last column is what a recipe does before and after the steps of a phase:
the seconds of the whole run less those of its steps, less what fine-tuning takes for that.

The second table is ZSCL with so many reference texts, which the frozen teacher embeds once, beside embedding them in
every step as the original does.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout

import torch
from gradient_cache import clip
from measure import markdown_table
from training_step import StepTimes, pictures, processor

from hf_modx import RECIPES, ContinualRun, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.callbacks import ReferenceDistillation
from hf_modx.callbacks.reference import embed_references
from hf_modx.recipes import build_recipe, recipe_arguments

TRAINED = [name for name in RECIPES if name != "frozen"]


class EncodedEveryStep(ReferenceDistillation):
    """The reference texts are embedded anew in every step, by the model that the phase starts from."""

    def start_phase(self, phase) -> None:
        super().start_phase(phase)
        self.phase, self.used = phase, phase.model

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self._tables["text"] = embed_references(
            self.used,
            self._images.select(range(1)),
            self._texts,
            self._collator,
            autocast=self.phase.autocast,
            batch_size=args.eval_batch_size,
            num_workers=0,
            device=args.device,
        )["text"]


def seconds(recipe, options: argparse.Namespace, stream: PhaseStream, steps: int) -> tuple[float, float]:
    """Of a step, and of the phase beside its steps."""
    times = StepTimes()
    recipe = [json.loads(recipe)] if isinstance(recipe, str) and recipe.startswith("{") else recipe
    # What the Trainer prints is not the benchmark's.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        args = ModXTrainingArguments(
            output_dir=folder,
            max_steps=steps + 2,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not options.gpu,
            teacher_cache=options.teacher_cache,
            **recipe_arguments(recipe),
        )
        run = ContinualRun(stream, recipe, args, model=clip(), processing_class=processor(), callbacks=[times])
        start = time.perf_counter()
        run.run()
        whole = time.perf_counter() - start
    step = statistics.median(times.seconds[1:])
    return step, whole - step * (steps + 2)


def every_recipe(options: argparse.Namespace, stream: PhaseStream) -> str:
    names = ["finetune", *(name for name in options.recipes if name != "finetune")]
    seconds(names[0], options, stream, options.steps)  # the first run of a process is slower
    rounds = [{name: seconds(name, options, stream, options.steps) for name in names} for _ in range(options.rounds)]
    rows = []
    for name in names:
        step = statistics.median(each[name][0] for each in rounds)
        ratio = statistics.median(each[name][0] / each["finetune"][0] for each in rounds)
        beside = statistics.median(each[name][1] - each["finetune"][1] for each in rounds)
        rows.append([name, f"{1000 * step:.0f} ms", f"{ratio:.2f}", f"{beside:.1f} s"])
    return markdown_table(["recipe", "step", "/ finetune", "beside the steps"], rows)


def reference_texts(options: argparse.Namespace, stream: PhaseStream) -> str:
    used = {"images": stream.base.train, "texts": pictures(options.reference_texts), "images_per_step": 64}
    rest = [part for part in build_recipe("zscl") if not isinstance(part, ReferenceDistillation)]
    once, _ = seconds([*rest, ReferenceDistillation(**used)], options, stream, options.steps)
    rest = [part for part in build_recipe("zscl") if not isinstance(part, ReferenceDistillation)]
    every, _ = seconds([*rest, EncodedEveryStep(**used)], options, stream, 2)
    rows = [
        [f"embedded {when}", f"{1000 * time:.0f} ms", f"{time / once:.1f}"]
        for when, time in (("once", once), ("in every step", every))
    ]
    return markdown_table([f"{options.reference_texts:,} reference texts", "step", "/ once"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda names: names.split(","), default=TRAINED, help="default: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference_texts", type=int, default=13_000)
    parser.add_argument("--teacher_cache", default="auto", help="of the recipes that have a teacher")
    parser.add_argument("--gpu", action="store_true", help="default: the CPU")
    options = parser.parse_args()
    data, number = pictures(8 * options.batch + 16), 4 * options.batch
    base, phase = data.select(range(number)), data.select(range(number, 2 * number))
    base_test, test = (data.select(range(2 * number + 8 * k, 2 * number + 8 * (k + 1))) for k in range(2))
    stream = PhaseStream((Phase("phase", phase, test),), base=Phase("base", base, base_test))
    print(every_recipe(options, stream))
    print()
    print(reference_texts(options, stream))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
