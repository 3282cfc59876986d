#!/usr/bin/env python3
"""Hooks as Celery tasks: run `celery -A celery_tasks worker` in this directory.

A task has the name of its hook; the argument is the payload.
"""

import os
from typing import Any

import celery

app = celery.Celery("celery_tasks")
app.conf.update(
    broker_url=os.environ.get("CELERY_BROKER_URL", "amqp://guest:guest@localhost:5672"),
    # Remove a message from the queue when its task has finished, not when it starts.
    task_acks_late=True,
)


@app.task(name="rustus.pre-create")
def pre_create(data: dict[str, Any]) -> None:
    print(f"PRE CREATE: {data}")  # A task cannot refuse the upload.


@app.task(name="rustus.post-create")
def post_create(data: dict[str, Any]) -> None:
    print(f"POST CREATE: {data}")


@app.task(name="rustus.post-receive")
def post_receive(data: dict[str, Any]) -> None:
    print(f"POST RECEIVE: {data}")


@app.task(name="rustus.post-finish")
def post_finish(data: dict[str, Any]) -> None:
    print(f"POST FINISH: {data}")


@app.task(name="rustus.pre-terminate")
def pre_terminate(data: dict[str, Any]) -> None:
    print(f"PRE TERMINATE: {data}")


@app.task(name="rustus.post-terminate")
def post_terminate(data: dict[str, Any]) -> None:
    print(f"POST TERMINATE: {data}")


if __name__ == "__main__":
    app.worker_main(["worker", "--loglevel", "info"])
