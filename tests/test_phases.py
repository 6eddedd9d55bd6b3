"""Streams: which rows go into which phase, and what is refused."""

import datetime

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_from_disk
from PIL import Image

from hf_modx import Phase, PhaseStream
from hf_modx.phases import content_fingerprint
from hf_modx.protocols.parts import parts_of


def table(rows: int, start: int = 0, **columns) -> Dataset:
    return Dataset.from_dict({"n": list(range(start, start + rows)), **columns})


def rows_of(part: Dataset) -> list[int]:
    return list(part["n"])


def all_rows(stream: PhaseStream) -> list[int]:
    return [row for phase in stream for part in (phase.train, phase.test) if part is not None for row in rows_of(part)]


@pytest.fixture
def splits() -> DatasetDict:
    return DatasetDict(
        winter_train=table(6, 0),
        winter_test=table(2, 10),
        autumn_train=table(5, 20),
        autumn_test=table(3, 30),
        other_test=table(4, 40),
    )


# --- from_splits -----------------------------------------------------------------------------------------------------


def test_named_pairs_are_phases_in_the_order_stored(splits):
    stream = PhaseStream.from_splits(splits)
    assert [phase.name for phase in stream] == ["winter", "autumn"]
    assert len(stream) == 2
    assert rows_of(stream.phases[1].train) == list(range(20, 25))
    assert rows_of(stream.phases[1].test) == list(range(30, 33))


def test_a_test_split_without_training_split_is_a_test_that_no_phase_teaches(splits):
    stream = PhaseStream.from_splits(splits)
    assert list(stream.extra_tests) == ["other"]
    dataset, learned_at = stream.tests()["other"]
    assert (len(dataset), learned_at) == (4, None)


def test_a_training_split_without_test_split_is_a_phase_without_test():
    stream = PhaseStream.from_splits(DatasetDict(a_train=table(4), b_train=table(4, 4), b_test=table(2, 8)))
    assert stream.phases[0].test is None
    assert list(stream.tests()) == ["b"]


def test_a_training_split_without_test_split_holds_the_fraction_out():
    stream = PhaseStream.from_splits(DatasetDict(a_train=table(10)), test_fraction=0.2)
    assert (len(stream.phases[0].train), len(stream.phases[0].test)) == (8, 2)


def test_a_plain_mapping_of_tables_is_enough(splits):
    assert len(PhaseStream.from_splits(dict(splits))) == 2


def test_splits_without_any_training_name_are_refused():
    with pytest.raises(ValueError, match=r"No split is named \.\.\._train\. The splits are: train, test"):
        PhaseStream.from_splits(DatasetDict(train=table(4), test=table(2, 4)))


def test_explicit_splits_are_phases_in_the_order_given(splits):
    stream = PhaseStream.from_splits(
        splits, ["autumn_train", "winter_train"], test_splits=["autumn_test", "winter_test"]
    )
    assert [phase.name for phase in stream] == ["autumn_train", "winter_train"]
    assert rows_of(stream.phases[0].train) == list(range(20, 25))
    assert rows_of(stream.phases[1].test) == [10, 11]
    assert stream.extra_tests == {}


def test_explicit_splits_without_tests_hold_the_fraction_out(splits):
    stream = PhaseStream.from_splits(splits, ["winter_train"], test_fraction=0.5)
    assert sorted(all_rows(stream)) == list(range(6))
    assert len(stream.phases[0].test) == 3


def test_a_split_used_twice_is_refused(splits):
    with pytest.raises(ValueError, match="The splits winter_train are used more than once"):
        PhaseStream.from_splits(splits, ["winter_train", "autumn_train", "winter_train"])


def test_a_split_used_for_training_and_test_is_refused(splits):
    with pytest.raises(ValueError, match="more than once"):
        PhaseStream.from_splits(splits, ["winter_train"], test_splits=["winter_train"])


@pytest.mark.parametrize("arguments", [(["summer_train"],), (["winter_train"], ["summer_train"])])
def test_an_unknown_split_is_named_with_those_that_there_are(splits, arguments):
    with pytest.raises(ValueError, match=r"no split summer_train\. The splits are: winter_train, winter_test, autumn"):
        PhaseStream.from_splits(splits, *arguments)


def test_another_number_of_test_splits_is_refused(splits):
    with pytest.raises(ValueError, match="2 phase splits need as many test splits, got 1"):
        PhaseStream.from_splits(splits, ["winter_train", "autumn_train"], test_splits=["other_test"])


def test_test_splits_without_phase_splits_are_refused(splits):
    with pytest.raises(ValueError, match="test_splits need phase_splits"):
        PhaseStream.from_splits(splits, test_splits=["winter_test"])


