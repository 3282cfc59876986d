"""The pauses between attempts."""

from __future__ import annotations

from itertools import islice

import pytest

from tuswsgi.core.backoff import Backoff


def test_pauses_double_up_to_the_longest():
    backoff = Backoff(first=0.1, longest=0.5, jitter=0)
    assert list(islice(backoff, 5)) == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_the_pause_after_a_number_of_attempts_is_that_of_the_iteration():
    backoff = Backoff(first=1, longest=60, jitter=0)
    assert [backoff.after(attempts) for attempts in range(1, 9)] == list(islice(backoff, 8))


@pytest.mark.parametrize("jitter", [0.25, 0.5, 1.0])
def test_jitter_shortens_pauses_by_its_share_at_most(jitter):
    pauses = [Backoff(first=8, longest=8, jitter=jitter).after(1) for _ in range(500)]
    assert all(8 * (1 - jitter) <= pause <= 8 for pause in pauses)
    assert max(pauses) - min(pauses) > 4 * jitter


def test_a_first_pause_beyond_the_longest_is_the_longest():
    assert Backoff(first=1000, longest=600, jitter=0).after(1) == 600


def test_a_loop_of_many_attempts_does_not_overflow():
    assert Backoff(first=1, longest=600, jitter=0).after(10**6) == 600


def test_every_iteration_begins_anew():
    backoff = Backoff(first=1, longest=60, jitter=0)
    assert next(iter(backoff)) == next(iter(backoff)) == 1
