"""The phase x test matrix against numbers worked out by hand and against ZSCL's definitions."""

import io
import json
import math

import numpy as np
import pandas
import pytest

from hf_modx.evaluation import EvaluationMatrix, mean_and_spread

PHASES = ["a", "b", "c"]
VALUES = [
    [0.1, 0.2, 0.3],
    [0.8, 0.3, 0.2],
    [0.6, 0.9, 0.4],
    [0.5, 0.7, 1.0],
]
BASE_COLUMN = [0.9, 0.95, 0.7, 0.6]
NEVER_COLUMN = [0.4, 0.5, 0.3, 0.2]


def with_columns(*columns):
    return [[*row, *(column[number] for column in columns)] for number, row in enumerate(VALUES)]


def assert_summary(matrix: EvaluationMatrix, **expected):
    summary = matrix.summary()
    for name, value in expected.items():
        assert summary[name] == (None if value is None else pytest.approx(value)), name


def test_summary_of_three_phases_with_an_initial_row():
    assert_summary(
        EvaluationMatrix(PHASES, PHASES, VALUES),
        average=5.4 / 9,
        last=2.2 / 3,
        backward_transfer=((0.5 - 0.8) + (0.7 - 0.9)) / 2,
        forgetting=((0.8 - 0.5) + (0.9 - 0.7)) / 2,
        transfer=(0.3 + (0.2 + 0.4) / 2) / 2,
        forward_transfer=(0.0 + (0.3 - 0.2) + (0.4 - 0.3)) / 3,
        zero_shot_retention=None,
    )


def test_summary_of_three_phases_without_an_initial_row():
    assert_summary(
        EvaluationMatrix(PHASES, PHASES, VALUES[1:], has_initial_row=False),
        average=5.4 / 9,
        last=2.2 / 3,
        backward_transfer=-0.25,
        forgetting=0.25,
        transfer=0.3,
        forward_transfer=None,
        zero_shot_retention=None,
    )


def test_summary_has_seven_names():
    summary = EvaluationMatrix(PHASES, PHASES, VALUES).summary()
    fixed = {"average", "last", "backward_transfer", "forgetting", "transfer"}
    assert set(summary) == fixed | {"forward_transfer", "zero_shot_retention"}


def test_forgetting_is_measured_from_the_best_phase_since_learning():
    values = [[0.0], [0.5], [0.9], [0.4]]
    assert_summary(
        EvaluationMatrix(PHASES, ["t"], values, learned_at=[1]), forgetting=0.9 - 0.4, backward_transfer=0.4 - 0.5
    )


def test_a_test_that_improved_has_negative_forgetting():
    values = [[0.0], [0.5], [0.6], [0.9]]
    assert_summary(EvaluationMatrix(PHASES, ["t"], values, learned_at=[1]), forgetting=0.6 - 0.9)


def test_rows_before_learning_do_not_enter_forgetting():
    values = [[0.9], [0.9], [0.5], [0.4]]
    assert_summary(EvaluationMatrix(PHASES, ["t"], values, learned_at=[2]), forgetting=0.5 - 0.4)


def test_the_last_phases_test_can_be_neither_forgotten_nor_transferred_back():
    values = [[0.0], [0.1], [0.2], [0.8]]
    assert_summary(
        EvaluationMatrix(PHASES, ["t"], values, learned_at=[3]), forgetting=None, backward_transfer=None, transfer=0.15
    )


def test_several_tests_a_phase_count_each():
    # Tests t and u are both taught by phase 1, v by phase 2, none by phase 3.
    matrix = EvaluationMatrix(PHASES, ["t", "u", "v"], VALUES, learned_at=[1, 1, 2])
    assert_summary(
        matrix,
        backward_transfer=((0.5 - 0.8) + (0.7 - 0.3) + (1.0 - 0.4)) / 3,
        forgetting=((0.8 - 0.5) + (0.9 - 0.7) + (0.4 - 1.0)) / 3,
        transfer=0.2,
        forward_transfer=(0.0 + 0.0 + (0.2 - 0.3)) / 3,
    )


def test_a_test_that_the_base_taught_is_forgotten_from_the_initial_row_on():
    matrix = EvaluationMatrix(PHASES, ["a", "b", "c", "base"], with_columns(BASE_COLUMN), learned_at=[1, 2, 3, 0])
    assert_summary(
        matrix,
        backward_transfer=((0.5 - 0.8) + (0.7 - 0.9) + (0.6 - 0.9)) / 3,
        forgetting=(0.3 + 0.2 + (0.95 - 0.6)) / 3,
        transfer=0.3,  # it has no rows before it was learned
        forward_transfer=0.2 / 3,  # no phase teaches it
        zero_shot_retention=0.6 / 0.9,
    )


