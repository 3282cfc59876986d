"""What gunicorn is told, and what is tried before it starts."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuswsgi.config.loading import Config
from tuswsgi.config.server import ServerSettings
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.serving.settings import check_listening, gunicorn_settings, ready_lines

#: What gunicorn's master is when it begins, as far as we look at it.
MASTER = SimpleNamespace(handle_term=lambda *signal: None)


def settings(**flags: Any) -> ServerSettings:
    return Config.load(flags=flags).build(ServerSettings)


def told(**flags: Any) -> dict[str, Any]:
    return gunicorn_settings(Config.load(flags=flags))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_gunicorn_takes_all_of_it() -> None:
    from gunicorn.config import Config as GunicornConfig

    config = GunicornConfig()
    for name, value in told(certfile="/c", keyfile="/k", graceful_timeout="1500ms").items():
        config.set(name, value)
    assert config.address == [("0.0.0.0", 1081)]
    assert config.graceful_timeout == 2
    assert config.is_ssl
    assert config.secure_scheme_headers == {}
    assert config.forwarder_headers == []
    assert config.forwarded_allow_ips == []
    assert config.control_socket_disable is True
    assert config.limit_request_field_size == 64 * 1024


@pytest.mark.parametrize(
    ("flags", "bind"),
    [
        ({}, "0.0.0.0:1081"),
        ({"host": "::1", "port": 5}, "[::1]:5"),
        ({"unix_sock": "/run/x.sock"}, "unix:/run/x.sock"),
    ],
)
def test_where_it_listens(flags: dict[str, Any], bind: str) -> None:
    assert told(**flags)["bind"] == bind


def test_one_worker_alone_where_memory_is_not_shared() -> None:
    assert told()["workers"] >= 1
    assert told(workers=3)["workers"] == 3
    for flag in ("storage", "info_storage", "locker"):
        name = {"locker": "memory-locker"}.get(flag, f"memory-{flag.replace('_', '-')}")
        assert told(**{flag: name})["workers"] == 1
        with pytest.raises(ConfigurationError, match="only one"):
            told(**{flag: name, "workers": 2})


@pytest.mark.parametrize(
    ("flags", "address", "url"),
    [
        ({}, ("0.0.0.0", 1081), "http://127.0.0.1:1081/files/"),
        ({"host": "::"}, ("::", 1081, 0, 0), "http://[::1]:1081/files/"),
        ({"host": "10.0.0.1", "port": 0}, ("10.0.0.1", 4711), "http://10.0.0.1:4711/files/"),
        ({"host": "localhost", "certfile": "/c"}, ("127.0.0.1", 1), "https://localhost:1/files/"),
        ({"url": "/"}, ("0.0.0.0", 1), "http://127.0.0.1:1/"),
        ({"url": "a/b/"}, ("0.0.0.0", 1), "http://127.0.0.1:1/a/b/"),
    ],
)
def test_the_line_that_a_newcomer_waits_for(
    flags: dict[str, Any], address: tuple[Any, ...], url: str
) -> None:
    lines = ready_lines(settings(**flags), address)
    assert lines.pop() == f"You can now upload files to: {url}"
    if address[0] in ("0.0.0.0", "::"):
        assert lines == [f"Listening on all addresses of this host ({address[0]})."]
    else:
        assert lines == []


def test_only_the_first_worker_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    listener = SimpleNamespace(getsockname=lambda: ("0.0.0.0", 5))
    for age in (1, 2, 3):
        told()["post_worker_init"](SimpleNamespace(age=age, sockets=[listener]))
    assert capsys.readouterr().out == (
        "Listening on all addresses of this host (0.0.0.0).\n"
        "You can now upload files to: http://127.0.0.1:5/files/\n"
    )


@pytest.mark.parametrize("url", ["x y", "/files?x", "/#", "/%20", "/ä"])
def test_what_is_no_path(url: str) -> None:
    with pytest.raises(ConfigurationError, match="Not a path"):
        settings(url=url)


def test_a_port_that_is_taken(taken: int) -> None:
    with pytest.raises(ConfigurationError, match=f"127.0.0.1:{taken}: Address already in use"):
        check_listening(settings(host="127.0.0.1", port=taken))


def test_a_port_that_is_free() -> None:
    check_listening(settings(host="127.0.0.1", port=0))


def test_an_address_of_somebody_else() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen at 192\.0\.2\.1:0"):
        check_listening(settings(host="192.0.2.1", port=0))


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    check_listening(settings(unix_sock=path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ConfigurationError, match="already in use"):
            check_listening(settings(unix_sock=path))
    # Left behind by a server that died; gunicorn removes it.
    check_listening(settings(unix_sock=path))
    with pytest.raises(ConfigurationError, match="No such file"):
        check_listening(settings(unix_sock=tmp_path / "missing" / "x.sock"))


def test_certificates_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    with pytest.raises(ConfigurationError, match="No such file"):
        check_listening(settings(port=0, certfile=file))
    file.write_text("nothing")
    with pytest.raises(ConfigurationError, match=f"https cannot be served with {file}"):
        check_listening(settings(port=0, certfile=file))


@pytest.fixture
def quiet_loggers() -> Iterator[None]:
    names = ("tuswsgi", "gunicorn.access")
    before = [
        (logger, logger.level, list(logger.handlers), list(logger.filters))
        for logger in map(logging.getLogger, names)
    ]
    yield
    logging.disable(logging.NOTSET)
    for logger, level, handlers, filters in before:
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters


@pytest.mark.usefixtures("quiet_loggers")
def test_the_log_follows_the_settings_also_at_a_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    def logs(level: int) -> bool:
        return logging.getLogger("tuswsgi.x").isEnabledFor(level)

    with monkeypatch.context() as patch:
        # pytest has put its own there.
        patch.setattr(logging.getLogger(), "handlers", [])
        told(log_level="warn")["on_starting"](MASTER)
        assert logs(logging.WARNING)
        assert not logs(logging.INFO)
        told(log_level="TRACE")["on_reload"](None)
        assert logs(logging.DEBUG)
        told(log_level="OFF")["on_reload"](None)
        assert not logs(logging.CRITICAL)
        assert len(logging.getLogger().handlers) == 1


@pytest.mark.usefixtures("quiet_loggers")
def test_a_log_that_somebody_else_has_set_up_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = logging.NullHandler()
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [own])
        told()["on_starting"](MASTER)
        assert logging.getLogger().handlers == [own]


def test_reports_without_sentry_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentry_sdk.utils", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'tuswsgi-server\[sentry\]'"):
        told(sentry_dsn="https://key@example.org/1")


def test_reports_to_what_is_no_dsn() -> None:
    with pytest.raises(ConfigurationError) as caught:
        told(sentry_dsn="https://secret@/x")
    assert "sentry" in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        told(sentry_sample_rate="2")


@pytest.mark.usefixtures("quiet_loggers")
def test_health_checks_can_be_left_out_of_the_access_log() -> None:
    def passes(path: str) -> bool:
        record = logging.LogRecord("x", logging.INFO, "", 0, "%(U)s", ({"U": path},), None)
        return bool(logging.getLogger("gunicorn.access").filter(record))

    told(disable_health_access_log=True)["on_starting"](MASTER)
    assert passes("/files/")
    assert not any(map(passes, ("/health", "/ready", "/metrics")))
    told()["on_reload"](None)
    assert passes("/health")
