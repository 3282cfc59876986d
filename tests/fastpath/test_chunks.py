"""The chunked coding: what is taken is what gunicorn takes, however it is cut."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.http.body import ChunkedReader
from gunicorn.http.unreader import IterUnreader
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tuswsgi.transfer.framing import LONGEST_TRAILERS, ChunkDecoder, TooLong

#: The payload, the lines of the trailers and what follows; ``None`` for both without an end.
Outcome = tuple[bytes, "bytes | None", "bytes | None"]


def ours(pieces: list[bytes]) -> Outcome:
    decoder, payload = ChunkDecoder(), b""
    pieces = list(pieces)
    while pieces and decoder.error is None and decoder.trailers is None:
        payload += decoder.feed(pieces.pop(0))
    if decoder.trailers is None:
        return payload, None, None
    return payload, decoder.trailers, decoder.rest + b"".join(pieces)


def theirs(pieces: list[bytes]) -> Outcome:
    source, trailers, payload = IterUnreader(pieces), [b""], b""

    def keep(lines: bytes, from_trailer: bool) -> Any:
        if b"\n" in lines.replace(b"\r\n", b""):
            raise ValueError  # as gunicorn's method does
        trailers.append(lines)

    try:
        for piece in ChunkedReader(SimpleNamespace(parse_headers=keep), source).parser:
            payload += piece
    except Exception:
        return payload, None, None
    rest = b""
    while more := source.read():
        rest += more
    return payload, trailers[-1], rest


def cut(wire: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({place % (len(wire) + 1) for place in places} | {0, len(wire)})
    return [wire[a:b] for a, b in pairwise(edges)]


WHOLE = (
    b'5\r\nhello\r\n00A;a="\\"; \xe9" ; b\t= c\r\n0123456789\r\n1\r\n\r\r\n2\r\n\r\n\r\n'
    b"0 ;last\r\nA: b\r\nC: d\r\n\r\nGET / HTTP/1.1\r\n\r\n"
)

SIZES = [b"0", b"1", b"3", b"f", b"F", b"0a", b"-1", b"+1", b"0x1", b"1_0", b"1;a=b"]
SIGNS = [b" ", b"\t", b";", b"=", b'"', b"\\", b"a", b"\r", b"\n", b"\xe9", *([b"\r\n"] * 3)]
CHUNKS = [b"1\r\nx\r\n", b"3\r\nxyz\r\n", b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"HEAD /"]
PARTS = st.sampled_from([*SIZES, *SIGNS, *CHUNKS])


@settings(deadline=None, max_examples=1000)
@given(st.lists(PARTS, max_size=14).map(b"".join), st.lists(st.integers(0, 200), max_size=6))
@example(WHOLE, list(range(200)))
@example(b"3\r\nabcd\r\n0\r\n\r\n", [])
@example(b"3\r\nabc\r\r\n0\r\n\r\n", [8])
@example(b"\r\n3\r\nabc\r\n0\r\n\r\n", [])
@example(b"0\r\n\n\r\n", [])
@example(b"0\r\n\n0\r\n\r\n", [])
@example(b"0\r\n\r\n\r\n", [4])
def test_it_takes_what_gunicorn_takes(wire: bytes, places: list[int]) -> None:
    pieces = cut(wire, places)
    assert ours(pieces) == theirs(pieces)


def test_every_cut() -> None:
    payload = b"hello0123456789\r\r\n"
    for place in range(len(WHOLE)):
        assert ours(cut(WHOLE, [place])) == (
            payload,
            b"A: b\r\nC: d",
            b"GET / HTTP/1.1\r\n\r\n",
        )


@pytest.mark.parametrize(
    "broken", [b"x", b"\r\n", b"1 \r\n", b"1;\r\n", b'1;a="b\r\n', b"1;a\rb\r\n", b"1\n", b"-1\r\n"]
)
def test_a_mistake_does_not_cost_what_came_before_it(broken: bytes) -> None:
    decoder = ChunkDecoder()
    assert decoder.feed(b"3\r\nabc\r\n2\r\nde\r\n" + broken + b"\r\n") == b"abcde"
    assert decoder.error is not None
    assert decoder.trailers is None


@pytest.mark.parametrize("wire", [b"3\r\nabcX", b"1;a\n", b"1;" + b"a" * 8190])
def test_mistakes_are_found_before_the_line_has_ended(wire: bytes) -> None:
    decoder = ChunkDecoder()
    decoder.feed(wire)
    assert decoder.error is not None


def test_a_million_chunks_in_one_piece() -> None:
    decoder = ChunkDecoder()
    assert decoder.feed(b"1\r\nx\r\n" * 100_000 + b"1\r\n") == b"x" * 100_000
    assert (decoder.chunks, decoder.left) == (100_001, 1)


@pytest.mark.parametrize("step", [1000, LONGEST_TRAILERS + 10])
def test_trailers_have_a_limit(step: int) -> None:
    def end_of(trailers: bytes) -> ChunkDecoder:
        decoder, wire = ChunkDecoder(), b"0\r\n" + trailers + b"\r\n\r\n"
        for start in range(0, len(wire), step):
            decoder.feed(wire[start : start + step])
            if decoder.error is not None:
                break
        return decoder

    line = b"A: " + b"x" * 1000
    # The CR LF of the last chunk counts, too.
    longest = line.ljust(LONGEST_TRAILERS - 2, b"x")
    assert end_of(longest).trailers == longest
    assert isinstance(end_of(longest + b"x").error, TooLong)
    assert isinstance(end_of(longest * 50).error, TooLong)
