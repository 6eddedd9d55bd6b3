"""The built-in data, streams and small CLIP: everything runs without network or accelerator."""

from .base import BASE_MAX_STEPS, DEMO_DEFAULTS, DEMO_RECIPE_ARGS, demo_stream, trained_base
from .streams import DEMO_STREAMS, class_stream, instance_stream

__all__ = [
    "BASE_MAX_STEPS",
    "DEMO_DEFAULTS",
    "DEMO_RECIPE_ARGS",
    "DEMO_STREAMS",
    "class_stream",
    "demo_stream",
    "instance_stream",
    "trained_base",
]
