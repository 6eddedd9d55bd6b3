"""The main example, as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import DatasetDict

from hf_modx import ModXTrainingArguments, Phase, PhaseStream, build_recipe
from hf_modx.yaml_arguments import parse_arguments

from tiny import tiny_pairs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import continual_clip  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = [
    *("--max_steps", "2", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--per_device_train_batch_size", "8", "--save_strategy", "no"),
]


@pytest.fixture
def example(start, tmp_path):
    """Run the example on the tiny model with further flags; returns the results."""

    def example(*flags):
        out = tmp_path / "out"
        continual_clip.main([*QUICK, "--model_name_or_path", start, "--output_dir", str(out), *flags])
        return json.loads((out / "results.json").read_text())

    return example


def named_splits():
    data = tiny_pairs(48)
    parts = {}
    for k in range(2):
        parts[f"phase_{k + 1}_train"] = data.select(range(24 * k, 24 * k + 16))
        parts[f"phase_{k + 1}_test"] = data.select(range(24 * k + 16, 24 * k + 24))
    return DatasetDict(parts)


@pytest.mark.slow
def test_no_arguments_run_the_built_in_stream(tmp_path):
    command = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_cpu_threads_per_process", "1"),
        *(str(ROOT / "examples" / "continual_clip.py"), *QUICK, "--base_max_steps", "2"),
        *("--max_train_samples", "32", "--max_eval_samples", "20"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "modx-seed42" / "results.json").read_text())
    assert len(results["phases"]) == 3 and results["recipe"] == "modx"
    assert "| start |" in done.stdout and "forgetting" in done.stdout
    assert "runs/modx-seed42/phase-0 to phase-3" in done.stdout


def test_splits_named_train_and_test_are_a_stream_as_they_stand(example, tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    assert example("--dataset_name", str(tmp_path / "data"))["phases"] == ["phase_1", "phase_2"]


def test_phase_and_test_splits_by_name(example, tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    flags = ["--phase_splits", "phase_2_train,phase_1_train", "--test_splits", "phase_2_test,phase_1_test"]
    results = example("--dataset_name", str(tmp_path / "data"), *flags)
    assert results["phases"] == ["phase_2_train", "phase_1_train"]


def test_phases_from_a_column_of_a_parquet_file(example, tmp_path):
    data = tiny_pairs(40).add_column("month", ["may"] * 20 + ["june"] * 20)
    data.to_parquet(tmp_path / "data.parquet")
    flags = ["--dataset_name", str(tmp_path / "data.parquet"), "--phase_column", "month", "--recipe", "finetune"]
    assert example(*flags)["phases"] == ["may", "june"]


def test_phases_in_the_order_of_a_time_column(example, tmp_path):
    data = tiny_pairs(40).add_column("day", list(range(40, 0, -1)))
    data.to_parquet(tmp_path / "data.parquet")
    flags = ["--dataset_name", str(tmp_path / "data.parquet"), "--phase_column", "day", "--num_phases", "2"]
    assert example(*flags)["phases"] == ["phase_1", "phase_2"]


def test_random_phases_of_an_image_folder(example, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for number, row in enumerate(tiny_pairs(40)):
        row["image"].save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": row["caption"][0]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    flags = ["--dataset_name", str(folder), "--caption_column", "text", "--num_phases", "2"]
    assert len(example(*flags)["phases"]) == 2


def test_further_tests_come_from_a_file(example, tmp_path, capsys):
    named_splits().save_to_disk(tmp_path / "data")
    shapes = tiny_pairs(8).map(lambda row: {"shape": row["caption"][0].split()[-1]})
    shapes.save_to_disk(tmp_path / "shapes")
    (tmp_path / "tests.yaml").write_text(
        f"- {{name: shapes, kind: zero_shot, dataset: {tmp_path / 'shapes'}, label_column: shape, "
        "class_names: [circle, square], templates: ['a {}']}"
    )
    results = example("--dataset_name", str(tmp_path / "data"), "--tests", str(tmp_path / "tests.yaml"))
    assert [row[-1] is not None for row in results["matrix"]["zero_shot_top1"]] == [True] * 3
    assert "Zero-shot top-1 in percent" in capsys.readouterr().out


def test_yaml_file_comes_first_and_flags_override_it(start, tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {start}\ndataset_name: {tmp_path / 'data'}\nlearning_rate: 1e-4\nmax_steps: 9\n"
        f"save_strategy: no\nreport_to: none\nuse_cpu: true\nper_device_train_batch_size: 8\ndisable_tqdm: yes\n"
        f"recipe_args:\n  alpha: 1e1\noutput_dir: {tmp_path / 'elsewhere'}\n"
    )
    out = tmp_path / "out"
    continual_clip.main([str(config), "--max_steps", "2", "--output_dir", str(out)])
    identity = json.loads((out / "run.json").read_text())["identity"]
    assert identity["hyperparameters"]["learning_rate"] == 1e-4
    assert identity["hyperparameters"]["max_steps"] == 2
    assert identity["recipe_args"]["ModX"]["alpha"] == 10.0


@pytest.mark.parametrize(
    "recipe", ["recipe: modx+l2sp\nrecipe_args: {modx: {alpha: 1e1}}", "recipe: [{modx: {alpha: 1e1}}, l2sp]"]
)
def test_yaml_file_may_add_recipes_up(start, tmp_path, recipe):
    named_splits().save_to_disk(tmp_path / "data")
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(f"model_name_or_path: {start}\ndataset_name: {tmp_path / 'data'}\n{recipe}\n")
    continual_clip.main([str(config), *QUICK, "--output_dir", str(out)])
    identity = json.loads((out / "run.json").read_text())["identity"]
    assert identity["recipe"] == "modx+l2sp"
    assert identity["recipe_args"]["ModX"]["alpha"] == 10.0


@pytest.mark.parametrize(("flags", "steps"), [([], "1,000"), (["--model_name_or_path", "some/model"], "0")])
def test_base_is_planned_to_be_trained_only_where_no_model_is_given(flags, steps):
    kinds = (continual_clip.ScriptArguments, ModXTrainingArguments)
    script, args = parse_arguments(kinds, [*flags, "--output_dir", "out"], continual_clip.defaults)
    stream = PhaseStream([Phase("june", tiny_pairs(16, start=16))], base=Phase("may", tiny_pairs(16)))
    assert f"phase 0: may, 16 pairs to learn in {steps} steps" in continual_clip.plan(stream, script, args)


def test_dry_run_prints_phases_and_trains_nothing(start, tmp_path, capsys):
    named_splits().save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", str(tmp_path / "data"), "--dry_run", "--output_dir", str(tmp_path / "out")]
    assert continual_clip.main([*QUICK, "--model_name_or_path", start, *flags]) is None
    printed = capsys.readouterr().out
    assert "phase 1: phase_1, 16 pairs to learn in 2 steps, 8 to test" in printed
    assert not (tmp_path / "out").exists()


def test_split_to_cut_into_phases_is_not_chosen_among_several(start, tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    flags = ["--model_name_or_path", start, "--dataset_name", str(tmp_path / "data"), "--num_phases", "2", "--dry_run"]
    with pytest.raises(SystemExit, match=r"--dataset_split.*phase_1_train, phase_1_test, phase_2_train"):
        continual_clip.main([*QUICK, *flags])
    continual_clip.main([*QUICK, *flags, "--dataset_split", "phase_2_train"])


def test_split_to_cut_is_not_ignored_where_nothing_is_cut(capsys):
    with pytest.raises(SystemExit):
        continual_clip.main([*QUICK, "--dataset_name", "data", "--dataset_split", "b", "--phase_splits", "a,b"])
    assert "--dataset_split, which is cut into phases, needs" in capsys.readouterr().err


def test_sizes_can_be_limited(example, tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", str(tmp_path / "data"), "--max_train_samples", "10", "--max_eval_samples", "5"]
    results = example(*flags)
    assert [record["pairs"] for record in results["training"]] == [10, 10]
    assert set(results["test_pairs"].values()) == {5}


def test_adapters_are_a_flag_and_a_recipe_brings_its_own_settings(example, tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    example("--dataset_name", str(tmp_path / "data"), "--recipe", "cclip", "--lora_merge", "false")
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["hyperparameters"]
    assert (settings["peft"], settings["lora_rank"], settings["lora_dropout"]) == ("lora", 16, 0.1)
    assert settings["text_learning_rate_factor"] == 10 and settings["lora_merge"] is False
    assert (tmp_path / "out" / "phase-2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--recipe", "modx"], {"alpha": 2.0}),
        (["--recipe", "modx", "--recipe_args", '{"reduction": "mean"}'], {"alpha": 2.0, "reduction": "mean"}),
        (["--recipe", "modx", "--recipe_args", '{"modx": {"alpha": 5}}'], {"alpha": 5}),
        (["--recipe", "modx+er", "--recipe_args", '{"modx": {"reduction": "mean"}}'], {"alpha": 2.0}),
        (["--recipe", "modx", "er"], {"alpha": 2.0}),
        (["--recipe", '{"modx": {"alpha": 5}}', "er"], {"alpha": 5}),
    ],
)
def test_recipes_have_options_that_suit_the_built_in_stream(flags, options):
    script, _ = parse_arguments(
        (continual_clip.ScriptArguments, ModXTrainingArguments), flags, continual_clip.defaults
    )
    modx = build_recipe(script.recipe, **script.recipe_options)[0]
    assert options.items() <= vars(modx).items()


def test_options_of_a_part_that_are_no_options_are_refused(capsys):
    flags = ["--recipe", "modx+er", "--recipe_args", '{"modx": 5}']
    with pytest.raises(SystemExit):
        parse_arguments((continual_clip.ScriptArguments, ModXTrainingArguments), flags, continual_clip.defaults)
    assert "given by part, modx, er" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", [[], ["--protocol", "mtil_order_1"]], ids=["none", "mtil"])
def test_learning_rate_of_the_text_tower_takes_the_place_of_a_recipe_s_factor(protocol):
    flags = ["--recipe", "cclip", "--text_learning_rate", "1e-4", *protocol]
    _, args = parse_arguments((continual_clip.ScriptArguments, ModXTrainingArguments), flags, continual_clip.defaults)
    assert (args.peft, args.learning_rate_of_text) == ("lora", 1e-4)


def test_configuration_for_one_gpu_is_taken_as_it_stands(start, tmp_path, capsys):
    named_splits().save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", start, "--use_cpu", "true", "--dry_run"]
    continual_clip.main([str(ROOT / "examples" / "lora_one_gpu.yaml"), *flags])
    assert "Recipe modx, 512 pairs a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe_args", "{alpha: 20}"], "must be JSON"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--recipe", "joint+modx"], "Joint and ModX each bring the contrastive term"),
        (["--recipe_args", '{"alfa": 20}'], "no option alfa"),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_wrong_flags_end_with_the_reason(start, tmp_path, capsys, flags, message):
    named_splits().save_to_disk(tmp_path / "data")
    data = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises((SystemExit, ValueError)) as error:
        continual_clip.main([*QUICK, "--model_name_or_path", start, *data, *flags])
    assert message in capsys.readouterr().err + str(error.value)


def test_own_data_need_a_model(tmp_path):
    named_splits().save_to_disk(tmp_path / "data")
    with pytest.raises(SystemExit, match="--model_name_or_path"):
        continual_clip.main([*QUICK, "--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])
