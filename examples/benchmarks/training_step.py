"""What a training step costs: our Trainer beside the stock one, and Mod-X beside fine-tuning.

    python examples/benchmarks/training_step.py
    python examples/benchmarks/training_step.py --steps 3 --rounds 1 --batch 8

A CLIP of 4 + 4 layers of width 256 on 64 x 64 pixels. The first table runs both Trainers on the same batches of
tensors, the contrastive loss alone. The second runs our Trainer on images in a `datasets.Dataset`: fine-tuning, Mod-X
with cached and with live teacher. A round trains each once for so many steps and takes the median time from one step's
end to the next, input included; a ratio is the median over the rounds of the ratio within a round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from gradient_cache import PIXELS, TOKENS, clip, random_pairs
from measure import markdown_table
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer, Trainer, TrainerCallback

from hf_modx import ModXTrainer, ModXTrainingArguments

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class StepTimes(TrainerCallback):
    """Seconds from one step's end to the next."""

    def __init__(self):
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def arguments(folder: str, options: argparse.Namespace, **changes) -> ModXTrainingArguments:
    settings = {
        "max_steps": options.steps + 2,
        "per_device_train_batch_size": options.batch,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ModXTrainingArguments(output_dir=folder, **{**settings, **changes})


def rows_of_tensors(number: int) -> list[dict[str, Tensor]]:
    pairs = random_pairs(number)
    return [{name: tensor[row] for name, tensor in pairs.items()} for row in range(number)]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def stack_for_stock(rows: list[dict[str, Tensor]]) -> dict[str, Tensor | bool]:
    return {**stack(rows), "return_loss": True}


def processor() -> CLIPProcessor:
    """Every letter a token."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
    images = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def pictures(number: int) -> Dataset:
    """Noise with captions of random letters."""
    random = np.random.default_rng(0)
    images = list(random.integers(0, 256, (number, PIXELS, PIXELS, 3), dtype=np.uint8))
    captions = ["".join(random.choice(list(LETTERS), TOKENS - 2)) for _ in range(number)]
    features = Features({"image": Image(), "caption": Value("string")})
    return Dataset.from_dict({"image": images, "caption": captions}, features=features)


def seconds_a_step(make: Callable[[str], Trainer]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder)
        times = StepTimes()
        trainer.add_callback(times)
        trainer.train()
    return statistics.median(times.seconds[1:])


def compare(makes: dict[str, Callable[[str], Trainer]], rounds: int) -> str:
    """A table whose first entry is what the others are measured against."""
    measured = [{name: seconds_a_step(make) for name, make in makes.items()} for _ in range(rounds)]
    first = next(iter(makes))
    rows = []
    for name in makes:
        ratio = statistics.median(each[name] / each[first] for each in measured)
        rows.append([name, f"{1000 * statistics.median(each[name] for each in measured):.0f} ms", f"{ratio:.3f}"])
    return markdown_table(["step", "median", f"/ {first}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tensors, images, used = rows_of_tensors(4 * options.batch), pictures(4 * options.batch), processor()

    def stock(folder: str) -> Trainer:
        args = arguments(folder, options, dataloader_drop_last=True)
        return Trainer(clip(), args, data_collator=stack_for_stock, train_dataset=tensors)

    def ours(folder: str) -> Trainer:
        args = arguments(folder, options)
        return ModXTrainer(clip(), args, data_collator=stack, train_dataset=tensors, loss_callbacks="finetune")

    def on_images(recipe: str, teacher_cache: str = "off") -> Callable[[str], Trainer]:
        def make(folder: str) -> Trainer:
            args = arguments(folder, options, teacher_cache=teacher_cache)
            return ModXTrainer(clip(), args, train_dataset=images, processing_class=used, loss_callbacks=recipe)

        return make

    print(compare({"stock Trainer": stock, "ModXTrainer": ours}, options.rounds))
    print()
    runs = {
        "fine-tuning": on_images("finetune"),
        "Mod-X, cached teacher": on_images("modx", "memory"),
        "Mod-X, live teacher": on_images("modx"),
    }
    print(compare(runs, options.rounds))


if __name__ == "__main__":
    main()
