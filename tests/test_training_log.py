"""The curves of a phase that are kept with its results."""

import json
import math

from hf_modx.run.training_log import thinned_log

HISTORY = [
    {"loss": 4.0, "contrastive": 3.0, "learning_rate": 0.1, "epoch": 0.5, "step": 2},
    {"eval_first_loss": 1.0, "epoch": 0.5, "step": 2},
    {"loss": 2.0, "contrastive": 1.0, "learning_rate": 0.1, "epoch": 1.0, "step": 4},
    {"loss": 1.0, "contrastive": math.nan, "extra": 5.0, "learning_rate": 0.0, "epoch": 1.5, "step": 6},
    {"train_runtime": 1.0, "train_loss": 2.3, "epoch": 1.5, "step": 6},
]


def test_training_steps_alone_make_the_curves():
    log = thinned_log(HISTORY)
    assert log == {
        "step": [2, 4, 6],
        "loss": [4.0, 2.0, 1.0],
        "contrastive": [3.0, 1.0, None],
        "extra": [None, None, 5.0],
    }
    json.dumps(log, allow_nan=False)


def test_neighbours_become_their_mean_at_the_last_ones_step():
    assert thinned_log(HISTORY, points=2) == {
        "step": [4, 6],
        "loss": [3.0, 1.0],
        "contrastive": [2.0, None],
        "extra": [None, 5.0],
    }


def test_a_long_log_becomes_short_and_keeps_its_end():
    log = thinned_log([{"loss": 1.0, "step": step} for step in range(1, 1235)])
    assert len(log["step"]) == len(log["loss"]) <= 50 and log["step"][-1] == 1234


def test_nothing_logged_is_nothing_kept():
    assert thinned_log([{"train_loss": 1.0, "step": 3}]) == {}
