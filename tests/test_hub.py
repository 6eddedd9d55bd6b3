"""Every phase on the Hub: publishing, loading, going on, faults, and who may write."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from huggingface_hub import HfApi, ModelCard, constants, set_client_factory
from huggingface_hub.utils import get_session
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file
from transformers import CLIPModel, TrainerCallback

from hf_modx import ContinualRun, ModXTrainer, PhaseStream
from hf_modx.hub import HubAccessError, HubError, RepositoryConflict, UnpublishedPhases
from hf_modx.hub.faults import limit_silence
from hf_modx.hub.publisher import HubPublisher, Revision
from hf_modx.run.lock import LOCK

from hub_fixtures import TESTS, run_with_hub
from hub_server import OWNER, READER, STRANGER, Faults
from launch import launch
from test_continual import StopAt, make_stream
from tiny import quick_arguments, tiny_clip, tiny_processor

sys.path.insert(0, str(TESTS.parent / "examples"))

import continual_clip

REPO = "owner/clip"
SEEDS = int(os.environ.get("FAULT_SEEDS", "2"))
"""How many seeds of faults to try: `FAULT_SEEDS=20 python -m pytest -m "" tests/test_hub.py -k whatever_fails`."""


pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def make_run(processor, make_args, tmp_path):
    """A ContinualRun of the tiny model that publishes to REPO; keywords go to the arguments."""

    def make_run(phases=2, folder="out", recipe="finetune", callbacks=(), model=None, revision=None, **settings):
        settings = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 2, **settings}
        return ContinualRun(
            phases if isinstance(phases, PhaseStream) else make_stream(phases),
            recipe,
            make_args(output_dir=str(tmp_path / folder), **settings),
            model=model or tiny_clip(processor),
            processing_class=processor if model is None else None,
            revision=revision,
            callbacks=callbacks,
        )

    return make_run


@pytest.fixture
def finished(hub, make_run, prepared, tmp_path):
    """A published run of two phases, as it would be started again."""
    prepared("finished", hub, tmp_path / "out", lambda: make_run().run())
    return make_run()


@pytest.fixture
def interrupted(hub, make_run, prepared, tmp_path):
    """A run that fell over in its second phase, as it would be started again."""

    def fall_over():
        with pytest.raises(SystemError):
            make_run(callbacks=[StopAt(2, 1)]).run()

    prepared("interrupted", hub, tmp_path / "out", fall_over)
    return make_run()


@pytest.fixture(scope="module")
def undisturbed(processor, tmp_path_factory):
    """Runs of two phases that know of no Hub, by their steps; nobody changes them."""
    done = {}

    def undisturbed(max_steps):
        if max_steps not in done:
            args = quick_arguments(tmp_path_factory.mktemp("undisturbed"), max_steps=max_steps)
            model = tiny_clip(processor)
            done[max_steps] = ContinualRun(make_stream(), "finetune", args, model=model, processing_class=processor)
            done[max_steps].run()
        return done[max_steps]

    return undisturbed


def branches(hub, repo=REPO):
    return hub.repository(repo).references("heads")


def tags(hub, repo=REPO):
    return hub.repository(repo).references("tags")


def commits(hub, revision, repo=REPO):
    """Titles, oldest first."""
    stored = hub.repository(repo)
    return [commit["title"] for commit in stored.log(stored.commit_of(revision))][::-1]


def content(hub, revision, repo=REPO):
    """Path -> content, without the Hub's own file."""
    stored = hub.repository(repo)
    files = stored.tree(stored.commit_of(revision), recursive=True)
    return {file.path: stored.content(file) for file in files if file.is_file and file.path != ".gitattributes"}


def state_of(hub):
    return branches(hub), tags(hub)


