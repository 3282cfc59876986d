"""Servers of others that tests need: found on this machine, or the test is skipped."""

from __future__ import annotations

import os
import socket
from typing import NoReturn
from urllib.parse import urlsplit

import pytest


def find(variable: str, url: str) -> str:
    """Return the URL of a service: the environment's, or `url` if somebody answers there.

    Skips the test where there is none, and fails it where the machine promises to have all.
    """
    given = os.environ.get(variable)
    parts = urlsplit(given or url)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()
    except OSError as error:
        reason = f"{variable}: nobody answers on port {parts.port} of {parts.hostname}: {error}"
        if given:
            pytest.fail(reason)
        missing(reason)
    return given or url


def missing(reason: str) -> NoReturn:
    """Skip the test since something is not there, and fail it where all of it must be."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
