"""Cards of phases and of single trainings: metadata, safety, what is left out, pictures, evaluation files."""

import copy
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from datasets import DatasetInfo
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from PIL import Image
from transformers import AutoModel, Trainer

from hf_modx import RECIPES, ContinualRun, ModXTrainer, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.evaluation import EvaluationMatrix
from hf_modx.markdown import escaped, table
from hf_modx.model_card import phase_card, trainer_card, write_card_of_run, write_phase_card
from hf_modx.model_card.metadata import write_eval_results
from hf_modx.plots import draw_matrix
from hf_modx.run.provenance import data_source, environment, model_source

from card_schema import card_problems
from tiny import tiny_clip, tiny_pairs

NASTY = [
    "a|b\nc `d`",
    "<script>alert(1)</script>",
    "[](x) ![i](http://e.vil/i.png)",
    "---\n# head: {{ x }}",
    "$\\frac$ *b* _c_",
]

CITED = {
    "frozen": [],
    "finetune": [],
    "cumulative": ["garg2024ticclip"],
    "joint": [],
    "modx": ["ni2023modx"],
    "modx_plus": ["ni2023modx", "chaudhry2019er"],
    "kl": ["ni2023modx"],
    "lwf": ["li2016lwf"],
    "anchor": ["hou2019lucir"],
    "ewc": ["kirkpatrick2017ewc"],
    "l2sp": ["li2018l2sp"],
    "wise_ft": ["wortsman2022robust"],
    "weight_ensemble": ["zheng2023zscl"],
    "zscl": ["zheng2023zscl", "li2018l2sp"],
    "zscl_star": ["zheng2023zscl"],
    "er": ["chaudhry2019er"],
    "der": ["buzzega2020der"],
    "incclip": ["yan2022incclip"],
    "cclip": ["liu2025cclip", "wortsman2022robust"],
}
"""Keys of the papers in the card of a phase, beside that of the model."""


@pytest.fixture(scope="module")
def finished(processor, tmp_path_factory):
    """Folder, identity and results of a run of two phases; one run a recipe, none is changed."""
    done = {}

    def finished(recipe="modx"):
        if recipe not in done:
            folder = tmp_path_factory.mktemp(recipe)
            run = ContinualRun(
                stream(), recipe, arguments(folder), model=tiny_clip(processor), processing_class=processor
            )
            run.run()
            identity = json.loads((folder / "run.json").read_text())["identity"]
            done[recipe] = folder, identity, json.loads((folder / "results.json").read_text())
        return (done[recipe][0], *copy.deepcopy(done[recipe][1:]))

    return finished


def stream(names=("base", "first", "second")):
    data = tiny_pairs(48)
    base, *phases = [
        Phase(name, data.select(range(12 * k, 12 * k + 9)), data.select(range(12 * k + 9, 12 * k + 12)))
        for k, name in enumerate(names)
    ]
    return PhaseStream(tuple(phases), base=base)


def arguments(folder, **changes):
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    return ModXTrainingArguments(str(folder), max_steps=2, per_device_train_batch_size=8, **quiet, **changes)


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


# ---- The card of a phase ----


