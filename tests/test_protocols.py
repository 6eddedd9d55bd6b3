"""Protocols: the presets on small local data of the same schema, and files of one's own."""

import json
import sys
from pathlib import Path

import pytest
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


def save(root, entry):
    """The data of a phase of a preset, in its schema."""
    splits = entry.get("train_split", "train"), entry.get("test_split", "test")
    if "label_column" in entry:
        names = [f"class {k}" for k in range(100)] if "classes_per_phase" in entry else SHAPES
        columns = entry.get("image_column", "image"), entry["label_column"]
        rows = max(12, len(names)) + len(entry["name"]) + ord(entry["name"][0])  # no two are the same table
        parts = [labelled(rows, names, *columns, shift) for shift in (0, 2)]
    else:
        parts = [tiny_pairs(12, style).remove_columns("pair_id") for style in ("plain", "yellow")]
    DatasetDict(zip(splits, parts, strict=True)).save_to_disk(root / entry["dataset"])
    if "test_dataset" in entry:
        DatasetDict({splits[1]: parts[1]}).save_to_disk(root / entry["test_dataset"])


@pytest.mark.parametrize(
    ("name", "phases"), [("mtil_order_1", 11), ("cifar100_10_steps", 10), ("modx_coco_flickr30k", 6)]
)
def test_presets_load_data_of_their_schema(name, phases, tmp_path):
    protocol = read_protocol(name)
    for entry in protocol.phases:
        save(tmp_path, entry)
    stream, tests = protocol.load(tmp_path)
    assert len(stream) == phases
    assert all(set(phase.train.column_names) <= {"image", "caption", "pair_id"} for phase in stream)
    assert {test.learned_at for test in tests.values()} <= {phase.name for phase in stream}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_settings_of_presets_are_flags_and_options_that_exist(name):
    assert read_protocol(name).title and read_protocol(name).source and "Never run" in read_protocol(name).notes[0]
    settings = dict(read_protocol(name).settings)
    options = settings.pop("recipe_args")
    assert settings.pop("recipe") in RECIPES and "model_name_or_path" in settings
    fields = set(ModXTrainingArguments.__dataclass_fields__)
    assert set(settings) - {"model_name_or_path"} <= fields
    sources = [option for option in options if option.startswith(("image", "text"))]
    build_recipe(read_protocol(name).settings["recipe"], **{k: v for k, v in options.items() if k not in sources})


def test_presets_of_one_data_set_differ_in_the_size_of_the_steps_alone():
    for steps in (10, 20, 50):
        (entry,) = read_protocol(f"cifar100_{steps}_steps").phases
        assert entry == {**read_protocol("cifar100_10_steps").phases[0], "classes_per_phase": 100 // steps}


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


def test_class_groups_are_phases_tested_among_all_classes(own_protocol, tmp_path):
    path = own_protocol(classes_per_phase=4)
    stream, tests = read_protocol(path).load(tmp_path / "data")
    assert stream.phases[0].name == "shapes 1"
    assert len(tests["shapes 1"].names) == 100 and len(stream) == 27
    assert set(tests["shapes 2"].labels(tests["shapes 2"].dataset).tolist()) == {4, 5, 6, 7}
    assert set(stream.phases[1].train["pair_id"]) == {4, 5, 6, 7}
    assert stream.phases[1].train["caption"][0] == ["a class 4"]


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
