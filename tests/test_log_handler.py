"""The server's own log handler: lines without records are not lost and keep their order."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from tuswsgi.observing.logs import JsonFormatter, LogHandler, TextFormatter, sole_handler

SCRIPT = """
from gevent import monkey
monkey.patch_all()
import logging, os, signal, sys, gevent
from tuswsgi.observing.logs import LogHandler, TextFormatter

handler = LogHandler()
handler.setFormatter(TextFormatter())
log = logging.getLogger("x")
log.addHandler(handler)
gevent.sleep(0)
handler.emit_line(logging.INFO, "1")
handler.emit_line(logging.INFO, "2")
{0}
log.warning("3")
handler.emit_line(logging.INFO, "4")
{1}
"""


@pytest.fixture
def logger() -> logging.Logger:
    """A logger with our handler alone."""
    logger = logging.Logger("alone")
    logger.addHandler(handler := LogHandler())
    handler.setFormatter(TextFormatter())
    return logger


@pytest.mark.parametrize("then", ["", "gevent.sleep(0.01)"])
@pytest.mark.parametrize(
    "end",
    ["gevent.sleep(0.01)", "sys.exit(1)", "raise RuntimeError", "gevent.spawn(sys.exit).join()"],
)
def test_lines_keep_their_order_until_the_end(then: str, end: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(then, end)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("[")]
    assert [line.split()[-1] for line in lines] == ["1", "2", "3", "4"]


def test_our_handler_alone(logger: logging.Logger) -> None:
    assert sole_handler(logger) is logger.handlers[0]


def test_other_handlers_get_records(logger: logging.Logger) -> None:
    logger.addHandler(logging.NullHandler())
    assert sole_handler(logger) is None
    del logger.handlers[:]
    assert sole_handler(logger) is None
    assert sole_handler(logging.getLogger("tuswsgi.web.request_log")) is None


def test_handlers_above_get_records(logger: logging.Logger) -> None:
    logger.parent = logging.Logger("above")
    logger.parent.addHandler(logging.NullHandler())
    assert sole_handler(logger) is None
    logger.propagate = False
    assert sole_handler(logger) is logger.handlers[0]


def test_filters_and_other_formats_get_records(logger: logging.Logger) -> None:
    logger.addFilter(lambda record: True)
    assert sole_handler(logger) is None
    del logger.filters[:]
    logger.handlers[0].addFilter(lambda record: True)
    assert sole_handler(logger) is None
    del logger.handlers[0].filters[:]
    logger.handlers[0].setFormatter(JsonFormatter())
    assert sole_handler(logger) is None
