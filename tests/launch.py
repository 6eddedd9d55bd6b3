"""Running a function in several real processes with gloo."""

from collections.abc import Callable

from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState


class _Fresh:
    """The forked process must not believe what its parent knew of processes."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.function(*args)


def launch(num_processes: int, function: Callable, *args) -> None:
    """Call `function(*args)` in each of the processes; an exception in one is raised here."""
    debug_launcher(_Fresh(function), args, num_processes=num_processes)
