"""The fixture `make` of tests that look at info stores among processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import stores


@pytest.fixture(params=stores.KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[stores.Make]:
    """What makes an info store of each kind, by `tmp_path`, here and in other processes."""
    with stores.shared(request.param, tmp_path) as make:
        yield make
