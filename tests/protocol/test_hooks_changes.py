"""What pre-create may make of an upload, and what becomes of a POST that comes again."""

from __future__ import annotations

import queue
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import tuswsgi
from protocol.client import MIME, Breaking, Client, assert_refused, metadata, path_of
from protocol.conftest import Serve
from protocol.test_hooks import NO, assert_hooks_no, listen
from tuswsgi.core.events import HookType
from tuswsgi.core.info import FileInfo, Metadata, Storage
from tuswsgi.hooks.base import ChangeFileInfo, HookRequest, HookResponse

PATIENCE = 30.0


def choose(client: Client, **change: Any) -> None:
    """Let pre-create change every upload."""

    @client.tus.on("pre-create")
    def answer(request: HookRequest) -> HookResponse:
        return HookResponse(change=ChangeFileInfo(**change))


CHOICES = [{"id": "chosen"}, {"path": "a/b.txt"}, {"id": "chosen", "path": "a/b.txt"}]

every_choice = pytest.mark.parametrize("change", CHOICES, ids=["id", "path", "both"])


class TestChanges:
    def test_an_id(self, client: Client) -> None:
        choose(client, id="report-7.pdf")
        url = client.create(11, b"hello")
        assert url == "/files/report-7.pdf"
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"
        choose(client, id="report-8.pdf")
        assert client.content(client.create(5, b"hello")) == b"hello"

    def test_metadata(self, client: Client) -> None:
        choose(client, metadata=Metadata.of({"name": "better"}))
        url = client.create(5, Upload_Metadata=metadata(name="worse", other="x"))
        assert client.head(url).headers["Upload-Metadata"] == metadata(name="better")

    def test_a_path(self, client: Client, tmp_path: Path, backends: dict[str, str]) -> None:
        choose(client, path="year/Ünï code.txt")
        url = client.create(5, b"hello")
        assert client.content(url) == b"hello"
        if backends["storage"] == "file-storage":
            assert (tmp_path / "data" / "year" / "Ünï code.txt").read_bytes() == b"hello"
        assert client.delete(url).status_code == 204
        assert client.create(5, b"again") != url

    def test_of_several_functions(self, client: Client) -> None:
        @client.tus.on("pre-create")
        def name(request: HookRequest) -> HookResponse:
            change = tuswsgi.ChangeFileInfo(id="chosen")
            return HookResponse(change=change, headers={"X-First": "1"}, body="first")

        @client.tus.on("pre-create")
        def describe(request: HookRequest) -> HookResponse:
            assert request.type is tuswsgi.HookType.PRE_CREATE
            described = tuswsgi.Metadata.of({"id": request.info.id})
            change = tuswsgi.ChangeFileInfo(metadata=described)
            return HookResponse(change=change, headers={"X-Second": "2"})

        response = client.post(5)
        assert path_of(response) == "/files/chosen"
        assert (response.headers["X-First"], response.headers["X-Second"]) == ("1", "2")
        assert response.text == "first"
        assert client.head("/files/chosen").headers["Upload-Metadata"] == metadata(id="chosen")

    @pytest.mark.parametrize("id", ["10:30", "anna@home", "50%", "a%2Fb%25", "a+b=c", "(a)*!$',;~"])
    def test_an_id_as_tusd_allows_it(self, client: Client, id: str) -> None:
        choose(client, id=id)
        response = client.post(11, b"hello")
        url = path_of(response)
        assert url == "/files/" + id.replace("%", "%25")
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"
        # Where nothing is to be quoted it may be, too.
        assert client.content("/files/" + quote(id, safe="")) == b"hello world"
        assert client.delete(url).status_code == 204
        assert_refused(client.head(url), 410)

    def test_parts_with_ids_as_tusd_allows_them(self, client: Client) -> None:
        ids = ["50%", "a;b", "%2525", "(whole)"]

        @client.tus.on("pre-create")
        def answer(request: HookRequest) -> HookResponse:
            return HookResponse(change=ChangeFileInfo(id=ids.pop(0)))

        parts = [client.part(data) for data in (b"a", b"b", b"c")]
        assert client.content(path_of(client.final(*parts))) == b"abc"

    def test_a_path_as_tusds_documents_have_it(
        self, client: Client, tmp_path: Path, backends: dict[str, str]
    ) -> None:
        path = "upload-e7a036dc-33f4-451f-9520-49032b87e952/presentation.pdf"
        choose(client, path=f"./{path}")
        url = client.create(11, b"hello")
        # It is the same with and without the dot: the answer to the first POST was lost.
        choose(client, path=path)
        assert client.create(11, b"hello") == url
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"
        if backends["storage"] == "file-storage":
            assert (tmp_path / "data" / path).read_bytes() == b"hello world"

    def test_nothing(self, client: Client) -> None:
        choose(client, id="", path="")
        first, second = client.create(5), client.create(5)
        assert first != second

    def test_a_final_upload(self, client: Client) -> None:
        parts = [client.part(b"a"), client.part(b"b")]
        choose(client, id="whole")
        assert path_of(client.final(*parts)) == "/files/whole"
        assert client.content("/files/whole") == b"ab"

    @pytest.mark.parametrize(
        "change",
        [
            {"id": "../evil"},
            {"id": ".hidden"},
            {"id": "a/b"},
            {"id": "x" * 129},
            {"path": "/etc/passwd"},
            {"path": "../evil"},
            {"path": "a/../../evil"},
            {"path": "a/./b"},
            {"path": "./../evil"},
            {"path": ".//etc/passwd"},
            {"path": "./"},
            {"id": "a&b"},
            {"id": "a\n"},
            {"path": ".tuswsgi/info.sqlite3"},
            {"path": "a//b"},
            {"path": "a/"},
            {"path": "a\\b"},
            {"path": "a\0b"},
            {"path": "x" * 201},
            {"path": "x/" * 600 + "x"},
            {"path": "\udc80"},
        ],
    )
    def test_what_cannot_be(self, client: Client, change: dict[str, str], caplog: Any) -> None:
        choose(client, **change)
        response = client.post(5, b"hello")
        assert_refused(response, 500)
        assert "Retry-After" not in response.headers
        assert client.stored() == 0
        (line,) = (line for line in caplog.messages if "by callable failed" in line)
        assert line.startswith("pre-create of")
        assert re.search(r"The (id|path) .* cannot be that of an upload: it ", line)

    def test_the_checks_come_before(self, serve: Serve) -> None:
        client = serve(max_file_size=3)
        choose(client, id="chosen")
        assert_refused(client.post(5), 413)
        assert_refused(client.head("/files/chosen"), 404)

    def test_an_id_whose_deletion_was_cut_off(
        self, client: Client, tmp_path: Path, backends: dict[str, str]
    ) -> None:
        client.create(1)  # the directory is there now
        if backends["storage"] == "file-storage":
            # Bytes go first, then the marker of those that were not verified.
            (tmp_path / "data" / ".chosen.unverified").write_text("0\n")
        choose(client, id="chosen")
        url = client.create(11, b"hello")
        assert client.offset(url) == 5
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"


