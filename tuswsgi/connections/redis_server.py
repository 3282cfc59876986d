"""Redis through redis-py's client: its errors become ours, and a broken connection is replaced.

Keys and scripts belong to the modules that use them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
from redis.client import PubSub

from tuswsgi.connections.dsn import Dsn
from tuswsgi.connections.pool import PoolSettings
from tuswsgi.connections.redis_pool import make_pool
from tuswsgi.connections.redis_scripts import Command, Script
from tuswsgi.core.errors import ConfigurationError, StorageFull, TusError, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")


class RedisServer:
    """A Redis server, shared by all greenlets or threads of a process and usable after a fork.

    Commands raise ``Unavailable`` if Redis fails, and ``StorageFull`` if its memory is full;
    the log has the reason.

    A command is sent a second time if the connection breaks before the answer arrives, as all
    do when Redis restarts. So Redis may run it twice.
    """

    def __init__(self, dsn: str, settings: PoolSettings) -> None:
        self._dsn = dsn
        self._timeout = settings.pool_timeout
        self._client = self._make_client(settings.pool_size)
        self._name = str(Dsn.parse(dsn))
        self._warned = False
        #: The message of the present outage.
        self._failure: str | None = None

    def prepare(self) -> None:
        """Check that the server can be used, and warn once of settings that lose data.

        :raises ConfigurationError: if it cannot be used as it is configured.
        :raises Unavailable: if it cannot be reached.
        """
        info = self._info()
        if info.get("cluster_enabled"):
            raise ConfigurationError(
                f"{self._name} is a node of a Redis Cluster, which is not supported."
            )
        if not self._warned:
            self._warned = True
            self._warn(info)

    def call(self, *command: Any, again: Command | None = None) -> Any:
        """Run a command or a script and return its answer, texts as bytes.

        :param again: what to send instead after the connection broke, for callers that must
            tell the two attempts apart.
        """
        return self._guarded(self._send, command, again or command)

    def calls(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one pipeline, no scripts among them, and return their answers."""
        answers: list[Any] = self._guarded(self._send_together, commands, commands)
        return answers

    def subscribe(self, channel: str) -> Subscription:
        """Return a subscription to a channel, which has a connection of its own."""
        return Subscription(self, self._make_client(1).pubsub(), channel, self._timeout)

    def close(self) -> None:
        """Close the idle connections of this process; commands open new ones."""
        self._client.connection_pool.disconnect(inuse_connections=False)

    def tus_error(self, error: Exception) -> TusError:
        """Log an error of redis-py, and return the one that stands for it."""
        if isinstance(error, redis.OutOfMemoryError):
            log.error("%s: %s", self._name, error)
            return StorageFull()
        if not _is_outage(error):
            log.error("%s: %s", self._name, error, exc_info=error)
            return Unavailable()
        # Every request fails alike while the server is down: one line is enough.
        level = logging.DEBUG if str(error) == self._failure else logging.ERROR
        self._failure = str(error)
        log.log(level, "%s: %s", self._name, error)
        return Unavailable()

    def recovered(self) -> None:
        """Log that the server answers again after a failure."""
        if self._failure is not None:
            self._failure = None
            log.warning("%s answers again", self._name)

    def _guarded(self, send: Callable[[T], Any], first: T, second: T) -> Any:
        """Send `first`, and `second` if the connection broke."""
        try:
            answer = self._send_twice(send, first, second)
        except (redis.RedisError, OSError) as error:
            raise self.tus_error(error) from None
        self.recovered()
        return answer

    def _send_twice(self, send: Callable[[T], Any], first: T, second: T) -> Any:
        try:
            return send(first)
        except redis.AuthenticationError:
            raise
        except redis.ReadOnlyError:
            # The master has become a replica.
            self._client.connection_pool.disconnect(inuse_connections=False)
        except (redis.ConnectionError, OSError):
            pass
        return send(second)

    def _send(self, command: Command) -> Any:
        name, *args = command
        if not isinstance(name, Script):
            return self._client.execute_command(*command)
        try:
            return self._client.execute_command("EVALSHA", name.sha, *args)
        except redis.exceptions.NoScriptError:
            return self._client.execute_command("EVAL", name.text, *args)

    def _send_together(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers = pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, redis.RedisError):
                raise answer
        return answers

    def _info(self) -> dict[str, Any]:
        try:
            return dict(self._send_twice(self._client.info, "everything", "everything"))
        except redis.exceptions.NoPermissionError:
            return {}
        except redis.AuthenticationError as error:
            raise ConfigurationError(f"{self._name} cannot be used: {error}") from error
        except (redis.RedisError, OSError) as error:
            raise self.tus_error(error) from None

    def _warn(self, info: dict[str, Any]) -> None:
        if info.get("aof_enabled") == 0:
            log.warning(
                "%s has `appendonly no`: it loses acknowledged uploads when it stops", self._name
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            log.warning(
                "%s has `maxmemory-policy %s`: it may delete records; only `noeviction` keeps all",
                self._name,
                policy,
            )

    def _make_client(self, size: int) -> redis.Redis:
        return redis.Redis(connection_pool=make_pool(self._dsn, size, self._timeout))


class Subscription:
    """The messages of one channel, for one greenlet or thread at a time.

    :param timeout: seconds that the server may take to answer a PING.
    """

    def __init__(self, server: RedisServer, pubsub: PubSub, channel: str, timeout: float) -> None:
        self._server = server
        self._pubsub = pubsub
        self._channel = channel
        self._timeout = timeout
        #: When the PING was sent that has no answer yet.
        self._pinged_at: float | None = None

    def messages(self, timeout: float) -> list[bytes]:
        """Wait up to `timeout` seconds for messages and return them.

        Messages that are sent while the connection is broken are lost.

        :raises Unavailable: if the server cannot be reached.
        """
        try:
            found = self._messages(timeout)
        except (redis.RedisError, OSError) as error:
            self.close()
            raise self._server.tus_error(error) from None
        except BaseException:
            self.close()
            raise
        self._server.recovered()
        return found

    def close(self) -> None:
        """Close the connection; ``messages`` opens another one."""
        self._pinged_at = None
        self._pubsub.close()
        self._pubsub.connection_pool.disconnect()

    def _messages(self, timeout: float) -> list[bytes]:
        if not self._pubsub.subscribed:
            self._pubsub.subscribe(self._channel)
        found = []
        while (message := self._pubsub.get_message(timeout=timeout)) is not None:
            timeout = 0
            self._pinged_at = None
            if message["type"] == "message":
                found.append(message["data"])
        self._check_alive()
        return found

    def _check_alive(self) -> None:
        """Notice a server that has gone without closing the connection."""
        now = time.monotonic()
        if self._pinged_at is None:
            self._pubsub.ping()
            self._pinged_at = now
        elif now - self._pinged_at > self._timeout:
            raise redis.TimeoutError("No answer to a PING in a channel")


def _is_outage(error: Exception) -> bool:
    """Whether the server is down, rather than refusing a command."""
    outages = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, OSError)
    return isinstance(error, outages)
