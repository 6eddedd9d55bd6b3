"""The Hub on loopback: huggingface_hub, transformers and datasets use it as they use the real one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from transformers import AutoProcessor, CLIPModel

from hub_fixtures import TESTS, hub_environment, run_with_hub
from hub_server import KINDS, OWNER, READER, STRANGER, Faults, LoopbackHub
from tiny import tiny_clip

REPO = "owner/clip"
WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path):
    """A large file and small ones, one of them with a name that must be escaped in an address."""
    files = {"model.safetensors": WEIGHTS, "config.json": b"{}", "inner/größe #1 100%.txt": b"text\n"}
    for name, content in files.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "source"


@pytest.fixture
def repo(api, folder):
    """A repository with one upload."""
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    return REPO


def contents(folder) -> dict[str, bytes]:
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if ".cache" not in path.parts}


def loaded(tmp_path, revision="main") -> dict[str, bytes]:
    """What a client without any cache downloads."""
    target = tmp_path / f"loaded-{os.urandom(4).hex()}"
    return contents(snapshot_download(REPO, revision=revision, local_dir=target))


@contextmanager
def refused(status: int):
    """The block ends with an answer of this status."""
    with pytest.raises(HfHubHTTPError) as error:
        yield
    assert error.value.response.status_code == status


# ---- Repositories and commits ----


def test_a_folder_comes_back_as_it_was(hub, repo, folder, tmp_path):
    assert loaded(tmp_path) == contents(folder)


def test_a_folder_is_one_commit(hub, api, repo):
    assert [commit.title for commit in api.list_repo_commits(repo)] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]


def test_a_large_file_is_a_pointer_in_git_and_bytes_beside_it(hub, api, repo):
    stored = hub.repository(repo)
    pointer = stored.git("show", "main:model.safetensors")
    (info,) = api.get_paths_info(repo, "model.safetensors")
    assert pointer == f"version https://git-lfs.github.com/spec/v1\noid sha256:{info.lfs.sha256}\nsize {info.size}\n"
    assert stored.large_file(info.lfs.sha256).read_bytes() == WEIGHTS
    assert stored.problems() == []


def test_a_large_file_is_sent_once(hub, api, repo, folder):
    (folder / "copy.safetensors").write_bytes(WEIGHTS)
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert len(hub.asked("^PUT .*/lfs/")) == 1


def test_an_upload_without_changes_is_no_commit(hub, api, repo, folder):
    before = api.model_info(repo).sha
    assert api.upload_folder(repo_id=repo, folder_path=folder).oid == before
    assert api.model_info(repo).sha == before


def test_files_and_folders_are_deleted_and_copied(hub, api, repo, tmp_path):
    operations = [
        CommitOperationCopy("model.safetensors", "old/model.safetensors"),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("inner/"),
    ]
    api.create_commit(repo, operations, commit_message="Tidy up")
    assert loaded(tmp_path) == {"old/model.safetensors": WEIGHTS, "config.json": b"{}"}


def test_what_is_not_there_is_not_deleted(hub, api, repo):
    with pytest.raises(EntryNotFoundError):
        api.delete_file("nothing.txt", repo)


def test_a_repository_is_created_once(hub, api):
    url = api.create_repo(REPO)
    assert (url.repo_id, url.repo_type, str(url)) == (REPO, "model", f"{hub.endpoint}/{REPO}")
    assert api.create_repo(REPO, exist_ok=True) == url
    with refused(409):
        api.create_repo(REPO)


def test_a_deleted_repository_is_gone(hub, api, repo):
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)


def test_models_and_datasets_have_names_of_their_own(hub, api, repo):
    assert not api.repo_exists(repo, repo_type="dataset")


def test_a_commit_on_a_moved_branch_is_refused(hub, api, repo):
    start = api.model_info(repo).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo, parent_commit=start)
    moved = api.model_info(repo).sha
    with refused(412):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo, parent_commit=start)
    assert api.model_info(repo).sha == moved


def test_a_pointer_to_nothing_is_refused(hub, api, repo):
    operation = CommitOperationAdd("lost.safetensors", WEIGHTS[:-1])
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with refused(400):
        api.create_commit(repo, [operation], commit_message="Lost")
    assert hub.repository(repo).problems() == []


# ---- Branches and tags ----


def test_a_branch_starts_where_it_is_told(hub, api, repo, tmp_path):
    first = api.model_info(repo).sha
    api.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id=repo)
    api.create_branch(repo, branch="phase-1", revision=first)
    api.create_branch(repo, branch="phase-2")
    assert loaded(tmp_path, "phase-1")["config.json"] == b"{}"
    assert loaded(tmp_path, "phase-2")["config.json"] == b"new"


def test_a_commit_moves_one_branch(hub, api, repo):
    api.create_branch(repo, branch="phase-1")
    api.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id=repo, revision="phase-1")
    heads = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}
    assert heads["main"] != heads["phase-1"] == api.model_info(repo, revision="phase-1").sha


@pytest.mark.parametrize("message", [None, "the first phase"])
def test_a_tag_stays_where_it_is(hub, api, repo, tmp_path, message):
    first = api.model_info(repo).sha
    api.create_tag(repo, tag="v1", tag_message=message)
    api.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id=repo)
    (tag,) = api.list_repo_refs(repo).tags
    assert (tag.name, tag.target_commit) == ("v1", first)
    assert loaded(tmp_path, "v1")["config.json"] == b"{}"


def test_references_are_made_once_and_deleted(hub, api, repo):
    for create, delete, name in (
        (api.create_branch, api.delete_branch, {"branch": "phase/1"}),
        (api.create_tag, api.delete_tag, {"tag": "v1"}),
    ):
        create(repo, **name)
        create(repo, **name, exist_ok=True)
        with refused(409):
            create(repo, **name)
        delete(repo, **name)
        with pytest.raises(RevisionNotFoundError):
            delete(repo, **name)


def test_names_with_a_slash_are_revisions(hub, api, repo, folder, tmp_path):
    api.create_branch(repo, branch="run/phase-1")
    assert loaded(tmp_path, "run/phase-1") == contents(folder)


def test_an_upload_to_a_branch_that_is_missing_is_refused(hub, api, repo, folder):
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=repo, folder_path=folder, revision="phase-1")


# ---- Reading ----


def test_what_is_missing_is_named_as_the_hub_names_it(hub, api, repo):
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("owner/other", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "config.json", revision="phase-9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "nothing.json")
    assert api.file_exists(repo, "config.json") and not api.file_exists(repo, "nothing.json")


@pytest.mark.parametrize("name", ["model.safetensors", "inner/größe #1 100%.txt"])
def test_a_part_of_a_file_is_served(hub, repo, folder, name):
    whole = (folder / name).read_bytes()
    address = f"{hub.endpoint}/{repo}/resolve/main/{name.replace('%', '%25').replace('#', '%23')}"
    for header, part in (("bytes=1-3", whole[1:4]), ("bytes=2-", whole[2:]), ("bytes=-2", whole[-2:])):
        response = get_session().get(address, headers={"Range": header})
        assert (response.status_code, response.content) == (206, part)
    assert get_session().get(address, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_the_tree_lists_files_folders_and_their_last_commits(hub, api, repo):
    api.upload_file(path_or_fileobj=b"new", path_in_repo="config.json", repo_id=repo, commit_message="Later")
    tree = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, expand=True)}
    assert set(tree) == {".gitattributes", "config.json", "inner", "inner/größe #1 100%.txt", "model.safetensors"}
    assert tree["config.json"].last_commit.title == "Later"
    assert tree["model.safetensors"].size == len(WEIGHTS)
    assert [entry.path for entry in api.list_repo_tree(repo, "inner")] == ["inner/größe #1 100%.txt"]


def test_the_card_is_data(hub, api, repo):
    card = b"---\nlicense: mit\ntags: [clip]\n---\n# Phase 1\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    assert ModelCard.load(repo).data.license == "mit"
    assert api.model_info(repo).card_data.tags == ["clip"]


@pytest.mark.parametrize(
    "card",
    [
        "license: [",
        "model-index: [{name: x, results: [{task: {type: t}, dataset: {name: d, type: d}}]}]",
        "model-index: [{name: x, results: [{task: {type: t}, metrics: [{type: m, value: 1}], "
        "dataset: {name: d, type: d, config: null}}]}]",
    ],
    ids=["no YAML", "no metrics", "null as configuration"],
)
def test_a_card_with_errors_is_refused(hub, api, repo, card):
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_file(path_or_fileobj=f"---\n{card}\n---\n".encode(), path_in_repo="README.md", repo_id=repo)


# ---- Accounts ----


def test_who_am_i(hub):
    assert HfApi(token=OWNER).whoami()["name"] == "owner"
    assert HfApi(token=READER).whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_nobody").whoami()


@pytest.mark.parametrize("token", [False, STRANGER])
def test_a_private_repository_is_not_there_for_others(hub, api, token):
    api.create_repo(REPO, private=True)
    assert api.model_info(REPO).private and HfApi(token=READER).repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=token).model_info(REPO)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(REPO, ".gitattributes", token=token)
    api.update_repo_settings(REPO, private=False)
    assert HfApi(token=token).repo_exists(REPO)


@pytest.mark.parametrize("token", [READER, STRANGER])
def test_who_may_not_write_is_refused(hub, repo, folder, token):
    other = HfApi(token=token)
    before = other.model_info(repo).sha
    for write in (
        lambda: other.create_repo("owner/new"),
        lambda: other.upload_folder(repo_id=repo, folder_path=folder, path_in_repo="new"),
        lambda: other.create_commit(repo, [CommitOperationDelete("config.json")], commit_message="Delete"),
        lambda: other.create_branch(repo, branch="phase-1"),
        lambda: other.create_tag(repo, tag="v1"),
        lambda: other.update_repo_settings(repo, private=True),
        lambda: other.delete_repo(repo),
    ):
        with refused(403):
            write()
    assert other.model_info(repo).sha == before


def test_a_large_file_is_taken_at_signed_addresses_only(hub, repo):
    address = f"{hub.endpoint}/{repo}.git/lfs/{'0' * 64}"
    assert get_session().put(address, content=b"x").status_code == 403


def test_a_large_file_with_another_content_is_refused(hub, repo):
    path = f"/{repo}.git/lfs/{'0' * 64}"
    assert get_session().put(f"{hub.endpoint}{path}?signature={hub.signature(path)}", content=b"x").status_code == 400
    assert hub.repository(repo).problems() == []


def test_collections(hub, api, repo):
    collection = api.create_collection("All phases", description="of one run")
    assert api.create_collection("All phases", exists_ok=True).slug == collection.slug
    api.add_collection_item(collection.slug, repo, "model", note="Mod-X")
    with refused(409):
        api.add_collection_item(collection.slug, repo, "model")
    with refused(404):
        api.add_collection_item(collection.slug, "owner/none", "model")
    (item,) = api.get_collection(collection.slug).items
    assert (item.item_id, item.item_type, item.note) == (repo, "model", "Mod-X")


# ---- The libraries above ----

LOAD = """
import sys, torch
from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("owner/clip", revision="phase-1")
torch.save(model.state_dict(), sys.argv[1])
assert CLIPProcessor.from_pretrained("owner/clip", revision="phase-1").tokenizer("a red bar").input_ids
"""


@pytest.mark.slow
def test_a_phase_is_loaded_by_another_process_bit_for_bit(hub, api, processor, tmp_path):
    models = {"phase-1": tiny_clip(processor, seed=1), "phase-2": tiny_clip(processor, seed=2)}
    api.create_repo(REPO)
    for phase, model in models.items():
        api.create_branch(REPO, branch=phase)
        model.push_to_hub(REPO, revision=phase)
        processor.push_to_hub(REPO, revision=phase)
    run_with_hub(hub, LOAD, str(tmp_path / "state"), token=None)
    state = torch.load(tmp_path / "state")
    assert all(torch.equal(state[name], tensor) for name, tensor in models["phase-1"].state_dict().items())
    assert {entry.signed_in for entry in hub.asked("/resolve/.*/model.safetensors")} == {False}


def test_a_model_is_pushed_and_loaded_in_one_process(hub, processor):
    model = tiny_clip(processor, seed=3)
    model.push_to_hub(REPO, private=True)
    processor.push_to_hub(REPO)
    again = CLIPModel.from_pretrained(REPO)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert AutoProcessor.from_pretrained(REPO).tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_data_set_is_pushed_loaded_and_streamed(hub, pairs):
    stream = DatasetDict(phase_1_train=pairs.select(range(16)), phase_1_test=pairs.select(range(16, 24)))
    stream.push_to_hub("owner/stream", private=True)
    stream.push_to_hub("owner/stream", config_name="again")
    for config in ("default", "again"):
        again = load_dataset("owner/stream", config)
        assert {name: part.to_dict() for name, part in again.items()} == {
            name: part.to_dict() for name, part in stream.items()
        }
    rows = list(load_dataset("owner/stream", split="phase_1_test", streaming=True))
    assert [row["caption"] for row in rows] == stream["phase_1_test"]["caption"]
    assert rows[0]["image"].tobytes() == stream["phase_1_test"][0]["image"].tobytes()
    assert hub.repository("owner/stream", "datasets").problems() == []


# ---- Faults ----

NOTHING_DONE = sorted(set(KINDS) - {"drop_after", "cut"})


@pytest.mark.parametrize("kind", NOTHING_DONE)
def test_a_commit_that_fails_changes_nothing_and_can_be_repeated(hub, api, repo, folder, tmp_path, kind):
    before = api.model_info(repo).sha
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    (folder / "config.json").write_text('{"phase": 1}')
    hub.faults = Faults(stall=0.2)
    hub.faults.fail_next(1, kind, "/commit/")
    with pytest.raises(HTTPError):
        api.upload_folder(repo_id=repo, folder_path=folder)
    assert hub.faults.pending == [] and len(hub.asked("^POST .*/commit/")) == 2, "the client repeats no commit"
    assert api.model_info(repo).sha == before
    assert hub.repository(repo).problems() == []
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert loaded(tmp_path) == contents(folder)


def test_a_commit_whose_answer_is_lost_is_there_and_not_repeated(hub, api, repo, folder, tmp_path):
    (folder / "config.json").write_text('{"phase": 1}')
    hub.faults.fail_next(1, "drop_after", "/commit/")
    with pytest.raises(HTTPError):
        api.upload_folder(repo_id=repo, folder_path=folder)
    assert loaded(tmp_path) == contents(folder)
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert len(api.list_repo_commits(repo)) == 3


def test_a_repository_whose_creation_fails_is_not_there(hub, api):
    for kind in ("full", "drop", "500"):
        hub.faults.fail_next(1, kind, "/create")
        with pytest.raises(HTTPError):
            api.create_repo(REPO)
        assert not api.repo_exists(REPO)
    hub.faults.fail_next(1, "drop_after", "/create")
    with pytest.raises(HTTPError):
        api.create_repo(REPO)
    api.create_repo(REPO, exist_ok=True)


def test_an_upload_cut_off_in_the_middle_is_begun_anew_by_the_client(hub, api, folder, tmp_path):
    api.create_repo(REPO)
    hub.faults.fail_next(1, "cut", "^PUT")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert [entry.status for entry in hub.asked("^PUT")] == [None, 200]
    assert hub.repository(REPO).problems() == []
    assert loaded(tmp_path) == contents(folder)


def test_a_full_disk_ends_an_upload_and_leaves_nothing_behind(hub, api, folder, tmp_path):
    api.create_repo(REPO)
    hub.faults.fail_next(1, "full", "^PUT")
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'") as error:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert error.value.__cause__.response.status_code == 507
    assert hub.repository(REPO).problems() == []
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert loaded(tmp_path) == contents(folder)


def test_a_download_cut_off_in_the_middle_is_begun_anew_by_the_client(hub, repo, folder, tmp_path):
    hub.faults.fail_next(1, "cut", "^GET .*/resolve/.*/model.safetensors")
    assert loaded(tmp_path) == contents(folder)
    assert [entry.fault for entry in hub.asked("^GET .*/model.safetensors")] == ["cut", None]


def test_the_client_repeats_the_questions_before_an_upload(hub, api, repo, folder):
    (folder / "config.json").write_text("new")
    hub.faults.fail_next(1, "503", "/preupload/")
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert [entry.status for entry in hub.asked("/preupload/")][1:] == [503, 200]


def test_silence_ends_when_the_client_gives_up(hub, repo):
    hub.faults = Faults(stall=60)
    hub.faults.fail_next(1, "timeout", "^GET")
    with pytest.raises(HTTPError):
        get_session().get(f"{hub.endpoint}/api/models/{repo}", timeout=0.2)


def test_everything_works_in_the_end_when_a_third_of_the_requests_fails(hub, api, folder, tmp_path):
    """Only where the client does not wait by itself, to be quick."""
    hub.faults = Faults(seed=1, rate=1 / 3, where=r"/(create|commit|branch|tag|refs|models/owner/clip$)", stall=0.05)

    def insist(call, *arguments, **options):
        for _ in range(20):
            try:
                return call(*arguments, **options)
            except HTTPError:
                continue
        raise AssertionError("20 attempts have failed")

    insist(api.create_repo, REPO, exist_ok=True)
    for number in range(1, 5):
        (folder / "config.json").write_text(f'{{"phase": {number}}}')
        insist(api.create_branch, REPO, branch=f"phase-{number}", exist_ok=True)
        insist(api.upload_folder, repo_id=REPO, folder_path=folder, revision=f"phase-{number}")
        insist(api.create_tag, REPO, tag=f"v{number}", revision=f"phase-{number}", exist_ok=True)
    assert sum(entry.fault is not None for entry in hub.log) > 5
    hub.faults = Faults()
    assert hub.repository(REPO).problems() == []
    for number in range(1, 5):
        assert loaded(tmp_path, f"v{number}")["config.json"] == f'{{"phase": {number}}}'.encode()
    assert loaded(tmp_path, "v4") == contents(folder)


def fates(faults: Faults, requests) -> dict:
    return {(request, number): faults.choose(*request) for number in range(50) for request in requests}


def test_the_fate_of_a_request_does_not_depend_on_the_others():
    requests = [("POST", "/api/models/o/r/commit/main"), ("GET", "/api/whoami-v2"), ("PUT", "/o/r.git/lfs/1")]
    expected = fates(Faults(seed=3, rate=0.5), requests)
    assert fates(Faults(seed=3, rate=0.5), requests[::-1]) == expected
    assert fates(Faults(seed=4, rate=0.5), requests) != expected


def test_the_rate_is_the_fraction_that_fails():
    drawn = list(fates(Faults(rate=1 / 3), [("GET", f"/{number}") for number in range(60)]).values())
    assert sum(kind is not None for kind in drawn) / len(drawn) == pytest.approx(1 / 3, abs=0.03)
    assert set(drawn) == set(KINDS) - {"409", "412", "cut", "full"} | {None}


def test_faults_are_drawn_where_they_can_happen():
    conflicts = Faults(rate=1.0, kinds=["412"], where="phase-1")
    assert conflicts.choose("POST", "/api/models/o/r/commit/phase-1") == "412"
    assert conflicts.choose("POST", "/api/models/o/r/commit/phase-2") is None
    assert conflicts.choose("GET", "/api/models/o/r/commits/phase-1") is None


def test_listed_faults_come_in_their_order():
    faults = Faults()
    faults.fail_next(2, "500", "^GET")
    faults.fail_next(1, "drop")
    assert [faults.choose("POST", "/"), *(faults.choose("GET", "/") for _ in range(3))] == ["drop", "500", "500", None]


def test_unknown_faults_are_refused():
    with pytest.raises(ValueError, match="no faults of the kinds"):
        Faults(kinds=["earthquake"])


# ---- The hub's own life ----


def test_a_hub_goes_on_in_its_folder(tmp_path, folder):
    with LoopbackHub(tmp_path / "hub") as hub:
        HfApi(hub.endpoint, OWNER).create_repo(REPO, private=True)
        slug = HfApi(hub.endpoint, OWNER).create_collection("Phases").slug
    with LoopbackHub(tmp_path / "hub") as hub:
        api = HfApi(hub.endpoint, OWNER)
        assert api.model_info(REPO).private and api.get_collection(slug).title == "Phases"


def test_the_log_holds_no_token(hub, repo):
    assert OWNER not in str(hub.log)
    assert hub.log[0].signed_in


UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().upload_folder(repo_id="owner/clip", folder_path=sys.argv[1])
"""


@pytest.mark.parametrize("where", ["^PUT", "/commit/"])
def test_a_killed_client_leaves_a_whole_repository(hub, api, folder, tmp_path, where):
    api.create_repo(REPO)
    hub.faults = Faults(stall=60)
    hub.faults.fail_next(1, "timeout", where)
    client = subprocess.Popen([sys.executable, "-c", UPLOAD, folder], env=hub_environment(hub, tmp_path / "home"))
    while not hub.asked(where):
        assert client.poll() is None
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert loaded(tmp_path) == {}
    assert hub.repository(REPO).problems() == []
    run_with_hub(hub, UPLOAD, str(folder))
    assert loaded(tmp_path) == contents(folder)


def test_the_hub_is_a_command(tmp_path, folder):
    command = [sys.executable, TESTS / "hub_server", "--root", tmp_path / "hub"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        api = HfApi(server.stdout.readline().strip(), OWNER)
        api.create_repo(REPO)
        server.terminate()
    assert server.returncode == 0
    assert LoopbackHub(tmp_path / "hub").repository(REPO).problems() == []
