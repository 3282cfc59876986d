"""A stand-in for the parts of Consul's API that the locker uses, since none can be had here.

It listens on a port, blocks queries, ends sessions (at their exact length, which is the
worst case that Consul allows) and refuses what Consul refuses. After
https://developer.hashicorp.com/consul/api-docs and the source of Consul's agent.
"""

from __future__ import annotations

import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

#: Of newer versions: https://github.com/hashicorp/consul/blob/main/agent/kvs_endpoint.go
_KEY = re.compile(r"[A-Za-z0-9,\-_./]+")
_REFUSED_ENDS = (".js", ".html", ".json", ".txt", ".sh", ".zip", ".mp4", ".png", ".jpg")

_OPERATIONS = 64


class Answer(NamedTuple):
    status: int
    value: Any = None
    index: int | None = None


@dataclass(frozen=True)
class Entry:
    value: str
    session: str
    created: int
    modified: int


@dataclass
class Session:
    seconds: float
    ends_at: float


class Failure(Exception):
    """An operation that undoes its transaction."""


class ConsulStub:
    """Consul on a free port.

    :param token: what requests must carry.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.keys: dict[str, Entry] = {}
        self.sessions: dict[str, Session] = {}
        self._index = 1
        self._removals: dict[str, int] = {}
        self._changed = threading.Condition()
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def dsn(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), _handler(self._answer, self.token))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def kill(self) -> None:
        """End all connections; what it knows stays, as on a cluster's other members."""
        assert self._server is not None
        self._server.end()

    def restart(self) -> None:
        self.kill()
        self.start()

    remove = kill

    def end_session(self, session: str) -> None:
        with self._changed:
            del self.sessions[session]
            self._remove_keys(lambda key: self.keys[key].session == session)

    def _answer(self, method: str, target: str, body: bytes) -> Answer:
        parts = urlsplit(target)
        query = {name: found[0] for name, found in parse_qs(parts.query, True).items()}
        _, _, kind, rest = (
            unquote(parts.path).split("/", 3) if parts.path != "/v1/txn" else [""] * 4
        )
        with self._changed:
            self._end_sessions()
            if parts.path == "/v1/txn" and method == "PUT":
                return self._transact(json.loads(body))
            if kind == "session" and method == "PUT":
                return self._session(rest, body)
            if kind == "kv":
                if not _KEY.fullmatch(rest) or rest.lower().endswith(_REFUSED_ENDS):
                    return Answer(400, "key contains what it must not")
                return self._get(rest, query) if method == "GET" else self._delete(rest, query)
        return Answer(405)

    def _session(self, rest: str, body: bytes) -> Answer:
        action, _, name = rest.partition("/")
        if action == "create":
            wanted = json.loads(body)
            seconds = float(wanted["TTL"].removesuffix("s"))
            assert wanted["Behavior"] == "delete"
            assert wanted["NodeChecks"] == []
            name = str(uuid.uuid4())
            self.sessions[name] = Session(seconds, time.monotonic() + seconds)
            return Answer(200, {"ID": name})
        if action == "destroy":
            if name in self.sessions:
                self.end_session(name)
            return Answer(200, True)
        if name not in self.sessions:
            return Answer(404, f"Session id '{name}' not found")
        session = self.sessions[name]
        session.ends_at = time.monotonic() + session.seconds
        return Answer(200, [{"ID": name}])

    def _get(self, key: str, query: Mapping[str, str]) -> Answer:
        def is_meant(name: str) -> bool:
            return name.startswith(key) if "recurse" in query else name == key

        if query.get("index", "0") != "0":
            deadline = time.monotonic() + int(query["wait"].removesuffix("ms")) / 1000
            while self._index_of(is_meant) <= int(query["index"]):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 0.1))
                self._end_sessions()
        found = [_shown(name, entry) for name, entry in self.keys.items() if is_meant(name)]
        return Answer(200 if found else 404, found, self._index_of(is_meant))

    def _index_of(self, is_meant: Callable[[str], bool]) -> int:
        changes = [entry.modified for name, entry in self.keys.items() if is_meant(name)]
        removals = [index for name, index in self._removals.items() if is_meant(name)]
        return max([1, *changes, *removals])

    def _delete(self, key: str, query: Mapping[str, str]) -> Answer:
        index = int(query["cas"])
        if key in self.keys and self.keys[key].modified != index:
            return Answer(200, False)
        self._remove_keys(lambda name: name == key)
        return Answer(200, True)

    def _transact(self, operations: list[dict[str, Any]]) -> Answer:
        if len(operations) > _OPERATIONS:
            return Answer(413, "Transaction contains too many operations")
        kept, errors, results = dict(self.keys), [], []
        for number, operation in enumerate(operations):
            try:
                results.append(self._operate(**operation["KV"]))
            except Failure as failure:
                errors.append({"OpIndex": number, "What": str(failure)})
        if errors:
            self.keys = kept
            return Answer(409, {"Results": None, "Errors": errors})
        if self.keys != kept:
            self._change()
        return Answer(200, {"Results": results, "Errors": None})

    def _operate(
        self,
        Verb: str,  # noqa: N803
        Key: str,  # noqa: N803
        Value: str = "",  # noqa: N803
        Session: str = "",  # noqa: N803
        Index: int = 0,  # noqa: N803
    ) -> dict[str, Any]:
        present = self.keys.get(Key)
        if Verb in ("check-index", "delete-cas"):
            if present is None or present.modified != Index:
                raise Failure(f'failed index check for key "{Key}"')
            if Verb == "delete-cas":
                del self.keys[Key]
                self._removals[Key] = self._index + 1
            return {}
        if Verb == "set":
            index = self._index + 1
            created = index if present is None else present.created
            self.keys[Key] = Entry(Value, present.session if present else "", created, index)
            return {}
        if Verb == "check-not-exists":
            if present is not None:
                raise Failure(f'key "{Key}" exists')
            return {}
        if Verb == "check-session":
            if present is None or present.session != Session:
                raise Failure(f'failed session check for key "{Key}"')
            return {}
        assert Verb == "lock"
        if Session not in self.sessions:
            raise Failure(f'invalid session "{Session}"')
        if present is not None and present.session not in ("", Session):
            raise Failure(f'failed to lock key "{Key}", lock is already held')
        index = self._index + 1
        if present is None:
            self.keys[Key] = Entry(Value, Session, index, index)
        elif (present.value, present.session) != (Value, Session):
            self.keys[Key] = replace(present, value=Value, session=Session, modified=index)
        return {"KV": _shown(Key, replace(self.keys[Key], value=""))}

    def _end_sessions(self) -> None:
        now = time.monotonic()
        for name in [name for name, session in self.sessions.items() if session.ends_at <= now]:
            self.end_session(name)

    def _remove_keys(self, is_meant: Callable[[str], bool]) -> None:
        gone = [key for key in self.keys if is_meant(key)]
        for key in gone:
            del self.keys[key]
            self._removals[key] = self._index + 1
        if gone:
            self._change()

    def _change(self) -> None:
        self._index += 1
        self._changed.notify_all()


def _shown(key: str, entry: Entry) -> dict[str, Any]:
    shown = {"Key": key, "Value": entry.value, "Flags": 0, "LockIndex": 1}
    shown |= {"CreateIndex": entry.created, "ModifyIndex": entry.modified}
    return shown | ({"Session": entry.session} if entry.session else {})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, *args: Any) -> None:
        self._sockets: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._sockets.discard(request)
        super().shutdown_request(request)

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self._sockets):
            self.shutdown_request(connection)


def _handler(
    answer: Callable[[str, str, bytes], Answer], token: str | None
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if token is not None and self.headers.get("X-Consul-Token") != token:
                found = Answer(403, "Permission denied")
            else:
                found = answer(self.command, self.path, body)
            text = json.dumps(found.value).encode()
            self.send_response(found.status)
            self.send_header("Content-Length", str(len(text)))
            if found.index is not None:
                self.send_header("X-Consul-Index", str(found.index))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_DELETE = _reply  # noqa: N815

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                pass  # the client is gone, or the server was killed

        def log_message(self, *args: object) -> None:
            pass  # the tests ask for no log of it

    return Handler
