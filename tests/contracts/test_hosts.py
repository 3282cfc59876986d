"""Locks among hosts: processes that share a server and nothing else."""

from __future__ import annotations

import statistics
import time

import databases
import pytest
from consul_stub import ConsulStub
from private_servers import PrivateEtcd, PrivateRedis
from test_processes import Child, children

from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.lockers.consul import ConsulLocker
from tuswsgi.testing.lockers import SOON, Requests, ignore

#: Seconds; etcd rounds them up.
LEASE = 2.0


@pytest.fixture(scope="module")
def etcd():
    server = PrivateEtcd()
    yield server.dsn
    server.remove()


@pytest.fixture(scope="module")
def redis():
    server = PrivateRedis()
    yield server.dsn
    server.remove()


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory):
    """A database of several hosts as far as they can tell."""
    return f"sqlite:///{tmp_path_factory.mktemp('shared')}/locks.sqlite3"


@pytest.fixture(scope="module")
def consul():
    stub = ConsulStub()
    yield stub.dsn
    stub.remove()


@pytest.fixture(scope="module")
def postgres():
    with databases.postgres() as dsn:
        yield dsn


@pytest.fixture(scope="module")
def mysql():
    with databases.mysql() as dsn:
        yield dsn


WAYS = [
    ("redis-locker", "redis"),
    ("etcd-locker", "etcd"),
    ("consul-locker", "consul"),
    ("db-locker", "sqlite"),
    ("db-locker", "postgres"),
    ("db-locker", "mysql"),
]


@pytest.fixture(params=WAYS, ids=[server for _, server in WAYS])
def flags(request):
    """The options of all hosts."""
    name, server = request.param
    dsn = request.getfixturevalue(server)
    return {"locker": name, "locker_dsn": dsn, "lock_lease": LEASE, "pool_size": 5}


def host(flags, directory):
    """Return the locker of another host, in this process."""
    # As the stand-in allows.
    ConsulLocker.shortest = 0.0
    config = Config.load(flags={**flags, "runtime_dir": str(directory)})
    locker = Backends(config).locker()
    locker.prepare()
    return locker


def hold(connection, flags, directory):
    """Hold the lock that one is told, and let go when one is asked to."""
    locker = host(flags, directory)
    connection.send("ready")
    while True:
        requests = Requests()
        with locker.lock(connection.recv(), requests):
            connection.send("holding")
            requests.wait()


@pytest.fixture
def waiter(flags, tmp_path):
    locker = host(flags, tmp_path / "waiter")
    yield locker
    locker.close()


def test_a_holder_on_another_host_lets_go_at_once(flags, waiter, tmp_path):
    times = []
    with children(1, hold, flags, tmp_path / "holder") as [holder]:
        for _ in range(5):
            holder.tell("a")
            assert holder.hear() == "holding"
            began = time.monotonic()
            with waiter.lock("a", ignore):
                times.append(time.monotonic() - began)
    assert statistics.median(times) < 1


def test_a_holder_on_this_host_lets_go_too(flags, waiter, tmp_path):
    with children(1, hold, flags, tmp_path / "waiter") as [holder]:
        for _ in range(3):
            holder.tell("a")
            assert holder.hear() == "holding"
            with waiter.lock("a", ignore):
                pass


def test_the_lock_of_a_host_that_died_is_free_when_its_lease_is_over(flags, waiter, tmp_path):
    with children(1, hold, flags, tmp_path / "holder") as [holder]:
        holder.tell("a")
        assert holder.hear() == "holding"
        holder.kill()
        waiter.lock_timeout = SOON + 4 * LEASE
        with waiter.lock("a", ignore):
            pass


def test_the_lock_of_a_process_that_died_is_free_at_once_on_its_host(flags, waiter, tmp_path):
    # A child with a long lease: only who knows that it is dead can have its lock.
    flags = {**flags, "lock_lease": 600.0}
    with children(1, hold, flags, tmp_path / "waiter") as [holder]:
        holder.tell("a")
        assert holder.hear() == "holding"
        holder.kill()
        with waiter.lock("a", ignore):
            pass


def compete(connection, flags, directory, marker):
    locker = host(flags, directory)
    connection.send("ready")
    connection.recv()
    for _ in range(8):
        with locker.lock("b", ignore):
            # Fails if anybody else is inside.
            marker.mkdir()
            marker.rmdir()
    connection.send("done")


def test_one_host_at_a_time_holds_a_lock(flags, tmp_path):
    marker = tmp_path / "inside"
    hosts = [Child(compete, flags, tmp_path / f"{number}", marker) for number in range(3)]
    try:
        for child in hosts:
            assert child.hear() == "ready"
        for child in hosts:
            child.tell("go")
        assert [child.hear() for child in hosts] == ["done"] * 3
    finally:
        for child in hosts:
            child.end()