class TestCollisions:
    @every_choice
    def test_an_answer_that_was_lost(self, client: Client, change: dict[str, str]) -> None:
        choose(client, **change)
        url = client.create(11, b"hello", Upload_Metadata=metadata(a="b"))
        again = client.post(11, b"hello", Upload_Metadata=metadata(a="b"))
        assert again.status_code == 201
        assert path_of(again) == url
        assert again.headers["Upload-Offset"] == "5"
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"

    @every_choice
    def test_another_upload(self, client: Client, change: dict[str, str]) -> None:
        choose(client, **change)
        url = client.create(11, b"hello", Upload_Metadata=metadata(a="b"))
        for response in (
            client.post(12, Upload_Metadata=metadata(a="b")),
            client.post(11, Upload_Metadata=metadata(a="c")),
            client.post(11),
            client.post(11, Upload_Metadata=metadata(a="b"), Upload_Concat="partial"),
        ):
            assert_refused(response, 409)
        client.append(url, b" world", 5)
        assert client.content(url) == b"hello world"
        # It is finished, so its answer has arrived.
        assert_refused(client.post(11, Upload_Metadata=metadata(a="b")), 409)
        assert client.content(url) == b"hello world"

    def test_one_that_was_removed(self, client: Client) -> None:
        choose(client, id="chosen")
        client.delete(client.create(5))
        assert_refused(client.post(5), 409)

    def test_of_another_owner(self, embed: Any, app: Any) -> None:
        tus = embed(owner=lambda request: request.headers.get("X-Owner"))
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        choose(client, id="chosen")
        client.create(5, X_Owner="ann")
        assert_refused(client.post(5, X_Owner="bob"), 409)
        assert client.post(5, X_Owner="ann").status_code == 201

    @every_choice
    def test_one_that_is_not_to_be_touched(self, client: Client, change: dict[str, str]) -> None:
        choose(client, **change)
        url = client.create(5)
        id = url.rpartition("/")[2]
        asked = listen(client, "pre-access", NO)
        # A PATCH that holds it is not disturbed, either.
        with client.tus.uploads.locker.lock(id, pytest.fail):
            assert_hooks_no(client.post(5))
        assert [(hook.request.method, hook.info.id) for hook in asked] == [("POST", id)]

    def test_an_id_with_the_path_of_another(self, client: Client) -> None:
        choose(client, path="taken")
        url = client.create(5)
        assert url != "/files/taken"
        choose(client, id="taken")
        assert_refused(client.post(6), 409)
        client.append(url, b"hello", 0)
        assert client.content(url) == b"hello"

    def test_what_a_crash_left_without_a_record(self, client: Client) -> None:
        choose(client, path="left")
        client.tus.start()
        client.tus.uploads.data.create(FileInfo(id="crashed", storage=Storage(path="left")))
        assert client.content(client.create(5, b"hello")) == b"hello"

    def test_what_a_removal_has_not_removed_yet(self, client: Client) -> None:
        choose(client, path="left")
        url = client.create(5)
        info = client.tus.uploads.infos.load(url.rpartition("/")[2])
        client.delete(url)
        client.tus.uploads.data.create(info)
        assert_refused(client.post(5), 409)
        client.tus.uploads.data.delete(info)
        assert client.content(client.create(5, b"hello")) == b"hello"

    def test_bytes_without_a_record_are_nobodys(self, client: Client) -> None:
        choose(client, path="left")
        url = client.create(5, b"hello")
        uploads = client.tus.uploads
        info = uploads.infos.load(url.rpartition("/")[2])
        uploads.infos.save(info.replace(storage=Storage(path="elsewhere")))
        assert_refused(client.post(5), 409)
        assert uploads.data.offset(info) == 5

    def test_many_at_once_get_one_upload(self, client: Client) -> None:
        choose(client, path="one")
        answers: queue.Queue[Any] = queue.Queue()
        posts = [threading.Thread(target=lambda: answers.put(client.post(5))) for _ in range(8)]
        for post in posts:
            post.start()
        for post in posts:
            post.join(PATIENCE)
        found = [answers.get_nowait() for _ in posts]
        assert {answer.status_code for answer in found} == {201}
        assert len({path_of(answer) for answer in found}) == 1

    def test_one_that_comes_while_the_first_receives(self, client: Client) -> None:
        choose(client, id="chosen")
        arrived, go_on = threading.Event(), threading.Event()

        class Slow(Breaking):
            def read(self, n: int = -1) -> bytes:
                block = super().read(5 if self._data else n)
                arrived.set()
                if len(self._data) < 6:
                    go_on.wait(PATIENCE)
                return block

        environ = {"CONTENT_LENGTH": "11", "wsgi.input": Slow(b"hello world")}
        headers = {"Content_Type": MIME, "environ": environ}
        first = threading.Thread(target=lambda: client.post(11, **headers))
        first.start()
        assert arrived.wait(PATIENCE)
        second = threading.Thread(target=lambda: answers.append(client.post(11)))
        answers: list[Any] = []
        second.start()
        go_on.set()
        first.join(PATIENCE)
        second.join(PATIENCE)
        (answer,) = answers
        assert answer.status_code in (201, 409)  # 409 if the first was complete by then


