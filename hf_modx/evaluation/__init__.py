"""Evaluation: retrieval, zero-shot classification, linear probes, and the phase x test matrix."""

from .encoding import EncodedPairs, Encoder, encode_pairs
from .linear_probe import linear_probe_accuracy
from .matrix import EvaluationMatrix
from .retrieval import retrieval_metrics, retrieval_ranks
from .suite import LabelTest, LinearProbeTest, RetrievalTest, ZeroShotTest, load_tests
from .zero_shot import class_embeds, per_class_top1, zero_shot_metrics

__all__ = [
    "EncodedPairs",
    "Encoder",
    "EvaluationMatrix",
    "LabelTest",
    "LinearProbeTest",
    "RetrievalTest",
    "ZeroShotTest",
    "class_embeds",
    "encode_pairs",
    "linear_probe_accuracy",
    "load_tests",
    "per_class_top1",
    "retrieval_metrics",
    "retrieval_ranks",
    "zero_shot_metrics",
]
