"""The info store in Redis, held to the contract, and while Redis breaks off, forgets or is full."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import redis
import redis_service
from line import Line
from private_servers import PrivateRedis

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import InfoConflict, StorageFull, Unavailable, UploadExists, UploadNotFound
from tuswsgi.core.info import State
from tuswsgi.infostores import record
from tuswsgi.infostores.redis import RedisInfoStore
from tuswsgi.testing.infostores import InfoStoreContract
from tuswsgi.testing.lockers import SOON
from tuswsgi.testing.records import event, upload


@pytest.fixture
def settings():
    with redis_service.own_keys() as settings:
        yield settings


@pytest.fixture
def client():
    with redis.Redis.from_url(redis_service.url()) as client:
        yield client


@pytest.fixture
def private():
    server = PrivateRedis()
    yield server
    server.remove()


def prepared(url, settings):
    store = RedisInfoStore(url, settings=settings)
    store.prepare()
    yield store
    store.close()


def wait_until(condition):
    deadline = time.monotonic() + SOON * 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestRedisInfoStore(InfoStoreContract):
    @pytest.fixture
    def store(self, settings):
        yield from prepared(redis_service.url(), settings)

    @pytest.fixture
    def other(self, store, settings):
        # Another spelling of the address is another pool.
        yield from prepared(f"{redis_service.url()}/", settings)

    @pytest.fixture
    def sets(self, client, settings):
        """The members of the sets that index the uploads, by the names of the sets."""
        prefix = settings.redis_prefix

        def read():
            keys = [key.decode() for key in client.scan_iter(f"{prefix}*", count=1000)]
            return {
                key.removeprefix(prefix): dict(client.zrange(key, 0, -1, withscores=True))
                for key in keys
                if not key.startswith(f"{prefix}upload:")
            }

        return read

    def test_the_index_follows_the_record(self, store, sets):
        part = upload()
        final = upload("f", is_final=True, partial_uploads=("p", "q", "p"), state=State.WAITING)
        store.create(replace(final, expires_at=7.5), [told := event(final, transport="http")])
        store.claim("me", 1.0, 3.0)
        assert sets() == {
            "state:waiting": {b"f": 0},
            "expires": {b"f": 7.5},
            "waiting:p": {b"f": 0},
            "waiting:q": {b"f": 0},
            "pending": {b"f": 3},
            "pending:http": {b"f": 3},
            "claims:me": {b"f": 0},
        }
        store.put_back(replace(told, dead=True))
        store.save(replace(final, state=State.FINISHED, finished_at=9.0))
        assert sets() == {"state:finished": {b"f": 0}, "dead": {b"f": 2.5}}
        store.settle(told)
        store.create(part)
        assert sets() == {"state:finished": {b"f": 0}, "state:receiving": {part.id.encode(): 0}}

    @pytest.mark.parametrize("id", ["..", "a/b", "", "a\0b", "\udc80", "x" * 200])
    def test_an_invalid_id_is_not_found(self, store, id):
        with pytest.raises(UploadNotFound):
            store.load(id)
        with pytest.raises(UploadNotFound):
            store.create(upload(id))
        assert list(store.events(id)) == list(store.finals_waiting_for(id)) == []

    def test_foreign_entries_are_skipped(self, store, client, settings, caplog):
        store.create(info := upload())
        store.create(broken := upload(expires_at=1.0), [event(broken, transport="http")])
        client.set(f"{settings.redis_prefix}upload:{broken.id}", "0123456789abcdef[]")
        store.create(due := upload(expires_at=1.5))
        for _ in range(3):
            assert {found.id for found in store.list()} == {info.id, due.id}
            assert list(store.claim("a", 100.0, 130.0)) == []
            assert list(store.expired(2.0)) == [due.id]
        assert caplog.text.count("Skipping") == 5
        assert list(store.undelivered(dead=False)) == []
        with pytest.raises(record.CorruptRecord):
            store.load(broken.id)

    def test_claims_read_only_due_entries(self, store):
        for n in range(300):
            store.create(late := upload(), [event(late, transport="http", due_at=50.0 + n)])
        store.create(due := upload(), [told := event(due, transport="http")])
        before = store._server.call("INFO", "commandstats")
        assert list(store.claim("a", 10.0, 20.0, transport="http")) == [told]
        after = store._server.call("INFO", "commandstats")
        assert calls(after, "mget") - calls(before, "mget") <= 1

    def test_records_expire(self, settings, client, sets):
        store = RedisInfoStore(redis_service.url(), 0.3, settings=settings)
        part, final, told = upload(expires_at=1.0), upload("f"), upload()
        store.create(part)
        store.create(replace(final, state=State.WAITING, is_final=True, partial_uploads=("p",)))
        store.create(told, [first := event(told, transport="http")])
        ttl = client.pttl(f"{settings.redis_prefix}upload:{part.id}")
        assert 0 < ttl <= 300
        assert client.ttl(f"{settings.redis_prefix}upload:{told.id}") == -1
        wait_until(lambda: not client.exists(f"{settings.redis_prefix}upload:f"))
        with pytest.raises(UploadNotFound):
            store.load(part.id)
        with pytest.raises(UploadNotFound):
            store.save(part)
        assert list(store.list()) == [told]
        assert list(store.expired(2.0)) == list(store.finals_waiting_for("p")) == []
        # What was found by nothing else is out of the sets.
        assert {"expires", "waiting:p", "state:waiting"}.isdisjoint(sets())
        dead = replace(first, dead=True)
        store.put_back(dead)
        assert client.ttl(f"{settings.redis_prefix}upload:{told.id}") == -1
        store.settle(dead)
        assert 0 < client.pttl(f"{settings.redis_prefix}upload:{told.id}") <= 300
        store.close()

    def test_each_change_restarts_the_lifetime_of_a_record(self, settings, client):
        store = RedisInfoStore(redis_service.url(), 100.0, settings=settings)
        store.create(info := upload())
        key = f"{settings.redis_prefix}upload:{info.id}"
        client.pexpire(key, 5000)
        store.save(info)
        assert client.pttl(key) > 50_000
        store.close()

    def test_a_reused_id_is_indexed_anew(self, store, client, settings):
        old = upload("a", state=State.WAITING, is_final=True, partial_uploads=("p",))
        store.create(replace(old, expires_at=1.0))
        client.delete(f"{settings.redis_prefix}upload:a")
        store.create(new := upload("a"))
        assert list(store.list()) == list(store.list([State.RECEIVING])) == [new]
        assert list(store.list([State.WAITING])) == []
        assert list(store.expired(2.0)) == list(store.finals_waiting_for("p")) == []
        assert list(store.list()) == [new]

    def test_expired_records_do_not_hide_others(self, store, client, settings):
        infos = [upload(f"{n:03}", expires_at=1.0) for n in range(30)]
        for info in infos:
            store.create(info)
        for info in infos[:25]:
            client.delete(f"{settings.redis_prefix}upload:{info.id}")
        assert list(store.expired(2.0, limit=3)) == [info.id for info in infos[25:28]]
        assert list(store.list(limit=4)) == infos[25:29]
        assert list(store.list(after=infos[27].id)) == infos[28:]


def calls(stats, command):
    """Return how often a command was run, of ``INFO commandstats``."""
    return stats.get(f"cmdstat_{command}", {}).get("calls", 0)


def test_changes_are_made_once_while_connections_are_cut(private, settings):
    store = RedisInfoStore(private.dsn, settings=settings, pool=PoolSettings(4, 5.0))
    store.create(shared := upload())
    done, doubtful, stop = [], [], threading.Event()

    def cut():
        with redis.Redis.from_url(private.dsn) as client:
            while not stop.wait(0.02):
                client.execute_command("CLIENT", "KILL", "TYPE", "normal")

    def write():
        while len(done) < 200:
            try:
                found = store.load(shared.id)
                saved = replace(found, offset=found.offset + 1)
                told = event(found, transport="http")
            except Unavailable:
                continue
            try:
                store.save(saved, [told])
                done.append(told.id)
            except InfoConflict:
                pass
            except Unavailable:
                doubtful.append(told.id)

    with ThreadPoolExecutor(5) as pool:
        cutting = pool.submit(cut)
        for writing in [pool.submit(write) for _ in range(4)]:
            writing.result()
        stop.set()
        cutting.result()
    info = store.load(shared.id)
    written = [told.id for told in store.events(shared.id)]
    assert set(done) <= set(written) <= {*done, *doubtful}
    assert len(written) == len(set(written)) == info.offset == info.sequence
    store.close()


def test_a_lost_answer_is_no_conflict(settings):
    line = Line(redis_service.url())
    store = RedisInfoStore(line.url, settings=settings)
    store.list()
    line.lose_answer()
    store.create(info := upload(), [first := event(info, transport="http")])
    assert not line.loses_answer
    store.load(info.id)
    with pytest.raises(UploadExists):
        store.create(info)
    line.lose_answer()
    (claimed,) = store.claim("a", 10.0, 20.0, upload=info.id)
    assert claimed == first
    line.lose_answer()
    store.settle(first)
    assert list(store.events(info.id)) == []
    assert store.load(info.id) == info
    store.close()
    line.close()


def test_a_restarted_server_has_all_records(private, settings):
    store = RedisInfoStore(private.dsn, settings=settings)
    infos = [upload() for _ in range(20)]
    for info in infos:
        store.create(info, [event(info, transport="http")])
    private.kill()
    for call in (store.list, lambda: store.create(upload()), lambda: store.claim("a", 1.0, 2.0)):
        with pytest.raises(Unavailable):
            call()
    private.start()
    wait_until(lambda: is_there(store))
    assert store.list() == sorted(infos, key=lambda info: info.id)
    assert len(store.claim("a", 1.0, 2.0)) == 20
    store.close()


def is_there(store):
    try:
        return store.list() is not None
    except Unavailable:
        return False


def test_a_full_server_changes_nothing(private, settings):
    store = RedisInfoStore(private.dsn, settings=settings)
    store.create(info := upload())
    store._server.call("CONFIG", "SET", "maxmemory", "1")
    for write in (lambda: store.save(replace(info, offset=1)), lambda: store.create(upload())):
        with pytest.raises(StorageFull):
            write()
    assert store.list() == [info]
    store._server.call("CONFIG", "SET", "maxmemory", "0")
    store.save(replace(info, offset=1))
    store.close()


def test_expired_records_promise_nothing(settings):
    store = RedisInfoStore(redis_service.url(), redis_info_expiration=0.05, settings=settings)
    store.create(upload(size=7))
    deadline = time.monotonic() + SOON
    while store.list() and time.monotonic() < deadline:
        time.sleep(0.01)
    store.create(held := upload(size=5), [event(held, transport="http")])
    assert store.usage() == 5
    store.close()
