"""A client of Consul's HTTP API: sessions, keys, transactions and blocking queries.

Written from https://developer.hashicorp.com/consul/api-docs and the source of Consul's agent. It
was tested against a stand-in for these parts of the API only, not against Consul itself.
py-consul does not fit: it cannot create sessions without the health check of the node, and sends
transactions without a token.
"""

from __future__ import annotations

import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from tuswsgi.connections.http import HttpAnswer
from tuswsgi.connections.http_server import Addresses, HttpServer
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import ConfigurationError, Unavailable

log = logging.getLogger(__name__)

PORT = 8500

#: The bounds of a session's TTL, in seconds.
SHORTEST_SESSION = 10
_LONGEST_SESSION = 86_400

#: How many operations a transaction may have.
_MAX_OPERATIONS = 64


#: An operation of a transaction: a condition or a change.
Operation = dict[str, Any]


class SessionGone(Exception):
    """A session has expired, and its keys with it."""


@dataclass(frozen=True)
class KeyValue:
    """A key, its value and its metadata.

    :param session: the session with which it is deleted, empty if there is none.
    :param index: Consul's index of the last change of the key.
    """

    key: str
    value: str
    session: str
    index: int


class ConsulConnection:
    """Consul, shared by all greenlets or threads of a process.

    All requests raise ``Unavailable`` if Consul does not answer in time, or refuses.
    """

    def __init__(self, addresses: Addresses, settings: PoolSettings) -> None:
        self._server = HttpServer("Consul", addresses.urls, settings)
        token = addresses.password or addresses.user
        self._headers = {"X-Consul-Token": token} if token else {}

    def check(self) -> None:
        """Check that Consul lets us open sessions.

        :raises ConfigurationError: if not.
        """
        try:
            session = self._open(SHORTEST_SESSION)
            self._send("PUT", f"/v1/session/destroy/{session}")
        except _Refusal as error:
            raise ConfigurationError(f"Consul refuses us: {error}") from None

    def open_session(self, seconds: int) -> str:
        """Return a new session, which expires `seconds` to twice that after its last renewal."""
        try:
            return self._open(min(seconds, _LONGEST_SESSION))
        except _Refusal as error:
            raise _unavailable("session", error) from None

    def renew_session(self, session: str) -> bool:
        """Renew a session; return whether it exists."""
        return self._ask("PUT", f"/v1/session/renew/{session}").status == 200

    def get(self, key: str) -> KeyValue | None:
        """Return `key`, ``None`` if it is missing."""
        found = _entries(self._ask("GET", _path(key)))
        return found[0] if found else None

    def change(self, operations: Sequence[Operation]) -> bool:
        """Run a transaction of `operations`, which the functions below make.

        :returns: whether all succeeded; if not, nothing was changed.
        :raises SessionGone: if the session of a key has expired.
        """
        return not self._failures(operations)

    def put(self, key: str, value: str, session: str) -> None:
        """Set a key that is deleted with a session, unless another session has it.

        :raises SessionGone: if the session has expired.
        """
        self._failures([lock_key(key, value, session)])

    def remove(self, found: KeyValue) -> None:
        """Delete a key unless it has changed since it was read."""
        self._ask("DELETE", f"{_path(found.key)}?cas={found.index}")

    def held(self, keys: Sequence[str], session: str) -> list[str]:
        """Return those of `keys` that belong to a session."""
        found = []
        for first in range(0, len(keys), _MAX_OPERATIONS):
            some = keys[first : first + _MAX_OPERATIONS]
            failed = self._failures(
                [{"Verb": "check-session", "Key": key, "Session": session} for key in some]
            )
            found += [key for number, key in enumerate(some) if number not in failed]
        return found

    def wait(self, prefix: str, index: int, seconds: float) -> tuple[list[KeyValue], int]:
        """Wait until keys below `prefix` change, or for `seconds`, and return them.

        :param index: the index that the last call returned, 0 for the first call.
        :returns: the keys, and the index of their last change.
        """
        wait = f"?recurse&index={index}&wait={round(seconds * 1000)}ms"
        answer = self._server.wait(_path(prefix) + wait, self._headers, seconds)
        entries = _entries(self._understood(_path(prefix), answer))
        present = int(answer.headers.get("X-Consul-Index", 0))
        # https://developer.hashicorp.com/consul/api-docs/features/blocking: an index that goes
        # backwards must be reset.
        return entries, present if present >= index else 0

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def _open(self, seconds: int) -> str:
        session = {
            "Name": "tuswsgi",
            "TTL": f"{seconds}s",
            "Behavior": "delete",
            # The former holder knows when it has lost the lock.
            "LockDelay": "1ms",
            # Health checks of the node could end a session early.
            "Checks": [],
            "NodeChecks": [],
        }
        answer = self._send("PUT", "/v1/session/create", json.dumps(session).encode())
        return str(_parsed(answer)["ID"])

    def _failures(self, operations: Sequence[Mapping[str, Any]]) -> set[int]:
        """Run a transaction and return the indexes of the operations that failed.

        :raises SessionGone: if the session of a key has expired.
        """
        body = json.dumps([{"KV": operation} for operation in operations]).encode()
        answer = self._ask("PUT", "/v1/txn", body)
        if answer.status == 200:
            return set()
        errors = _parsed(answer)["Errors"]
        if any("invalid session" in error["What"] for error in errors):
            raise SessionGone
        return {error["OpIndex"] for error in errors}

    def _ask(self, method: str, path: str, body: bytes | None = None) -> HttpAnswer:
        try:
            return self._send(method, path, body)
        except _Refusal as error:
            raise _unavailable(path, error) from None

    def _send(self, method: str, path: str, body: bytes | None = None) -> HttpAnswer:
        return self._understood(path, self._server.request(method, path, body, self._headers))

    def _understood(self, path: str, answer: HttpAnswer) -> HttpAnswer:
        # The callers handle missing keys and sessions, and transactions that failed.
        expected = {404, 409 if path == "/v1/txn" else 404}
        if answer.status == 200 or answer.status in expected:
            return answer
        raise _Refusal(f"{answer.status} {answer.body[:200].decode(errors='replace')}")


