"""Image-caption pairs, from wherever they are stored to batches of tensors."""

from .pairs import (
    PairCollator,
    PairDataset,
    as_captions,
    check_columns,
    check_pair_ids,
    check_processor,
    refuse_unknown_pair_ids,
)

__all__ = [
    "PairCollator",
    "PairDataset",
    "as_captions",
    "check_columns",
    "check_pair_ids",
    "check_processor",
    "refuse_unknown_pair_ids",
]
