"""Our application in a worker that counts what it does, and tells it at ``/work``.

Counts are the same on a busy machine as on an idle one.
"""

from __future__ import annotations

import functools
import os
import sqlite3
import sys
import tracemalloc
from collections import Counter
from types import FrameType
from typing import Any

import flask
import gevent.socket

import tuswsgi
from tuswsgi.app import create_app
from tuswsgi.config.loading import Config
from tuswsgi.serving.dispatch import Dispatcher

OURS = os.path.dirname(tuswsgi.__file__)

counts: Counter[str] = Counter()


def count_calls(owner: Any, name: str) -> None:
    """Count the calls of a function, and those that would have had to wait."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        try:
            return function(*args, **kwargs)
        except BlockingIOError:
            counts[f"{name} blocked"] += 1
            raise

    setattr(owner, name, counting)


for name in ("splice", "sendfile", "pwrite", "pread", "write", "read"):
    count_calls(os, name)
for name in ("recv", "recv_into", "send", "sendall"):
    count_calls(gevent.socket.socket, name)


def connect(*args: Any, connect: Any = sqlite3.connect, **kwargs: Any) -> sqlite3.Connection:
    connection: sqlite3.Connection = connect(*args, **kwargs)
    connection.set_trace_callback(lambda statement: counts.update([statement.split()[0].upper()]))
    return connection


sqlite3.connect = sqlite3.dbapi2.connect = connect  # type: ignore[attr-defined]

app = create_app(Config.from_environment(os.environ))
application = Dispatcher(app)


@app.get("/work")
def work() -> flask.Response:
    """Tell what was counted since the last time."""
    told = flask.jsonify(counts)
    counts.clear()
    return told


@app.get("/profile")
def profile() -> flask.Response:
    """Count the calls of Python functions from now on, on this connection."""
    sys.setprofile(count_function)
    return flask.jsonify({})


def count_function(frame: FrameType, event: str, argument: object) -> None:
    if event == "call":
        counts["functions"] += 1
        if frame.f_code.co_filename.startswith(OURS):
            counts["our functions"] += 1
            counts[f"in {frame.f_code.co_filename.removeprefix(OURS)}"] += 1


@app.get("/profile/end")
def end_profile() -> flask.Response:
    sys.setprofile(None)
    return work()


@app.get("/allocations")
def allocations() -> flask.Response:
    """Tell the most bytes that were allocated since the last time."""
    peak = 0
    if tracemalloc.is_tracing():
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    else:
        tracemalloc.start()
    return flask.jsonify({"peak": peak})