class TestPostCreate:
    """It waits for the end of a POST that may complete its upload."""

    def test_it_is_told_in_the_end(self, client: Client) -> None:
        heard: queue.Queue[HookRequest] = queue.Queue()
        for name in ("post-create", "post-finish", "post-receive"):
            client.tus.on(name)(heard.put)
        choose(client, id="chosen")
        client.create(11, b"hello")
        assert heard.get(timeout=PATIENCE).type is HookType.POST_CREATE
        client.append("/files/chosen", b" world", 5)
        assert heard.get(timeout=PATIENCE).type is HookType.POST_FINISH

    @pytest.mark.parametrize(
        ("format", "types"),
        [("default", ["post-finish"]), ("tusd-v2", ["post-create", "post-finish"])],
    )
    def test_in_one_request(self, serve: Serve, format: str, types: list[str]) -> None:
        client = serve(hooks_format=format)
        heard: queue.Queue[HookRequest] = queue.Queue()
        for name in ("post-create", "post-finish"):
            client.tus.on(name)(heard.put)
        choose(client, id="chosen")
        client.create(5, b"hello")
        assert [str(heard.get(timeout=PATIENCE).type) for _ in types] == types
        client.tus.drain()
        assert heard.empty()
        assert client.tus.uploads.infos.events("chosen") == []

    def test_trouble_with_finishing(self, client: Client) -> None:
        trouble: list[Any] = [RuntimeError("broken")]

        @client.tus.on("pre-finish")
        def finish(hook: HookRequest) -> None:
            if trouble:
                raise trouble.pop()

        choose(client, id="chosen")
        assert_refused(client.post(5, b"hello"), 503)
        # All bytes are there: the same POST finishes it.
        again = client.post(5, b"hello")
        assert again.status_code == 201
        assert again.headers["Upload-Offset"] == "5"
        assert client.content("/files/chosen") == b"hello"

    def test_a_wrong_checksum_leaves_an_empty_upload(self, client: Client) -> None:
        choose(client, id="chosen")
        wrong = client.post(5, b"hello", Upload_Checksum="sha1 " + "A" * 27 + "=")
        assert_refused(wrong, 460)
        again = client.post(5, b"hello")
        assert (again.status_code, again.headers["Upload-Offset"]) == (201, "0")
