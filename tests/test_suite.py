"""Tests of labels and tests declared in a file: against straightforward computation, alone, in processes, in a run."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub import ModelCard
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler

from hf_modx import ContinualRun, Contrastive, ModXTrainer, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.data import PairCollator
from hf_modx.evaluation import (
    Encoder,
    LinearProbeTest,
    RetrievalTest,
    ZeroShotTest,
    linear_probe_accuracy,
    load_tests,
    per_class_top1,
    zero_shot_metrics,
)
from hf_modx.evaluation.linear_probe import PENALTIES

from card_schema import card_problems
from launch import launch
from tiny import COLORS, SHAPES, picture, tiny_clip, tiny_pairs, tiny_processor

TEMPLATES = ("a {}", "one {} in red", "{}")


def labelled(rows=48, shift=0, column="label") -> Dataset:
    """Shapes in every colour, with the shape as label."""
    kinds = [(COLORS[i % len(COLORS)], i // len(COLORS) % len(SHAPES)) for i in range(rows)]
    return Dataset.from_dict(
        {
            "image": [picture(color, SHAPES[shape], shift=shift) for color, shape in kinds],
            column: [s for _, s in kinds],
        },
        features=Features({"image": Image(), column: ClassLabel(names=SHAPES)}),
    )


@pytest.fixture
def encoder(model, processor):
    return Encoder(model.eval(), PairCollator(processor), batch_size=7)


def straightforward_top(model, processor, table, names, templates, k):
    """Every prompt and every image in one forward pass each."""
    with torch.no_grad():
        inputs = processor(images=list(table["image"]), return_tensors="pt")
        images = F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
        classes = []
        for name in names:
            tokens = processor(text=[t.replace("{}", name) for t in templates], padding=True, return_tensors="pt")
            texts = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            classes.append(F.normalize(texts.mean(dim=0), dim=0))
    nearest = (images @ torch.stack(classes).T).topk(k, dim=1).indices
    return (nearest == torch.tensor(list(table["label"]))[:, None]).any(dim=1)


@pytest.mark.parametrize("templates", [TEMPLATES[:1], TEMPLATES])
def test_zero_shot_equals_the_straightforward_computation(encoder, model, processor, templates):
    table = labelled()
    metrics = ZeroShotTest(table, templates=templates).measure(encoder)
    right = straightforward_top(model, processor, table, SHAPES, templates, 1)
    assert metrics["zero_shot_top1"] == pytest.approx(right.double().mean().item())
    top5 = straightforward_top(model, processor, table, SHAPES, templates, 5)
    assert metrics["zero_shot_top5"] == pytest.approx(top5.double().mean().item())
    assert 0 < metrics["zero_shot_top1"] < metrics["zero_shot_top5"] < 1
    assert metrics["zero_shot_mean_per_class"] == pytest.approx(right.double().view(6, 8).mean().item())


def test_mean_per_class_weighs_every_class_that_occurs_alike():
    classes, labels = torch.eye(3), torch.tensor([0, 0, 0, 1])
    images = torch.eye(3)[[0, 0, 1, 1]]
    assert zero_shot_metrics(images, classes, labels)["zero_shot_top1"] == 0.75
    assert zero_shot_metrics(images, classes, labels)["zero_shot_mean_per_class"] == pytest.approx((2 / 3 + 1) / 2)
    shares = per_class_top1(images, classes, labels)
    assert shares[:2].tolist() == pytest.approx([2 / 3, 1]) and shares[2].isnan()


def test_accuracy_of_each_class_stands_beside_the_metrics(encoder, model, processor):
    table = labelled().filter(lambda row: row["label"] != 2)
    measured = ZeroShotTest(table, templates=TEMPLATES[:1]).measured(encoder)
    right = straightforward_top(model, processor, table, SHAPES, TEMPLATES[:1], 1).double().view(5, 8).mean(dim=1)
    assert measured.per_class[2] is None
    assert [share for share in measured.per_class if share is not None] == pytest.approx(right.tolist())


def test_classes_of_the_same_text_are_never_told_apart():
    classes = torch.eye(3)[[0, 0, 1]]
    metrics = zero_shot_metrics(torch.eye(3)[[0, 0, 1]], classes, torch.tensor([0, 1, 2]))
    assert metrics["zero_shot_top1"] == pytest.approx(1 / 3)


def test_string_labels_and_labels_of_names_count_alike(encoder):
    names = {shape: f"{shape} in blue" for shape in SHAPES}
    by_number = labelled()
    by_name = by_number.cast_column("label", Value("string")).remove_columns("label")
    by_name = by_name.add_column("label", [SHAPES[number] for number in by_number["label"]])
    plain_numbers = by_number.cast_column("label", Value("int64"))
    expected = ZeroShotTest(by_number, class_names=list(names.values())).measure(encoder)
    assert ZeroShotTest(by_number, class_names=names).measure(encoder) == expected
    assert ZeroShotTest(by_name, class_names=names).measure(encoder) == expected
    assert ZeroShotTest(plain_numbers, class_names=list(names.values())).measure(encoder) == expected
    assert ZeroShotTest(by_name).measure(encoder) == ZeroShotTest(by_number).measure(encoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "shape"}, r"no column 'shape' \(label_column\)"),
        ({"class_names": SHAPES[:5]}, "6 classes and class_names 5"),
        ({"class_names": {"circle": "a circle"}}, "do not fit"),
        ({"class_names": "circle"}, "must be a list"),
        ({"templates": ["a photo"]}, "needs a place {}"),
        ({"templates": "a {}"}, "needs a place {}"),
    ],
)
def test_wrong_options_of_a_label_test_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotTest(labelled(8), **options)


def test_labels_of_no_class_are_named():
    table = labelled(3).remove_columns("label").add_column("label", ["ring", "star", None])
    with pytest.raises(ValueError, match=r"2 labels of no class: 'star' \(row 1\), None \(row 2\)"):
        ZeroShotTest(table, class_names=SHAPES)
    with pytest.raises(ValueError, match="holds int64 and no names"):
        ZeroShotTest(labelled(3).cast_column("label", Value("int64")))


def test_image_that_is_null_is_named(encoder):
    table = Dataset.from_dict(
        {"image": [None], "label": ["ring"]}, features=Features(image=Image(), label=Value("string"))
    )
    with pytest.raises(ValueError, match=r"rows \[0\] is null"):
        ZeroShotTest(table, class_names=SHAPES).measure(encoder)


def features(rows, seed, width=12, classes=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 2 * torch.randn(rows, width, generator=generator), labels


@pytest.mark.parametrize("rows", [10, 60, 300])  # fewer rows than features, and more
def test_linear_probe_is_the_ridge_classifier_of_scikit_learn(rows):
    train, train_labels = features(rows, 0)
    test, test_labels = features(500, 1)
    scale = StandardScaler().fit(train.double().numpy())
    ridge = RidgeClassifierCV(alphas=PENALTIES).fit(scale.transform(train.double().numpy()), train_labels.numpy())
    expected = ridge.score(scale.transform(test.double().numpy()), test_labels.numpy())
    assert linear_probe_accuracy(train, train_labels, test, test_labels) == pytest.approx(expected)
    assert 0.3 < expected < 0.99


def test_feature_that_never_changes_and_class_that_was_not_learned():
    train, train_labels = features(60, 0)
    train[:, 3] = 5.0
    assert linear_probe_accuracy(train, train_labels, train, torch.full((60,), 7)) == 0


def test_two_rows_of_two_classes_are_enough_for_a_linear_probe():
    labels = torch.tensor([3, 5])
    assert linear_probe_accuracy(torch.eye(2), labels, torch.eye(2), labels) == 1


def test_what_a_probe_learns_from_decides_its_measures():
    fingerprints = {LinearProbeTest(labelled(6), train=labelled(rows)).fingerprint() for rows in (20, 20, 21)}
    assert len(fingerprints) == 2 and None not in fingerprints


def test_linear_probe_needs_two_classes():
    with pytest.raises(ValueError, match="needs two classes"):
        linear_probe_accuracy(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3))


def test_linear_probe_reads_the_vision_tower_before_the_projection(encoder, model, processor):
    table = labelled(10)
    inputs = processor(images=list(table["image"]), return_tensors="pt")
    with torch.no_grad():
        expected = model.vision_model(**inputs).pooler_output
    assert torch.allclose(encoder.vision_features(table.select_columns(["image"])), expected, atol=1e-5)


def test_linear_probe_learns_shapes_from_other_pictures(encoder):
    probe = LinearProbeTest(labelled(48, shift=2), train=labelled(48))
    assert probe.measure(encoder)["linear_probe_top1"] > 0.3  # 1 in 6 by chance


def save_measures(folder):
    processor = tiny_processor()
    encoder = Encoder(tiny_clip(processor).eval(), PairCollator(processor), batch_size=5)
    tests = [
        ZeroShotTest(labelled(41), templates=TEMPLATES),
        LinearProbeTest(labelled(41, shift=2), train=labelled(48)),
        ZeroShotTest(labelled(9).filter(lambda row: row["label"] == 0).select([0])),  # fewer rows than processes
    ]
    (folder / f"{dist.get_rank() if dist.is_initialized() else 'alone'}.json").write_text(
        json.dumps([test.measure(encoder) for test in tests])
    )


def test_processes_get_the_metrics_of_one(tmp_path):
    save_measures(tmp_path)
    launch(2, save_measures, tmp_path)
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", 0, 1))
    assert first == second
    for own, shared in zip(alone, first, strict=True):
        assert shared == pytest.approx(own)


def test_trainer_evaluates_tests_of_labels_beside_retrieval(model, processor, make_args, pairs):
    zero_shot = ZeroShotTest(labelled(16))
    trainer = ModXTrainer(
        model, make_args(), train_dataset=pairs, eval_dataset={"pairs": pairs, "shapes": zero_shot},
        processing_class=processor, loss_callbacks=[Contrastive()],
    )  # fmt: skip
    metrics = trainer.evaluate()
    encoder = Encoder(model, PairCollator(processor), batch_size=16)
    assert metrics["eval_shapes_zero_shot_top1"] == zero_shot.measure(encoder)["zero_shot_top1"]
    assert "eval_pairs_image_to_text_recall@1" in metrics


# ---- Declared in a file ----


@pytest.fixture
def declare(tmp_path):
    """Writes a list of tests to a file; data sets are saved and named by their folder."""

    def declare(*entries):
        for number, entry in enumerate(entries):
            if isinstance(entry.get("dataset"), Dataset | DatasetDict):
                entry["dataset"].save_to_disk(tmp_path / f"data-{number}")
                entry["dataset"] = str(tmp_path / f"data-{number}")
        path = tmp_path / "tests.yaml"
        path.write_text(yaml.safe_dump(list(entries)))
        return path

    return declare


def test_pair_ids_that_are_not_declared_are_named(declare, caplog):
    """A stream's own tests count rows of one id as right answers without being told."""
    entry = {"name": "pairs", "kind": "retrieval", "dataset": tiny_pairs(4)}
    load_tests(declare({**entry, "pair_id_column": "pair_id"}))
    load_tests(declare({**entry, "dataset": tiny_pairs(4).remove_columns("pair_id")}))
    assert not caplog.records
    load_tests(declare(entry))
    assert "declare pair_id_column: pair_id" in caplog.text


