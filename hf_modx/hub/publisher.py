"""Publishing a continual run: one repository on the Hub, a revision for each phase.

    first commit --- claim --- phase 1 --- phase 2            main: the newest phase
        |
        +--- phase 0 --- phase 1 --- phase 2                  branches phase-0, phase-1, phase-2
                                                              tags phase-0-final, phase-1-final, phase-2-final

A phase is one commit with all its files, on a branch that grows from the commit of the phase it was trained from; a
tag says that it is complete. `run.json`, in every commit, names the run and its writer: the one folder that may push.
Every step looks at the Hub first and does what is missing, so it can be repeated after any fault and interruption, and
what an upload brought is looked at again before it counts.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..files import as_json, read_json, write_json
from ..run.folder import PUBLISHED, RECORD
from ..run.identity import refused_changes
from .faults import HubAccessError, HubError, RepositoryConflict, insist, limit_silence

logger = logging.getLogger(__name__)

CARD = "README.md"
CHECKPOINT = "last-checkpoint"
HUB_FILES = (".gitattributes",)
"""Of the Hub itself: never replaced, deleted or fetched."""

COLLECTION = "A continual run: the model after each phase (revision phase-K; main is the newest) and its data."
"""At most 150 characters. The items of a collection are whole repositories."""

LOCK_WAIT = 10.0
"""Seconds that a new process waits for the helpers of one that was killed to end."""

BEGUN = """---
library_name: transformers
tags: [hf_modx, continual-learning]
---

# A continual run that has begun

