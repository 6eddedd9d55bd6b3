"""The example that compares recipes, and the cards it writes."""

import re
import sys
from pathlib import Path

import pytest

from card_schema import card_problems
from tiny import tiny_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import compare_recipes

COMMAND = "python examples/compare_recipes.py --recipes finetune,modx --seeds 0"


@pytest.fixture
def compared(model, processor, tmp_path):
    """Folders of a comparison of two recipes, and of its cards."""
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    tiny_pairs(24).save_to_disk(tmp_path / "data")
    flags = ["--model_name_or_path", str(tmp_path / "start"), "--dataset_name", str(tmp_path / "data")]
    flags += ["--num_phases", "1", "--test_fraction", "0.25", "--max_steps", "1", "--report_to", "none"]
    flags += ["--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "8"]
    out, cards = tmp_path / "out", tmp_path / "cards"
    folders = ["--output_dir", str(out), "--cards", str(cards)]
    compare_recipes.main([*COMMAND.split()[2:], *folders, *flags])
    return out, cards


def test_comparison_and_cards_are_written(compared):
    out, cards = compared
    text = (out / "comparison.md").read_text()
    assert text.startswith(f"<!-- Written by: {COMMAND} -->\n")
    assert "### Image-to-text recall@1" in text and "### Image-to-text recall@5" in text
    assert len(re.findall(r"^\| modx - finetune \|( -?[\d.]+ \|)+$", text, flags=re.MULTILINE)) == 2
    assert text == (cards / "comparison.md").read_text()
    names = ("finetune-seed0-phase-1", "modx-seed0-phase-1")
    expected = {"comparison.md", "comparison.png", *(f"{name}.{kind}" for name in names for kind in ("md", "png"))}
    assert {path.name for path in cards.iterdir()} == expected
    for name in names:
        card = (cards / f"{name}.md").read_text()
        assert card_problems(card) == [] and f"]({name}.png)" in card
