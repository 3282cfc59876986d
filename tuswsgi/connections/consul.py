"""Consul, as its HTTP API lets it be asked: sessions, keys that end with them, and changes.

This file owns the API's paths and its ways to write keys, values and numbers. What the keys
mean is the business of the backends. Written after https://developer.hashicorp.com/consul/api-docs
and the source of Consul's agent; it was tested against a stand-in for these parts of the API,
not against Consul itself.
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

#: Seconds that a session lives at the least and at the most without being renewed.
SHORTEST_SESSION = 10
_LONGEST_SESSION = 86_400

#: How many operations a transaction may have.
_OPERATIONS = 64


#: A condition or a change of a transaction.
Part = dict[str, Any]


class SessionGone(Exception):
    """A session is not or no longer there, and neither are its keys."""


@dataclass(frozen=True)
class KeyValue:
    """A key as it is kept.

    :param session: the session with which it ends.
    :param index: numbers the change that made it what it is, among all changes.
    """

    key: str
    value: str
    session: str
    index: int


class ConsulConnection:
    """Consul for all greenlets or threads of a process.

    Whatever is asked raises ``Unavailable`` if Consul does not answer in time, or refuses.
    """

    def __init__(self, addresses: Addresses, settings: PoolSettings) -> None:
        self._server = HttpServer("Consul", addresses.urls, settings)
        token = addresses.password or addresses.user
        self._headers = {"X-Consul-Token": token} if token else {}

    def check(self) -> None:
        """Find out whether we may keep sessions.

        :raises ConfigurationError: if not.
        """
        try:
            session = self._open(SHORTEST_SESSION)
            self._send("PUT", f"/v1/session/destroy/{session}")
        except _Refusal as error:
            raise ConfigurationError(f"Consul refuses us: {error}") from None

    def open_session(self, seconds: int) -> str:
        """Return a new session that ends `seconds` after it was last renewed, or up to twice
        that.
        """
        try:
            return self._open(min(seconds, _LONGEST_SESSION))
        except _Refusal as error:
            raise _told("session", error) from None

    def renew_session(self, session: str) -> bool:
        """Let a session live for its full length again; return whether there is one."""
        return self._ask("PUT", f"/v1/session/renew/{session}").status == 200

    def get(self, key: str) -> KeyValue | None:
        """Return what `key` is, ``None`` if there is none."""
        found = _entries(self._ask("GET", _path(key)))
        return found[0] if found else None

    def change(self, parts: Sequence[Part]) -> bool:
        """Do all `parts` at once, made by the functions below, or none if one cannot be done.

        :returns: whether they were done.
        :raises SessionGone: if a key was to end with a session that has ended.
        """
        return not self._failures(parts)

    def put(self, key: str, value: str, session: str) -> None:
        """Set a key that ends with a session, unless another session has it.

        :raises SessionGone: if the session has ended.
        """
        self._failures([locked(key, value, session)])

    def remove(self, found: KeyValue) -> None:
        """Remove a key if it is still what was found."""
        self._ask("DELETE", f"{_path(found.key)}?cas={found.index}")

    def held(self, keys: Sequence[str], session: str) -> list[str]:
        """Return those of `keys` that end with a session."""
        kept = []
        for first in range(0, len(keys), _OPERATIONS):
            some = keys[first : first + _OPERATIONS]
            failed = self._failures(
                [{"Verb": "check-session", "Key": key, "Session": session} for key in some]
            )
            kept += [key for number, key in enumerate(some) if number not in failed]
        return kept

    def wait(self, prefix: str, index: int, seconds: float) -> tuple[list[KeyValue], int]:
        """Return the keys that begin with `prefix`, once they have changed or after `seconds`.

        :param index: what was returned with the keys that are known, 0 if none are.
        :returns: the keys, and the index of their last change.
        """
        wait = f"?recurse&index={index}&wait={round(seconds * 1000)}ms"
        answer = self._server.wait(_path(prefix) + wait, self._headers, seconds)
        entries = _entries(self._understood(_path(prefix), answer))
        present = int(answer.headers.get("X-Consul-Index", 0))
        # One that has gone back knows of another past, says Consul's documentation.
        return entries, present if present >= index else 0

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def _open(self, seconds: int) -> str:
        session = {
            "Name": "tuswsgi",
            "TTL": f"{seconds}s",
            "Behavior": "delete",
            # Who was a holder knows when it is none any more.
            "LockDelay": "1ms",
            # Without checks of the host: they could end a session before its time.
            "Checks": [],
            "NodeChecks": [],
        }
        answer = self._send("PUT", "/v1/session/create", json.dumps(session).encode())
        return str(_parsed(answer)["ID"])

    def _failures(self, operations: Sequence[Mapping[str, Any]]) -> set[int]:
        """Run a transaction and return which of its operations it failed at, by their places.

        :raises SessionGone: if there is no such session.
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
            raise _told(path, error) from None

    def _send(self, method: str, path: str, body: bytes | None = None) -> HttpAnswer:
        return self._understood(path, self._server.request(method, path, body, self._headers))

    def _understood(self, path: str, answer: HttpAnswer) -> HttpAnswer:
        # Not there, and a transaction that was undone: whoever asked knows what that means.
        expected = {404, 409 if path == "/v1/txn" else 404}
        if answer.status == 200 or answer.status in expected:
            return answer
        raise _Refusal(f"{answer.status} {answer.body[:200].decode(errors='replace')}")


class _Refusal(Exception):
    """Consul will not do something, and would not if it was asked again."""


def _told(what: str, refusal: _Refusal) -> Unavailable:
    log.error("Consul refuses %s: %s", what, refusal)
    return Unavailable()


def _path(key: str) -> str:
    return f"/v1/kv/{quote(key)}"


def missing(key: str) -> Part:
    """Return the condition that there is no such key."""
    return {"Verb": "check-not-exists", "Key": key}


def same(found: KeyValue) -> Part:
    """Return the condition that a key is still what was found."""
    return {"Verb": "check-index", "Key": found.key, "Index": found.index}


def locked(key: str, value: str, session: str) -> Part:
    """Return the change that sets a key which ends with a session.

    A session that has a key may take it again, and so it is no lock among threads.
    """
    return {"Verb": "lock", "Key": key, "Value": _encode(value), "Session": session}


def key_value(key: str, value: str) -> Part:
    """Return the change that sets a key which ends with nothing."""
    return {"Verb": "set", "Key": key, "Value": _encode(value)}


def gone(found: KeyValue) -> Part:
    """Return the change that removes a key if it is still what was found."""
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
        log.error("What answers is no Consul: %r", answer.body[:200])
        raise Unavailable from None
