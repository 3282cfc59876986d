"""The connection to Redis: DSNs, timeouts, restarts and failover."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import redis_service
from line import Line
from private_servers import PrivateRedis, PrivateSentinel

from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import connect
from tuswsgi.connections.redis_scripts import Script
from tuswsgi.core.errors import ConfigurationError, StorageFull, Unavailable

#: The timeout of requests to Redis, in seconds.
TIMEOUT = 0.5

COUNT = Script("return redis.call('INCR', KEYS[1])")


@pytest.fixture(scope="module")
def private():
    server = PrivateRedis()
    yield server
    server.remove()


@pytest.fixture
def line():
    line = Line(redis_service.url())
    yield line
    line.close()


@pytest.fixture
def server(line):
    server = connect(line.url, PoolSettings(pool_size=2, pool_timeout=TIMEOUT))
    yield server
    server.close()


@pytest.fixture
def key():
    with redis_service.own_keys() as settings:
        yield settings.redis_prefix + "key"


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_commands_are_answered_in_order(server, key):
    commands = [("SET", key, "1"), ("GET", key), ("INCR", key), ("GET", key)]
    assert server.calls(commands) == [True, b"1", 2, b"2"]


def test_a_script_that_redis_does_not_know_is_sent(server, key):
    for count in (1, 3):
        server.call("SCRIPT", "FLUSH")
        assert server.call(*COUNT.on([key])) == count
        assert server.call(*COUNT.on([key])) == count + 1


def test_an_error_does_not_mix_up_later_answers(server, key, caplog):
    server.call("SET", key, "text")
    with pytest.raises(Unavailable):
        server.calls([("GET", key), ("INCR", key), ("APPEND", key, "!")])
    assert "not an integer" in caplog.text
    assert server.call("GET", key) == b"text!"


def test_callers_share_the_connections_of_a_server(line):
    server = connect(line.url)
    assert connect(line.url, PoolSettings(99)) is server
    del server
    gc.collect()


def test_a_closed_connection_is_replaced(server, line, key):
    assert server.call("SET", key, "1") is True
    line.drop()
    assert server.call("GET", key) == b"1"
    assert line.accepted == 2


def test_a_connection_that_breaks_during_a_command_is_replaced(server, line, key):
    with redis.Redis.from_url(redis_service.url()) as other, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.call, "BLPOP", key, "0.4")
        wait_until(lambda: b"BLPOP" in line.sent)
        line.drop()
        wait_until(lambda: line.accepted == 2)
        other.rpush(key, "late")
        assert answer.result() == (key.encode(), b"late")


def test_a_server_that_is_down_is_logged_in_one_line(server, line, key, caplog):
    line.cut()
    with pytest.raises(Unavailable) as caught:
        server.call("GET", key)
    assert caught.value.__cause__ is None
    assert len(caplog.records) == 1
    line.restore()
    assert server.call("GET", key) is None


def test_a_server_that_hangs_is_unavailable(server, line, key):
    server.call("GET", key)
    line.block()
    began = time.monotonic()
    with pytest.raises(Unavailable):
        server.call("SET", key, "1")
    assert time.monotonic() - began < 20 * TIMEOUT
    line.unblock()
    # The late answer is dropped.
    assert server.call("ECHO", "hello") == b"hello"


def test_more_callers_than_connections(server, key):
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.call, "ECHO", str(n)) for n in range(100)]
        assert [answer.result() for answer in answers] == [str(n).encode() for n in range(100)]


def test_waiting_for_a_connection_has_a_timeout(server, line, key, caplog):
    with ThreadPoolExecutor(2) as pool:
        line.block()
        busy = [pool.submit(server.call, "GET", key) for _ in "12"]
        wait_until(lambda: line.accepted == 2)
        with pytest.raises(Unavailable):
            server.call("GET", key)
        for answer in busy:
            assert isinstance(answer.exception(), Unavailable)
        line.unblock()
    assert server.call("GET", key) is None


def test_redis_may_restart(private):
    server = connect(private.dsn, PoolSettings(3, 5.0))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda n: server.call("SET", f"key{n}", n), range(30)))
    private.kill()
    with pytest.raises(Unavailable):
        server.call("GET", "key1")
    private.start()
    wait_until(lambda: answers(server))
    assert [server.call("GET", f"key{n}") for n in range(30)] == [b"%d" % n for n in range(30)]
    server.close()


def answers(server):
    try:
        return server.call("PING") is True
    except Unavailable:
        return False


def test_a_server_without_memory_is_full(private):
    server = connect(f"{private.dsn}/0")
    used = int(server.call("MEMORY", "STATS")[3])
    server.call("CONFIG", "SET", "maxmemory", used // 2)
    try:
        for command in (("SET", "a", "1"), COUNT.on(["a"])):
            with pytest.raises(StorageFull):
                server.call(*command)
        assert server.call("EXISTS", "a") == 0
    finally:
        server.call("CONFIG", "SET", "maxmemory", "0")
        server.close()


def test_a_subscription_recovers_from_a_break(server, line, key):
    subscription = server.subscribe(key)
    assert subscription.messages(0.0) == []
    server.calls([("PUBLISH", key, "one"), ("PUBLISH", key, "two")])
    heard = []
    wait_until(lambda: heard.extend(subscription.messages(0.1)) or len(heard) == 2)
    assert heard == [b"one", b"two"]
    line.drop()
    with pytest.raises(Unavailable):
        wait_until(lambda: subscription.messages(0.1))
    assert subscription.messages(0.0) == []
    wait_until(lambda: server.call("PUBLISH", key, "three") == 1)
    wait_until(lambda: b"three" in subscription.messages(0.1))
    subscription.close()


def test_a_subscription_notices_a_server_that_hangs(server, line, key):
    subscription = server.subscribe(key)
    assert subscription.messages(0.0) == []
    line.block()
    with pytest.raises(Unavailable):
        wait_until(lambda: subscription.messages(0.1))
    line.unblock()
    subscription.close()


def test_a_quiet_subscription_stays_open(server, line, key):
    subscription = server.subscribe(key)
    end = time.monotonic() + 4 * TIMEOUT
    while time.monotonic() < end:
        assert subscription.messages(0.1) == []
    assert line.accepted == 1
    subscription.close()


@pytest.mark.parametrize(
    "dsn",
    [
        "redis:",
        "http://host",
        "redis://host:port",
        "redis://host/name",
        "redis://:secret@host?colour=red",
        "redis://:secret@host?socket_timeout=soon",
        "redis+sentinel://host",
        "redis+sentinel://:secret@host/service/name",
        "redis+sentinel://:secret@host:port/service",
        "redis+sentinel://,/service",
        "rediss+sentinel://:secret@host/service?colour=red",
    ],
)
def test_errors_about_dsns_contain_no_passwords(dsn):
    with pytest.raises(ConfigurationError, match="Redis DSN is not like") as caught:
        connect(dsn)
    assert "secret" not in str(caught.value)


def test_supported_dsns():
    for dsn in (
        "redis://host",
        "redis://user:p%40ss@host:7000/3?socket_timeout=2",
        "rediss://host?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=2",
        "redis+sentinel://a,b:27000,[::1]:26379/service/2?sentinel_password=x",
        "rediss+sentinel://user:secret@a/service?ssl_cert_reqs=none",
    ):
        connect(dsn)


def test_a_password_is_used_and_never_logged(caplog):
    server = PrivateRedis("--requirepass", "sec@ret")
    try:
        host = f"127.0.0.1:{server.port}"
        right = connect(f"redis://:sec%40ret@{host}")
        right.prepare()
        right.close()
        for dsn in (f"redis://{host}", f"redis://:secretive@{host}"):
            wrong = connect(dsn)
            with pytest.raises(ConfigurationError, match="cannot be used"):
                wrong.prepare()
            with pytest.raises(Unavailable):
                wrong.call("GET", "a")
    finally:
        server.remove()
    assert "sec@ret" not in caplog.text
    assert "secretive" not in caplog.text


def test_a_unix_socket(tmp_path):
    server = PrivateRedis("--unixsocket", f"{tmp_path}/s")
    try:
        other = connect(f"unix://{tmp_path}/s?db=3")
        other.call("SET", "a", "1")
        assert connect(f"{server.dsn}/3").call("GET", "a") == b"1"
    finally:
        server.remove()


def test_settings_that_lose_records_are_logged_once(caplog):
    server = PrivateRedis("--appendonly", "no", "--maxmemory-policy", "allkeys-lru")
    try:
        connection = connect(server.dsn)
        with caplog.at_level(logging.WARNING):
            connection.prepare()
            connection.prepare()
    finally:
        server.remove()
    assert caplog.text.count("appendonly no") == 1
    assert caplog.text.count("allkeys-lru") == 1


def test_a_cluster_is_not_supported():
    server = PrivateRedis("--cluster-enabled", "yes")
    try:
        with pytest.raises(ConfigurationError, match="Cluster"):
            connect(server.dsn).prepare()
    finally:
        server.remove()


def test_the_master_is_found_by_sentinels():
    first = PrivateRedis()
    second = PrivateRedis("--replicaof", "127.0.0.1", str(first.port))
    sentinel = PrivateSentinel(first.port)
    try:
        dsn = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/tuswsgi/0"
        server = connect(dsn, PoolSettings(2, 5.0))
        server.prepare()
        server.call("SET", "a", "1")
        with redis.Redis.from_url(second.dsn) as replica:
            wait_until(lambda: replica.get("a") == b"1")
        wait_until(lambda: sentinel.knows_replicas == 1)
        first.kill()
        wait_until(lambda: writes(server))
        assert server.call("GET", "a") == b"1"
        server.close()
    finally:
        sentinel.remove()
        second.remove()
        first.remove()


def writes(server):
    try:
        return server.call("SET", "b", "2") is True
    except Unavailable:
        return False


def test_a_master_that_became_a_replica_is_left():
    old, new = PrivateRedis(), PrivateRedis()
    sentinel = PrivateSentinel(old.port)
    try:
        server = connect(f"redis+sentinel://127.0.0.1:{sentinel.port}/tuswsgi")
        server.call("SET", "a", "old")
        with redis.Redis.from_url(old.dsn) as client:
            client.replicaof("127.0.0.1", new.port)
        sentinel.watch(new.port)
        server.call("SET", "a", "new")
        with redis.Redis.from_url(new.dsn) as client:
            assert client.get("a") == b"new"
        server.close()
    finally:
        sentinel.remove()
        old.remove()
        new.remove()


BUSY = """
from gevent import monkey; monkey.patch_all()
import sys, time
import gevent
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import connect
from tuswsgi.core.errors import Unavailable

