"""The study of what is kept of knowledge whose pairs are not stored."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "study")]

import unstored  # noqa: E402
from cells import Cell  # noqa: E402
from measures import METRICS  # noqa: E402

from hf_modx.demo import DEMO_STREAMS  # noqa: E402
from hf_modx.files import read_json  # noqa: E402


def test_report_tells_the_base_from_the_phases():
    rows = [[0.6, 0.0, 0.1, 0.3], [0.4, 0.5, 0.1, 0.3], [0.2, 0.3, 0.7, 0.3]]
    results = {
        "matrix": dict.fromkeys(METRICS, rows),
        "phases": ["one", "two"],
        "tests": ["base", "one", "two", "union"],
        "learned_at": [None, 1, 2, "all"],
    }
    report = unstored.write_report([Cell("domain_alone", "er", 3, None, None, results, "finished")])
    assert "## domain, Image-to-text recall@1, %" in report
    assert "| er | 3 | 60.0 | 20.0 | 60.0 | 50.0 |" in report


@pytest.mark.slow
def test_runs_begin_with_the_base_and_are_not_given_its_pairs(tmp_path):
    command = ["--tiny", "--streams", "instance", "--recipes", "er", "--seeds", "0", "--use_cpu", "true"]
    try:
        assert unstored.main([*command, "--output_dir", str(tmp_path)]) == 0
        stream = DEMO_STREAMS["instance_alone"](0)
    finally:
        DEMO_STREAMS.pop("instance_alone", None)
    assert stream.base is None and set(stream.extra_tests) == {"part_0"}
    run = tmp_path / "instance_alone" / "er-seed0"
    known = read_json(tmp_path / "bases" / "instance" / "frozen-seed0" / "results.json")["matrix"]
    found = read_json(run / "results.json")
    place = found["tests"].index("part_0")
    assert found["learned_at"][place] is None
    assert [found["matrix"][name][0][place] for name in METRICS] == [known[name][0][0] for name in METRICS]
    assert read_json(run / "run.json")["identity"]["base"] is None
    assert "| er | 0 |" in (tmp_path / "unstored.md").read_text()
