"""An old index under a new model: asked as it stands, turned, and built anew."""

import copy
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from test_callbacks import context_of, random_pairs
from test_disorder import finish, turn, unit
from transformers import CLIPModel

from hf_modx import ContinualRun, Contrastive, ModXTrainer, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.callbacks import Anchor
from hf_modx.cli import main
from hf_modx.cli.index_check import advice
from hf_modx.data import PairCollator, PairDataset
from hf_modx.evaluation import EncodedPairs, cross_phase_metrics, encode_pairs, retrieval_metrics
from hf_modx.evaluation.cross_phase import index_recalls
from hf_modx.evaluation.suite import ZeroShotTest
from hf_modx.index import IndexAlignment, align_index
from hf_modx.losses import anchor_loss
from hf_modx.report import read_run
from hf_modx.report.tables import compare
from hf_modx.report.writing import default_metrics
from hf_modx.run.cross_phase import RunCrossPhase

from test_continual import TESTS, make_stream
from tiny import tiny_clip, tiny_pairs

sys.path[:0] = [str(TESTS.parent / "examples" / "study")]

import index as study_index  # noqa: E402


def rotation(dim=8):
    return turn(dim, degrees=70).float()


def test_known_rotation_is_found_and_may_turn_the_queries_in_the_place_of_the_index():
    old, queries = unit(50), unit(5, seed=1)
    found = IndexAlignment.fit(old, old @ rotation())
    assert torch.allclose(found.rotation, rotation(), atol=1e-5) and found.pairs == 50
    assert torch.allclose(found.turn_index(old), old @ rotation(), atol=1e-5)
    assert torch.allclose(found.turn_queries(queries) @ old.T, queries @ found.turn_index(old).T, atol=1e-5)


def test_directions_that_no_sample_shows_stay_as_they_are():
    old = torch.eye(8)[:3]
    new = old[[1, 0, 2]]
    found = IndexAlignment.fit(old, new)
    assert torch.allclose(found.rotation @ found.rotation.T, torch.eye(8), atol=1e-5)
    assert torch.allclose(found.turn_index(old), new, atol=1e-5)
    assert torch.allclose(found.turn_index(torch.eye(8)[3:]), torch.eye(8)[3:], atol=1e-5)


def test_map_is_fitted_in_tiles_with_the_same_result(monkeypatch):
    old, new = unit(50), unit(50, seed=1)
    whole = IndexAlignment.fit(old, new)
    monkeypatch.setattr("hf_modx.index.TILE", 7)
    assert torch.allclose(IndexAlignment.fit(old.numpy(), new.numpy()).rotation, whole.rotation, atol=1e-6)


def test_map_comes_back_from_its_file(tmp_path):
    found = IndexAlignment.fit(unit(9), unit(9, seed=1))
    found.save(tmp_path / "map.safetensors")
    again = IndexAlignment.load(tmp_path / "map.safetensors")
    assert torch.equal(again.rotation, found.rotation) and again.pairs == 9


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), r"\(3, 2\) and \(4, 2\)"),
        (torch.ones(0, 2), torch.ones(0, 2), "same samples"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), "not finite"),
    ],
)
def test_samples_that_fit_no_map_are_refused(old, new, named):
    with pytest.raises(ValueError, match=named):
        IndexAlignment.fit(old, new)


# ---- Indexes of all kinds ----


@pytest.fixture
def alignment():
    return IndexAlignment(rotation(), 50)


@pytest.fixture
def table():
    """An index of 20 rows as a data set."""
    features = Features({"name": Value("string"), "embeddings": List(Value("float32"))})
    return Dataset.from_dict({"name": list("abcdefghijklmnopqrst"), "embeddings": unit(20).tolist()}, features)


