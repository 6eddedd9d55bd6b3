"""Reports that compare runs: tables, pictures, and one HTML page."""

from .classes import LostClasses, lost_classes
from .flips import FlippedTest, find_tests, flipped_tests
from .runs import RecordedRun, group_runs, read_run
from .tables import Comparison, compare
from .writing import default_metrics, write_report

__all__ = [
    "Comparison",
    "FlippedTest",
    "LostClasses",
    "RecordedRun",
    "compare",
    "default_metrics",
    "find_tests",
    "flipped_tests",
    "group_runs",
    "lost_classes",
    "read_run",
    "write_report",
]
