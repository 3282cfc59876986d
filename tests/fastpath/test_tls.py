"""Bodies over TLS: many records at once, and what stands behind the last of them."""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent.socket
import gevent.ssl
import pytest
from gunicorn.http import body as bodies
from gunicorn.http import unreader

from tuswsgi.core.errors import BodyIncomplete
from tuswsgi.transfer.exchange import body_of
from tuswsgi.transfer.gunicorn import LengthBody

#: What one record of TLS holds at most.
RECORD = 16 * 1024

#: Some records; it fits into the buffers of a connection.
DATA = bytes(range(256)) * 200

Ends = tuple[Any, Any]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The client's and the server's context."""
    directory: Path = tmp_path_factory.mktemp("tls")
    certificate, key = str(directory / "cert.pem"), str(directory / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", key, "-out", certificate),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    client = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(certificate)
    server = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return client, server


@pytest.fixture
def ends(contexts: tuple[Any, Any]) -> Iterator[Ends]:
    """The client's and the server's end of a connection, in gevent's hands."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = gevent.socket.create_connection(listener.getsockname())
        server = gevent.socket.socket(fileno=listener.accept()[0].detach())
    shaking = gevent.spawn(contexts[0].wrap_socket, client, server_hostname="localhost")
    with contexts[1].wrap_socket(server, server_side=True) as server, shaking.get(10) as client:
        yield client, server


def queued(sock: Any, request: int) -> int:
    """Return how many bytes the kernel holds of what a socket receives or sends."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), request, bytes(4)))[0])


def send(ends: Ends, data: bytes) -> None:
    """Send, and return once the server's kernel has all of it."""
    client, server = ends
    before = queued(server, termios.FIONREAD)
    client.sendall(data)
    with gevent.Timeout(10):
        while queued(client, termios.TIOCOUTQ) > 0:
            gevent.sleep(0.001)
    assert queued(server, termios.FIONREAD) >= before + len(data)


def body(server: Any, length: int) -> LengthBody:
    source = bodies.Body(bodies.LengthReader(unreader.SocketUnreader(server), length))
    environ = {"wsgi.input": source, "gunicorn.socket": server, "CONTENT_LENGTH": str(length)}
    made = body_of(environ | {"REQUEST_METHOD": "PATCH"})
    assert isinstance(made, LengthBody)
    return made


def read(body: LengthBody) -> bytes:
    received = b""
    while block := body.receive(1_000_000):
        received += bytes(block)
    return received


def test_all_records_that_have_arrived_come_at_once(ends: Ends) -> None:
    send(ends, DATA)
    received = body(ends[1], len(DATA) + 1).receive(1_000_000)
    assert len(received) > 3 * RECORD
    assert received == DATA


def test_no_more_than_is_asked_for(ends: Ends) -> None:
    send(ends, DATA)
    some = body(ends[1], len(DATA))
    received = bytes(some.receive(2 * RECORD + 7))
    assert received == DATA[: 2 * RECORD + 7]
    assert received + read(some) == DATA
    assert some.ended


@pytest.mark.parametrize("length", [9, RECORD, RECORD + 1, 3 * RECORD - 1])
def test_the_next_request_stays(ends: Ends, length: int) -> None:
    """A body may end in the middle of a record."""
    send(ends, DATA[:length] + b"HEAD ")
    assert read(body(ends[1], length)) == DATA[:length]
    assert read(body(ends[1], 5)) == b"HEAD "


def test_records_of_one_byte_are_not_gathered_for_long(ends: Ends) -> None:
    """Others wait while a body is gathered, and these may be as many as one likes."""
    client, server = ends
    for byte in DATA[:1000]:
        client.sendall(bytes([byte]))
    send(ends, b"")
    some = body(server, 1000)
    first = bytes(some.receive(1_000_000))
    assert len(first) < 500
    assert first + read(some) == DATA[:1000]


def close(client: Any) -> None:
    client.close()


def close_in_good_order(client: Any) -> None:
    gevent.spawn(client.unwrap)
    gevent.sleep(0)


def reset(client: Any) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def send_nonsense(client: Any) -> None:
    with socket.socket(fileno=socket.dup(client.fileno())) as raw:
        raw.send(b"this is no record of TLS")


@pytest.mark.parametrize("end", [close, close_in_good_order, reset, send_nonsense])
def test_what_came_before_a_broken_connection_is_kept(
    ends: Ends, end: Callable[[Any], None]
) -> None:
    client, server = ends
    send(ends, DATA)
    end(client)
    some = body(server, len(DATA) + 1)
    assert some.receive(1_000_000) == DATA
    with pytest.raises(BodyIncomplete):
        some.receive(1_000_000)
    assert not some.ended


class OtherSocket:
    """What gevent's socket may become, with Python's TLS object elsewhere."""

    def __init__(self, sock: Any) -> None:
        self.context = sock.context
        self.setsockopt = sock.setsockopt
        self.recv_into = sock.recv_into


OtherSocket.__module__ = "gevent.ssl"


def test_a_gevent_that_keeps_it_elsewhere(ends: Ends) -> None:
    server = ends[1]
    send(ends, DATA)
    some = body(OtherSocket(server), len(DATA))
    assert len(some.receive(1_000_000)) == RECORD
    assert read(some) == DATA[RECORD:]