def test_data_set_is_turned_in_batches_and_all_else_in_it_stays(table, alignment, tmp_path):
    turned = align_index(table, alignment, batch_size=7)
    turned.save_to_disk(tmp_path / "index")
    again = load_from_disk(tmp_path / "index")
    assert again.features == table.features and again["name"] == table["name"] and again.format == table.format
    assert np.allclose(again["embeddings"], unit(20) @ rotation(), atol=1e-6)
    assert np.allclose(table["embeddings"], unit(20)), "what was given stays"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_array_keeps_its_type(alignment, dtype):
    index = unit(20).numpy().astype(dtype)
    turned = align_index(index, alignment)
    assert turned.dtype == dtype and np.allclose(turned, unit(20) @ rotation(), atol=2e-3)


def test_index_that_the_map_is_not_for_is_refused(table, alignment):
    with pytest.raises(ValueError, match=r"shape \(N, 8\), got \(3, 4\)"):
        align_index(torch.ones(3, 4), alignment)
    with pytest.raises(ValueError, match="The index has no column 'vectors'"):
        align_index(table, alignment, column="vectors")


def test_faiss_index_of_a_turned_data_set_finds_what_the_new_model_asks_for(table, alignment):
    queries = (unit(20) @ rotation()).numpy()
    turned = align_index(table, alignment)
    turned.add_faiss_index("embeddings")
    found = turned.get_nearest_examples_batch("embeddings", queries, k=1).total_examples
    assert [examples["name"][0] for examples in found] == list(table["name"])
    with pytest.raises(ValueError, match="embeddings are attached.*drop_index"):
        align_index(turned, alignment)


# ---- Retrieval across phases ----


def recalls(metrics):
    return {name.removeprefix("cross_phase_"): value for name, value in metrics.items()}


def test_two_models_that_are_one_find_what_it_finds():
    image, text = unit(40), F.normalize(unit(40) + 0.8 * unit(40, seed=1), dim=1)
    same = EncodedPairs.of_pairs(image, text)
    found = recalls(cross_phase_metrics(same, same))
    alone = retrieval_metrics(image, text, same.image_ids, same.text_ids)
    assert found == {name: alone[name] for name in found} and len(found) == 6
    assert found["image_to_text_recall@1"] != found["text_to_image_recall@1"]


def test_rotation_of_both_towers_is_lost_on_an_old_index_until_it_is_turned(alignment):
    image, text = unit(40), F.normalize(unit(40) + 0.3 * unit(40, seed=1), dim=1)
    index, queries = EncodedPairs.of_pairs(image, text), EncodedPairs.of_pairs(image @ rotation(), text @ rotation())
    stale, rebuilt = cross_phase_metrics(index, queries), cross_phase_metrics(queries, queries)
    turned = EncodedPairs.of_pairs(alignment.turn_index(image), alignment.turn_index(text))
    assert cross_phase_metrics(turned, queries) == rebuilt
    expected = {"before": rebuilt, "stale": stale, "realigned": rebuilt, "rebuilt": rebuilt}
    assert index_recalls(index, queries, alignment, alignment) == expected
    assert stale["cross_phase_text_to_image_recall@1"] < 0.5 < rebuilt["cross_phase_text_to_image_recall@1"]


def test_index_of_other_samples_is_refused():
    pairs = EncodedPairs.of_pairs(unit(4), unit(4))
    with pytest.raises(ValueError, match="same samples"):
        cross_phase_metrics(pairs, EncodedPairs.of_pairs(unit(5), unit(5)))


# ---- The anchor ----


def test_anchor_is_the_mean_squared_distance_with_its_gradient():
    student, _ = random_pairs(6, 5, seed=0, log_scale=1.0)
    teacher, _ = random_pairs(6, 5, seed=7, log_scale=1.0)
    terms = Anchor(weight=3.0).loss_terms(student, teacher, context_of(6))
    cosines = [(new * old).sum(dim=1) for new, old in ((student.image, teacher.image), (student.text, teacher.text))]
    assert terms["anchor"].item() == pytest.approx(3 * (2 - 2 * torch.cat(cosines).mean().item()), rel=1e-12)
    terms["anchor"].backward()
    assert torch.allclose(student.image.grad, 3 * (student.image - teacher.image).detach() / 6, atol=1e-12)
    assert teacher.image.grad is None


