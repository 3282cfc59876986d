"""The SQL info store on servers, held to the contract."""

from __future__ import annotations

from dataclasses import replace

import databases
import pytest

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.core.errors import Unavailable
from tuswsgi.infostores.sql import SqlInfoStore
from tuswsgi.testing.infostores import InfoStoreContract
from tuswsgi.testing.records import event, upload


def make(dsn, size=databases.POOL_SIZE, timeout=10.0):
    return SqlInfoStore(dsn, pool=PoolSettings(size, timeout))


class OnServer(InfoStoreContract):
    """A store in a database of its own."""

    @pytest.fixture
    def dsn(self):
        with self.database() as dsn:
            yield dsn

    @pytest.fixture
    def store(self, dsn):
        store = make(dsn)
        store.prepare()
        yield store
        store.close()

    @pytest.fixture
    def other(self, store, dsn):
        other = make(databases.other_spelling(dsn))
        assert other._connection is not store._connection
        yield other
        other.close()

    def test_times_are_exact(self, store):
        for number in (0.1, 1763712345.123457, 1763712345.6789012, 1e-7, 2**53 + 0.0, 1 / 3):
            info = upload(expires_at=number)
            told = event(info, transport="http", created_at=number, due_at=number)
            store.create(info, [told])
            assert list(store.claim("a", number, number + 1, upload=info.id)) == [told]
            assert info.id in store.expired(number)

    @pytest.mark.parametrize("error", ["a\0b", "\ud800", "x" * 100_000, "кошка \N{CAT FACE}"])
    def test_errors_are_stored_as_far_as_the_database_allows(self, store, error):
        info = upload()
        store.create(info, [told := event(info, transport="http")])
        store.put_back(replace(told, error=error, attempts=1))
        (found,) = store.events(info.id)
        assert found.attempts == 1
        assert len(found.error) == len(error)

    def test_a_record_may_be_large(self, store):
        payload = {"text": "кошка" * 200_000}
        info = upload(concat="/" * 3_000_000)
        store.create(info, [told := event(info, payload=payload)])
        assert store.load(info.id) == info
        assert list(store.events(info.id)) == [told]

    def test_a_store_without_tables_is_unavailable(self, dsn, caplog):
        store = make(dsn)
        with pytest.raises(Unavailable) as caught:
            store.load("a")
        assert "tuswsgi_uploads" in caplog.text
        assert len(caplog.records) == 1
        assert "tuswsgi" not in caught.value.message
        store.close()


class TestPostgresInfoStore(OnServer):
    database = staticmethod(databases.postgres)


class TestMysqlInfoStore(OnServer):
    database = staticmethod(databases.mysql)


def test_ids_are_ordered_as_bytes_in_any_collation():
    with databases.sorted_postgres() as dsn:
        store = make(dsn)
        store.prepare()
        TestPostgresInfoStore().test_list_is_ordered_and_paged(store)
        store.close()