class _Refusal(Exception):
    """Consul refuses a request, and would refuse it again."""


def _unavailable(what: str, refusal: _Refusal) -> Unavailable:
    log.error("Consul refuses %s: %s", what, refusal)
    return Unavailable()


def _path(key: str) -> str:
    return f"/v1/kv/{quote(key)}"


def is_missing(key: str) -> Operation:
    """Return the condition that a key does not exist."""
    return {"Verb": "check-not-exists", "Key": key}


def is_unchanged(found: KeyValue) -> Operation:
    """Return the condition that a key has not changed since it was read."""
    return {"Verb": "check-index", "Key": found.key, "Index": found.index}


def lock_key(key: str, value: str, session: str) -> Operation:
    """Return the change that sets a key which is deleted with a session.

    A session may lock a key again, so that this does not exclude threads of one process.
    """
    return {"Verb": "lock", "Key": key, "Value": _encode(value), "Session": session}


def set_key(key: str, value: str) -> Operation:
    """Return the change that sets a key without a session."""
    return {"Verb": "set", "Key": key, "Value": _encode(value)}


def delete_key(found: KeyValue) -> Operation:
    """Return the change that deletes a key unless it has changed since it was read."""
    return {"Verb": "delete-cas", "Key": found.key, "Index": found.index}


def _encode(text: str) -> str:
    return b64encode(text.encode()).decode()


def _entries(answer: HttpAnswer) -> list[KeyValue]:
    if answer.status == 404:
        return []
    return [
        KeyValue(
            found["Key"],
            b64decode(found["Value"] or "").decode(errors="replace"),
            found.get("Session", ""),
            found["ModifyIndex"],
        )
        for found in _parsed(answer)
    ]


def _parsed(answer: HttpAnswer) -> Any:
    try:
        return json.loads(answer.body)
    except ValueError:
        log.error("The server does not answer like Consul: %r", answer.body[:200])
        raise Unavailable from None
