"""Tests of the contract of lockers whose locks are leases: subclass ``LeaseContract``.

Several lockers in one process stand for processes of several hosts, or of one host if they have
the same host locker. A process that died is a locker that neither renews nor releases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tuswsgi.core.errors import LockLost, TusError, Unavailable, UploadInterrupted, UploadLocked
from tuswsgi.lockers.base import Locker
from tuswsgi.lockers.file import FileLocker
from tuswsgi.lockers.lease import Lease, LeaseLocker, worker_of
from tuswsgi.testing.lockers import SOON, Requests, ignore

#: Makes a locker with this lease in seconds and this locker of the host.
MakeLocker = Callable[[float, "Locker[Any] | None"], LeaseLocker]


class LeaseContract:
    """Tests of a ``LeaseLocker``; define the fixture `make`.

    :cvar lease: a short lease, in seconds. A machine that is busy for most of it loses locks.
    """

    lease = 2.0

    @pytest.fixture
    def make(self) -> Iterator[MakeLocker]:
        """A function that makes lockers on one server, with locks that belong to the test."""
        raise NotImplementedError("Define the fixture `make`.")

    @pytest.fixture
    def near(self, make: MakeLocker) -> Iterator[LeaseLocker]:
        yield from self._prepared(make(self.lease, None))

    @pytest.fixture
    def far(self, make: MakeLocker) -> Iterator[LeaseLocker]:
        """A locker of another host."""
        yield from self._prepared(make(self.lease, None))

    @pytest.fixture
    def neighbours(
        self, make: MakeLocker, tmp_path: Path
    ) -> Iterator[tuple[LeaseLocker, LeaseLocker]]:
        """Lockers of two processes of one host, with leases too long to wait for."""
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(contextmanager(self._prepared)(make(60 * SOON, host_locker)))
                for host_locker in (FileLocker(tmp_path), FileLocker(tmp_path))
            )
            yield first, second

    def test_another_host_asks_the_holder(self, near: LeaseLocker, far: LeaseLocker) -> None:
        for holder, waiter in ((near, far), (far, near), (near, far)):
            requests = Requests()
            with ExitStack() as held, ThreadPoolExecutor(1) as pool:
                held.enter_context(holder.lock("a", requests))
                taken = pool.submit(self._take, waiter, "a")
                requests.wait_for(UploadInterrupted)
                assert not taken.done()
                held.close()
                taken.result(SOON)

    def test_trying_causes_no_request(self, near: LeaseLocker, far: LeaseLocker) -> None:
        requests = Requests()
        with near.lock("a", requests):
            for _ in range(3):
                self._expect_locked(far, "a")
            self._flush(near, far)
        assert requests.reasons == []

    def test_a_late_request_is_dropped(self, near: LeaseLocker, far: LeaseLocker) -> None:
        first = Requests()
        second = Requests()
        with near.lock("a", first):
            token = near._holder("a")
        assert token is not None
        with near.lock("a", second):
            far._send_request(worker_of(token), "a", token)
            self._flush(near, far)
        assert first.reasons == second.reasons == []

    def test_a_request_reaches_one_of_many_holders(
        self, near: LeaseLocker, far: LeaseLocker
    ) -> None:
        requests = {id: Requests() for id in ("a", "b", "A", "z" * 128, "a.b")}
        with ExitStack() as held:
            for id, request in requests.items():
                held.enter_context(near.lock(id, request))
            self._ask(far, "a.b", requests["a.b"])
            self._flush(near, far)
        assert [id for id in requests if requests[id].reasons] == ["a.b"]

    def test_a_lock_outlives_its_lease_while_it_is_held(
        self, near: LeaseLocker, far: LeaseLocker
    ) -> None:
        requests = Requests()
        with near.lock("a", requests) as hold:
            end = time.monotonic() + 2.5 * self.lease
            while time.monotonic() < end:
                assert not hold.is_lost()
                self._expect_locked(far, "a")
                time.sleep(0.05)
        assert requests.reasons == []

    def test_a_holder_that_cannot_renew_is_told(
        self, near: LeaseLocker, far: LeaseLocker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests = Requests()
        with ExitStack() as held:
            hold = held.enter_context(near.lock("a", requests))
            with monkeypatch.context() as away:
                self._cut_off(near, away)
                far_held = ExitStack()
                far_held.enter_context(far.lock("a", ignore))
                assert hold.is_lost(), "two holders"
                requests.wait_for(LockLost)
            with far_held:
                # The release of a lost lock does not free the other holder's.
                held.close()
                self._expect_locked(near, "a")
        assert sum(isinstance(reason, LockLost) for reason in requests.reasons) == 1

    def test_a_holder_is_told_while_the_server_hangs(
        self, near: LeaseLocker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests = Requests()
        hangs = threading.Event()

        def hang(held: object) -> None:
            hangs.wait(3 * SOON)
            raise Unavailable

        monkeypatch.setattr(near, "_renew", hang)
        with near.lock("a", requests) as hold:
            requests.wait_for(LockLost)
            assert hold.is_lost()
            hangs.set()

    def test_a_lock_that_was_taken_away_is_lost(self, near: LeaseLocker, far: LeaseLocker) -> None:
        requests = Requests()
        other = Requests()
        with near.lock("a", requests) as hold, near.lock("b", other) as other_hold:
            token = near._holder("a")
            assert token is not None
            far._free("a", token)
            requests.wait_for(LockLost)
            assert hold.is_lost()
            assert not other_hold.is_lost()
        assert other.reasons == []
        with far.lock("a", ignore):
            pass

    def test_the_lock_of_a_dead_host_is_free_after_its_lease(
        self, near: LeaseLocker, far: LeaseLocker
    ) -> None:
        taken_at = time.monotonic()
        self._die(near, near._acquire("a", ignore))
        self._expect_locked(far, "a")
        with far.lock("a", ignore):
            assert time.monotonic() - taken_at > 0.9 * self.lease

    def test_a_released_lock_needs_no_fencing(self, near: LeaseLocker, far: LeaseLocker) -> None:
        for locker in (near, far, near):
            with locker.lock("a", ignore) as hold:
                assert not hold.needs_fencing

    def test_an_expired_lock_needs_fencing_until_that_is_confirmed(
        self, near: LeaseLocker, far: LeaseLocker
    ) -> None:
        self._die(near, near._acquire("a", ignore))
        for _ in range(2):
            with far.lock("a", ignore) as hold:
                assert hold.needs_fencing
        with far.lock("a", ignore) as hold:
            hold.confirm_fenced()
            assert not hold.needs_fencing
        with far.lock("a", ignore) as hold:
            assert not hold.needs_fencing

    def test_a_late_release_keeps_the_writer_of_another_holder(
        self, near: LeaseLocker, far: LeaseLocker, make: MakeLocker
    ) -> None:
        lease = near._acquire("a", ignore)
        self._die(near, lease)
        successor = far._acquire("a", ignore)
        successor.confirm_fenced()
        near._free("a", lease.token)
        self._expect_locked(near, "a")
        self._die(far, successor)
        with contextmanager(self._prepared)(make(self.lease, None)) as third:
            with third.lock("a", ignore) as hold:
                assert hold.needs_fencing
                hold.confirm_fenced()
            with third.lock("a", ignore) as hold:
                assert not hold.needs_fencing

    def test_the_holder_of_a_lost_lock_cannot_confirm(
        self, near: LeaseLocker, far: LeaseLocker
    ) -> None:
        self._die(near, near._acquire("a", ignore))
        with far.lock("a", ignore) as hold:
            assert isinstance(hold, Lease)
            far._free("a", hold.token)
            with near.lock("a", ignore) as successor:
                with pytest.raises(LockLost):
                    hold.confirm_fenced()
                assert successor.needs_fencing

    def test_the_lock_of_a_dead_neighbour_needs_no_fencing(
        self, neighbours: tuple[LeaseLocker, LeaseLocker]
    ) -> None:
        first, second = neighbours
        self._die(first, first._acquire("a", ignore))
        for _ in range(2):
            with second.lock("a", ignore) as hold:
                assert not hold.needs_fencing

    def test_a_neighbour_cannot_tell_that_another_host_is_dead(
        self, neighbours: tuple[LeaseLocker, LeaseLocker], near: LeaseLocker
    ) -> None:
        first, second = neighbours
        self._die(near, near._acquire("a", ignore))
        # It dies before it has confirmed anything, so it has not written either.
        self._die(first, first._acquire("a", ignore))
        with second.lock("a", ignore) as hold:
            assert hold.needs_fencing

    def test_the_lock_of_a_dead_neighbour_is_free_at_once(
        self, neighbours: tuple[LeaseLocker, LeaseLocker]
    ) -> None:
        first, second = neighbours
        self._die(first, first._acquire("a", ignore))
        with second.try_lock("a", ignore), pytest.raises(UploadLocked):  # noqa: SIM117
            with first.try_lock("a", ignore):
                pytest.fail("two holders")

    def test_only_neighbours_know_who_is_dead(
        self, neighbours: tuple[LeaseLocker, LeaseLocker], make: MakeLocker, tmp_path: Path
    ) -> None:
        first, _ = neighbours
        (tmp_path / "elsewhere").mkdir()
        for host_locker in (None, FileLocker(tmp_path / "elsewhere")):
            with contextmanager(self._prepared)(make(60 * SOON, host_locker)) as far:
                held = first._acquire("a", ignore)
                self._die(first, held)
                self._expect_locked(far, "a")
                first._free("a", held.token)
                with far.try_lock("a", ignore):
                    pass

    def test_a_lock_is_not_free_because_its_file_is_gone(
        self, neighbours: tuple[LeaseLocker, LeaseLocker], tmp_path: Path
    ) -> None:
        first, second = neighbours
        requests = Requests()
        with first.lock("a", requests):
            for file in tmp_path.glob("*.lock*"):
                file.unlink()
            self._expect_locked(second, "a")
            requests.wait_for(LockLost)

    def test_neighbours_ask_each_other(self, neighbours: tuple[LeaseLocker, LeaseLocker]) -> None:
        first, second = neighbours
        self.test_another_host_asks_the_holder(first, second)

    def test_waiting_neighbours_do_not_interrupt_each_other(
        self, neighbours: tuple[LeaseLocker, LeaseLocker], far: LeaseLocker
    ) -> None:
        too_early: list[TusError] = []
        released = threading.Event()

        def asked(reason: TusError) -> None:
            if not released.is_set():
                too_early.append(reason)

        def wait(locker: LeaseLocker) -> None:
            with locker.lock("a", asked):
                pass

        with ThreadPoolExecutor(4) as pool:
            with far.lock("a", ignore):
                waiters = [pool.submit(wait, locker) for locker in neighbours * 2]
                time.sleep(0.5)
                released.set()
            for waiter in waiters:
                waiter.result(2 * SOON)
        assert too_early == []

    def test_a_server_that_is_down_is_unavailable_and_nothing_is_held(
        self,
        neighbours: tuple[LeaseLocker, LeaseLocker],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        first, second = neighbours
        with monkeypatch.context() as away:
            self._cut_off(first, away)
            with pytest.raises(Unavailable), first.lock("a", ignore):
                pytest.fail("locked")
        for locker in (second, first):
            with locker.try_lock("a", ignore):
                pass

    @staticmethod
    def _prepared(locker: LeaseLocker) -> Iterator[LeaseLocker]:
        locker.prepare()
        yield locker
        locker.close()

    @staticmethod
    def _cut_off(locker: LeaseLocker, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let no request of `locker` reach the server."""

        def fail(*args: object) -> None:
            raise Unavailable

        for name in ("_take", "_free", "_renew", "_holder", "_send_request"):
            monkeypatch.setattr(locker, name, fail)

    @staticmethod
    def _die(locker: LeaseLocker, held: Lease) -> None:
        """Leave a lock behind, like a process that is killed."""
        manager = locker._manager.pop()
        assert manager is not None
        manager.close()
        if locker.host_locker is not None:
            locker.host_locker._release(held.id, held.host_lock)

    @staticmethod
    def _take(locker: LeaseLocker, id: str) -> None:
        with locker.lock(id, ignore):
            pass

    @staticmethod
    def _expect_locked(locker: LeaseLocker, id: str) -> None:
        with pytest.raises(UploadLocked), locker.try_lock(id, ignore):
            pytest.fail("two holders")

    @classmethod
    def _flush(cls, near: LeaseLocker, far: LeaseLocker) -> None:
        """Wait until all earlier requests of `far` to `near` must have arrived."""
        requests = Requests()
        with near.lock("flush", requests):
            cls._ask(far, "flush", requests)

    @staticmethod
    def _ask(locker: LeaseLocker, id: str, requests: Requests) -> None:
        """Wait for a lock until its holder was asked, maybe again: its listener may just start."""
        timeout = locker.lock_timeout
        locker.lock_timeout = 0.01
        deadline = time.monotonic() + SOON
        while not requests.reasons and time.monotonic() < deadline:
            with pytest.raises(UploadLocked), locker.lock(id, ignore):
                pytest.fail("two holders")
        requests.wait()
        locker.lock_timeout = timeout
