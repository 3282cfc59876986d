"""The flags and variables of rustus' and tusd's documentation of hooks mean the same here.

Each example stands as it is written there, with its values as ``tuswsgi config show`` is to
print them: all commands of the server read their flags in one way.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from e2e.conftest import SERVE, Server

from tuswsgi.commands.cli import main

#: The two ways in which rustus' documentation gives each example, and what it means.
RUSTUS: dict[str, tuple[str, str, dict[str, str]]] = {
    "events": (
        'rustus --hooks "pre-create,post-create,post-receive,pre-terminate,'
        'post-terminate,post-finish"',
        'export RUSTUS_HOOKS="pre-create,post-create,post-receive,pre-terminate,'
        'post-terminate,post-finish"',
        {"hooks": "pre-create,post-create,post-receive,pre-terminate,post-terminate,post-finish"},
    ),
    "proxy": (
        "rustus --behind-proxy",
        'export RUSTUS_BEHIND_PROXY="true"',
        {"behind_proxy": "true"},
    ),
    "format default": (
        "rustus --hooks-format default",
        'export RUSTUS_HOOKS_FORMAT="default"',
        {"hooks.format": "default"},
    ),
    "format v2": (
        "rustus --hooks-format v2",
        'export RUSTUS_HOOKS_FORMAT="v2"',
        {"hooks.format": "v2"},
    ),
    "format tusd": (
        "rustus --hooks-format tusd",
        'export RUSTUS_HOOKS_FORMAT="tusd"',
        {"hooks.format": "tusd"},
    ),
    "file": (
        'rustus --hooks-file "hooks/single_file_hook.sh"',
        'export RUSTUS_HOOKS_FILE="hooks/single_file_hook.sh"',
        {"hooks.file": "hooks/single_file_hook.sh"},
    ),
    "directory": (
        "rustus --hooks-dir hooks",
        'export RUSTUS_HOOKS_DIR="hooks"',
        {"hooks.dir": "hooks"},
    ),
    "http": (
        r"""
        rustus --hooks-http-urls "https://httpbin.org/post" \
            --hooks-http-proxy-headers "Authorization" \
            --http-hook-timeout 1
        """,
        """
        export RUSTUS_HOOKS_HTTP_URLS="https://httpbin.org/post"
        export RUSTUS_HOOKS_HTTP_PROXY_HEADERS="Authorization"
        export RUSTUS_HTTP_HOOK_TIMEOUT="1"
        """,
        {
            "hooks.http.urls": "https://httpbin.org/post",
            "hooks.http.proxy_headers": "Authorization",
            "hooks.http.timeout": "1s",
        },
    ),
    "web server": (
        r"""
        rustus --hooks-http-urls "http://localhost:8000/hooks" \
            --hooks-http-proxy-headers "Authorization"
        """,
        """
        export RUSTUS_HOOKS_HTTP_URLS="http://localhost:8000/hooks"
        export RUSTUS_HOOKS_HTTP_PROXY_HEADERS="Authorization"
        """,
        {
            "hooks.http.urls": "http://localhost:8000/hooks",
            "hooks.http.proxy_headers": "Authorization",
            "hooks.http.timeout": "2s",
        },
    ),
    "amqp": (
        r"""
        rustus --hooks-amqp-url "amqp://guest:guest@localhost:5672" \
            --hooks-amqp-queues-prefix "rustus_prefix" \
            --hooks-amqp-exchange "rustus" \
            --hooks-amqp-exchange-kind "topic" \
            --hooks-amqp-routing-key "route66" \
            --hooks-amqp-declare-exchange \
            --hooks-amqp-declare-queues \
            --hooks-amqp-durable-exchange \
            --hooks-amqp-durable-queues \
            --hooks-amqp-celery \
            --hooks-amqp-connection-pool-size 10 \
            --hooks-amqp-channel-pool-size 10 \
            --hooks-amqp-idle-connection-timeout 20 \
            --hooks-amqp-idle-channels-timeout 10
        """,
        """
        export RUSTUS_HOOKS_AMQP_URL="amqp://guest:guest@localhost:5672"
        export RUSTUS_HOOKS_AMQP_QUEUES_PREFIX="rustus_prefix"
        export RUSTUS_HOOKS_AMQP_EXCHANGE="rustus"
        export RUSTUS_HOOKS_AMQP_EXCHANGE_KIND="topic"
        export RUSTUS_HOOKS_AMQP_ROUTING_KEY="route66"
        export RUSTUS_HOOKS_AMQP_DECLARE_EXCHANGE="true"
        export RUSTUS_HOOKS_AMQP_DECLARE_QUEUES="true"
        export RUSTUS_HOOKS_AMQP_DURABLE_EXCHANGE="true"
        export RUSTUS_HOOKS_AMQP_DURABLE_QUEUES="true"
        export RUSTUS_HOOKS_AMQP_CELERY="true"
        export RUSTUS_HOOKS_AMQP_CONNECTION_POOL_SIZE="10"
        export RUSTUS_HOOKS_AMQP_CHANNEL_POOL_SIZE="10"
        export RUSTUS_HOOKS_AMQP_IDLE_CONNECTION_TIMEOUT="20"
        export RUSTUS_HOOKS_AMQP_IDLE_CHANNELS_TIMEOUT="10"
        """,
        {
            "hooks.amqp.url": "********",
            "hooks.amqp.queues_prefix": "rustus_prefix",
            "hooks.amqp.exchange": "rustus",
            "hooks.amqp.exchange_kind": "topic",
            "hooks.amqp.routing_key": "route66",
            "hooks.amqp.declare_exchange": "true",
            "hooks.amqp.declare_queues": "true",
            "hooks.amqp.durable_exchange": "true",
            "hooks.amqp.durable_queues": "true",
            "hooks.amqp.celery": "true",
            "hooks.amqp.connection_pool_size": "10",
            "hooks.amqp.channel_pool_size": "10",
            "hooks.amqp.idle_connection_timeout": "20s",
            "hooks.amqp.idle_channels_timeout": "10s",
        },
    ),
    "celery": (
        r"""
        rustus --hooks-amqp-url "amqp://guest:guest@localhost:5672" \
            --hooks-amqp-exchange "celery" \
            --hooks-amqp-exchange-kind "direct" \
            --hooks-amqp-routing-key "celery" \
            --hooks-amqp-celery
        """,
        """
        export RUSTUS_HOOKS_AMQP_URL="amqp://guest:guest@localhost:5672"
        export RUSTUS_HOOKS_AMQP_EXCHANGE="celery"
        export RUSTUS_HOOKS_AMQP_EXCHANGE_KIND="direct"
        export RUSTUS_HOOKS_AMQP_ROUTING_KEY="celery"
        export RUSTUS_HOOKS_AMQP_CELERY="true"
        """,
        {
            "hooks.amqp.url": "********",
            "hooks.amqp.exchange": "celery",
            "hooks.amqp.exchange_kind": "direct",
            "hooks.amqp.routing_key": "celery",
            "hooks.amqp.celery": "true",
        },
    ),
}

TUSD: list[tuple[str, dict[str, str]]] = [
    ("--hooks-enabled-events pre-create,post-create", {"hooks": "pre-create,post-create"}),
    (
        "--hooks-enabled-events pre-create,post-create,post-receive,pre-terminate,"
        "post-terminate,post-finish,pre-finish,pre-get",
        {
            "hooks": "pre-create,post-create,post-receive,pre-terminate,"
            "post-terminate,post-finish,pre-finish,pre-get"
        },
    ),
    ("--hooks-dir ./path/to/hooks/", {"hooks.dir": "path/to/hooks"}),
    (
        "--hooks-http http://localhost:8081/write",
        {
            "hooks.http.urls": "http://localhost:8081/write",
            "hooks.http.retries": "3",
            "hooks.http.backoff": "1s",
        },
    ),
    (
        "--hooks-http http://localhost:8081/write --hooks-http-retry 5 --hooks-http-backoff 2",
        {"hooks.http.retries": "5", "hooks.http.backoff": "2s"},
    ),
    ("--hooks-http-backoff 500ms", {"hooks.http.backoff": "0.5s"}),
    (
        "--hooks-http-forward-headers Cookie,Authorization",
        {"hooks.http.proxy_headers": "Cookie,Authorization"},
    ),
    (
        "--hooks-grpc localhost:8080",
        {
            "hooks.grpc.endpoint": "localhost:8080",
            "hooks.grpc.retries": "3",
            "hooks.grpc.backoff": "1s",
        },
    ),
    (
        "--hooks-grpc localhost:8080 --hooks-grpc-retry 5 --hooks-grpc-backoff 2",
        {"hooks.grpc.retries": "5", "hooks.grpc.backoff": "2s"},
    ),
    ("--progress-hooks-interval 3s", {"hooks.progress_interval": "3s"}),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("TUSWSGI_", "RUSTUS_")):
            monkeypatch.delenv(name)


def arguments(example: str) -> list[str]:
    """Return what the shell makes of an example, without the name of the program."""
    return shlex.split(example.replace("\\\n", ""))[1:]


def variables(example: str) -> dict[str, str]:
    """Return what the shell exports in an example."""
    exports = (shlex.split(line) for line in example.strip().splitlines())
    return dict(assignment.split("=", 1) for _, assignment in exports)


def understood(
    args: list[str], environ: dict[str, str] | None = None
) -> tuple[dict[str, str], set[str]]:
    """Return the values of all options, and the names of those that somebody set."""
    result = CliRunner().invoke(main, ["config", "show", *args], env=environ)
    assert result.exit_code == 0, result.output
    values, given, section = {}, set(), "tuswsgi"
    for line in result.stdout.splitlines():
        if heading := re.fullmatch(r"\[(.+)\]", line):
            section = heading[1]
        elif entry := re.fullmatch(r"(\w+) = ?(.*?) +# (.+)", line):
            key = entry[1] if section == "tuswsgi" else f"{section}.{entry[1]}"
            values[key] = entry[2]
            given |= {key} if entry[3] != "default" else set()
    return values, given


@pytest.mark.parametrize(("flags", "exports", "expected"), RUSTUS.values(), ids=RUSTUS.keys())
def test_examples_of_rustus(flags: str, exports: str, expected: dict[str, str]) -> None:
    environ = variables(exports)
    ours = {name.replace("RUSTUS_", "TUSWSGI_", 1): value for name, value in environ.items()}
    ways = [understood(arguments(flags)), understood([], environ), understood([], ours)]
    for values, given in ways:
        assert {key: values[key] for key in expected} == expected
        assert given <= set(expected)


@pytest.mark.parametrize(("flags", "expected"), TUSD)
def test_flags_of_tusd(flags: str, expected: dict[str, str]) -> None:
    values, _ = understood(shlex.split(flags))
    assert {key: values[key] for key in expected} == expected


def test_a_server_with_all_of_it_starts(tmp_path: Path) -> None:
    # Nobody answers on these ports: that is trouble for the hooks, and none for the start.
    flags = [
        flag
        for name, (example, _, _) in RUSTUS.items()
        if name != "events"
        for flag in arguments(example.replace(":5672", ":1").replace("httpbin.org", "localhost:1"))
    ]
    flags += ["--hooks", "post-create,post-finish", "--data-dir", str(tmp_path / "data")]
    server = Server([*SERVE, *flags], tmp_path / "data")
    try:
        server.start()
        upload = server.client.create(5)
        assert server.client.head(upload).status == 200
    finally:
        server.kill()