# --- from_column -----------------------------------------------------------------------------------------------------

STYLES = ["b", "a", "b", "c", "a", "b"]


def test_a_phase_for_each_value_in_the_order_of_first_appearance():
    stream = PhaseStream.from_column(table(6, style=STYLES), "style", test_fraction=0)
    assert {phase.name: rows_of(phase.train) for phase in stream} == {"b": [0, 2, 5], "a": [1, 4], "c": [3]}
    assert [phase.name for phase in stream] == ["b", "a", "c"]
    assert [phase.test for phase in stream] == [None] * 3


def test_the_order_given_chooses_values_and_their_order():
    stream = PhaseStream.from_column(table(6, style=STYLES), "style", order=["c", "b"], test_fraction=0)
    assert [phase.name for phase in stream] == ["c", "b"]
    assert all_rows(stream) == [3, 0, 2, 5]


def test_integer_values_name_phases():
    stream = PhaseStream.from_column(table(4, month=[7, 7, 3, 3]), "month", test_fraction=0)
    assert [phase.name for phase in stream] == ["7", "3"]


def test_each_phase_holds_its_own_share_out():
    stream = PhaseStream.from_column(table(40, style=["a", "b"] * 20), "style", test_fraction=0.25)
    assert [(len(phase.train), len(phase.test)) for phase in stream] == [(15, 5), (15, 5)]
    assert all(row % 2 == 0 for part in (stream.phases[0].train, stream.phases[0].test) for row in rows_of(part))


def test_a_value_that_never_occurs_is_refused():
    with pytest.raises(ValueError, match="Column 'style' never holds 'd'"):
        PhaseStream.from_column(table(6, style=STYLES), "style", order=["a", "d"])


def test_a_value_named_twice_is_refused():
    with pytest.raises(ValueError, match="'a' stand for more than one"):
        PhaseStream.from_column(table(6, style=STYLES), "style", order=["a", "b", "a"], test_fraction=0)


@pytest.mark.parametrize("make", [PhaseStream.from_column, lambda *a: PhaseStream.from_time(*a, 2)])
def test_nulls_are_refused_with_the_first_row(make):
    with pytest.raises(ValueError, match=r"'style' has nulls \(first in row 2\)"):
        make(table(4, style=["a", "b", None, None]), "style")


@pytest.mark.parametrize(
    "make",
    [
        PhaseStream.from_column,
        lambda *a: PhaseStream.from_time(*a, 2),
        lambda data, column: parts_of({"group_column": column}, data, None),
    ],
)
def test_class_that_is_missing_is_refused_with_the_number_of_rows_and_the_remedy(make):
    data = table(5, style=[0, 1, -1, 0, -1]).cast_column("style", ClassLabel(names=["a", "b"]))
    with pytest.raises(ValueError, match=r"'style' has no class \(-1\) in 2 of 5 rows \(first in row 2\).*filter\("):
        make(data, "style")


@pytest.mark.parametrize(
    ("months", "is_told"),
    [
        (["2024-02", "2024-01", "2024-02"], True),
        ([datetime.date(2024, 2, 1), datetime.date(2024, 1, 1), datetime.date(2024, 1, 1)], True),
        (["2024-01", "2024-02", "2024-02"], False),
        (["winter", "autumn", "winter"], False),
        ([7, 3, 7], False),
    ],
)
def test_months_that_do_not_come_in_the_order_of_time_are_told(caplog, months, is_told):
    PhaseStream.from_column(table(3, month=months), "month", test_fraction=0)
    assert ("not that of time: 2024-02" in caplog.text) == is_told
    PhaseStream.from_column(table(3, month=months), "month", order=list(dict.fromkeys(months)), test_fraction=0)
    assert caplog.text.count("not that of time") == is_told


@pytest.mark.parametrize("make", [PhaseStream.from_column, lambda *a: PhaseStream.from_time(*a, 2)])
def test_a_column_of_lists_is_refused(make):
    with pytest.raises(ValueError, match="'styles' holds List.*one text or number"):
        make(table(2, styles=[["a"], ["a", "b"]]), "styles")


@pytest.mark.parametrize("make", [PhaseStream.from_column, lambda *a: PhaseStream.from_time(*a, 2)])
def test_a_missing_column_is_named_with_those_that_there_are(make):
    with pytest.raises(ValueError, match=r"no column 'stile'\. Did you mean 'style'\? The columns are: n, style"):
        make(table(6, style=STYLES), "stile")


