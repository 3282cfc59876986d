"""What blocking hooks may refuse, change and break."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest

from protocol.client import Breaking, Client, assert_refused, path_of
from protocol.conftest import Serve
from tuswsgi.core.errors import HookRefusal, Unavailable
from tuswsgi.core.events import HookType
from tuswsgi.core.info import State
from tuswsgi.core.options import KiB
from tuswsgi.hooks.base import HookRequest, HookResponse
from tuswsgi.hooks.payloads import FormatName, payload_format
from tuswsgi.protocol.sweep import Sweeper

NO = HookResponse(
    reject=True, status=422, body='{"reason": "no"}', headers={"Content-Type": "application/json"}
)

Asked = list[HookRequest]


def listen(client: Client, event: str, *answers: Any) -> Asked:
    """Answer a hook by `answers` one after another, the last one again and again."""
    asked: Asked = []

    @client.tus.on(event)
    def answer(request: HookRequest) -> HookResponse | None:
        asked.append(request)
        given = answers[min(len(asked), len(answers)) - 1] if answers else None
        if isinstance(given, Exception):
            raise given
        return given

    return asked


def assert_hooks_no(response: Any) -> None:
    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Tus-Resumable"] == "1.0.0"
    if response.request.method != "HEAD":
        assert response.text == '{"reason": "no"}'


class TestNames:
    def test_there_are_no_others(self, client: Client) -> None:
        with pytest.raises(ValueError, match="pre-nothing"):
            client.tus.on("pre-nothing")

    def test_they_are_told_of_the_request(self, serve: Serve) -> None:
        client = serve(behind_proxy=True)
        asked = listen(client, "pre-create")
        client.post(5, X_Token="x", Forwarded="for=203.0.113.9", Upload_Metadata="k YQ==")
        (request,) = asked
        assert request.type is HookType.PRE_CREATE
        assert request.info.size == 5
        assert request.info.metadata["k"] == b"a"
        assert request.request.method == "POST"
        assert request.request.uri == "/files"
        assert request.request.remote_addr == "203.0.113.9"
        assert request.request.headers["x-token"] == "x"

    def test_they_are_told_which_store_an_upload_will_be_in(self, client: Client) -> None:
        asked = listen(client, "pre-create")
        client.post(5)
        (request,) = asked
        type = client.tus.uploads.data.type
        payload = payload_format(FormatName.DEFAULT).dump(request)
        assert (payload["upload"]["storage"], payload["upload"]["path"]) == (type, None)
        assert (
            payload_format(FormatName.TUSD_V2).dump(request)["Event"]["Upload"]["Storage"] is None
        )


class TestPreCreate:
    def test_a_refusal_stores_nothing(self, client: Client) -> None:
        listen(client, "pre-create", NO)
        for data in (b"", b"hello"):
            assert_hooks_no(client.post(5, data))
        assert client.stored() == 0

    def test_no_byte_is_read_before(self, client: Client) -> None:
        class Unread(Breaking):
            def read(self, n: int = -1) -> bytes:
                read.append(len(asked))
                return super().read(n)

        read: list[int] = []
        asked = listen(client, "pre-create", None)
        url = client.create(
            5,
            Content_Type="application/offset+octet-stream",
            environ={"CONTENT_LENGTH": "5", "wsgi.input": Unread(b"hello")},
        )
        assert read[0] == 1
        assert client.content(url) == b"hello"

    def test_it_comes_after_the_checks(self, serve: Serve) -> None:
        client = serve(max_file_size=10)
        asked = listen(client, "pre-create")
        client.post(11)
        client.post()
        client.post(5, b"hello!")
        client.final("/files/unknown")
        assert asked == []

    def test_a_refusal_without_words(self, client: Client) -> None:
        listen(client, "pre-create", HookResponse(reject=True))
        response = client.post(5)
        assert_refused(response, 400)

    def test_an_answer_for_the_client(self, client: Client) -> None:
        listen(client, "pre-create", HookResponse(body="welcome", headers={"X-Hook": "yes"}))
        response = client.post(5)
        assert response.status_code == 201
        assert response.text == "welcome"
        assert response.headers["X-Hook"] == "yes"
        assert client.offset(path_of(response)) == 0

    def test_an_answer_cannot_replace_what_the_protocol_says(self, serve: Serve) -> None:
        client = serve(expiration="1h")
        fixed = ("location", "Upload-Offset", "UPLOAD-EXPIRES", "Tus-Resumable")
        said = dict.fromkeys(fixed, "wrong")
        said |= {"Tus-Max-Size": "100", "Cache-Control": "private"}
        listen(client, "pre-create", HookResponse(headers=said))
        response = client.post(10, b"hello")
        assert "wrong" not in response.headers.values()
        assert response.headers["Upload-Offset"] == "5"
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert (response.headers["Tus-Max-Size"], response.headers["Cache-Control"]) == (
            "100",
            "private",
        )
        url = path_of(response)
        listen(client, "pre-finish", HookResponse(headers=said))
        for data, offset in ((b"world", 5), (b"", 10)):
            response = client.patch(url, data, offset)
            assert response.headers["Upload-Offset"] == "10"
            assert response.headers["Tus-Resumable"] == "1.0.0"

    def test_a_refusal_cannot_replace_what_the_protocol_says(self, client: Client) -> None:
        said = {"Tus-Resumable": "0.2.2", "Location": "https://example.org/login"}
        listen(client, "pre-create", HookResponse(reject=True, status=403, headers=said))
        response = client.post(5)
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.headers["Location"] == "https://example.org/login"

    def test_one_that_breaks(self, client: Client) -> None:
        listen(client, "pre-create", RuntimeError("secret"))
        response = client.post(5, b"hello")
        assert_refused(response, 503)
        assert "secret" not in response.text
        assert response.headers["Retry-After"]
        assert client.stored() == 0

    def test_one_that_raises_an_error_of_ours(self, client: Client) -> None:
        listen(client, "pre-create", HookRefusal(403, "Not you."), Unavailable())
        response = client.post(5)
        assert response.status_code == 403
        assert response.text == "Not you."
        assert_refused(client.post(5), 503)
        assert client.stored() == 0

    def test_the_first_refusal_wins(self, client: Client) -> None:
        listen(client, "pre-create", None)
        listen(client, "pre-create", NO)
        last = listen(client, "pre-create", None)
        assert_hooks_no(client.post(5))
        assert last == []

    @pytest.mark.parametrize(
        "headers", [{"X-Evil": "a\r\nSet-Cookie: x=1"}, {"X-\r\nEvil": "a"}, {"X-Кот": "кот"}]
    )
    @pytest.mark.parametrize("reject", [False, True])
    def test_headers_that_cannot_be_sent(
        self, client: Client, headers: dict[str, str], reject: bool
    ) -> None:
        listen(client, "pre-create", HookResponse(reject=reject, status=422, headers=headers))
        response = client.post(5)
        assert_refused(response, 500)
        assert "Set-Cookie" not in response.headers
        assert client.stored() == 0


class TestPatience:
    def test_a_receiver_that_hangs_costs_what_one_option_allows(
        self, serve: Serve, caplog: Any
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = serve(
                hooks_blocking_timeout="0.2s",
                hooks="pre-create",
                hooks_http_urls=f"http://127.0.0.1:{silent.getsockname()[1]}/",
                hooks_http_timeout="1000s",
            )
            response = client.post(5)
        assert_refused(response, 503)
        assert response.headers["Retry-After"]
        assert "did not answer" in caplog.text


class TestHeaders:
    def test_megabytes_of_them_are_not_told(self, client: Client, caplog: Any) -> None:
        asked = listen(client, "pre-create")
        junk = {f"X_Junk_{number}": "y" * 60_000 for number in range(50)}
        assert client.post(5, X_User="anna", **junk).status_code == 201
        told = asked[0].request.headers
        assert sum(map(len, told)) + sum(map(len, told.values())) < 66 * KiB
        assert told["x-user"] == "anna"
        assert sum(name.startswith("x-junk") for name in told) == 1
        assert all(len(told[name]) == 60_000 for name in told if name.startswith("x-junk"))
        (line,) = (line for line in caplog.messages if "too long" in line)
        assert "x-junk" in line
        assert "yyy" not in line

    def test_those_that_are_sent_along_are_told_first(self, serve: Serve) -> None:
        client = serve(
            hooks="post-terminate",
            hooks_http_urls="http://localhost:9/",
            hooks_http_proxy_headers="Authorization,Cookie",
        )
        asked = listen(client, "pre-create")
        client.post(5, Authorization="a" * 60_000, Cookie="c" * 1000, X_Junk="y" * 20_000)
        told = asked[0].request.headers
        assert (len(told["authorization"]), len(told["cookie"])) == (60_000, 1000)
        assert "x-junk" not in told

    def test_how_many_is_configured(self, serve: Serve) -> None:
        client = serve(hooks_max_headers=500)
        asked = listen(client, "pre-create")
        client.post(5, X_User="anna", X_Junk="y" * 500)
        assert asked[0].request.headers["x-user"] == "anna"
        assert "x-junk" not in asked[0].request.headers


class TestPreAccess:
    def test_every_request_to_an_upload_asks(self, client: Client) -> None:
        url, done = client.create(5), client.create(5, b"hello")
        asked = listen(client, "pre-access", NO)
        answers = (
            client.head(url),
            client.patch(url, b"hello", 0),
            client.delete(url),
            client.get(done),
        )
        for response in answers:
            assert_hooks_no(response)
        assert [request.request.method for request in asked] == ["HEAD", "PATCH", "DELETE", "GET"]
        assert client.options(url).status_code == 204

    def test_a_refusal_disturbs_nobody(self, client: Client) -> None:
        url = client.create(5)
        listen(client, "pre-access", NO)
        with client.tus.uploads.locker.lock(url.rpartition("/")[2], pytest.fail):
            assert_hooks_no(client.head(url))
            assert_hooks_no(client.patch(url, b"hello", 0))


class TestPreFinish:
    def test_an_answer_is_kept_and_repeated(self, client: Client) -> None:
        answer = HookResponse(status=200, body="stored as 7", headers={"X-Number": "7"})
        asked = listen(client, "pre-finish", answer)
        url = client.create(5)
        for data, offset in ((b"hello", 0), (b"", 5), (b"", 5)):
            response = client.patch(url, data, offset)
            assert response.status_code == 200
            assert response.text == "stored as 7"
            assert response.headers["X-Number"] == "7"
            assert response.headers["Upload-Offset"] == "5"
        assert len(asked) == 1
        assert asked[0].info.offset == asked[0].info.size == 5
        assert client.head(url).status_code == 200
        assert client.content(url) == b"hello"

    def test_with_the_creation(self, client: Client) -> None:
        listen(client, "pre-finish", HookResponse(body="done"))
        response = client.post(5, b"hello")
        assert response.status_code == 201
        assert response.text == "done"
        assert client.offset(path_of(response)) == 5

    def test_a_refusal_is_final(self, client: Client) -> None:
        asked = listen(client, "pre-finish", NO)
        url = client.create(5)
        assert_hooks_no(client.patch(url, b"hello", 0))
        for response in (client.head(url), client.patch(url, b"", 5), client.get(url)):
            assert_hooks_no(response)
        Sweeper(client.tus.uploads).sweep()
        assert len(asked) == 1
        assert client.delete(url).status_code == 204

    def test_a_refusal_with_the_creation(self, client: Client) -> None:
        listen(client, "pre-finish", NO)
        response = client.post(5, b"hello")
        assert_hooks_no(response)
        assert "Location" not in response.headers

    def test_a_refused_part_is_no_part(self, client: Client) -> None:
        listen(client, "pre-finish", NO)
        part = client.part(b"", 5)
        final = path_of(client.final(part))
        assert_hooks_no(client.patch(part, b"hello", 0))
        assert_refused(client.final(part), 400, "refused")
        assert_refused(client.head(final), 410)

    @pytest.mark.parametrize(
        "trouble", [RuntimeError("secret"), HookResponse(reject=True, status=503), Unavailable()]
    )
    @pytest.mark.parametrize(
        "again",
        [
            lambda client, url: client.head(url).status_code == 200,
            lambda client, url: client.patch(url, b"", 5).status_code == 204,
            lambda client, url: Sweeper(client.tus.uploads).sweep() is None,
        ],
        ids=["head", "patch", "sweep"],
    )
    def test_trouble_passes(
        self, client: Client, trouble: Any, again: Callable[[Client, str], bool]
    ) -> None:
        asked = listen(client, "pre-finish", trouble, trouble, trouble, None)
        url = client.create(5)
        for response in (
            client.patch(url, b"hello", 0),
            client.head(url),
            client.patch(url, b"", 5),
        ):
            # Nobody is told an offset equal to the length before finishing worked.
            assert response.status_code == 503
            assert "Upload-Offset" not in response.headers
            assert "secret" not in response.text
        assert_refused(client.get(url), 404)
        assert again(client, url)
        assert len(asked) == 4
        assert client.content(url) == b"hello"

    def test_trouble_with_the_creation(self, client: Client) -> None:
        asked = listen(client, "pre-finish", RuntimeError("secret"), None)
        assert_refused(client.post(5, b"hello"), 503)
        client.create(5, b"hello")
        assert len(asked) == 2

    def test_final_uploads_finish_too(self, client: Client) -> None:
        asked = listen(client, "pre-finish")
        final = path_of(client.final(client.part(b"a"), client.part(b"b")))
        assert [request.info.is_final for request in asked] == [False, False, True]
        assert asked[-1].info.size == asked[-1].info.offset == 2
        assert client.content(final) == b"ab"

    def test_trouble_with_a_final_upload_passes(self, client: Client) -> None:
        listen(client, "pre-finish", None, RuntimeError("secret"), None)
        part = client.part(b"", 1)
        final = path_of(client.final(part, part))
        client.append(part, b"x", 0)
        assert client.content(part) == b"x"
        assert client.head(final).headers["Upload-Offset"] == "2"
        assert client.content(final) == b"xx"


class TestPreTerminate:
    def test_a_refusal_removes_nothing(self, client: Client) -> None:
        listen(client, "pre-terminate", NO)
        url = client.create(11, b"hello")
        assert_hooks_no(client.delete(url))
        assert client.offset(url) == 5

    def test_an_answer_for_the_client(self, client: Client) -> None:
        listen(client, "pre-terminate", HookResponse(status=200, body="bye"))
        url = client.create(5)
        response = client.delete(url)
        assert (response.status_code, response.text) == (200, "bye")
        assert_refused(client.head(url), 410)

    def test_one_that_breaks(self, client: Client) -> None:
        listen(client, "pre-terminate", RuntimeError("secret"))
        url = client.create(5)
        assert_refused(client.delete(url), 503)
        assert client.offset(url) == 0


class TestPreGet:
    def test_a_refusal_gives_nothing_out(self, client: Client) -> None:
        listen(client, "pre-get", NO)
        assert_hooks_no(client.get(client.create(5, b"hello")))

    def test_it_is_asked_for_what_there_is(self, client: Client) -> None:
        asked = listen(client, "pre-get")
        client.get("/files/unknown")
        client.get(client.create(5))
        assert asked == []
        assert client.content(client.create(5, b"hello")) == b"hello"
        assert asked[0].info.state is State.FINISHED
