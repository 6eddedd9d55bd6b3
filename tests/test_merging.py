"""Models between two others."""

import json

import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor, CLIPTokenizer

from hf_modx.merging import merge_models

from card_schema import card_problems
from tiny import tiny_clip


@pytest.fixture
def two(processor, tmp_path):
    """Two models with their processor as folders."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path / f"phase-{seed}"
        tiny_clip(processor, seed).save_pretrained(folder)
        processor.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def test_every_weight_is_the_weighted_mean(two, tmp_path):
    merge_models(*two, 0.3, tmp_path / "merged")
    merged, first, second = (weights(folder) for folder in (tmp_path / "merged", *two))
    assert merged.keys() == first.keys() and any((first[name] != second[name]).any() for name in first)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.7 * first[name] + 0.3 * second[name], rtol=0, atol=1e-7)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.tokenizer.get_vocab() == AutoProcessor.from_pretrained(two[0]).tokenizer.get_vocab()


@pytest.mark.parametrize("weight", [0, 1])
def test_the_ends_are_the_models_themselves(two, tmp_path, weight):
    merge_models(*two, weight, tmp_path / "merged")
    own = weights(two[weight])
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights(tmp_path / "merged").items())


def test_half_precision_stays_what_it_is(two, processor, tmp_path):
    tiny_clip(processor, 0).bfloat16().save_pretrained(two[0])
    merge_models(*two, 0.5, tmp_path / "merged")
    assert {tensor.dtype for tensor in weights(tmp_path / "merged").values()} == {torch.bfloat16}


def test_card_says_what_it_is(two, tmp_path):
    merge_models(*two, 0.25, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card_problems(card) == []
    assert "| 0.75 | phase-0 |" in card and "| 0.25 | phase-1 |" in card
    assert str(tmp_path) not in card and "base_model" not in card


def test_models_of_the_hub_are_its_base_models(two, hub, api, tmp_path):
    for number, folder in enumerate(two):
        api.create_repo("owner/clip", exist_ok=True)
        api.create_branch("owner/clip", branch=f"phase-{number}")
        api.upload_folder(repo_id="owner/clip", folder_path=folder, revision=f"phase-{number}")
    merge_models("owner/clip@phase-0", "owner/clip@phase-1", 0.5, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card_problems(card) == []
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == (["owner/clip"], "merge")
    assert "| 0.5 | owner/clip | phase-0 |" in card and "| 0.5 | owner/clip | phase-1 |" in card
    first, second = (weights(folder) for folder in two)
    for name, tensor in weights(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def test_other_architecture_is_refused_by_the_tensor(two, processor, tmp_path):
    config = tiny_clip(processor).config
    config.projection_dim = 8
    AutoModel.from_config(config).save_pretrained(two[1])
    with pytest.raises(ValueError, match=r"visual_projection.weight is \(16, 32\) in the first and \(8, 32\) in"):
        merge_models(*two, 0.5, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_other_vocabulary_is_refused(two, tmp_path):
    processor = AutoProcessor.from_pretrained(two[1])
    vocabulary = processor.tokenizer.get_vocab()
    vocabulary["r"], vocabulary["e"] = vocabulary["e"], vocabulary["r"]
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32).save_pretrained(two[1])
    with pytest.raises(ValueError, match="different vocabularies"):
        merge_models(*two, 0.5, tmp_path / "merged")


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weight_out_of_range_is_refused(two, tmp_path, weight):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        merge_models(*two, weight, tmp_path / "merged")


def test_folder_that_holds_something_is_left_alone(two, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.json").write_text(json.dumps("mine"))
    with pytest.raises(ValueError, match="is not empty"):
        merge_models(*two, 0.5, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.json"]
