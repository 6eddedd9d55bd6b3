"""A phase leaves nothing behind in its process. What that comes to: examples/benchmarks/long_stream.py."""

import gc
import logging
import os
import threading
from collections import Counter

from transformers import TrainerCallback

from hf_modx import ContinualRun, Phase, PhaseStream

from tiny import tiny_pairs

ROW = 20
"""Objects of one type at most: the results keep a row of every phase, a dozen dicts, and pytest what is logged."""


class Inventory(TrainerCallback):
    """What there is of everything when a phase begins to train."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, **kwargs):
        gc.collect()
        there = Counter(type(thing).__name__ for thing in gc.get_objects())
        loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
        handlers = sum(len(logger.handlers) for logger in loggers)
        self.found.append((there, (len(os.listdir("/proc/self/fd")), threading.active_count(), handlers)))


def test_a_phase_leaves_nothing_but_its_row(model, processor, make_args):
    """The first phases may warm up."""
    data, inventory = tiny_pairs(40), Inventory()
    parts = [data.select(range(8 * k, 8 * k + 8)) for k in range(5)]
    phases = [Phase(f"part {k}", part, parts[4] if k == 0 else None) for k, part in enumerate(parts[:4])]
    ContinualRun(
        PhaseStream(tuple(phases)),
        "modx+er+weight_ensemble",
        make_args(max_steps=1, spatial_disorder=True, save_strategy="steps", save_steps=1),
        model=model,
        processing_class=processor,
        callbacks=[inventory],
    ).run()
    _, _, (before, held_before), (after, held_after) = inventory.found
    grown = after - before
    assert max(grown.values(), default=0) <= ROW, grown
    held = zip(held_before, held_after, strict=True)  # open files, threads, handlers of logs
    assert all(now <= earlier for earlier, now in held)
