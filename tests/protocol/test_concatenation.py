"""The extensions concatenation and concatenation-unfinished."""

from __future__ import annotations

import pytest

from protocol.client import Client, assert_refused, path_of
from protocol.conftest import Serve, on_memory
from protocol.test_hooks import NO, assert_hooks_no, listen
from tuswsgi.core.info import State
from tuswsgi.hooks.base import HookRequest, HookResponse

DEFERRED = {"Upload_Defer_Length": "1", "Upload_Concat": "partial"}


def id_of(url: str) -> str:
    return url.rpartition("/")[2]


class TestPartial:
    def test_it_says_so(self, client: Client) -> None:
        url = client.part(b"hel", 5)
        response = client.head(url)
        assert response.headers["Upload-Concat"] == "partial"
        assert response.headers["Upload-Offset"] == "3"
        client.append(url, b"lo", 3)
        assert client.head(url).headers["Upload-Concat"] == "partial"
        assert client.content(url) == b"hello"

    @on_memory
    @pytest.mark.parametrize("value", ["", "Partial", "partial;", "final", "Final;/files/x", "x"])
    def test_others_are_faults(self, client: Client, value: str) -> None:
        response = client.post(5, environ={"HTTP_UPLOAD_CONCAT": value})
        assert_refused(response, 400, "Upload-Concat")
        assert client.stored() == 0


