"""Connections to a Redis server: a bounded pool of them, and one for each channel.

This file owns who waits how long for what, what is repeated after a connection broke, and
what becomes of Redis' errors. It uses redis-py's connections without its clients, which take
half as long again and repeat what they like. Keys and scripts belong to those who use it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.connection import Connection

from tuswsgi.connections.pool import Pool, PoolSettings
from tuswsgi.connections.redis_address import address_of
from tuswsgi.connections.redis_scripts import Command, Script
from tuswsgi.core.errors import ConfigurationError, StorageFull, Unavailable
from tuswsgi.core.process import PerProcess

log = logging.getLogger(__name__)

#: What a connection says when it is broken, or leads to a server that is not the master.
_BROKEN = (redis.ConnectionError, redis.ReadOnlyError, OSError)


class RedisServer:
    """A server for all greenlets or threads of a process, and for its forks.

    Its trouble raises ``Unavailable``, or ``StorageFull`` if its memory is full; what it
    said is in the log.

    Commands are sent once more where the connection broke before they were answered, as all
    do when the server starts again: whoever uses this must not mind that a command is run
    twice.
    """

    def __init__(self, dsn: str, settings: PoolSettings) -> None:
        self._address = address_of(dsn, settings.pool_timeout)
        self._settings = settings
        self._looked = False
        #: Why it could not be used when it was asked last.
        self._away: str | None = None
        self._finder = PerProcess(self._address.finder)
        self._pool: PerProcess[Pool[Line]] = PerProcess(self._make_pool)

    def prepare(self) -> None:
        """Look whether the server can be used, and tell in the log what its settings lack.

        :raises ConfigurationError: if it will never do what it is used for.
        :raises Unavailable: if it cannot be reached.
        """
        told = self._info()
        if told.get("cluster_enabled") == "1":
            raise ConfigurationError(
                f"{self._address.shown} is a node of a Redis Cluster, which is not supported."
            )
        if not self._looked:
            self._looked = True
            self._tell_what_is_lacking(told)

    def call(self, *command: Any, again: Command | None = None) -> Any:
        """Run a command or a script and return its answer: text as bytes.

        :param again: what to send instead where a connection broke before the answer came, for
            who wants to tell both times apart.
        """
        with self._trouble():
            return self._run([command], [again or command])[0]

    def calls(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands together, no scripts among them, and return their answers."""
        with self._trouble():
            return self._run(commands, commands)

    def subscribe(self, channel: str) -> Subscription:
        """Return what hears the messages of a channel, by a connection of its own."""
        return Subscription(self, channel, self._settings.pool_timeout)

    def close(self) -> None:
        """Close this process' connections; they are opened again when they are needed."""
        pool = self._pool.pop()
        if pool is not None:
            pool.close()

    def connection(self) -> Connection:
        """Return a new connection that is not open yet."""
        return self._finder.get()()

    def _tell_what_is_lacking(self, told: dict[str, str]) -> None:
        if told.get("aof_enabled") == "0":
            log.warning(
                "%s has `appendonly no`: it forgets what it acknowledged when it stops",
                self._address.shown,
            )
        if (policy := told.get("maxmemory_policy", "noeviction")) != "noeviction":
            log.warning(
                "%s has `maxmemory-policy %s`: only with `noeviction` it keeps what it has",
                self._address.shown,
                policy,
            )

    def _info(self) -> dict[str, str]:
        with self._trouble():
            try:
                (text,) = self._run([("INFO", "everything")], [("INFO", "everything")])
            except redis.exceptions.NoPermissionError:
                return {}
            except redis.AuthenticationError as error:
                raise ConfigurationError(
                    f"{self._address.shown} cannot be used: {error}"
                ) from error
        lines = text.decode(errors="replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def _run(self, commands: Sequence[Command], again: Sequence[Command]) -> list[Any]:
        with self._pool.get().connection() as line:
            return line.run(commands, again)

    def _make_pool(self) -> Pool[Line]:
        return Pool(self._settings, lambda: Line(self.connection), Line.close)

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        """Say what Redis says as errors of ours."""
        try:
            yield
            if self._away is not None:
                self._away = None
                log.warning("%s answers again", self._address.shown)
        except redis.OutOfMemoryError as error:
            log.error("%s: %s", self._address.shown, error)
            raise StorageFull from None
        except (*_BROKEN, redis.TimeoutError) as error:
            # One sentence says it all, and every request meets it.
            level = logging.DEBUG if str(error) == self._away else logging.ERROR
            self._away = str(error)
            log.log(level, "%s: %s", self._address.shown, error)
            raise Unavailable from None
        except redis.RedisError as error:
            log.error("%s: %s", self._address.shown, error)
            raise Unavailable from error


class Line:
    """A connection that is replaced when it broke."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        self._make = make
        self._connection: Connection | None = None

    def run(self, commands: Sequence[Command], again: Sequence[Command]) -> list[Any]:
        try:
            return self._try(commands)
        except redis.AuthenticationError:
            raise
        except _BROKEN:
            return self._try(again)

    def close(self) -> None:
        connection = self._connection
        self._connection = None
        if connection is not None:
            connection.disconnect()

    def _try(self, commands: Sequence[Command]) -> list[Any]:
        try:
            answers = self._exchange([_packed(command) for command in commands])
            if isinstance(answers[0], redis.exceptions.NoScriptError):
                script, *args = commands[0]
                answers = self._exchange([("EVAL", script.text, *args)])
        except BaseException:
            # Whatever it was, an answer may come that nobody waits for any more.
            self.close()
            raise
        for answer in answers:
            if isinstance(answer, redis.ReadOnlyError):
                self.close()
            if isinstance(answer, redis.RedisError):
                raise answer
        return answers

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        if self._connection is None:
            self._connection = self._make()
        connection = self._connection
        connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        return [_answer(connection) for _ in commands]


class Subscription:
    """The messages of one channel. It must be used by one greenlet or thread."""

    def __init__(self, server: RedisServer, channel: str, patience: float) -> None:
        self._server = server
        self._patience = patience
        self._channel = channel
        self._connection: Connection | None = None
        #: When the server was asked whether it is there, until it answers.
        self._asked_at: float | None = None

    def hear(self, timeout: float) -> list[bytes]:
        """Wait up to `timeout` seconds for messages and return them.

        Messages that are sent while there is no connection are lost.

        :raises Unavailable: if the server cannot be reached.
        """
        try:
            with self._server._trouble():
                return self._hear(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        connection = self._connection
        self._connection = None
        self._asked_at = None
        if connection is not None:
            connection.disconnect()

    def _hear(self, timeout: float) -> list[bytes]:
        if self._connection is None:
            self._connection = self._server.connection()
            self._connection.send_command("SUBSCRIBE", self._channel)
            self._connection.read_response()
        connection = self._connection
        heard = []
        while connection.can_read(timeout):
            kind, *_, text = connection.read_response()
            timeout = 0
            if kind == b"message":
                heard.append(text)
            self._asked_at = None
        self._look_after(connection)
        return heard

    def _look_after(self, connection: Connection) -> None:
        """Find out whether there is still somebody at the other end, who may never speak."""
        now = time.monotonic()
        if self._asked_at is None:
            connection.send_command("PING")
            self._asked_at = now
        elif now - self._asked_at > self._patience:
            raise redis.TimeoutError("No answer to a PING in a channel")


def _packed(command: Command) -> Command:
    script, *args = command
    return ("EVALSHA", script.sha, *args) if isinstance(script, Script) else command


def _answer(connection: Connection) -> Any:
    """Return an answer, also if it is that a command failed: others come after it."""
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error
