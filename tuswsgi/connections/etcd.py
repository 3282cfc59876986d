"""A client of etcd's JSON gateway: keys, transactions, leases and watches.

For etcd 3.4 and later, https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/.
"""

from __future__ import annotations

import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tuswsgi.connections.http_server import Addresses, HttpServer
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import ConfigurationError, Unavailable

log = logging.getLogger(__name__)

PORT = 2379

#: Status codes of gRPC, https://grpc.io/docs/guides/status-codes/.
_NOT_FOUND = 5
_UNAUTHENTICATED = 16

#: etcd's message when it needs no user and password.
_NO_AUTHENTICATION = "authentication is not enabled"


#: A condition or an operation of a transaction.
Part = dict[str, Any]


class LeaseGone(Exception):
    """A lease has expired, and its keys with it."""


class Compacted(Exception):
    """etcd has forgotten the changes since a revision."""


@dataclass(frozen=True)
class KeyValue:
    """A value and its metadata.

    :param lease: the lease with which the key expires, "0" if there is none.
    :param revision: etcd's revision of the last change of the key.
    """

    value: str
    lease: str
    revision: int


class EtcdConnection:
    """An etcd cluster, shared by all greenlets or threads of a process.

    All requests raise ``Unavailable`` if etcd does not answer in time, or refuses.
    """

    def __init__(self, addresses: Addresses, settings: PoolSettings) -> None:
        self._addresses = addresses
        self._server = HttpServer("etcd", addresses.urls, settings)
        self._token: str | None = None

    def check(self) -> None:
        """Check that etcd accepts our login.

        :raises ConfigurationError: if not.
        """
        try:
            self._call("/v3/kv/range", {"key": _encode("tuswsgi/")})
        except _Refusal as error:
            raise ConfigurationError(f"etcd refuses us: {error}") from None

    def get(self, key: str) -> tuple[KeyValue | None, int]:
        """Return the value of `key`, ``None`` if it is missing, and etcd's revision."""
        answer = self._ask("/v3/kv/range", {"key": _encode(key)})
        return _first(answer), _revision(answer)

    def put(self, key: str, value: str, lease: str) -> None:
        """Set a key that expires with a lease.

        :raises LeaseGone: if the lease has expired.
        """
        self._ask("/v3/kv/put", _put_request(key, value, lease))

    def change(
        self, conditions: Sequence[Part], changes: Sequence[Part], read: Sequence[str]
    ) -> list[str | None] | None:
        """Apply all of `changes` in one transaction if all of `conditions` are true.

        :param conditions: made by ``is_missing`` and ``has_value``.
        :param changes: made by ``set_key`` and ``delete_key``.
        :param read: the keys to read if a condition is false.
        :returns: ``None`` if the changes were applied, else the values of the keys in `read`.
        :raises LeaseGone: if the lease of a key has expired.
        """
        request = {
            "compare": conditions,
            "success": changes,
            "failure": [{"request_range": {"key": _encode(key)}} for key in read],
        }
        answer = self._ask("/v3/kv/txn", request)
        if answer.get("succeeded"):
            return None
        found = [_first(part["response_range"]) for part in answer.get("responses", ())]
        return [None if one is None else one.value for one in found]

    def grant(self, seconds: int) -> str:
        """Return a new lease that expires `seconds` after it was last kept alive."""
        return str(self._ask("/v3/lease/grant", {"TTL": seconds})["ID"])

    def keep_alive(self, lease: str) -> bool:
        """Renew a lease; return whether it exists."""
        answer = self._ask("/v3/lease/keepalive", {"ID": lease})
        return int(answer["result"].get("TTL", 0)) > 0

    def keys_of(self, lease: str) -> set[str]:
        """Return all keys that expire with a lease."""
        answer = self._ask("/v3/lease/timetolive", {"ID": lease, "keys": True})
        return {_decode(key) for key in answer.get("keys", ())}

    def changes(self, key: str, after: int, seconds: float) -> Generator[KeyValue, None, None]:
        """Watch `key` for `seconds` and yield its values as they change.

        :param after: the revision of the last known change.
        :raises Compacted: if later changes may be missing.
        """
        request = {
            "key": _encode(key),
            "start_revision": str(after + 1),
            "filters": ["NODELETE"],
        }
        body = json.dumps({"create_request": request}).encode()
        lines = self._server.lines("/v3/watch", body, self._headers(), seconds)
        with closing(lines):
            for line in lines:
                yield from self._changes_of(_parsed(line), after)

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def _changes_of(self, message: dict[str, Any], after: int) -> Generator[KeyValue, None, None]:
        result = message.get("result")
        if result is None or (result.get("canceled") and "compact_revision" not in result):
            # Probably etcd has forgotten our token. The next request logs the reason.
            self._token = None
            raise Unavailable
        # A server with an older revision has lost its data.
        if "compact_revision" in result or (result.get("created") and _revision(result) < after):
            raise Compacted
        yield from (_parsed_value(event["kv"]) for event in result.get("events", ()))

    def _ask(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._call(path, request)
        except _Refusal as error:
            log.error("etcd refuses %s: %s", path, error)
            raise Unavailable from None

    def _call(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._post(path, request)
        if answer.get("code") == _UNAUTHENTICATED and self._addresses.user is not None:
            # Tokens expire after minutes without use, and when etcd restarts.
            self._token = None
            answer = self._post(path, request)
        if "code" not in answer:
            return answer
        if answer["code"] == _NOT_FOUND:
            raise LeaseGone
        raise _Refusal(answer.get("message"))

    def _post(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._token is None and self._addresses.user is not None:
            self._token = self._new_token()
        body = json.dumps(request).encode()
        return _parsed(self._server.request("POST", path, body, self._headers()).body)

    def _new_token(self) -> str:
        request = {"name": self._addresses.user, "password": self._addresses.password or ""}
        body = json.dumps(request).encode()
        answer = _parsed(self._server.request("POST", "/v3/auth/authenticate", body).body)
        if _NO_AUTHENTICATION in str(answer.get("message")):
            return ""
        if "token" not in answer:
            raise _Refusal(answer.get("message"))
        return str(answer["token"])

    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token else {}


class _Refusal(Exception):
    """etcd refuses a request, and would refuse it again."""


def is_missing(key: str) -> Part:
    """Return the condition that a key does not exist."""
    return {"key": _encode(key), "target": "CREATE", "result": "EQUAL", "create_revision": "0"}


def has_value(key: str, value: str) -> Part:
    """Return the condition that a key has this value."""
    return {"key": _encode(key), "target": "VALUE", "result": "EQUAL", "value": _encode(value)}


def set_key(key: str, value: str, lease: str = "0") -> Part:
    """Return the change that sets a key, which expires with `lease` unless that is "0"."""
    return {"request_put": _put_request(key, value, lease)}


def delete_key(key: str) -> Part:
    """Return the change that deletes a key."""
    return {"request_delete_range": {"key": _encode(key)}}


def _put_request(key: str, value: str, lease: str) -> dict[str, str]:
    return {"key": _encode(key), "value": _encode(value), "lease": lease}


def _first(answer: Mapping[str, Any]) -> KeyValue | None:
    found = answer.get("kvs")
    return _parsed_value(found[0]) if found else None


def _parsed_value(found: Mapping[str, Any]) -> KeyValue:
    value = _decode(found.get("value", ""))
    lease = str(found.get("lease", "0"))
    return KeyValue(value, lease, int(found["mod_revision"]))


def _revision(answer: Mapping[str, Any]) -> int:
    return int(answer["header"]["revision"])


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        log.error("The server does not answer like etcd: %r", text[:200])
        raise Unavailable
    return parsed


def _encode(text: str) -> str:
    return b64encode(text.encode()).decode()


def _decode(text: str) -> str:
    return b64decode(text).decode(errors="replace")
