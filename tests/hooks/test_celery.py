"""A Celery worker runs the tasks that tuswsgi sends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import services

from hooks.broker import Inspector, wait_until
from tuswsgi.core.errors import HookFailed
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo
from tuswsgi.hooks.amqp import AmqpHook
from tuswsgi.hooks.base import HookRequest
from tuswsgi.hooks.payloads import FormatName, payload_format

#: As with rustus: one task for each hook, with the payload as its only argument.
APPLICATION = """
    import json
    import os

    import celery

    app = celery.Celery("uploads")
    app.conf.update(
        broker_url=os.environ["BROKER"],
        task_default_queue=os.environ["QUEUE"],
        broker_connection_retry_on_startup=True,
    )

    def note(task, data):
        with open(os.environ["NOTES"], "a") as notes:
            notes.write(json.dumps([task.name, task.request.id, data]) + "\\n")

    for hook in ("pre-create", "post-create", "post-finish", "post-terminate", "post-receive"):
        app.task(note, name=f"rustus.{hook}", bind=True)
"""


@pytest.fixture(scope="module")
def url() -> str:
    return services.find("TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672")


@pytest.fixture
def queue(url: str) -> Iterator[str]:
    # The exchange of Celery's default queue has the queue's name.
    inspector = Inspector(url, f"tuswsgi-celery-{uuid4().hex}")
    yield inspector.queue() and inspector.exchange()
    inspector.close()


class Worker:
    """A worker process, and the notes of its tasks."""

    def __init__(self, url: str, queue: str, directory: Path) -> None:
        (directory / "tasks.py").write_text(textwrap.dedent(APPLICATION))
        self._notes = directory / "notes"
        self._notes.touch()
        names = {"BROKER": url, "QUEUE": queue, "NOTES": str(self._notes)}
        # It is the only worker.
        alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
        command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--pool", "solo"]
        self._process = subprocess.Popen(
            [*command, "-n", f"{queue}@localhost", *alone],
            cwd=directory,
            env=os.environ | names,
            start_new_session=True,
        )

    def notes(self) -> list[list[object]]:
        return [json.loads(line) for line in self._notes.read_text().splitlines()]

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise


def hook(type: HookType) -> HookRequest:
    info = FileInfo(id="one", size=5, created_at=1658671969.0)
    return HookRequest(type, info, RequestInfo("POST", "/files/", "192.0.2.1", headers={"a": "ü"}))


def test_a_worker_runs_the_tasks_as_soon_as_it_is_there(
    url: str, queue: str, tmp_path: Path
) -> None:
    # The options of rustus' documentation, except for the names.
    amqp = AmqpHook(
        format=payload_format(FormatName.DEFAULT),
        url=url,
        exchange=queue,
        exchange_kind="direct",
        routing_key=queue,
        celery=True,
    )
    names = ["pre-create", "post-create", "post-receive", "post-finish", "post-terminate"]
    sent = [hook(HookType(name)) for name in names]
    with pytest.raises(HookFailed):
        amqp.send(sent[0])  # there is no queue yet
    worker = Worker(url, queue, tmp_path)

    def is_taken(request: HookRequest) -> bool:
        assert worker.is_alive()
        try:
            amqp.send(request)
        except HookFailed:
            return False
        return True

    try:
        for request in sent:
            wait_until(lambda request=request: is_taken(request), "no queue")  # type: ignore[misc]
        wait_until(lambda: len(worker.notes()) == len(sent), "not all tasks ran")
    finally:
        worker.stop()
        amqp.close()
    assert worker.notes() == [
        [
            f"rustus.{request.type}",
            str(UUID(request.id)),
            json.loads(payload_format(FormatName.DEFAULT).encode(request)),
        ]
        for request in sent
    ]
