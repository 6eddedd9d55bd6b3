"""What of a model a phase trains."""

from torch import nn

from ..adapter import add_adapter
from ..embeddings import check_dual_encoder
from ..training_args import ModXTrainingArguments


def trainable(model: nn.Module, args: ModXTrainingArguments) -> nn.Module:
    """The model with a fresh adapter, if the arguments want one, and without gradient where they freeze a tower.

    Raises:
        TypeError: the model is no dual encoder.
        ImportError: `args.peft` without PEFT.
        ValueError: see `add_adapter`.
    """
    check_dual_encoder(model)
    if args.peft is not None:
        model = add_adapter(model, args)
    for frozen, tower in ((args.freeze_vision_model, "vision_model"), (args.freeze_text_model, "text_model")):
        if frozen:
            getattr(model, tower).requires_grad_(False)
    return model
