"""No training at all."""

from .base import LossCallback


class Frozen(LossCallback):
    """Nothing is trained: after every phase the model is the start model, and its row of the matrix the measure of
    what learning and forgetting are. A phase takes no steps."""

    trains = False