@pytest.mark.parametrize("make", [PhaseStream.from_column, lambda *a: PhaseStream.from_time(*a, 2)])
def test_nan_is_no_value_of_a_phase(make):
    with pytest.raises(ValueError, match=r"'year' has nulls \(first in row 1\)"):
        make(table(4, year=[2023.0, float("nan"), 2024.0, 2024.0]), "year")


@pytest.mark.parametrize(
    "make",
    [
        lambda data: PhaseStream.from_column(data, "n"),
        lambda data: PhaseStream.from_time(data, "n", 2),
        lambda data: PhaseStream.random(data, 2),
    ],
    ids=["column", "time", "random"],
)
def test_splits_and_streamed_data_are_refused_with_the_remedy(make, splits):
    for data in (splits, table(4).to_iterable_dataset()):
        with pytest.raises(TypeError, match=r"got (Iterable)?Dataset.*Pass one split, not streamed"):
            make(data)


# --- from_time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times",
    [
        [30, 10, 20, 60, 50, 40],
        [0.3, -1.0, 0.2, 6.5, 5.0, 4.0],
        ["2024-03", "2024-01", "2024-02", "2024-06", "2024-05", "2024-04"],
        [datetime.datetime(2024, month, 1) for month in (3, 1, 2, 6, 5, 4)],
        [datetime.date(2024, month, 1) for month in (3, 1, 2, 6, 5, 4)],
        [datetime.datetime(2024, month, 1, tzinfo=datetime.timezone.utc) for month in (3, 1, 2, 6, 5, 4)],
    ],
    ids=["integers", "floats", "strings", "datetimes", "dates", "datetimes with zone"],
)
def test_time_order_cut_into_equal_parts(times):
    stream = PhaseStream.from_time(table(6, when=times), "when", 3, test_fraction=0)
    assert [rows_of(phase.train) for phase in stream] == [[1, 2], [0, 5], [4, 3]]
    assert [phase.name for phase in stream] == ["phase_1", "phase_2", "phase_3"]


@pytest.mark.parametrize(
    "times", [["2024-01", "2024-01-31", "2024"], ["20240131", "20231231"], ["01", "12"], ["2024-01-31T10:00:00"] * 2]
)
def test_texts_that_sort_as_dates_or_numbers_are_times(times):
    stream = PhaseStream.from_time(table(len(times), when=times), "when", 1, test_fraction=0)
    assert list(stream.phases[0].train["when"]) == sorted(times)


@pytest.mark.parametrize(
    "times", [["12/31/2023", "01/31/2024"], ["9", "10"], ["2024-9-1", "2024-10-1"], ["2024 May", "2024 Apr"], ["may"]]
)
def test_texts_whose_alphabetical_order_is_not_that_of_time_are_refused(times):
    with pytest.raises(ValueError, match=f"'when' holds texts such as '{times[0]}'.*Write dates as 2024-01-31"):
        PhaseStream.from_time(table(len(times), when=times), "when", 1)


def test_rows_of_one_time_stay_in_the_order_stored():
    stream = PhaseStream.from_time(table(40, when=[1] * 20 + [0] * 20), "when", 2, test_fraction=0)
    assert all_rows(stream) == [*range(20, 40), *range(20)]


def test_time_phases_hold_out_inside_their_portion():
    stream = PhaseStream.from_time(table(20, when=list(range(20))), "when", 2, test_fraction=0.2)
    assert sorted(rows_of(stream.phases[0].train) + rows_of(stream.phases[0].test)) == list(range(10))


# --- random ----------------------------------------------------------------------------------------------------------


def test_random_parts_are_equal_disjoint_and_complete():
    stream = PhaseStream.random(table(103), 5, seed=0)
    sizes = [len(phase.train) + len(phase.test) for phase in stream]
    assert sizes == [21, 21, 21, 20, 20]
    assert sorted(all_rows(stream)) == list(range(103))


def test_random_parts_are_a_function_of_the_seed():
    def parts(seed):
        return [(rows_of(p.train), rows_of(p.test)) for p in PhaseStream.random(table(50), 3, seed=seed)]

    assert parts(1) == parts(1)
    assert parts(1) != parts(2)


def test_random_parts_are_not_contiguous():
    stream = PhaseStream.random(table(100), 2, seed=0, test_fraction=0)
    assert sorted(rows_of(stream.phases[0].train)) != list(range(50))


@pytest.mark.parametrize("num_phases", [0, 5, -1])
def test_an_impossible_number_of_phases_is_refused(num_phases):
    with pytest.raises(ValueError, match=f"4 rows cannot make {num_phases} phases"):
        PhaseStream.random(table(4), num_phases)