def test_file_declares_tests_of_every_kind_and_source(declare, tmp_path):
    labelled(12, column="shape").to_parquet(tmp_path / "shapes.parquet")
    for shape in ("ring", "bar"):
        (tmp_path / "folder" / "test" / shape).mkdir(parents=True)
        for number in range(2):
            picture(COLORS[number], shape).save(tmp_path / "folder" / "test" / shape / f"{number}.png")
    tests = load_tests(
        declare(
            {"name": "pairs", "kind": "retrieval", "dataset": tiny_pairs(8).rename_column("caption", "text"),
             "caption_column": "text", "pair_id_column": "pair_id", "learned_at": 1},
            {"name": "parquet", "kind": "zero_shot", "dataset": str(tmp_path / "shapes.parquet"), "split": "train",
             "label_column": "shape", "templates": ["a {}"], "class_names": [f"big {s}" for s in SHAPES]},
            {"name": "folder", "kind": "zero_shot", "dataset": str(tmp_path / "folder")},
            {"name": "probe", "kind": "linear_probe",
             "dataset": DatasetDict(train=labelled(12), test=labelled(24)), "max_samples": 10},
        )
    )  # fmt: skip
    assert list(tests) == ["pairs", "parquet", "folder", "probe"]
    assert tests["pairs"].with_columns("image", "caption", "pair_id").column_names == ["image", "caption", "pair_id"]
    assert tests["pairs"].learned_at == 1
    assert tests["parquet"].names == tuple(f"big {shape}" for shape in SHAPES)
    assert (tests["folder"].names, len(tests["folder"])) == (("bar", "ring"), 4)
    assert (len(tests["probe"]), len(tests["probe"].train)) == (10, 12)


