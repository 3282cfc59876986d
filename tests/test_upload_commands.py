"""``tuswsgi gc`` and ``tuswsgi uploads``: an operator looks after uploads."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from e2e.client import wait_until
from protocol.client import Client, closing, metadata, path_of

from tuswsgi.app import Tus, create_app
from tuswsgi.commands.cli import main
from tuswsgi.config.loading import Config
from tuswsgi.core.info import FileInfo, State, made_at, new_id
from tuswsgi.lockers.base import HELD
from tuswsgi.testing.datastores import Blocks


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("TUSWSGI_", "RUSTUS_")):
            monkeypatch.delenv(name)


@pytest.fixture(params=["db-info-storage", "file-info-storage"])
def flags(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return ["--data-dir", str(tmp_path), "--info-storage", request.param]


@pytest.fixture
def client(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client of a server that has the uploads open."""
    monkeypatch.setattr(Tus, "_sweep", lambda self: None)
    app = create_app(Config.load(flags={"data_dir": flags[1], "info_storage": flags[3]}))
    with closing(app.extensions["tuswsgi"]) as tus:
        yield Client(app, tus)


def run(*args: str, code: int = 0, input: str | None = None) -> Result:
    result = CliRunner().invoke(main, args, input=input)
    assert result.exit_code == code, result.output
    return result


def listed(flags: list[str], *filters: str) -> list[str]:
    lines = run("uploads", "list", "--json", *filters, *flags).stdout.splitlines()
    return [json.loads(line)["id"] for line in lines]


def id_of(url: str) -> str:
    return url.rpartition("/")[2]


def state(client: Client, url: str) -> State:
    return client.tus.uploads.infos.load(id_of(url)).state


class TestList:
    def test_as_a_table(self, client: Client, flags: list[str]) -> None:
        url = client.create(9, b"old", Upload_Metadata=metadata(filename="my\x1bfile.txt"))
        head, line = run("uploads", "list", *flags).stdout.splitlines()
        assert head.split() == ["ID", "STATE", "KIND", "SIZE", "OFFSET", "AGE", "OWNER", "FILENAME"]
        assert line.split()[:5] == [id_of(url), "receiving", "plain", "9", "3"]
        assert line.split()[-1] == r"my\x1bfile.txt"

    def test_as_json(self, client: Client, flags: list[str]) -> None:
        url = client.create(3, b"all", Upload_Metadata=metadata(filename="кошка", raw=b"\xff"))
        (line,) = run("uploads", "list", "--json", *flags).stdout.splitlines()
        found = json.loads(line)
        for at in ("created_at", "last_byte_at", "finished_at"):
            assert found.pop(at) == pytest.approx(time.time(), abs=300)
        assert found == {
            "id": id_of(url),
            "state": "finished",
            "kind": "plain",
            "size": 3,
            "offset": 3,
            "owner": None,
            "metadata": {"filename": "кошка", "raw": "\N{REPLACEMENT CHARACTER}"},
            "parts": [],
            "storage": "file_storage",
            "path": id_of(url),
            "expires_at": None,
            "deleted_at": None,
        }

    def test_filters(self, client: Client, flags: list[str]) -> None:
        small = client.create(3, b"all", Upload_Metadata=metadata(project="x", filename="a=b"))
        large = client.create(2048, Upload_Metadata=metadata(project="y"))
        part, open_part = client.part(b"hello"), client.part(b"he", 5)
        final = path_of(client.final(part, open_part))
        gone = client.create(5)
        client.delete(gone)
        for filters, urls in {
            ("--state", "receiving", "--state", "waiting"): [large, open_part, final],
            ("--state", "terminated"): [gone],
            ("--partial",): [part, open_part],
            ("--final",): [final],
            ("--partial", "--final"): [part, open_part, final],
            ("--larger-than", "2KiB"): [large],
            ("--smaller-than", "4"): [small],
            ("--metadata", "project=x"): [small],
            ("--metadata", "filename=a=b", "--metadata", "project=x"): [small],
            ("--metadata", "project=x", "--metadata", "filename=b"): [],
            ("--owner", "me"): [],
            ("--older-than", "1h"): [],
            ("--older-than", "0s", "--final"): [final],
        }.items():
            assert sorted(listed(flags, *filters)) == sorted(map(id_of, urls)), filters

    def test_by_owner(self, client: Client, flags: list[str]) -> None:
        infos = client.tus.uploads.infos
        url = client.create(3)
        client.create(3)
        infos.save(infos.load(id_of(url)).replace(owner="me"))
        assert listed(flags, "--owner", "me") == [id_of(url)]

    def test_more_than_a_page(self, client: Client, flags: list[str]) -> None:
        urls = [client.create(3) for _ in range(250)]
        assert listed(flags) == sorted(map(id_of, urls))
        assert len(run("uploads", "list", *flags).stdout.splitlines()) == 251

    @pytest.mark.parametrize(
        "filters",
        [["--metadata", "x"], ["--older-than", "soon"], ["--larger-than", "-"], ["--state", "new"]],
    )
    def test_wrong_filters(self, flags: list[str], filters: list[str]) -> None:
        assert filters[0] in run("uploads", "list", *filters, *flags, code=2).output