# --- held-out parts --------------------------------------------------------------------------------------------------


def test_training_and_test_part_are_disjoint_and_complete():
    phase = PhaseStream.random(table(30), 1, seed=3, test_fraction=0.3).phases[0]
    assert not set(rows_of(phase.train)) & set(rows_of(phase.test))
    assert sorted(rows_of(phase.train) + rows_of(phase.test)) == list(range(30))
    assert len(phase.test) == 9


def test_at_least_one_row_is_held_out():
    assert len(PhaseStream.random(table(4), 1, test_fraction=0.01).phases[0].test) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        PhaseStream.random(table(4), 1, test_fraction=fraction)


def test_a_phase_too_small_to_hold_out_is_refused_by_name():
    with pytest.raises(ValueError, match="'c' has 1 rows: too few"):
        PhaseStream.from_column(table(6, style=STYLES), "style")


# --- the stream itself -----------------------------------------------------------------------------------------------


def test_a_stream_without_phases_is_refused():
    with pytest.raises(ValueError, match="at least one phase"):
        PhaseStream(())


@pytest.mark.parametrize(("train", "test", "which"), [(0, 1, "training"), (1, 0, "test")])
def test_an_empty_part_is_refused(train, test, which):
    with pytest.raises(ValueError, match=f"'a' has an empty {which} part"):
        Phase("a", table(4).select(range(train)), table(4, 4).select(range(test)))


def test_two_phases_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'a' stand for more than one"):
        PhaseStream((Phase("a", table(4)), Phase("a", table(4, 4))))


def test_a_phase_and_an_extra_test_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'a' stand for more than one"):
        PhaseStream((Phase("a", table(4)),), extra_tests={"a": table(4, 4)})


def test_one_table_in_two_phases_is_refused():
    with pytest.raises(ValueError, match="'a' and 'b' overlap"):
        PhaseStream((Phase("a", table(4)), Phase("b", table(4))))


def test_one_table_as_training_and_test_part_is_refused():
    with pytest.raises(ValueError, match="overlap"):
        PhaseStream((Phase("a", table(4), table(4)),))


def test_the_bases_table_as_a_phase_is_refused():
    with pytest.raises(ValueError, match="'base' and 'a' overlap"):
        PhaseStream((Phase("a", table(4)),), base=Phase("base", table(4)))


def test_a_training_table_as_extra_test_is_refused():
    with pytest.raises(ValueError, match="'probe' is the table that phase 'a' trains on"):
        PhaseStream((Phase("a", table(4)),), extra_tests={"probe": table(4)})


def test_tests_say_which_phase_teaches_them():
    stream = PhaseStream(
        (Phase("a", table(4), table(2, 4)), Phase("b", table(4, 10)), Phase("c", table(4, 20), table(2, 24))),
        base=Phase("base", table(4, 30), table(2, 34)),
        extra_tests={"never": table(3, 40)},
    )
    assert {name: learned_at for name, (_, learned_at) in stream.tests().items()} == {
        "base": 0,
        "a": 1,
        "c": 3,
        "never": None,
    }
    assert [rows_of(dataset)[0] for dataset, _ in stream.tests().values()] == [34, 4, 24, 40]
    assert [phase.name for phase in stream.all_phases()] == ["base", "a", "b", "c"]


def test_map_parts_changes_every_part_and_names_it():
    stream = PhaseStream(
        (Phase("a", table(4), table(3, 4)), Phase("b", table(4, 10))),
        base=Phase("base", table(4, 30), table(3, 34)),
        extra_tests={"never": table(3, 40)},
    )
    seen = []

    def first_two(name, part):
        seen.append(name)
        return part.select(range(2))

    changed = stream.map_parts(first_two)
    assert sorted(seen) == ["a (test)", "a (train)", "b (train)", "base (test)", "base (train)", "never (test)"]
    assert all_rows(changed) == [0, 1, 4, 5, 10, 11]
    assert changed.phases[1].test is None
    assert rows_of(changed.base.test) == [34, 35]
    assert rows_of(changed.extra_tests["never"]) == [40, 41]
    assert len(stream.phases[0].train) == 4, "the stream given stays as it is"


# --- data on the disk ------------------------------------------------------------------------------------------------


def square(shade: int, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (shade, 0, 0))


def pictures(count: int = 6, shade: int = 10) -> Dataset:
    images = [square(shade + number) for number in range(count)]
    features = Features({"image": datasets.Image(), "caption": Value("string")})
    return Dataset.from_dict({"image": images, "caption": [f"shade {n}" for n in range(count)]}, features=features)


