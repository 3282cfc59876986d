"""Records of uploads in Redis, which several hosts may share.

Each upload has a key whose text is a version, followed by the upload's entry as JSON. Sorted
sets index the uploads. One script replaces a text and updates the sets, if the text still has
the version that was read, so the sets match the texts whatever crashes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from marshmallow import ValidationError

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import RedisSettings, connect
from tuswsgi.connections.redis_scripts import Script
from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import Unavailable, UploadExists, UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State, check_id
from tuswsgi.core.options import Duration, option
from tuswsgi.infostores import record
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.entry import Entry, oldest_events

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Replaces a text, and adds members to sorted sets or removes them.
#: KEYS: the key of the text and those of the sets. ARGV: the version that the text must have,
#: its new version, the new text ('': keep the old one, '-': delete it), its time to live in
#: milliseconds ('': for ever), whether the script may have run before (1), and for each set a
#: score ('': remove) and a member. Returns 1 if it did so, or the text that is there instead,
#: or 0 if that may have replaced the new text of an earlier run.
_SWAP = Script("""
local found = redis.call('GETRANGE', KEYS[1], 0, 15)
if found == ARGV[2] then return 1 end
if found ~= ARGV[1] then
    if ARGV[5] == '1' and found ~= '' then return 0 end
    return redis.call('GET', KEYS[1]) or ''
end
if ARGV[3] == '-' then
    redis.call('DEL', KEYS[1])
elseif ARGV[3] ~= '' then
    if ARGV[4] ~= '' then
        redis.call('SET', KEYS[1], ARGV[2] .. ARGV[3], 'PX', ARGV[4])
    else
        redis.call('SET', KEYS[1], ARGV[2] .. ARGV[3])
    end
end
for i = 2, #KEYS do
    local score, member = ARGV[2 * i + 2], ARGV[2 * i + 3]
    if score ~= '' then
        redis.call('ZADD', KEYS[i], score, member)
    else
        redis.call('ZREM', KEYS[i], member)
    end
end
return 1
""")

#: Adds up the scores of a sorted set, exactly below 2**53. KEYS: the key of the set. ARGV: the
#: prefix of the keys of texts if those may have expired, to remove their members; otherwise ''.
_SUM = Script("""
local sum, found = 0, redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #found, 2 do
    if ARGV[1] == '' or redis.call('EXISTS', ARGV[1] .. found[i]) == 1 then
        sum = sum + tonumber(found[i + 1])
    else
        redis.call('ZREM', KEYS[1], found[i])
    end
