"""Reports that compare runs: tables, pictures, and one HTML page."""

from .flips import FlippedTest, find_tests, flipped_tests
from .runs import RecordedRun, group_runs, read_run
from .tables import Comparison, compare
from .writing import default_metrics, write_report

__all__ = [
    "Comparison",
    "FlippedTest",
    "RecordedRun",
    "compare",
    "default_metrics",
    "find_tests",
    "flipped_tests",
    "group_runs",
    "read_run",
    "write_report",
]
