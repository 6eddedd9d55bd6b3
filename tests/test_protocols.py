"""Protocols: the presets on small local data of the same schema, and files of one's own."""

import json
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from hf_modx import RECIPES, ModXTrainingArguments, build_recipe
from hf_modx.protocols import PROTOCOLS, read_protocol

from tiny import COLORS, SHAPES, picture, tiny_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import continual_clip


def labelled(rows, names, image_column="image", label_column="label", shift=0) -> Dataset:
    pictures = [picture(COLORS[i % 8], SHAPES[i % 6], shift=shift) for i in range(rows)]
    return Dataset.from_dict(
        {image_column: pictures, label_column: [i % len(names) for i in range(rows)]},
        features=Features({image_column: Image(), label_column: ClassLabel(names=list(names))}),
    )


def captioned(entry, style) -> Dataset:
    """Pairs of a picture and captions under the names of the entry, with the column that says its phase."""
    names = {"image": entry.get("image_column", "image"), "caption": entry.get("caption_column", "caption")}
    pairs = tiny_pairs(24, style).remove_columns("pair_id")
    if "group_column" in entry:
        pairs = pairs.add_column(entry["group_column"], [f"class {row % 8}" for row in range(24)])
    if "time_column" in entry:
        pairs = pairs.add_column(
            entry["time_column"], [(2011 - 1970) * 31557600 + 9 * 10**6 * row for row in range(24)]
        )
    return pairs.rename_columns(names) if names != {"image": "image", "caption": "caption"} else pairs


def save(root, entry):
    """The data of a phase of a preset, in its schema."""
    first, test_split = entry.get("train_split", "train").split("+")[0], entry.get("test_split", "test")
    if "label_column" in entry:
        names = [f"class {k}" for k in range(100)] if "classes_per_phase" in entry else SHAPES
        names = list(entry.get("class_names", names))
        columns = entry.get("image_column", "image"), entry["label_column"]
        rows = max(12, len(names)) + len(entry["name"]) + ord(entry["name"][0])  # no two are the same table
        parts = [labelled(rows, names, *columns, shift) for shift in (0, 2)]
    else:
        parts = [captioned(entry, style) for style in ("plain", "yellow")]
    further = {name: parts[0].select(range(3)) for name in entry.get("train_split", "train").split("+")[1:]}
    tests = {} if test_split is None or "test_fraction" in entry else {test_split: parts[1]}
    DatasetDict({first: parts[0], **further, **tests}).save_to_disk(root / entry["dataset"])
    if "test_dataset" in entry:
        DatasetDict({test_split: parts[1]}).save_to_disk(root / entry["test_dataset"])


def save_tests(root, protocol):
    """The data of the tests beside a preset's phases."""
    for entry in protocol.tests:
        if entry["kind"] == "retrieval":
            table = captioned(entry, "other")
        else:
            table = labelled(24, SHAPES, entry["image_column"], entry["label_column"], shift=4)
        DatasetDict({entry.get("split", "test"): table}).save_to_disk(root / entry["dataset"])