@pytest.mark.parametrize(
    ("recipe", "number"),
    [
        *(("modx", number) for number in (0, 1, 2)),
        *(pytest.param(recipe, 2, marks=pytest.mark.slow) for recipe in RECIPES if recipe != "modx"),
    ],
)
def test_card_of_each_recipe_passes_the_schema(finished, tmp_path, recipe, number):
    folder, *_ = finished(recipe)
    write_card_of_run(folder, number, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card_problems(card) == []
    assert metadata(card)["tags"][-1] == recipe
    assert re.findall(r"@\w+{(\w+)", card) == ["radford2021clip", *(CITED[recipe] if number else [])]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_card_reads_back_every_number_of_its_row(finished, tmp_path, number):
    folder, _, results = finished()
    write_card_of_run(folder, number, tmp_path)
    read = {
        (r.dataset_name, r.metric_type): r.metric_value
        for r in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    assert read == {
        (test, metric): rows[number][column]
        for metric, rows in {**results["matrix"], **results["ranks"]}.items()
        for column, test in enumerate(results["tests"])
    }


def test_value_that_was_not_measured_is_left_out(finished):
    _, identity, results = finished()
    results["matrix"]["text_to_image_recall@1"][2][0] = None
    card = phase_card(identity, results, 2)
    assert card_problems(card) == []
    read = {(r.dataset_name, r.metric_type) for r in ModelCard(card).data.eval_results}
    assert ("base", "text_to_image_recall@1") not in read and ("base", "image_to_text_recall@1") in read


def test_zero_shot_results_have_a_task_of_their_own(finished):
    _, identity, results = finished()
    results["matrix"]["zero_shot_top1"] = [[0.5, 0.25, None]] * 3
    card = phase_card(identity, results, 2)
    assert card_problems(card) == []
    found = [r for r in ModelCard(card).data.eval_results if r.task_type == "zero-shot-image-classification"]
    assert [(r.dataset_name, r.metric_value) for r in found] == [("base", 0.5), ("first", 0.25)]


def test_card_shows_the_rows_up_to_its_phase(finished):
    _, identity, results = finished()
    card = phase_card(identity, results, 1)
    assert re.search(r"^\| first \|( [*\d.]+ \|){3}$", card, flags=re.MULTILINE)
    assert not re.search(r"^\| second \|( [*\d.]+ \|){3}$", card, flags=re.MULTILINE)
    assert "phase 2 |" not in card


def test_summary_of_the_last_card_is_that_of_the_run(finished):
    _, identity, results = finished()
    summary = results["summary"]["image_to_text_recall@1"]
    card = phase_card(identity, results, 2)
    assert f"| forgetting | {100 * summary['forgetting']:.1f} |" in card
    assert f"| backward transfer | {100 * summary['backward_transfer']:.1f} |" in card


def test_card_of_mod_x_that_rectifies_cites_dkr_too(finished):
    _, identity, results = finished()
    identity["recipe_args"]["ModX"]["screen"] = "rectify"
    card = phase_card(identity, results, 2)
    assert re.findall(r"@\w+{(\w+)", card) == ["radford2021clip", "ni2023modx", "cui2024dkr"]


def test_every_hyper_parameter_is_in_the_card(finished):
    _, identity, results = finished()
    card = phase_card(identity, results, 1)
    for name, value in identity["hyperparameters"].items():
        assert (f"| {name} | {value} |" in card) == (value is not None), name
    assert f"| ModX | alpha | {identity['recipe_args']['ModX']['alpha']} |" in card


def test_model_before_the_first_phase_has_no_recipe(finished):
    _, identity, results = finished()
    card = phase_card(identity, results, 0)
    assert "hyper-parameter" not in card and "forgetting" not in card and "ModX" not in card


def test_stream_without_tests_makes_a_card_without_tables_of_results(processor, tmp_path):
    only = PhaseStream((Phase("only", tiny_pairs(9)),))
    ContinualRun(only, "modx", arguments(tmp_path), model=tiny_clip(processor), processing_class=processor).run()
    write_card_of_run(tmp_path, 1, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    assert card_problems(card) == []
    assert "model-index" not in metadata(card) and "nothing tells what was learned" in card
    assert not (tmp_path / "card" / "plots").exists()


def test_facts_that_a_run_records_appear_and_others_do_not(finished):
    _, identity, results = finished()
    results["training"] = [{"steps": 2, "train_runtime": None}, None]
    assert card_problems(phase_card(identity, results, 2)) == []
    assert not re.search("Software and hardware|starts from|time|energy", phase_card(identity, results, 2))
    results["training"][1] = {
        "environment": environment(torch.device("cpu"), 4),
        "starts_from": 1,
        "weights": "0123456789abcdef",
        "train_runtime": 90.0,
        "resumed_at_step": 1,
        "train_energy_joules": 5.4e6,
    }
    card = phase_card(identity, results, 2)
    assert card_problems(card) == []
    assert "| processes | 4 |" in card and f"| torch | {torch.__version__} |" in card
    assert "| phase-1 | 1.5 min from step 1 on | 1.5 kWh | 0123456789abcdef |" in card


# ---- Base model and data ----


def test_base_model_on_the_hub_is_named_with_commit_and_licence(finished):
    _, identity, results = finished()
    results["model"] = {"name": "a/b", "repo_id": "a/b", "revision": "v1", "commit": "0" * 40, "licence": "apache-2.0"}
    card = phase_card(identity, results, 1)
    assert card_problems(card) == []
    data = metadata(card)
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("a/b", "finetune", "apache-2.0")
    assert f"[a/b](https://huggingface.co/a/b), revision v1, commit {'0' * 40}" in card
    assert identity["start"] in card


@pytest.mark.parametrize("licence", ["Apache 2.0", "other"])
def test_licence_that_the_hub_would_refuse_is_told_in_the_text_alone(finished, licence):
    _, identity, results = finished()
    results["model"] = {"name": "a/b", "repo_id": "a/b", "licence": licence}
    card = phase_card(identity, results, 1)
    assert card_problems(card) == []
    assert "license" not in metadata(card) and f"Its licence: {licence}" in card


def test_local_base_model_is_shown_by_its_last_name_only(finished):
    folder, identity, results = finished()
    results["model"] = model_source(folder / "phase-0")
    assert results["model"] == {"name": "phase-0"}
    card = phase_card(identity, results, 1)
    assert card_problems(card) == []
    assert "Start: phase-0" in card and str(folder) not in card and "base_model" not in metadata(card)


def test_folder_of_the_working_directory_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/clip")
    assert model_source("runs/clip") == {"name": "clip"}


def test_commit_and_licence_come_from_the_cache_of_the_hub(tmp_path, monkeypatch, processor):
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--clip"
    tiny_clip(processor).save_pretrained(repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    expected = {"name": "someone/clip", "repo_id": "someone/clip", "commit": commit}
    assert model_source("someone/clip") == expected | {"licence": "other", "licence_name": "mine"}


def test_phase_goes_to_the_hub_and_is_the_base_of_the_next_run(finished, hub, api, tmp_path):
    folder, identity, results = finished()
    results["model"] = {"name": "a/b", "repo_id": "a/b", "licence": "mit"}
    shutil.copytree(folder / "phase-1", tmp_path / "phase-1")
    write_phase_card(tmp_path / "phase-1", identity, results, 1, repo_id="owner/clip", revision="main")
    api.create_repo("owner/clip")
    commit = api.upload_folder(repo_id="owner/clip", folder_path=tmp_path / "phase-1").oid
    AutoModel.from_pretrained("owner/clip")
    expected = {"name": "owner/clip", "repo_id": "owner/clip", "commit": commit, "licence": "mit"}
    assert model_source("owner/clip") == expected
    assert api.model_info("owner/clip").card_data["base_model"] == "a/b"


def test_base_model_without_a_card_is_named_all_the_same(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = {"name": "someone/absent", "repo_id": "someone/absent", "revision": "v2"}
    assert model_source("someone/absent", "v2") == expected


def hub_split(rows, of=None):
    """A table that says it is (a part of) the split `test` of a data set on the Hub."""
    data = tiny_pairs(rows)
    splits = SplitDict({"test": SplitInfo("test", num_examples=of or rows)})
    home = "https://huggingface.co/datasets/someone/shapes/tree/abc123"
    data.info.update(DatasetInfo(homepage=home, license="cc-by-4.0\n\nmit", config_name="default", splits=splits))
    data._split = "test"
    return data


def test_whole_split_of_a_data_set_on_the_hub_is_known_as_such():
    shared = {"licence": "cc-by-4.0, mit", "dataset_id": "someone/shapes", "revision": "abc123"}
    home = {"homepage": "https://huggingface.co/datasets/someone/shapes/tree/abc123"}
    assert data_source(hub_split(6)) == {"rows": 6, "split": "test", "config": "default", **shared, **home}
    assert data_source(hub_split(6, of=60)) == {"rows": 6, **shared, **home}


def test_data_set_that_says_nothing_of_itself_has_rows_alone():
    assert data_source(tiny_pairs(5)) == {"rows": 5}


def test_data_sets_of_the_phases_so_far_are_linked(finished):
    _, identity, results = finished()
    results["sources"] = {name: data_source(hub_split(9, of=60)) for name in ("base", "first", "second")}
    results["sources"]["second"]["dataset_id"] = "someone/later"
    card = phase_card(identity, results, 1)
    assert card_problems(card) == []
    assert metadata(card)["datasets"] == ["someone/shapes"]
    assert "[someone/shapes](https://huggingface.co/datasets/someone/shapes), revision abc123" in card
    assert "someone/later" not in card


def test_data_without_a_licence_are_named(finished):
    _, identity, results = finished()
    results["sources"]["first"] = {"licence": "mit"}
    assert "The data state no licence: second." in phase_card(identity, results, 2)


# ---- .eval_results ----


def test_eval_results_are_written_for_whole_splits_on_the_hub_alone(finished, tmp_path):
    _, _, results = finished()
    results["test_sources"] = {
        "base": data_source(hub_split(3)),
        "first": data_source(hub_split(3, of=60)),
        "second": data_source(tiny_pairs(3)),
    }
    (file,) = write_eval_results(tmp_path, results, 2)
    assert file == tmp_path / ".eval_results" / "someone--shapes.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {entry.dataset_id for entry in entries} == {"someone/shapes"}
    assert {entry.task_id: entry.value for entry in entries} == {
        f"test_{metric}": rows[2][0] for metric, rows in {**results["matrix"], **results["ranks"]}.items()
    }


def test_no_eval_results_without_data_sets_on_the_hub(finished, tmp_path):
    _, _, results = finished()
    assert write_eval_results(tmp_path, results, 2) == []
    assert not list(tmp_path.iterdir())


def test_model_that_took_no_step_is_not_called_fine_tuned(finished):
    cards = {recipe: phase_card(*finished(recipe)[1:], 2) for recipe in ("frozen", "finetune")}
    assert "kept as it was by the recipe frozen of hf_modx over a stream of phases: first, second." in cards["frozen"]
    assert "fine-tuned" not in cards["frozen"].split("\n---\n")[1]
    assert "fine-tuned with the recipe finetune of hf_modx on a stream of phases: first, second." in cards["finetune"]


def test_rows_left_out_of_later_phases_are_not_on_the_card(finished):
    _, identity, results = finished()
    results["bad_samples"] = {part: {"count": 2, "first": []} for part in ("first (train)", "second (train)")}
    first, second = (phase_card(identity, results, number) for number in (1, 2))
    assert "Rows left out as bad samples: 2 of first (train)." in first
    assert "Rows left out as bad samples: 2 of first (train), 2 of second (train)." in second


# ---- Strangers' text ----


def test_names_of_strangers_change_neither_tables_nor_metadata(processor, tmp_path):
    parts = stream(NASTY[:3])
    only = PhaseStream(
        parts.phases, parts.base, {NASTY[3]: tiny_pairs(4, start=40), NASTY[4]: tiny_pairs(4, start=44)}
    )
    run = ContinualRun(only, "modx", arguments(tmp_path), model=tiny_clip(processor), processing_class=processor)
    run.run()
    identity, results = run.identity, json.loads((tmp_path / "results.json").read_text())
    for source in results["sources"].values():
        source |= {"licence": NASTY[0], "description": "\n".join(NASTY), "homepage": NASTY[2]}
    results["model"] = {"name": NASTY[1], "licence": NASTY[2]}
    results["bad_samples"] = {NASTY[4]: {"count": 1, "first": []}}
    write_phase_card(tmp_path / "phase-2", identity, results, 2)
    card = (tmp_path / "phase-2" / "README.md").read_text()
    assert card_problems(card) == ["its text holds a template variable"]  # as text: it is a name
    read = {r.dataset_name for r in ModelCard(card).data.eval_results}
    assert read == set(NASTY)
    text = card.split("\n---\n", 1)[1]
    assert "http://e.vil" in text and "](http://e.vil" not in text
    for block in re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("phase_1 (train), 50 %: a-b", "phase_1 (train), 50 %: a-b"),
        ("two\nlines\u2028of\ttext", "two lines of text"),
        ("<b>&amp;", "&#60;b&#62;&#38;amp;"),
        ("a|b", "a&#124;b"),
        ("[x](y)", "&#91;x&#93;(y)"),
        ("_it_ __init__ snake_case", "&#95;it&#95; &#95;&#95;init&#95;&#95; snake_case"),
        ("\x00\u202eabc\x1b", "abc"),
        ("été 中文 👩‍🚀", "été 中文 👩‍🚀"),
    ],
)
def test_escaped_text_shows_as_it_is(text, expected):
    assert escaped(text) == expected


def test_table_leaves_out_what_is_empty():
    assert table(["a", "b", "c"], [["1", "", ""], ["", "", "2"]]) == "| a | c |\n| --- | --- |\n| 1 | - |\n| - | 2 |"
    assert table(["a"], []) == table(["a"], [[""]]) == ""


# ---- How to load it ----


def test_snippets_run_as_they_stand(finished, tmp_path, monkeypatch, capsys):
    folder, *_ = finished()
    write_card_of_run(folder, 2, tmp_path)
    monkeypatch.chdir(folder)
    loading, classifying = snippets((tmp_path / "README.md").read_text())
    exec(loading, {})
    exec(classifying, {})
    assert capsys.readouterr().out.count("a red square") == 2


def test_no_pipeline_for_a_model_with_few_text_positions(finished):
    _, identity, results = finished()
    for positions, number in ((31, 1), (32, 2)):
        config = {"text_config": {"max_position_embeddings": positions}}
        assert len(snippets(phase_card(identity, results, 1, config=config))) == number


def test_published_phase_is_loaded_from_its_revision(finished):
    _, identity, results = finished()
    card = phase_card(identity, results, 1, repo_id="someone/clip", revision="phase-1")
    assert 'AutoModel.from_pretrained("someone/clip", revision="phase-1")' in card
    assert "once the model is published" not in card
    assert ModelCard(card).data.model_name == "clip"


# ---- Pictures ----


def test_card_shows_the_picture_that_was_drawn(finished, tmp_path):
    folder, *_ = finished()
    write_card_of_run(folder, 2, tmp_path)
    assert "](plots/matrix.png)" in (tmp_path / "README.md").read_text()
    with Image.open(tmp_path / "plots" / "matrix.png") as picture:
        assert picture.format == "PNG" and picture.width > 200


def test_card_without_matplotlib_has_no_picture_and_the_log_says_why(finished, tmp_path, monkeypatch, caplog):
    folder, *_ = finished()
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level("INFO", logger="hf_modx"):
        write_card_of_run(folder, 2, tmp_path)
    assert card_problems((tmp_path / "README.md").read_text()) == []
    assert "matrix.png" not in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "plots").exists() and "hf_modx[plots]" in caplog.text


@pytest.mark.parametrize("names", [["a"], NASTY, [f"phase {k}: {'long name ' * 20}" for k in range(12)]])
def test_nothing_of_a_picture_is_clipped_whatever_the_names(tmp_path, names):
    values = [[None, *[0.5] * (len(names) - 1)]] * (len(names) + 1)
    draw_matrix(EvaluationMatrix(names, names, values), tmp_path / "matrix.png", "$title " * 20)
    with Image.open(tmp_path / "matrix.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    height, width = 130 * 0.42 * len(values), 130 * 0.72 * len(names)
    assert pixels.shape[0] > height and pixels.shape[1] > width
    margin = np.ones(pixels.shape[:2], dtype=bool)
    margin[8:-8, 8:-8] = False
    assert (pixels[margin] == 255).all()


def test_settings_of_matplotlib_are_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_matrix(EvaluationMatrix(["a"], ["a"], [[0.1], [0.2]]), tmp_path / "a.png", "title")
    assert dict(matplotlib.rcParams) == before


# ---- The Trainer alone ----


@pytest.fixture
def trainer(model, processor, tmp_path):
    return ModXTrainer(
        model=model,
        args=arguments(tmp_path / "my-clip", eval_strategy="steps", eval_steps=1),
        train_dataset=tiny_pairs(16),
        eval_dataset={"plain": tiny_pairs(6), "yellow": tiny_pairs(6, style="yellow")},
        processing_class=processor,
    )


def test_card_of_a_single_training_holds_its_last_evaluation(trainer):
    trainer.train()
    card = trainer_card(trainer, tags="mine", license="mit", dataset_tags=["someone/shapes"], language="en")
    assert card_problems(card.replace("language: en", "language: [en]")) == []
    last = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    read = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(card).data.eval_results}
    assert read["plain", "image_to_text_recall@1"] == last["eval_plain_image_to_text_recall@1"]
    assert read["yellow", "text_to_image_mrr"] == last["eval_yellow_text_to_image_mrr"]
    assert {test for test, _ in read} == {"plain", "yellow"}
    assert not [metric for _, metric in read if "second" in metric or "runtime" in metric]
    assert "# my-clip" in card and "| training | 16 |" in card and "ModX: 2 steps in " in card


def test_model_that_was_loaded_from_the_hub_is_the_base(trainer, tmp_path, monkeypatch):
    trainer.model.config._name_or_path = trainer.model.name_or_path = "someone/clip"
    assert "base_model" not in metadata(trainer_card(trainer))
    (tmp_path / "models--someone--clip" / "refs").mkdir(parents=True)
    (tmp_path / "models--someone--clip" / "refs" / "main").write_text("a" * 40)
    snapshot = tmp_path / "models--someone--clip" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert metadata(trainer_card(trainer))["base_model"] == "someone/clip"


def test_training_that_was_never_evaluated_has_no_results(trainer):
    card = trainer_card(trainer)
    assert card_problems(card) == []
    assert "model-index" not in metadata(card)


# ---- The schema itself ----

GOOD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip]
license: mit
base_model: someone/clip
base_model_relation: finetune
model-index:
- name: clip
  results:
  - task: {type: retrieval}
    dataset: {type: custom, name: shapes, config: shapes, split: test}
    metrics: [{type: recall, value: 0.5}]
---

# A card

| a |
|---|
| 1 |
"""


def test_schema_takes_a_good_card():
    assert card_problems(GOOD) == []


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        ("---\nlibrary", "library", "no metadata"),
        ("tags: [clip]", "tags: [clip", "metadata:"),
        ("tags: [clip]", "tags: clip", "tags is no list"),
        ("tags: [clip]", "tags: [1]", "tags is no list"),
        ("tags: [clip]", "tags: [clip, null]", "empty or null"),
        ("tags: [clip]\n", "", "tags is missing"),
        ("tags: [clip]", "tags: [clip]\ncolour: red", "no key of a model card"),
        ("license: mit", "license: MIT", "license is no identifier"),
        ("license: mit", "license: other", "has no name"),
        ("license: mit", "license:", "empty or null"),
        ("zero-shot-image-classification", "guessing", "no task of the Hub"),
        ("base_model: someone/clip", "base_model: clip", "base_model is no repository"),
        ("base_model: someone/clip", "base_model: /any/clip", "an absolute path"),
        ("base_model: someone/clip\n", "", "without a base_model"),
        ("relation: finetune", "relation: child", "none of the Hub's"),
        ("config: shapes", "config: null", "empty or null"),
        ("config: shapes", "config: 3", "dataset.config is no string"),
        ("task: {type: retrieval}", "task: {name: retrieval}", "task.type is no string"),
        ("  - task: {type: retrieval}\n    dataset", "  - dataset", "no task"),
        ("name: shapes, ", "", "dataset.name is no string"),
        ("[{type: recall, value: 0.5}]", "[]", "no metrics"),
        ("value: 0.5", "value: true", "no finite number"),
        ("value: 0.5", "value: .nan", "no finite number"),
        ("- name: clip\n  results", "- results", "has no name"),
        ("| 1 |", "", "an empty table"),
        ("# A card", "fine-tuned version of [](http://x) on", "a link to nothing"),
        ("# A card", "a version of [clip]() on", "a link to nothing"),
        ("# A card", "on the None dataset", "None"),
        ("# A card", "licence: Unknown", "unknown"),
        ("# A card", "<img src=x>", "an HTML element"),
        ("# A card", "{{ title }}", "a template variable"),
        ("# A card", "hf_" + "a" * 30, "a token"),
        ("# A card", "in /any/model", "an absolute path"),
    ],
)
def test_schema_refuses_a_bad_card(good, bad, problem):
    assert good in GOOD
    assert any(problem in found for found in card_problems(GOOD.replace(good, bad, 1)))


def test_schema_refuses_the_stock_card(trainer):
    Trainer.create_model_card(trainer)
    with open(os.path.join(trainer.args.output_dir, "README.md")) as file:
        problems = card_problems(file.read())
    assert "its text holds unknown" in problems and "its text holds a link to nothing" in problems