def test_embeddings_stay_nearer_with_the_anchor(processor, pairs, make_args):
    moved = {}
    for weight in (0.0, 50.0):
        anchor = Anchor(weight)
        args = make_args(learning_rate=3e-3, warmup_steps=0, lr_scheduler_type="constant")
        trainer = ModXTrainer(
            tiny_clip(processor), args, train_dataset=pairs, processing_class=processor,
            loss_callbacks=[Contrastive(), anchor],
        )  # fmt: skip
        trainer.train()
        *_, moved[weight] = [entry["anchor_distance"] for entry in trainer.state.log_history if "anchor" in entry]
    assert 0 < moved[50.0] < moved[0.0] / 3


def test_anchor_needs_one_width_and_a_weight_that_is_not_negative():
    with pytest.raises(ValueError, match=r"\(3, 8\) of the new and \(3, 4\) of the old"):
        anchor_loss(unit(3), unit(3), unit(3, 4), unit(3, 4))
    with pytest.raises(ValueError, match="got -1"):
        Anchor(-1)


# ---- hf-modx index-check ----


@pytest.fixture(scope="module")
def place(processor, tmp_path_factory):
    """Data with training and test split, and three models: `old`, `new`, and `turned`, which is the old one with one
    rotation behind both towers."""
    place = tmp_path_factory.mktemp("place")
    data = DatasetDict(may_train=tiny_pairs(32), may_test=tiny_pairs(16, shift=1, start=32))
    data.save_to_disk(place / "data")
    old = tiny_clip(processor)
    args = ModXTrainingArguments(
        str(place), max_steps=30, learning_rate=5e-3, per_device_train_batch_size=24, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    ModXTrainer(old, args, train_dataset=tiny_pairs(48), processing_class=processor, loss_callbacks="finetune").train()
    models = {"old": old, "new": tiny_clip(processor, seed=1), "turned": copy.deepcopy(old)}
    for projection in (models["turned"].visual_projection, models["turned"].text_projection):
        projection.weight.data = rotation(16).T @ projection.weight.data
    for name, model in models.items():
        model.save_pretrained(place / name)
        processor.save_pretrained(place / name)
    return place


@pytest.fixture
def check(place, capsys):
    """What the command says of two of the models."""

    def check(old, new, *flags, status=0):
        argv = ["index-check", place / old, place / new, "--dataset_name", place / "data", *flags]
        assert main([str(argument) for argument in argv]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return check


def test_index_of_a_model_that_has_only_turned_is_to_be_realigned(check, place, tmp_path):
    out, file = tmp_path / "new" / "values.json", tmp_path / "map.safetensors"
    text = check("old", "turned", "--output_file", out, "--save_map", file)
    for line, of in zip(text.splitlines()[-2:], ("images", "texts"), strict=True):
        assert line.startswith(f"Re-align the index of {of}: turned by one orthogonal map it loses 0.0 points")
    report = json.loads(out.read_text())
    found = report["values"]["may_test"]
    assert found["realigned"] == found["rebuilt"] == found["before"]
    assert (report["fitted_on"], report["test_pairs"]) == (32, {"may_test": 16})
    assert torch.allclose(IndexAlignment.load(file).rotation, rotation(16), atol=1e-3)
    assert f"| {100 * found['stale']['cross_phase_text_to_image_recall@5']:.1f} |" in text


def test_index_of_the_same_model_is_to_be_kept(check):
    report = json.loads(check("old", "old", "--json"))
    assert report["advice"]["images"].startswith("Keep the index of images: as it stands it loses 0.0 points")


@pytest.mark.parametrize(
    ("stale", "realigned", "said"),
    [
        (0.495, 0.5, "Keep the index of texts: as it stands it loses 0.5 points (recall@1 as it stands 49.5 %"),
        (0.6, 0.7, "Keep the index of texts: rebuilt it would lose 10.0 points"),
        (
            0.3,
            0.52,
            "Re-align the index of texts: turned by one orthogonal map it loses 0.0 points, as it stands 20.0",
        ),
        (0.3, 0.48, "Rebuild the index of texts: as it stands it loses 20.0 points, re-aligned 2.0"),
    ],
)
def test_advice_is_the_cheapest_way_that_keeps_the_recall_of_this_index(stale, realigned, said):
    def tests(of_one, of_other):
        return {"cross_phase_text_to_image_recall@1": 0.9, "cross_phase_image_to_text_recall@1": (of_one + of_other)}

    found = {"stale": stale, "realigned": realigned, "rebuilt": 0.5}
    values = {
        test: {how: tests(value, more) for how, value in found.items()} for test, more in (("a", 0.1), ("b", -0.1))
    }
    assert advice(values, "texts", 0.01).startswith(said)
    assert advice(values, "images", 0.01).startswith("Keep the index of images: as it stands it loses 0.0 points")


def test_half_of_a_test_fits_the_maps_where_there_is_no_training_split(place, tmp_path, capsys):
    tests = [{"name": "may", "kind": "retrieval", "dataset": str(place / "data"), "split": "may_test"}]
    (tmp_path / "tests.yaml").write_text(json.dumps(tests))
    argv = ["index-check", place / "old", place / "new", "--tests", tmp_path / "tests.yaml", "--json"]
    assert main([str(argument) for argument in argv]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["fitted_on"], report["test_pairs"]) == (8, {"may": 8})


def test_wrong_index_checks_end_with_the_reason(check):
    assert "Splits beside the tests: may_train." in check("old", "new", "--fit_split", "may_test", status=1)
    assert "--tolerance must be in [0, 1), got 2" in check("old", "new", "--tolerance", "2", status=1)
    assert "--fit_samples must be at least 1" in check("old", "new", "--fit_samples", "0", status=1)


# ---- In a run ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two phases that was asked for retrieval across phases only in its second start."""
    folder = str(tmp_path_factory.mktemp("run") / "out")
    settings = {
        "per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "spatial_disorder": False,
    }  # fmt: skip
    finish(ModXTrainingArguments(folder, **settings), make_stream(1))
    return finish(ModXTrainingArguments(folder, **settings, cross_phase=True), make_stream(2))


def test_every_test_is_asked_from_its_phase_on_and_first_with_its_own_recall(finished):
    matrix = finished[1]["matrix"]
    across, alone = (matrix[f"{prefix}text_to_image_recall@1"] for prefix in ("cross_phase_", ""))
    assert [[value is not None for value in row] for row in across] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert [across[k][k] for k in range(3)] == [alone[k][k] for k in range(3)]
    assert finished[1]["summary"]["cross_phase_text_to_image_recall@1"]["forgetting"] is not None


def test_recall_across_phases_is_that_of_the_two_models(finished, processor):
    run, results = finished
    test = PairDataset(make_stream(2).tests()["part 0"][0], "image", "caption", "pair_id")
    index, queries = (
        encode_pairs(
            CLIPModel.from_pretrained(run.phase_folder(k)).eval(), test, PairCollator(processor), batch_size=8
        )
        for k in (0, 2)
    )
    for metric, value in cross_phase_metrics(index, queries).items():
        assert results["matrix"][metric][2][0] == pytest.approx(value), metric


def test_card_shows_the_kept_index_and_its_metadata_only_what_the_model_does_alone(finished):
    card = (finished[0].phase_folder(2) / "README.md").read_text()
    assert "where an index is kept" in card and "| Cross-phase text-to-image recall@1 |" in card
    assert "cross_phase" not in card.partition("\n---\n")[0]
    assert "hold them at full precision, but for those across phases." in card


def test_report_compares_the_kept_indexes_where_all_runs_have_one(finished):
    run = read_run(finished[0].folder)
    assert default_metrics({"finetune": [run]})[-1] == "cross_phase_text_to_image_recall@1"
    assert "part 0, end" in compare({"finetune": [run]}, "cross_phase_text_to_image_recall@1").header
    without = replace(run, results={**run.results, "matrix": {"image_to_text_recall@1": [[0.5] * 3] * 3}})
    assert default_metrics({"finetune": [run], "modx": [without]}) == ["image_to_text_recall@1"]


def test_tests_of_labels_have_no_index(model, processor, make_args):
    table = make_stream(1).phases[0].test.remove_columns(["caption", "pair_id"]).add_column("label", [0, 1, 0])
    tests = {"shapes": ZeroShotTest(table, class_names=["circle", "square"], learned_at=1)}
    stream, args = PhaseStream((Phase("part 1", tiny_pairs(9)),)), make_args(max_steps=2, cross_phase=True)
    run = ContinualRun(stream, "finetune", args, model=model, processing_class=processor, tests=tests)
    run.run()
    assert "zero_shot_top1" in run.metrics
    assert not [metric for metric in run.metrics if metric.startswith("cross_phase")]


def test_index_of_a_model_that_is_gone_cannot_be_asked(caplog):
    def gone(number, test):
        raise FileNotFoundError("phase-0 is not there any more.")

    row = {"may": {}}
    RunCrossPhase(gone).complete(1, row, {"may": None})
    assert row == {"may": {}} and "The index of 'may' cannot be asked. phase-0 is not there" in caplog.text


def test_phase_that_is_gone_gets_no_card(make_args):
    run, _ = finish(make_args(max_steps=2), make_stream(1))
    shutil.rmtree(run.phase_folder(1))
    _, results = finish(make_args(max_steps=2, cross_phase=True), make_stream(1))
    assert results["matrix"]["cross_phase_text_to_image_recall@1"][1][1] is not None
    assert not run.phase_folder(1).exists()


# ---- In the study ----


def test_turning_back_mends_towers_that_have_turned_against_each_other():
    ids = torch.arange(50)
    old = EncodedPairs(unit(50), unit(50) + 0.1 * unit(50, seed=1), ids, ids, ids)
    new = replace(old, image=old.image @ rotation())
    maps = [IndexAlignment.fit(getattr(old, side), getattr(new, side)) for side in ("image", "text")]
    before, rebuilt, back = (
        cross_phase_metrics(pairs, pairs)["cross_phase_text_to_image_recall@1"]
        for pairs in (old, new, study_index.turned_back(new, *maps))
    )
    assert before > 0.9 and rebuilt < 0.5 and back == before


def test_study_tells_of_runs_that_are_there_and_measures_them_once(finished, tmp_path, monkeypatch, capsys):
    run, results = finished
    monkeypatch.setattr(study_index, "DEMO_STREAMS", {"domain": lambda seed: make_stream(2)})
    (tmp_path / "study" / "domain").mkdir(parents=True)
    (tmp_path / "study" / "domain" / "finetune-seed42").symlink_to(run.folder)
    study_index.main([str(tmp_path / "study"), "--output_dir", str(tmp_path)])
    file = tmp_path / "index" / "domain" / "finetune-seed42.json"
    first, *_, last = json.loads(file.read_text())
    assert (first["old"], first["new"], first["fitted_on"]) == (0, 1, 9) and (last["old"], last["new"]) == (0, 2)
    across = results["matrix"]["cross_phase_text_to_image_recall@1"]
    assert last["values"]["stale"]["cross_phase_text_to_image_recall@1"] == pytest.approx(across[2][0])
    assert "| after one phase | text to image | finetune | 42 |" in (tmp_path / "index.md").read_text()
    monkeypatch.setattr(study_index, "measured", lambda *args: 1 / 0)
    study_index.main([str(tmp_path / "study"), "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="no finished runs"):
        study_index.main([str(tmp_path)])
