"""The old model as a frozen teacher."""

import copy

import torch
from accelerate import Accelerator
from torch import nn

from .embeddings import PairEmbeddings, embed_pairs


class Teacher:
    """A frozen copy of a model, taken in memory at the moment of the call.

    The copy has no gradients, is in eval mode whatever mode the model is in, shares no tensor with it and is no
    submodule of anything: it gets into no checkpoint and no optimizer.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._prepared: nn.Module | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        """Place the copy and give it the student's mixed precision. Call it while a training run prepares its model:
        an evaluation before would take the prepared teacher for a prepared student."""
        self._prepared = accelerator.prepare_model(self.model, evaluation_mode=True)

    @torch.no_grad()
    def embed(self, batch: dict[str, torch.Tensor]) -> PairEmbeddings:
        """The old model's embeddings of this process's batch."""
        return embed_pairs(self._prepared, self.model, batch)