No phase is published yet. Each will be a revision of its own: `phase-0`, the model before the first phase, `phase-1`
and so on, and `main` the newest.
"""


@dataclass(frozen=True)
class Revision:
    """What is to be published of a phase.

    Attributes:
        number: of the phase.
        parent: number of the phase whose weights it was trained from; None before the first one.
        title: of the commit.
        files: path in the repository -> file on the disk, or content.
    """

    number: int
    parent: int | None
    title: str
    files: Mapping[str, Path | bytes]

    @property
    def branch(self) -> str:
        return _branch(self.number)

    @property
    def tag(self) -> str:
        return _tag(self.number)

    @property
    def weights(self) -> dict[str, Path | bytes]:
        return {path: content for path, content in self.files.items() if path.endswith(".safetensors")}


class HubPublisher:
    """Publishes the phases of a run, and fetches those that another folder has published.

    Uploads are synchronous: training waits for them, and the log says how long. Where several processes train, only
    one of them may use this.

    Args:
        repo_id: "namespace/name", or a name in the namespace of whoever the token belongs to.
        folder: of the run; `hub.json` in it keeps what is known to be published.
        token: default: that of `hf auth login` or HF_TOKEN. It is never written anywhere.
        private: visibility of a repository or collection that is made; what exists keeps its own.

    Attributes:
        on_hub: phase -> commit of those that the Hub says are complete, from phase 0 without a gap.
        published: those of them that are known to be this folder's.
        missing: what the last `publish` could not do, and `reason` why.
        rolled_back_to: phase that the run on the Hub was taken back to; None: it never was.
    """

    def __init__(self, repo_id: str, folder: Path, *, token: str | None = None, private: bool = True):
        self.folder, self.private = folder, private
        self.token = (token or get_token() or "").strip() or None
        self.api = HfApi(token=self.token)
        known = read_json(folder / PUBLISHED) or {}
        is_known = repo_id in (known.get("repo_id"), known.get("repo_id", "").split("/")[-1])
        self._known = known if is_known else {}
        self.repo_id = self._known.get("repo_id", repo_id)
        self.published = {int(number): commit for number, commit in self._known.get("phases", {}).items()}
        self.on_hub: dict[int, str] = {}
        self.missing: tuple[str, ...] = ()
        self.reason = ""
        self.rolled_back_to: int | None = None
        self._main: str | None = None  # the head of main as this writer knows it; None: not its writer yet
        self._main_phase: int | None = None  # whose files it holds
        self._claim: dict[str, Any] = {}
        self._lock: FileLock | None = None
        self._has_access = False

    # ---- Before training ----

    @property
    def has_pushed(self) -> bool:
        """This folder became the writer of the repository in an earlier start."""
        return bool(self._known)

    def check_access(self) -> None:
        """Raise a HubAccessError unless there is a token that the Hub accepts and that is not for reading alone."""
        if self.token is None:
            raise HubAccessError("push_to_hub needs a token that may write: run `hf auth login`, or set HF_TOKEN.")
        if self._has_access:
            return
        limit_silence()
        try:
            user = self._insist(self.api.whoami, attempts=3)
        except HubError as error:
            raise (HubAccessError(str(error)) if error.status in (401, 403) else error) from None
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            name = user["name"]
            raise HubAccessError(f"The token of {name} may only read: run `hf auth login` with one that may write.")
        if "/" not in self.repo_id:
            self.repo_id = f"{user['name']}/{self.repo_id}"
        self._has_access = True

    def has_repository(self) -> bool:
        """Whether there is one, as far as the token may see.

        Raises:
            HubError: the Hub does not answer.
        """
        return self._insist(lambda: self.api.repo_exists(self.repo_id))

    def lock(self) -> None:
        """Raise a RepositoryConflict where another process of this user on this machine is publishing to it."""
        name = hashlib.sha256(f"{self.api.endpoint} {self.repo_id}".encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else "user"
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"hf_modx-{user}-{name}.lock")
        try:
            self._lock.acquire(timeout=LOCK_WAIT)
        except Timeout:
            raise RepositoryConflict(
                f"Another run on this machine is publishing to {self.repo_id}. Wait until it has ended, or choose "
                "another hub_model_id."
            ) from None

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def claim(self, record: Mapping[str, Any], *, is_new: bool, goes_back: bool = False) -> str:
        """Make the repository, if there is none, and this folder its writer; the commit proves that the token may
        write.

        A new folder of the same settings goes on with a run that another has begun. Should the other still run
        somewhere, it is refused at its next upload. Of two that come at once only one gets in.

        Where the run was asked to forget pairs since, the repository is told how often, and what is published of a
        phase that is not complete is removed: it was begun with them.

        Args:
            record: `run_id`, `writer` and `identity` of the run, to become `run.json`.
            is_new: nothing is trained in the folder.
            goes_back: to take back phases of the folder's own run, whatever their settings.

        Returns:
            The `run_id` that counts: that of the run on the Hub where there is one.

        Raises:
            RepositoryConflict: the repository holds something else, or another folder has become its writer.
            HubAccessError: there is no token, or it may not write here.
            HubError: the Hub does not answer.
        """
        self._claim = {"record": record, "is_new": is_new}
        self.check_access()
        try:
            self._become_writer(record, is_new, goes_back)
        except (HubError, RepositoryConflict) as error:
            self._main = None
            if getattr(error, "status", None) in (401, 403):
                raise HubAccessError(f"The token may not write to {self.repo_id}. {error}") from None
            raise
        self.published = {k: commit for k, commit in self.published.items() if self.on_hub.get(k) == commit}
        self._remember()
        return self._claim["record"]["run_id"]

    def _become_writer(self, record: Mapping[str, Any], is_new: bool, goes_back: bool) -> None:
        heads, tags = self._insist(self._references_or_create)
        found = self._record_at(heads["main"])
        self.on_hub = _complete(tags)
        self._refuse_others(found, record, is_new, {*heads, *tags} - {"main"}, heads["main"])
        if found is not None and not goes_back:
            self._refuse_unfinished_rollback(found, {*heads.values(), *tags.values()})
            self._refuse_other_settings(found, record)
        if found is not None:
            self._main_phase, self.rolled_back_to = found.get("phase"), found.get("rolled_back_to")
            record = {**record, "run_id": found["run_id"], "phase": self._main_phase}
        self._claim = {"record": record, "is_new": is_new}
        self._main = heads["main"]  # from here on a head that this writer has not made is another one's
        if found is None:
            self._bring(
                "main", {RECORD: as_json(record).encode(), CARD: BEGUN.encode()}, "A continual run begins", None
            )
        elif _deletions(record) > _deletions(found):
            for number in {_phase_of(name) for name in heads} - {_phase_of(name) for name in tags} - {-1}:
                self._insist(partial(self._remove, number))  # begun with what is to be forgotten
            self._bring("main", {RECORD: as_json(record).encode()}, "Pairs are to be forgotten", None)
        elif not _is_writer(record, found):
            self._bring("main", {RECORD: as_json(record).encode()}, "The run goes on", None)

    def _refuse_others(self, found, record, is_new: bool, references: Iterable[str], head: str) -> None:
        other = "Choose another hub_model_id."
        if found is None:
            strange = sorted({*self._tree(head), *references} - {*HUB_FILES, CARD})
            if strange:
                raise RepositoryConflict(
                    f"{self.repo_id} holds something else than a run of hf_modx: {', '.join(strange[:5])}. {other}"
                )
            return
        is_same = found["run_id"] == record["run_id"]
        if not _is_writer(record, found) and not is_new:
            if is_same:
                raise RepositoryConflict(self._overtaken())
            raise RepositoryConflict(f"{self.repo_id} holds another run than {self.folder}. {other}")

    def _refuse_other_settings(self, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        if not self.on_hub and found["run_id"] == record["run_id"]:
            return
        last = max(self.on_hub, default=0)
        if last > (found.get("phase") or 0):  # main is behind: a phase may have begun with settings it does not know
            newest = self._record_at(self.on_hub[last]) or found
            asked = max(map(_deletions, (found, newest)))  # main may have learned it after the phase
            found = {**newest, "identity": {**newest["identity"], "deletions": asked}}
        differences = refused_changes(found, record["identity"], last)
        if differences:
            raise RepositoryConflict(
                f"{self.repo_id} holds a different run: {'; '.join(differences)}. Choose another hub_model_id."
            )

    def _refuse_unfinished_rollback(self, found: Mapping[str, Any], named: set[str]) -> None:
        if named & set(found.get("undone", ())):
            raise RepositoryConflict(
                f"A rollback of {self.repo_id} was interrupted. Finish it in the folder where it was begun: hf-modx "
                f"rollback RUN --to phase-{found['rolled_back_to']}"
            )

    def _overtaken(self) -> str:
        return (
            f"Another folder has become the writer of {self.repo_id} and goes on with the run. What this one has "
            f"trained stays in {self.folder}. To go on from what is published, start in an empty output_dir; to "
            "publish this one elsewhere, choose another hub_model_id."
        )

    # ---- Publishing ----

    def publish(self, finished: int, revision: Callable[[int], Revision]) -> tuple[str, ...]:
        """Publish the phases that are not, each with its branch and tag, and bring main to the last of them. What
        fails is left for the next time, and the log says so.

        Args:
            finished: number of finished phases, phase 0 included.
            revision: number of a phase -> what is to be published of it; asked only for those that are published now.

        Returns:
            What is missing: names of phases, "main".

        Raises:
            RepositoryConflict: another folder has become the writer.
        """
        self.missing = ()
        try:
            if self._main is None:
                self.claim(**self._claim)
            for number in range(finished):
                if number not in self.published:
                    self._publish_phase(revision(number))
            if self._main_phase != finished - 1:  # a card of it that somebody has edited there stays
                self._publish_main(revision(finished - 1))
        except HubError as error:
            phases = [_branch(number) for number in range(finished) if number not in self.published]
            self.missing, self.reason = (*phases, "main"), str(error)
            listed = ", ".join(self.missing)
            logger.warning("Not published to %s: %s. It is tried again. %s", self.repo_id, listed, error)
        return self.missing

    def _publish_phase(self, revision: Revision) -> None:
        start = time.monotonic()
        self._require_weights(revision)
        commit = self._look()[1].get(revision.tag)
        if commit is None:
            commit = self._commit_phase(revision)
            self._insist(partial(self._set_tag, revision.tag, commit))
        elif self._operations(commit, revision.weights, None):
            raise RepositoryConflict(
                f"{revision.branch} of {self.repo_id} holds other weights than {self.folder / revision.branch}. "
                "Choose another hub_model_id."
            )
        self.published[revision.number] = commit
        self._remember()
        seconds = time.monotonic() - start
        logger.info("Published %s of %s (%s) in %.1f s", revision.branch, self.repo_id, commit[:7], seconds)

    def _require_weights(self, revision: Revision) -> None:
        if not revision.weights:
            raise HubError(f"The weights of {revision.branch} are gone from {self.folder}.")

    def _commit_phase(self, revision: Revision) -> str:
        self._grow_branch(revision.branch, revision.parent)
        return self._bring(revision.branch, revision.files, revision.title)

    def _grow_branch(self, branch: str, parent: int | None) -> None:
        if parent is None:
            # Main's first commit, which the Hub makes with a repository.
            start = self._insist(lambda: self.api.list_repo_commits(self.repo_id)[-1].commit_id)
        else:
            start = self.published[parent]
        self._insist(lambda: self.api.create_branch(self.repo_id, branch=branch, revision=start, exist_ok=True))

    def _set_tag(self, tag: str, commit: str) -> None:
        self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
        if self._references()[1].get(tag) != commit:
            raise RepositoryConflict(self._overtaken())

    def _publish_main(self, revision: Revision) -> None:
        self._require_weights(revision)
        self._bring("main", revision.files, revision.title)
        self._main_phase = revision.number
        self._remember(main=revision.number)

    def go_back(self, revision: Revision) -> None:
        """Make a phase the newest one again: main gets it in a commit of its own, and the tags and branches of later
        phases are removed, the last first. Can be repeated. Main's commit names the commits that are given up: until
        no branch and no tag has one of them, nobody can go on with the run.

        Args:
            revision: of the phase, with `run.json`. Where it is not published, only that comes to main.

        Raises:
            RepositoryConflict: another folder has become the writer.
            HubError: the Hub refuses it, or does not answer.
        """
        heads, tags = self._look()
        later = sorted({k for name in (*heads, *tags) if (k := _phase_of(name)) > revision.number}, reverse=True)
        is_published = revision.number in self.on_hub
        main = self._record_at(heads["main"]) or {}
        kept = {commit for name, commit in {**heads, **tags}.items() if 0 <= _phase_of(name) <= revision.number}
        undone = {commit for name, commit in [*heads.items(), *tags.items()] if _phase_of(name) in later} - kept
        if main.get("rolled_back_to") == revision.number:
            undone |= set(main.get("undone", ()))
        phase = revision.number if is_published else main.get("phase")
        record = {**self._claim["record"], "phase": phase, "undone": sorted(undone)}
        files = {**(revision.files if is_published else {}), RECORD: as_json(record).encode()}
        self._bring("main", files, revision.title, "" if is_published else None)
        for number in later:
            self._insist(partial(self._remove, number))
        self.published = {k: commit for k, commit in self.published.items() if k <= revision.number}
        self._main_phase = phase
        self._remember(main=phase)

    def _remove(self, number: int) -> None:
        """The tag of a phase, and then its branch."""
        heads, tags = self._look()
        if _tag(number) in tags:
            self.api.delete_tag(self.repo_id, tag=_tag(number))
        if _branch(number) in heads:
            self.api.delete_branch(self.repo_id, branch=_branch(number))

    def push_checkpoint(self, revision: Revision) -> None:
        """Bring a checkpoint inside a phase to the branch of that phase. What fails is logged and not repeated: the
        next checkpoint replaces it.

        Args:
            revision: `files` are those below `last-checkpoint/`, a card, and `run.json`. The other files of the branch
                stay as they are: the model after the phase before.
        """
        start = time.monotonic()
        try:
            if self._main is None or revision.parent not in self.published:
                raise HubError(f"The phase that {revision.branch} starts from is not published yet.")
            self._look()
            self._grow_branch(revision.branch, revision.parent)
            self._bring(revision.branch, revision.files, revision.title, replaced=f"{CHECKPOINT}/")
        except HubError as error:
            logger.warning("%s: the checkpoint is not published. %s", revision.title, error)
            return
        logger.info("Published %s of %s in %.1f s", revision.title, self.repo_id, time.monotonic() - start)

    def collect(self, title: str, datasets: Iterable[str]) -> None:
        """Put the repository and the data sets, by their ids, into the collection of this title, made where there is
        none. A failure counts as missing."""
        datasets = list(datasets)
        if self._known.get("collection") == [title, *datasets]:  # next month's data may be another data set
            return
        owner = self.repo_id.split("/")[0]
        try:
            collection = self._insist(
                lambda: self.api.create_collection(
                    title, namespace=owner, description=COLLECTION, private=self.private, exists_ok=True
                )
            )
            for item in [(self.repo_id, "model"), *((dataset, "dataset") for dataset in datasets)]:
                self._insist(partial(self.api.add_collection_item, collection.slug, *item, exists_ok=True))
        except HubError as error:
            self.missing, self.reason = (*self.missing, f"the collection {title!r}"), str(error)
            return
        self._remember(collection=[title, *datasets])

    # ---- Fetching ----

    def fetch_phase(self, number: int, folder: Path) -> None:
        """The files of a complete phase into a new folder, checked against what the Hub says of each."""
        commit = self.on_hub[number]
        self._insist(lambda: self._fetch(commit, folder))
        self.published[number] = commit
        self._remember()
        logger.info("Fetched phase-%d of %s (%s)", number, self.repo_id, commit[:7])

    def fetch_checkpoint(self, number: int, folder: Path) -> bool:
        """The checkpoint inside a phase into a new folder; False where none is published.

        Its optimizer and random states are pickles. The Trainer reads them with `weights_only=True`, which builds
        tensors and plain values and runs no code.
        """
        heads, _ = self._insist(self._references)
        commit = heads.get(_branch(number))
        if commit is None or f"{CHECKPOINT}/trainer_state.json" not in self._tree(commit):
            return False
        self._insist(lambda: self._fetch(commit, folder, f"{CHECKPOINT}/"))
        for path in (folder / CHECKPOINT).iterdir():
            os.replace(path, folder / path.name)
        (folder / CHECKPOINT).rmdir()
        return True

    def _fetch(self, commit: str, folder: Path, inside: str = "") -> None:
        """All files of a commit, or those of one folder of it."""
        wanted = {path: file for path, file in self._tree(commit).items() if path.startswith(inside)}
        snapshot_download(
            self.repo_id,
            revision=commit,
            local_dir=folder,
            token=self.token,
            allow_patterns=f"{inside}*",
            ignore_patterns=list(HUB_FILES),
        )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes on the download
        for path, file in wanted.items():
            if not (folder / path).is_file() or not _is_same(folder / path, file):
                shutil.rmtree(folder)
                raise OSError(f"{path} of {self.repo_id} did not arrive as it is on the Hub.")

    # ---- Looking at the Hub, and changing it ----

    def _insist(self, step, attempts: int | None = None) -> Any:
        return insist(step, attempts=attempts, secret=self.token)

    def _references(self) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags with the commits they name."""
        found = self.api.list_repo_refs(self.repo_id)
        return tuple({ref.name: ref.target_commit for ref in refs} for refs in (found.branches, found.tags))

    def _references_or_create(self) -> tuple[dict[str, str], dict[str, str]]:
        try:
            return self._references()
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, private=self.private)
            return self._references()

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        """All files of a commit but the Hub's own."""
        listed = self._insist(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
        return {file.path: file for file in listed if isinstance(file, RepoFile) and file.path not in HUB_FILES}

    def _record_at(self, commit: str) -> dict[str, Any] | None:
        """The `run.json` of a commit, if it is one."""
        if RECORD not in self._tree(commit):
            return None
        path = self._insist(lambda: hf_hub_download(self.repo_id, RECORD, revision=commit, token=self.token))
        try:
            record = read_json(Path(path))
        except ValueError:
            return None
        is_ours = isinstance(record, dict) and {"run_id", "writer", "identity"} <= set(record)
        return record if is_ours and {"hyperparameters", "phases"} <= set(record["identity"]) else None

    def _look(self) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags, if this folder is still the writer."""
        heads, tags = self._insist(self._references)
        if heads["main"] != self._main:
            found = self._record_at(heads["main"])
            if not _is_writer(self._claim["record"], found):
                raise RepositoryConflict(self._overtaken())
            self._main, self._main_phase = heads["main"], found.get("phase")
        return heads, tags

    def _head(self, branch: str) -> str:
        """The commit that a branch names, if this folder is still the writer."""
        heads, _ = self._look()
        if branch not in heads:
            raise OSError(f"{self.repo_id} has no branch {branch}.")
        return heads[branch]

    def _bring(self, branch: str, files: Mapping[str, Path | bytes], title: str, replaced: str | None = "") -> str:
        """One commit, if any, after which the branch holds these files; of other files it loses those whose path
        begins with `replaced` (None: it keeps all). Returns the head of the branch."""

        def step() -> str:
            head = self._head(branch)
            operations = self._operations(head, files, replaced)
            if operations:
                done = self.api.create_commit(
                    self.repo_id, operations, commit_message=title, revision=branch, parent_commit=head
                )
                if branch == "main":
                    self._main = done.oid
                head = self._head(branch)
                if self._operations(head, files, replaced):
                    raise OSError(f"{branch} of {self.repo_id} does not hold what was sent.")
            return head

        return self._insist(step)

    def _operations(self, commit: str, files: Mapping[str, Path | bytes], replaced: str | None) -> list:
        """What makes the files of a commit these files."""
        there = self._tree(commit)
        changed = [path for path, content in files.items() if path not in there or not _is_same(content, there[path])]
        gone = [path for path in there if path not in files and replaced is not None and path.startswith(replaced)]
        return [
            *(CommitOperationAdd(path, files[path]) for path in changed),
            *(CommitOperationDelete(path) for path in gone),
        ]

    def _remember(self, **changed: Any) -> None:
        phases = dict(sorted(self.published.items()))
        self._known = {**self._known, "repo_id": self.repo_id, "phases": phases, **changed}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / PUBLISHED, self._known)


def _branch(number: int) -> str:
    return f"phase-{number}"


def _tag(number: int) -> str:
    # Not the branch's name: a branch and a tag of one name would be ambiguous.
    return f"phase-{number}-final"


def _phase_of(name: str) -> int:
    """The phase that a branch or a tag is named after; -1: none."""
    match = re.fullmatch(r"phase-(\d+)(-final)?", name)
    return int(match[1]) if match else -1


def _complete(tags: Mapping[str, str]) -> dict[int, str]:
    """Phase -> commit for the phases that have their tag, up to the first that has not."""
    found: dict[int, str] = {}
    while _tag(len(found)) in tags:
        found[len(found)] = tags[_tag(len(found))]
    return found


def _deletions(record: Mapping[str, Any]) -> int:
    """How often the run was asked to forget pairs."""
    return record["identity"].get("deletions", 0)


def _is_writer(record: Mapping[str, Any], found: Mapping[str, Any] | None) -> bool:
    return found is not None and all(found[key] == record[key] for key in ("run_id", "writer"))


def _is_same(content: Path | bytes, file: RepoFile) -> bool:
    """Whether the file on the Hub has this content."""
    if isinstance(content, Path):
        status = content.stat()
        if status.st_size != file.size:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == _sha256(content, status.st_mtime_ns)
        content = content.read_bytes()
    if file.lfs is not None:
        return file.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return file.blob_id == _git_id(content)


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@lru_cache(maxsize=64)
def _sha256(path: Path, modified: int) -> str:
    """Of a large file, read once as long as the time of its last change is the same."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
