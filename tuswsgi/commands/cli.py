"""The command line: ``tuswsgi serve``, ``config``, ``hooks``, ``info``, ``db`` and ``upload``.

It defines flags, output and exit codes (2 for a wrong configuration, 1 for other failures).
Commands import what they need when they run, so that ``--help`` is quick and gevent patches
before anything else is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuswsgi.commands.flags import (
    ConfiguredCommand,
    FileArgument,
    Load,
    config_option,
    configured,
    failing,
    json_option,
)
from tuswsgi.commands.uploads import gc, uploads

if TYPE_CHECKING:
    from tuswsgi.connections.sql import SqlConnection
    from tuswsgi.infostores.base import InfoStore


class ServeCommand(ConfiguredCommand):
    """The one command that runs under gevent."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        # Before anything else is imported: a module that holds an unpatched socket, lock or
        # sleep would block all connections of a worker.
        from gevent import monkey

        monkey.patch_all()
        return super().make_context(*args, **kwargs)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from tuswsgi.core.version import installed_version

        click.echo(f"tuswsgi {installed_version()}")
        ctx.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """A tus server: resumable uploads over HTTP."""


@main.command(cls=ServeCommand)
@config_option
def serve(load: Load) -> None:
    """Run the server.

    An option can be set by a flag, an environment variable or the INI file, in this order of
    precedence.
    """
    with failing(exit_code=2):
        from tuswsgi.serving.master import Master

        master = Master(load)
    with failing(exit_code=1):
        master.check()
    master.run()


@main.group()
def config() -> None:
    """Check, show and document the configuration."""


@config.command(cls=ConfiguredCommand)
@config_option
def check(load: Load) -> None:
    """Report all mistakes in the configuration."""
    with failing(exit_code=2):
        from tuswsgi.config.backends import Backends
        from tuswsgi.serving.settings import gunicorn_settings

        configuration = load()
        gunicorn_settings(configuration)
        Backends(configuration).check_directories()
    for warning in configuration.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo("The configuration is correct.")


@config.command(cls=ConfiguredCommand)
@config_option
def show(load: Load) -> None:
    """Show the value of each option, and where it comes from."""
    with failing(exit_code=2):
        configuration = load()
    from tuswsgi.config.reference import configured

    click.echo(configured(configuration), nl=False)


@config.command()
@click.option("--check", is_flag=True, help="Only check whether the files are up to date.")
@click.option("--stdout", is_flag=True, help="Print the files instead of writing them.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("conf"),
    help="Where the files are.  [default: conf]",
)
def docs(check: bool, stdout: bool, directory: Path) -> None:
    """Write the reference of all options: README.md and tuswsgi.ini."""
    from tuswsgi.config import reference

    files = {directory / name: text for name, text in reference.files().items()}
    if stdout:
        click.echo("\n".join(files.values()), nl=False)
    elif check:
        stale = "".join(reference.difference(file, text) for file, text in files.items())
        click.echo(stale, nl=False)
        sys.exit(1 if stale else 0)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            file.write_text(text, "utf-8")


@main.group()
def hooks() -> None:
    """List and replay undelivered post-hooks.

    The server may run meanwhile.
    """


@hooks.command(cls=ConfiguredCommand)
@config_option
@json_option
def pending(load: Load, as_json: bool) -> None:
    """List the post-hooks that wait for delivery, oldest first."""
    from tuswsgi.commands import events

    with _events(load) as infos:
        click.echo((events.as_json if as_json else events.as_table)(events.pending(infos)))


@hooks.command(cls=ConfiguredCommand)
@config_option
@json_option
def dead(load: Load, as_json: bool) -> None:
    """List the dead letters: post-hooks whose delivery was given up, oldest first."""
    from tuswsgi.commands import events

    with _events(load) as infos:
        click.echo((events.as_json if as_json else events.as_table)(events.dead(infos)))


@hooks.command(cls=ConfiguredCommand)
@config_option
@click.argument("id", required=False)
def replay(load: Load, id: str | None) -> None:
    """Deliver dead letters again.

    ID is that of a post-hook or of an upload. Without it all dead letters are delivered again.
    """
    from tuswsgi.commands import events

    with _events(load) as infos:
        count = events.replay(infos, id)
    if id is not None and not count:
        raise click.ClickException(f"There is no dead letter with the ID {id}.")
    click.echo(f"{count} will be delivered again.")


@contextmanager
def _events(load: Load) -> Iterator[InfoStore]:
    with configured(load) as config:
        from tuswsgi.commands import events

        with events.opened(config) as infos:
            yield infos


@main.group()
def db() -> None:
    """Create and upgrade tables of SQL databases.

    The server does it by itself when it starts.
    """


@db.command("version", cls=ConfiguredCommand)
@config_option
def db_version(load: Load) -> None:
    """Print the version of the tables, and the one that this program needs."""
    from tuswsgi.connections.tables import SCHEMA, version

    with _databases(load, must_exist=True) as databases:
        for database in databases:
            database.prepare()
            found = version(database)
            tables = f"tables of version {found}" if found else "no tables"
            click.echo(f"{database}: {tables}; this program needs version {SCHEMA}.")


