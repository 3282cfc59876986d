"""The commands ``tuswsgi gc`` and ``tuswsgi uploads``: their flags and output.

They work while servers run.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import click

from tuswsgi.commands.flags import (
    ConfiguredCommand,
    Load,
    config_option,
    configured,
    json_option,
)

if TYPE_CHECKING:
    from tuswsgi.commands.listing import Wanted
    from tuswsgi.config.loading import Config
    from tuswsgi.protocol.cleanup import Removal
    from tuswsgi.protocol.uploads import Uploads


@click.command(cls=ConfiguredCommand)
@config_option
@click.option("--dry-run", is_flag=True, help="Only list what would be removed or moved.")
@click.option(
    "--quarantine-many",
    is_flag=True,
    help="Move files without a record to the quarantine even if there are many of them.",
)
def gc(load: Load, dry_run: bool, quarantine_many: bool) -> None:
    """Clean up now, as the servers do regularly.

    The section gc of the configuration says which uploads are removed. Uploads in use stay.
    """
    with _uploads(load) as (config, uploads):
        from tuswsgi.protocol.cleanup import CleanUp, CleanUpSettings, TooManyStrays

        found: list[Removal] = []
        failure: TooManyStrays | None = None
        with _progress("Looking") as step:
            clean_up = CleanUp(
                uploads,
                config.build(CleanUpSettings),
                dry_run=dry_run,
                quarantine_many=quarantine_many,
                on_look=step,
            )
            for search in clean_up.searches():
                try:
                    for removal in search.removals():
                        found.append(removal)
                except TooManyStrays as error:
                    failure = error
    if dry_run and found:
        click.echo(_listed(found))
    for line in _summaries(found, dry_run=dry_run):
        click.echo(line)
    if failure is not None:
        raise click.ClickException(str(failure))


@click.group()
def uploads() -> None:
    """List, show and remove uploads.

    The server may run meanwhile.
    """


def _parse(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Parse a size or a duration as the configuration does."""
    from marshmallow import ValidationError

    from tuswsgi.core.options import Duration, Size

    if value is None:
        return None
    try:
        return (Size() if param.metavar == "SIZE" else Duration()).deserialize(value)
    except ValidationError as error:
        raise click.BadParameter(" ".join(map(str, error.messages))) from error


_duration = partial(click.option, metavar="DURATION", callback=_parse)
_size = partial(click.option, metavar="SIZE", callback=_parse)


_STATES = ("receiving", "waiting", "finished", "refused", "terminated", "expired")


@uploads.command("list", cls=ConfiguredCommand)
@config_option
@json_option
@click.option(
    "--state",
    "states",
    type=click.Choice(_STATES),
    multiple=True,
    help="In this state; repeatable.",
)
@click.option("--partial", "is_partial", is_flag=True, help="Only partial uploads.")
@click.option("--final", "is_final", is_flag=True, help="Only final uploads.")
@_duration("--older-than", help="Created at least this long ago, e.g. 7d.")
@click.option("--owner", help="Of this owner.")
@_size("--larger-than", help="Of at least this size, e.g. 1GiB.")
@_size("--smaller-than", help="Of at most this size.")
@click.option(
    "--metadata", "pairs", metavar="KEY=VALUE", multiple=True, help="With this pair; repeatable."
)
def list_(load: Load, as_json: bool, **filters: Any) -> None:
    """List uploads, including tombstones. With --json, each is an object on a line."""
    from tuswsgi.commands import listing

    wanted = _wanted(**filters)
    # Lines that appear one by one are a progress bar of their own.
    is_shown = as_json and sys.stdout.isatty()
    with _uploads(load) as (_, found), _progress("Looking", hidden=is_shown) as step:
        infos = listing.find(found, wanted, step)
        if as_json:
            for info in infos:
                click.echo(listing.as_json(info))
            return
        table = listing.as_table(list(infos))
    click.echo(table)