class TestShow:
    def test_all_that_is_known(self, client: Client, flags: list[str], tmp_path: Path) -> None:
        client.tus.on("post-create")(print)
        client.tus.start()
        client.tus.drain()
        url = client.create(9, Upload_Metadata=metadata(filename="a.txt"))
        # A PATCH that is still being received has not told the info store.
        (tmp_path / id_of(url)).write_bytes(b"hello")
        found = json.loads(run("uploads", "show", "--json", id_of(url), *flags).stdout)
        assert (found["size"], found["offset"], found["has_data"]) == (9, 5, True)
        assert found["location"] == str(tmp_path / id_of(url))
        (event,) = found["events"]
        assert (event["event"], event["attempts"]) == ("post-create", 0)
        text = run("uploads", "show", id_of(url), *flags).stdout
        assert "offset:        5\n" in text
        assert "  filename: a.txt\n" in text
        assert "post-create by" in text

    def test_a_tombstone(self, client: Client, flags: list[str]) -> None:
        url = client.create(9)
        client.delete(url)
        found = json.loads(run("uploads", "show", "--json", id_of(url), *flags).stdout)
        assert (found["state"], found["has_data"], found["location"]) == ("terminated", False, None)
        assert "deleted_at:" in run("uploads", "show", id_of(url), *flags).stdout

    def test_an_unknown_one(self, flags: list[str]) -> None:
        result = run("uploads", "show", "0" * 32, *flags, code=1)
        assert f"There is no upload {'0' * 32}." in result.output


class TestRemove:
    def test_it_asks(self, client: Client, flags: list[str]) -> None:
        url = client.create(9, b"old")
        assert (
            "Remove this upload"
            in run("uploads", "rm", id_of(url), *flags, input="n\n", code=1).output
        )
        assert client.offset(url) == 3
        run("uploads", "rm", id_of(url), *flags, input="y\n")
        assert state(client, url) is State.TERMINATED
        assert client.head(url).status_code == 410

    def test_several_at_once(self, client: Client, flags: list[str]) -> None:
        urls = [client.create(9, b"old"), client.create(3, b"all")]
        ids = [*map(id_of, urls), "unknown"]
        result = run("uploads", "rm", "--yes", *ids, *flags, code=1)
        assert [line.split(":")[0] for line in result.output.splitlines()] == ids
        assert [state(client, url) for url in urls] == [State.TERMINATED] * 2
        assert not any((Path(flags[1]) / id_of(url)).exists() for url in urls)
        assert "removed" in run("uploads", "rm", "--yes", ids[0], *flags, code=1).output

    def test_whoever_uses_it_is_asked_to_let_go(self, client: Client, flags: list[str]) -> None:
        url = client.create(9, b"old")
        asked, held = threading.Event(), threading.Event()

        def use() -> None:
            with client.tus.uploads.locker.lock(id_of(url), lambda reason: asked.set()):
                held.set()
                assert asked.wait(60)

        user = threading.Thread(target=use)
        user.start()
        assert held.wait(60)
        run("uploads", "rm", "-y", id_of(url), *flags)
        user.join()
        assert state(client, url) is State.TERMINATED

    @pytest.mark.parametrize("delivery", ["at-least-once", "fire-and-forget"])
    def test_hooks_are_told(
        self, client: Client, flags: list[str], tmp_path: Path, delivery: str
    ) -> None:
        hook = tmp_path / "hook.sh"
        hook.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/told\n")
        hook.chmod(0o755)
        more = ["--hooks-file", str(hook), "--hooks-delivery", delivery]
        more += ["--hooks", "post-terminate"]
        url = client.create(9, b"old")
        run("uploads", "rm", "-y", id_of(url), *flags, *more)
        if delivery == "at-least-once":
            (event,) = json.loads(run("hooks", "pending", "--json", *flags).stdout)
            assert (event["event"], event["upload"]) == ("post-terminate", id_of(url))
        else:
            assert (tmp_path / "told").read_text() == "post-terminate\n"