@pytest.mark.parametrize("names", [{}, {"class_names": {shape: f"big {shape}" for shape in SHAPES}}])
def test_smaller_test_has_the_classes_of_the_whole(declare, names):
    table = labelled(len(SHAPES) * len(COLORS))
    table = table.add_column("shape", [SHAPES[label] for label in table["label"]]).remove_columns("label")
    entry = {"name": "few", "kind": "zero_shot", "dataset": DatasetDict(test=table), "label_column": "shape"}
    few = load_tests(declare(entry | names | {"max_samples": 2}))["few"]
    assert len(few) == 2 and len(set(few.dataset["shape"])) == 1 and len(few.names) == len(SHAPES)
    assert few.fingerprint() != load_tests(declare(entry | names))["few"].fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "zero-shot"}, "kind is 'zero-shot'; there are retrieval, zero_shot, linear_probe"),
        ({"label_colum": "label"}, "no key 'label_colum' for zero_shot. Did you mean 'label_column'"),
        ({"caption_column": "text"}, "no key 'caption_column' for zero_shot"),
        ({"label_column": "shape"}, "no column 'shape'"),
        ({"image_column": "picture"}, "The test has no column 'picture'"),
        ({"split": "validation"}, "no split 'validation'. The splits are: test"),
        ({"templates": ["a photo"]}, "needs a place"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_test(declare, changes, message):
    entry = {"name": "shapes", "kind": "zero_shot", "dataset": DatasetDict(test=labelled(6)), **changes}
    with pytest.raises(ValueError, match=f"test 'shapes': .*{message}"):
        load_tests(declare(entry))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "needs a table to learn from"),
        (labelled(6).rename_column("label", "kind"), "train has no column 'label'"),
        (labelled(6).filter(lambda row: row["label"] == 0), "at least two classes to learn"),
        (labelled(6), "train is the test's table"),
        (labelled(12).cast_column("label", ClassLabel(names=SHAPES[::-1])), "'circle' in one is 'bar' in the other"),
    ],
)
def test_table_that_no_probe_can_learn_from_is_refused(train, message):
    with pytest.raises(ValueError, match=message):
        LinearProbeTest(labelled(6), train=train)


