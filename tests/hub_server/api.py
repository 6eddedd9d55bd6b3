"""What the Hub answers to each request. A function for each endpoint; the route stands above it."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from .card import card_problems, front_matter
from .repository import Entry, HubError, Operation, Repository, entry_not_found, is_large, now

if TYPE_CHECKING:
    from .server import Account, LoopbackHub


@dataclass
class Request:
    """What came over the wire. `path` is still percent-encoded, so that a slash in a name is no separator."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    chunks: Callable[[], Iterator[bytes]]
    account: "Account | None"
    use_disk: Callable[[], None]
    _body: bytes | None = None

    @property
    def body(self) -> bytes:
        if self._body is None:
            self._body = b"".join(self.chunks())
        return self._body

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode())


@dataclass
class Answer:
    status: int = 200
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+?)"


def route(method: str, pattern: str) -> Callable:
    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def answer(hub: "LoopbackHub", request: Request) -> Answer:
    """The answer of the first route that fits, also where it refuses."""
    try:
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(request.path)
            if match and request.method in (method, "HEAD" if method == "GET" else method):
                found = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                result = function(hub, request, **found)
                return result if isinstance(result, Answer) else Answer(content=result)
        raise HubError(404, f"This Hub serves no {request.method} {request.path}")
    except HubError as error:
        headers = {"X-Error-Message": str(error).encode("ascii", "replace").decode()}
        if error.code is not None:
            headers["X-Error-Code"] = error.code
        return Answer(error.status, error.content, headers | error.headers)


# ---- Accounts ----


def signed_in(request: Request) -> "Account":
    if request.account is None:
        raise HubError(401, "Invalid username or password.")
    return request.account


def owner_of(request: Request, namespace: str) -> "Account":
    account = signed_in(request)
    if not account.may_write(namespace):
        raise HubError(403, f"You don't have the rights to write to the namespace {namespace!r}")
    return account


def readable(hub: "LoopbackHub", request: Request, name: str, kind: str = "models") -> Repository:
    """The repository, or the Hub's refusal: what may not be seen does not exist."""
    repository = hub.repository(name, kind)
    namespace = name.split("/")[0]
    visible = repository.exists and (
        not repository.settings["private"] or (request.account is not None and request.account.may_read(namespace))
    )
    if not visible:
        message = "Repository not found" if request.account else "Invalid username or password."
        raise HubError(404 if request.account else 401, message, "RepoNotFound")
    return repository


def writable(hub: "LoopbackHub", request: Request, name: str, kind: str = "models") -> Repository:
    repository = readable(hub, request, name, kind)
    owner_of(request, name.split("/")[0])
    return repository


@route("GET", "/api/whoami-v2")
def whoami(hub, request):
    account = signed_in(request)
    return {
        "type": "user",
        "id": account.name,
        "name": account.name,
        "fullname": account.name,
        "orgs": [{"type": "org", "name": name, "fullname": name, "roleInOrg": "write"} for name in account.orgs],
        "auth": {"type": "access_token", "accessToken": {"displayName": "tests", "role": account.role}},
    }


# ---- Repositories ----


@route("POST", "/api/repos/create")
def create_repository(hub, request):
    wanted = request.json()
    namespace = wanted.get("organization") or signed_in(request).name
    account = owner_of(request, namespace)
    kind = wanted.get("type", "model") + "s"
    name = f"{namespace}/{wanted['name']}"
    url = f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
    with hub.lock:
        repository = hub.repository(name, kind)
        if repository.exists:
            raise HubError(409, f"You already created this {kind[:-1]} repo", url=url)
        private = wanted.get("visibility") == "private"
        repository.create(author=account.name, private=private, before_publishing=request.use_disk)
    return {"url": url, "name": name, "id": name}


@route("DELETE", "/api/repos/delete")
def delete_repository(hub, request):
    wanted = request.json()
    namespace = wanted.get("organization") or signed_in(request).name
    repository = writable(hub, request, f"{namespace}/{wanted['name']}", wanted.get("type", "model") + "s")
    with hub.lock:
        shutil.rmtree(repository.folder)


@route("PUT", f"{REPOSITORY}/settings")
def update_settings(hub, request, kind, name):
    repository = writable(hub, request, name, kind)
    with hub.lock:
        repository.update_settings(private=request.json()["visibility"] == "private")
    return {"private": repository.settings["private"]}


@route("GET", f"{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?")
def information(hub, request, kind, name, revision="main"):
    repository = readable(hub, request, name, kind)
    commit = repository.commit_of(revision)
    files = [entry for entry in repository.tree(commit, recursive=True) if entry.is_file]
    readme = next((repository.content(entry) for entry in files if entry.path == "README.md"), b"")
    card = front_matter(readme.decode()) or {}
    return {
        "_id": name,
        "id": name,
        "author": name.split("/")[0],
        "sha": commit,
        "private": repository.settings["private"],
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": repository.settings["created"],
        "lastModified": repository.log(commit, limit=1)[0]["date"],
        "tags": card.get("tags", []),
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "cardData": card,
        "siblings": [_sibling(entry, "blobs" in request.query) for entry in files],
        "usedStorage": sum(entry.size for entry in files),
    }


