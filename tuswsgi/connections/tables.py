"""The tables of the SQL info store, as peewee models, and how they come into being.

This file owns how the tables look and their version; what is done with them is the business
of ``sql`` beside it.
"""

from __future__ import annotations

from typing import cast

import peewee

from tuswsgi.connections.sql import Database
from tuswsgi.errors import ConfigurationError

#: The version of the tables below.
SCHEMA = 1


class Schema(peewee.Model):
    """One row: the version of the tables."""

    id = peewee.IntegerField(primary_key=True)
    version = peewee.IntegerField()

    class Meta:
        table_name = "tuswsgi_schema"


class Upload(peewee.Model):
    """One record. The columns beside it are what is searched for and compared."""

    id = peewee.CharField(max_length=128, primary_key=True)
    state = peewee.CharField(max_length=16)
    sequence = peewee.BigIntegerField()
    created_at = peewee.DoubleField()
    #: When the clean-up shall come, so nothing once the upload is finished or gone.
    expires_at = peewee.DoubleField(null=True)
    finished_at = peewee.DoubleField(null=True)
    deleted_at = peewee.DoubleField(null=True)
    record = peewee.TextField()

    class Meta:
        table_name = "tuswsgi_uploads"
        indexes = ((("state", "id"), False),)
        # Each page that a write touches is written: the fewer trees, the better.
        without_rowid = True


# Most uploads are finished, or never expire.
Upload.add_index(Upload.expires_at, where=Upload.expires_at.is_null(False))


class PendingEvent(peewee.Model):
    """One event; its number tells the order of events that were written together."""

    number = peewee.BigAutoField()
    upload = peewee.CharField(max_length=128)
    transport = peewee.CharField(max_length=32)
    sequence = peewee.BigIntegerField()
    event_id = peewee.CharField(max_length=128)
    type = peewee.CharField(max_length=32)
    created_at = peewee.DoubleField()
    payload = peewee.TextField()
    due_at = peewee.DoubleField()
    attempts = peewee.IntegerField()
    error = peewee.TextField(null=True)
    dead = peewee.BooleanField()
    claimed_by = peewee.CharField(max_length=128, null=True, index=True)
    claimed_until = peewee.DoubleField()
    #: When it may be claimed: it is due then, and no claim on it holds any more. Nothing for
    #: what is dead or comes after another event of its upload and transport, so that
    #: thousands of those are not looked at each time.
    free_at = peewee.DoubleField(null=True, index=True)

    class Meta:
        table_name = "tuswsgi_events"
        indexes = (
            # An upload has few events, so their order is no part of an index.
            (("upload", "transport", "free_at"), False),
            (("event_id", "transport"), True),
            (("transport", "free_at"), False),
            (("dead", "number"), False),
        )


class Waiting(peewee.Model):
    """A final upload that waits for a part."""

    part = peewee.CharField(max_length=128)
    final = peewee.CharField(max_length=128, index=True)

    class Meta:
        table_name = "tuswsgi_waiting"
        primary_key = peewee.CompositeKey("part", "final")


def make_tables(database: Database) -> None:
    """Create what is missing, in the transaction of a ``SqlConnection.write``.

    :raises ConfigurationError: if the tables are of another version.
    """
    _drop_old_events(database)
    for model in (Schema, Upload, PendingEvent, Waiting):
        peewee.SchemaManager(model, cast(peewee.Database, database)).create_all(safe=True)
    row = database.execute_sql("SELECT version FROM tuswsgi_schema").fetchone()
    if row is None:
        database.execute_sql(f"INSERT INTO tuswsgi_schema (id, version) VALUES (1, {SCHEMA})")
    elif row[0] > SCHEMA:
        raise ConfigurationError(
            f"The info store's tables are of version {row[0]}: a newer tuswsgi made them."
        )


def _drop_old_events(database: Database) -> None:
    """Make way for the table of events if there is one from before the first release."""
    columns = cast(peewee.Database, database).get_columns("tuswsgi_events")
    if not columns or "free_at" in {column.name for column in columns}:
        return
    if database.execute_sql("SELECT 1 FROM tuswsgi_events LIMIT 1").fetchone():
        raise ConfigurationError(
            "The info store's table tuswsgi_events holds events of a tuswsgi from before the "
            "first release; it has to be dropped by hand."
        )
    database.execute_sql("DROP TABLE tuswsgi_events")
