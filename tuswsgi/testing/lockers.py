"""Tests of the contract of lockers: subclass ``LockerContract``.

They test what the documentation of ``Locker`` promises, except for the locks of a process that
dies, which needs several processes. Subclass ``tuswsgi.testing.leases.LeaseContract``, too, for
lockers whose locks are leases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tuswsgi.core.errors import TusError, UploadLocked
from tuswsgi.lockers.base import Locker

#: How long tests wait for something that must happen, in seconds; long enough for a busy machine.
SOON = 10.0


def ignore(reason: TusError) -> None:
    """A holder's callback that ignores the request."""


class Requests:
    """A holder's callback that records the requests."""

    def __init__(self) -> None:
        self.reasons: list[TusError] = []
        self._arrived = threading.Event()

    def __call__(self, reason: TusError) -> None:
        self.reasons.append(reason)
        self._arrived.set()

    def wait(self) -> None:
        """Wait for the first request."""
        assert self._arrived.wait(SOON), "the holder was not asked to release the lock"

    def wait_for(self, kind: type[TusError]) -> None:
        """Wait for a request with this reason."""
        deadline = time.monotonic() + SOON
        while not any(isinstance(reason, kind) for reason in self.reasons):
            assert time.monotonic() < deadline, f"only {self.reasons} arrived"
            time.sleep(0.01)