@db.command(cls=ConfiguredCommand)
@config_option
def upgrade(load: Load) -> None:
    """Create the tables, or upgrade older ones."""
    from tuswsgi.connections.tables import SCHEMA, prepare_tables

    with _databases(load) as databases:
        for database in databases:
            prepare_tables(database)
            click.echo(f"{database}: tables of version {SCHEMA}.")


@contextmanager
def _databases(load: Load, *, must_exist: bool = False) -> Iterator[Sequence[SqlConnection]]:
    with configured(load) as config:
        from tuswsgi.config.backends import Backends

        backends = Backends(config)
        if must_exist:
            backends.check_records()
        databases = backends.databases()
        if not databases:
            raise click.ClickException("No SQL database is configured.")
        yield databases


@main.group()
def info() -> None:
    """Copy the records of uploads."""


@info.command(cls=ConfiguredCommand)
@config_option
@click.option("--from", "source", metavar="DSN", help="The store to copy from.")
@click.option("--to", "target", metavar="DSN", help="The store to copy to.")
@click.option(
    "--overwrite", is_flag=True, help="Replace records of the target that differ, and their hooks."
)
@click.option(
    "--without-files",
    is_flag=True,
    help="Copy finished uploads of rustus even if their files are missing.",
)
def copy(
    load: Load,
    source: str | None,
    target: str | None,
    overwrite: bool,
    without_files: bool,
) -> None:
    """Copy the records of all uploads and their undelivered post-hooks to another store.

    A DSN is file:///directory or written as in --info-db-dsn; --from also takes the records of
    rustus, as rustus+file:///info-dir or rustus+redis://host:6379, with rustus' data directory
    as --data-dir. The default is the configured store. Stop the servers first. The source is
    not changed. Run the command again if it was interrupted.
    """
    if source == target:
        raise click.UsageError("Give --from or --to: source and target are the same store.")
    with configured(load) as config:
        from tuswsgi.commands import copy
        from tuswsgi.core.display import printable

        click.echo("Keep the servers of both stores stopped until this has ended.", err=True)
        options = {"overwrite": overwrite, "without_files": without_files}
        with copy.opened(config, source, target, **options) as one:
            try:
                one.run(lambda ids, name: click.progressbar(ids, label=name, file=sys.stderr))
            finally:
                click.echo("\n".join(map(printable, one.report.lines())))
    sys.exit(0 if one.report.is_complete else 1)


main.add_command(gc)
main.add_command(uploads)


def _headers(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> Mapping[str, str]:
    headers = {}
    for text in values:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isprintable():
            # The value may be a secret.
            raise click.BadParameter("Not a header such as 'Authorization: Bearer ...'.")
        headers[name.strip()] = value.strip()
    return headers


@main.command()
@click.argument("file", type=FileArgument(exists=True))
@click.argument("url")
@click.option("--chunk-size", default="8MiB", help="The size of a request.  [default: 8MiB]")
@click.option(
    "--header",
    "headers",
    metavar="'NAME: VALUE'",
    multiple=True,
    callback=_headers,
    help="Send this header to the server, e.g. 'Authorization: Bearer ...'; repeatable.",
)
@click.option("--retries", default=8, help="How many attempts in a row may fail.  [default: 8]")
@click.option(
    "--state",
    type=FileArgument(),
    default=Path("~/.cache/tuswsgi/uploads.json"),
    help="The file with the URLs of unfinished uploads.  [default: ~/.cache/tuswsgi/uploads.json]",
)
def upload(
    file: Path,
    url: str,
    chunk_size: str,
    headers: Mapping[str, str],
    retries: int,
    state: Path,
) -> None:
    """Upload a file, or resume its upload.

    URL is where the server creates uploads, e.g. localhost:1081/files/ or
    https://example.org/files/.
    """
    try:
        from tuswsgi.commands.client import Remembered, Upload, UploadFailed
    except ImportError as error:
        text = "This needs tuspy: pip install 'tuswsgi-server[client]'"
        raise click.ClickException(text) from error
    from tuswsgi.core.display import printable

    with click.progressbar(
        length=1, label=file.name, file=sys.stderr, item_show_func=lambda speed: speed
    ) as bar:
        began: tuple[float, int] | None = None

        def progress(offset: int, length: int) -> None:
            nonlocal began
            began = began or (time.monotonic(), offset)
            seconds = time.monotonic() - began[0]
            speed = f"{(offset - began[1]) / seconds / 1e6:.1f} MB/s" if seconds else None
            bar.length = length
            bar.update(offset - bar.pos, speed)

        one = Upload(
            file=file,
            url=url if "://" in url else f"http://{url}",
            remembered=Remembered(state.expanduser()),
            chunk_size=_size(chunk_size),
            headers=headers,
            retries=retries,
            progress=progress,
            say=lambda sentence: click.echo(f"\n{sentence}", err=True),
        )
        try:
            location = one.run()
        except (UploadFailed, OSError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as error:
            text = "The upload was interrupted. Run the same command again to resume it."
            raise click.ClickException(f"\n{text}") from error
    click.echo(printable(location))


def _size(text: str) -> int:
    from marshmallow import ValidationError

    from tuswsgi.core.options import Size

    try:
        size = Size().deserialize(text)
    except ValidationError as error:
        raise click.BadParameter(" ".join(error.messages), param_hint="--chunk-size") from error
    return max(size, 1)