@pytest.mark.parametrize("option", ["image_column", "caption_column", "pair_id_column"])
def test_columns_of_a_retrieval_test_must_be_there(option):
    with pytest.raises(ValueError, match=rf"The retrieval test has no column 'lost' \({option}\)"):
        RetrievalTest(tiny_pairs(2), **{option: "lost"})


def test_names_used_twice_and_files_of_another_shape_are_refused(declare, tmp_path):
    with pytest.raises(ValueError, match="the names a are used more than once"):
        load_tests(declare({"name": "a"}, {"name": "a"}))
    for text in ("a: {kind: zero_shot}", "- {kind: zero_shot}", "- name"):
        (tmp_path / "tests.yaml").write_text(text)
        with pytest.raises(ValueError, match="must hold a list of tests, each a mapping with a name"):
            load_tests(tmp_path / "tests.yaml")
    (tmp_path / "tests.yaml").write_text("- {name: a")
    with pytest.raises(ValueError, match=r"tests.yaml is no YAML: (?s:.*)line 1"):
        load_tests(tmp_path / "tests.yaml")


# ---- In a run ----


def stream():
    data = tiny_pairs(48)
    parts = [Phase(f"part {k}", data.select(range(12 * k, 12 * k + 9)), data.select(range(12 * k + 9, 12 * k + 12)))
             for k in range(2)]  # fmt: skip
    return PhaseStream(tuple(parts))