class LockerContract:
    """Tests of a ``Locker``; define the fixture `locker`, and `other` if you can."""

    @pytest.fixture
    def locker(self) -> Iterator[Locker[Any]]:
        """A prepared locker."""
        raise NotImplementedError("Define the fixture `locker`.")

    @pytest.fixture
    def other(self, locker: Locker[Any]) -> Locker[Any]:
        """Another prepared locker with the same locks, as a second process has it."""
        pytest.skip("the locks belong to one instance")

    def test_a_lock_is_exclusive(self, locker: Locker[Any]) -> None:
        with locker.lock("a", ignore), pytest.raises(UploadLocked):  # noqa: SIM117
            with locker.try_lock("a", ignore):
                pytest.fail("two holders")
        with locker.try_lock("a", ignore), pytest.raises(UploadLocked):  # noqa: SIM117
            with locker.try_lock("a", ignore):
                pytest.fail("two holders")
        with locker.lock("a", ignore):
            pass

    def test_many_threads_take_turns(self, locker: Locker[Any]) -> None:
        inside = 0
        turns = 0
        overlaps = 0

        def take_turns() -> None:
            nonlocal inside, turns, overlaps
            for _ in range(8):
                with locker.lock("a", ignore):
                    overlaps += inside
                    inside += 1
                    pause.wait(0.0005)
                    turns += 1
                    inside -= 1

        pause = threading.Event()
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(take_turns) for _ in range(8)]:
                done.result()
        assert (turns, overlaps) == (64, 0)

    @pytest.mark.parametrize("id", ["a", "-%2F..%00!$'()*+,;=:@~"])
    def test_a_holder_is_asked_to_release_its_lock(self, locker: Locker[Any], id: str) -> None:
        requests = Requests()
        with self._held(locker, id, requests) as release, ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(self._take, locker, id)
            requests.wait()
            assert not waiter.done()
            release.set()
            waiter.result(SOON)
        assert all(isinstance(reason, TusError) for reason in requests.reasons)

    def test_a_free_lock_causes_no_request(self, locker: Locker[Any]) -> None:
        requests = Requests()
        with locker.lock("a", requests):
            pass
        with locker.lock("a", ignore):
            self._flush(locker)
        assert requests.reasons == []

    def test_a_later_holder_is_not_asked(self, locker: Locker[Any]) -> None:
        first = Requests()
        second = Requests()
        locker.lock_timeout = 0.01
        with locker.lock("a", first):
            for _ in range(3):
                self._expect_locked(locker, "a")
        with locker.lock("a", second):
            self._flush(locker)
            assert first.reasons
            assert second.reasons == []

    def test_waiting_has_a_timeout(self, locker: Locker[Any]) -> None:
        locker.lock_timeout = 0.05
        requests = Requests()
        with locker.lock("a", requests):
            self._expect_locked(locker, "a")
            requests.wait()
            self._expect_locked(locker, "a")
        with locker.lock("a", ignore):
            pass

    def test_a_lock_is_not_reentrant(self, locker: Locker[Any]) -> None:
        locker.lock_timeout = 0.01
        with locker.lock("a", ignore):
            self._expect_locked(locker, "a")

    def test_trying_causes_no_request(self, locker: Locker[Any]) -> None:
        requests = Requests()
        with locker.lock("a", requests):
            for _ in range(3):
                with pytest.raises(UploadLocked), locker.try_lock("a", ignore):
                    pytest.fail("two holders")
            self._flush(locker)
        assert requests.reasons == []

    def test_a_holder_that_only_tried_is_asked_too(self, locker: Locker[Any]) -> None:
        requests = Requests()
        locker.lock_timeout = 0.01
        with locker.try_lock("a", requests):
            self._expect_locked(locker, "a")
            requests.wait()

    def test_ids_are_independent(self, locker: Locker[Any]) -> None:
        ids = [
            "a",
            "A",
            "ab",
            "a.b",
            "a-b",
            "_",
            "z" * 128,
            "sweep",
            *(f"{n:032x}" for n in range(200)),
        ]
        requests = {id: Requests() for id in ids}
        locker.lock_timeout = 0.01
        with ExitStack() as stack:
            for id in ids:
                stack.enter_context(locker.lock(id, requests[id]))
            self._expect_locked(locker, "ab")
            requests["ab"].wait()
            self._flush(locker)
        assert [id for id in ids if requests[id].reasons] == ["ab"]

    def test_an_exception_releases(self, locker: Locker[Any]) -> None:
        with pytest.raises(ZeroDivisionError), locker.lock("a", ignore):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), locker.try_lock("a", ignore):
            raise ZeroDivisionError
        with locker.try_lock("a", ignore):
            pass

    def test_a_failing_callback_does_no_harm(self, locker: Locker[Any]) -> None:
        def fail(reason: TusError) -> None:
            raise ZeroDivisionError

        locker.lock_timeout = 0.01
        with locker.lock("a", fail):
            self._expect_locked(locker, "a")
            self._flush(locker)

    def test_a_closed_locker_may_be_used_again(self, locker: Locker[Any]) -> None:
        with locker.lock("a", ignore):
            pass
        locker.close()
        locker.close()
        self._flush(locker)

    def test_prepare_does_not_affect_holders(self, locker: Locker[Any]) -> None:
        requests = Requests()
        locker.lock_timeout = 0.01
        with locker.lock("a", requests):
            locker.prepare()
            self._expect_locked(locker, "a")
            requests.wait()

    def test_other_instances_share_the_locks(self, locker: Locker[Any], other: Locker[Any]) -> None:
        for holder, waiter in ((locker, other), (other, locker)):
            requests = Requests()
            with self._held(holder, "a", requests) as release, ThreadPoolExecutor(1) as pool:
                taken = pool.submit(self._take, waiter, "a")
                requests.wait()
                assert not taken.done()
                release.set()
                taken.result(SOON)

    @staticmethod
    def _take(locker: Locker[Any], id: str) -> None:
        with locker.lock(id, ignore):
            pass

    @staticmethod
    def _expect_locked(locker: Locker[Any], id: str) -> None:
        with pytest.raises(UploadLocked), locker.lock(id, ignore):
            pytest.fail("two holders")

    @staticmethod
    @contextmanager
    def _held(locker: Locker[Any], id: str, requests: Requests) -> Iterator[threading.Event]:
        """Hold a lock in another thread until the event is set."""
        holding = threading.Event()
        release = threading.Event()

        def hold() -> None:
            with locker.lock(id, requests):
                holding.set()
                release.wait(SOON)

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(hold)
            assert holding.wait(SOON)
            try:
                yield release
            finally:
                release.set()
                done.result(SOON)

    @staticmethod
    def _flush(locker: Locker[Any]) -> None:
        """Wait until all earlier requests must have arrived."""
        requests = Requests()
        timeout = locker.lock_timeout
        deadline = time.monotonic() + SOON
        with locker.lock("flush", requests):
            locker.lock_timeout = 0.01
            while not requests.reasons and time.monotonic() < deadline:
                LockerContract._expect_locked(locker, "flush")
            requests.wait()
        locker.lock_timeout = timeout
