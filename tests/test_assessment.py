"""What to expect of new data: measures of tiny models, advice, and the command."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from datasets import DatasetDict, concatenate_datasets

from hf_modx import ModXTrainer, Phase, build_recipe
from hf_modx.assessment import Assessment, Duplicates, Shift, advise, assess, measure_cost, rows_kept
from hf_modx.cli import main, make_parser
from hf_modx.cli.assess import planned
from hf_modx.data import PairCollator
from hf_modx.demo import DEMO_DEFAULTS, DEMO_STREAMS, trained_base
from hf_modx.evaluation import EncodedPairs, Encoder
from hf_modx.pretrained import load_dual_encoder

from tiny import COLORS, tiny_pairs

# --- measures --------------------------------------------------------------------------------------------------------


def without_images(pairs, every):
    """Every so many rows have none."""
    return pairs.map(
        lambda row, number: row if number % every else {**row, "image": None},
        with_indices=True,
        features=pairs.features,
    )


def encoded(rows, noise, seed=0, first_id=0):
    """Images near their captions, more or less."""
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(rows, 16, generator=generator), dim=1)
    image = F.normalize(text + noise * torch.randn(rows, 16, generator=generator), dim=1)
    ids = torch.arange(rows) + first_id
    return EncodedPairs(image, text, ids, ids, torch.arange(rows))


def test_rows_that_a_perfect_model_keeps_are_all():
    assert rows_kept(encoded(64, 0.0), 16) == 1


def test_rows_kept_are_those_that_are_ranked_first_in_the_batch():
    pairs = encoded(40, 1.0)
    cosines = pairs.image @ pairs.text.T
    own = torch.arange(40)
    right = [(matrix.argmax(dim=1) == own).double().mean().item() for matrix in (cosines, cosines.T)]
    assert rows_kept(pairs, 40) == pytest.approx(mean(right)) == pytest.approx(rows_kept(pairs, 99))


def test_rows_kept_fall_with_the_batch_and_rise_with_old_pairs_that_the_model_knows():
    pairs = encoded(256, 1.0)
    kept = [rows_kept(pairs, size) for size in (16, 64, 256)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2] + 0.1
    assert rows_kept(pairs, 64, old=encoded(64, 0.0, seed=1, first_id=1000)) > kept[1] + 0.1


def test_rows_of_one_id_are_right_answers():
    pairs = encoded(64, 2.0)
    same = replace(pairs, image_ids=torch.zeros(64, dtype=torch.long), text_ids=torch.zeros(64, dtype=torch.long))
    assert rows_kept(same, 16) == 1 > rows_kept(pairs, 16)


def test_one_caption_of_several_is_drawn():
    pairs = encoded(32, 0.0)
    wrong = F.normalize(torch.randn(32, 16, generator=torch.Generator().manual_seed(5)), dim=1)
    texts = torch.stack([pairs.text, wrong], dim=1).flatten(0, 1)
    rows = torch.arange(32).repeat_interleave(2)
    assert 0.2 < rows_kept(EncodedPairs(pairs.image, texts, pairs.image_ids, rows, rows), 32) < 0.9


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"same_pair_id": "neutral"},
        {"mask_duplicates": True},
        {"pairs_in_batch": "together"},
        {"pairs_in_batch": "apart", "mask_duplicates": True},
    ],
    ids=str,
)
def test_rows_that_assess_counts_are_those_that_a_run_keeps(encoder, model, make_args, processor, flags):
    """Of the first epoch, in eight batches."""
    flags = dict(flags)
    pairs = tiny_pairs(48).remove_columns(["pair_id", "caption"])
    pairs = pairs.add_column("pair_id", [row // 4 for row in range(48)])
    pairs = pairs.add_column("caption", [f"a {COLORS[row % 5]} ring" for row in range(48)])
    args = make_args(per_device_train_batch_size=6, max_steps=8, seed=0, **flags)
    positives = flags.pop("same_pair_id", "positive") == "positive"
    found = assess(encoder, Phase("new", pairs), batch_size=6, positives=positives, **flags)
    trainer = ModXTrainer(model, args, train_dataset=pairs, processing_class=processor, loss_callbacks="modx")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "image_rows_kept" in entry]
    kept = mean(entry[f"{side}_rows_kept"] for entry in logged for side in ("image", "text"))
    assert len(logged) == 8 and found.kept[6] == pytest.approx(kept) and 0 < kept < 1


def test_samples_of_pairs_that_are_together_in_batches_hold_whole_groups(encoder):
    pairs = tiny_pairs(48).remove_columns("pair_id").add_column("pair_id", [row % 12 for row in range(48)])
    found = assess(encoder, Phase("new", pairs), batch_size=4, pairs_in_batch="together", sample=16)
    assert found.kept[4] == 1  # each batch is one group
    with pytest.raises(ValueError, match="to know which pairs belong together"):
        assess(encoder, Phase("new", pairs.remove_columns("pair_id")), batch_size=4, pairs_in_batch="together")


@pytest.fixture
def encoder(model, processor):
    return Encoder(model.eval(), PairCollator.for_model(model, processor), 16)


def test_the_same_pairs_as_new_and_as_old_show_no_shift(encoder):
    pairs = tiny_pairs(48)
    found = assess(encoder, Phase("new", pairs), Phase("old", pairs), batch_size=8)
    assert found.shift.image_distance == found.shift.text_distance == found.shift.recall_gap == 0
    assert found.shift.shared_images == 48
    assert found.shift.image_classifier <= 0.6


def test_old_pairs_of_the_same_name_are_not_mixed_up_with_the_new_ones(encoder):
    pairs = tiny_pairs(24)
    old = tiny_pairs(48, "yellow").remove_columns("pair_id").add_column("pair_id", [n // 2 for n in range(48)])
    flags = {"batch_size": 8, "pairs_in_batch": "apart"}
    found = [assess(encoder, Phase("march", pairs), Phase(name, old), **flags) for name in ("march", "february")]
    assert found[0] == found[1]


def test_other_pictures_are_told_apart_and_other_captions_not(encoder):
    found = assess(encoder, Phase("new", tiny_pairs(48, "yellow")), Phase("old", tiny_pairs(48)), batch_size=8)
    assert found.shift.image_classifier > 0.65 > 0.55 > found.shift.text_classifier
    assert found.shift.image_distance > 0 == found.shift.text_distance
    assert found.shift.shared_images == 0
    assert found.old_pairs == 48 and 0 <= found.kept_with_replay <= 1


def test_rows_that_share_something_are_counted_unless_they_have_one_id(encoder):
    doubled = concatenate_datasets([tiny_pairs(10), tiny_pairs(4)])
    assert assess(encoder, Phase("new", doubled), batch_size=4).duplicates == Duplicates(0, 0)
    nameless = doubled.remove_columns("pair_id")
    assert assess(encoder, Phase("new", nameless), batch_size=4).duplicates == Duplicates(8, 8)


def test_kept_rows_are_measured_at_the_planned_batch_and_two_others(encoder):
    test = tiny_pairs(12, "yellow")
    found = assess(encoder, Phase("new", tiny_pairs(40), test), batch_size=8)
    assert list(found.kept) == [2, 8, 32]
    assert found.tested_pairs == 12 and found.pairs == 40 and found.shift is None
    assert list(assess(encoder, Phase("new", tiny_pairs(20)), batch_size=64).kept) == [16, 64]


def test_a_few_real_steps_are_timed_and_leave_the_model_alone(model, make_args, processor):
    before = [weight.clone() for weight in model.parameters()]
    args = make_args(max_steps=-1, num_train_epochs=3)
    cost = measure_cost(model, processor, tiny_pairs(40), "modx_plus", args, old=tiny_pairs(20), timed_steps=2)
    assert cost.steps == 15
    assert cost.seconds == pytest.approx(15 * cost.seconds_a_step) and cost.seconds_a_step > 0
    assert cost.peak_bytes > 2**20
    assert all(torch.equal(*both) for both in zip(before, model.parameters(), strict=True))


def test_rows_that_cannot_be_used_are_not_timed(model, make_args, processor):
    bad = without_images(tiny_pairs(20), every=3)
    cost = measure_cost(model, processor, bad, "modx_plus", make_args(max_steps=-1), old=bad, timed_steps=2)
    assert cost.seconds > 0


# --- advice ----------------------------------------------------------------------------------------------------------


def measured(kept, with_replay=None, phase="march", recall=0.2, batch_size=128, old_pairs=0, **changes):
    fields = {
        "phase": phase,
        "pairs": 1000,
        "batch_size": batch_size,
        "zero_shot": {"image_to_text_recall@1": recall},
        "tested_pairs": 300,
        "kept": {batch_size: kept},
        "kept_with_replay": with_replay,
        "old_pairs": old_pairs,
        "duplicates": Duplicates(0, 0),
        "bad_share": 0.0,
        "shift": None,
    }
    return Assessment(**{**fields, **changes})


@pytest.mark.parametrize(
    ("found", "recipe", "words"),
    [
        (measured(0.97), "frozen", "frozen model is good enough"),
        (measured(0.6), "modx", "Mod-X will hold"),
        (measured(0.6, 0.62, old_pairs=500), "modx", "60 % of the rows of march in a batch of 128"),
        (measured(0.2, 0.3, old_pairs=4000), "modx_plus", "little to keep here.* from 200 old pairs, with which 30 %"),
        (measured(0.01, 0.2, old_pairs=400), "modx_plus", "nothing to keep here.*add replay.* from 32 old pairs"),
        (measured(0.01), "modx_plus", "nothing to keep here.*from old pairs or from public ones.*try kl"),
    ],
)
def test_advice_follows_from_the_rows_that_hold(found, recipe, words):
    advice = advise(found)
    assert advice.recipe == recipe
    assert re.search(words, advice.sentence)
    start = "Start with alpha {} for a reference_batch_size of 128"
    assert start.format("0.02" if recipe == "modx_plus" else "2") in advice.sentence or advice.alpha is None


def test_a_run_has_the_recipe_of_its_hardest_phase():
    advice = advise([measured(0.6, 0.6, "easy", old_pairs=9), measured(0.02, 0.2, "hard", old_pairs=9)])
    assert advice.recipe == "modx_plus" and "of hard in" in advice.sentence


def test_what_is_good_enough_can_be_said():
    phases = [measured(0.6, recall=0.5), measured(0.5, recall=0.3)]
    assert advise(phases, target_recall=0.3).recipe == "frozen"
    assert advise(phases, target_recall=0.4).recipe == "modx"
    with pytest.raises(ValueError, match=r"target_recall must be in \[0, 1\]"):
        advise(phases, target_recall=30)


@pytest.mark.parametrize(("kept", "alpha"), [(0.6, 2), (0.01, 0.02)])
def test_the_advised_options_are_those_of_the_recipe(kept, alpha):
    advice = advise(measured(kept, batch_size=512))
    modx = build_recipe(advice.recipe, alpha=advice.alpha, reference_batch_size=advice.reference_batch_size)[0]
    assert (modx.alpha, modx.reference_batch_size) == (alpha, 128)


def test_notes_tell_of_duplicates_bad_samples_and_pairs_that_are_alike():
    alike = Shift(0.01, 0.01, 0.5, 0.5, 0.0, 3)
    notes = advise(measured(0.6, duplicates=Duplicates(200, 50), bad_share=0.1, shift=alike)).notes
    expected = [
        "mask_duplicates",
        "one pair id",
        "bad_samples='skip'",
        "3 of its images",
        "no recipe will forget much",
    ]
    assert [word in note for word, note in zip(expected, notes, strict=True)] == [True] * 5
    assert advise(measured(0.6)).notes == []
    assert advise(measured(0.6, duplicates=Duplicates(200, 0), mask_duplicates=True)).notes == []


# What `hf-modx assess --sample 512` says to a base of seed 0 (1,000 steps; 350 of the instance stream) about the
# phases of the built-in streams: phase -> rows kept at a batch of 128, alone and with replay.
BUILT_IN = {
    "domain": {"mosaic": (0.372, 0.378), "pastel": (0.208, 0.260), "popart": (0.121, 0.209)},
    "instance": {"part_1": (0.033, 0.156), "part_2": (0.033, 0.159), "part_3": (0.048, 0.166)},
    "class": {"smileys_people": (0.016, 0.216), "animals_food": (0.014, 0.218), "travel_activities": (0.008, 0.214)},
}
MEASURES = Path(__file__).resolve().parents[1] / "model_cards" / "measures.csv"


@pytest.mark.parametrize("stream", BUILT_IN)
def test_recipes_are_ranked_as_the_study_on_the_built_in_streams_ranks_them(stream):
    last: dict[str, list[float]] = {}
    with open(MEASURES, newline="") as file:
        for row in csv.DictReader(file):
            if row["stream"] == stream and row["metric"] == "image_to_text_recall@1":
                last.setdefault(row["recipe"], []).append(float(row["last"]))
    advice = advise([measured(*kept, phase, old_pairs=3000) for phase, kept in BUILT_IN[stream].items()])
    assert advice.ranking == sorted(advice.ranking, key=lambda name: -mean(last[name])) != []
    assert advice.recipe == advice.ranking[0]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, model, processor):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    parts = {"may_train": tiny_pairs(24, "yellow"), "may_test": tiny_pairs(9, "yellow", shift=1)}
    DatasetDict({**parts, "june_train": tiny_pairs(20, "yellow", start=24)}).save_to_disk(tmp_path / "new")
    DatasetDict(train=tiny_pairs(20), test=tiny_pairs(12, shift=1)).save_to_disk(tmp_path / "old")
    return tmp_path


def test_command_says_what_it_has_measured_as_json(saved, capsys):
    options = ["--old", str(saved / "old"), "--batch_size", "8", "--timed_steps", "1", "--json"]
    assert main(["assess", str(saved / "model"), str(saved / "new"), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(phase["phase"], phase["pairs"], phase["tested_pairs"]) for phase in found["phases"]] == [
        ("may", 24, 9),
        ("june", 20, 20),
    ]
    assert found["advice"]["recipe"] == "modx_plus" and found["advice"]["memory_pairs"] == 2
    assert found["cost"]["steps"] == 9


def test_command_prints_a_table_and_the_advice(saved, capsys):
    options = ["--phase", "june", "--batch_size", "8", "--timed_steps", "0"]
    assert main(["assess", str(saved / "model"), str(saved / "new"), *options]) == 0
    out = capsys.readouterr().out
    assert "| pairs to learn | 20 |" in out and "add replay" in out and "may" not in out.split("\n")[0]
    assert "told apart" not in out  # there are no old pairs


@pytest.mark.parametrize(
    ("options", "same_pair_id"),
    [([], "neutral"), (["--same_pair_id", "positive", "--mask_duplicates", "--pairs_in_batch", "apart"], "positive")],
)
def test_built_in_streams_are_planned_as_they_are_trained(options, same_pair_id):
    args = planned(make_parser().parse_args(["assess", "demo", "demo:class", *options]), is_demo=True)
    assert (args.same_pair_id, args.contrastive_batch_size) == (same_pair_id, 128)
    assert (args.mask_duplicates, args.pairs_in_batch) == ((True, "apart") if options else (False, "any"))


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [([], 200, 3), (["--num_train_epochs", "2"], -1, 2), (["--num_train_epochs", "2", "--max_steps", "9"], 9, 2)],
)
def test_epochs_that_are_asked_for_take_the_place_of_a_built_in_stream_s_steps(options, steps, epochs):
    args = planned(make_parser().parse_args(["assess", "demo", "demo:class", *options]), is_demo=True)
    assert (args.max_steps, args.num_train_epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("new", ["--sample", "0"], "A sample of 0 rows shows nothing"),
        ("new", ["--phase", "July"], "There is no phase July. The phases are: may, june"),
        ("new", ["--pair_id_column", "product"], r"no column 'product' \(pair_id_column\)"),
        ("demo:new", [], "'new'.*class"),
    ],
)
def test_command_names_what_it_does_not_find(saved, capsys, data, options, message):
    place = data if ":" in data else str(saved / data)
    assert main(["assess", str(saved / "model"), place, *options]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_advice_on_a_built_in_stream_names_the_better_recipe(make_args):
    phases = DEMO_STREAMS["class"](0)
    args = make_args(**{**DEMO_DEFAULTS, "image_augmentation": "none"})
    folder = trained_base(phases, args, 60)
    model, processor = load_dual_encoder(folder)
    encoder = Encoder(model, PairCollator.for_model(model, processor), 128)
    found = [assess(encoder, phase, phases.base, batch_size=128, positives=False, sample=512) for phase in phases]
    advice = advise(found)
    assert advice.recipe == advice.ranking[0] == "modx_plus"  # what the study finds
    assert advice.held["modx_plus"] > advice.held["modx"] > 0
