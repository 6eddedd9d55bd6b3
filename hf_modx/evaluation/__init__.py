"""Evaluation: retrieval, and the phase x test matrix."""

from .encoding import EncodedPairs, encode_pairs
from .matrix import EvaluationMatrix
from .retrieval import retrieval_metrics, retrieval_ranks

__all__ = ["EncodedPairs", "EvaluationMatrix", "encode_pairs", "retrieval_metrics", "retrieval_ranks"]