def test_a_test_that_is_never_taught_is_transfer_in_every_row():
    matrix = EvaluationMatrix(PHASES, ["a", "b", "c", "never"], with_columns(NEVER_COLUMN), learned_at=[1, 2, 3, None])
    assert_summary(
        matrix,
        backward_transfer=-0.25,
        forgetting=0.25,
        transfer=(0.3 + 0.3 + (0.5 + 0.3 + 0.2) / 3) / 3,
        zero_shot_retention=0.2 / 0.4,
    )


def test_zero_shot_retention_is_the_mean_over_base_and_never_taught_tests():
    values = with_columns(BASE_COLUMN, NEVER_COLUMN)
    matrix = EvaluationMatrix(PHASES, ["a", "b", "c", "base", "never"], values, learned_at=[1, 2, 3, 0, None])
    assert_summary(matrix, zero_shot_retention=(0.6 / 0.9 + 0.2 / 0.4) / 2)


def test_union_of_tests_is_in_no_number():
    alone = EvaluationMatrix(
        ["a", "b"], ["base", "a", "b"], [[0.5, 0.1, 0], [0.4, 0.8, 0.1], [0.2, 0.6, 0.9]], [0, 1, 2]
    )
    values = [[*row, union] for row, union in zip(alone.to_lists(), (0.1, 0.2, 0.9), strict=True)]
    with_union = EvaluationMatrix(["a", "b"], [*alone.tests, "union"], values, [*alone.learned_at, "all"])
    assert with_union.summary() == alone.summary()
    assert EvaluationMatrix.from_json(with_union.to_json()).learned_at == [0, 1, 2, "all"]


def test_zero_shot_retention_leaves_out_what_started_at_zero():
    values = [[0.0, 0.4], [0.1, 0.3]]
    matrix = EvaluationMatrix(["a"], ["t", "u"], values, learned_at=[None, None])
    assert_summary(matrix, zero_shot_retention=0.3 / 0.4)


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_cells_that_were_not_measured_enter_no_mean(nothing):
    values = [[0.1, nothing, 0.3], [0.8, 0.3, nothing], [nothing, 0.9, 0.4], [0.5, 0.7, nothing]]
    assert_summary(
        EvaluationMatrix(PHASES, PHASES, values),
        average=(0.8 + 0.3 + 0.9 + 0.4 + 0.5 + 0.7) / 6,
        last=(0.5 + 0.7) / 2,
        backward_transfer=((0.5 - 0.8) + (0.7 - 0.9)) / 2,
        forgetting=((0.8 - 0.5) + (0.9 - 0.7)) / 2,
        transfer=(0.3 + 0.4) / 2,
        forward_transfer=(0.0 + (0.4 - 0.3)) / 2,
    )


def test_a_matrix_of_nothing_has_no_numbers():
    matrix = EvaluationMatrix(PHASES, PHASES, [[None] * 3] * 4)
    assert set(matrix.summary().values()) == {None}


def test_one_phase_has_an_average_but_nothing_to_forget():
    matrix = EvaluationMatrix(["a"], ["a"], [[0.2], [0.7]])
    assert_summary(matrix, average=0.7, last=0.7, backward_transfer=None, forgetting=None, transfer=None)


@pytest.mark.parametrize("has_initial_row", [True, False])
def test_eleven_tasks_give_the_numbers_of_mtil(has_initial_row):
    tasks = 11
    accuracy = np.random.default_rng(0).uniform(size=(tasks, tasks))  # A[j, i], both from 0 as in ZSCL
    transfer = np.mean([np.mean([accuracy[j, i] for j in range(i)]) for i in range(1, tasks)])
    names = [f"task {i}" for i in range(tasks)]
    zero_shot = [[0.5] * tasks] if has_initial_row else []
    matrix = EvaluationMatrix(names, names, [*zero_shot, *accuracy.tolist()], has_initial_row=has_initial_row)
    assert_summary(matrix, transfer=transfer, average=accuracy.mean(), last=accuracy[-1].mean())


def test_summary_is_plain_json():
    assert json.loads(json.dumps(EvaluationMatrix(PHASES, PHASES, VALUES).summary(), allow_nan=False))


def test_at_counts_phases_from_the_initial_row():
    matrix = EvaluationMatrix(PHASES, PHASES, VALUES)
    assert (matrix.at(0, 1), matrix.at(3, 2)) == (0.2, 1.0)