class TestFinal:
    def test_parts_are_joined_in_their_order(self, client: Client) -> None:
        a, b, c = (client.part(data) for data in (b"one,", b"two,", b"three,"))
        concat = f"final;{c} {a} {b}"
        created = client.post(Upload_Concat=concat)
        assert created.status_code == 201
        url = path_of(created)
        response = client.head(url)
        # "After successful concatenation, the Upload-Offset and Upload-Length MUST be set
        # and their values MUST be equal."
        assert response.headers["Upload-Offset"] == response.headers["Upload-Length"] == "14"
        # "its value as received in the upload creation request"
        assert response.headers["Upload-Concat"] == concat
        assert client.content(url) == b"three,one,two,"
        for part, data in ((a, b"one,"), (b, b"two,"), (c, b"three,")):
            assert client.content(part) == data

    def test_a_part_may_come_twice_and_again(self, client: Client) -> None:
        # "The same partial upload MAY be present multiple times in the Upload-Concat
        # header in one upload creation request or MAY be used in multiple upload creation
        # requests."
        a, b = client.part(b"a"), client.part(b"b")
        assert client.content(path_of(client.final(a, b, a, a))) == b"abaa"
        assert client.content(path_of(client.final(b, a))) == b"ba"

    def test_parts_without_bytes(self, client: Client) -> None:
        none, some = client.part(b""), client.part(b"some")
        assert client.content(path_of(client.final(none, some, none))) == b"some"
        assert client.content(path_of(client.final(none))) == b""

    def test_a_thousand_parts(self, client: Client) -> None:
        part = client.part(b"x")
        assert client.content(path_of(client.final(*[part] * 1000))) == b"x" * 1000

    def test_more_parts_than_that(self, client: Client) -> None:
        part = client.part(b"x")
        asked = listen(client, "pre-access")
        assert_refused(client.final(*[part] * 1001), 400, "more than 1000 partial uploads")
        assert asked == []
        assert client.stored() == 1

    def test_as_many_parts_as_are_configured(self, serve: Serve) -> None:
        client = serve(max_parts=2)
        part = client.part(b"x")
        assert client.content(path_of(client.final(part, part))) == b"xx"
        assert_refused(client.final(part, part, part), 400, "more than 2 partial uploads")

    def test_parts_that_are_too_large_together(self, serve: Serve) -> None:
        client = serve(max_file_size=10)
        part, deferred = client.part(b"12345"), client.create(**DEFERRED)
        client.append(deferred, b"1", 0)
        assert client.content(path_of(client.final(part, part))) == b"1234512345"
        for parts in ([part] * 3, [part, part, deferred]):
            assert_refused(client.final(*parts), 413, "larger than this server accepts")
        assert client.stored() == 3

    def test_parts_for_which_there_is_no_room(self, serve: Serve) -> None:
        client = serve(storage="file-storage", min_free_disk=0)
        part = client.create(10**9, Upload_Concat="partial")
        assert_refused(client.final(*[part] * 1000), 507)
        assert client.stored() == 1

    def test_parts_whose_length_tells_later_that_there_is_no_room(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = serve(storage="file-storage", min_free_disk=0)
        data = client.tus.uploads.data
        part = client.create(**DEFERRED)
        url = path_of(client.final(part, part))
        client.append(part, b"hello", 0)
        monkeypatch.setattr(data, "free_space", lambda: 9)
        client.append(part, b"", 5, Upload_Length=5)
        monkeypatch.setattr(data, "concatenate", pytest.fail)
        assert client.head(url).status_code == 507
        monkeypatch.undo()
        assert client.offset(url) == 10
        assert client.content(url) == b"hellohello"

    def test_metadata_is_not_inherited(self, client: Client) -> None:
        # "the partial uploads' metadata SHALL NOT be transferred to the new final upload."
        part = client.create(1, b"x", Upload_Concat="partial", Upload_Metadata="filename YQ==")
        bare = path_of(client.final(part))
        assert "Upload-Metadata" not in client.head(bare).headers
        named = path_of(client.final(part, Upload_Metadata="filename Yg=="))
        assert client.head(named).headers["Upload-Metadata"] == "filename Yg=="

    @pytest.mark.parametrize("data", [b"", b"x"])
    @pytest.mark.parametrize("waiting", [False, True])
    def test_it_takes_no_patch(self, client: Client, data: bytes, waiting: bool) -> None:
        # "The Server MUST respond with the 403 Forbidden status to PATCH requests against a
        # final upload URL and MUST NOT modify the final or its partial uploads."
        part = client.part(b"hel", 5) if waiting else client.part(b"hello")
        final = path_of(client.final(part))
        for offset in (0, 3, 5):
            assert_refused(client.patch(final, data, offset), 403)
        assert client.offset(part) == (3 if waiting else 5)
        assert ("Upload-Offset" in client.head(final).headers) is not waiting

    def test_it_takes_no_length(self, client: Client) -> None:
        # "The Client MUST NOT include the Upload-Length header in the final upload
        # creation."
        part = client.part(b"x")
        assert_refused(client.final(part, Upload_Length=1), 400, "Upload-Length")
        assert_refused(client.final(part, Upload_Defer_Length=1), 400)
        assert client.stored() == 1

    @pytest.mark.parametrize("chunked", [False, True])
    def test_it_takes_no_body(self, client: Client, chunked: bool) -> None:
        part = client.part(b"x")
        assert_refused(client.final(part, data=b"x", chunked=chunked), 403)
        assert client.stored() == 1

    def test_it_can_be_removed(self, client: Client) -> None:
        part = client.part(b"x")
        final = path_of(client.final(part))
        assert client.delete(final).status_code == 204
        assert_refused(client.head(final), 410)
        assert client.content(part) == b"x"


@on_memory
class TestUrls:
    def test_absolute_and_paths(self, client: Client) -> None:
        part = client.part(b"x")
        for url in (
            part,
            f"http://localhost{part}",
            f"//localhost{part}",
            # One server has many names.
            f"http://127.0.0.1:8080{part}",
            f"https://example.org{part}",
        ):
            assert client.content(path_of(client.final(url, part))) == b"xx"

    @pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
    def test_of_a_host_with_the_default_port(self, serve: Serve, scheme: str, port: int) -> None:
        client = serve(behind_proxy=True)
        said = {"X-Forwarded-Proto": scheme, "X-Forwarded-Host": f"example.org:{port}"}
        created = client.post(1, b"x", Upload_Concat="partial", **said)
        location = created.headers["Location"]
        assert location.startswith(f"{scheme}://example.org/files/")
        assert client.final(location, location, **said).status_code == 201

    def test_behind_a_proxy(self, serve: Serve) -> None:
        client = serve(behind_proxy=True)
        headers = {
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Host": "example.org",
            "X-Forwarded-Prefix": "/api",
        }
        created = client.post(1, b"x", Upload_Concat="partial", **headers)
        location = created.headers["Location"]
        id = id_of(location)
        urls = (location, f"/api/files/{id}", f"/files/{id}")
        final = client.final(*urls, **headers)
        assert final.status_code == 201
        inner = f"/files/{id_of(final.headers['Location'])}"
        assert client.content(inner) == b"xxx"
        assert client.head(inner).headers["Upload-Concat"] == "final;" + " ".join(urls)

    def test_of_the_public_url(self, serve: Serve) -> None:
        client = serve(public_url="https://example.org/up")
        location = client.post(1, b"x", Upload_Concat="partial").headers["Location"]
        id = id_of(location)
        assert location == f"https://example.org/up/{id}"
        final = client.final(location, f"/up/{id}", f"/files/{id}/", f"http://localhost/files/{id}")
        assert client.content(f"/files/{id_of(final.headers['Location'])}") == b"xxxx"

    @pytest.mark.parametrize(
        "form",
        [
            "http://evil.org/other{}",
            "ftp://localhost{}",
            "/other{}",
            "{}?x=1",
            "{}#x",
            "x{}",
            "/files/../files/..{}",
            "http://[::1{}",
        ],
    )
    def test_of_others(self, client: Client, form: str) -> None:
        part = client.part(b"x")
        assert_refused(client.final(part, form.format(part)), 400, "Upload-Concat")
        assert client.stored() == 1

    @pytest.mark.parametrize(
        "url",
        [
            "/files/",
            "/files",
            "/files/..",
            "/files/%2e%2e",
            "/files/%00",
            "/files/.x",
            "/files/é",
            "/files/" + "x" * 129,
            "unknown",
            "",
        ],
    )
    def test_of_nothing(self, client: Client, url: str) -> None:
        concat = ("final;" + url).encode().decode("latin-1")
        response = client.post(environ={"HTTP_UPLOAD_CONCAT": concat})
        assert_refused(response, 400, "Upload-Concat")
        assert client.stored() == 0


class TestParts:
    def test_an_unknown_part(self, client: Client) -> None:
        part = client.part(b"x")
        assert_refused(client.final(part, "/files/unknown"), 404, "Upload-Concat")
        assert client.stored() == 1

    def test_a_part_that_is_gone(self, client: Client) -> None:
        part, other = client.part(b"x"), client.part(b"y")
        client.delete(part)
        assert_refused(client.final(other, part), 410, "Upload-Concat")
        assert client.stored() == 1

    def test_an_upload_that_is_no_part(self, client: Client) -> None:
        part, other = client.part(b"x"), client.create(1, b"y")
        assert_refused(client.final(part, other), 400, "not partial")
        final = path_of(client.final(part))
        assert_refused(client.final(final), 400, "not partial")
        assert client.stored() == 3


class TestAccess:
    def test_each_part_is_asked_about_once(self, client: Client) -> None:
        a, b = client.part(b"a"), client.part(b"b")
        asked = listen(client, "pre-access")
        url = path_of(client.final(a, b, a, a))
        told = [(hook.request.method, hook.info.id) for hook in asked]
        assert told == [("POST", id_of(a)), ("POST", id_of(b))]
        assert client.content(url) == b"abaa"

    @pytest.mark.parametrize("remove_parts", [False, True])
    def test_a_part_that_is_not_to_be_touched(self, serve: Serve, remove_parts: bool) -> None:
        client = serve(remove_parts=remove_parts)
        mine, others = client.part(b"mine"), client.part(b"others'")
        listen(client, "pre-access", None, NO)
        created = listen(client, "pre-create")
        assert_hooks_no(client.final(mine, others))
        assert created == []
        assert {info.id for info in client.tus.uploads.infos.list()} == {id_of(mine), id_of(others)}
        listen(client, "pre-access")
        stored = client.tus.uploads.infos.load(id_of(others))
        assert stored.state is State.FINISHED

    def test_trouble_with_asking(self, client: Client) -> None:
        part = client.part(b"x")
        listen(client, "pre-access", OSError("down"))
        assert_refused(client.final(part), 503)
        assert client.stored() == 1


class TestUnfinished:
    def test_it_becomes_readable_later(self, client: Client) -> None:
        done, first, second = client.part(b"one,"), client.part(b"", 4), client.part(b"th", 5)
        final = path_of(client.final(done, first, second))
        response = client.head(final)
        assert response.status_code == 200
        # "The response to a HEAD request for a final upload SHOULD NOT contain the
        # Upload-Offset header unless the concatenation has been successfully finished."
        assert "Upload-Offset" not in response.headers
        # "The Upload-Length header MUST be included if the length of the final resource can
        # be calculated at the time of the request."
        assert response.headers["Upload-Length"] == "13"
        assert response.headers["Upload-Concat"] == f"final;{done} {first} {second}"
        assert_refused(client.get(final), 404)
        client.append(second, b"ree", 2)
        assert "Upload-Offset" not in client.head(final).headers
        client.append(first, b"two,", 0)
        assert client.content(final) == b"one,two,three"
        response = client.head(final)
        assert response.headers["Upload-Offset"] == response.headers["Upload-Length"] == "13"

    def test_without_a_head_in_between(self, client: Client) -> None:
        part = client.part(b"", 5)
        finals = [path_of(client.final(part)), path_of(client.final(part, part))]
        client.append(part, b"hello", 0)
        assert [client.content(final) for final in finals] == [b"hello", b"hellohello"]

    def test_a_part_with_a_deferred_length(self, client: Client) -> None:
        part = client.create(Upload_Defer_Length=1, Upload_Concat="partial")
        final = path_of(client.final(part))
        response = client.head(final)
        assert "Upload-Length" not in response.headers
        assert "Upload-Defer-Length" not in response.headers
        client.append(part, b"hel", 0, Upload_Length=5)
        assert client.head(final).headers["Upload-Length"] == "5"
        client.append(part, b"lo", 3)
        assert client.content(final) == b"hello"

    def test_the_creation_tells_no_offset(self, client: Client) -> None:
        assert "Upload-Offset" not in client.final(client.part(b"x", 5)).headers
        assert client.final(client.part(b"x")).headers["Upload-Offset"] == "1"

    def test_a_part_that_goes_takes_it_along(self, client: Client) -> None:
        done, undone = client.part(b"x"), client.part(b"", 5)
        final = path_of(client.final(done, undone))
        client.delete(undone)
        assert_refused(client.head(final), 410)
        assert_refused(client.get(final), 404)
        assert client.delete(final).status_code == 204

    def test_it_can_be_removed_while_it_waits(self, client: Client) -> None:
        part = client.part(b"", 5)
        final = path_of(client.final(part))
        assert client.delete(final).status_code == 204
        client.append(part, b"hello", 0)
        assert_refused(client.head(final), 410)
        assert client.content(part) == b"hello"

    def test_an_empty_creation_builds_it(self, client: Client) -> None:
        part = client.create(Upload_Defer_Length=1, Upload_Concat="partial")
        final = path_of(client.final(part))
        client.append(part, b"", 0, Upload_Length=0)
        assert client.content(final) == b""


class TestRemoval:
    @pytest.fixture
    def client(self, serve: Serve) -> Client:
        return serve(remove_parts=True)

    def test_parts_go(self, client: Client) -> None:
        a, b = client.part(b"a"), client.part(b"b")
        final = path_of(client.final(a, b, a))
        assert client.content(final) == b"aba"
        for part in (a, b):
            assert_refused(client.head(part), 410)
        assert client.offset(final) == 3

    def test_parts_stay_while_another_final_upload_waits(self, client: Client) -> None:
        a, b = client.part(b"a"), client.part(b"", 1)
        waiting = path_of(client.final(a, b))
        first = path_of(client.final(a))
        assert client.content(first) == b"a"
        assert client.content(a) == b"a"
        client.append(b, b"b", 0)
        assert client.content(waiting) == b"ab"
        assert_refused(client.head(a), 410)
        assert_refused(client.head(b), 410)

    def test_parts_stay_if_the_final_upload_is_refused(self, client: Client) -> None:
        @client.tus.on("pre-finish")
        def refuse(asked: HookRequest) -> HookResponse | None:
            return HookResponse(reject=True, status=422) if asked.info.is_final else None

        part = client.part(b"a")
        assert client.final(part).status_code == 422
        assert client.content(part) == b"a"

    def test_parts_stay_by_default(self, serve: Serve) -> None:
        client = serve()
        part = client.part(b"a")
        client.final(part)
        assert client.tus.uploads.infos.load(id_of(part)).state is State.FINISHED
