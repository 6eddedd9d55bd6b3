"""Evaluation: retrieval, zero-shot classification, linear probes, and the phase x test matrix."""

from .cross_phase import cross_phase_metrics, fit_alignments, index_recalls
from .disorder import SpatialDisorder, imav, spatial_disorder
from .encoding import EncodedPairs, Encoder, encode_pairs
from .linear_probe import linear_probe_accuracy
from .matrix import EvaluationMatrix
from .retrieval import retrieval_metrics, retrieval_ranks
from .seeds import OverSeeds, mean_and_spread
from .suite import EvaluationTest, LabelTest, LinearProbeTest, RetrievalTest, ZeroShotTest, load_tests
from .zero_shot import class_embeds, per_class_top1, zero_shot_metrics

__all__ = [
    "EncodedPairs",
    "Encoder",
    "EvaluationMatrix",
    "EvaluationTest",
    "LabelTest",
    "LinearProbeTest",
    "OverSeeds",
    "RetrievalTest",
    "SpatialDisorder",
    "ZeroShotTest",
    "class_embeds",
    "cross_phase_metrics",
    "encode_pairs",
    "fit_alignments",
    "imav",
    "index_recalls",
    "linear_probe_accuracy",
    "load_tests",
    "mean_and_spread",
    "per_class_top1",
    "retrieval_metrics",
    "retrieval_ranks",
    "spatial_disorder",
    "zero_shot_metrics",
]