server = connect(sys.argv[1], PoolSettings(2, 1.0))
gaps = []
def tick():
    last = time.monotonic()
    while True:
        time.sleep(0.005)
        now = time.monotonic()
        gaps.append(now - last)
        last = now

def wait():
    try:
        server.call("BLPOP", sys.argv[2], "0.5")
    except Unavailable:
        pass

server.call("PING")
subscription = server.subscribe(sys.argv[2])
subscription.messages(0)
ticker = gevent.spawn(tick)
gevent.joinall([gevent.spawn(wait) for _ in range(6)] + [gevent.spawn(subscription.messages, 0.5)])
assert len(gaps) > 50
assert max(gaps) < 0.4, max(gaps)
"""


def test_the_hub_is_not_blocked(key):
    subprocess.run([sys.executable, "-c", BUSY, redis_service.url(), key], check=True, timeout=60)


def test_a_forked_child_opens_its_own_connections(key):
    code = """
import os, sys
from tuswsgi.connections.redis import connect
server = connect(sys.argv[1])
ids = {server.call("CLIENT", "ID")}
child = os.fork()
if child == 0:
    os._exit(server.call("CLIENT", "ID") in ids)
assert os.waitpid(child, 0)[1] == 0
assert server.call("CLIENT", "ID") in ids
"""
    subprocess.run([sys.executable, "-c", code, redis_service.url()], check=True, timeout=60)


KILLED = """
from gevent import monkey; monkey.patch_all()
import sys
import gevent
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis import connect

server = connect(sys.argv[1], PoolSettings(1, 5.0))
server.call("PING")
waiter = gevent.spawn(server.call, "BLPOP", sys.argv[2], "0.3")
gevent.sleep(0.1)
waiter.kill()
assert server.call("ECHO", "hello") == b"hello"
assert server.calls([("ECHO", "a"), ("ECHO", "b")]) == [b"a", b"b"]
"""


def test_a_killed_greenlet_does_not_mix_up_later_answers(key):
    master = PrivateRedis()
    sentinel = PrivateSentinel(master.port)
    try:
        for dsn in (redis_service.url(), f"redis+sentinel://127.0.0.1:{sentinel.port}/tuswsgi"):
            subprocess.run([sys.executable, "-c", KILLED, dsn, key], check=True, timeout=60)
    finally:
        sentinel.remove()
        master.remove()


def test_options_are_read_without_importing_redis():
    code = (
        "import sys, tuswsgi.config.groups as g; g.option_groups(); "
        "sys.exit('redis' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_share_a_pool(server, key):
    barrier = threading.Barrier(8)

    def count(n):
        barrier.wait()
        for _ in range(20):
            server.call("INCR", key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    assert server.call("GET", key) == b"160"
