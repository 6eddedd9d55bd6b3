"""Reports that compare runs: tables, pictures, and one HTML page."""

from .flips import FlippedTest, flipped_tests, tests_of_run
from .runs import RecordedRun, group_runs, read_run
from .tables import Comparison, compare
from .writing import default_metrics, write_report

__all__ = [
    "Comparison",
    "FlippedTest",
    "RecordedRun",
    "compare",
    "default_metrics",
    "flipped_tests",
    "group_runs",
    "read_run",
    "tests_of_run",
    "write_report",
]
