"""A repository of the Hub: a bare git repository with the large files beside it, keyed by their SHA-256."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# As in the .gitattributes that the Hub writes into a new repository.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npy", ".npz", ".arrow", ".parquet", ".zip")
LFS_THRESHOLD = 10 * 1024 * 1024
DATE = "%Y-%m-%dT%H:%M:%S.%fZ"  # the only form that the client reads
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
POINTER_PATTERN = re.compile(POINTER.format(oid="([0-9a-f]{64})", size="([0-9]+)").encode())


class HubError(Exception):
    """An answer that refuses; `code` is the X-Error-Code by which the client chooses the exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        super().__init__(message)
        self.status, self.code = status, code
        self.headers: dict[str, str] = {}
        self.content = {"error": message, **content}


def now() -> str:
    return datetime.now(timezone.utc).strftime(DATE)


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str) -> HubError:
    return HubError(404, f"Entry not found: {path}", "EntryNotFound")


@dataclass(frozen=True)
class Entry:
    """A file or folder of a tree. `size` is that of the content, also of a large file; folders have 0."""

    path: str
    kind: str
    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int | None = None

    @property
    def is_file(self) -> bool:
        return self.kind == "blob"


@dataclass(frozen=True)
class Operation:
    """One line of a commit. `content` of a file, `sha256` of a large one, neither where `path` is deleted."""

    path: str
    content: bytes | None = None
    sha256: str | None = None
    is_folder: bool = False


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps such a file in LFS; an empty one never is."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD)


