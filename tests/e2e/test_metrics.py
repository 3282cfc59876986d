"""``/metrics`` of real servers with two workers: numbers that add up, whoever dies."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from e2e.client import TUS, wait_until
from e2e.conftest import Serve, Server, free_port

CONF = Path(__file__).parent.parent.parent / "conf"

#: By name and labels, e.g. ``requests_total{method=GET}``.
Numbers = dict[str, float]


def scrape(server: Server) -> Numbers:
    answer = server.client.request("GET", "/metrics", {})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return dict(_numbers(answer.body.decode()))


def _numbers(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            shown = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            yield name.removeprefix("tuswsgi_") + (f"{{{shown}}}" if shown else ""), value


def counted(server: Server) -> Numbers:
    """Return what counters say, where that is not 0."""
    return {
        key: value
        for key, value in scrape(server).items()
        if value and key.partition("{")[0].endswith("_total")
    }


def work(server: Server) -> None:
    """Do something of everything, each request on a connection of its own."""
    client = server.client
    paths = [client.create(10) for _ in range(6)]
    for path in paths[:4]:
        assert client.patch(path, 0, b"12345").status == 204
    for path in paths[:2]:
        client.finish(path, b"1234567890")
    assert client.patch(paths[5], 3, b"x").status == 409
    assert client.get(paths[5]).status == 404
    assert client.request("DELETE", paths[4], TUS).status == 204
    assert client.head(paths[4]).status == 410
    override = {**TUS, "X-HTTP-Method-Override": "brew"}
    assert client.request("POST", paths[0], override).status == 405


#: What ``work`` makes the counters say.
WORK = {
    "requests_total{method=POST}": 6,
    "requests_total{method=PATCH}": 7,
    "requests_total{method=HEAD}": 3,
    "requests_total{method=GET}": 1,
    "requests_total{method=DELETE}": 1,
    "requests_total{method=other}": 1,
    "errors_total{code=ERR_MISMATCHED_OFFSET,status=409}": 1,
    "errors_total{code=ERR_UPLOAD_NOT_FOUND,status=404}": 1,
    "errors_total{code=ERR_UPLOAD_GONE,status=410}": 1,
    "errors_total{code=ERR_METHOD_NOT_ALLOWED,status=405}": 1,
    "received_bytes_total": 30,
    "uploads_created_total": 6,
    "uploads_finished_total": 2,
    "uploads_terminated_total": 1,
}


def times(factor: int) -> Numbers:
    return {name: value * factor for name, value in WORK.items()}


def kill_worker(server: Server) -> None:
    old = set(server.workers())
    server.kill_worker()
    wait_until(lambda: len(set(server.workers()) - old) == 1, "another worker")


def test_numbers_add_up(serve: Serve) -> None:
    server = serve("--metrics")
    assert counted(server) == {}
    work(server)
    for _ in range(5):  # any worker says the same
        assert counted(server) == WORK
    wait_until(lambda: scrape(server)["uploads_in_progress"] == 3, "unfinished uploads")
    numbers = scrape(server)
    assert numbers["uploads_stalled"] == numbers["outbox_events"] == 0
    assert numbers["disk_free_bytes"] > 0


def test_what_a_killed_worker_has_counted_stays(serve: Serve) -> None:
    server = serve("--metrics")
    work(server)
    for round in (1, 2):
        kill_worker(server)
        assert counted(server) == times(round)
        work(server)
    assert counted(server) == times(3)
    # Another worker goes on with what the one before it has begun.
    (directory,) = (server.data_dir / ".tuswsgi" / "metrics").iterdir()
    assert len(list(directory.glob("counter_*.db"))) == 2


def test_a_reload_goes_on_counting(serve: Serve) -> None:
    server = serve("--metrics")
    work(server)
    old = set(server.workers())
    server.signal(signal.SIGHUP)
    wait_until(lambda: not old & set(server.workers()), "the old workers' end")
    assert counted(server) == WORK
    work(server)
    assert counted(server) == times(2)


def test_a_new_server_begins_at_0(serve: Serve) -> None:
    server = serve("--metrics")
    directory = server.data_dir / ".tuswsgi" / "metrics"
    work(server)
    (left,) = directory.iterdir()
    server.restart()
    assert counted(server) == {}
    assert left not in directory.iterdir()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert list(directory.iterdir()) == []


def test_servers_that_share_a_directory_count_for_themselves(serve: Serve) -> None:
    first, second = serve("--metrics"), serve("--metrics")
    work(first)
    assert counted(second) == {}
    second.kill()
    assert counted(first) == WORK


def test_connections_that_are_open(serve: Serve) -> None:
    server = serve("--metrics")
    connections = [server.client.connect() for _ in range(10)]
    # The one that asks may be counted, too.
    wait_until(lambda: scrape(server)["open_connections"] in (10, 11), "ten connections")
    kill_worker(server)
    for connection in connections:
        connection.close()
    wait_until(lambda: scrape(server)["open_connections"] <= 1, "no connections")


def test_a_takeover(serve: Serve) -> None:
    server = serve("--metrics")
    path = server.client.create(1000)
    with server.client.start_patch(path, 0, 1000, b"123") as patch:
        wait_until(lambda: server.stored(path) == 3, "bytes on disk")
        assert server.client.offset(path) == 3
        assert patch.read().status == 423
    numbers = scrape(server)
    assert numbers["takeovers_total"] == 1
    assert numbers["received_bytes_total"] == 3
    assert numbers["lock_wait_seconds_count{outcome=acquired}"] == 1
    assert numbers["errors_total{code=ERR_UPLOAD_INTERRUPTED,status=423}"] == 1


def test_a_long_body_is_counted_while_it_comes(serve: Serve) -> None:
    server = serve("--metrics")
    path = server.client.create(1000)
    with server.client.start_patch(path, 0, 1000, b"123") as patch:

        def send() -> bool:
            patch.send(b"x")
            return scrape(server)["received_bytes_total"] > 3

        wait_until(send, "bytes that are counted")


def test_hooks_that_cannot_be_sent(serve: Serve) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    server = serve("--metrics", "--hooks-http-urls", url, "--hooks", "post-create,pre-terminate")
    path = server.client.create(1000)
    key = "{transport=http,type=%s}"
    failed = "hook_errors_total" + key % "post-create"
    wait_until(lambda: scrape(server).get(failed, 0) >= 1, "a hook that failed")
    assert server.client.request("DELETE", path, TUS).status >= 500
    numbers = scrape(server)
    assert numbers["hook_errors_total" + key % "pre-terminate"] == 1
    assert numbers["hook_seconds_count" + key % "pre-terminate"] == 1
    wait_until(lambda: scrape(server)["outbox_events"] == 1, "an event that waits")
    wait_until(lambda: scrape(server)["outbox_oldest_seconds"] > 0, "an event that ages")


def test_metrics_are_off_by_default(server: Server) -> None:
    assert server.client.request("GET", "/metrics", {}).status == 404


@pytest.fixture
def there(serve: Serve) -> set[str]:
    """The metrics of a server in which all kinds of things have happened."""
    url = f"http://127.0.0.1:{free_port()}"
    server = serve("--metrics", "--hooks-http-urls", url, "--hooks", "pre-create")
    answer = server.client.request("POST", "/files/", {**TUS, "Upload-Length": 1})
    assert answer.status >= 500
    text = server.client.request("GET", "/metrics", {}).body.decode()
    return {family.name for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yaml"])
def test_what_is_shipped_uses_metrics_that_there_are(there: set[str], name: str) -> None:
    used = set(re.findall(r"\btuswsgi_\w+", (CONF / name).read_text()))
    assert used
    for metric in used:
        assert re.sub(r"_(total|bucket|sum|count)$", "", metric) in there, metric


def test_the_dashboard_shows_all_metrics(there: set[str]) -> None:
    board = json.loads((CONF / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    for metric in there:
        assert any(metric in query for query in queries), metric