def finish(args, tests, phases=None):
    processor = tiny_processor()
    run = ContinualRun(
        phases or stream(), "finetune", args, model=tiny_clip(processor), processing_class=processor, tests=tests
    )
    run.run()
    return run, json.loads((run.folder / "results.json").read_text())


def further_tests():
    return {
        "yellow": RetrievalTest(tiny_pairs(6, "yellow", start=30), pair_id_column="pair_id", learned_at="part 1"),
        "shapes": ZeroShotTest(labelled(12)),
        "probe": LinearProbeTest(labelled(12, shift=2), train=labelled(24), learned_at=1),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    args = ModXTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("finished") / "out"), per_device_train_batch_size=8, max_steps=2,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return finish(args, further_tests())


@pytest.fixture
def copied_args(finished, make_args):
    """Arguments that go on in a copy of the finished run."""
    args = make_args(max_steps=2, learning_rate=1e-5)
    shutil.copytree(finished[0].folder, args.output_dir)
    return args


def test_tests_of_all_kinds_are_columns_of_one_matrix(finished):
    run, results = finished
    assert results["tests"] == ["part 0", "part 1", "yellow", "shapes", "probe"]
    assert results["learned_at"] == [1, 2, 2, None, 1]
    measured = {metric: [[v is not None for v in row] for row in rows] for metric, rows in results["matrix"].items()}
    assert measured["image_to_text_recall@1"] == [[True, True, True, False, False]] * 3
    assert measured["zero_shot_top1"] == [[False, False, False, True, False]] * 3
    assert measured["linear_probe_top1"] == [[False, False, False, False, True]] * 3
    assert all(v is None or 0 <= v <= 1 for rows in results["matrix"].values() for row in rows for v in row)
    assert results["summary"]["zero_shot_top1"]["last"] == results["matrix"]["zero_shot_top1"][2][3]
    assert results["test_pairs"] == {"part 0": 3, "part 1": 3, "yellow": 6, "shapes": 12, "probe": 12}
    assert run.matrix().to_lists() == results["matrix"]["image_to_text_recall@1"]


def test_tests_that_are_not_given_any_more_are_named(copied_args, caplog):
    """With the next row, results.json is written without their columns."""
    finish(copied_args, {"shapes": further_tests()["shapes"]})
    assert "measured of yellow, probe" in caplog.text


def test_median_ranks_stand_beside_the_matrix(finished):
    _, results = finished
    assert set(results["ranks"]) == {"image_to_text_median_rank", "text_to_image_median_rank"}
    rows = results["ranks"]["image_to_text_median_rank"]
    assert all(1 <= rank <= 12 for row in rows for rank in row[:3]) and [row[3:] for row in rows] == [[None] * 2] * 3
    assert not set(results["ranks"]) & (set(results["matrix"]) | set(results["summary"]))


def test_accuracies_by_class_are_in_the_results(finished):
    _, results = finished
    assert set(results["per_class"]) == {"shapes"}
    found = results["per_class"]["shapes"]
    assert found["classes"] == list(SHAPES) and len(found["zero_shot_top1"]) == 3
    for row, accuracies in zip(results["matrix"]["zero_shot_mean_per_class"], found["zero_shot_top1"], strict=True):
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        assert row[3] == pytest.approx(sum(known) / len(known), abs=1e-4)


