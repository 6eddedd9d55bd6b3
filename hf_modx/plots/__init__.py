"""Pictures of runs, drawn from what they have measured. They need matplotlib: `pip install 'hf_modx[plots]'`."""

from .curves import draw_curves
from .disorder import draw_disorder
from .matrix import draw_matrix, largest_value
from .retrieved import Retrieved, draw_retrieved
from .tradeoff import draw_tradeoff, draw_tradeoffs
from .training import draw_training

__all__ = [
    "Retrieved",
    "draw_curves",
    "draw_disorder",
    "draw_matrix",
    "draw_retrieved",
    "draw_tradeoff",
    "draw_tradeoffs",
    "draw_training",
    "largest_value",
]
