"""Connections to SQL databases, as the backends see them: ``read`` and ``write``.

This file owns what a backend may expect of any of them. How connections are opened, bounded and
shared among greenlets differs from database to database and is the business of the modules beside
this one. Tables and statements belong to the backends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Database(Protocol):
    """What is used of a peewee ``Database``."""

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        """Run a statement and return the driver's cursor."""

    def close(self) -> bool:
        """Close the connection; the next statement opens it again."""


class SqlConnection(ABC):
    """A database for all greenlets or threads of a process, and for its forks.

    The functions that are given to ``read``, ``write`` and ``migrate`` get a peewee
    ``Database``. They must not switch greenlets of their own accord, begin or end
    transactions, keep a cursor, or call ``read`` or ``write`` again. An exception of theirs
    reaches the caller; one of the database they must let pass, or turn into another one,
    since the transaction is over then. They may be called again where a server undid what
    they did.

    The database's own trouble raises ``Unavailable``, or ``StorageFull`` if its disk is
    full; what it said is in the log.
    """

    #: ``sqlite``, ``postgres`` or ``mysql``.
    kind: str

    #: The driver's placeholder.
    placeholder: str

    #: The expression for the present time by the database's own clock, in seconds since 1970
    #: as a floating-point number that is exact to 10 ms.
    now: str

    #: What at the end of a SELECT keeps its rows from other writers until the transaction
    #: ends; nothing where only one can write at a time.
    for_update: str

    def statement(self, sql: str) -> str:
        """Return a statement, written with ``?`` for its parameters, as the driver takes it."""
        return sql.replace("?", self.placeholder)

    @abstractmethod
    def __str__(self) -> str:
        """Return what people call the database; no secrets."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the database ready for use. May be called by several processes at once.

        :raises ConfigurationError: if it cannot be used.
        """

    @abstractmethod
    def read(self, fn: Callable[[Database], T]) -> T:
        """Return what `fn` read. It sees whatever a ``write`` of any process returned."""

    @abstractmethod
    def write(self, fn: Callable[[Database], T]) -> T:
        """Run `fn` in a transaction and return its result once that is committed.

        An exception of `fn` undoes what it did, and nobody else's writes. `fn` may be run
        again after what it did was undone.
        """

    @abstractmethod
    def migrate(self, fn: Callable[[Database], T]) -> T:
        """Run `fn`, which creates or changes tables, while no other process does.

        It may take long. Where the database cannot undo such changes, what `fn` did before
        it failed or died stays done.
        """

    @abstractmethod
    def close(self) -> None:
        """Close what this process holds, after what is under way; ``read`` and ``write``
        open it again.
        """
