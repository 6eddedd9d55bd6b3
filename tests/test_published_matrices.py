"""The script that compares published matrices with what is printed of them, on files of the same layout."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import published_matrices as script


@pytest.fixture
def clone(tmp_path):
    """Files in which every task has the printed Transfer before its phase, and after it two values that make Avg and
    Last; `add` comes on top of all accuracies."""

    def clone(add=0.0):
        folder = tmp_path / "mtil" / "results"
        folder.mkdir(parents=True)
        for name, (_, transfer, average, last) in script.PRINTED.items():
            order = script.ORDERS[name.split("_")[0]]
            ordered = np.full((11, 11), np.nan)
            ordered[np.triu_indices(11, 1)] = transfer
            ordered[-1] = last
            learned = np.isnan(ordered)
            ordered[learned] = (121 * average - np.nansum(ordered)) / learned.sum()
            accuracies = np.empty((11, 11))
            accuracies[np.ix_(order, order)] = ordered + add
            np.save(folder / f"{name}.npy", np.insert(accuracies, script.CIFAR10, -1000, axis=1).ravel())
        return tmp_path

    return clone


def test_matrices_that_fit_their_printed_numbers_pass(clone, capsys):
    assert script.main([str(clone())]) == 0
    printed = capsys.readouterr().out
    assert "| ZSCL, order I | 68.10 (68.1) | 75.40 (75.4) | 83.60 (83.6) |" in printed
    assert "Largest difference 0.000" in printed


def test_a_difference_above_a_tenth_is_an_error(clone, capsys):
    assert script.main([str(clone(add=0.11))]) == 1
    assert "Largest difference 0.110" in capsys.readouterr().out


def test_what_is_no_clone_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path)])
    assert "does not hold t3_1.npy" in capsys.readouterr().err
