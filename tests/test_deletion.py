"""Replay of one's own pairs, and pairs that a run is asked to forget."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from test_hub import REPO, branches, content
from test_rollback import make_up_run, publish

from hf_modx import Phase, PhaseStream
from hf_modx.cli import main
from hf_modx.cli.forget import ids_in
from hf_modx.data.overlap import image_digests
from hf_modx.deletion import Deletions, Request, forget
from hf_modx.hub.faults import RepositoryConflict
from hf_modx.hub.publisher import HubPublisher, Revision
from hf_modx.run.identity import changes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from test_replay_runs import run as replay_run  # noqa: F401

import continual_clip
from hub_server import Faults
from test_continual import StopAt, make_stream, same, weights
from tiny import picture, tiny_pairs

pytestmark = pytest.mark.usefixtures("short_waits")

SMALL = {"memory_size": 40, "batch_share": 0.3}  # all that is seen
COLUMNS = ("image", "pair_id")


@pytest.fixture
def run(replay_run):  # noqa: F811
    def run(stream=None, callbacks=(), **changes):
        return replay_run("er", stream, callbacks, SMALL, **{"max_steps": 2, **changes})

    return run


def remembered(continual, number):
    return sorted(load_from_disk(continual.folder / "memory" / f"phase-{number}")["pair_id"])


def results(continual):
    return json.loads((continual.folder / "results.json").read_text())


def without(stream, *ids):
    def clean(name, part):
        return part if "(test)" in name else part.filter(lambda row: row["pair_id"] not in ids)

    return stream.map_parts(clean)


# --- replay of one's own ---------------------------------------------------------------------------------------------


def test_own_pairs_fill_the_memory_before_the_first_phase_and_mix_with_the_streams(run):
    own = tiny_pairs(8, "yellow", start=40)
    continual = run(PhaseStream(make_stream(2).phases).with_replay(own))
    assert remembered(continual, 0) == sorted(own["pair_id"])
    assert remembered(continual, 1) == sorted([*own["pair_id"], *range(12, 21)])
    assert results(continual)["training"][0]["memory_pairs"] == 8
    assert results(continual)["tests"] == ["part 1", "part 2"]


def test_own_pairs_take_the_form_of_the_streams():
    captions = ["a red bar", None, "a ring"]
    images = Features({"image": Image(), "caption": Value("string"), "more": Value("int64")})
    plain = Dataset.from_dict({"image": [picture("red", "bar")] * 3, "caption": captions, "more": [1, 2, 3]}, images)
    base = PhaseStream(make_stream(1).phases).with_replay(plain).base.train
    assert base.features == make_stream(1).phases[0].train.features
    assert base["caption"][:] == [["a red bar"], [], ["a ring"]]
    assert base["pair_id"][:] == [-1, -2, -3]
    of_strings = PhaseStream((Phase("one", plain),)).with_replay(tiny_pairs(2)).base.train
    assert of_strings.column_names == ["image", "caption"] and of_strings["caption"][0] == "a red circle"


@pytest.mark.parametrize(
    ("stream", "pairs", "message"),
    [
        (make_stream(1), tiny_pairs(4), "has a base, 'part 0'"),
        (
            PhaseStream(make_stream(1).phases),
            tiny_pairs(4).rename_column("caption", "text"),
            "to replay has no column",
        ),
    ],
)
def test_own_pairs_that_do_not_fit_are_refused(stream, pairs, message):
    with pytest.raises(ValueError, match=message):
        stream.with_replay(pairs)


def test_script_starts_the_memory_of_a_recipe_that_replays_with_own_pairs(tmp_path, make_args):
    DatasetDict(a_train=tiny_pairs(9), b_train=tiny_pairs(9, start=9)).save_to_disk(tmp_path / "data")
    tiny_pairs(5, "yellow").save_to_disk(tmp_path / "own")
    settings = {"dataset_name": str(tmp_path / "data"), "replay_dataset": str(tmp_path / "own"), "test_fraction": 0.0}
    script = continual_clip.ScriptArguments(model_name_or_path="a clip", recipe=["modx+er"], **settings)
    stream, _ = continual_clip.load_stream(script, make_args())
    assert (stream.base.name, len(stream.base.train), len(stream)) == ("replay", 5, 2)
    with pytest.raises(ValueError, match=r"needs a recipe that replays: --recipe modx\+er"):
        continual_clip.ScriptArguments(model_name_or_path="a clip", recipe=["modx"], **settings)
    with pytest.raises(ValueError, match="needs --model_name_or_path"):
        continual_clip.ScriptArguments(recipe=["er"], **settings)


# --- deletion --------------------------------------------------------------------------------------------------------


def test_forgotten_pairs_leave_the_memory_and_later_phases(run, tmp_path, capsys):
    first = run(make_stream(1))
    assert 2 in remembered(first, 0)
    image = tmp_path / "asked.png"
    stored = make_stream(2).phases[1].train.cast_column("image", Image(decode=False))[3]  # pair 27
    image.write_bytes(stored["image"]["bytes"])
    assert main(["forget", str(first.folder), "--pair_id", "2", "30", "--image", str(image)]) == 0
    assert "taken out of the replay memory: 1." in capsys.readouterr().out
    assert 2 not in remembered(first, 0)
    seen = []

    class Watch(StopAt):
        def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
            seen.extend(train_dataloader.dataset.dataset["pair_id"])

    grown = run(make_stream(2), callbacks=[Watch(0, 0)])
    assert not {2, 27, 30} & set(seen) and {3, 26, 31} <= set(seen)
    found = results(grown)
    assert found["deleted_pairs"] == {"pair_ids": 2, "images": 1, "rows_from_memory": 1, "trained_before": 1}
    card = (grown.phase_folder(2) / "README.md").read_text()
    assert "Deleted on request" in card and "The models of phases 1 to 1 were trained before" in card
    assert "Deleted on request" not in (grown.phase_folder(1) / "README.md").read_text()


def test_card_that_a_longer_stream_writes_anew_is_that_of_its_phase(run, tmp_path):
    run(make_stream(1))
    forget(tmp_path / "out", [2])
    run(make_stream(2))
    grown = run(make_stream(3))
    cards = [(grown.phase_folder(k) / "README.md").read_text() for k in (1, 2, 3)]
    assert ["Deleted on request" in card for card in cards] == [False, True, True]
    assert "| part 3" in cards[0]


def test_pairs_are_forgotten_in_whatever_format_the_data_are(tmp_path):
    pairs = tiny_pairs(6)
    image = image_digests(pairs, "image")[4].hex()
    deletions = Deletions(tmp_path, ("image", "pair_id"))
    deletions.requests = [Request(pair_ids=(2,), images=(image,))]
    stream = PhaseStream((Phase("one", pairs.with_format("torch", columns=["pair_id"])),))
    assert deletions.kept(stream).phases[0].train.with_format(None)["pair_id"][:] == [0, 1, 3, 5]


def test_data_that_lack_the_forgotten_pairs_are_the_same_run_and_other_data_are_not(run):
    first = run(make_stream(1))
    with pytest.raises(ValueError, match="phase 1 was 'part 1' with other data"):
        run(without(make_stream(2), 13))
    forget(first.folder, [2, 13])
    grown = run(without(make_stream(2), 2, 13))
    assert results(grown)["phases"] == ["part 1", "part 2"]
    with pytest.raises(ValueError, match="phase 2 was 'part 2' with other data"):
        run(PhaseStream((*make_stream(1).phases, Phase("part 2", tiny_pairs(9, "yellow"))), base=make_stream().base))


def test_a_run_does_not_go_on_without_the_requests_it_was_given(run):
    first = run(make_stream(1))
    forget(first.folder, [2])
    run(make_stream(1))
    (first.folder / "deleted.json").unlink()
    with pytest.raises(ValueError, match="asked 1 times to forget pairs, and .* knows of 0"):
        run(make_stream(2))


@pytest.mark.slow
def test_a_phase_begun_with_a_forgotten_pair_starts_again(run, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(SystemError):
        run(callbacks=[StopAt(1, 3)], **settings)
    folder = tmp_path / "out"
    assert (folder / "checkpoints" / "phase-1").exists()
    assert forget(folder, [15]).after_phase == 0
    assert not (folder / "checkpoints" / "phase-1").exists()
    after = run(**settings)
    whole = run(without(make_stream(), 15), **settings, output_dir=str(tmp_path / "whole"))
    assert "resumed_at_step" not in results(after)["training"][0]
    assert same(weights(after, 1), weights(whole, 1))


def test_a_deletion_that_was_killed_is_finished_when_the_run_goes_on(run, monkeypatch):
    first = run(make_stream(1))

    def killed(self, place):
        raise SystemError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Deletions, "_clean", killed)
        with pytest.raises(SystemError):
            forget(first.folder, [2])
    assert 2 in remembered(first, 0)
    shutil.copytree(first.folder, first.folder.with_name("copy"))
    run(make_stream(1))
    assert 2 not in remembered(first, 0)
    (request,) = Deletions(first.folder, COLUMNS).requests
    assert request.is_done and request.from_memory == 1
    forgotten = forget(first.folder.with_name("copy"), [2])  # asked again in the place of going on
    assert forgotten.is_done and forgotten.from_memory == 1


@pytest.mark.parametrize("change", ["shutil.rmtree", "publish_folder"])
def test_a_table_is_whole_or_made_again_wherever_its_cleaning_was_killed(run, monkeypatch, change):
    first = run(make_stream(1))

    def killed(place, *_):
        if change == "shutil.rmtree":
            next(Path(place).glob("*.arrow")).unlink()
        raise SystemError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(f"hf_modx.deletion.{change}", killed)
        with pytest.raises(SystemError):
            forget(first.folder, [2])
    continual = run(make_stream(2))
    assert 2 not in remembered(continual, 1) and 3 in remembered(continual, 1)
    assert not list((first.folder / "memory").glob(".*"))


def test_memory_of_which_nothing_is_left_is_filled_again(run):
    first = run(make_stream(1))
    assert forget(first.folder, remembered(first, 0)[:-1]).from_memory == 8
    (last,) = remembered(first, 0)
    assert forget(first.folder, [last - 1, last]).from_memory == 1
    grown = run(PhaseStream(make_stream(2).phases, base=Phase("part 0", tiny_pairs(9, "yellow", start=36))))
    assert {36, 44} <= set(remembered(grown, 1))


def test_ids_that_can_name_no_pair_are_refused(run, tmp_path):
    first = run(make_stream(1).map_parts(lambda _, part: part.remove_columns("pair_id")))
    with pytest.raises(ValueError, match="have no column 'pair_id': no id names one. Ask for their images"):
        forget(first.folder, [2])
    assert not (first.folder / "deleted.json").exists()
    (tmp_path / "ids.txt").write_text("2\nthree\n")
    with pytest.raises(ValueError, match="ids.txt must hold ids, whole numbers one a line: .*'three'"):
        ids_in(tmp_path / "ids.txt")


def test_image_is_not_asked_for_where_the_memory_holds_resized_ones(run, tmp_path):
    first = run(make_stream(1), image_cache=str(tmp_path / "cache"))
    stored = make_stream(1).base.train.cast_column("image", Image(decode=False))[2]
    (tmp_path / "asked.png").write_bytes(stored["image"]["bytes"])
    with pytest.raises(ValueError, match="memory holds resized images .* or delete that folder first"):
        forget(first.folder, images=[tmp_path / "asked.png"])
    assert not (first.folder / "deleted.json").exists()
    shutil.rmtree(first.folder / "memory")
    assert forget(first.folder, images=[tmp_path / "asked.png"]).is_done


def test_run_that_is_half_rolled_back_is_not_asked(run):
    first = run(make_stream(1))
    (first.folder / "rollback.json").write_text('{"to": 0}')
    with pytest.raises(ValueError, match="was interrupted. Finish it first: hf-modx rollback"):
        forget(first.folder, [2])


@pytest.mark.parametrize(("options", "message"), [([], "Say which pairs"), (["--pair_id", "3"], "holds no run")])
def test_command_says_what_is_missing(tmp_path, capsys, options, message):
    if not options:
        (tmp_path / "run.json").write_text("{}")
    assert main(["forget", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err


def test_fewer_rows_are_no_change_only_where_a_deletion_was_asked():
    before = {"hyperparameters": {}, "phases": [{"name": "a", "rows": 9, "data": "x"}], "base": "b"}
    now = {**before, "phases": [{"name": "a", "rows": 8, "data": "y"}], "base": "c"}
    assert len(changes(before, now)) == 2
    assert "start a new run from a finished phase: --model_name_or_path RUN/phase-K" in changes(before, now)[0]
    assert changes(before, {**now, "deletions": 1}) == []
    cut = [{**identity, "tests": {"june": data}} for identity, data in ((before, "x"), ({**now, "deletions": 1}, "y"))]
    assert "leaves tests as they are; to go on" in changes(*cut)[0]
    more = {**now, "deletions": 1, "phases": [{"name": "a", "rows": 10, "data": "y"}]}
    assert len(changes(before, more)) == 1


# --- on the Hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(hub, tmp_path):
    """A published run of one phase, of whose second one a checkpoint is published."""
    folder = tmp_path / "run"
    make_up_run(folder, 1)
    record = json.loads((folder / "run.json").read_text())
    record["identity"]["hyperparameters"] = {"image_column": "image", "pair_id_column": "pair_id"}
    (folder / "run.json").write_text(json.dumps(record))
    shutil.rmtree(folder / "memory")
    publish(folder)
    publisher = HubPublisher(REPO, folder)
    publisher.claim(record, is_new=False)
    files = {"last-checkpoint/model.safetensors": b"knows the pair", "run.json": b"{}"}
    publisher.push_checkpoint(Revision(2, 1, "Phase 2, step 5 of 9", files))
    return folder


def asked_on_hub(hub):
    return json.loads(content(hub, "main")["run.json"])["identity"].get("deletions", 0)


def test_hub_learns_at_once_what_was_asked(hub, published, tmp_path, capsys):
    heads, before = branches(hub), content(hub, "main")
    assert main(["forget", str(published), "--pair_id", "3"]) == 0
    out = capsys.readouterr().out
    assert f"{REPO} on the Hub knows that it was asked" in out and "hf-modx rollback" in out
    after = branches(hub)
    assert set(heads) - set(after) == {"phase-2"} and asked_on_hub(hub) == 1
    assert all(after[name] == heads[name] for name in after if name != "main")
    now = content(hub, "main")
    assert {**now, "run.json": before["run.json"]} == before and "3" not in str(json.loads(now["run.json"]))
    record = {**json.loads((published / "run.json").read_text()), "writer": "other", "run_id": "s"}
    record["identity"].pop("deletions")
    with pytest.raises(RepositoryConflict, match="asked 1 times to forget pairs"):
        HubPublisher(REPO, tmp_path / "elsewhere").claim(record, is_new=True)


def test_nobody_goes_on_without_knowing_where_main_lags_behind_a_phase(hub, published, tmp_path):
    """Killed between the tag of a phase and main: the newest phase is from before the request."""
    heads = branches(hub)
    HubPublisher(REPO, published).api.create_tag(REPO, tag="phase-2-final", revision=heads["phase-1"])
    assert main(["forget", str(published), "--pair_id", "3"]) == 0
    record = {**json.loads((published / "run.json").read_text()), "writer": "other", "run_id": "s"}
    record["identity"].pop("deletions")
    with pytest.raises(RepositoryConflict, match="asked 1 times to forget pairs"):
        HubPublisher(REPO, tmp_path / "elsewhere").claim(record, is_new=True)


@pytest.mark.slow
def test_repository_that_is_gone_is_not_made_again(hub, api, published, capsys):
    api.delete_repo(REPO)
    assert main(["forget", str(published), "--pair_id", "3"]) == 1
    assert "no such repository, or not for this token" in capsys.readouterr().err
    assert not hub.repository(REPO).exists and len(Deletions(published, COLUMNS)) == 1


def test_hub_that_does_not_answer_learns_of_it_when_the_run_goes_on(hub, published, capsys):
    hub.faults = Faults(rate=1.0, kinds=["503"], where="/commit/main|/branch/")
    assert main(["forget", str(published), "--pair_id", "3"]) == 1
    said = capsys.readouterr()
    assert "Asked for: 1 by id, 0 by image" in said.out and "does not know of it yet" in said.err
    assert asked_on_hub(hub) == 0 and len(Deletions(published, COLUMNS)) == 1
    hub.faults = Faults()
    publish(published)
    assert asked_on_hub(hub) == 1 and "phase-2" not in branches(hub)
