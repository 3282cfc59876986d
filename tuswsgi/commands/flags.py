"""The flags and exit codes that commands share. A configured command has a flag for each option."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tuswsgi.config.loading import Config
    from tuswsgi.core.options import Option

#: Returns the configuration, or raises ``ConfigurationError``.
Load = Callable[[], "Config"]

FileArgument = partial(click.Path, path_type=Path, dir_okay=False)


class ConfiguredCommand(click.Command):
    """A command with a flag for each option of the server.

    Its callback gets ``load``, a function that returns the configuration with these flags.
    """

    @cached_property
    def _flags(self) -> list[tuple[str, list[click.Parameter]]]:
        from tuswsgi.config.groups import option_groups
        from tuswsgi.core.options import options_of, title

        return [
            (title(group), [_flag(option) for option in options_of(group)])
            for group in option_groups()
        ]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        flags = [flag for _, group in self._flags for flag in group]
        return [*super().get_params(ctx), *flags]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, parameters in [("Options", super().get_params(ctx)), *self._flags]:
            records = [parameter.get_help_record(ctx) for parameter in parameters]
            if any(records):
                with formatter.section(title):
                    formatter.write_dl([record for record in records if record])

    def invoke(self, ctx: click.Context) -> Any:
        from tuswsgi.config.loading import Config

        file = ctx.params.pop("config")
        keys = [flag.name for _, group in self._flags for flag in group]
        given = {str(key): _joined(ctx.params.pop(str(key))) for key in keys}
        flags = {key: value for key, value in given.items() if value is not None}
        ctx.params["load"] = partial(Config.load, file, os.environ, flags)
        return super().invoke(ctx)


config_option = click.option(
    "-c",
    "--config",
    type=FileArgument(),
    envvar="TUSWSGI_CONFIG",
    help="The INI file to read.  [env: TUSWSGI_CONFIG]",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def failing(exit_code: int) -> Iterator[None]:
    """Print a ``ConfigurationError`` and exit."""
    from tuswsgi.core.errors import ConfigurationError

    try:
        yield
    except ConfigurationError as error:
        click.echo(str(error), err=True)
        sys.exit(exit_code)


@contextmanager
def configured(load: Load) -> Iterator[Config]:
    """Load the configuration for a command that works on the stores of running servers.

    The exit code is 2 if the configuration is wrong, and 1 if a store cannot be used.
    """
    with failing(exit_code=2):
        config = load()
    from tuswsgi.core.errors import TusError, Unavailable

    try:
        with failing(exit_code=1):
            yield config
    except TusError as error:
        text = str(error)
        if text == Unavailable.message:  # which is for clients
            text = f"A store is not available: {error.__cause__ or 'the log says why.'}"
        raise click.ClickException(text) from error


def _flag(option: Option) -> click.Option:
    from tuswsgi.core.options import Items, Switch

    is_switch = isinstance(option.field, Switch)
    names = [
        f"{name}/--no-{name[2:]}" if is_switch and name.startswith("--") else name
        for name in option.flags
    ]
    default = option.show(option.default)
    facts = [f"default: {default}"] if default else []
    facts.append(f"env: {option.variables[0]}")
    return click.Option(
        [*names, option.key],
        default=None,
        multiple=isinstance(option.field, Items),
        metavar=None if is_switch else _metavar(option),
        help=f"{option.help}  [{'; '.join(facts)}]",
    )


def _metavar(option: Option) -> str:
    if "|" not in option.kind:
        return option.kind.upper()
    return option.kind if len(option.kind) < 32 else "NAME"


def _joined(value: Any) -> Any:
    """Return the value of a flag; values of a repeated flag are joined as in the INI file."""
    if isinstance(value, tuple):
        return ",".join(value) if value else None
    return value
