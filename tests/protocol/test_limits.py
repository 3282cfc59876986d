"""A limit for all uploads together: what counts, what is refused, and what goes to make room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import flask
import pytest
from e2e.client import wait_until
from werkzeug.test import TestResponse

from protocol.client import Breaking, Client, assert_refused, path_of
from protocol.conftest import Serve
from tuswsgi.app import Tus
from tuswsgi.core.info import State
from tuswsgi.core.options import MiB

LIMIT = 1000


@pytest.fixture
def client(serve: Serve) -> Client:
    return serve(limited_max_total_size=LIMIT)


def usage(client: Client) -> int:
    return client.tus.uploads.infos.usage()


def state(client: Client, url: str) -> State:
    return client.tus.uploads.infos.load(url.rpartition("/")[2]).state


def assert_full(response: TestResponse, *numbers: int) -> None:
    assert_refused(response, 507, *map(str, numbers))
    assert int(response.headers["Retry-After"]) > 0


class TestPromises:
    def test_a_length_counts_before_its_bytes_come(self, client: Client) -> None:
        client.create(600)
        assert_full(client.post(401), LIMIT, 600, 401)
        assert client.stored() == 1
        url = client.create(400, b"x" * 400)
        assert client.content(url) == b"x" * 400
        assert_full(client.post(1), LIMIT, LIMIT, 1)
        assert client.post(0).status_code == 201

    def test_what_is_deleted_gives_its_room_back(self, client: Client) -> None:
        url = client.create(LIMIT, b"some")
        assert_full(client.post(1))
        assert client.delete(url).status_code == 204
        client.create(LIMIT)

    def test_a_refusal_leaves_nothing(self, client: Client) -> None:
        assert_full(client.post(LIMIT + 1, b"x"))
        assert client.stored() == usage(client) == 0
        client.create(LIMIT)

    def test_a_post_that_is_wrong_keeps_no_room(self, client: Client) -> None:
        response = client.post(5, b"hello", Upload_Checksum="sha1 AAAAAAAAAAAAAAAAAAAAAAAAAAA=")
        assert_refused(response, 460)
        assert client.stored() == usage(client) == 0

    def test_a_post_that_breaks_off_can_be_resumed(self, client: Client) -> None:
        response = client.request(
            "POST",
            client.url,
            environ={"wsgi.input": Breaking(b"hel"), "CONTENT_LENGTH": "5"},
            Tus_Resumable="1.0.0",
            Upload_Length=5,
            Content_Type="application/offset+octet-stream",
        )
        url = path_of(response)
        assert (response.headers["Upload-Offset"], usage(client)) == ("3", 5)
        client.append(url, b"lo", 3)
        assert client.content(url) == b"hello"

    def test_a_final_upload_counts_beside_its_parts(self, client: Client) -> None:
        parts = [client.part(b"x" * 300), client.part(b"y" * 100)]
        final = path_of(client.final(*parts))
        assert usage(client) == 800
        assert_full(client.final(*parts), 800, 400)
        assert client.content(final) == b"x" * 300 + b"y" * 100

    def test_a_final_upload_waits_for_room(self, client: Client) -> None:
        deferred = client.create(Upload_Defer_Length=1, Upload_Concat="partial")
        final = path_of(client.final(deferred))
        other = client.create(500)
        client.append(deferred, b"x" * 300, 0, Upload_Length=300)
        assert client.head(final).status_code == 507
        client.delete(other)
        assert client.head(final).status_code == 200
        assert client.content(final) == b"x" * 300


class TestDeferredLengths:
    def test_what_is_kept_counts(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        assert usage(client) == 0
        client.append(url, b"x" * 300, 0)
        assert usage(client) == 300
        assert_full(client.post(701), 300, 701)

    def test_bytes_must_fit_before_any_is_read(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        client.append(url, b"x" * 300, 0)
        other = client.create(650)
        assert_full(client.patch(url, b"x" * 51, 300), 650, 351)
        assert client.offset(url) == 300
        client.append(url, b"x" * 50, 300)
        client.delete(other)
        client.append(url, b"x" * 51, 350)
        assert usage(client) == 401

    def test_a_length_must_fit(self, client: Client) -> None:
        url = client.create(Upload_Defer_Length=1)
        client.append(url, b"x" * 300, 0)
        client.create(600)
        assert_full(client.patch(url, b"", 300, Upload_Length=401), 600, 401)
        client.append(url, b"x" * 50, 300, Upload_Length=400)
        assert usage(client) == LIMIT

    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_creation_brings_bytes(self, client: Client, chunked: bool) -> None:
        client.create(500)
        url = client.create(data=b"x" * 400, Upload_Defer_Length=1, chunked=chunked)
        assert usage(client) == 900
        client.append(url, b"", 400, Upload_Length=400)
        assert client.content(url) == b"x" * 400

    def test_a_creation_whose_bytes_do_not_fit_is_refused(self, client: Client) -> None:
        client.create(500)
        assert_full(client.post(data=b"x" * 501, Upload_Defer_Length=1), 500, 501)
        assert client.stored() == 1

    def test_of_unknown_lengths_is_kept_what_fits(self, client: Client) -> None:
        url, other = client.create(Upload_Defer_Length=1), client.create(600)
        assert_full(client.patch(url, b"x" * 500, 0, chunked=True), 600)
        assert client.offset(url) == 400
        assert usage(client) == LIMIT
        client.delete(other)
        assert client.patch(url, b"x" * 600, 400, chunked=True).status_code == 204
        assert usage(client) == LIMIT

    # Memory takes its time with long bodies.
    @pytest.mark.parametrize("backends", ["file"], indirect=True)
    def test_long_bodies_are_promised_room_as_they_come(self, serve: Serve) -> None:
        client = serve(limited_max_total_size="50MiB")
        url = client.create(Upload_Defer_Length=1)
        assert client.patch(url, b"x" * 40 * MiB, 0, chunked=True).status_code == 204
        assert usage(client) == 40 * MiB
        assert_full(client.patch(url, b"x" * 20 * MiB, 40 * MiB, chunked=True))
        assert client.offset(url) == usage(client) == 50 * MiB

    def test_the_largest_size_bounds_them_too(self, serve: Serve) -> None:
        client = serve(limited_max_total_size=LIMIT, max_file_size=300)
        url = client.create(Upload_Defer_Length=1)
        assert_refused(client.patch(url, b"x" * 301, 0, chunked=True), 413)
        assert client.offset(url) == 300


class TestEviction:
    @pytest.fixture
    def client(self, serve: Serve) -> Client:
        return serve(limited_max_total_size=LIMIT, limited_evict=True)

    def test_the_oldest_goes_first(self, client: Client) -> None:
        late = client.create(300)
        first, second = (client.create(300, b"x" * 300) for _ in "12")
        client.append(late, b"x" * 300, 0)
        client.create(200)
        assert client.head(first).status_code == 410
        assert (state(client, first), usage(client)) == (State.TERMINATED, 800)
        client.create(500)
        assert client.head(second).status_code == 410
        assert client.content(late) == b"x" * 300

    def test_no_more_goes_than_must(self, client: Client) -> None:
        urls = [client.create(100, b"x" * 100) for _ in range(10)]
        client.create(150)
        assert [client.head(url).status_code for url in urls] == [410] * 2 + [200] * 8

    def test_what_is_unfinished_stays(self, client: Client) -> None:
        unfinished = client.create(600, b"some")
        finished = client.create(400, b"x" * 400)
        assert_full(client.post(401), LIMIT, LIMIT, 401)
        assert client.content(finished) == b"x" * 400  # it would not have been enough
        client.create(400)
        assert client.offset(unfinished) == 4

    def test_parts_that_are_waited_for_stay(self, client: Client) -> None:
        part, unfinished = client.part(b"x" * 100), client.part(b"", 100)
        final = path_of(client.final(part, unfinished))
        assert usage(client) == 400
        assert_full(client.post(601))
        client.append(unfinished, b"y" * 100, 0)
        assert client.content(final) == b"x" * 100 + b"y" * 100

    def test_a_final_upload_does_not_evict_its_own_parts(self, client: Client) -> None:
        parts = [client.part(b"x" * 300), client.part(b"y" * 300)]
        assert_full(client.final(*parts), 600)
        other = client.part(b"z" * 400)
        assert_full(client.final(*parts), LIMIT, 600)
        assert client.head(other).status_code == 200

    def test_what_is_in_use_stays(self, client: Client) -> None:
        used, free = (client.create(400, b"x" * 400) for _ in "12")
        with client.tus.uploads.locker.lock(used.rpartition("/")[2]):
            client.create(500)
        assert [client.head(url).status_code for url in (used, free)] == [200, 410]

    def test_bytes_of_unknown_lengths_make_room(self, client: Client) -> None:
        finished = client.create(900, b"x" * 900)
        url = client.create(Upload_Defer_Length=1)
        client.append(url, b"x" * 101, 0)
        assert client.head(finished).status_code == 410

    def test_nothing_goes_for_what_can_never_fit(self, client: Client) -> None:
        finished = client.create(900, b"x" * 900)
        assert_full(client.post(LIMIT + 1))
        assert client.head(finished).status_code == 200


def test_hooks_are_told_of_what_was_evicted(embed: Callable[..., Tus], app: flask.Flask) -> None:
    tus = embed(limited_max_total_size=LIMIT, limited_evict=True)
    told: list[tuple[str, str]] = []

    @tus.on("post-finish")
    @tus.on("post-terminate")
    def tell(hook: Any) -> None:
        told.append((hook.type.value, hook.info.id))

    app.register_blueprint(tus.blueprint(), url_prefix="/files")
    client = Client(app, tus)
    url = client.create(900, b"x" * 900)
    id = url.rpartition("/")[2]
    wait_until(lambda: told == [("post-finish", id)] and not tus.uploads.infos.events(id), "a hook")
    client.create(500)
    wait_until(lambda: told[1:] == [("post-terminate", id)], "the other hook")


def test_what_hooks_are_yet_to_be_told_of_stays(
    embed: Callable[..., Tus], app: flask.Flask
) -> None:
    tus = embed(limited_max_total_size=LIMIT, limited_evict=True)
    may_hear = threading.Event()

    @tus.on("post-finish")
    def tell(hook: Any) -> None:
        assert may_hear.wait(60)

    app.register_blueprint(tus.blueprint(), url_prefix="/files")
    client = Client(app, tus)
    url = client.create(900, b"x" * 900)
    assert_full(client.post(500))
    may_hear.set()
    wait_until(lambda: not tus.uploads.infos.events(url.rpartition("/")[2]), "the hook")
    client.create(500)
