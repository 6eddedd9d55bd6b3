"""Going back to an earlier phase: what is there afterwards, also when it was killed in between."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from huggingface_hub import HfApi
from safetensors.torch import load_file
from test_hub import REPO, branches, commits, content, make_run, on_disk, tags  # noqa: F401 - a fixture

from hf_modx import ContinualRun, Contrastive, ModX, ModXTrainingArguments, PhaseStream
from hf_modx.callbacks import EWC, ExperienceReplay
from hf_modx.callbacks.base import pack_states, unpack_states
from hf_modx.cli import main
from hf_modx.deletion import forget
from hf_modx.files import write_text
from hf_modx.hub.faults import RepositoryConflict
from hf_modx.hub.publisher import HubPublisher
from hf_modx.hub.run import revision_of_phase
from hf_modx.rollback import reopen, rollback
from hf_modx.run.folder import JOURNAL, refuse_unfinished_rollback
from hf_modx.run.identity import changes, run_identity

from hub_server import Faults
from test_continual import StopAt, make_stream, results, run, same, weights  # noqa: F401 - run is a fixture

pytestmark = pytest.mark.usefixtures("short_waits")


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def untimed(content):
    """Results without what a clock has measured."""
    clocks = ("train_runtime", "train_samples_per_second", "log", "environment")
    training = [{name: value for name, value in phase.items() if name not in clocks} for phase in content["training"]]
    return {**content, "training": training, "evaluation_seconds": None}


# ---- On the disk ----

KEEPING = "er+ewc"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Folders of one run: `one` right after its first phase, and `out` after its second."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def start(kept, run, make_args, tmp_path):  # noqa: F811
    """Starts a finished run of two phases, with memory and states, again; its folder is `out`."""

    def start(stream=None, **changes):
        return run(
            stream or make_stream(2).with_union_test(),
            KEEPING,
            make_args(**{"max_steps": 2, "spatial_disorder": True, **changes}),
        )

    if not (kept / "out").exists():
        with pytest.raises(SystemError):
            run(
                make_stream(2).with_union_test(),
                KEEPING,
                make_args(max_steps=2, spatial_disorder=True),
                callbacks=[StopAt(2, 1)],
            )
        shutil.copytree(tmp_path / "out", kept / "one")
        start()
        shutil.copytree(tmp_path / "out", kept / "out")
    else:
        shutil.copytree(kept / "out", tmp_path / "out")
    return start


@pytest.fixture
def out(start, tmp_path):
    return tmp_path / "out"


def test_run_is_what_it_was_after_the_phase(out, kept, capsys):
    (out / "checkpoints" / "phase-2" / "checkpoint-1").mkdir(parents=True)
    assert main(["rollback", str(out), "--to", "phase-1"]) == 0
    assert capsys.readouterr().out.startswith(f"{out} is back at phase-1. Removed: phase-2, checkpoints/phase-2, ")
    before, after = on_disk(kept / "one"), on_disk(out)
    before = {path: found for path, found in before.items() if not path.startswith("checkpoints/phase-2")}
    record = json.loads(after.pop("run.json"))
    assert (record.pop("rolled_back_to"), record.pop("history")) == (1, [])
    assert json.loads(before.pop("run.json")) == record
    assert json.loads(after.pop("results.json")) == json.loads(before.pop("results.json"))
    assert after == before and {"memory/phase-1/memory.json", "state/phase-1.safetensors"} <= set(after)


def test_phase_trained_again_is_bit_for_bit_the_same(start, out, kept):
    rollback(out, 1)
    again = start()
    assert untimed(results(again)) == untimed(json.loads((kept / "out" / "results.json").read_text()))
    for path in ("phase-2/model.safetensors", "state/phase-2.safetensors", "memory/phase-1/data-00000-of-00001.arrow"):
        assert (out / path).read_bytes() == (kept / "out" / path).read_bytes(), path


def test_phases_after_it_may_have_other_settings_which_are_recorded(start, out):
    with pytest.raises(ValueError, match="learning_rate was 0.001 and is 0.005"):
        start(learning_rate=5e-3)
    rollback(out, 1)
    again = start(learning_rate=5e-3)
    changed = [{"until_phase": 1, "changes": ["learning_rate was 0.001 and is 0.005"]}]
    assert results(again)["changed_settings"] == changed
    card = (again.phase_folder(2) / "README.md").read_text()
    assert "Other settings held up to phase 1: learning_rate was 0.001 and is 0.005." in card
    (entry,) = record_of(out)["history"]
    assert entry["identity"]["hyperparameters"]["learning_rate"] == 1e-3
    start(learning_rate=5e-3)
    with pytest.raises(ValueError, match="learning_rate was 0.005 and is 0.001"):
        start()
    rollback(out, 1)
    assert record_of(out)["identity"] == entry["identity"] and record_of(out)["history"] == []
    assert "changed_settings" not in json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_later_phases_may_have_other_data_and_their_tests_are_measured_anew(start, out):
    old = make_stream(2)
    second = replace(old.phases[1], train=old.phases[1].train.select(range(8)), test=old.phases[1].test.select([0, 1]))
    other = PhaseStream((old.phases[0], second), base=old.base)
    with pytest.raises(ValueError, match="phase 2 was 'part 2' with other data"):
        start(other)
    rollback(out, 1)
    again = results(start(other))
    assert again["test_pairs"]["part 2"] == 2
    for row in again["matrix"]["text_to_image_recall@1"]:
        assert row[again["tests"].index("part 2")] in (0, 0.5, 1)


def test_phases_that_stay_keep_their_data(start, out):
    rollback(out, 1)
    old = make_stream(2)
    first = replace(old.phases[0], train=old.phases[0].train.select(range(8)))
    with pytest.raises(ValueError, match="phase 1 was 'part 1' with other data"):
        start(PhaseStream((first, old.phases[1]), base=old.base))
    first = replace(old.phases[0], test=old.phases[0].test.select([0, 1]))
    with pytest.raises(ValueError, match="the test 'part 1' had other data"):
        start(PhaseStream((first, old.phases[1]), base=old.base))


def test_deleted_pairs_stay_deleted(start, out):
    """Also where the phase that is gone back to was trained with other settings, before anybody asked."""
    rollback(out, 1)
    start(learning_rate=5e-3)
    forget(out, [2, 14, 26])
    rollback(out, 1)
    assert not {2, 14, 26} & set(load_from_disk(out / "memory" / "phase-1")["pair_id"])
    assert record_of(out)["identity"]["deletions"] == 1
    (out / "deleted.json").rename(out / "mislaid.json")
    with pytest.raises(ValueError, match="asked 1 times to forget pairs"):
        start()
    (out / "mislaid.json").rename(out / "deleted.json")
    again = start()
    assert results(again)["training"][1]["pairs"] == 8
    assert results(again)["deleted_pairs"]["trained_before"] == 1


def test_union_of_tests_is_measured_anew_where_a_later_phase_is_another_one(start, out):
    old = make_stream(2)
    rollback(out, 1)
    second = replace(old.phases[1], test=old.phases[1].test.select([0, 1]))
    again = results(start(PhaseStream((old.phases[0], second), base=old.base).with_union_test()))
    assert again["test_pairs"]["union"] == 8
    for row in again["matrix"]["text_to_image_recall@1"]:
        assert row[again["tests"].index("union")] in [hits / 8 for hits in range(9)]


def test_union_of_tests_grows_with_the_stream():
    before, now = (
        run_identity("er", [], ModXTrainingArguments("out"), make_stream(phases).with_union_test())
        for phases in (1, 2)
    )
    assert before["tests"]["union"] != now["tests"]["union"]
    assert changes(before, now) == []


def test_adapters_are_stacked_on_such_as_they_are():
    plain = {"recipe": "modx", "hyperparameters": {"peft": None}, "phases": [{"name": "a"}, {"name": "b"}]}
    kept = {"peft": "lora", "lora_merge": False, "lora_rank": 4, "lora_alpha": 8, "lora_targets": None}
    kept, merged, larger, careful = (
        {**plain, "hyperparameters": {**kept, **changed}}
        for changed in ({}, {"lora_merge": True}, {"lora_rank": 8}, {"lora_dropout": 0.5})
    )
    plain, kept, merged, larger, careful = ({**one, "tests": {}} for one in (plain, kept, merged, larger, careful))
    assert "lora_merge was None and is False" in " ".join(changes(plain, kept, settled=1))
    assert "peft was 'lora' and is None" in " ".join(changes(kept, plain, settled=1))
    assert "lora_rank was 4 and is 8" in changes(kept, larger, settled=1)[0]
    assert changes(kept, careful, settled=1) == changes(plain, merged, settled=1) == []
    assert changes(kept, plain, settled=0) == []


def test_answers_of_a_teacher_are_those_to_the_references_that_were_asked():
    settings = {"teacher": "initial", "image_source": "base", "text_source": "base"}
    plain, initial, previous, named, others = (
        {"hyperparameters": {"peft": None}, "phases": [{"name": "a"}], "tests": {}, "recipe_args": recipe}
        for recipe in (
            {"ModX": {}},
            *(
                {"ReferenceDistillation": {**settings, **changed}}
                for changed in ({}, {"teacher": "previous"}, {"teacher": "phase-0 (12ab)"}, {"image_source": "34cd"})
            ),
        )
    )
    for before in (plain, previous):
        (told,) = changes(before, initial, settled=1)
        assert '--recipe_args \'{"teacher": "RUN/phase-0"}\'' in told
        assert changes(before, named, settled=1) == changes(before, initial, settled=0) == []
    assert "teacher of ReferenceDistillation was 'initial' and is 'phase-0" in changes(initial, named, settled=1)[0]
    assert "image_source of ReferenceDistillation was 'base'" in changes(initial, others, settled=1)[0]
    assert changes(initial, previous, settled=1) == changes(initial, plain, settled=1) == []


def test_what_a_callback_keeps_is_found_where_others_have_come_before_it():
    """As in a recipe that goes on after a rollback."""
    weights = {"text_projection.weight": torch.ones(2)}
    ewc = EWC()
    ewc.load_state_dict(weights)
    packed, later = pack_states([Contrastive(), ewc]), EWC()
    unpack_states([ModX(), ExperienceReplay(contrastive=False), later], packed)
    assert same(weights, later.state_dict())
    two = [EWC(), EWC()]
    unpack_states(two, packed)
    assert not two[0].state_dict() and same(weights, two[1].state_dict())


def test_other_recipe_begins_with_what_it_can_know(tmp_path, caplog):
    make_up_run(tmp_path, 2)
    identity = record_of(tmp_path)["identity"]
    assert reopen(tmp_path, identity, ["EWC"]) == {} and (tmp_path / "memory").exists()
    (tmp_path / "state" / "phase-2.safetensors").unlink()
    found = reopen(tmp_path, {**identity, "recipe": "ewc", "recipe_args": {"EWC": {"weight": 1.0}}}, ["EWC"])
    assert found == {"history": [{"until_phase": 2, "identity": identity}]}
    assert not (tmp_path / "memory").exists() and not (tmp_path / "state" / "phase-0.safetensors").exists()
    assert load_file(tmp_path / "state" / "phase-2.safetensors") == {}
    assert "EWC: nothing is known of the phases up to phase-2" in caplog.text


def test_settings_that_nothing_was_trained_with_leave_no_trace(tmp_path):
    make_up_run(tmp_path, 2)
    first = record_of(tmp_path)["identity"]

    def go_on(**changes):
        identity = {**first, **changes}
        found = reopen(tmp_path, identity, [])
        (tmp_path / "run.json").write_text(json.dumps({**record_of(tmp_path), **found, "identity": identity}))
        return found["history"]

    for recipe in ("other", "a third one"):
        assert go_on(recipe=recipe) == [{"until_phase": 2, "identity": first}]
    assert go_on() == []


def test_phase_is_told_with_what_it_was_trained_with(run, tmp_path):  # noqa: F811
    """Also where its card is written anew, because a longer stream has one more test."""
    run(make_stream(1), "finetune")
    rollback(tmp_path / "out", 1)
    again = run(make_stream(2), "modx")
    cards = [(again.phase_folder(k) / "README.md").read_text() for k in (1, 2)]
    assert "with the recipe finetune of hf_modx" in cards[0] and "| ModX |" not in cards[0] and "| part 2" in cards[0]
    assert "with the recipe modx of hf_modx" in cards[1] and "| ModX |" in cards[1]
    rollback(tmp_path / "out", 1)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["recipe"] == "finetune"


def test_wrong_rollbacks_end_with_the_reason(tmp_path, capsys):
    folder = tmp_path / "run"
    make_up_run(folder, 2)

    def said(folder, to):
        assert main(["rollback", str(folder), "--to", to]) == 1
        return capsys.readouterr().err

    assert "holds no run: there is no run.json" in said(tmp_path, "1")
    assert "no finished phase-3" in said(folder, "3")
    shutil.rmtree(folder / "phase-1")
    assert "phase-1 is gone: nothing could go on from it" in said(folder, "phase-1")
    (folder / JOURNAL).write_text('{"to": 2}')
    assert "was interrupted. Finish it first: hf-modx rollback" in said(folder, "phase-0")
    with pytest.raises(SystemExit) as exit_:
        main(["rollback", str(folder), "--to", "last"])
    assert exit_.value.code == 2


def test_run_is_refused_until_its_rollback_is_finished(start, out):
    (out / JOURNAL).write_text('{"to": 1}')
    with pytest.raises(ValueError, match="was interrupted. Finish it first: hf-modx rollback .* --to phase-1"):
        start()


# ---- On the Hub ----


@pytest.mark.slow
def test_hub_goes_back_and_on_with_other_settings(hub, make_run):  # noqa: F811
    run = make_run()  # noqa: F811
    run.run()
    heads, stamps, old = branches(hub), tags(hub), weights(run, 2)
    rollback(run.folder, 1)
    assert branches(hub) == {**{name: heads[name] for name in ("phase-0", "phase-1")}, "main": branches(hub)["main"]}
    assert tags(hub) == {name: stamps[name] for name in ("phase-0-final", "phase-1-final")}
    assert commits(hub, "main")[-1] == "Back to phase 1"
    of_main, of_phase = content(hub, "main"), content(hub, "phase-1")
    assert json.loads(of_main["results.json"]) == json.loads((run.folder / "results.json").read_text())
    assert json.loads(of_main.pop("results.json")) == json.loads(of_phase.pop("results.json"))
    assert json.loads(of_main.pop("run.json"))["phase"] == 1 and of_phase.pop("run.json")
    assert of_main == of_phase
    again = make_run(learning_rate=5e-3)
    again.run()
    assert commits(hub, "phase-2") == [*commits(hub, "phase-1"), "Phase 2: part 2"]
    assert tags(hub)["phase-2-final"] == branches(hub)["phase-2"]
    assert content(hub, "main") == content(hub, "phase-2")
    assert json.loads(content(hub, "main")["results.json"])["changed_settings"][0]["until_phase"] == 1
    assert not same(weights(again, 2), old)
    elsewhere = make_run(folder="elsewhere", learning_rate=5e-3)
    elsewhere.run()
    assert record_of(elsewhere.folder)["history"] == record_of(again.folder)["history"]
    assert same(weights(elsewhere, 2), weights(again, 2))


@pytest.mark.slow
def test_empty_folder_goes_on_with_other_settings_from_where_the_hub_is_back_at(hub, tmp_path, make_args):
    """Of a run that makes its own start model, which is known once it is fetched."""

    def start(folder, **changes):
        settings = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 1, **changes}
        args = make_args(output_dir=str(tmp_path / folder), **settings)
        continual = ContinualRun(make_stream(2), "finetune", args, base_max_steps=1)
        continual.run()
        return continual

    start("out")
    rollback(tmp_path / "out", 1)
    elsewhere = start("elsewhere", learning_rate=5e-3)
    assert results(elsewhere)["changed_settings"][0]["until_phase"] == 1


def test_published_phase_that_main_does_not_know_yet_is_gone_on_with(hub, tmp_path):
    """Killed after the first phase with other settings had its tag: main still holds the settings before."""
    make_up_run(tmp_path, 1)
    publish(tmp_path)
    rollback(tmp_path, 1)
    make_up_run(tmp_path, 2, recipe="other")
    hub.faults = Faults(rate=1.0, kinds=["503"], where="/commit/main")
    assert publish(tmp_path) == ("main",)
    hub.faults = Faults()
    assert publish(tmp_path) == ()
    assert content(hub, "main") == content(hub, "phase-2")
    make_up_run(tmp_path, 2, recipe="a third one")
    with pytest.raises(RepositoryConflict, match="recipe was 'other' and is 'a third one'"):
        publish(tmp_path)


def test_folder_that_was_overtaken_cannot_go_back(hub, tmp_path):
    folder = tmp_path / "run"
    make_up_run(folder, 1)
    publish(folder)
    HubPublisher(REPO, tmp_path / "other").claim({**record_of(folder), "writer": "other"}, is_new=True)
    before = on_disk(folder), branches(hub), tags(hub)
    with pytest.raises(RepositoryConflict, match="Another folder has become the writer"):
        rollback(folder, 0)
    assert (on_disk(folder), branches(hub), tags(hub)) == before


# ---- Killed in between ----


class Killed(BaseException):
    pass


@pytest.fixture
def kill_before(monkeypatch, tmp_path):
    """`kill_before(n)`: dies before the n-th change to the run in the folder `run` or to the Hub. Half of a folder is
    gone when it dies while removing it."""
    left = None

    def kill_before(number):
        nonlocal left
        left = number

    def count():
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                left = None
                raise Killed

    def watched(change):
        def watched(place, *args, **options):
            if isinstance(place, HfApi) or str(place).startswith(str(tmp_path / "run")):
                count()
                if change is shutil.rmtree and left == 1:
                    next(path for path in place.rglob("*") if path.is_file()).unlink()
                    count()
            return change(place, *args, **options)

        return watched

    for name in ("create_commit", "delete_tag", "delete_branch"):
        monkeypatch.setattr(HfApi, name, watched(getattr(HfApi, name)))
    monkeypatch.setattr("hf_modx.files.write_text", watched(write_text))
    monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
    monkeypatch.setattr("hf_modx.rollback.shutil", SimpleNamespace(rmtree=watched(shutil.rmtree)))
    return kill_before


def make_up_run(folder, phases, recipe="er"):
    """A finished run that nobody has trained."""
    identity = {"recipe": recipe, "recipe_args": {}, "hyperparameters": {}, "tests": {}}
    identity["phases"] = [{"name": f"part {k}"} for k in range(1, phases + 1)]
    before = record_of(folder) if (folder / "run.json").exists() else {}
    record = {**before, "run_id": "r", "writer": "w", "identity": identity}
    found = {
        "recipe": "er",
        "tests": ["part 1"],
        "learned_at": [1],
        "ranks": {},
        "training": [{"steps": k} for k in range(1, phases + 1)],
        "phases": [phase["name"] for phase in identity["phases"]],
        "matrix": {"recall": [[k / 10] for k in range(phases + 1)]},
    }
    for number in range(phases + 1):
        for place in (f"phase-{number}/model", f"memory/phase-{number}/rows", f"state/phase-{number}"):
            file = folder / f"{place}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes([number]) * 3000)
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(found))


def publish(folder):
    """As a start of the run would. What is missing."""
    record, made = record_of(folder), []
    publisher = HubPublisher(REPO, folder)
    publisher.claim(record, is_new=False)
    for number in range(len(record["identity"]["phases"]) + 1):
        contents = {"run": {**record, "phase": number}, "results": {"rows": number + 1}}
        made.append(revision_of_phase(folder, number, number - 1 if number else None, f"Phase {number}", **contents))
    return publisher.publish(len(made), made.__getitem__)


def test_killed_at_any_change_of_a_file_the_same_command_finishes_it(tmp_path, kill_before):
    folder, before = tmp_path / "run", tmp_path / "before"
    make_up_run(folder, 3)
    shutil.copytree(folder, before)
    rollback(folder, 1)
    expected = on_disk(folder)
    for number in range(1, 100):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        kill_before(number)
        try:
            rollback(folder, 1)
        except Killed:
            if (folder / JOURNAL).exists():
                with pytest.raises(ValueError, match="--to phase-1"):
                    refuse_unfinished_rollback(folder)
            else:
                assert on_disk(folder) == on_disk(before)
            rollback(folder, 1)
            assert on_disk(folder) == expected, number
        else:
            break
    assert number > 10


def test_killed_at_any_change_of_the_hub_the_same_command_finishes_it(hub, tmp_path, kill_before):
    folder, before = tmp_path / "run", tmp_path / "before"
    make_up_run(folder, 2)
    assert publish(folder) == ()
    for place, copy in ((folder, "run"), (hub.folder, "hub")):
        shutil.copytree(place, before / copy)
    heads, record = branches(hub), record_of(folder)
    rollback(folder, 1)
    expected = on_disk(folder), content(hub, "main"), {**branches(hub), "main": ""}, tags(hub)
    assert set(expected[2]) == {"main", "phase-0", "phase-1"} and set(expected[3]) == {
        "phase-0-final",
        "phase-1-final",
    }
    for number in range(1, 8):  # the last one is the first that concerns later phases on the disk
        for place, copy in ((folder, "run"), (hub.folder, "hub")):
            shutil.rmtree(place)
            shutil.copytree(before / copy, place)
        kill_before(number)
        with pytest.raises(Killed):
            rollback(folder, 1)
        is_back, is_whole = branches(hub)["main"] != heads["main"], "phase-2" not in branches(hub)
        assert (folder / JOURNAL).exists() or not is_back
        if is_back and not is_whole:
            with pytest.raises(RepositoryConflict, match="A rollback of owner/clip was interrupted"):
                HubPublisher(REPO, tmp_path / "other").claim({**record, "writer": "other"}, is_new=True)
        for tag in tags(hub):
            assert content(hub, tag)["model.safetensors"] == bytes([int(tag[6])]) * 3000
        rollback(folder, 1)
        assert (on_disk(folder), content(hub, "main"), {**branches(hub), "main": ""}, tags(hub)) == expected, number
        assert commits(hub, "main").count("Back to phase 1") == 1
    assert is_whole