class TestCleanUp:
    AGES = ("--gc-unfinished-age", "0", "--gc-finished-age", "0")

    def test_it_is_done_once_now(self, client: Client, flags: list[str]) -> None:
        old, all_ = client.create(9, b"old"), client.create(4, b"done")
        part = client.part(b"hello")
        result = run("gc", *self.AGES, *flags)
        assert result.stdout == "2 removed (1 unfinished, 1 finished), 7 bytes.\n"
        assert client.head(old).status_code == client.get(all_).status_code == 410
        assert client.offset(part) == 5
        assert run("gc", *self.AGES, *flags).stdout == "Nothing removed.\n"

    def test_a_dry_run_lists_what_would_go(self, client: Client, flags: list[str]) -> None:
        url = client.create(9, b"old")
        head, line, summary = run("gc", "--dry-run", *self.AGES, *flags).stdout.splitlines()
        assert head.split() == ["ID", "REASON", "AGE", "BYTES"]
        assert line.split()[:2] == [id_of(url), "unfinished"]
        assert line.split()[-1] == "3"
        assert summary == "1 would be removed (1 unfinished), 3 bytes."
        assert client.offset(url) == 3
        assert run("gc", "--dry-run", *flags).stdout == "Nothing would have been removed.\n"

    def lose(self, client: Client, flags: list[str], count: int) -> list[str]:
        """Leave bytes as uploads do whose records are lost; return their ids."""
        data = client.tus.uploads.data
        client.create(5)
        last = made_at(new_id())
        wait_until(lambda: made_at(new_id()) != last, "the next millisecond")
        ids = [new_id() for _ in range(count)]
        for id in ids:
            info = FileInfo(id=id, storage=data.create(FileInfo(id=id)))
            data.append(info, 0, Blocks(b"lost"), HELD)
            os.utime(Path(flags[1]) / id, (1.0, 1.0))
        client.create(5)
        return ids

    SOON = ("--gc-grace", "0", "--network-timeout", "0")

    def test_what_has_no_record_goes_to_the_quarantine(
        self, client: Client, flags: list[str]
    ) -> None:
        (id,) = self.lose(client, flags, 1)
        _, line, summary = run("gc", "--dry-run", *self.SOON, *flags).stdout.splitlines()
        assert line.split()[:3] == [id, "no", "record"]
        assert summary == "1 would be moved to the quarantine (1 no record), 4 bytes."
        assert run("gc", *self.SOON, *flags).stdout == (
            "1 moved to the quarantine (1 no record), 4 bytes.\n"
        )
        (path,) = (Path(flags[1]) / ".tuswsgi" / "quarantine").glob(f"*/{id}")
        assert path.read_bytes() == b"lost"
        assert run("gc", "--dry-run", *self.SOON, *flags).stdout.startswith("Nothing")
        moved_at = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime(time.time() - 31 * 86400))
        (path.parent / ".." / moved_at).mkdir()
        path.rename(path.parent / ".." / moved_at / id)
        *_, summary = run("gc", "--dry-run", *self.SOON, *flags).stdout.splitlines()
        assert summary == "1 would be removed (1 quarantine), 4 bytes."
        assert run("gc", *self.SOON, *flags).stdout == "1 removed (1 quarantine), 4 bytes.\n"

    def test_many_without_a_record_stay_until_it_is_meant(
        self, client: Client, flags: list[str]
    ) -> None:
        ids = self.lose(client, flags, 11)
        for more in ((), ("--dry-run",)):
            result = run("gc", *more, *self.SOON, *flags, code=1)
            assert result.stdout.startswith("Nothing")
            assert "At least 11 files of uploads have no record" in result.stderr
            assert "tuswsgi gc --quarantine-many" in result.stderr
        assert all((Path(flags[1]) / id).exists() for id in ids)
        meant = run("gc", "--quarantine-many", *self.SOON, *flags)
        assert meant.stdout == "11 moved to the quarantine (11 no record), 44 bytes.\n"
        assert not any((Path(flags[1]) / id).exists() for id in ids)

    def test_an_upload_in_use_stays(self, client: Client, flags: list[str]) -> None:
        url = client.create(9, b"old")
        with client.tus.uploads.locker.lock(id_of(url), pytest.fail):
            assert run("gc", *self.AGES, *flags).stdout == "Nothing removed.\n"
        assert client.offset(url) == 3

    def test_a_server_that_leads_is_in_nobodys_way(self, client: Client, flags: list[str]) -> None:
        client.create(9, b"old")
        with client.tus.uploads.locker.lock("tuswsgi-sweep", pytest.fail):
            assert run("gc", *self.AGES, *flags).stdout.startswith("1 removed")


COMMANDS = ["gc", "uploads list", "uploads show x", "uploads rm -y x"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "memory",
    [
        ["--storage", "memory-storage"],
        ["--info-storage", "memory-info-storage"],
        ["--locker", "memory-locker"],
    ],
)
def test_what_is_in_memory_cannot_be_looked_into(
    command: str, memory: list[str], tmp_path: Path
) -> None:
    result = run(*command.split(), "--data-dir", str(tmp_path), *memory, code=1)
    assert "in the server's memory" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_configuration_is_said(command: str) -> None:
    assert "[gc] interval = 0" in run(*command.split(), "--gc-interval", "0", code=2).output
