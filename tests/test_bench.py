"""The benchmark runs, and reports what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")

ROOT = Path(__file__).parents[1]


def bench(*arguments: object) -> str:
    command = [sys.executable, "-m", "tests.bench", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(table: str, unit: str) -> list[str]:
    """Return the cells of the row that has the unit."""
    line = next(line for line in table.splitlines() if f"| {unit} " in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_it_measures_ours_and_compares_it_with_others(tmp_path):
    file = tmp_path / "figures.json"
    table = bench(
        "post", "--quick", "--rounds", 1, "--server", "tuswsgi", "--dir", tmp_path, "--json", file
    )
    figures = json.loads(file.read_text())
    (result,) = figures["results"]
    assert result["missing"] == ""
    assert result["results"][0] > 0
    assert result["cpu"][0] > 0
    assert row(table, "requests/s")[0] == "POST with 1 KiB and metadata, 16 connections"
    assert list(tmp_path.iterdir()) == [file]

    # A server with half of our speed that spends twice as much, as tusd's figures are known by.
    other = {
        **result,
        "server": "@tus/server",
        "results": [result["results"][0] / 2],
        "cpu": [result["cpu"][0] * 2],
    }
    figures["results"].append(other)
    figures["versions"]["@tus/server"] = "2"
    file.write_text(json.dumps(figures))
    table = bench("--again", file)
    assert row(table, "requests/s")[-1].endswith("(2.00x)")
    assert row(table, "us/request")[-2].endswith("(0.50x)")
    assert row(table, "us/request")[-1] == f"{0.5 * 2168 / 466:.2f}x"


def test_a_checksummed_upload_is_held_against_its_hash(tmp_path):
    table = bench("checksum", "--quick", "--rounds", 1, "--server", "tuswsgi", "--dir", tmp_path)
    assert row(table, "MB/s ↑")[0] == "checksummed PATCH of 32 MiB"
    share = row(table, "of its speed ↑")
    assert share[0] == "… against SHA-1 alone"
    assert 0 < float(share[2].partition("x of ")[0]) < 1
