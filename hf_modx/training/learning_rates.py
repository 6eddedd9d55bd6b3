"""A learning rate of its own for the text tower."""

import torch
from torch import nn

from ..trained_weights import PREFIX

TEXT_TOWER = ("text_model.", "text_projection.")


def give_own_learning_rate(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Move the text tower and its projection out of the optimizer's groups into groups with another learning rate.

    Raises:
        ValueError: the model has no parameters of these names.
    """
    chosen = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if name.removeprefix(PREFIX).startswith(TEXT_TOWER)
    }
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no parameters named {' or '.join(TEXT_TOWER)}...")
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
