"""Records of uploads in Redis, which several hosts may share.

This file owns the keys: a text for each upload with its record and its events, and sorted
sets by which uploads are found. A text is replaced only where it is still the one that was
read, and the sets change in the same script, so that they agree whoever dies when.
Connections are the business of ``connections.redis``.
"""

from __future__ import annotations

import heapq
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from marshmallow import ValidationError

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import RedisSettings, connect
from tuswsgi.connections.redis_scripts import Script
from tuswsgi.core.backoff import Backoff
from tuswsgi.core.errors import InfoConflict, Unavailable, UploadExists, UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State, check_id
from tuswsgi.core.options import Duration, option
from tuswsgi.infostores import record
from tuswsgi.infostores.base import InfoStore
from tuswsgi.infostores.kept import Kept

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Puts a text in the place of another one, and members into sorted sets or out of them.
#: KEYS: the text's, and those of the sets. ARGV: the version that the text must have, its new
#: version, the new text ('': it stays, '-': it goes), its time to live in milliseconds ('': for
#: ever), whether this may have been run before (1), and for each set a score ('': out) and a
#: member. It returns 1, or the text that is there instead, or 0 where that may have taken the
#: place of the new one. A text begins with its version.
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
for place = 2, #KEYS do
    local score, member = ARGV[2 * place + 2], ARGV[2 * place + 3]
    if score ~= '' then
        redis.call('ZADD', KEYS[place], score, member)
    else
        redis.call('ZREM', KEYS[place], member)
    end
end
return 1
""")

#: Adds up the scores of a sorted set, below 2**53 exactly. KEYS: the set's. ARGV: what the keys
#: of texts begin with if Redis may have forgotten some, whose members go, else ''.
_SUM = Script("""
local sum, found = 0, redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for place = 1, #found, 2 do
    if ARGV[1] == '' or redis.call('EXISTS', ARGV[1] .. found[place]) == 1 then
        sum = sum + tonumber(found[place + 1])
    else
        redis.call('ZREM', KEYS[1], found[place])
    end
