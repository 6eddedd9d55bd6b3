"""Pseudo texts: hard negatives of remembered images, found by inverting the old model's text tower.

Our reconstruction of the "pseudo text replay" of IncCLIP (Yan et al., "Generative Negative Text Replay for Continual
Vision-Language Pretraining", ECCV 2022), whose code is not public: the paper's idea, not its formula.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from .data import PairCollator, PairDataset, as_captions
from .distributed import on_each_process
from .embeddings import embed_texts, given_token_embeds, text_inputs, token_table
from .replay import embed_rows

NEAREST = 9  # starting captions of an image: the ranks 2 to 10, its own caption being the first
SAME_TEXT = 1e-5  # captions that are no farther (1 - cosine) from the own one say the same
PSEUDO_TEXTS = 2  # sets these draws apart from other draws by (seed, number)


@dataclass(frozen=True)
class Inversion:
    """How a pseudo text is searched.

    With `s(x, e) = <f_old(x), g_old(e)>` for a remembered pair (x, y), and its lead r, which is `s(x, y)` minus the
    mean similarity of x to the other captions of the memory, Adam minimises over the token embeddings e
    `max(0, s(x, e) - (s(x, y) - positive_margin r)) + max(0, (s(x, y) - negative_margin r) - s(x, e))`:
    the text is less like the image than its caption is, and more like it than any odd text.

    The search starts from another caption of the memory, one of the nine most like the image, with noise, and ends
    as soon as both terms are zero. No token gets longer than the longest of the embedding table.

    Attributes:
        positive_margin, negative_margin: the two ends of the band, in units of r; 0 < positive < negative.
        steps: of Adam, at most. With none, and without noise, the texts are the starting captions.
        learning_rate, noise: in units of the standard deviation of the embedding table.

    Raises:
        ValueError: a value out of its range.
    """

    positive_margin: float = 0.1
    negative_margin: float = 0.3
    steps: int = 30
    learning_rate: float = 0.1
    noise: float = 0.5

    def __post_init__(self):
        if not 0 < self.positive_margin < self.negative_margin:
            raise ValueError(
                "The margins must be 0 < positive_margin < negative_margin, got "
                f"{self.positive_margin} and {self.negative_margin}."
            )
        if self.steps < 0:
            raise ValueError(f"The number of steps must not be negative, got {self.steps}.")


@dataclass(frozen=True)
class PseudoTexts:
    """A text for each of M remembered pairs, in the order of the memory, on the CPU.

    Attributes:
        input_ids: (M, L), of the caption from which the search started; they say where a text ends.
        token_embeds: (M, L, H), the text itself.
        text_embeds: (M, D), unit-norm, its embedding by the old model.
        start_rows: (M,) int64, the pair whose caption the search started from.
        similarity: (M,), of image and text, s(x, e).
        own_similarity: (M,), of image and own caption, s(x, y).
        lead: (M,), r. Without other captions it is 0.
        in_band: (M,) bool, whether the similarity lies between the margins; False where the lead is not positive.
        to_own_caption: (M,), cosine of the text and the own caption.
        is_rewording: (M,) bool, whether the text is nearer to the own caption than any other caption is.
        attention_mask: (M, L), of the caption from which the search started; None where the tokenizer gives none.
    """

    input_ids: Tensor
    token_embeds: Tensor
    text_embeds: Tensor
    start_rows: Tensor
    similarity: Tensor
    own_similarity: Tensor
    lead: Tensor
    in_band: Tensor
    to_own_caption: Tensor
    is_rewording: Tensor
    attention_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def tokens(self) -> dict[str, Tensor]:
        """The text inputs of the model."""
        return text_inputs({name: tensor for name, tensor in vars(self).items() if tensor is not None})


class PseudoTextSearch:
    """Searches texts for the pairs of a memory. All processes make it, and call it, together.

    The work is shared by batches that do not depend on the number of processes: the texts are the same to the bit.

    Args:
        model: the old model, on its device; it stays in the mode that it is in.
        pairs: the memory, at least one pair; of several captions the first one counts.
        collator: pairs to tensors as evaluation does it.
        batch_size: texts searched at once.
    """

    def __init__(self, model: nn.Module, pairs: PairDataset, collator: PairCollator, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        captions = [as_captions(value)[0] for value in _column(pairs, pairs.caption_column)]
        ids = _column(pairs, pairs.pair_id_column) if pairs.pair_id_column else range(len(pairs))
        with _in_eval_mode(model):
            device = model.device
            images, texts = embed_rows(model, pairs, collator, batch_size=batch_size, device=device)
        self.tokens = {name: tensor.to(device) for name, tensor in collator.tokens(captions).items()}
        self.words = collator.words(self.tokens["input_ids"])[:, :, None]
        self.images = torch.from_numpy(np.array(images)).to(device)
        self.captions = torch.from_numpy(np.array([embeds[0] for embeds in texts])).to(device)
        self.pair_ids = torch.tensor(ids, device=device)

    def __call__(self, inversion: Inversion, seed: int, number: int = 0) -> PseudoTexts:
        """A text for each pair, a pure function of the arguments.

        Args:
            seed, number: of the starting captions and the noise.
        """
        starts = range(0, len(self.images), self.batch_size)

        def share(rank: int, processes: int) -> list[tuple[int, PseudoTexts]]:
            return [(at, self._search(at, inversion, (seed, number))) for at in starts[rank::processes]]

        with _in_eval_mode(self.model):
            parts = [part for _, part in sorted(on_each_process(share), key=lambda found: found[0])]
        names = [field.name for field in fields(PseudoTexts) if getattr(parts[0], field.name) is not None]
        return PseudoTexts(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def _search(self, at: int, inversion: Inversion, seed: tuple[int, int]) -> PseudoTexts:
        """The texts of one batch of pairs, which begins at a row."""
        rows = torch.arange(at, min(at + self.batch_size, len(self.images)), device=self.images.device)
        generator = np.random.default_rng([*seed, PSEUDO_TEXTS, at])
        other = self._others(rows)
        similarities = self.images[rows] @ self.captions.T
        own = similarities.gather(1, rows[:, None])[:, 0]
        lead = own - (similarities * other).sum(dim=1) / other.sum(dim=1).clamp(min=1)
        lead = lead.where(other.any(dim=1), 0)
        start_rows = _one_of_the_nearest(similarities.masked_fill(~other, -torch.inf), generator)
        band = own - inversion.negative_margin * lead, own - inversion.positive_margin * lead
        tokens = {name: tensor[start_rows] for name, tensor in self.tokens.items()}
        words = self.words[start_rows]
        start = self._noisy(tokens["input_ids"], words, inversion.noise, generator)
        token_embeds = self._invert(start, tokens, words, rows, band, inversion)
        with torch.no_grad():
            text_embeds = self._read(token_embeds, tokens)
        similarity = (self.images[rows] * text_embeds).sum(dim=1)
        to_own_caption = (self.captions[rows] * text_embeds).sum(dim=1)
        nearest_other = (self.captions[rows] @ self.captions.T).masked_fill(~other, -torch.inf).amax(dim=1)
        found = PseudoTexts(
            **tokens,
            token_embeds=token_embeds,
            text_embeds=text_embeds,
            start_rows=start_rows,
            similarity=similarity,
            own_similarity=own,
            lead=lead,
            in_band=_between(similarity, band) & (lead > 0),
            to_own_caption=to_own_caption,
            is_rewording=to_own_caption > nearest_other,
        )
        return PseudoTexts(**{name: tensor.cpu() for name, tensor in vars(found).items() if tensor is not None})

    def _others(self, rows: Tensor) -> Tensor:
        """(n, M): the captions that belong to other pairs and say something else."""
        same_text = self.captions[rows] @ self.captions.T > 1 - SAME_TEXT
        return ~same_text & (self.pair_ids[rows, None] != self.pair_ids)

    def _noisy(self, input_ids: Tensor, words: Tensor, noise: float, generator: np.random.Generator) -> Tensor:
        """The token embeddings of captions with noise on all words."""
        table = token_table(self.model).weight.detach()
        embeds = table[input_ids]
        drawn = torch.from_numpy(generator.standard_normal(embeds.shape)).to(embeds)
        return embeds + noise * table.std() * drawn * words

    def _invert(
        self,
        token_embeds: Tensor,
        tokens: dict[str, Tensor],
        words: Tensor,
        rows: Tensor,
        band: tuple[Tensor, Tensor],
        inversion: Inversion,
    ) -> Tensor:
        table = token_table(self.model).weight.detach()
        longest = table.norm(dim=1).max()
        token_embeds = token_embeds.requires_grad_()
        adam = torch.optim.Adam([token_embeds], lr=inversion.learning_rate * float(table.std()))
        for _ in range(inversion.steps):
            similarity = (self.images[rows] * self._read(token_embeds, tokens)).sum(dim=1)
            missing = ~_between(similarity, band)
            if not missing.any():
                break
            loss = (similarity - band[1]).relu() + (band[0] - similarity).relu()
            (token_embeds.grad,) = torch.autograd.grad(loss.sum(), token_embeds)
            before = token_embeds.detach().clone()
            adam.step()
            with torch.no_grad():
                token_embeds.mul_((longest / token_embeds.norm(dim=-1, keepdim=True)).clamp(max=1))
                token_embeds.copy_(token_embeds.where(missing[:, None, None] & words, before))
        return token_embeds.detach()

    def _read(self, token_embeds: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """(n, D), unit-norm: what the text tower makes of token embeddings."""
        rows = torch.arange(len(token_embeds), device=token_embeds.device)
        with given_token_embeds(self.model, token_embeds, rows):
            return embed_texts(self.model, **tokens)


def _column(pairs: PairDataset, name: str) -> list:
    return pairs.dataset.select_columns([name])[:][name]


def _between(similarity: Tensor, band: tuple[Tensor, Tensor]) -> Tensor:
    return (similarity >= band[0]) & (similarity <= band[1])


def _one_of_the_nearest(similarities: Tensor, generator: np.random.Generator) -> Tensor:
    """(n,): of each row one of the places with the highest similarities, at random; any where there is none."""
    number = min(NEAREST, similarities.shape[1])
    nearest = similarities.topk(number, dim=1)
    available = nearest.values.isfinite().sum(dim=1).clamp(min=1)
    drawn = torch.from_numpy(generator.integers(0, NEAREST, len(similarities))).to(available.device)
    return nearest.indices.gather(1, (drawn % available)[:, None])[:, 0]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