NUMBER_OF_PHASES = {
    "mtil_order_1": 11,
    "mtil_order_2": 11,
    **{f"cifar100_{steps}_steps": steps for steps in (10, 20, 50)},
    **{f"tinyimagenet_{steps}_steps": steps + 1 for steps in (5, 10, 20)},
    "imagenet100_10_steps": 10,
    "imagenet100_50_10_steps": 11,
    "modx_coco_flickr30k": 6,
    "modx_coco_flickr30k_scratch": 6,
    "modx_ecommerce": 5,
    "modx_cc12m": 10,
    "incclip_instance": 4,
    "incclip_class": 4,
    "tic_redcaps_years": 7,
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_presets_load_data_of_their_schema(name, tmp_path):
    protocol = read_protocol(name)
    for entry in protocol.phases:
        save(tmp_path, entry)
    save_tests(tmp_path, protocol)
    stream, tests = protocol.load(tmp_path)
    assert len(stream) == NUMBER_OF_PHASES[name]
    assert all(set(phase.train.column_names) <= {"image", "caption", "pair_id"} for phase in stream)
    assert {test.learned_at for test in tests.values()} <= {phase.name for phase in stream} | {None}
    assert tests or all(phase.test is not None for phase in stream)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_settings_of_presets_are_flags_and_options_that_exist(name):
    assert read_protocol(name).title and read_protocol(name).source and "Never run" in read_protocol(name).notes[0]
    settings = dict(read_protocol(name).settings)
    options = settings.pop("recipe_args")
    assert settings.pop("recipe") in RECIPES and "model_name_or_path" in settings
    fields = set(ModXTrainingArguments.__dataclass_fields__)
    assert set(settings) - {"model_name_or_path", "from_scratch"} <= fields
    sources = [option for option in options if option.startswith(("image", "text"))]
    build_recipe(read_protocol(name).settings["recipe"], **{k: v for k, v in options.items() if k not in sources})


@pytest.mark.parametrize(("data", "numbers"), [("cifar100", (10, 20, 50)), ("tinyimagenet", (5, 10, 20))])
def test_presets_of_one_data_set_differ_in_the_size_of_the_steps_alone(data, numbers):
    for steps in numbers:
        (entry,) = read_protocol(f"{data}_{steps}_steps").phases
        assert entry == {**read_protocol(f"{data}_10_steps").phases[0], "classes_per_phase": 100 // steps}


def test_orders_of_mtil_have_the_same_eleven_tasks():
    first, second = (read_protocol(f"mtil_order_{k}").phases for k in (1, 2))
    assert [entry["name"] for entry in first] == sorted((entry["name"] for entry in second), key=str.lower)
    assert {json.dumps(entry) for entry in first} == {json.dumps(entry) for entry in second}


@pytest.fixture
def own_protocol(tmp_path):
    """A protocol of labels and captions with data and reference data, and the start."""

    def own_protocol(**changes):
        phases = [
            {"name": "shapes", "dataset": "our/shapes", "label_column": "label", "templates": ["a {}", "one {}"]},
            {"name": "pairs", "dataset": "our/pairs", "parts": 2},
        ]
        phases[0] |= changes
        for entry in phases:
            save(tmp_path / "data", entry)
        tiny_pairs(12).save_to_disk(tmp_path / "data" / "our" / "reference")
        path = tmp_path / "ours.yaml"
        settings = {"recipe": "zscl", "max_steps": 2, "recipe_args": {"images": "our/reference"}}
        path.write_text(yaml.safe_dump({"title": "ours", "settings": settings, "phases": phases}))
        return path

    return own_protocol


def test_example_runs_a_protocol_and_flags_override_it(own_protocol, model, processor, tmp_path):
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    flags = [
        *("--protocol", str(own_protocol()), "--data_root", str(tmp_path / "data"), "--learning_rate", "1e-4"),
        *("--model_name_or_path", str(tmp_path / "start"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"),
        *("--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "4", "--bad_samples", "skip"),
    ]
    continual_clip.main(flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    assert results["phases"] == ["shapes", "pairs 1", "pairs 2"]
    assert results["recipe"] == "zscl"
    assert (identity["hyperparameters"]["max_steps"], identity["hyperparameters"]["learning_rate"]) == (2, 1e-4)
    assert dict(zip(results["tests"], results["learned_at"], strict=True)) == {"pairs": 2, "shapes": 1}
    column = results["tests"].index("shapes")
    assert all(row[column] is not None for row in results["matrix"]["zero_shot_top1"])


def test_first_phase_of_classes_may_be_larger(own_protocol, tmp_path):
    stream, _ = read_protocol(own_protocol(classes_per_phase=20, first_classes=50)).load(tmp_path / "data")
    classes = [sorted(set(phase.train["pair_id"])) for phase in stream.phases[:4]]
    assert classes == [list(range(start, end)) for start, end in ((0, 50), (50, 70), (70, 90), (90, 100))]


@pytest.fixture
def cut(tmp_path):
    """The phases and tests of 24 pairs cut as the keys say; of each part the numbers of its rows."""

    def cut(values=None, test_values=None, **keys):
        data = []
        for style, column in (("plain", values), ("yellow", test_values)):
            pairs = tiny_pairs(24, style).remove_columns("pair_id")
            pairs = pairs.remove_columns("caption").add_column("caption", [str(row) for row in range(24)])
            data.append(pairs if column is None else pairs.add_column("value", column))
        DatasetDict(train=data[0], test=data[1]).save_to_disk(tmp_path / "data")
        path = tmp_path / "cut.yaml"
        path.write_text(yaml.safe_dump({"phases": [{"name": "p", "dataset": "data", **keys}]}))
        stream, tests = read_protocol(path).load(tmp_path)
        rows = {phase.name: list(map(int, phase.train["caption"])) for phase in stream}
        held = {phase.name: phase.test and list(map(int, phase.test["caption"])) for phase in stream}
        return rows, held, tests

    return cut


def test_parts_are_contiguous_or_random_and_share_one_test(cut):
    rows, held, tests = cut(parts=3)
    assert rows == {"p 1": list(range(8)), "p 2": list(range(8, 16)), "p 3": list(range(16, 24))}
    assert set(held.values()) == {None} and len(tests["p"].dataset) == 24 and tests["p"].learned_at == "p 1"
    mixed, _, _ = cut(parts=3, shuffle=1)
    assert sorted(row for part in mixed.values() for row in part) == list(range(24)) and mixed["p 1"] != sorted(
        mixed["p 1"]
    )


def test_each_value_of_a_column_is_a_phase_with_its_own_test(cut):
    rows, held, tests = cut([row % 3 for row in range(24)], [row % 2 for row in range(24)], group_column="value")
    assert rows == {f"p {k}": list(range(k, 24, 3)) for k in range(3)} and not tests
    assert held == {"p 0": list(range(0, 24, 2)), "p 1": list(range(1, 24, 2)), "p 2": None}


def test_values_may_be_put_together_in_random_groups(cut):
    names = [f"name {row % 6}" for row in range(24)]
    rows, held, _ = cut(names, names, group_column="value", parts=2, shuffle=0)
    groups = [sorted({row % 6 for row in part}) for part in rows.values()]
    assert sorted(groups[0] + groups[1]) == list(range(6)) and len(groups[0]) == 3 and groups[0] != [0, 1, 2]
    assert held == rows


@pytest.mark.parametrize("kind", ["text", "time", "seconds"])
def test_each_period_of_a_time_column_is_a_phase(cut, kind):
    times = [datetime(2019 + row // 10, 1 + row % 10, 3, 23, 59) for row in range(24)]
    values = {
        "text": [time.isoformat() for time in times],
        "time": times,
        "seconds": [int(time.replace(tzinfo=timezone.utc).timestamp()) for time in times],
    }[kind]
    rows, held, tests = cut(values, time_column="value", test_fraction=0.2)
    found = {name: sorted(part + held[name]) for name, part in rows.items()}
    assert found == {"p 2019": list(range(10)), "p 2020": list(range(10, 20)), "p 2021": list(range(20, 24))}
    assert [len(part) for part in held.values()] == [2, 2, 1] and not tests


def test_months_are_periods_too_and_what_is_no_time_is_named(cut):
    times = [f"2020-{1 + row % 4:02}-05" for row in range(24)]
    rows, held, _ = cut(times, times, time_column="value", period="month")
    assert rows == held and list(rows) == [f"p 2020-0{month}" for month in range(1, 5)]
    with pytest.raises(ValueError, match="Phase 'p' of the protocol: Column 'value' holds what is no time"):
        cut([*times[1:], "soon"], time_column="value", test_fraction=0.1)
    with pytest.raises(ValueError, match="numbers up to 2023, which are no seconds since 1970.*group_column"):
        cut(list(range(2000, 2024)), time_column="value", test_fraction=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"group_column": "a", "time_column": "b"}, "group_column does not go with time_column"),
        ({"test_fraction": 0.1, "test_split": "test"}, "test_fraction does not go with test_split"),
        ({"time_column": "value", "period": "week"}, "one of year, month, day"),
        ({"parts": 25}, "24 rows or values cannot make 25 parts"),
    ],
)
def test_parts_that_make_no_sense_are_refused(cut, keys, message):
    with pytest.raises(ValueError, match=message):
        cut(**keys)


def test_table_without_splits_is_no_test_of_itself(tmp_path):
    labelled(12, SHAPES).save_to_disk(tmp_path / "shapes")
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"phases": [{"name": "p", "dataset": "shapes", "label_column": "label"}]}))
    with pytest.raises(ValueError, match="Phase 'p' of the protocol: shapes has no splits"):
        read_protocol(file).load(tmp_path)


def test_random_weights_are_those_of_the_seed(model, processor, tmp_path):
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    flags = ["--model_name_or_path", str(tmp_path / "start"), "--from_scratch", "--output_dir", str(tmp_path / "out")]
    parsed = continual_clip.parse_arguments(
        (continual_clip.ScriptArguments, ModXTrainingArguments), flags, lambda chosen, given: {}
    )
    first, second = (continual_clip.start_model(*parsed)["model"].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "visual_projection.weight"
    assert first[name].dtype == torch.float32 and not torch.equal(first[name], model.state_dict()[name])


def test_class_groups_are_phases_tested_among_all_classes(own_protocol, tmp_path):
    path = own_protocol(classes_per_phase=4)
    stream, tests = read_protocol(path).load(tmp_path / "data")
    assert stream.phases[0].name == "shapes 1"
    assert len(tests["shapes 1"].names) == 100 and len(stream) == 27
    assert set(tests["shapes 2"].labels(tests["shapes 2"].dataset).tolist()) == {4, 5, 6, 7}
    assert set(stream.phases[1].train["pair_id"]) == {4, 5, 6, 7}
    assert stream.phases[1].train["caption"][0] == ["a class 4"]


def test_classes_of_different_data_sets_do_not_belong_together(own_protocol, tmp_path):
    path = own_protocol()
    protocol = yaml.safe_load(path.read_text())
    protocol["phases"].append({"name": "more", "dataset": "our/more", "label_column": "label"})
    path.write_text(yaml.safe_dump(protocol))
    save(tmp_path / "data", protocol["phases"][-1])
    stream, _ = read_protocol(path).load(tmp_path / "data")
    first, more = (set(stream.phases[place].train["pair_id"]) for place in (0, -1))
    assert first == set(range(6)) and len(more) == 6 and not more & first


def test_what_is_missing_is_named(own_protocol, tmp_path):
    with pytest.raises(ValueError, match="no protocol 'mtil', nor such a file. There are cifar100"):
        read_protocol("mtil")
    with pytest.raises(ValueError, match="phase 'shapes': there is no parts"):
        read_protocol(own_protocol(parts=2))
    with pytest.raises(FileNotFoundError, match="our/shapes is not there"):
        read_protocol(own_protocol()).load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Phase 'shapes' of the protocol: The test has no column 'img'"):
        path = own_protocol()
        path.write_text(path.read_text().replace("label_column: label", "label_column: label\n  image_column: img"))
        read_protocol(path).load(tmp_path / "data")


def test_further_tests_may_not_have_the_names_of_the_protocol(own_protocol, tmp_path):
    data = tmp_path / "data"
    path = own_protocol()
    (tmp_path / "tests.yaml").write_text(f"- {{name: shapes, kind: zero_shot, dataset: {data / 'our' / 'shapes'}}}")
    flags = ["--protocol", str(path), "--data_root", str(data), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="tests.yaml: the protocol has tests of the names shapes already"):
        continual_clip.main([*flags, "--tests", str(tmp_path / "tests.yaml"), "--dry_run"])
