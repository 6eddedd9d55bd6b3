"""Memory and time of a large contrastive batch in chunks, beside a plain step of one chunk's size.

    python examples/benchmarks/gradient_cache.py
    python examples/benchmarks/gradient_cache.py --batch 32 --chunk 8 --repeats 1

A CLIP of 4 + 4 layers of width 256 on 64 x 64 pixels, the Mod-X loss with a live teacher. Memory is what a fresh
process needs for one training step above model, gradients and inputs. Times a pair take turns; the second forward
pass is the price. Last, the largest difference of any weight after five steps of stochastic gradient descent from the
whole batch in one piece.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from accelerate import Accelerator
from measure import markdown_table, median_seconds, peak_extra_megabytes
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from hf_modx.embeddings import PairEmbeddings, embed_pairs
from hf_modx.gradcache import GradientCache
from hf_modx.losses import modx_loss

TOKENS, VOCABULARY, PIXELS = 16, 1000, 64


def clip() -> CLIPModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    text = {**tower, **ids, "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
    vision = {**tower, "image_size": PIXELS, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)).train()


def random_pairs(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY - 1, (number, TOKENS), generator=generator)
    ids[:, -1] = VOCABULARY - 1
    pixels = torch.randn(number, 3, PIXELS, PIXELS, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Step:
    """Training steps on one batch, in chunks or in one piece."""

    def __init__(self, number: int, chunk: int | None):
        self.model = clip()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.accelerator = Accelerator(cpu=True)
        self.batch = random_pairs(number)
        self.cache = None if chunk is None else GradientCache(chunk)
        self.rows = chunk or number
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        if self.cache is None:
            embeds = self.embed(self.batch)
            self.loss(embeds.image, embeds.text).backward()
        else:
            self.cache.backward(self.accelerator, self.model, self.batch, embed=self.embed, loss_of=self.loss)
        self.optimizer.step()

    def embed(self, batch: dict[str, Tensor]) -> PairEmbeddings:
        return embed_pairs(self.model, self.model, batch)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        old = [self.old_embeddings(at) for at in range(0, len(image), self.rows)]
        old_image, old_text = torch.cat([part.image for part in old]), torch.cat([part.text for part in old])
        return modx_loss(image, text, old_image, old_text, self.model.logit_scale.exp(), reduction="mean").loss

    @torch.no_grad()
    def old_embeddings(self, at: int) -> PairEmbeddings:
        part = {name: tensor[at : at + self.rows] for name, tensor in self.batch.items()}
        return embed_pairs(self.teacher, self.teacher, part)


def one_step(number: int, chunk: int | None) -> Callable[[], None]:
    """Ready to run, for a process of its own; a pair of each has gone through before, as far as the libraries go."""
    Step(2, None if chunk is None else 1)()
    return Step(number, chunk)


def largest_difference(number: int, chunk: int, steps: int = 5) -> float:
    whole, chunked = Step(number, None), Step(number, chunk)
    for _ in range(steps):
        whole()
        chunked()
    pairs = zip(whole.model.parameters(), chunked.model.parameters(), strict=True)
    return max((first - second).abs().max().item() for first, second in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="pairs of the large contrastive batch")
    parser.add_argument("--chunk", type=int, default=64, help="pairs held at once")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    settings = {"plain": (options.chunk, None), "in chunks": (options.batch, options.chunk)}
    memory = {name: peak_extra_megabytes(one_step, *setting) for name, setting in settings.items()}
    seconds = median_seconds({name: Step(*setting) for name, setting in settings.items()}, options.repeats)
    per_pair = {name: seconds[name] / number for name, (number, _) in settings.items()}
    rows = [
        [
            f"{name}, {number:,} pairs",
            f"{memory[name]:.0f} MiB",
            f"{memory[name] / memory['plain']:.2f}",
            f"{1000 * per_pair[name]:.2f} ms",
            f"{per_pair[name] / per_pair['plain']:.2f}",
        ]
        for name, (number, _) in settings.items()
    ]
    print(markdown_table(["step", "memory", "/ plain", "time a pair", "/ plain"], rows))
    print(f"\nWeights after five steps, from the whole batch: {largest_difference(options.batch, options.chunk):.0e}")


if __name__ == "__main__":
    main()
