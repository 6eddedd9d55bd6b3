"""The HTTP side of the Hub on loopback: connections, accounts, faults and the log."""

import errno
import hashlib
import hmac
import json
import os
import re
import secrets
import select
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from .api import Answer, Request, answer
from .faults import Faults
from .repository import HubError, Repository

ADDRESS = "127.0.0.1"
# The client asks for it by itself, once in a process, to name itself; it is no part of what is tested.
IN_THE_BACKGROUND = "/api/agent-harnesses"
CHUNK = 64 * 1024


@dataclass(frozen=True)
class Account:
    """Whom a token stands for. `role` is the token's: "write" or "read"."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def may_read(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and self.may_read(namespace)


def reserve_port() -> socket.socket:
    """A socket that holds a free port and does not listen: a hub can be given the port, and nobody else gets it."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind((ADDRESS, 0))
    return holder


OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"
ACCOUNTS = {OWNER: Account("owner"), READER: Account("owner", role="read"), STRANGER: Account("stranger")}


@dataclass(frozen=True)
class Logged:
    """A request. `status` is None where no answer was sent; `signed_in`: a valid token came along."""

    method: str
    path: str
    status: int | None
    fault: str | None
    signed_in: bool


class LoopbackHub:
    """A Hugging Face Hub on 127.0.0.1 over real git repositories; `huggingface_hub` talks to it unmodified.

    Everything lies in `folder`: a hub started again on it goes on where the last one stopped.

    Args:
        folder: made where it is missing.
        port: 0 takes a free one.
        accounts: token to account. Default: "hf_owner" writes as "owner", "hf_reader" is owner's read-only token,
            "hf_stranger" writes as "stranger".

    Attributes:
        endpoint: what HF_ENDPOINT has to be.
        faults: which requests fail; replace it at any time.
        log: what was asked, in the order of the answers.
        crashes: tracebacks of errors in the hub itself, which no test should see.
    """

    def __init__(self, folder: str | Path, port: int = 0, accounts: Mapping[str, Account] = ACCOUNTS):
        self.folder, self.accounts = Path(folder), accounts
        self.faults, self.log, self.crashes = Faults(), [], []
        self.lock = threading.RLock()
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = self.folder / "collections.json"
        self.collections = json.loads(saved.read_text()) if saved.exists() else {}
        self._key = secrets.token_bytes(16)
        self._server = _Server(self, port)
        self.endpoint = f"http://{ADDRESS}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="hub")

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()

    def repository(self, name: str, kind: str = "models") -> Repository:
        """Where "owner/name" is stored, whether it exists or not; `kind`: "models" or "datasets"."""
        if kind not in ("models", "datasets") or any(part.strip(".") == "" for part in name.split("/")):
            raise HubError(400, f"There are no repositories {name!r} of the kind {kind!r}")
        return Repository(self.folder / kind / f"{name}.git", self.lock)

    def asked(self, where: str) -> list[Logged]:
        """What of the log the expression finds, searched for in "METHOD /path"."""
        return [entry for entry in self.log if re.search(where, f"{entry.method} {entry.path}")]

    def account_of(self, authorization: str | None) -> Account | None:
        """Raises HubError 401 where there is a token that nobody has."""
        if authorization is None:
            return None
        account = self.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def signature(self, path: str) -> str:
        return hmac.new(self._key, path.encode(), hashlib.sha256).hexdigest()

    def save_collections(self) -> None:
        temporary = self.folder / "collections.json.tmp"
        temporary.write_text(json.dumps(self.collections))
        os.replace(temporary, self.folder / "collections.json")


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # stopping waits for what is being answered
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, port: int):
        self.hub, self.connections = hub, set()
        super().__init__((ADDRESS, port), _Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended by itself

    def handle_error(self, request, client_address) -> None:
        """A client may hang up at any time; all else is an error of the hub."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.crashes.append(traceback.format_exc())


class _HangUp(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args) -> None:
        """The hub keeps its own log."""

    def _handle(self) -> None:
        self.hub = self.server.hub
        self.raw_path, _, self.query = self.path.partition("?")
        self.fault, self.signed_in = None, False
        if self.raw_path == IN_THE_BACKGROUND:
            self._send(Answer(content={"standardEnvVars": [], "harnesses": {}}))
            return
        self.fault = self.hub.faults.choose(self.command, self.raw_path)
        self.unread = self._pieces()
        try:
            result = self._result()
            for _ in self.unread:
                pass  # the next request on this connection begins behind it
            if self.fault == "drop_after":
                raise _HangUp
        except (_HangUp, ConnectionError):
            self._log(None)
            self._hang_up()
            return
        self._log(result.status)
        self._send(result)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _result(self) -> Answer:
        if self.fault in ("timeout", "drop"):
            raise _HangUp
        if self.fault in REFUSALS:
            return REFUSALS[self.fault]
        try:
            account = self.hub.account_of(self.headers["Authorization"])
        except HubError as error:
            return Answer(error.status, error.content, {"X-Error-Message": str(error)})
        self.signed_in = account is not None
        query = parse_qs(self.query, keep_blank_values=True)
        request = Request(
            self.command, self.raw_path, query, self.headers, self._body_with_fault, account, self._use_disk
        )
        try:
            return answer(self.hub, request)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return Answer(507, {"error": os.strerror(errno.ENOSPC)})

    # ---- Reading ----

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, CHUNK))
            if not piece:
                raise ConnectionError("The client has hung up")
            left -= len(piece)
            yield piece

    def _body_with_fault(self) -> Iterator[bytes]:
        """The body; of a file that is cut off or finds the disk full, only the first half."""
        breaks = self.command == "PUT" and self.fault in ("cut", "full")
        left = int(self.headers.get("Content-Length", 0)) // 2
        for piece in self.unread:
            if breaks and len(piece) >= left:
                yield piece[:left]
                self._use_disk()
                raise _HangUp
            left -= len(piece)
            yield piece

    def _use_disk(self) -> None:
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # ---- Writing ----

    def _send(self, result: Answer) -> None:
        body = result.content if isinstance(result.content, bytes) else json.dumps(result.content).encode()
        headers = {"Content-Type": "application/json", **result.headers, "Content-Length": str(len(body))}
        self.send_response(result.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def _hang_up(self) -> None:
        if self.fault == "timeout":
            for _ in self.unread:
                pass
            # With the body read, readable means that the client, or the end of the hub, has closed the connection.
            select.select([self.connection], [], [], self.hub.faults.stall)
        self.close_connection = True

    def _log(self, status: int | None) -> None:
        self.hub.log.append(Logged(self.command, self.raw_path, status, self.fault, self.signed_in))


def _refusal(status: int, message: str, **headers: str) -> Answer:
    return Answer(status, {"error": message}, {"X-Error-Message": message, **headers})


REFUSALS = {
    "500": _refusal(500, "Internal Error - We're working hard to fix this as soon as possible!"),
    "502": Answer(502, b"<html><h1>502 Bad Gateway</h1></html>", {"Content-Type": "text/html"}),
    "503": _refusal(503, "Service Unavailable", **{"Retry-After": "0"}),
    "429": _refusal(429, "Too Many Requests", **{"Retry-After": "0"}),
    "401": _refusal(401, "Invalid credentials in Authorization header"),
    "403": _refusal(403, "Forbidden"),
    "409": _refusal(409, "Another conflicting operation is in progress"),
    "412": _refusal(412, "A commit has happened since. Please refresh and try again."),
}