def test_at_has_no_phase_zero_without_an_initial_row():
    matrix = EvaluationMatrix(PHASES, PHASES, VALUES[1:], has_initial_row=False)
    assert math.isnan(matrix.at(0, 1))
    assert matrix.at(1, 1) == 0.3


@pytest.mark.parametrize(
    ("values", "has_initial_row"),
    [(VALUES[1:], True), (VALUES, False), ([row[:2] for row in VALUES], True), ([[0.1], [0.2, 0.3]], True)],
    ids=["row missing", "row too many", "column missing", "ragged"],
)
def test_values_of_another_shape_are_refused(values, has_initial_row):
    with pytest.raises(ValueError):
        EvaluationMatrix(PHASES, PHASES, values, has_initial_row=has_initial_row)


def test_shape_error_tells_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 3\), got \(3, 3\)"):
        EvaluationMatrix(PHASES, PHASES, VALUES[1:])


def test_other_numbers_of_tests_need_learned_at():
    with pytest.raises(ValueError, match="say in learned_at"):
        EvaluationMatrix(PHASES, [*PHASES, "d"], with_columns(NEVER_COLUMN))


def test_learned_at_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 entries for 3 tests"):
        EvaluationMatrix(PHASES, PHASES, VALUES, learned_at=[1, 2])


@pytest.mark.parametrize("phase", [-1, 4, "b"])
def test_learned_at_of_a_phase_that_does_not_exist_is_refused(phase):
    with pytest.raises(ValueError, match="'b'"):
        EvaluationMatrix(PHASES, PHASES, VALUES, learned_at=[1, phase, 3])


def test_lists_make_the_same_matrix_again():
    values = [[0.1, None, 0.3], *VALUES[1:]]
    matrix = EvaluationMatrix(PHASES, PHASES, values)
    lists = json.loads(json.dumps(matrix.to_lists(), allow_nan=False))
    assert lists == values
    assert EvaluationMatrix(PHASES, PHASES, lists).summary() == matrix.summary()


def test_tests_that_lack_the_metric_can_be_left_out():
    matrix = EvaluationMatrix(["x"], ["a", "b", "c"], [[0.1, None, 0.2], [0.3, None, None]], [0, 1, 1]).measured()
    assert (matrix.tests, matrix.learned_at) == (["a", "c"], [0, 1])
    assert matrix.to_lists() == [[0.1, 0.2], [0.3, None]]
    nothing = EvaluationMatrix(["x"], ["a"], [[None], [None]], [1])
    assert nothing.measured().tests == ["a"]


def test_markdown_table():
    matrix = EvaluationMatrix(
        ["a", "b"], ["a", "b", "base"], [[0.1, 0.2, 0.9], [0.8, None, 0.75], [0.5, 1.0, 0]], [1, 2, 0]
    )
    assert matrix.to_markdown().splitlines() == [
        "| after | a | b | base |",
        "|---|---|---|---|",
        "| start | 10.0 | 20.0 | **90.0** |",
        "| a | **80.0** | - | 75.0 |",
        "| b | 50.0 | **100.0** | 0.0 |",
    ]


def test_markdown_table_without_an_initial_row_in_fractions():
    matrix = EvaluationMatrix(["a", "b"], ["a", "b"], [[0.8, 0.3], [0.5, 1.0]], has_initial_row=False)
    assert matrix.to_markdown(percent=False).splitlines()[2:] == [
        "| a | **0.8000** | 0.3000 |",
        "| b | 0.5000 | **1.0000** |",
    ]


def test_markdown_names_cannot_break_the_table():
    matrix = EvaluationMatrix(["a|b\nc"], ["t|u"], [[0.1], [0.2]])
    header, _, _, row = matrix.to_markdown().splitlines()
    assert header == "| after | t\\|u |"
    assert row == "| a\\|b c | **20.0** |"


def named_matrix(has_initial_row=True):
    names = ['style, "new"', "b_2 & 50%"]
    values = [[0.1, None], [0.8, 1 / 3], [0.5, 1.0]][not has_initial_row :]
    return EvaluationMatrix(names, [*names], values, [1, None], has_initial_row)


@pytest.mark.parametrize("has_initial_row", [True, False])
@pytest.mark.parametrize("way", ["json", "csv", "dataframe", "dict"])
def test_what_is_written_is_read_again(way, has_initial_row):
    matrix = named_matrix(has_initial_row)
    written = getattr(matrix, f"to_{way}")()
    if way == "dataframe":
        assert isinstance(written, pandas.DataFrame) and list(written.index)[-1] == matrix.phases[-1]
    knows_all = way in ("json", "dict")
    options = {} if knows_all else {"learned_at": [1, None], "has_initial_row": has_initial_row}
    assert getattr(EvaluationMatrix, f"from_{way}")(written, **options).to_dict() == matrix.to_dict()


