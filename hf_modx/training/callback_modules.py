"""The modules of loss callbacks: trained with the model, and no part of it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..callbacks import LossCallback
from ..callbacks.base import module_prefix
from ..distributed import average_gradients, copy_from_main_process


class CallbackModules(TrainerCallback):
    """Does for the modules of the loss callbacks (`LossCallback.modules`) what the Trainer and data-parallel training
    do for the model.

    Every process computes the loss on the global batch, so it has the whole gradient of these parameters, or its share
    times the number of processes (see `Shard`): the mean over processes is the gradient of one big batch, as it is for
    the model.

    Args:
        callbacks: gives the loss callbacks that are live.
    """

    def __init__(self, callbacks: Callable[[], Sequence[LossCallback]]):
        self._callbacks = callbacks

    def modules(self) -> dict[str, nn.Module]:
        """By a name that tells whose they are."""
        return {
            f"{module_prefix(index, callback)}{name}": module
            for index, callback in enumerate(self._callbacks())
            for name, module in callback.modules().items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for module in self.modules().values() for p in module.parameters() if p.requires_grad]

    def start(self, device: torch.device) -> None:
        """Place the modules, the main process's weights on every process, ready to be trained."""
        for module in self.modules().values():
            module.to(device).train()
            copy_from_main_process(list(module.state_dict().values()))

    def join(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Put the parameters that an optimizer does not have into it; matrices decay."""
        new = self._missing(optimizer)
        matrices = [parameter for parameter in new if parameter.ndim >= 2]
        others = [parameter for parameter in new if parameter.ndim < 2]
        for parameters, decay in ((matrices, weight_decay), (others, 0.0)):
            if parameters:
                optimizer.add_param_group({"params": parameters, "weight_decay": decay})

    def are_in(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer trains all of the parameters."""
        return not self._missing(optimizer)

    def _missing(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self.parameters() if id(parameter) not in known]

    def average_gradients(self) -> None:
        """After the backward pass of an optimizer step's last batch."""
        average_gradients(self.parameters())

    def on_step_end(self, args, state, control, **kwargs):
        for parameter in self.parameters():  # the Trainer does so for the model's alone
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{prefix}.{name}": tensor
            for prefix, module in self.modules().items()
            for name, tensor in module.state_dict().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
