"""Hooks over AMQP: rustus' queues, Celery's messages, and brokers that fail."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
import services
from line import Line

from hooks.broker import (
    CHANNEL_CLOSE,
    CHANNEL_OPEN,
    CONNECTION_BLOCKED,
    HEARTBEAT,
    Inspector,
    wait_until,
)
from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import Config
from tuswsgi.core.errors import ConfigurationError, HookFailed
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.hooks.amqp import AmqpHook
from tuswsgi.hooks.base import HookRequest
from tuswsgi.hooks.payloads import FormatName, payload_format

FORMAT = payload_format(FormatName.DEFAULT)

POST_FINISH = HookType.POST_FINISH

Make = Callable[..., AmqpHook]


def hook(type: HookType = POST_FINISH, **values: Any) -> HookRequest:
    info = FileInfo(id="one", size=5, created_at=1658671969.0)
    return HookRequest(type, info, RequestInfo("POST", "/files/"), **values)


@pytest.fixture(scope="module")
def url() -> str:
    return services.find("TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672")


@pytest.fixture
def inspector(url: str) -> Iterator[Inspector]:
    inspector = Inspector(url, f"tuswsgi-test-{uuid4().hex}")
    yield inspector
    inspector.close()


@pytest.fixture
def make(url: str, inspector: Inspector) -> Iterator[Make]:
    """Make transports to queues of the test; with `declare=False` the test declares them."""
    made: list[AmqpHook] = []

    def make(*types: HookType, declare: bool = True, **options: Any) -> AmqpHook:
        types = types or (POST_FINISH,)
        if declare:
            options = {"declare_exchange": True, "declare_queues": True} | options
        names = {"exchange": inspector.exchange(), "queues_prefix": inspector.name, "url": url}
        amqp = AmqpHook(format=FORMAT, **names | options)
        amqp.types = frozenset(types)
        for type in types:
            inspector.queue(f".{type}")
        made.append(amqp)
        return amqp

    yield make
    for amqp in made:
        amqp.close()


@pytest.fixture
def line(url: str) -> Iterator[Line]:
    line = Line(url)
    yield line
    line.close()


def keep_sending(amqp: AmqpHook, request: HookRequest) -> None:
    """Send a hook until that succeeds, as its delivery does."""

    def works() -> bool:
        try:
            amqp.send(request)
        except HookFailed:
            return False
        return True

    wait_until(works, "the hook was not sent")


def test_each_hook_has_a_queue_of_its_own(make: Make, inspector: Inspector) -> None:
    amqp = make(HookType.PRE_CREATE, POST_FINISH)
    created, finished = hook(HookType.PRE_CREATE), hook(id="the-hook", sequence=7)
    amqp.send(created)
    amqp.send(finished)
    properties, body = inspector.take(inspector.queue(".post-finish"))
    assert body.decode() == FORMAT.encode(finished)
    assert (properties.content_type, properties.content_encoding) == ("application/json", "utf-8")
    assert properties.delivery_mode == 2
    assert properties.message_id == properties.correlation_id == "the-hook"
    assert properties.headers == {
        "Hook-Name": "post-finish",
        "Hook-Id": "the-hook",
        "Hook-Sequence": 7,
    }
    assert inspector.take(inspector.queue(".pre-create"))[1].decode() == FORMAT.encode(created)
    assert not inspector.exists(f"{inspector.name}.post-create")


def test_a_routing_key_makes_one_queue_of_all(make: Make, inspector: Inspector) -> None:
    one = inspector.queue("-route66")
    amqp = make(HookType.PRE_CREATE, POST_FINISH, routing_key=one)
    amqp.send(hook(HookType.PRE_CREATE))
    amqp.send(hook())
    names = [properties.headers["Hook-Name"] for properties, _ in inspector.take_all(one)]
    assert names == ["pre-create", "post-finish"]
    assert not inspector.exists(f"{inspector.name}.post-finish")


@pytest.mark.parametrize(
    ("kind", "other"), [("direct", "topic"), ("fanout", "direct"), ("topic", "direct")]
)
def test_the_exchange_is_of_the_kind_that_is_asked_for(
    kind: str, other: str, make: Make, inspector: Inspector
) -> None:
    make(exchange_kind=kind).send(hook())
    assert inspector.is_exchange(inspector.name, kind)
    assert not inspector.is_exchange(inspector.name, other)
    inspector.take(inspector.queue(".post-finish"))


def test_the_exchange_without_a_name_needs_no_binding(make: Make, inspector: Inspector) -> None:
    make(exchange="").send(hook())
    inspector.take(inspector.queue(".post-finish"))


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("auto_delete", [True, False])
def test_exchange_and_queues_are_as_durable_as_asked_for(
    durable: bool, auto_delete: bool, make: Make, inspector: Inspector
) -> None:
    make(durable_exchange=durable, durable_queues=durable, auto_delete=auto_delete).send(hook())
    queue = inspector.queue(".post-finish")
    assert inspector.is_queue(queue, durable=durable, auto_delete=auto_delete)
    assert not inspector.is_queue(queue, durable=not durable, auto_delete=auto_delete)
    kinds = {"durable": durable, "auto_delete": auto_delete}
    assert inspector.is_exchange(inspector.name, "topic", **kinds)
    assert not inspector.is_exchange(inspector.name, "topic", **kinds | {"durable": not durable})


def test_a_start_declares_and_leaves_nothing_open(
    make: Make, inspector: Inspector, line: Line
) -> None:
    amqp = make(url=line.url)
    amqp.prepare()
    assert inspector.exists(inspector.queue(".post-finish"))
    wait_until(lambda: not line.open, "a connection stays")


def test_messages_for_celery_are_tasks(make: Make, inspector: Inspector) -> None:
    amqp = make(celery=True, task_prefix="uploads")
    request, other = hook(), hook(id="no-uuid")
    for sent in (request, request, other, other):
        amqp.send(sent)
    taken = inspector.take_all(inspector.queue(".post-finish"))
    ids = [UUID(properties.headers["id"]) for properties, _ in taken]
    assert ids[0] == ids[1] == UUID(request.id)
    assert ids[2] == ids[3] != ids[0]
    properties, body = taken[0]
    assert properties.headers["task"] == "uploads.post-finish"
    assert properties.correlation_id == properties.headers["id"]
    assert json.loads(body) == [[json.loads(FORMAT.encode(request))], {}, {}]


RUSTUS = {
    "URL": "amqp://guest:guest@localhost:5672",
    "QUEUES_PREFIX": "rustus_prefix",
    "EXCHANGE": "rustus_exchange",
    "EXCHANGE_KIND": "direct",
    "ROUTING_KEY": "route66",
    "DECLARE_EXCHANGE": "true",
    "DECLARE_QUEUES": "true",
    "DURABLE_EXCHANGE": "true",
    "DURABLE_QUEUES": "true",
    "AUTO_DELETE": "true",
    "CELERY": "true",
    "CONNECTION_POOL_SIZE": "11",
    "CHANNEL_POOL_SIZE": "12",
    "IDLE_CONNECTION_TIMEOUT": "20",
    "IDLE_CHANNELS_TIMEOUT": "13",
}


@pytest.mark.parametrize("prefix", ["RUSTUS", "TUSWSGI"])
def test_variables_are_those_of_rustus(prefix: str) -> None:
    environ = {f"{prefix}_HOOKS_AMQP_{name}": value for name, value in RUSTUS.items()}
    (amqp,) = Backends(Config.load(environ=environ)).hooks()
    assert isinstance(amqp, AmqpHook)
    for name, value in RUSTUS.items():
        assert str(getattr(amqp, name.lower())).lower() in (value.lower(), f"{value}.0")
    assert HookType.POST_FINISH in amqp.types


def test_without_a_url_there_is_no_broker() -> None:
    assert not Backends(Config.load(environ={"RUSTUS_HOOKS_AMQP_CELERY": "true"})).hooks()


@pytest.mark.parametrize(
    "wrong", ["http://u:secret@h", "amqp://u:secret@h:99999", "amqp://u:secret@h?heartbeat=x", "h"]
)
def test_a_wrong_url_ends_the_start_without_telling_the_password(make: Make, wrong: str) -> None:
    amqp = make(url=wrong)
    with pytest.raises(ConfigurationError, match="amqp://") as caught:
        amqp.prepare()
    assert "secret" not in str(caught.value) + repr(amqp)


def test_what_nobody_subscribed_to_is_dropped(make: Make, inspector: Inspector) -> None:
    inspector.channel.exchange_declare(inspector.exchange(), "topic")
    make(declare=False).send(hook())


def test_with_a_routing_key_somebody_has_to_listen(make: Make, inspector: Inspector) -> None:
    queue = inspector.queue("-late")
    amqp = make(declare=False, routing_key=queue)
    with pytest.raises(HookFailed) as no_exchange:
        amqp.send(hook())
    assert "NOT_FOUND" in str(no_exchange.value.__cause__)
    inspector.channel.exchange_declare(inspector.exchange(), "topic")
    with pytest.raises(HookFailed) as no_queue:
        amqp.send(hook())
    assert "NO_ROUTE" in str(no_queue.value.__cause__)
    inspector.channel.queue_declare(queue)
    inspector.channel.queue_bind(queue, inspector.name, queue)
    amqp.send(hook(id="now"))
    assert [properties.message_id for properties, _ in inspector.take_all(queue)] == ["now"]


def test_what_was_removed_is_declared_again(make: Make, inspector: Inspector) -> None:
    amqp, queue = make(), inspector.queue(".post-finish")
    amqp.send(hook())
    inspector.channel.queue_delete(queue)
    amqp.send(hook(id="second"))
    assert inspector.take(queue)[0].message_id == "second"
    inspector.channel.exchange_delete(inspector.name)
    amqp.send(hook(id="third"))
    assert inspector.take(queue)[0].message_id == "third"


def test_a_queue_of_another_kind_is_a_failure_until_it_is_gone(
    make: Make, inspector: Inspector, caplog: pytest.LogCaptureFixture
) -> None:
    queue = inspector.queue(".post-finish")
    inspector.channel.queue_declare(queue, durable=True)
    amqp = make()
    with caplog.at_level(logging.WARNING):
        amqp.prepare()
    assert "PRECONDITION_FAILED" in caplog.text
    with pytest.raises(HookFailed) as caught:
        amqp.send(hook())
    assert "PRECONDITION_FAILED" in str(caught.value.__cause__)
    inspector.channel.queue_delete(queue)
    amqp.send(hook())
    inspector.take(queue)


def test_a_broker_that_is_down_does_not_end_the_start(
    make: Make, line: Line, inspector: Inspector, caplog: pytest.LogCaptureFixture
) -> None:
    line.cut()
    amqp = make(url=line.url)
    with caplog.at_level(logging.WARNING):
        amqp.prepare()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "guest:guest" not in caplog.text
    with pytest.raises(HookFailed):
        amqp.send(hook())
    line.restore()
    keep_sending(amqp, hook(id="now"))
    assert inspector.take(inspector.queue(".post-finish"))[0].message_id == "now"


def test_a_connection_that_ended_is_replaced(make: Make, line: Line, inspector: Inspector) -> None:
    amqp = make(url=line.url)
    for n in range(3):
        amqp.send(hook(id=f"{n}"))
        line.drop()
    queue = inspector.queue(".post-finish")
    assert [properties.message_id for properties, _ in inspector.take_all(queue)] == ["0", "1", "2"]


def test_all_connections_that_ended_are_replaced_at_once(make: Make, line: Line) -> None:
    amqp = make(url=line.url)
    amqp.send(hook())
    line.block()
    with ThreadPoolExecutor(5) as pool:
        sent = [pool.submit(amqp.send, hook()) for _ in range(5)]
        wait_until(lambda: line.accepted == 5, "too few connections")
        line.unblock()
        for one in sent:
            one.result()
    for _ in range(3):
        line.drop()
        amqp.send(hook())


def test_a_connection_that_ends_under_a_message_is_replaced(
    make: Make, line: Line, inspector: Inspector
) -> None:
    amqp = make(url=line.url)
    amqp.send(hook())
    before = len(line.sent)
    line.block()
    with ThreadPoolExecutor(5) as pool:
        sent = [pool.submit(amqp.send, hook(id=f"{n}")) for n in range(5)]
        wait_until(lambda: len(line.sent) > before, "not under way")
        line.drop()
        line.unblock()
        for one in sent:
            one.result()
    queue = inspector.queue(".post-finish")
    taken = {properties.message_id for properties, _ in inspector.take_all(queue)}
    assert taken >= set("01234")


def test_requests_wait_once_for_a_broker_that_hangs(
    make: Make, line: Line, inspector: Inspector
) -> None:
    amqp = make(HookType.PRE_CREATE, url=line.url, timeout=0.3)
    # The first one may take longer on a busy machine.
    keep_sending(amqp, hook(HookType.PRE_CREATE))
    line.block()
    causes = []
    for _ in range(5):
        with pytest.raises(HookFailed) as caught:
            amqp.send(hook(HookType.PRE_CREATE))
        causes.append(str(caught.value.__cause__))
    assert causes[0] == "the broker took too long"
    assert "the broker could not be reached a moment ago" in causes
    line.unblock()
    keep_sending(amqp, hook(HookType.PRE_CREATE, id="now"))
    taken = inspector.take_all(inspector.queue(".pre-create"))
    assert "now" in [properties.message_id for properties, _ in taken]


def test_publishers_do_not_wait_for_each_other_behind_a_broker_that_hangs(
    make: Make, line: Line
) -> None:
    amqp = make(HookType.PRE_CREATE, url=line.url, timeout=0.5, connection_pool_size=2)
    keep_sending(amqp, hook(HookType.PRE_CREATE))
    line.block()

    def send(_: int) -> float:
        began = time.monotonic()
        with pytest.raises(HookFailed):
            amqp.send(hook(HookType.PRE_CREATE))
        return time.monotonic() - began

    with ThreadPoolExecutor(20) as pool:
        assert max(pool.map(send, range(20))) < 5


def test_a_request_that_is_in_a_hurry_breaks_off_no_other_message(
    make: Make, line: Line, inspector: Inspector
) -> None:
    amqp = make(POST_FINISH, HookType.PRE_CREATE, url=line.url)
    amqp.send(hook(id="first"))
    line.block()
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(amqp.send, hook(id="slow"))
        with pytest.raises(HookFailed):
            amqp.send(hook(HookType.PRE_CREATE, deadline=time.monotonic() + 0.1))
        line.unblock()
        slow.result()
    taken = inspector.take_all(inspector.queue(".post-finish"))
    assert [properties.message_id for properties, _ in taken] == ["first", "slow"]


def test_a_broker_that_was_killed_is_used_again(
    make: Make, line: Line, inspector: Inspector
) -> None:
    amqp = make(HookType.PRE_CREATE, url=line.url)
    amqp.send(hook(HookType.PRE_CREATE))
    line.cut()
    with pytest.raises(HookFailed):
        amqp.send(hook(HookType.PRE_CREATE))
    line.restore()
    keep_sending(amqp, hook(HookType.PRE_CREATE, id="now"))
    taken = inspector.take_all(inspector.queue(".pre-create"))
    assert taken[-1][0].message_id == "now"


def test_a_broker_that_is_out_of_memory_is_used_again(
    make: Make, line: Line, inspector: Inspector
) -> None:
    amqp = make(HookType.PRE_CREATE, url=line.url, timeout=0.3)
    keep_sending(amqp, hook(HookType.PRE_CREATE))
    # RabbitMQ sends this frame and reads nothing more from publishers.
    line.say(CONNECTION_BLOCKED)
    line.block()
    for _ in range(3):
        with pytest.raises(HookFailed):
            amqp.send(hook(HookType.PRE_CREATE))
    line.unblock()
    keep_sending(amqp, hook(HookType.PRE_CREATE, id="now"))
    taken = inspector.take_all(inspector.queue(".pre-create"))
    assert "now" in [properties.message_id for properties, _ in taken]


def test_a_connection_that_stays_blocked_is_replaced(make: Make, line: Line) -> None:
    amqp = make(url=f"{line.url}?blocked_connection_timeout=0.2")
    amqp.send(hook())
    line.say(CONNECTION_BLOCKED)
    wait_until(lambda: not line.open, "the connection stays")
    amqp.send(hook())
    assert line.accepted == 2


def test_a_stop_does_not_wait_for_a_broker_that_hangs(make: Make, line: Line) -> None:
    amqp = make(url=line.url)
    amqp.send(hook())
    line.block()
    amqp.close()
    assert "tuswsgi-amqp" not in [thread.name for thread in threading.enumerate()]


def test_a_connection_lives_on_while_nobody_sends(
    make: Make, line: Line, inspector: Inspector
) -> None:
    amqp = make(url=f"{line.url}?heartbeat=1")
    amqp.send(hook())
    # A broker ends a connection that it hears nothing of for twice that time.
    wait_until(lambda: line.sent.count(HEARTBEAT) > 5, "no heartbeats")
    amqp.send(hook())
    assert line.accepted == 1
    assert len(inspector.take_all(inspector.queue(".post-finish"))) == 2


def test_idle_connections_close(make: Make, line: Line, inspector: Inspector) -> None:
    amqp = make(url=line.url, idle_connection_timeout=0.1)
    for n in (1, 2):
        amqp.send(hook())
        wait_until(lambda: not line.open, "the connection stays")
        assert line.accepted == n
    assert len(inspector.take_all(inspector.queue(".post-finish"))) == 2


def test_idle_channels_close(make: Make, line: Line, inspector: Inspector) -> None:
    amqp = make(declare=False, exchange="", url=line.url, idle_channels_timeout=0.1)
    for n in (1, 2):
        amqp.send(hook())
        wait_until(lambda n=n: line.sent.count(CHANNEL_CLOSE) == n, "the channel stays")  # type: ignore[misc]
        assert line.sent.count(CHANNEL_OPEN) == n
    assert line.accepted == 1


def test_there_are_no_more_connections_and_channels_than_allowed(
    make: Make, line: Line, inspector: Inspector
) -> None:
    inspector.channel.queue_declare(inspector.queue(".post-finish"))
    amqp = make(
        declare=False, exchange="", url=line.url, connection_pool_size=2, channel_pool_size=3
    )
    line.block()
    with ThreadPoolExecutor(20) as pool:
        sent = [pool.submit(amqp.send, hook()) for _ in range(20)]
        wait_until(lambda: line.accepted == 2, "too few connections")
        line.unblock()
        for one in sent:
            one.result()
    assert line.accepted == 2
    assert 2 <= line.sent.count(CHANNEL_OPEN) <= 6
    assert len(inspector.take_all(inspector.queue(".post-finish"))) == 20


def test_a_broker_may_accept_fewer_connections(make: Make, line: Line) -> None:
    amqp = make(url=line.url)
    amqp.send(hook())
    line.refuse()
    line.block()
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(amqp.send, hook()) for _ in range(5)]
        wait_until(lambda: line.refused > 1, "no other connection was tried")
        wait_until(lambda: connections() == 1, "the other connections are still being opened")
        sent.append(pool.submit(amqp.send, hook()))
        line.unblock()
        for one in sent:
            one.result()


def connections() -> int:
    return sum(thread.name == "tuswsgi-amqp" for thread in threading.enumerate())


def test_threads_send_at_once(make: Make, inspector: Inspector) -> None:
    amqp = make()
    ids = {uuid4().hex for _ in range(500)}
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(lambda id: amqp.send(hook(id=id)), ids))
    taken = inspector.take_all(inspector.queue(".post-finish"))
    assert {properties.message_id for properties, _ in taken} == ids
    assert len(taken) == 500


def test_it_can_be_used_again_after_close(make: Make, inspector: Inspector) -> None:
    amqp = make()
    for _ in range(2):
        amqp.send(hook())
        amqp.close()
        assert "tuswsgi-amqp" not in [thread.name for thread in threading.enumerate()]
    assert len(inspector.take_all(inspector.queue(".post-finish"))) == 2


GREENLETS = """
    from gevent import monkey

    monkey.patch_all()

    import os
    import sys
    import gevent
    from tuswsgi.hooks.amqp import AmqpHook
    from tuswsgi.hooks.base import HookRequest, HookType, RequestInfo
    from tuswsgi.hooks.payloads import FormatName, payload_format
    from tuswsgi.core.info import FileInfo

    url, queue = sys.argv[1:]
    amqp = AmqpHook(
        format=payload_format(FormatName.V2), url=url, exchange="", routing_key=queue
    )

    def send(count, who):
        for n in range(count):
            request = RequestInfo("POST", "/files/")
            info = FileInfo(id="one", size=5)
            amqp.send(HookRequest(HookType.POST_FINISH, info, request, id=f"{who}-{n}"))

    def send_many(who):
        gevent.joinall([gevent.spawn(send, 10, f"{who}-{n}") for n in range(50)], raise_error=True)

    ticks = 0

    def tick():
        global ticks
        while True:
            gevent.sleep(0)
            ticks += 1

    ticker = gevent.spawn(tick)
    send_many("parent")
    assert ticks > 10, "others had to wait"
    ticker.kill()
    child = os.fork()
    if not child:
        send_many("child")
        amqp.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    send_many("again")
    amqp.close()
"""


def test_greenlets_and_forked_workers_send_at_once(url: str, inspector: Inspector) -> None:
    queue = inspector.queue()
    inspector.channel.queue_declare(queue)
    program = [sys.executable, "-W", "error", "-c", textwrap.dedent(GREENLETS), url, queue]
    subprocess.run(program, check=True, timeout=60)
    taken = [properties.message_id for properties, _ in inspector.take_all(queue)]
    assert len(taken) == len(set(taken)) == 1500