def picture_files(folder, shade: int) -> Dataset:
    folder.mkdir()
    paths = [str(folder / f"{number}.png") for number in range(4)]
    for number, path in enumerate(paths):
        square(shade + number).save(path)
    return Dataset.from_dict({"image": paths}, features=Features({"image": datasets.Image()}))


@pytest.mark.parametrize(
    "make",
    [
        lambda data: PhaseStream.random(data, 3),
        lambda data: PhaseStream.from_column(data, "style"),
        lambda data: PhaseStream.from_time(data, "n", 3),
    ],
    ids=["random", "column", "time"],
)
def test_data_stay_memory_mapped(tmp_path, make):
    payload = [bytes(20_000)] * 60
    table(60, style=["a", "b", "c"] * 20, payload=payload).save_to_disk(tmp_path / "data")
    del payload
    data = load_from_disk(tmp_path / "data")
    before = pyarrow.total_allocated_bytes()
    stream = make(data)
    assert pyarrow.total_allocated_bytes() - before < 100_000, "1.2 MB are in the table"
    for phase in stream:
        for part in (phase.train, phase.test):
            assert isinstance(part.data, datasets.table.MemoryMappedTable)
            assert part.cache_files == data.cache_files


def test_fingerprint_survives_another_folder(tmp_path):
    data = pictures()
    for folder in ("one", "two"):
        data.save_to_disk(tmp_path / folder)
    one, two = load_from_disk(tmp_path / "one"), load_from_disk(tmp_path / "two")
    assert content_fingerprint(one) == content_fingerprint(two) == content_fingerprint(data)


def test_fingerprint_of_image_files_survives_being_copied_into_a_table(tmp_path):
    data = picture_files(tmp_path / "files", 10)
    data.save_to_disk(tmp_path / "table")
    assert content_fingerprint(load_from_disk(tmp_path / "table")) == content_fingerprint(data)


def test_fingerprint_sees_other_images_in_files_of_the_same_names(tmp_path):
    one, two = picture_files(tmp_path / "one", 10), picture_files(tmp_path / "two", 100)
    assert content_fingerprint(one) != content_fingerprint(two)


def test_fingerprint_of_a_missing_image_file_is_that_of_its_name():
    features = Features({"image": datasets.Image()})
    one = Dataset.from_dict({"image": ["/nowhere/a.png"]}, features=features)
    two = Dataset.from_dict({"image": ["/elsewhere/a.png"]}, features=features)
    assert content_fingerprint(one) == content_fingerprint(two)


def test_fingerprint_does_not_depend_on_the_format():
    data = pictures()
    expected = content_fingerprint(data)
    assert content_fingerprint(data.with_format("numpy")) == expected
    assert content_fingerprint(data.with_transform(lambda rows: {"image": [None] * len(rows["caption"])})) == expected


def test_fingerprint_of_lists_of_images_is_stable():
    data = Dataset.from_dict(
        {"images": [[square(1), square(2)]] * 3}, features=Features({"images": List(datasets.Image())})
    )
    assert content_fingerprint(data) == content_fingerprint(data)


def test_fingerprint_of_selected_rows_is_that_of_a_table_of_them():
    data = Dataset.from_dict({"n": [0, 1, 2, 3]})
    assert content_fingerprint(data.select([3, 1])) == content_fingerprint(Dataset.from_dict({"n": [3, 1]}))


def test_fingerprint_takes_every_kind_of_column():
    features = Features(
        {"label": ClassLabel(names=["x", "y"]), "when": Value("timestamp[s]"), "many": List(Value("string"))}
    )
    rows = {"label": [0, 1], "when": [datetime.datetime(2024, 1, 1), None], "many": [["a", None], []]}
    assert len(content_fingerprint(Dataset.from_dict(rows, features=features))) == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.select(range(5)),
        lambda data: data.select([1, 0, 2, 3, 4, 5]),
        lambda data: data.rename_column("caption", "text"),
        lambda data: data.map(lambda row: {"caption": row["caption"].upper()}),
        lambda data: pictures(shade=11),
    ],
    ids=["rows", "order", "columns", "captions", "images"],
)
def test_fingerprint_of_other_content_is_another(change):
    data = pictures()
    assert content_fingerprint(change(data)) != content_fingerprint(data)


def test_class_labels_name_their_phases():
    data = Dataset.from_dict(
        {"kind": [1, 0, 1, 0]}, features=datasets.Features({"kind": datasets.ClassLabel(names=["cat", "dog"])})
    )
    stream = PhaseStream.from_column(data, "kind", order=["cat", "dog"], test_fraction=0)
    assert [phase.name for phase in stream] == ["cat", "dog"]