end
return string.format('%.0f', sum)
""")

#: The length of a version, and a text that is none.
_VERSION = 16
_NO_VERSION = "-"

#: How many texts are read at once.
_PAGE = 100

#: How often ``claim`` looks again if other workers have claimed all events that it found.
_ROUNDS = 10

#: Seconds after which ``claim`` and ``expired`` try again to read an unreadable record.
_UNREADABLE = 60.0

#: How long a write is retried while other writers change the text, in seconds.
_PATIENCE = 10.0

#: The pauses between these attempts.
_BACKOFF = Backoff(first=0.002, longest=0.02, jitter=1.0)

#: The sorted sets that index an upload, with its scores.
_Index = dict[str, float]


def _positive(value: float) -> None:
    if value < 0.001:
        raise ValidationError("Not a duration of at least a millisecond.")


@dataclass(repr=False, eq=False)
class RedisInfoStore(InfoStore):
    """Records in a Redis that all hosts share (not in a Redis Cluster).

    It is as durable as Redis is configured. With ``appendonly yes`` an acknowledged change
    survives a crash of Redis, and with ``appendfsync always`` also one of its machine, which
    otherwise loses the last second. With ``maxmemory``, set ``maxmemory-policy noeviction``: a
    full Redis then refuses writes (507), and with any other policy it drops records. A replica
    that is promoted may lack the latest changes.

    :param info_db_dsn: the server, see ``connections.redis.connect``.
    """

    info_db_dsn: str
    redis_info_expiration: float | None = option(
        None,
        "How long Redis keeps a record after its last change, once all of its hooks are "
        "delivered. Then it forgets the upload, while the bytes stay. Unset: for ever.",
        kind=Duration,
        rustus="REDIS_INFO_EXPIRATION",
        validate=_positive,
    )
    pool: PoolSettings = PoolSettings()
    settings: RedisSettings = RedisSettings()

    def __post_init__(self) -> None:
        self._server = connect(self.info_db_dsn, self.pool)
        self._prefix = self.settings.redis_prefix
        self.lifetime = self.redis_info_expiration

    def prepare(self) -> None:
        self._server.prepare()
        # The process may fork now, and connections must not be shared.
        self._server.close()

    def close(self) -> None:
        self._server.close()

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        if self._swap(check_id(info.id), "", Entry.new(info, events), {}) is not None:
            raise UploadExists

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        return self._change(info.id, lambda entry: entry.save(info, events))

    def forget(self, info: FileInfo) -> bool:
        text = self._server.call("GET", self._key_of(info.id))
        if text is None:
            return False
        entry = _parse(text)
        # A script that runs again after a broken connection finds no text, and returns ''.
        return entry.is_forgettable(info.sequence) and not self._swap(
            info.id, text[:_VERSION], None, _index(entry)
        )

    def load(self, id: str) -> FileInfo:
        text = self._server.call("GET", self._key_of(id))
        if text is None:
            raise UploadNotFound
        return record.load(record.decode(text[_VERSION:]))

    def list(
        self, states: Collection[State] | None = None, *, after: str = "", limit: int = 1000
    ) -> Sequence[FileInfo]:
        wanted = [state for state in State if states is None or state in states]
        sets = {f"state:{state}": state for state in wanted}
        found: list[FileInfo] = []
        while pairs := self._page(sets, after, limit - len(found)):
            found += self._verified(pairs, lambda name, info: info.state is sets[name])
            after = pairs[-1][0]
        return found

    def usage(self) -> int:
        texts = "" if self.redis_info_expiration is None else f"{self._prefix}upload:"
        return int(self._server.call(*_SUM.on([f"{self._prefix}promised"], texts)))

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        found: list[str] = []
        while ids := self._ids("expires", now, offset=len(found), limit=limit - len(found)):
            pairs = [(id, "expires") for id in ids]
            verified = self._verified(pairs, lambda _, info: _expiry(info) is not None, now)
            found += [info.id for info in verified]
        return found

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        try:
            name = f"waiting:{check_id(part)}"
        except UploadNotFound:
            return []
        pairs = [(id, name) for id in self._ids(name)]
        return [info.id for info in self._verified(pairs, lambda _, info: part in _parts(info))]

    def events(self, id: str, *, dead: bool = False) -> Sequence[Event]:
        try:
            text = self._server.call("GET", self._key_of(id))
        except UploadNotFound:
            return []
        return [] if text is None else _parse(text).undelivered(dead=dead)

    def claim(
        self,
        worker: str,
        now: float,
        until: float,
        *,
        upload: str | None = None,
        transport: str | None = None,
        limit: int = 100,
    ) -> Sequence[Event]:
        claimed: list[Event] = []

        def claim(entry: Entry) -> Sequence[Event]:
            return entry.claim(worker, now, until, transport, limit - len(claimed))

        if upload is not None:
            return self._change_if_there(upload, claim) or []
        name = "pending" if transport is None else f"pending:{transport}"
        for _ in range(_ROUNDS):
            ids = self._ids(name, now, limit=limit - len(claimed))
            if not ids:
                break
            for id, text in self._texts(ids):
                try:
                    claimed += self._change_if_there(id, claim, text) or []
                except record.CorruptRecord as error:
                    self._skip(id, error)
                    self._postpone(id, name, now)
                if not text:
                    self._remove(id, text, name)
        return claimed

    def renew(self, worker: str, until: float) -> None:
        name = f"claims:{worker}"
        for id, text in self._texts(self._ids(name)):
            if not self._change_if_there(id, lambda entry: entry.renew(worker, until), text):
                self._remove(id, text, name)

    def settle(self, event: Event) -> None:
        self._change_if_there(event.upload, lambda entry: entry.settle(event))

    def put_back(self, event: Event) -> None:
        self._change_if_there(event.upload, lambda entry: entry.put_back(event))

    def undelivered(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        ids = self._ids("dead" if dead else "pending")
        return oldest_events(self._entries(ids), dead=dead, limit=limit)

    def _change(self, id: str, change: Callable[[Entry], T], text: bytes | None = None) -> T:
        """Change an entry, and return what `change` returns. Nothing is written if that is false.

        :param text: the text of the entry, if it was read a moment ago.
        :raises UploadNotFound: if there is no entry.
        """
        deadline = time.monotonic() + _PATIENCE
        pauses = iter(_BACKOFF)
        found = text or self._server.call("GET", self._key_of(id))
        while found:
            entry = _parse(found)
            before = _index(entry)
            result = change(entry)
            if not result:
                return result
            found = self._swap(id, found[:_VERSION], entry, before)
            if found is None:
                return result
            if time.monotonic() >= deadline:
                raise Unavailable
            time.sleep(next(pauses))
        raise UploadNotFound

    def _change_if_there(
        self, id: str, change: Callable[[Entry], T], text: bytes | None = None
    ) -> T | None:
        try:
            return self._change(id, change, text)
        except UploadNotFound:
            return None

    def _swap(
        self, id: str, version: bytes | str, entry: Entry | None, before: _Index
    ) -> bytes | None:
        """Replace the text of an upload if it has this version.

        :param entry: ``None`` to delete the text.
        :param before: the index of the old text.
        :returns: ``None`` if the text was replaced; otherwise the text that is there, which
            may be empty.
        :raises Unavailable: also if the outcome is unknown, because the answer was lost and
            other writers have replaced the text since.
        """
        after = {} if entry is None else _index(entry)
        keys = [self._key_of(id)]
        values = []
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                keys.append(self._prefix + name)
                values += [after.get(name, ""), id]
        new = secrets.token_hex(_VERSION // 2)
        text = "-" if entry is None else entry.encode()
        change = (version, new, text, self._time_to_live(entry))
        answer = self._server.call(
            *_SWAP.on(keys, *change, 0, *values), again=_SWAP.on(keys, *change, 1, *values)
        )
        if answer == 0:
            raise Unavailable
        return None if answer == 1 else bytes(answer)

    def _time_to_live(self, entry: Entry | None) -> int | str:
        if self.redis_info_expiration is None or entry is None or entry.events:
            return ""
        return max(1, round(self.redis_info_expiration * 1000))

    def _remove(self, id: str, text: bytes, name: str) -> None:
        """Remove an upload from a set, unless its text was changed in the meantime."""
        keys = [self._key_of(id), self._prefix + name]
        self._server.call(*_SWAP.on(keys, text[:_VERSION], _NO_VERSION, "", "", 0, "", id))

    def _key_of(self, id: str) -> str:
        return f"{self._prefix}upload:{check_id(id)}"

    def _page(self, sets: Iterable[str], after: str, limit: int) -> Sequence[tuple[str, str]]:
        """Return the next members of sets in their order, each with the name of its set."""
        if not sets or limit <= 0:
            return []
        page = (f"({after}" if after else "-", "+", "LIMIT", 0, limit)
        found = self._server.calls([("ZRANGEBYLEX", self._prefix + name, *page) for name in sets])
        members = zip(sets, found, strict=True)
        return sorted((id.decode(), name) for name, ids in members for id in ids)[:limit]

    def _ids(
        self, name: str, until: float | None = None, *, offset: int = 0, limit: int = -1
    ) -> Sequence[str]:
        """Return the members of a set, those of the lowest scores first.

        :param until: only those with scores up to this one.
        """
        if limit == 0:
            return []
        highest = "+inf" if until is None else until
        page = ("LIMIT", offset, limit)
        ids = self._server.call("ZRANGEBYSCORE", self._prefix + name, "-inf", highest, *page)
        return [id.decode() for id in ids]

    def _texts(self, ids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Yield ids with their texts, which are empty if there is no entry."""
        for start in range(0, len(ids), _PAGE):
            some = ids[start : start + _PAGE]
            texts = self._server.call("MGET", *map(self._key_of, some))
            yield from zip(some, (text or b"" for text in texts), strict=True)

    def _entries(self, ids: Sequence[str]) -> Iterator[Entry]:
        """Yield the entries of `ids`, without those that are missing or unreadable."""
        for id, text in self._texts(ids):
            try:
                if text:
                    yield _parse(text)
            except record.CorruptRecord as error:
                self._skip(id, error)

    def _verified(
        self,
        pairs: Sequence[tuple[str, str]],
        belongs: Callable[[str, FileInfo], bool],
        now: float | None = None,
    ) -> Iterator[FileInfo]:
        """Yield the records of uploads that belong in the set where they were found, and
        remove the others from it: they have expired, or their ids are used anew.

        :param pairs: ids with the names of the sets.
        :param now: the time, if the scores are times.
        """
        for (id, text), (_, name) in zip(self._texts([id for id, _ in pairs]), pairs, strict=True):
            try:
                info = record.load(record.decode(text[_VERSION:])) if text else None
            except record.CorruptRecord as error:
                self._skip(id, error)
                if now is not None:
                    self._postpone(id, name, now)
                continue
            if info is not None and belongs(name, info):
                yield info
            else:
                self._remove(id, text, name)

    def _postpone(self, id: str, name: str, now: float) -> None:
        """Let an unreadable entry be found later: it would always be the first."""
        self._server.call("ZADD", self._prefix + name, "XX", now + _UNREADABLE, id)

    @staticmethod
    def _skip(id: str, error: record.CorruptRecord) -> None:
        log.warning("Skipping the record of %s: %s", id, error)


def _parse(text: bytes) -> Entry:
    return Entry.decode(text[_VERSION:])


def _index(entry: Entry) -> _Index:
    """Return the sets that an upload is in, with its scores."""
    info = entry.info
    index = {f"state:{info.state}": 0.0}
    if (expiry := _expiry(info)) is not None:
        index["expires"] = expiry
    if info.promised:
        index["promised"] = info.promised
    index.update({f"waiting:{part}": 0.0 for part in _parts(info)})
    if free_at := entry.free_at():
        index["pending"] = min(free_at.values())
        index.update({f"pending:{transport}": at for transport, at in free_at.items()})
    index.update({f"claims:{worker}": 0.0 for worker in entry.workers})
    if dead := entry.undelivered(dead=True):
        index["dead"] = min(event.created_at for event in dead)
    return index


def _expiry(info: FileInfo) -> float | None:
    """Return when an unfinished upload expires."""
    return None if info.is_finished or info.is_gone else info.expires_at


def _parts(info: FileInfo) -> Collection[str]:
    """Return the parts that a final upload waits for."""
    return info.partial_uploads if info.state is State.WAITING else ()