def on_disk(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def uploads(hub):
    return hub.asked(r"^(PUT|POST) .*/(lfs|commit|branch|tag)/")


def weights(run, number):
    return load_file(run.phase_folder(number) / "model.safetensors")


def loaded(revision, repo=REPO):
    """The weights that a client without any cache gets."""
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    return CLIPModel.from_pretrained(repo, revision=revision).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def training(run, number):
    return json.loads((run.phase_folder(number) / "training.json").read_text())


BEGIN = ["initial commit", "Before the first phase"]
CLAIM = "A continual run begins"
ALL_TAGS = {"phase-0-final", "phase-1-final", "phase-2-final"}


def assert_published(hub, run, phases=2):
    """Each phase is one commit on the one before, nothing is lost, and nothing is there twice."""
    titles = [f"Phase {k}: part {k}" for k in range(1, phases + 1)]
    for number in range(phases + 1):
        assert commits(hub, f"phase-{number}") == [*BEGIN, *titles[:number]]
        published = content(hub, f"phase-{number}")
        assert {name: published[name] for name in on_disk(run.phase_folder(number))} == on_disk(
            run.phase_folder(number)
        )
    assert tags(hub) == {f"phase-{k}-final": branches(hub)[f"phase-{k}"] for k in range(phases + 1)}
    assert content(hub, "main") == content(hub, f"phase-{phases}")
    main = commits(hub, "main")
    assert main[:2] == ["initial commit", CLAIM] and len(set(main)) == len(main)
    assert hub.repository(REPO).problems() == []


# ---- The publisher alone, on phases that are made up ----

RECORD = {"run_id": "r", "writer": "w", "identity": {"hyperparameters": {}, "phases": [], "tests": {}}}


@pytest.fixture
def publisher(hub, tmp_path):
    """A new start of the publisher in the folder of the run."""
    return lambda **options: HubPublisher(REPO, tmp_path / "run", **options)


@pytest.fixture
def revisions():
    """Three phases, each with a large file, a small one, one that all share and one of its own."""
    found = []
    for number in range(3):
        files = {
            "model.safetensors": bytes([number]) * 5000,
            "config.json": b"{}",
            "README.md": f"---\nlicense: mit\n---\nPhase {number}\n".encode(),
            "run.json": json.dumps({**RECORD, "phase": number}).encode(),
            f"plots/{number}.png": b"picture",
        }
        found.append(Revision(number, number - 1 if number else None, f"Phase {number}", files))
    return found


def publish(publisher, revisions):
    publisher.claim(RECORD, is_new=False)
    assert publisher.publish(len(revisions), revisions.__getitem__) == ()


def assert_all_there(hub, revisions):
    """Nothing is lost and nothing is there twice."""
    for revision in revisions:
        assert content(hub, revision.tag) == content(hub, revision.branch) == revision.files
        assert commits(hub, revision.branch)[1:] == [f"Phase {k}" for k in range(revision.number + 1)]
    main = commits(hub, "main")
    assert main[:2] == ["initial commit", CLAIM] and main[-1] == revisions[-1].title and len(set(main)) == len(main)
    assert content(hub, "main") == revisions[-1].files
    assert hub.repository(REPO).problems() == []


# ---- Publishing ----


def test_only_what_is_published_now_is_put_together(publisher, revisions):
    """All phases after every phase would take time and memory that grow with the square of their number."""
    again, asked = publisher(), []
    again.claim(RECORD, is_new=False)
    for finished in (2, 3):
        assert again.publish(finished, lambda number: (asked.append(number), revisions[number])[1]) == ()
        asked.append("published")
    assert asked == [0, 1, 1, "published", 2, 2, "published"]  # the last one for main as well


@pytest.mark.slow
def test_main_keeps_its_model_where_that_of_the_next_phase_is_gone_from_the_folder(hub, publisher, revisions):
    first = publisher()
    publish(first, revisions[:1])
    first._publish_phase(revisions[1])  # and killed before main
    before, gone = content(hub, "main"), replace(revisions[1], files={"run.json": b"{}"})
    again = publisher()
    again.claim(RECORD, is_new=False)
    assert again.publish(2, [revisions[0], gone].__getitem__) == ("main",)
    assert content(hub, "main") == before and "weights of phase-1 are gone" in again.reason


def test_each_phase_is_one_commit_on_its_parent_with_a_branch_and_a_tag(hub, finished):
    assert_published(hub, finished)


def test_main_gets_each_phase_in_a_commit_of_its_own(hub, finished):
    assert commits(hub, "main") == ["initial commit", CLAIM, BEGIN[1], "Phase 1: part 1", "Phase 2: part 2"]


def test_commit_of_a_phase_holds_its_folder_its_results_and_its_run(hub, finished):
    for number in range(3):
        published = content(hub, f"phase-{number}")
        results, record = (json.loads(published.pop(name)) for name in ("results.json", "run.json"))
        assert published == on_disk(finished.phase_folder(number))
        assert {"README.md", "config.json", "model.safetensors", "plots/matrix.png"} <= set(published)
        assert len(results["matrix"]["image_to_text_recall@1"]) == number + 1
        assert results["phases"] == ["part 1", "part 2"][:number]
        assert record["phase"] == number and record["identity"] == finished.identity


def test_a_phase_that_starts_from_the_base_grows_from_phase_0(hub, make_run):
    make_run(recipe="joint").run()
    assert commits(hub, "phase-2") == [*BEGIN, "Phase 2: part 2"]


def test_card_of_a_revision_loads_that_revision(hub, finished):
    card = ModelCard.load(REPO)
    assert 'from_pretrained("owner/clip", revision="phase-2")' in card.text
    assert card.data.model_name == "clip" and card.data.eval_results


@pytest.mark.parametrize("private", [True, False])
def test_repository_is_private_unless_asked_otherwise(hub, api, make_run, private):
    run = make_run(1) if private else make_run(1, hub_private_repo=False)
    run.hub.publisher.claim(RECORD, is_new=True)
    assert api.model_info(REPO).private is private


def test_repository_is_named_after_the_folder_unless_it_has_a_name(hub, make_run):
    make_run(1, folder="catalogue", hub_model_id=None).hub.publisher.claim(RECORD, is_new=True)
    assert commits(hub, "main", "owner/catalogue")[-1] == CLAIM


def test_published_run_started_again_uploads_nothing(hub, finished):
    before = state_of(hub)
    already = len(uploads(hub))
    finished.run()
    assert state_of(hub) == before and len(uploads(hub)) == already


def test_more_phases_publish_only_the_new_ones(hub, finished, make_run):
    heads, stamps = state_of(hub)
    longer = make_run(3)
    longer.run()
    assert branches(hub) == {**heads, "phase-3": branches(hub)["phase-3"], "main": branches(hub)["main"]}
    assert tags(hub) == {**stamps, "phase-3-final": branches(hub)["phase-3"]}
    assert content(hub, "main") == content(hub, "phase-3")


def test_run_that_was_finished_without_the_hub_is_published_later(hub, make_run, undisturbed, tmp_path):
    shutil.copytree(undisturbed(max_steps=2).folder, tmp_path / "out")
    run = make_run()
    stamp = (run.phase_folder(2) / "model.safetensors").stat().st_mtime_ns
    run.run()
    assert (run.phase_folder(2) / "model.safetensors").stat().st_mtime_ns == stamp
    assert_published(hub, run)
    assert len(json.loads(content(hub, "phase-1")["results.json"])["training"]) == 1


def test_repository_and_data_are_collected_when_asked(hub, api, make_run):
    make_stream(1).push_to_hub("owner/stream")
    stream = PhaseStream.from_hub("owner/stream")
    for _ in range(2):
        make_run(stream, hub_collection="All months").run()
    (slug,) = hub.collections
    collection = api.get_collection(slug)
    items = [(item.item_type, item.item_id) for item in collection.items]
    assert items == [("model", REPO), ("dataset", "owner/stream")]
    assert collection.title == "All months" and collection.private and len(collection.description) <= 150


@pytest.mark.parametrize("name", ["resume_from_hub", "hub_collection"])
def test_what_concerns_the_hub_needs_push_to_hub(make_args, name):
    with pytest.raises(ValueError, match=f"{name} needs push_to_hub"):
        make_args(**{name: "x"})


@pytest.mark.slow
def test_processes_publish_once_and_all_learn_of_a_conflict(hub, api, processor, make_args, tmp_path):
    settings = {"push_to_hub": True, "hub_model_id": REPO, "max_steps": 2, "per_device_train_batch_size": 4}
    launch(2, publish_from_two_processes, make_args, settings, tmp_path)
    assert set(tags(hub)) == {"phase-0-final", "phase-1-final"}
    assert len(hub.asked("whoami")) == 2  # two runs, one process of each


def publish_from_two_processes(make_args, settings, tmp_path):
    processor = tiny_processor()

    def run(**changed):
        args = make_args(**settings, **changed)
        ContinualRun(make_stream(1), "finetune", args, model=tiny_clip(processor), processing_class=processor).run()

    run()
    with pytest.raises(RepositoryConflict, match="learning_rate"):
        run(output_dir=str(tmp_path / "other"), learning_rate=5.0)


# ---- Loading ----

LOAD = """
import sys, torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, pipeline
states = {}
for revision in sys.argv[2:]:
    states[revision] = CLIPModel.from_pretrained("owner/clip", revision=revision).state_dict()
    assert CLIPProcessor.from_pretrained("owner/clip", revision=revision).tokenizer("a red bar").input_ids
torch.save(states, sys.argv[1])
classify = pipeline("zero-shot-image-classification", model="owner/clip", revision="phase-2")
assert len(classify(Image.new("RGB", (32, 32)), candidate_labels=["red circle", "blue bar"])) == 2
"""


@pytest.fixture
def example(processor, tmp_path, monkeypatch):
    """The main example on a stream of two phases, published to REPO."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # else it takes all cores: processes forked later would hang
    tiny_clip(processor).save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    parts = {f"{phase.name[-1]}_{part}": getattr(phase, part) for phase in make_stream() for part in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "data")
    flags = [
        *("--max_steps", "2", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--per_device_train_batch_size", "8", "--save_strategy", "no", "--output_dir", str(tmp_path / "out")),
        *("--model_name_or_path", str(tmp_path / "start"), "--dataset_name", str(tmp_path / "data")),
        *("--push_to_hub", "--hub_model_id", REPO),
    ]
    return lambda *changed: continual_clip.main([*flags, *changed])


def test_example_takes_a_published_stream_with_its_base(hub, example, tmp_path, monkeypatch):
    make_stream(1).push_to_hub("owner/stream")
    example("--dataset_name", "owner/stream", "--push_to_hub", "false")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["phases"] == ["part 1"] and results["tests"] == ["part 0", "part 1"]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match="Start without HF_HUB_OFFLINE, or name the splits"):
        example("--dataset_name", "owner/stream", "--push_to_hub", "false")  # and not with the base as phase 1


@pytest.mark.slow
def test_every_revision_of_the_example_loads_bit_for_bit_in_another_process(hub, example, tmp_path):
    example()
    revisions = [f"phase-{k}{end}" for k in range(3) for end in ("", "-final")] + ["main"]
    run_with_hub(hub, LOAD, str(tmp_path / "states"), *revisions)
    for revision, state in torch.load(tmp_path / "states").items():
        number = 2 if revision == "main" else int(revision.split("-")[1])
        assert same(state, CLIPModel.from_pretrained(tmp_path / "out" / f"phase-{number}").state_dict()), revision


def test_run_from_a_revision_keeps_its_lineage(hub, finished, make_run):
    second = make_run(1, "second", model=REPO, revision="phase-1", hub_model_id="owner/second")
    second.run()
    assert same(weights(second, 0), weights(finished, 1))
    record = json.loads((second.folder / "run.json").read_text())
    commit = tags(hub)["phase-1-final"]
    assert record["model"] == {"name": REPO, "repo_id": REPO, "revision": "phase-1", "commit": commit}
    card = ModelCard(content(hub, "main", "owner/second")["README.md"].decode())
    assert card.data.base_model == REPO
    assert all(part in card.text for part in ("phase-1", commit, record["identity"]["start"]))


# ---- Faults ----


def start_until_published(make_run, at_most=12):
    """Runs the same command again and again; returns the errors on the way."""
    errors = []
    for _ in range(at_most):
        try:
            run = make_run()
            run.run()
        except (HubError, UnpublishedPhases) as error:
            errors.append(error)
        else:
            return run, errors
    raise AssertionError(f"{at_most} starts were not enough: {errors}")


def test_card_that_somebody_has_edited_stays_until_the_next_phase(hub, api, finished, make_run):
    card = content(hub, "main")["README.md"] + b"\nOur own words.\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    finished.run()
    assert content(hub, "main")["README.md"] == card
    make_run(3).run()
    assert content(hub, "main") == content(hub, "phase-3")


def test_revision_of_a_trainer_alone_is_refused(make_run):
    with pytest.raises(ValueError, match="every phase of a run has a branch of its own"):
        make_run(hub_revision="v2")


@pytest.mark.slow
def test_a_third_of_all_requests_fails_and_the_run_is_published_in_the_end(hub, make_run):
    hub.faults = Faults(seed=1, rate=1 / 3, stall=0.05)
    run, errors = start_until_published(make_run)
    assert sum(entry.fault is not None for entry in hub.log) > 20
    for error in errors:
        assert "nothing is begun" in str(error) or "phase-" in str(error) or "main" in error.missing
    assert_published(hub, run)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, SEEDS))])
def test_phases_are_published_once_whatever_fails(hub, publisher, revisions, tmp_path, seed):
    """The publisher alone, each start a new one."""
    hub.faults = Faults(seed=seed, rate=1 / 3, stall=0.05)
    for _ in range(20):
        again = publisher()
        with suppress(HubError):
            again.claim(RECORD, is_new=False)
            if again.publish(len(revisions), revisions.__getitem__) == ():
                break
    assert again.missing == () and again.published.keys() == {0, 1, 2}
    assert_all_there(hub, revisions)
    known = json.loads((tmp_path / "run" / "hub.json").read_text())
    assert known["phases"] == {str(k): tags(hub)[f"phase-{k}-final"] for k in range(3)}


def test_what_is_missing_is_named_kept_and_published_by_the_next_start(hub, make_run, caplog):
    hub.faults = Faults(rate=1.0, kinds=["503"], where="/commit/phase-1")
    run = make_run()
    with pytest.raises(UnpublishedPhases, match="phase-1, phase-2, main.*same command") as error:
        run.run()
    assert error.value.missing == ("phase-1", "phase-2", "main")
    assert "Not published to owner/clip: phase-1" in caplog.text
    assert len(json.loads((run.folder / "results.json").read_text())["phases"]) == 2
    assert set(tags(hub)) == {"phase-0-final"}
    hub.faults = Faults()
    stamp = (run.phase_folder(2) / "model.safetensors").stat().st_mtime_ns
    again = make_run()
    again.run()
    assert (run.phase_folder(2) / "model.safetensors").stat().st_mtime_ns == stamp
    assert_published(hub, again)
    assert len(json.loads(content(hub, "phase-1")["results.json"])["training"]) == 1


@pytest.mark.slow
def test_example_ends_with_a_status_of_its_own_when_phases_are_missing(hub, example, capsys):
    hub.faults = Faults(rate=1.0, kinds=["503"], where="/commit/phase-2")
    with pytest.raises(SystemExit) as error:
        example()
    printed = capsys.readouterr()
    assert error.value.code == 3
    assert "| start |" in printed.out and "phase-2, main" in printed.err
    hub.faults = Faults()
    assert len(example().phases) == 2
    assert set(tags(hub)) == ALL_TAGS


@pytest.mark.parametrize(
    "where", ["/commit/", "/create", *(pytest.param(where, marks=pytest.mark.slow) for where in ("/branch/", "/tag/"))]
)
def test_what_is_done_and_not_answered_is_not_done_again(hub, publisher, revisions, where):
    hub.faults.fail_next(1 if where == "/create" else 3, "drop_after", where)
    publish(publisher(), revisions)
    assert hub.faults.pending == []
    assert_all_there(hub, revisions)


@pytest.mark.parametrize("kind", ["full", "cut"])
def test_a_large_file_that_does_not_arrive_is_sent_again(hub, publisher, revisions, kind):
    hub.faults.fail_next(1, kind, "^PUT")
    publish(publisher(), revisions)
    assert hub.faults.pending == []
    assert_all_there(hub, revisions)


@pytest.fixture
def default_client():
    """huggingface_hub's own, before and after."""
    set_client_factory(default_client_factory)
    yield
    set_client_factory(default_client_factory)


def test_silence_ends_after_a_while(hub, publisher, revisions, default_client):
    limit_silence((0.5, 0.5, 0.5, None))
    hub.faults = Faults(stall=60)
    for where in ("/refs", "/commit/phase-1"):
        hub.faults.fail_next(1, "timeout", where)
    publish(publisher(), revisions)
    assert hub.faults.pending == []
    assert_all_there(hub, revisions)


def test_limit_on_silence_keeps_the_client_of_the_user(default_client):
    def make(timeout):
        def make():
            client = default_client_factory()
            client.timeout, client.headers["x-own"] = timeout, "1"
            return client

        return make

    for own, expected in ((None, 120.0), (5.0, 5.0)):
        set_client_factory(make(own))
        for _ in range(2):
            limit_silence()
        assert get_session().timeout.read == expected
        assert get_session().headers["x-own"] == "1"


def test_nothing_is_begun_where_the_hub_does_not_answer(hub, make_run, tmp_path):
    hub.faults = Faults(rate=1.0, kinds=["503"])
    with pytest.raises(HubError, match="does not answer, so nothing is begun"):
        make_run()
    assert not (tmp_path / "out").exists()


def test_run_that_has_published_goes_on_without_an_answer(hub, interrupted, make_run):
    hub.faults = Faults(rate=1.0, kinds=["503"])
    run = make_run()
    with pytest.raises(UnpublishedPhases, match="phase-2, main"):
        run.run()
    hub.faults = Faults()
    make_run().run()
    assert_published(hub, run)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["^PUT", "/commit/phase-2", "/tag/", "/commit/main"])