def _sibling(entry: Entry, with_blob: bool) -> dict[str, Any]:
    sibling = {"rfilename": entry.path}
    if with_blob:
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return sibling


# ---- Trees ----


@route("GET", f"{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(hub, request, kind, name, revision, path=""):
    repository = readable(hub, request, name, kind)
    commit = repository.commit_of(revision)
    recursive = request.query.get("recursive") == ["true"]
    expand = request.query.get("expand") == ["true"]
    return [_node(repository, commit, entry, expand) for entry in repository.tree(commit, path, recursive=recursive)]


@route("POST", f"{REPOSITORY}/paths-info/(?P<revision>[^/]+)")
def paths_information(hub, request, kind, name, revision):
    repository = readable(hub, request, name, kind)
    commit = repository.commit_of(revision)
    form = request.form()
    expand = form.get("expand") == ["true"]
    return [_node(repository, commit, entry, expand) for entry in repository.entries(commit, form.get("paths", []))]


def _node(repository: Repository, commit: str, entry: Entry, expand: bool) -> dict[str, Any]:
    kind = "file" if entry.is_file else "directory"
    node = {"type": kind, "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.sha256:
        node["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    if expand:
        last = repository.log(commit, entry.path, limit=1)[0]
        node["lastCommit"] = {"id": last["id"], "title": last["title"], "date": last["date"]}
    return node


@route("GET", f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub, request, name, revision, path, kind="models"):
    repository = readable(hub, request, name, kind)
    commit = repository.commit_of(revision)
    known = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    try:
        entry = repository.entry(commit, path)
    except HubError as error:
        error.headers = known  # the client remembers for which commit there is no such file
        raise
    known["ETag"] = f'"{entry.sha256 or entry.oid}"'
    if entry.sha256:
        known |= {"X-Linked-Etag": known["ETag"], "X-Linked-Size": str(entry.size)}
    known["Content-Type"] = "application/octet-stream" if entry.sha256 else "text/plain; charset=utf-8"
    start, stop = _span(request.headers.get("Range"), entry.size)
    if start is None:
        return Answer(200, repository.content(entry), known)
    if start >= stop:
        raise HubError(416, f"The range is not inside the {entry.size} bytes of {path}")
    known["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    return Answer(206, repository.content(entry, start, stop), known)


def _span(header: str | None, size: int) -> tuple[int | None, int]:
    """First byte and the one after the last of "bytes=A-B", "bytes=A-" and "bytes=-N"; None for the whole."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or match[0] == "bytes=-":
        return None, size
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


# ---- References ----


@route("GET", f"{REPOSITORY}/refs")
def references(hub, request, kind, name):
    repository = readable(hub, request, name, kind)

    def listed(kind: str) -> list[dict[str, str]]:
        return [
            {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
            for name, commit in repository.references(kind).items()
        ]

    return {"branches": listed("heads"), "tags": listed("tags"), "converts": [], "pullRequests": []}


@route("GET", f"{REPOSITORY}/commits/(?P<revision>[^/]+)")
def commits(hub, request, kind, name, revision):
    repository = readable(hub, request, name, kind)
    return [
        {**commit, "authors": [{"user": commit["author"]}]}
        for commit in repository.log(repository.commit_of(revision))
    ]


@route("POST", f"{REPOSITORY}/branch/(?P<branch>[^/]+)")
def create_branch(hub, request, kind, name, branch):
    repository = writable(hub, request, name, kind)
    repository.create_branch(branch, request.json().get("startingPoint", "main"))


@route("DELETE", f"{REPOSITORY}/branch/(?P<branch>[^/]+)")
def delete_branch(hub, request, kind, name, branch):
    writable(hub, request, name, kind).delete_reference("heads", branch)


@route("POST", f"{REPOSITORY}/tag/(?P<revision>[^/]+)")
def create_tag(hub, request, kind, name, revision):
    repository = writable(hub, request, name, kind)
    wanted = request.json()
    repository.create_tag(wanted["tag"], revision, wanted.get("message"), request.account.name)


@route("DELETE", f"{REPOSITORY}/tag/(?P<tag>[^/]+)")
def delete_tag(hub, request, kind, name, tag):
    writable(hub, request, name, kind).delete_reference("tags", tag)


# ---- Uploads ----


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    errors, warnings = card_problems(request.json()["content"])
    content = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return Answer(400 if errors else 200, content)


@route("POST", f"{REPOSITORY}/preupload/(?P<revision>[^/]+)")
def preupload(hub, request, kind, name, revision):
    repository = writable(hub, request, name, kind)
    commit = repository.commit_of(revision)
    wanted = {file["path"]: file["size"] for file in request.json()["files"]}
    there = {entry.path: entry.sha256 or entry.oid for entry in repository.entries(commit, wanted)}
    files = [
        {
            "path": path,
            "uploadMode": "lfs" if is_large(path, size) else "regular",
            "shouldIgnore": False,
            "oid": there.get(path),
        }
        for path, size in wanted.items()
    ]
    return {"files": files, "commitOid": commit}


@route("POST", rf"{FILES}\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, name, kind="models"):
    repository = writable(hub, request, name, kind)
    prefix = f"/{'' if kind == 'models' else kind + '/'}{name}.git/lfs"
    objects = []
    for wanted in request.json()["objects"]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if not repository.has_large_file(wanted["oid"]):
            path = f"{prefix}/{wanted['oid']}"
            found["actions"] = {
                "upload": {"href": f"{hub.endpoint}{path}?signature={hub.signature(path)}"},
                "verify": {"href": f"{hub.endpoint}{path}/verify"},
            }
        objects.append(found)
    return {"transfer": "basic", "objects": objects}


@route("PUT", rf"{FILES}\.git/lfs/(?P<sha256>[0-9a-f]{{64}})")
def receive_large_file(hub, request, name, sha256, kind="models"):
    # As with the Hub's storage the address is signed and no token comes along.
    if request.query.get("signature") != [hub.signature(request.path)]:
        raise HubError(403, "The signature of the address is wrong")
    hub.repository(name, kind).receive_large_file(sha256, request.chunks())


@route("POST", rf"{FILES}\.git/lfs/(?P<sha256>[0-9a-f]{{64}})/verify")
def verify_large_file(hub, request, name, sha256, kind="models"):
    if not writable(hub, request, name, kind).has_large_file(sha256):
        raise entry_not_found(sha256)


@route("POST", f"{REPOSITORY}/commit/(?P<branch>[^/]+)")
def commit(hub, request, kind, name, branch):
    repository = writable(hub, request, name, kind)
    if "create_pr" in request.query:
        raise HubError(400, "This Hub serves no pull requests")
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    commit = repository.commit(
        branch,
        [_operation(line["key"], line["value"]) for line in lines[1:]],
        message=f"{header['summary']}\n\n{header.get('description', '')}".strip(),
        author=request.account.name,
        parent=header.get("parentCommit"),
        before_publishing=request.use_disk,
    )
    url = f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}/commit/{commit}"
    return {"success": True, "commitOid": commit, "commitUrl": url}


def _operation(key: str, value: dict[str, Any]) -> Operation:
    if key == "file":
        return Operation(value["path"], content=base64.b64decode(value["content"]))
    if key == "lfsFile":
        return Operation(value["path"], sha256=value["oid"])
    if key in ("deletedFile", "deletedFolder"):
        return Operation(value["path"], is_folder=key == "deletedFolder")
    raise HubError(400, f"Unknown operation {key!r}")


# ---- Collections ----

COLLECTION = "/api/collections/(?P<slug>[^/]+/[^/]+)"


@route("POST", "/api/collections")
def create_collection(hub, request):
    wanted = request.json()
    owner_of(request, wanted["namespace"])
    with hub.lock:
        for slug, collection in hub.collections.items():
            if (collection["owner"]["name"], collection["title"]) == (wanted["namespace"], wanted["title"]):
                raise HubError(409, "A collection with this title already exists", slug=slug)
        words = re.sub("[^a-z0-9]+", "-", wanted["title"].lower()).strip("-")
        slug = f"{wanted['namespace']}/{words}-{len(hub.collections):024x}"
        hub.collections[slug] = {
            "slug": slug,
            "title": wanted["title"],
            "description": wanted.get("description"),
            "owner": {"name": wanted["namespace"], "type": "user"},
            "items": [],
            "lastUpdated": now(),
            "position": len(hub.collections),
            "private": wanted.get("private", False),
            "theme": "blue",
            "upvotes": 0,
        }
        hub.save_collections()
        return hub.collections[slug]


@route("GET", COLLECTION)
def get_collection(hub, request, slug):
    namespace = slug.split("/")[0]
    collection = hub.collections.get(slug)
    visible = collection and (not collection["private"] or (request.account and request.account.may_read(namespace)))
    if not visible:
        raise HubError(404, "Collection not found")
    return collection


@route("POST", f"{COLLECTION}/items")
def add_collection_item(hub, request, slug):
    owner_of(request, slug.split("/")[0])
    wanted = request.json()
    item = wanted["item"]
    with hub.lock:
        collection = get_collection(hub, request, slug)
        if any((known["id"], known["type"]) == (item["id"], item["type"]) for known in collection["items"]):
            raise HubError(409, "The item is in the collection already")
        readable(hub, request, item["id"], item["type"] + "s")
        number = len(collection["items"])
        note = {"note": {"text": wanted["note"]}} if "note" in wanted else {}
        collection["items"].append({"_id": f"{number:024x}", **item, "position": number, **note})
        hub.save_collections()
        return collection
