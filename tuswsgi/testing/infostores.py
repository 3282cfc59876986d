"""The contract of info stores as tests: subclass ``InfoStoreContract``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tuswsgi.core.info import State
from tuswsgi.infostores.base import Census, InfoStore
from tuswsgi.testing.eventstores import EventStoreContract
from tuswsgi.testing.records import event, together, upload
from tuswsgi.testing.recordstores import RecordStoreContract


class InfoStoreContract(RecordStoreContract, EventStoreContract):
    """Tests of an ``InfoStore``; define the fixture `store`, and `other` if you can."""

    @pytest.fixture
    def store(self) -> Iterator[InfoStore]:
        """A prepared store without records."""
        raise NotImplementedError("Define the fixture `store`.")

    @pytest.fixture
    def other(self, store: InfoStore) -> InfoStore:
        """Another prepared store on the same records, as a second process would open it."""
        pytest.skip("instances of this store share no records")

    @pytest.fixture
    def fill(self, store: InfoStore) -> Callable[[], None]:
        """A function that fills the store: it has no room for another megabyte."""
        pytest.skip("the fixture `fill` is not defined")

    def test_census_counts_unfinished_uploads(self, store: InfoStore) -> None:
        assert store.census(10.0) == Census()
        for at in (None, 10.0, 10.5):
            store.create(upload(last_byte_at=at))
        store.create(upload(state=State.WAITING, is_final=True))
        gone = upload()
        store.create(gone)
        assert store.census(10.0) == Census(unfinished=5, stalled=3)
        store.delete(gone, [], state=State.TERMINATED, now=2.0)
        store.create(upload(state=State.FINISHED, finished_at=1.0))
        assert store.census(10.0) == Census(unfinished=4, stalled=2)
        assert store.census(1.0) == Census(unfinished=4, stalled=0)

    def test_census_counts_events(self, store: InfoStore) -> None:
        told = [event(info := upload(state=State.FINISHED), transport="t", created_at=3.0)]
        told += [event(info, transport=transport, created_at=4.0) for transport in "uv"]
        store.create(info, told)
        assert store.census(0.0) == Census(pending=3, oldest=3.0)
        store.put_back(replace(told[0], dead=True))
        assert store.census(0.0) == Census(pending=2, dead=1, oldest=4.0)

    def test_prepare_can_be_repeated(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        together([store.prepare] * 4)
        assert store.load(info.id) == info

    def test_a_closed_store_can_be_used_again(self, store: InfoStore) -> None:
        info = upload()
        store.create(info)
        store.close()
        store.close()
        saved = store.save(info, [event(info)])
        assert store.load(info.id) == saved
