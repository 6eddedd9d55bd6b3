"""What to expect of a model on new data, before anything is trained: measures, costs, and advice drawn from them."""

from .advice import Advice, advise
from .cost import Cost, measure_cost
from .measures import Assessment, Duplicates, Shift, assess, rows_kept

__all__ = [
    "Advice",
    "Assessment",
    "Cost",
    "Duplicates",
    "Shift",
    "advise",
    "assess",
    "measure_cost",
    "rows_kept",
]
