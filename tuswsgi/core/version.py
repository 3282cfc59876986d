"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """Return the version, ``"unknown"`` in a tree that is not installed."""
    try:
        return metadata.version("tuswsgi-server")
    except metadata.PackageNotFoundError:
        return "unknown"
