"""What came out: as JSON, as tables in Markdown, and as a chart.

The JSON holds all of it; tables and chart are drawn from the JSON alone, so that both can be
drawn again without another run.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import spread
from tests.bench.peers import OURS, Peer
from tests.bench.rounds import Result

#: By workload: what tusd v2 and @tus/server spent side by side on one machine, in the
#: workload's unit of CPU. Where tusd is not at hand, its CPU on this machine is what
#: @tus/server spends here, times the first figure, divided by the second one.
TUSD_AND_NODE = {
    "patch": (0.81, 1.96),
    "post": (466.0, 2168.0),
    "head": (311.0, 531.0),
}
_NODE = "@tus/server"

_COLOURS = ("#1f77b4", "#7f9f5f", "#c99a3f", "#a0705f", "#8a7fb0", "#6f9f9f")

Json = dict[str, Any]


def collect(
    results: Sequence[Result], peers: Sequence[Peer], left_out: Json, rounds: int, directory: Path
) -> Json:
    """Return all that is known after a run."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(directory),
        "rounds": rounds,
        "versions": {peer.name: peer.version for peer in peers},
        "left_out": left_out,
        "results": [_result(result) for result in results],
    }


def tables(report: Json) -> str:
    """Return the report in Markdown."""
    parts = [
        f"{report['date']}, {_describe(report['machine'])}; medians of {report['rounds']} rounds, "
        "± half of the distance between the extremes.",
        _table(report, "results", "unit", "workload"),
        _table(report, "cpu", "cpu_unit", "CPU of all processes", _against_tusd),
        _load_generator(report),
        "In brackets: ours divided by theirs. ↑ more is better, ↓ less is better.",
        "\n".join(f"- {name} {version}" for name, version in report["versions"].items()),
        "\n".join(_missing(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(report: Json, path: Path) -> None:
    """Draw the report as bars: results on the left, CPU on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = _workloads(report)
    figure, axes = pyplot.subplots(
        len(keys), 2, figsize=(13, 0.6 + len(keys) * (0.75 + 0.22 * len(report["versions"]))),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for (left, right), key in zip(axes, keys, strict=True):
        _bars(left, report, key, "results", "unit")
        _bars(right, report, key, "cpu", "cpu_unit")
    versions = [f"{name} {version}" for name, version in report["versions"].items()]
    title = f"Uploads over tus: {OURS} and others, {report['date']}\n"
    figure.suptitle(title + _describe(report["machine"]) + "\n" + "\n".join(versions), fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _result(result: Result) -> Json:
    workload = result.workload
    cpu = [sample.cpu for sample in result.samples if sample.cpu is not None]
    return {
        "workload": workload.key,
        "title": workload.title,
        "server": result.server,
        "unit": workload.unit,
        "more_is_better": workload.more_is_better,
        "results": [sample.value for sample in result.samples],
        "bound": workload.bound,
        "bounds": [sample.bound for sample in result.samples if sample.bound is not None],
        "cpu_unit": workload.cpu_unit,
        "cpu": cpu if workload.cpu_unit else [],
        "load_generator": [round(sample.load, 3) for sample in result.samples],
        "missing": result.missing,
    }


def _machine(directory: Path) -> Json:
    return {
        "processors": len(os.sched_getaffinity(0)),
        "model": _line_of(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "file_system": _file_system(directory),
    }


def _line_of(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _file_system(directory: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if directory.resolve().is_relative_to(mount[0])]
    return max(above, key=lambda mount: len(mount[0]))[1]


def _describe(machine: Json) -> str:
    return "{processors} processors ({model}), {system}, {file_system}".format(**machine)


def _workloads(report: Json) -> list[str]:
    return list(dict.fromkeys(result["workload"] for result in report["results"]))


def _by_server(report: Json, key: str) -> dict[str, Json]:
    return {r["server"]: r for r in report["results"] if r["workload"] == key}


def _table(
    report: Json,
    values: str,
    unit: str,
    first: str,
    last: Callable[[dict[str, Json]], str] | None = None,
) -> str:
    servers = list(report["versions"])
    head = [first, "unit", *servers]
    if _NODE not in servers or "tusd" in servers:
        last = None  # there is nothing to derive it from, or no need to
    if last:
        head.append("against tusd (through @tus/server)")
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for key in _workloads(report):
        row = _by_server(report, key)
        some = next(iter(row.values()))
        if not any(result[values] for result in row.values()):
            continue
        arrow = "↑" if values == "results" and some["more_is_better"] else "↓"
        cells = [_cell(row, server, values) for server in servers]
        lines.append([some["title"], f"{some[unit]} {arrow}", *cells])
        if last:
            lines[-1].append(last(row))
        if values == "results" and some.get("bound"):
            lines.append([f"… against {some['bound']}", "of its speed ↑"])
            lines[-1] += [_share(row, server) for server in servers]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if len(lines) > 2 else ""


def _cell(row: dict[str, Json], server: str, values: str) -> str:
    if server not in row or not row[server][values]:
        return "-"
    found = row[server][values]
    text = f"{_number(statistics.median(found))} ±{spread(found):.0%}"
    ratio = _ratio(row, server, values)
    return f"{text} ({ratio:.2f}x)" if ratio is not None and server != OURS else text


def _ratio(row: dict[str, Json], server: str, values: str) -> float | None:
    if not all(name in row and row[name][values] for name in (OURS, server)):
        return None
    theirs = statistics.median(row[server][values])
    return statistics.median(row[OURS][values]) / theirs if theirs else None


def _share(row: dict[str, Json], server: str) -> str:
    if server not in row or not row[server]["bounds"]:
        return "-"
    bound = statistics.median(row[server]["bounds"])
    share = statistics.median(row[server]["results"]) / bound
    return f"{share:.2f}x of {_number(bound)} {row[server]['unit']}"


def _against_tusd(row: dict[str, Json]) -> str:
    ratio = _ratio(row, _NODE, "cpu")
    tusd, node = TUSD_AND_NODE.get(next(iter(row.values()))["workload"], (0.0, 0.0))
    return f"{ratio * node / tusd:.2f}x" if ratio is not None and tusd else ""


def _missing(report: Json) -> list[str]:
    lines = [f"- left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    for result in report["results"]:
        if result["missing"]:
            lines.append(f"- {result['server']}, {result['title']}: {result['missing']}")
    return lines


def _load_generator(report: Json) -> str:
    shares = [share for result in report["results"] for share in result["load_generator"]]
    if not shares:
        return ""
    return f"The load generator needed at most {max(shares):.0%} of one processor."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(axes: Any, report: Json, key: str, values: str, unit: str) -> None:
    row = _by_server(report, key)
    some = next(iter(row.values()))
    found = {name: result[values] for name, result in row.items() if result[values]}
    if not found:
        axes.set_axis_off()
        return
    names = list(report["versions"])
    medians = {name: statistics.median(measured) for name, measured in found.items()}
    for position, name in enumerate(names):
        colour = _COLOURS[position % len(_COLOURS)]
        value = medians.get(name, 0.0)
        axes.barh(position, value, color=colour, height=0.75)
        text = _number(value) if name in medians else "-"
        axes.text(value, position, f" {text}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(medians.values()) * 1.15)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    better = "more" if values == "results" and some["more_is_better"] else "less"
    what = some["title"] if values == "results" else "CPU"
    axes.set_title(f"{what}: {some[unit]} ({better} is better)", fontsize=9, loc="left")