@uploads.command(cls=ConfiguredCommand)
@config_option
@json_option
@click.argument("id")
def show(load: Load, as_json: bool, id: str) -> None:
    """Show the upload ID in full."""
    from tuswsgi.commands.listing import Details
    from tuswsgi.core.errors import UploadNotFound

    with _uploads(load) as (_, found):
        try:
            details = Details.of(found, id)
        except UploadNotFound as error:
            raise click.ClickException(f"There is no upload {id}.") from error
    click.echo(details.as_json() if as_json else details.as_text())


@uploads.command(cls=ConfiguredCommand)
@config_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def rm(load: Load, yes: bool, ids: Sequence[str]) -> None:
    """Remove uploads as a DELETE does, regardless of their owners.

    An upload that is being received is stopped.
    """
    from tuswsgi.commands import listing

    if not yes:
        count = "this upload" if len(ids) == 1 else f"these {len(ids)} uploads"
        click.confirm(f"Remove {count} for good?", abort=True, err=True)
    failed = 0
    with _uploads(load) as (_, found):
        for id in ids:
            failure = listing.remove(found, id)
            failed += failure is not None
            click.echo(f"{id}: {failure or 'removed'}", err=failure is not None)
    sys.exit(1 if failed else 0)


def _wanted(
    states: Sequence[str],
    is_partial: bool,
    is_final: bool,
    older_than: float | None,
    owner: str | None,
    larger_than: int | None,
    smaller_than: int | None,
    pairs: Sequence[str],
) -> Wanted:
    from tuswsgi.commands.listing import Kind, Wanted
    from tuswsgi.core.info import State

    kinds = {Kind.PARTIAL: is_partial, Kind.FINAL: is_final}
    for pair in pairs:
        if "=" not in pair:
            raise click.BadParameter(f"{pair}: not KEY=VALUE.", param_hint="--metadata")
    return Wanted(
        states=frozenset(map(State, states)) or None,
        kinds=frozenset(kind for kind, is_wanted in kinds.items() if is_wanted) or None,
        before=None if older_than is None else time.time() - older_than,
        owner=owner,
        metadata={key: text for key, _, text in (pair.partition("=") for pair in pairs)},
        smallest=larger_than,
        largest=smaller_than,
    )


@contextmanager
def _uploads(load: Load) -> Iterator[tuple[Config, Uploads]]:
    with configured(load) as config:
        from tuswsgi.commands import listing

        with listing.opened(config) as found:
            yield config, found


@contextmanager
def _progress(label: str, *, hidden: bool = False) -> Iterator[Callable[[], None]]:
    """Show a counter on a terminal; yields a function that counts one more."""
    if hidden or not sys.stderr.isatty():
        yield lambda: None
        return
    # The total is unknown until the end.
    things: Iterator[int] = count()
    with click.progressbar(
        things, label=label, file=sys.stderr, show_pos=True, update_min_steps=100
    ) as bar:
        yield partial(bar.update, 1)


def _listed(removed: Sequence[Removal]) -> str:
    from tuswsgi.commands.table import span, table

    rows = [(one.id, str(one.reason), span(one.age), str(one.bytes)) for one in removed]
    return table([("ID", "REASON", "AGE", "BYTES"), *rows])


def _summaries(found: Sequence[Removal], *, dry_run: bool) -> Iterator[str]:
    removed = [one for one in found if one.is_for_good]
    moved = [one for one in found if not one.is_for_good]
    if removed or not moved:
        yield _summary(removed, "would be removed" if dry_run else "removed")
    if moved:
        yield _summary(moved, f"{'would be moved' if dry_run else 'moved'} to the quarantine")


def _summary(removed: Sequence[Removal], what: str) -> str:
    if not removed:
        return f"Nothing {what.replace('would be', 'would have been')}."
    counts = Counter(str(one.reason) for one in removed)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{len(removed)} {what} ({reasons}), {sum(one.bytes for one in removed)} bytes."
