"""Running a function in several real processes with gloo."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import PrepareForLaunch, patch_environment


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


@contextmanager
def prepared(num_processes: int, function: Callable) -> Iterator[Callable]:
    """What `torch.multiprocessing.start_processes` is to call in a context in which nobody ends the other processes
    where one of them fails, as `launch` does."""
    with (
        tempfile.NamedTemporaryFile() as meeting_place,
        patch_environment(
            world_size=num_processes,
            master_addr="127.0.0.1",
            master_port="29500",
            accelerate_mixed_precision="no",
            accelerate_debug_rdv_file=meeting_place.name,
            accelerate_use_cpu="yes",
            gloo_socket_ifname="lo",
        ),
    ):
        yield PrepareForLaunch(_Fresh(function), debug=True)
