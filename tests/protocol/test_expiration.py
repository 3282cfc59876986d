"""Expiration, termination, tombstones, and the sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ClassVar

import flask
import pytest
from werkzeug.test import TestResponse

from protocol.client import MIME, Breaking, Client, assert_refused, path_of
from protocol.conftest import Clock, Serve
from tuswsgi.app import Tus
from tuswsgi.core.errors import UploadNotFound
from tuswsgi.core.events import Event
from tuswsgi.core.info import FileInfo, State
from tuswsgi.infostores.memory import MemoryInfoStore
from tuswsgi.lockers.base import HELD
from tuswsgi.protocol.sweep import Sweeper
from tuswsgi.testing.datastores import Blocks

DAY = 86400


def expires(response: TestResponse) -> float:
    """Return the time in ``Upload-Expires``."""
    text = response.headers["Upload-Expires"]
    assert text.endswith(" GMT"), "the value MUST be in RFC 9110 datetime format"
    return parsedate_to_datetime(text).timestamp()


def id_of(url: str) -> str:
    return url.rpartition("/")[2]


def sweep(client: Client) -> None:
    Sweeper(client.tus.uploads).sweep()


def state(client: Client, url: str) -> State:
    return client.tus.uploads.infos.load(id_of(url)).state


@pytest.fixture
def client(serve: Serve, clock: Clock) -> Client:
    return serve(expiration="1d")


class TestExpiration:
    def test_off_by_default(self, serve: Serve, clock: Clock) -> None:
        client = serve()
        response = client.post(5)
        assert "Upload-Expires" not in response.headers
        clock.ahead += 10_000 * DAY
        assert client.offset(path_of(response)) == 0

    def test_it_is_told_with_every_answer(self, client: Client, clock: Clock) -> None:
        # "This header MUST be included in every PATCH response if the upload is going to
        # expire. If the expiration is known at the creation, the Upload-Expires header MUST
        # be included in the response to the initial POST request."
        created = client.post(11)
        url = path_of(created)
        patched = client.patch(url, b"hello", 0)
        looked = client.head(url)
        for response in (created, patched, looked):
            assert abs(expires(response) - clock() - DAY) < 60
        assert "Upload-Expires" in client.post(11, b"hello").headers
        assert "Upload-Expires" in client.patch(url, b"", 5).headers

    @pytest.mark.parametrize("method", ["HEAD", "PATCH", "DELETE", "GET"])
    def test_after_that_it_is_gone(self, client: Client, clock: Clock, method: str) -> None:
        url = client.create(11, b"hello")
        clock.ahead += DAY + 1
        response = client.request(
            method, url, b"", Tus_Resumable="1.0.0", Content_Type=MIME, Upload_Offset=5
        )
        assert_refused(response, 410)
        assert "Upload-Offset" not in response.headers

    def test_it_counts_from_the_last_byte(self, client: Client, clock: Clock) -> None:
        url = client.create(20)
        for offset in range(5):
            clock.ahead += DAY * 0.9
            client.append(url, b"x", offset)
        assert abs(expires(client.head(url)) - clock() - DAY) < 60

    def test_without_bytes_it_is_not_renewed(self, client: Client, clock: Clock) -> None:
        url = client.create(20)
        before = expires(client.head(url))
        clock.ahead += DAY * 0.6
        client.patch(url, b"", 0)
        client.patch(url, b"x", 5)
        assert expires(client.head(url)) == before
        clock.ahead += DAY * 0.6
        assert_refused(client.head(url), 410)

    def test_a_body_that_breaks_off_renews_it(self, client: Client, clock: Clock) -> None:
        url = client.create(20)
        clock.ahead += DAY * 0.6
        broken = {"CONTENT_LENGTH": "20", "wsgi.input": Breaking(b"hello")}
        assert_refused(client.patch(url, b"", 0, environ=broken), 503)
        clock.ahead += DAY * 0.6
        assert client.offset(url) == 5

    def test_a_long_body_does_not_expire_in_the_middle(self, client: Client, clock: Clock) -> None:
        class Slow(Breaking):
            """Bytes with half a day between them."""

            def read(inner, n: int = -1) -> bytes:  # noqa: N805
                clock.ahead += DAY / 2
                sweep(client)
                if not inner._data:
                    seen.append(client.tus.uploads.infos.load(id_of(url)).has_expired(clock()))
                return super().read(min(n, 1))

        seen: list[bool] = []
        url = client.create(20)
        response = client.patch(
            url, b"", 0, environ={"CONTENT_LENGTH": "6", "wsgi.input": Slow(b"hello!")}
        )
        assert response.status_code == 204
        assert client.offset(url) == 6

    def test_a_store_that_forgets_does_not_do_so_in_the_middle(
        self, embed: Callable[..., Tus], app: flask.Flask, clock: Clock
    ) -> None:
        class Forgetful(MemoryInfoStore):
            """Records that go an hour after they were written last, as in Redis."""

            lifetime = 3600.0
            written_at: ClassVar[dict[str, float]] = {}

            def create(self, info: FileInfo, events: Sequence[Event] = ()) -> None:
                super().create(info, events)
                self.written_at[info.id] = clock()

            def save(self, info: FileInfo, events: Sequence[Event] = ()) -> FileInfo:
                self.load(info.id)
                self.written_at[info.id] = clock()
                return super().save(info, events)

            def load(self, id: str) -> FileInfo:
                if clock() - self.written_at.get(id, 0.0) > self.lifetime:
                    raise UploadNotFound
                return super().load(id)

        class Slow(Breaking):
            """Bytes with 25 minutes between them."""

            def read(self, n: int = -1) -> bytes:
                clock.ahead += 1500
                return super().read(min(n, 1))

        tus = embed(info_store=Forgetful(), hooks_progress_interval="0s")
        app.register_blueprint(tus.blueprint(), url_prefix="/files")
        client = Client(app, tus)
        url = client.create(20)
        clock.ahead += 3000
        environ = {"CONTENT_LENGTH": "6", "wsgi.input": Slow(b"hello!")}
        assert client.patch(url, b"", 0, environ=environ).status_code == 204
        assert client.offset(url) == 6

    def test_finished_uploads_never_expire(self, client: Client, clock: Clock) -> None:
        url = client.create(5, b"hello")
        assert "Upload-Expires" not in client.head(url).headers
        clock.ahead += 1000 * DAY
        sweep(client)
        assert client.content(url) == b"hello"
        assert client.offset(url) == 5

    def test_the_last_answer_tells_none(self, client: Client) -> None:
        url = client.create(5)
        assert "Upload-Expires" not in client.patch(url, b"hello", 0).headers


class TestSweep:
    def test_it_removes_what_has_expired(self, client: Client, clock: Clock) -> None:
        old = client.create(11, b"hello")
        clock.ahead += DAY + 1
        young, finished = client.create(11, b"hello"), client.create(5, b"hello")
        sweep(client)
        assert [state(client, url) for url in (old, young, finished)] == [
            State.EXPIRED,
            State.RECEIVING,
            State.FINISHED,
        ]
        assert_refused(client.head(old), 410)
        assert client.offset(young) == 5
        with pytest.raises(Exception, match="removed"):
            client.tus.uploads.data.offset(client.tus.uploads.infos.load(id_of(old)))

    def test_an_upload_in_use_stays(self, client: Client, clock: Clock) -> None:
        url = client.create(11, b"hello")
        clock.ahead += DAY + 1
        with client.tus.uploads.locker.lock(id_of(url), pytest.fail):
            sweep(client)
        assert state(client, url) is State.RECEIVING
        sweep(client)
        assert state(client, url) is State.EXPIRED

    def test_one_sweeps_for_all(self, client: Client, clock: Clock) -> None:
        # Before the first request, which starts the server's own sweep.
        client.tus.uploads.locker.prepare()
        with client.tus.uploads.locker.lock("tuswsgi-sweep", pytest.fail):
            url = client.create(11)
            clock.ahead += DAY + 1
            sweep(client)
            assert state(client, url) is State.RECEIVING

    def test_it_finishes_what_was_complete(self, client: Client) -> None:
        # As a crash leaves it: the last byte is there, the record does not say so.
        uploads = client.tus.uploads
        url = client.create(5)
        uploads.data.append(uploads.infos.load(id_of(url)), 0, Blocks(b"hello"), HELD)
        assert_refused(client.get(url), 404)
        sweep(client)
        assert client.content(url) == b"hello"

    def test_one_that_fails_does_not_stop_it(self, client: Client, clock: Clock) -> None:
        lost, old = client.create(11, b"hello"), client.create(11, b"hello")
        uploads = client.tus.uploads
        uploads.data.delete(uploads.infos.load(id_of(lost)))
        clock.ahead += DAY + 1
        sweep(client)
        assert state(client, old) is State.EXPIRED
        assert state(client, lost) is State.EXPIRED

    def test_parts_stay_while_a_final_upload_waits(self, client: Client, clock: Clock) -> None:
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        final = path_of(client.final(done, undone))
        # The final upload lives as long as one of its unfinished parts receives bytes.
        clock.ahead += DAY * 0.9
        client.append(undone, b"l", 3)
        clock.ahead += DAY * 0.9
        sweep(client)
        assert client.head(final).status_code == 200
        client.append(undone, b"d", 4)
        assert client.content(final) == b"helloworld"

    def test_a_final_upload_nobody_completes_expires(self, client: Client, clock: Clock) -> None:
        done, undone = client.part(b"hello"), client.part(b"wor", 5)
        final = path_of(client.final(done, undone))
        clock.ahead += DAY + 1
        assert_refused(client.head(final), 410)
        for _ in range(2):
            sweep(client)
        assert state(client, final) is State.EXPIRED
        assert state(client, undone) is State.EXPIRED
        assert_refused(client.head(undone), 410)
        assert client.content(done) == b"hello"


class TestTermination:
    @pytest.mark.parametrize("data", [b"", b"hel", b"hello"])
    def test_an_upload_is_removed(self, client: Client, data: bytes) -> None:
        url = client.create(5, data)
        response = client.delete(url)
        assert response.status_code == 204
        assert response.headers["Tus-Resumable"] == "1.0.0"
        assert response.data == b""
        # "For all future requests to this URL, the Server SHOULD respond with the 404 Not
        # Found or 410 Gone status."
        for again in (
            client.head(url),
            client.patch(url, b"x", len(data)),
            client.get(url),
            client.delete(url),
        ):
            assert_refused(again, 410)
            assert "Upload-Offset" not in again.headers
        assert client.stored() == 0

    def test_its_bytes_are_freed(self, serve: Serve, options: dict[str, Any]) -> None:
        client = serve(storage="file-storage")
        url = client.create(11, b"hello")
        file = Path(options["data_dir"]) / id_of(url)
        assert file.read_bytes() == b"hello"
        client.delete(url)
        assert not file.exists()

    def test_gone_is_not_never_there(self, client: Client) -> None:
        url = client.create(5)
        client.delete(url)
        assert_refused(client.delete(url), 410)
        assert_refused(client.delete("/files/" + "0" * 32), 404)

    def test_the_bytes_may_be_gone_already(self, client: Client) -> None:
        # As a crash in the middle of a DELETE leaves it.
        url = client.create(5, b"hel")
        uploads = client.tus.uploads
        uploads.data.delete(uploads.infos.load(id_of(url)))
        assert_refused(client.head(url), 410)
        assert client.delete(url).status_code == 204
        assert_refused(client.head(url), 410)