def test_frame_begins_with_the_start_unless_told_otherwise():
    matrix = named_matrix()
    assert EvaluationMatrix.from_dataframe(matrix.to_dataframe(), [1, None]).to_dict() == matrix.to_dict()


def test_empty_lines_of_a_csv_are_no_rows():
    written = named_matrix().to_csv() + "\n"
    assert EvaluationMatrix.from_csv(written, [1, None]).to_dict() == named_matrix().to_dict()


def test_csv_is_read_by_pandas():
    frame = pandas.read_csv(io.StringIO(named_matrix().to_csv()), index_col="after")
    assert frame.equals(named_matrix().to_dataframe())


def test_dictionary_with_other_keys_is_refused():
    with pytest.raises(ValueError, match="A matrix has the keys"):
        EvaluationMatrix.from_dict({"phases": ["a"], "values": [[1.0]]})


def test_results_of_a_run_give_the_matrix_of_a_metric():
    results = {"phases": ["a"], "tests": ["a", "b"], "learned_at": [1, None], "matrix": {"top": [[0, 1], [1, None]]}}
    matrix = EvaluationMatrix.from_results(results, "top")
    assert (matrix.to_lists(), matrix.learned_at) == ([[0, 1], [1, None]], [1, None])
    with pytest.raises(ValueError, match="no metric 'recall'. The metrics are: top"):
        EvaluationMatrix.from_results(results, "recall")


def test_latex_table_escapes_names():
    assert named_matrix().to_latex().splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"""after & style, "new" & b\_2 \& 50\% \\""",
        r"\midrule",
        r"start & 10.0 & -- \\",
        r"""style, "new" & \textbf{80.0} & 33.3 \\""",
        r"b\_2 \& 50\% & 50.0 & 100.0 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_mean_and_spread_over_seeds():
    seeds = [EvaluationMatrix(["a", "b"], ["a"], [[None], [x], [y]], [1]) for x, y in ((0.6, 0.2), (0.8, 0.5))]
    over = mean_and_spread([*seeds, EvaluationMatrix(["a", "b"], ["a"], [[0.1], [1.0], [None]], [1])])
    assert over.mean.values[:, 0].tolist() == pytest.approx([0.1, 0.8, 0.35])
    assert over.spread.values[:, 0].tolist() == pytest.approx([math.nan, 0.2, 0.3 / math.sqrt(2)], nan_ok=True)
    # The third seed was not measured in the end; forgetting is 0.4 and 0.3 in the others.
    assert over.summary["forgetting"] == pytest.approx((0.35, 0.1 / math.sqrt(2)))
    assert over.summary["zero_shot_retention"] == (None, None)


def test_mean_of_one_seed_has_no_spread():
    over = mean_and_spread([EvaluationMatrix(PHASES, PHASES, VALUES)])
    assert over.mean.to_lists() == VALUES and np.isnan(over.spread.values).all()
    assert over.summary["last"] == (pytest.approx(2.2 / 3), None)


def test_matrices_of_different_streams_have_no_mean():
    with pytest.raises(ValueError, match="different phases"):
        mean_and_spread([EvaluationMatrix(["a"], ["t"], [[0], [1]]), EvaluationMatrix(["b"], ["t"], [[0], [1]])])
    with pytest.raises(ValueError, match="no matrix"):
        mean_and_spread([])


def test_zero_shot_clip_gives_the_numbers_printed_in_the_paper_for_mtil():
    # Zheng et al. (ICCV 2023), zero-shot rows of the tables of order I and II, by task; no phase changes them.
    accuracy = {
        "Aircraft": 24.3, "Caltech101": 88.4, "CIFAR100": 68.2, "DTD": 44.6, "EuroSAT": 54.9, "Flowers": 71.0,
        "Food": 88.5, "MNIST": 59.4, "OxfordPet": 89.0, "StanfordCars": 64.7, "SUN397": 65.2,
    }  # fmt: skip
    second = ["StanfordCars", "Food", "MNIST", "OxfordPet", "Flowers", "SUN397", "Aircraft", "Caltech101", "DTD",
              "EuroSAT", "CIFAR100"]  # fmt: skip
    for order, transfer in ((list(accuracy), 69.4), (second, 65.4)):
        row = [accuracy[task] for task in order]
        summary = EvaluationMatrix(order, order, [row] * 11, has_initial_row=False).summary()
        found = [summary[name] for name in ("transfer", "average", "last")]
        assert found == pytest.approx([transfer, 65.3, 65.3], abs=0.1)
