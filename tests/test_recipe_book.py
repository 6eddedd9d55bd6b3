"""The recipe book: each configuration runs and does what its recipe promises, and each command that is written down
has arguments that exist."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, DatasetDict
from transformers import AutoModel, CLIPModel

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import own_callback  # noqa: E402
import pretrained_start  # noqa: E402

from hf_modx import ModXTrainer, Phase, PhaseStream, build_recipe  # noqa: E402
from hf_modx.data import PairCollator  # noqa: E402
from hf_modx.yaml_arguments import parse_arguments  # noqa: E402

import continual_clip  # noqa: E402
from launch import launch  # noqa: E402
from tiny import SHAPES, tiny_clip, tiny_dual_encoder, tiny_pairs  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cook(start, tmp_path):
    """Run the example with a configuration on the tiny model for a few steps; returns the folder of the run."""

    def cook(*flags, steps: int = 2, model: str = start):
        out = tmp_path / "out"
        quick = ["--max_steps", str(steps), "--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
        continual_clip.main([*flags, "--model_name_or_path", model, *quick, "--output_dir", str(out)])
        return out

    return cook


def config(name: str) -> str:
    return str(EXAMPLES / name)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return CLIPModel.from_pretrained(folder).state_dict()


def written_at(run: Path, phase: int) -> int:
    return (run / f"phase-{phase}" / "model.safetensors").stat().st_mtime_ns


def test_next_month_s_pictures_are_all_that_the_catalogue_learns_anew(cook, tmp_path):
    months = tiny_pairs(48).add_column("month", [month for month in ("may", "june", "july") for _ in range(16)])
    data = tmp_path / "catalogue.parquet"
    months.select(range(32)).to_parquet(data)
    run = cook(config("monthly_catalogue.yaml"), "--dataset_name", str(data))
    before = [written_at(run, phase) for phase in range(3)]
    months.to_parquet(data)
    cook(config("monthly_catalogue.yaml"), "--dataset_name", str(data))
    assert [written_at(run, phase) for phase in range(3)] == before
    assert results(run)["phases"] == ["may", "june", "july"]
    assert len(results(run)["matrix"]["image_to_text_recall@1"]) == 4


def test_domain_is_learned_half_way_and_the_zero_shot_test_measured_before_and_after(cook, tmp_path):
    """Half-way between the old weights and those without `wise_ft`, and what that has kept is in the results."""
    tiny_pairs(16, style="other").to_parquet(tmp_path / "domain.parquet")
    tests = yaml.safe_load((EXAMPLES / "keep_zero_shot_tests.yaml").read_text())
    things = tiny_pairs(8, start=16).rename_column("image", "img")
    things = things.add_column("fine_label", [row["caption"][0].split()[-1] for row in things])
    DatasetDict(test=things.cast_column("fine_label", ClassLabel(names=sorted(SHAPES)))).save_to_disk(tmp_path / "d")
    declared = tmp_path / "tests.yaml"
    declared.write_text(yaml.safe_dump([{**test, "dataset": str(tmp_path / "d")} for test in tests]))
    flags = [config("keep_zero_shot.yaml"), "--dataset_name", str(tmp_path / "domain.parquet")]
    run = cook(*flags, "--tests", str(declared))
    zero_shot = results(run)["matrix"]["zero_shot_top1"]
    assert [row[-1] is not None for row in zero_shot] == [True, True]
    old, half = weights(run / "phase-0"), weights(run / "phase-1")
    run.rename(tmp_path / "half")
    whole = weights(cook(*flags, "--recipe", "modx", "--recipe_args", '{"alpha": 2}') / "phase-1")
    assert any(not torch.equal(old[name], whole[name]) for name in old)
    for name in old:
        torch.testing.assert_close(half[name], (old[name] + whole[name]) / 2, atol=1e-6, rtol=0)


def test_labels_are_learned_as_classes_and_tested_as_classes(cook, tmp_path, caplog):
    for name, start in (("my_flowers", 0), ("my_birds", 24)):
        kinds = tiny_pairs(24, start=start)
        shapes = [row["caption"][0].split()[-1] for row in kinds]
        kinds = kinds.remove_columns(["caption", "pair_id"]).add_column("label", shapes)
        kinds = kinds.cast_column("label", ClassLabel(names=list(dict.fromkeys(shapes))))
        DatasetDict(kinds.train_test_split(6, seed=0)).save_to_disk(tmp_path / name)
    tiny_pairs(12, shift=2).save_to_disk(tmp_path / "reference_pairs")
    run = cook("--protocol", config("labels.yaml"), "--data_root", str(tmp_path))
    assert results(run)["phases"] == ["flowers", "birds"]
    after_flowers, after_birds = results(run)["matrix"]["zero_shot_top1"][1:]
    assert None not in after_flowers + after_birds
    assert "No phase has a test" not in caplog.text
    terms = results(run)["training"][0]["log"]
    assert {"classification", "reference_images", "reference_texts"} <= set(terms) and "contrastive" not in terms


def test_adapters_are_trained_and_merged_and_the_rest_of_the_model_stays_as_it_was(cook, tmp_path):
    tiny_pairs(32).to_parquet(tmp_path / "pairs.parquet")
    flags = [config("lora_one_gpu.yaml"), "--dataset_name", str(tmp_path / "pairs.parquet"), "--num_phases", "2"]
    run = cook(*flags)
    old, new = weights(run / "phase-0"), weights(run / "phase-2")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    adapted = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    assert changed == {name for name in old if name.endswith(adapted)}


@pytest.mark.slow
def test_eight_gpus_are_eight_processes_of_one_batch(cook, tmp_path):
    """Two processes of a CPU in their place."""
    processes = yaml.safe_load((EXAMPLES / "accelerate_configs" / "ddp_8_gpus_bf16.yaml").read_text())["num_processes"]
    per_process = yaml.safe_load((EXAMPLES / "eight_gpus.yaml").read_text())["per_device_train_batch_size"]
    assert (processes, processes * per_process) == (8, 4096)
    tiny_pairs(32).to_parquet(tmp_path / "pairs.parquet")
    data = ["--dataset_name", str(tmp_path / "pairs.parquet"), "--num_phases", "1"]
    more = ["--dataloader_num_workers", "0", "--image_cache", str(tmp_path / "images")]
    launch(2, cook, config("eight_gpus.yaml"), *data, *more)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    assert list((tmp_path / "images").iterdir())


def test_without_a_network_nothing_is_asked_for(cook, tmp_path, monkeypatch):
    def no_network(*address):
        raise AssertionError(f"asked for {address}")

    tiny_pairs(32).to_parquet(tmp_path / "pairs.parquet")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    flags = [config("no_network.yaml"), "--dataset_name", str(tmp_path / "pairs.parquet"), "--num_phases", "2"]
    run = cook(*flags)
    assert (run / "phase-2" / "README.md").exists() and len(results(run)["training"]) == 2


# ---- A loss callback of one's own ----


def relations_of(model, processor, pairs):
    """The cosines between images."""
    with torch.no_grad():
        pixels = PairCollator.for_model(model, processor).pixels(list(pairs["image"]))
        embeds = torch.nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
    return embeds @ embeds.T


def test_own_callback_keeps_which_images_resemble_each_other(processor, pairs, make_args):
    def cosines_moved(recipe):
        model = tiny_clip(processor)
        before = relations_of(model, processor, pairs)
        trainer = ModXTrainer(
            model=model,
            args=make_args(max_steps=20),
            train_dataset=pairs,
            processing_class=processor,
            loss_callbacks=build_recipe(recipe),
        )
        trainer.train()
        moved = relations_of(trainer.model, processor, pairs) - before
        return moved.square().mean().sqrt().item(), trainer.state.log_history

    free, _ = cosines_moved(["finetune"])
    held, logged = cosines_moved(["finetune", own_callback.ImageRelations(weight=200.0)])
    assert held < free / 2
    last = logged[-2]
    assert last["loss"] == pytest.approx(last["contrastive"] + last["image_relations"], rel=1e-3)
    assert last["image_relations"] == pytest.approx(200 * last["cosines_moved"] ** 2, rel=1e-3) != 0


def test_own_callback_s_script_prints_the_matrix(tmp_path, monkeypatch, capsys):
    data = tiny_pairs(32)
    known = Phase("part 0", data.select(range(12)), data.select(range(12, 16)))
    new = Phase("part 1", data.select(range(16, 28)), data.select(range(28, 32)))
    monkeypatch.setattr(own_callback, "demo_stream", lambda seed: PhaseStream((new,), base=known))
    flags = ["--max_steps", "1", "--base_max_steps", "1", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    own_callback.main([*flags, "--weight", "2", "--report_to", "none", "--output_dir", str(tmp_path / "out")])
    assert "| part 1 |" in capsys.readouterr().out
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    assert identity["recipe_args"]["ImageRelations"]["weight"] == 2


# ---- A start of two pretrained towers ----


def test_towers_are_joined_on_one_data_set(capsys):
    towers = ["--vision_model", "a", "--text_model", "b", "--output_dir", "out", "--use_cpu", "true"]
    with pytest.raises(SystemExit):
        pretrained_start.main([*towers, "--dataset_name", "my_data", "--demo_stream", "class"])
    assert "--demo_stream does not go with --dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags"), [(own_callback, []), (pretrained_start, ["--vision_model", "a", "--text_model", "b"])]
)
@pytest.mark.parametrize(("length", "max_steps"), [(["--num_train_epochs", "2"], -1), (["--max_steps", "7"], 7)])
def test_epochs_take_the_place_of_a_script_s_own_steps(script, flags, length, max_steps, monkeypatch):
    def parsed(*given):
        raise SystemExit(parse_arguments(*given)[1].max_steps)

    monkeypatch.setattr(script, "parse_arguments", parsed)
    with pytest.raises(SystemExit) as told:
        script.main([*flags, *length, "--use_cpu", "true"])
    assert told.value.code == max_steps


@pytest.fixture
def towers(tmp_path):
    """A tiny image tower and a tiny text tower in folders of their own."""
    model, processor = tiny_dual_encoder("vision-text-dual-encoder")
    for part in (model.vision_model, processor.image_processor):
        part.save_pretrained(tmp_path / "image tower")
    for part in (model.text_model, processor.tokenizer):
        part.save_pretrained(tmp_path / "text tower")
    tiny_pairs(32).to_parquet(tmp_path / "pairs.parquet")
    return model


def test_two_towers_are_joined_by_what_is_behind_them_and_start_a_stream(towers, cook, tmp_path):
    flags = ["--vision_model", str(tmp_path / "image tower"), "--text_model", str(tmp_path / "text tower")]
    flags += ["--dataset_name", str(tmp_path / "pairs.parquet"), "--projection_dim", "8", "--max_steps", "3"]
    flags += ["--per_device_train_batch_size", "8", "--use_cpu", "true", "--save_strategy", "no"]
    start = tmp_path / "towers"
    pretrained_start.main([*flags, "--output_dir", str(start)])
    joined = AutoModel.from_pretrained(start)
    for name, tower in (("vision_model", towers.vision_model), ("text_model", towers.text_model)):
        after = getattr(joined, name).state_dict()
        assert all(torch.equal(weight, after[key]) for key, weight in tower.state_dict().items())
    data = ["--dataset_name", str(tmp_path / "pairs.parquet"), "--num_phases", "1", "--peft", "lora"]
    run = cook(*data, "--per_device_train_batch_size", "8", model=str(start))
    assert len(results(run)["matrix"]["image_to_text_recall@1"]) == 2