end
return string.format('%.0f', sum)
""")

#: The length of a version, and what is none.
_VERSION = 16
_NO_VERSION = "-"

#: How many texts are read at once.
_PAGE = 100

#: How often claims look for more where others were faster.
_ROUNDS = 10

#: Seconds after which claims and the clean-up look again at a record that cannot be read.
_UNREADABLE = 60.0

#: Seconds until somebody gives up who always finds a text changed by others.
_PATIENCE = 10.0

#: Between attempts to replace such a text.
_BACKOFF = Backoff(first=0.002, longest=0.02, jitter=1.0)

#: Scores by the names of sorted sets, and with them what an upload is found by.
_Found = dict[str, float]


def _positive(value: float) -> None:
    if value < 0.001:
        raise ValidationError("Not a duration of at least a millisecond.")


@dataclass(repr=False, eq=False)
class RedisInfoStore(InfoStore):
    """Records in a Redis that all hosts share (not in a Redis Cluster).

    What this store promises is as good as Redis' memory. With ``appendonly yes`` an
    acknowledged change survives the death of Redis, with ``appendfsync always`` also that of
    its machine; otherwise the last second is lost with it. With ``maxmemory`` there must be
    ``maxmemory-policy noeviction``: a full Redis then refuses (507), and else it drops records.
    A replica that takes over may lack the latest changes.

    :param info_db_dsn: the server, see ``connections.redis.connect``.
    """

    info_db_dsn: str
    redis_info_expiration: float | None = option(
        None,
        "How long Redis keeps a record after its last change, while no hook of it is to be "
        "delivered. It forgets the upload then, and the bytes stay. Unset: for ever.",
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
        # Whoever prepares may fork afterwards, and connections do not survive that.
        self._server.close()

    def close(self) -> None:
        self._server.close()

    def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
        kept = Kept(info)
        kept.add(events)
        if self._swap(check_id(info.id), "", kept, {}) is not None:
            raise UploadExists

    def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
        return self._change(info.id, partial(self._run_save, info, events))

    def forget(self, info: FileInfo) -> bool:
        text = self._server.call("GET", self._key_of(info.id))
        if text is None:
            return False
        kept = _parse(text)
        # A script that is run again after a broken connection finds what it left: nothing.
        return kept.is_over(info.sequence) and not self._swap(
            info.id, text[:_VERSION], None, _found_by(kept)
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
            found += self._right(pairs, lambda name, info: info.state is sets[name])
            after = pairs[-1][0]
        return found

    def usage(self) -> int:
        texts = "" if self.redis_info_expiration is None else f"{self._prefix}upload:"
        return int(self._server.call(*_SUM.on([f"{self._prefix}promised"], texts)))

    def expired(self, now: float, limit: int = 1000) -> Sequence[str]:
        found: list[str] = []
        while ids := self._ids("expires", now, offset=len(found), limit=limit - len(found)):
            pairs = [(id, "expires") for id in ids]
            right = self._right(pairs, lambda _, info: _expiry(info) is not None, now)
            found += [info.id for info in right]
        return found

    def finals_waiting_for(self, part: str) -> Sequence[str]:
        try:
            name = f"waiting:{check_id(part)}"
        except UploadNotFound:
            return []
        pairs = [(id, name) for id in self._ids(name)]
        return [info.id for info in self._right(pairs, lambda _, info: part in _parts(info))]

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

        def claim(kept: Kept) -> Sequence[Event]:
            events = kept.free(now, transport)[: limit - len(claimed)]
            kept.claim(events, worker, until)
            return events

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
            if not self._change_if_there(id, lambda kept: kept.renew(worker, until), text):
                self._remove(id, text, name)

    def settle(self, event: Event) -> None:
        self._change_if_there(event.upload, lambda kept: kept.replace(event, []))

    def put_back(self, event: Event) -> None:
        self._change_if_there(event.upload, lambda kept: kept.replace(event, [event]))

    def outbox(self, *, dead: bool, limit: int = 1000) -> Sequence[Event]:
        ids = self._ids("dead" if dead else "pending")
        events = (event for kept in self._known(ids) for event in kept.events if event.dead is dead)
        return heapq.nsmallest(limit, events, key=lambda event: event.created_at)

    @staticmethod
    def _run_save(info: FileInfo, events: Sequence[Event], kept: Kept) -> FileInfo:
        if kept.info.sequence != info.sequence:
            raise InfoConflict
        kept.info = info.replace(sequence=info.sequence + 1)
        kept.add(events)
        return kept.info

    def _change(self, id: str, change: Callable[[Kept], T], text: bytes | None = None) -> T:
        """Change what is kept of an upload, and return what `change` did.

        Nothing is written if that is nothing.

        :param text: what was read of it a moment ago.
        :raises UploadNotFound: if there is nothing.
        """
        deadline = time.monotonic() + _PATIENCE
        pauses = iter(_BACKOFF)
        found = text or self._server.call("GET", self._key_of(id))
        while found:
            kept = _parse(found)
            before = _found_by(kept)
            result = change(kept)
            if not result:
                return result
            found = self._swap(id, found[:_VERSION], kept, before)
            if found is None:
                return result
            if time.monotonic() >= deadline:
                raise Unavailable
            time.sleep(next(pauses))
        raise UploadNotFound

    def _change_if_there(
        self, id: str, change: Callable[[Kept], T], text: bytes | None = None
    ) -> T | None:
        try:
            return self._change(id, change, text)
        except UploadNotFound:
            return None

    def _swap(
        self, id: str, version: bytes | str, kept: Kept | None, before: _Found
    ) -> bytes | None:
        """Write what is to be kept, if the version is still this one; else return the text
        that is there, which may be empty.

        :param kept: ``None`` for nothing.
        :raises Unavailable: also if nobody can tell whether it was written: the answer got
            lost, and others have written since.
        """
        after = {} if kept is None else _found_by(kept)
        keys = [self._key_of(id)]
        values = []
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                keys.append(self._prefix + name)
                values += [after.get(name, ""), id]
        new = secrets.token_hex(_VERSION // 2)
        text, life = ("-", "") if kept is None else (kept.encode(), self._life(kept))
        texts = (version, new, text, life)
        answer = self._server.call(
            *_SWAP.on(keys, *texts, 0, *values), again=_SWAP.on(keys, *texts, 1, *values)
        )
        if answer == 0:
            raise Unavailable
        return None if answer == 1 else bytes(answer)

    def _life(self, kept: Kept) -> int | str:
        if self.redis_info_expiration is None or kept.events:
            return ""
        return max(1, round(self.redis_info_expiration * 1000))

    def _remove(self, id: str, text: bytes, name: str) -> None:
        """Take an upload out of a set where its text, or that it has none, says so."""
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
        """Yield ids with what is kept of them, which may be empty."""
        for start in range(0, len(ids), _PAGE):
            some = ids[start : start + _PAGE]
            texts = self._server.call("MGET", *map(self._key_of, some))
            yield from zip(some, (text or b"" for text in texts), strict=True)

    def _known(self, ids: Sequence[str]) -> Iterator[Kept]:
        """Yield what is kept of `ids`, without what is gone or not ours."""
        for id, text in self._texts(ids):
            try:
                if text:
                    yield _parse(text)
            except record.CorruptRecord as error:
                self._skip(id, error)

    def _right(
        self,
        pairs: Sequence[tuple[str, str]],
        is_right: Callable[[str, FileInfo], bool],
        now: float | None = None,
    ) -> Iterator[FileInfo]:
        """Yield the records of uploads that are in the right set, and take the others out:
        Redis has forgotten those, or their ids are others' now.

        :param pairs: ids, each with the name of the set where it was found.
        :param now: the time, where scores are times.
        """
        for (id, text), (_, name) in zip(self._texts([id for id, _ in pairs]), pairs, strict=True):
            try:
                info = record.load(record.decode(text[_VERSION:])) if text else None
            except record.CorruptRecord as error:
                self._skip(id, error)
                if now is not None:
                    self._postpone(id, name, now)
                continue
            if info is not None and is_right(name, info):
                yield info
            else:
                self._remove(id, text, name)

    def _postpone(self, id: str, name: str, now: float) -> None:
        """Look later again at what cannot be read, or it would always be the first."""
        self._server.call("ZADD", self._prefix + name, "XX", now + _UNREADABLE, id)

    @staticmethod
    def _skip(id: str, error: record.CorruptRecord) -> None:
        log.warning("Skipping what is kept of %s: %s", id, error)


def _parse(text: bytes) -> Kept:
    return Kept.decode(text[_VERSION:])


def _found_by(kept: Kept) -> _Found:
    """Return in which sets an upload is, with its scores."""
    info = kept.info
    found = {f"state:{info.state}": 0.0}
    if (expiry := _expiry(info)) is not None:
        found["expires"] = expiry
    if info.promised:
        found["promised"] = info.promised
    found.update({f"waiting:{part}": 0.0 for part in _parts(info)})
    if (free_at := kept.free_at()) is not None:
        found["pending"] = free_at
    for transport, free_at in kept.free_by_transport().items():
        found[f"pending:{transport}"] = free_at
    found.update({f"claims:{holder}": 0.0 for holder, _ in kept.claims.values()})
    if dead := [event.created_at for event in kept.events if event.dead]:
        found["dead"] = min(dead)
    return found


def _expiry(info: FileInfo) -> float | None:
    """Return when the clean-up shall come, if ever."""
    return None if info.is_finished or info.is_gone else info.expires_at


def _parts(info: FileInfo) -> Collection[str]:
    """Return the parts for which a final upload waits."""
    return info.partial_uploads if info.state is State.WAITING else ()
