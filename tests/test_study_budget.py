"""The tables of the studies of the budget and of alpha over batch sizes."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "examples" / "study")]

import batch_size  # noqa: E402
import budget  # noqa: E402
from cells import Cell  # noqa: E402
from measures import METRICS  # noqa: E402


def cell(recipe, seed, matrix, retention):
    training = [{"steps": steps, **({"retention": found} if found else {})} for steps, found in retention]
    results = {
        "phases": ["a", "b"],
        "tests": ["base", "a", "b"],
        "learned_at": [0, 1, 2],
        "matrix": dict.fromkeys(METRICS, matrix),
        "training": training,
    }
    return Cell("domain", recipe, seed, None, Path("nowhere"), results, "finished")


FORGETS = [[0.5, 0.0, 0.0], [0.25, 0.4, 0.0], [0.2, 0.3, 0.4]]
KEEPS = [[0.5, 0.0, 0.0], [0.4, 0.3, 0.0], [0.4, 0.3, 0.2]]


def test_losses_are_of_the_tests_taught_before_the_phase():
    assert budget.losses(cell("finetune", 0, FORGETS, []).results) == pytest.approx([0.5, 1 - 0.5 / 0.65])
    assert budget.losses(cell("finetune", 0, KEEPS, []).results) == pytest.approx([0.2, 0.0])


def test_losses_leave_the_union_of_all_tests_out():
    results = cell("finetune", 0, [[*row, 0.1] for row in FORGETS], []).results
    results = {**results, "tests": [*results["tests"], "union"], "learned_at": [*results["learned_at"], "all"]}
    assert budget.losses(results) == pytest.approx([0.5, 1 - 0.5 / 0.65])


def test_table_of_the_budget_counts_phases_steps_and_evaluations():
    held = [(60, {"evaluations": 17, "weight": 0.5}), (30, {"evaluations": 5, "restored_step": 24})]
    table = budget.budget_table([cell("finetune", 0, FORGETS, [(60, None)] * 2), cell("held", 0, KEEPS, held)])
    assert "| finetune | 0 of 2 | 50.0 | 40.0 | 30.0 | 120 | 0 | step 60 / step 60 |" in table
    assert "| held | 2 of 2 | 20.0 | 25.0 | 30.0 | 90 | 22 | 0.50 / step 24 |" in table


def test_table_of_batch_sizes_has_difference_and_spread():
    matrices = {"modx-b128": KEEPS, "modx-b256": KEEPS, "modx-b512": FORGETS}
    cells = [cell(recipe, seed, matrix, [(1, None)] * 2) for recipe, matrix in matrices.items() for seed in (0, 1)]
    table = batch_size.batch_tables(cells)
    # forgetting: the best of the old tests less the last row, (0.5 - 0.4 + 0.3 - 0.3) / 2 and (0.5 - 0.2 + 0.1) / 2
    assert "| plain alpha | forgetting | 5.0 ± 0.0 | 5.0 ± 0.0 | 20.0 ± 0.0 | 15.0 | 0.0 |" in table
    assert "reference" not in table  # its runs are not finished


def test_batch_sizes_are_compared_over_the_seeds_that_all_of_them_have():
    cells = [cell(recipe, 2, KEEPS, [(1, None)] * 2) for recipe in ("modx-p64", "modx-p256", "modx-p1024")]
    further = cell("modx-p64", 3, FORGETS, [(1, None)] * 2)  # as that of another comparison
    table = batch_size.batch_tables([*cells, further])
    assert "| plain alpha | plasticity | 25.0 | 25.0 | 25.0 | 0.0 |" in table
    only_others = [cell("modx-p64", 3, FORGETS, [(1, None)] * 2), *cells[1:]]
    assert batch_size.batch_tables(only_others) == ""


def test_batches_with_as_many_pairs_have_a_table_of_their_own():
    matrices = {"modx-p64": KEEPS, "modx-ref64-p256": KEEPS, "modx-ref64-p1024": FORGETS}
    table = batch_size.batch_tables([cell(recipe, 2, matrix, [(1, None)] * 2) for recipe, matrix in matrices.items()])
    assert "| alpha | in percent | batch 64 | batch 256 | batch 1,024 | apart |" in table
    assert "64 | plasticity | 25.0 | 25.0 | 40.0 | 15.0 |" in table
    assert "plain alpha" not in table and "512" not in table  # their runs are not finished