def test_killed_while_it_uploads_the_repository_loads_and_the_same_command_publishes(
    hub, interrupted, make_run, where
):
    before = {revision: loaded(revision) for revision in ("phase-0", "phase-1", "main")}
    hub.faults = Faults(stall=60)
    hub.faults.fail_next(1, "timeout", where)
    torch.set_num_threads(1)
    child = multiprocessing.get_context("fork").Process(target=interrupted.run)
    child.start()
    while hub.faults.pending:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    for revision, state in before.items():
        assert same(loaded(revision), state)
    assert hub.repository(REPO).problems() == []
    run = make_run()
    run.run()
    assert_published(hub, run)
    assert same(loaded("main"), weights(run, 2))


# ---- Who may write ----


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "needs a token that may write: run `hf auth login`"),
        ("hf_nobody", "Invalid user token"),
        (READER, "may only read"),
        (STRANGER, "may not write to owner/clip"),
    ],
)
def test_access_is_verified_before_the_first_step(hub, make_run, monkeypatch, token, message):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubAccessError, match=message):
        make_run().run()
    assert not hub.repository(REPO).exists


def test_stranger_may_not_write_to_a_repository_that_all_can_see(hub, api, make_run):
    api.create_repo(REPO, private=False)
    before = state_of(hub)
    with pytest.raises(HubAccessError, match="may not write to owner/clip"):
        make_run(hub_token=STRANGER).run()
    assert state_of(hub) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"learning_rate": 5.0}, "learning_rate was 0.001 and is 5.0"), ({"recipe": "modx"}, "recipe was 'finetune'")],
)
def test_a_different_run_is_refused_and_changes_nothing(hub, finished, make_run, change, named):
    before = state_of(hub)
    other = make_run(folder="other", **change)
    with pytest.raises(RepositoryConflict, match=named):
        other.run()
    assert state_of(hub) == before
    assert not other.phase_folder(1).exists()


