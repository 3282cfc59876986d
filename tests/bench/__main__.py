"""The command line of the benchmark."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import click

from tests.bench import report
from tests.bench.peers import PEERS, ExternalPeer, Peer, Unavailable, make_certificate
from tests.bench.rounds import Plan, Step
from tests.bench.wire import Target
from tests.bench.workloads import WORKLOADS, GiB, Workload

#: How much smaller than the full sizes those of ``--quick`` are.
QUICK = 1 / 16
#: What one server has on the disk at the same time, at most: four parts and their sum.
_DISK = 2 * GiB


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not (name and value):
        raise click.BadParameter(f"{text} is not NAME=VALUE.")
    return name, value


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("workloads", nargs=-1, type=click.Choice(list(WORKLOADS)))
@click.option("--rounds", default=5, type=click.IntRange(1, 100), help="How many.  [default: 5]")
@click.option("--quick", is_flag=True, help="Small sizes: to see that it works, not to compare.")
@click.option(
    "--server", "servers", multiple=True, type=click.Choice(list(PEERS)),
    help="Start only these.  [default: all]",
)  # fmt: skip
@click.option(
    "--peer", "urls", multiple=True, type=_pair, metavar="NAME=URL",
    help="Add a server that runs already; a second time with https for the TLS upload.",
)  # fmt: skip
@click.option(
    "--peer-pid", "pids", multiple=True, type=_pair, metavar="NAME=PID",
    help="Its process, to measure CPU and memory; can be repeated.",
)  # fmt: skip
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where servers keep uploads.  [default: the temporary directory]",
)  # fmt: skip
@click.option(
    "--disk", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A directory on a disk, for downloads that are not in memory.  [default: as --dir]",
)  # fmt: skip
@click.option(
    "--cache", type=click.Path(path_type=Path), default="~/.cache/tuswsgi-bench",
    help="Where peers are installed.  [default: ~/.cache/tuswsgi-bench]",
)  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Save all figures.")
@click.option("--chart", type=click.Path(path_type=Path), help="Draw a chart (PNG).")
@click.option(
    "--again", type=click.Path(path_type=Path, exists=True), metavar="FILE",
    help="Run nothing; show what --json saved.",
)  # fmt: skip
def main(
    workloads: Sequence[str],
    rounds: int,
    quick: bool,
    servers: Sequence[str],
    urls: Sequence[tuple[str, str]],
    pids: Sequence[tuple[str, str]],
    directory: Path | None,
    disk: Path | None,
    cache: Path,
    json_file: Path | None,
    chart: Path | None,
    again: Path | None,
) -> None:
    """Compare tuswsgi with other tus servers, all under the same load.

    WORKLOADS: any of patch, streams, paced, checksum, get, get-disk, slow, post, head, tls, concat,
    latency; all of them if none is named.
    """
    if chart and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("The chart needs matplotlib: pip install -e '.[bench]'")
    if again:
        figures = json.loads(again.read_text())
    else:
        external = _external(urls, pids)
        peers, left_out = _peers(servers or list(PEERS), cache.expanduser())
        peers += external
        if not peers:
            raise click.ClickException(f"No server is left: {left_out}")
        scale = QUICK if quick else 1.0
        chosen = [WORKLOADS[key](scale) for key in workloads or WORKLOADS]
        with _directory(directory) as base, _directory(disk or directory) as disk_base:
            figures = _run(chosen, peers, left_out, rounds, base, disk_base)
    click.echo(report.tables(figures))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if chart:
        report.draw(figures, chart)


def _run(
    workloads: list[Workload],
    peers: list[Peer],
    left_out: dict[str, str],
    rounds: int,
    directory: Path,
    disk: Path,
) -> report.Json:
    if min(shutil.disk_usage(path).free for path in (directory, disk)) < _DISK * len(peers):
        raise click.ClickException(f"Less than {_DISK * len(peers) // GiB} GiB are free here.")
    _raise_file_limit()
    plan = Plan(workloads, peers, rounds, directory, disk, make_certificate(directory))
    with (
        closing(plan.steps()) as steps,
        click.progressbar(steps, len(plan), item_show_func=_show, file=sys.stderr) as bar,
    ):
        for step in bar:
            if not sys.stderr.isatty():
                click.echo(str(step), err=True)
            step.run()
    return report.collect(plan.results, peers, left_out, rounds, directory)


def _show(step: Step | None) -> str:
    return str(step or "")


def _peers(names: Sequence[str], cache: Path) -> tuple[list[Peer], dict[str, str]]:
    peers, left_out = [], {}
    for name in names:
        click.echo(f"Getting {name} ready", err=True)
        try:
            peers.append(PEERS[name](cache))
        except Unavailable as error:
            left_out[name] = str(error)
            click.echo(f"{name} is left out: {error}", err=True)
    return peers, left_out


def _external(
    urls: Sequence[tuple[str, str]], pids: Sequence[tuple[str, str]]
) -> list[ExternalPeer]:
    try:
        return [
            ExternalPeer(
                name,
                tuple(Target.parse(url) for other, url in urls if other == name),
                tuple(int(pid) for other, pid in pids if other == name),
            )
            for name in dict.fromkeys(name for name, _ in urls)
        ]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@contextmanager
def _directory(parent: Path | None) -> Iterator[Path]:
    # SIGTERM ends the benchmark as Ctrl-C does, with all that it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = Path(tempfile.mkdtemp(prefix="tuswsgi-bench-", dir=parent))
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _raise_file_limit() -> None:
    # 2,000 connections have as many descriptors on either side.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main(prog_name="python -m tests.bench")
