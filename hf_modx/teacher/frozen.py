"""The old model as a frozen teacher: a copy of it, or the student itself with its adapter off."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..embeddings import PairEmbeddings, embed_pairs

ADAPTER, ADAPTER_OUT = "lora_", ("lora_B", "lora_embedding_B")  # how PEFT names parameters
SCALES = ("logit_scale", "logit_bias")  # may be trained along with an adapter


class Teacher:
    """A frozen copy of a model, taken in memory at the moment of the call.

    The copy has no gradients, is in eval mode whatever mode the model is in, shares no tensor with it and is no
    submodule of anything: it gets into no checkpoint and no optimizer.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._prepared: nn.Module | None = None
        self._accelerator: Accelerator | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        """Place the copy and give it the student's mixed precision. Call it while a training run prepares its model:
        an evaluation before would take the prepared teacher for a prepared student."""
        self._accelerator = accelerator
        self._prepared = accelerator.prepare_model(self.model, evaluation_mode=True)

    def release(self) -> None:
        """Make the accelerator forget the copy, so that it leaves memory with this object."""
        if self._accelerator is not None:
            self._accelerator._models = [model for model in self._accelerator._models if model is not self._prepared]

    def weights(self) -> Mapping[str, Tensor]:
        """All tensors that decide the embeddings."""
        return self.model.state_dict()

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        """The old model's embeddings of this process's batch."""
        return embed_pairs(self._prepared, self.model, batch)


class AdapterOffTeacher:
    """A PEFT student without its adapter, which is the model that it started from: no second copy in memory.

    The student is called unwrapped, so that no hook of distributed training fires, and is left exactly as it was:
    mode of every submodule and `requires_grad` of every parameter.

    Args:
        student: see `adapter_is_fresh`.

    Raises:
        ValueError: the adapter has learned already: without it, the student is not what it was.
    """

    def __init__(self, student: nn.Module):
        if not adapter_is_fresh(student):
            raise ValueError(
                "The student without its adapter is another model than the student: the adapter is not fresh, or more "
                "than the adapter is trained. Use Teacher(student), which takes a copy."
            )
        self.model = student
        self._scales = {
            name: getattr(student, name).detach().clone().reshape(()) for name in SCALES if hasattr(student, name)
        }
        self._accelerator: Accelerator | None = None

    def prepare(self, accelerator: Accelerator) -> None:
        """Embed in the mixed precision of this accelerator."""
        self._accelerator = accelerator

    def release(self) -> None:
        """There is nothing to let go of."""

    def weights(self) -> Mapping[str, Tensor]:
        """All tensors that decide the embeddings; the same before and after training."""
        base = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if ADAPTER not in name and not name.endswith(SCALES)
        }
        return {**base, **self._scales}

    @torch.no_grad()
    def embed(self, batch: Mapping[str, Tensor]) -> PairEmbeddings:
        """The old model's embeddings of this process's batch."""
        with _left_as_it_was(self.model):
            self.model.eval()
            with self._accelerator.autocast(), self.model.disable_adapter():
                embeds = embed_pairs(self.model, self.model, batch)
        image, text = embeds.image, embeds.text
        if self._accelerator.mixed_precision != "no":
            image, text = image.float(), text.float()  # as a prepared model returns them
        scales = {name: scale.to(image.device) for name, scale in self._scales.items()}
        return PairEmbeddings(image, text, **(scales | {"logit_scale": scales["logit_scale"].exp()}))


def teacher_of(model: nn.Module) -> Teacher | AdapterOffTeacher:
    """The model as it is now, frozen: without a copy where the model is a PEFT model with a fresh adapter."""
    return AdapterOffTeacher(model) if adapter_is_fresh(model) else Teacher(model)


def embed_in_chunks(
    teacher: Teacher | AdapterOffTeacher, batch: Mapping[str, Tensor], size: int | None
) -> PairEmbeddings:
    """The old model's embeddings of this process's batch, so many pairs at a time; None: all at once."""
    rows = len(batch["input_ids"])
    size = size or rows
    parts = [
        teacher.embed({name: tensor[at : at + size] for name, tensor in batch.items()}) for at in range(0, rows, size)
    ]
    image, text = (torch.cat([getattr(part, side) for part in parts]) for side in ("image", "text"))
    return replace(parts[0], image=image, text=text)


def adapter_is_fresh(model: nn.Module) -> bool:
    """Whether a PEFT model equals its base model and will still hold it after training: its adapters are LoRA with
    B = 0, and nothing else is trained but the logit scale and bias."""
    if not (hasattr(model, "peft_config") and hasattr(model, "disable_adapter")):
        return False
    out = [tensor for name, tensor in model.named_parameters() if any(part in name for part in ADAPTER_OUT)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    only_adapter = all(ADAPTER in name or name.endswith(SCALES) for name in trained)
    return bool(out) and only_adapter and not any(tensor.any() for tensor in out)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Take back changes of modes and of `requires_grad`: PEFT, when it switches an adapter on again, makes the whole
    adapter trainable, a frozen tower's too."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required in trainable:
            parameter.requires_grad_(required)
