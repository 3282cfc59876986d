"""The interface of SQL databases: ``read`` and ``write`` with functions that run statements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Database(Protocol):
    """The part of a peewee ``Database`` that we use."""

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        """Run a statement and return the driver's cursor."""

    def close(self) -> bool:
        """Close the connection; the next statement opens it again."""


class SqlConnection(ABC):
    """A database, shared by all greenlets or threads of a process and usable after a fork.

    The functions passed to ``read``, ``write`` and ``migrate`` get a peewee ``Database``. They
    must not sleep, begin or end transactions, keep a cursor, or call ``read`` or ``write``.
    Their own exceptions reach the caller. They must not swallow exceptions of the database,
    which end the transaction. They may be called again after a server undid their work.

    These methods raise ``Unavailable`` if the database fails, and ``StorageFull`` if its disk is
    full; the log has the reason.
    """

    #: ``sqlite``, ``postgres`` or ``mysql``.
    kind: str

    #: The driver's placeholder.
    placeholder: str

    #: The expression for the time by the database's clock: seconds since 1970 as a
    #: floating-point number with a precision of 10 ms.
    now: str

    #: What to append to a SELECT to lock its rows until the transaction ends; empty if the
    #: database has one writer at a time.
    for_update: str

    def statement(self, sql: str) -> str:
        """Return a statement with the driver's placeholder in place of each ``?``."""
        return sql.replace("?", self.placeholder)

    @abstractmethod
    def __str__(self) -> str:
        """Return a name for logs, without secrets."""

    @abstractmethod
    def prepare(self) -> None:
        """Create the database if it can be created. May be called by several processes at once.

        :raises ConfigurationError: if it cannot be used.
        """

    @abstractmethod
    def read(self, fn: Callable[[Database], T]) -> T:
        """Return the result of `fn`, which sees all committed writes of all processes."""

    @abstractmethod
    def write(self, fn: Callable[[Database], T]) -> T:
        """Run `fn` in a transaction and return its result after the commit.

        An exception of `fn` undoes its own writes only. `fn` may run again after its writes
        were undone.
        """

    @abstractmethod
    def migrate(self, fn: Callable[[Database], T]) -> T:
        """Run `fn`, which creates tables, under a lock among all processes.

        If it fails or the process dies, some databases keep the tables created so far.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connections of this process after their use; ``read`` and ``write`` open
        new ones.
        """
