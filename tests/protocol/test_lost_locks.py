"""Requests whose lock runs out while they wait for something, and others that take over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol.client import Client
from protocol.conftest import Serve
from tuswsgi.core.errors import Unavailable
from tuswsgi.hooks.base import ChangeFileInfo, HookRequest, HookResponse


@pytest.fixture
def hosts(serve: Serve, tmp_path: Path) -> tuple[Client, Client]:
    """Two servers that share a store and locks, and no runtime directory."""
    shared = {
        "storage": "file-storage",
        "info_storage": "db-info-storage",
        "info_db_dsn": f"sqlite:///{tmp_path}/shared.sqlite3",
        "locker": "db-locker",
        "lock_lease": "0.5s",
    }
    first, second = (
        serve(**shared, runtime_dir=str(tmp_path / name)) for name in ("first", "second")
    )
    return first, second


def lose_locks(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server of locks be away whenever this one wants to keep what it has."""

    def fail(held: object) -> None:
        raise Unavailable

    monkeypatch.setattr(client.tus.uploads.locker, "_renew", fail)


@pytest.mark.parametrize("backends", ["file"], indirect=True)
class TestLostLocks:
    def test_a_termination_that_waited_too_long_removes_nothing(
        self, hosts: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = hosts
        url = first.create(10, b"hello")

        @first.tus.on("pre-terminate")
        def go_on_elsewhere(hook: HookRequest) -> None:
            assert second.patch(url, b"he", 5).status_code == 204

        lose_locks(first, monkeypatch)
        assert first.delete(url).status_code == 503
        assert second.offset(url) == 7
        assert second.patch(url, b"llo", 7).status_code == 204
        assert first.content(url) == second.content(url) == b"hellohello"

    def test_who_finishes_too_late_changes_nothing(
        self, hosts: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = hosts
        url = first.create(5)

        @first.tus.on("pre-finish")
        def finish_elsewhere(hook: HookRequest) -> HookResponse:
            assert second.offset(url) == 5
            return HookResponse(status=200, body="from the first")

        @second.tus.on("pre-finish")
        def finish(hook: HookRequest) -> HookResponse:
            return HookResponse(status=200, body="from the second")

        lose_locks(first, monkeypatch)
        assert first.patch(url, b"hello", 0).status_code == 503
        for client in hosts:
            assert client.patch(url, b"", 5).text == "from the second"
            assert client.content(url) == b"hello"

    def test_what_was_removed_meanwhile_does_not_come_back(
        self, hosts: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch, options: Any
    ) -> None:
        first, second = hosts
        url = first.create(5)

        @first.tus.on("pre-finish")
        def remove_elsewhere(hook: HookRequest) -> None:
            assert second.delete(url).status_code == 204

        lose_locks(first, monkeypatch)
        assert first.patch(url, b"hello", 0).status_code == 503
        assert first.head(url).status_code == second.head(url).status_code == 410
        assert not (Path(options["data_dir"]) / url.rpartition("/")[2]).exists()

    def test_an_upload_that_was_taken_over_is_one_file_in_the_end(
        self, hosts: tuple[Client, Client], monkeypatch: pytest.MonkeyPatch, options: Any
    ) -> None:
        first, second = hosts
        url = first.create(15, b"hello")

        @first.tus.on("pre-terminate")
        def go_on_elsewhere(hook: HookRequest) -> None:
            assert second.patch(url, b"hello", 5).status_code == 204

        lose_locks(first, monkeypatch)
        assert first.delete(url).status_code == 503
        monkeypatch.undo()
        id, directory = url.rpartition("/")[2], Path(options["data_dir"])
        assert (directory / id).read_bytes() == b"hello"
        assert first.patch(url, b"hello", 10).status_code == 204
        assert [path.name for path in directory.iterdir() if id in path.name] == [id]
        assert (directory / id).read_bytes() == b"hello" * 3
        assert second.content(url) == b"hello" * 3

    def test_who_finds_no_room_too_late_leaves_the_bytes_of_others(
        self, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shared = {
            "info_db_dsn": f"sqlite:///{tmp_path}/shared.sqlite3",
            "locker": "db-locker",
            "lock_lease": "0.5s",
            "limited_max_total_size": "10",
        }
        first, second = (
            serve(**shared, runtime_dir=str(tmp_path / name)) for name in ("first", "second")
        )
        for client in (first, second):
            client.tus.on("pre-create")(
                lambda hook: HookResponse(change=ChangeFileInfo(id="report"))
            )
        store = first.tus.uploads.data
        create = store.create

        def create_slowly(info: Any) -> Any:
            storage = create(info)
            assert second.post(10, b"hello").status_code == 201
            return storage

        monkeypatch.setattr(store, "create", create_slowly)
        lose_locks(first, monkeypatch)
        assert first.post(10, b"hello").status_code in (503, 507)
        assert second.offset("/files/report") == 5

    def test_a_path_that_is_being_emptied_is_not_given_to_another_upload(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = serve(), serve()
        for client in (first, second):
            client.tus.on("pre-create")(
                lambda hook: HookResponse(change=ChangeFileInfo(path="docs/report"))
            )
        url = first.create(5)
        store = first.tus.uploads.data
        delete = store.delete
        answers = []

        def delete_slowly(info: Any) -> None:
            answers.append(second.post(5, b"hel"))
            delete(info)

        monkeypatch.setattr(store, "delete", delete_slowly)
        assert first.delete(url).status_code == 204
        (answer,) = answers
        if answer.status_code == 201:
            assert second.offset(answer.headers["Location"]) == 3