class Repository:
    """Every change of a reference is one `git update-ref` with the old value: it happens or it does not.

    Args:
        folder: of the bare repository.
        lock: held while references change.
    """

    def __init__(self, folder: Path, lock: threading.RLock):
        self.folder, self.lock = folder, lock

    # ---- Life ----

    def create(self, *, author: str, private: bool, before_publishing: Callable[[], None] = lambda: None) -> None:
        """With an initial commit, as the Hub makes it."""
        shutil.rmtree(self.folder, ignore_errors=True)  # what an attempt that failed has left
        self.folder.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", "--initial-branch=main", ".")
        self.git("config", "gc.auto", "0")
        lines = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        tree = self._write_tree({".gitattributes": self._write_blobs([lines.encode()])[0]})
        self.git("update-ref", "refs/heads/main", self._write_commit(tree, [], "initial commit", author), "")
        before_publishing()
        self._write_settings({"private": private, "created": now()})

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "hub.json").read_text())

    def update_settings(self, **changes: Any) -> None:
        self._write_settings({**self.settings, **changes})

    def _write_settings(self, settings: dict[str, Any]) -> None:
        # The last file of a new repository: without it there is none.
        temporary = self.folder / "hub.json.tmp"
        temporary.write_text(json.dumps(settings))
        os.replace(temporary, self.folder / "hub.json")

    @property
    def exists(self) -> bool:
        return (self.folder / "hub.json").exists()

    # ---- References ----

    def references(self, kind: str) -> dict[str, str]:
        """Name to commit of all "heads" or "tags"; an annotated tag names the commit it stands for."""
        form = "--format=%(refname:lstrip=2)%00%(objectname)%00%(*objectname)"
        lines = self.git("for-each-ref", form, f"refs/{kind}").splitlines()
        return {name: peeled or commit for name, commit, peeled in (line.split("\0") for line in lines)}

    def commit_of(self, revision: str) -> str:
        """The commit of a branch, a tag or an abbreviated or full commit id."""
        commit = self.references("heads").get(revision) or self.references("tags").get(revision)
        if commit is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            commit = self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", check=False)
        if commit is None:
            raise revision_not_found(revision)
        return commit.strip()

    def create_branch(self, name: str, start: str) -> None:
        self._create_reference("heads", "branch", name, self.commit_of(start))

    def create_tag(self, name: str, revision: str, message: str | None, author: str) -> None:
        """An annotated tag where there is a message."""
        commit = self.commit_of(revision)
        if message:
            text = (
                f"object {commit}\ntype commit\ntag {name}\ntagger {author} <{author}@loopback> 0 +0000\n\n{message}\n"
            )
            commit = self.git("mktag", stdin=text.encode()).strip()
        self._create_reference("tags", "tag", name, commit)

    def _create_reference(self, kind: str, word: str, name: str, target: str) -> None:
        if name.startswith("refs/") or self.git("check-ref-format", f"refs/{kind}/{name}", check=False) is None:
            raise HubError(400, f"Invalid name of a {word}: {name!r}")
        with self.lock:
            if name in self.references(kind):
                raise HubError(409, f"Reference already exists: {word} {name!r}")
            self.git("update-ref", f"refs/{kind}/{name}", target, "")

    def delete_reference(self, kind: str, name: str) -> None:
        with self.lock:
            if (kind, name) == ("heads", "main"):
                raise HubError(403, "The default branch cannot be deleted")
            if name not in self.references(kind):
                raise revision_not_found(name)
            self.git("update-ref", "-d", f"refs/{kind}/{name}")

    # ---- Reading ----

    def tree(self, commit: str, path: str = "", *, recursive: bool = False) -> list[Entry]:
        """What lies in a folder, or everything below it."""
        options = ["-r", "-t"] if recursive else []
        listing = self.git("ls-tree", "-z", "-l", *options, f"{commit}:{path}", check=False)
        if listing is None:
            raise entry_not_found(path)
        return self._entries(listing, f"{path}/" if path else "")

    def entries(self, commit: str, paths: Iterable[str]) -> list[Entry]:
        """Those of the files and folders that exist."""
        paths = [path.strip("/") for path in paths]
        return self._entries(self.git("ls-tree", "-z", "-l", commit, "--", *paths), "") if paths else []

    def entry(self, commit: str, path: str) -> Entry:
        for found in self.entries(commit, [path]):
            if found.is_file:
                return found
        raise entry_not_found(path)

    def _entries(self, listing: str, prefix: str) -> list[Entry]:
        rows = [
            re.match(r"\d+ (\w+) (\w+) +(\S+)\t(.*)", line, re.DOTALL).groups() for line in listing.split("\0")[:-1]
        ]
        # No pointer is longer: what is short enough is looked into.
        short = [oid for kind, oid, size, _ in rows if kind == "blob" and 100 < int(size) < 160]
        pointers = {oid: POINTER_PATTERN.fullmatch(blob) for oid, blob in self._blobs(short).items()}
        found = []
        for kind, oid, size, path in rows:
            pointer = pointers.get(oid)
            if pointer:
                found.append(Entry(prefix + path, kind, oid, int(pointer[2]), pointer[1].decode(), int(size)))
            else:
                found.append(Entry(prefix + path, kind, oid, 0 if kind == "tree" else int(size)))
        return found

    def content(self, entry: Entry, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop`, exclusive, of a file."""
        if entry.sha256 is None:
            return self._blobs([entry.oid])[entry.oid][start:stop]
        with open(self.large_file(entry.sha256), "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)

    def _blobs(self, oids: list[str]) -> dict[str, bytes]:
        if not oids:
            return {}
        out = self._run("cat-file", "--batch", stdin="\n".join(oids).encode() + b"\n").stdout
        found, at = {}, 0
        for oid in oids:
            header, _, _ = out[at:].partition(b"\n")
            start = at + len(header) + 1
            at = start + int(header.split()[2])
            found[oid] = out[start:at]
            at += 1
        return found

    def log(self, commit: str, path: str | None = None, limit: int = -1) -> list[dict[str, str]]:
        """Commits that led to this one, newest first; only those that changed `path`, where it is given."""
        where = ["--", path] if path is not None else []
        form = ["--format=%H%x00%an%x00%cd%x00%s%x00%b%x1e", f"--date=format-local:{DATE.replace('%f', '000')}"]
        rows = self.git("log", *form, f"--max-count={limit}", commit, *where, TZ="UTC").split("\x1e\n")[:-1]
        return [dict(zip(("id", "author", "date", "title", "message"), row.split("\0"), strict=True)) for row in rows]

    # ---- Large files ----

    def large_file(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256[:2] / sha256

    def has_large_file(self, sha256: str) -> bool:
        return self.large_file(sha256).exists()

    def receive_large_file(self, sha256: str, chunks: Iterable[bytes]) -> None:
        """Nothing is there under the name before all of it is.

        Raises:
            HubError: 400 where the content has another SHA-256.
        """
        self.folder.joinpath("lfs").mkdir(exist_ok=True)
        temporary = self.folder / "lfs" / f"incoming-{uuid.uuid4()}"
        digest = hashlib.sha256()
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise HubError(400, f"The content has the SHA-256 {digest.hexdigest()} and not {sha256}")
            final = self.large_file(sha256)
            final.parent.mkdir(exist_ok=True)
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    # ---- Writing ----

    def commit(
        self,
        branch: str,
        operations: Iterable[Operation],
        *,
        message: str,
        author: str,
        parent: str | None = None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> str:
        """All operations as one new commit on a branch.

        Raises:
            HubError: 404 without the branch or a file to delete, 412 where the branch stands elsewhere than at
                `parent`, 400 where a large file was not uploaded before.
        """
        with self.lock:
            head = self.references("heads").get(branch)
            if head is None:
                raise revision_not_found(branch)
            if parent is not None and not head.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = self._write_tree(self._changed(head, operations))
            commit = self._write_commit(tree, ["-p", head], message, author)
            before_publishing()
            self.git("update-ref", f"refs/heads/{branch}", commit, head)
            return commit

    def _changed(self, head: str, operations: Iterable[Operation]) -> dict[str, str]:
        """Path to blob after the operations, which count in their order."""
        operations = list(operations)
        files = {entry.path: entry.oid for entry in self.tree(head, recursive=True) if entry.is_file}
        added = [operation for operation in operations if operation.content is not None or operation.sha256]
        blobs = self._write_blobs([self._stored(operation) for operation in added])
        blob_of = {id(operation): blob for operation, blob in zip(added, blobs, strict=True)}
        for operation in operations:
            if id(operation) in blob_of:
                files[operation.path] = blob_of[id(operation)]
                continue
            inside = operation.path.strip("/") + "/"
            gone = [path for path in files if path.startswith(inside)] if operation.is_folder else [operation.path]
            if not gone or gone[0] not in files:
                raise HubError(404, f"A file with this name doesn't exist: {operation.path}", "EntryNotFound")
            for path in gone:
                del files[path]
        return files

    def _stored(self, operation: Operation) -> bytes:
        if operation.sha256 is None:
            return operation.content
        if not self.has_large_file(operation.sha256):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {operation.path}")
        size = self.large_file(operation.sha256).stat().st_size
        return POINTER.format(oid=operation.sha256, size=size).encode()

    def _write_blobs(self, contents: list[bytes]) -> list[str]:
        with tempfile.TemporaryDirectory() as scratch:
            paths = [Path(scratch, str(number)) for number in range(len(contents))]
            for path, content in zip(paths, contents, strict=True):
                path.write_bytes(content)
            names = "".join(f"{path}\n" for path in paths).encode()
            return self.git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=names).split()

    def _write_tree(self, files: dict[str, str]) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            environment = {"GIT_INDEX_FILE": str(Path(scratch, "index"))}
            lines = "".join(f"100644 {oid}\t{path}\0" for path, oid in files.items()).encode()
            if self.git("update-index", "-z", "--index-info", stdin=lines, check=False, **environment) is None:
                raise HubError(400, "A path of the commit is not valid")
            return self.git("write-tree", **environment).strip()

    def _write_commit(self, tree: str, parents: list[str], message: str, author: str) -> str:
        email = f"{author}@loopback"
        names = {"GIT_AUTHOR_NAME": author, "GIT_AUTHOR_EMAIL": email}
        names |= {"GIT_COMMITTER_NAME": author, "GIT_COMMITTER_EMAIL": email}
        return self.git("commit-tree", tree, *parents, "-F", "-", stdin=message.encode(), **names).strip()

    # ---- For asserts ----

    def problems(self) -> list[str]:
        """What `git fsck` says, and large files that are missing, wrong or left half-written."""
        check = self._run("fsck", "--full", "--strict", "--no-dangling", "--no-progress")
        found = (check.stdout + check.stderr).decode().splitlines()
        for commit in {*self.references("heads").values(), *self.references("tags").values()}:
            for entry in self.tree(commit, recursive=True):
                if entry.sha256 and not self.has_large_file(entry.sha256):
                    found.append(f"{entry.path} of {commit} points to no large file")
                elif entry.sha256 and hashlib.sha256(self.content(entry)).hexdigest() != entry.sha256:
                    found.append(f"{entry.path} of {commit} has another content")
        return found + [f"{path} was left behind" for path in self.folder.glob("lfs/incoming-*")]

    # ---- git ----

    def git(self, *arguments: str, stdin: bytes = b"", check: bool = True, **environment: str) -> str | None:
        """What the command prints; without `check`, None where it fails."""
        result = self._run(*arguments, stdin=stdin, **environment)
        if result.returncode != 0:
            if not check:
                return None
            raise RuntimeError(f"git {' '.join(arguments)}: {result.stderr.decode()}")
        return result.stdout.decode()

    def _run(self, *arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
        # The settings of whoever runs the tests do not matter.
        fixed = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_DIR": str(self.folder)}
        return subprocess.run(
            ["git", *arguments],
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            env={**os.environ, **fixed, **environment},
        )