def test_seconds_of_training_and_evaluation_are_in_the_results(finished):
    _, results = finished
    assert len(results["evaluation_seconds"]) == 3 and all(seconds > 0 for seconds in results["evaluation_seconds"])
    assert all(record["train_runtime"] > 0 for record in results["training"])


def test_card_shows_every_kind_of_test(finished):
    run, results = finished
    card = (run.phase_folder(2) / "README.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in card.splitlines() if line.startswith("| ")}
    value = results["matrix"]["linear_probe_top1"][2][4]
    assert rows["Linear probe top-1"].endswith(f"| {100 * value:.1f} |")
    assert f"{results['ranks']['text_to_image_median_rank'][2][0]:g}" in rows["Text-to-image median rank"]
    assert "task_type" not in card and "type: image-classification" in card
    assert card_problems(card) == []


def test_card_has_a_matrix_of_each_kind_of_test_without_the_others(finished):
    run, results = finished
    lines = (run.phase_folder(2) / "README.md").read_text().splitlines()
    headers = [line for line in lines if line.startswith("| after |")]
    assert headers == ["| after | part 0 | part 1 | yellow |", "| after | shapes |", "| after | probe |"]
    values = [f"{100 * row[3]:.1f}" for row in results["matrix"]["zero_shot_top1"]]
    start = lines.index("| after | shapes |") + 2
    assert [line.split(" | ")[1].rstrip(" |") for line in lines[start : start + 3]] == values


def test_metadata_of_a_card_hold_every_number_of_every_kind_of_test(finished):
    run, results = finished
    read = {
        (r.dataset_name, r.metric_type): r.metric_value
        for r in ModelCard.load(run.phase_folder(2) / "README.md").data.eval_results
    }
    assert read == {
        (test, metric): rows[2][column]
        for metric, rows in {**results["matrix"], **results["ranks"]}.items()
        for column, test in enumerate(results["tests"])
        if rows[2][column] is not None
    }


def test_finished_run_measures_a_further_test_in_every_row(finished, copied_args):
    _, before = finished
    _, results = finish(copied_args, further_tests() | {"new": ZeroShotTest(labelled(6), templates=("one {}",))})
    rows, old_rows = results["matrix"]["zero_shot_top1"], before["matrix"]["zero_shot_top1"]
    assert [row[-1] is not None for row in rows] == [True] * 3
    assert [row[:-1] for row in rows] == old_rows
    assert results["per_class"]["shapes"] == before["per_class"]["shapes"]
    assert [len(found["zero_shot_top1"]) for found in results["per_class"].values()] == [3, 3]
    times = zip(results["evaluation_seconds"], before["evaluation_seconds"], strict=True)
    assert all(longer > shorter for longer, shorter in times)


def test_other_prompts_under_the_name_of_a_test_are_another_run(copied_args):
    with pytest.raises(ValueError, match="the test 'shapes' had other data"):
        finish(copied_args, {"shapes": ZeroShotTest(labelled(12), templates=("{}",))})


def test_stream_without_tests_of_its_own_has_those_of_labels_alone(make_args):
    phases = PhaseStream(tuple(Phase(f"part {k}", tiny_pairs(12, start=12 * k)) for k in range(2)))
    tests = {"part 0": ZeroShotTest(labelled(12), learned_at="part 0")}
    run, results = finish(make_args(max_steps=2), tests, phases)
    assert set(results["matrix"]) == set(ZeroShotTest.metrics) and results["ranks"] == {}
    assert run.matrix().to_lists() == results["matrix"]["zero_shot_top1"]


def test_names_of_the_stream_and_phases_that_do_not_exist_are_refused(make_args):
    with pytest.raises(ValueError, match="tests of the names part 1 already"):
        finish(make_args(), {"part 1": ZeroShotTest(labelled(12))})
    with pytest.raises(ValueError, match="learned_at is 3; the phases are 1 to 2: part 0, part 1"):
        finish(make_args(), {"shapes": ZeroShotTest(labelled(12), learned_at=3)})