def test_a_trained_folder_of_another_run_is_refused(hub, finished, make_run, undisturbed, tmp_path):
    shutil.copytree(undisturbed(max_steps=2).folder, tmp_path / "other")
    with pytest.raises(RepositoryConflict, match="holds another run than"):
        make_run(folder="other").run()


def test_a_repository_of_something_else_is_refused(hub, api, make_run):
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)
    before = state_of(hub)
    with pytest.raises(RepositoryConflict, match="something else than a run of hf_modx: config.json"):
        make_run().run()
    assert state_of(hub) == before


def test_an_empty_repository_with_a_card_is_taken(hub, api, make_run):
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id=REPO)
    make_run(1).run()
    assert content(hub, "main") == content(hub, "phase-1")


def test_settings_can_be_corrected_before_anything_is_published(hub, make_run, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(ContinualRun, "_evaluate_phase", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make_run(1, learning_rate=5.0).run()
    run = make_run(1)
    run.run()
    assert_published(hub, run, phases=1)


def test_second_process_on_the_machine_is_refused_while_the_first_runs(hub, make_run):
    first, second = (HubPublisher(REPO, Path(name)) for name in ("first", "second"))
    first.lock()
    with pytest.raises(RepositoryConflict, match="Another run on this machine is publishing to owner/clip"):
        make_run().run()
    first.unlock()
    assert not hub.repository(REPO).exists
    second.lock()
    second.unlock()


def record_of(run, writer):
    return {**json.loads((run.folder / "run.json").read_text()), "writer": writer}


def test_a_folder_that_was_overtaken_is_refused_at_its_next_upload(hub, interrupted, make_run, tmp_path):
    class Overtake(TrainerCallback):
        """Another machine goes on with the run meanwhile."""

        def on_train_begin(self, args, state, control, **kwargs):
            other = HubPublisher(REPO, tmp_path / "other")
            other.claim(record_of(interrupted, "another folder"), is_new=True)

    run = make_run(callbacks=[Overtake()])
    before = tags(hub)
    with pytest.raises(RepositoryConflict, match="Another folder has become the writer of owner/clip"):
        run.run()
    assert run.phase_folder(2).exists(), "what is trained stays"
    assert tags(hub) == before and "phase-2" not in branches(hub)
    with pytest.raises(RepositoryConflict, match="start in an empty output_dir"):
        make_run().run()


class Overtaken(HfApi):
    """Between the look at the repository and the commit another one gets in."""

    def create_commit(self, *args, **kwargs):
        self.before()
        return super().create_commit(*args, **kwargs)


def test_of_two_that_come_at_once_one_gets_in(hub, interrupted, tmp_path):
    first, second = (HubPublisher(REPO, tmp_path / name) for name in ("a", "b"))
    first.api = Overtaken()
    first.api.before = lambda: second.claim(record_of(interrupted, "second"), is_new=True)
    with pytest.raises(RepositoryConflict, match="Another folder has become the writer"):
        first.claim(record_of(interrupted, "first"), is_new=True)
    assert json.loads(content(hub, "main")["run.json"])["writer"] == "second"


# ---- Going on elsewhere ----


def test_an_empty_folder_goes_on_after_the_last_finished_phase(hub, interrupted, make_run, undisturbed):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(Path(args.output_dir).name)

    elsewhere = make_run(folder="elsewhere", callbacks=[Watch()])
    elsewhere.run()
    assert seen == ["phase-2"]
    for number in (0, 1):
        assert on_disk(elsewhere.phase_folder(number)) == on_disk(interrupted.phase_folder(number))
    whole = undisturbed(max_steps=2)
    assert same(weights(elsewhere, 2), weights(whole, 2))
    results = [json.loads((run.folder / "results.json").read_text()) for run in (elsewhere, whole)]
    assert results[0]["matrix"] == results[1]["matrix"]
    assert commits(hub, "main")[-3:] == ["Phase 1: part 1", "The run goes on", "Phase 2: part 2"]
    records = [json.loads((run.folder / "run.json").read_text()) for run in (elsewhere, interrupted)]
    assert records[0]["run_id"] == records[1]["run_id"] and records[0]["writer"] != records[1]["writer"]


@pytest.mark.slow
def test_what_callbacks_and_replay_keep_goes_on_too(hub, make_run):
    with pytest.raises(SystemError):
        make_run(recipe="er+ewc", callbacks=[StopAt(2, 1)]).run()
    elsewhere = make_run(folder="elsewhere", recipe="er+ewc")
    elsewhere.run()
    undisturbed = make_run(folder="undisturbed", recipe="er+ewc", push_to_hub=False)
    undisturbed.run()
    assert same(weights(elsewhere, 2), weights(undisturbed, 2))


@pytest.mark.slow
def test_a_finished_run_in_an_empty_folder_takes_more_phases(hub, finished, make_run):
    longer = make_run(3, folder="elsewhere")
    longer.run()
    assert set(tags(hub)) == {*ALL_TAGS, "phase-3-final"}
    results = json.loads((longer.folder / "results.json").read_text())
    assert None not in [value for row in results["matrix"]["image_to_text_recall@1"] for value in row]


def test_fetching_that_is_interrupted_goes_on(hub, finished, make_run):
    hub.faults = Faults(rate=1.0, kinds=["503"], where=f"/resolve/{tags(hub)['phase-1-final']}/model.safetensors")
    with pytest.raises(HubError):
        make_run(folder="elsewhere").run()
    hub.faults = Faults()
    elsewhere = make_run(folder="elsewhere")
    elsewhere.run()
    for number in range(3):
        assert on_disk(elsewhere.phase_folder(number)) == on_disk(finished.phase_folder(number))


@pytest.mark.slow
def test_small_clip_of_a_run_is_fetched_and_not_trained_again(hub, make_args, tmp_path, monkeypatch):
    def make(folder):
        args = make_args(output_dir=str(tmp_path / folder), push_to_hub=True, hub_model_id=REPO, max_steps=1)
        return ContinualRun(make_stream(1), "finetune", args, base_max_steps=1)

    first = make("out")
    first.run()
    monkeypatch.setattr("hf_modx.continual.trained_base", lambda *args: 1 / 0)
    second = make("elsewhere")
    second.run()
    assert second.identity == first.identity
    assert same(weights(second, 1), weights(first, 1))


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": "checkpoint", "max_steps": 5}


@pytest.fixture
def with_checkpoint(hub, make_run, prepared, tmp_path):
    """A run that fell over in step 5 of its second phase and had published the checkpoint of step 4."""

    def fall_over():
        with pytest.raises(SystemError):
            make_run(callbacks=[StopAt(2, 5)], **CHECKPOINTS).run()

    prepared("with_checkpoint", hub, tmp_path / "out", fall_over)
    return make_run(**CHECKPOINTS)


def test_checkpoint_of_a_phase_lies_on_its_branch_with_a_card(hub, with_checkpoint):
    published = content(hub, "phase-2")
    assert "Phase 2 is being trained" in published["README.md"].decode()
    assert "after step 4 of 5" in published["README.md"].decode()
    assert {f"last-checkpoint/{name}" for name in ("optimizer.pt", "trainer_state.json")} <= set(published)
    assert not [path for path in published if path.endswith("training_args.bin")]
    assert set(tags(hub)) == {"phase-0-final", "phase-1-final"}
    assert same(loaded("phase-2"), weights(with_checkpoint, 1))


@pytest.mark.parametrize(("asked", "step"), [(True, 4), pytest.param(False, None, marks=pytest.mark.slow)])
def test_published_checkpoint_is_taken_up_when_asked(hub, with_checkpoint, make_run, undisturbed, asked, step):
    elsewhere = make_run(folder="elsewhere", resume_from_hub=asked, **CHECKPOINTS)
    elsewhere.run()
    assert training(elsewhere, 2).get("resumed_at_step") == step
    assert same(weights(elsewhere, 2), weights(undisturbed(max_steps=5), 2))
    published = content(hub, "phase-2")
    assert not [path for path in published if path.startswith("last-checkpoint")]
    assert published["README.md"] == (elsewhere.phase_folder(2) / "README.md").read_bytes()


@pytest.mark.slow
def test_checkpoint_that_cannot_be_published_does_not_stop_the_training(hub, make_run, caplog):
    hub.faults = Faults(rate=1.0, kinds=["503"], where="/commit/phase-1")
    with pytest.raises(UnpublishedPhases):
        make_run(1, **CHECKPOINTS).run()
    assert "step 2 of 5: the checkpoint is not published" in caplog.text


# ---- What must not happen ----


def test_token_is_nowhere(hub, make_run, monkeypatch, caplog, capfd, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    hub.faults = Faults(rate=1.0, kinds=["403", "401"], where="/commit/phase-1")
    with pytest.raises(UnpublishedPhases) as error:
        make_run(1, hub_token=OWNER, **CHECKPOINTS).run()
    hub.faults = Faults()
    make_run(1, hub_token=OWNER, **CHECKPOINTS).run()
    secret = OWNER.encode()
    assert not [path for path, found in on_disk(tmp_path / "out").items() if secret in found]
    assert any(path.name == "training_args.bin" for path in (tmp_path / "out").rglob("*"))
    stored = hub.repository(REPO)
    for commit in stored.git("rev-list", "--all").split():
        assert not [path for path, found in content(hub, commit).items() if secret in found]
    captured = capfd.readouterr()
    told = "".join(traceback.format_exception(error.value))
    for text in (told, caplog.text, captured.out, captured.err):
        assert OWNER not in text


def test_token_that_no_header_can_hold_is_not_shown(hub, tmp_path):
    token = "\n".join(["hf_" + "x" * 20] * 2)
    with pytest.raises(HubError) as error:
        HubPublisher(REPO, tmp_path, token=token).check_access()
    told = "".join(traceback.format_exception(error.value))
    assert "LocalProtocolError" in told and "xxx" not in told


REFUSE_ALL = """
import runpy, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise RuntimeError(f"no network: {event} {args}")
sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_without_push_to_hub_no_connection_is_tried(hub, tmp_path):
    done = run_with_hub(hub, REFUSE_ALL, str(TESTS / "killed_run.py"), str(tmp_path / "run"), token=None, check=False)
    assert done.returncode == 0, done.stderr
    assert "no network" not in done.stdout + done.stderr
    assert hub.log == []
    assert (tmp_path / "run" / "phase-2" / "model.safetensors").exists()


# ---- A Trainer alone ----


def test_trainer_alone_pushes_our_card_in_private(hub, api, processor, pairs, make_args):
    args = make_args(
        push_to_hub=True, hub_model_id="owner/alone", hub_token=OWNER, max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer = ModXTrainer(tiny_clip(processor), args, train_dataset=pairs, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    assert api.model_info("owner/alone").private
    stored = hub.repository("owner/alone")
    states = [content(hub, commit, "owner/alone") for commit in stored.git("rev-list", "main").split()]
    with_model = [files for files in states if "model.safetensors" in files]
    assert len(with_model) >= 2
    for files in with_model:
        card = files["README.md"].decode()
        assert "hf_modx" in card and "fine-tuned version of" not in card
        assert torch.load(BytesIO(files["training_args.bin"]), weights_only=False).hub_token is None


def test_trainer_alone_tells_of_a_push_that_failed(hub, processor, pairs, make_args, caplog):
    args = make_args(push_to_hub=True, hub_model_id="owner/alone", max_steps=1, save_strategy="steps", save_steps=1)
    trainer = ModXTrainer(tiny_clip(processor), args, train_dataset=pairs, processing_class=processor)
    hub.faults.fail_next(1, "503", "/commit/")
    trainer.train()
    trainer.push_to_hub()
    assert "A checkpoint was not pushed. HfHubHTTPError" in caplog.text
