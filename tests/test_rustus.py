"""``tuswsgi info copy --from rustus+...``: what a rustus left becomes uploads of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from private_servers import PrivateRedis
from rustus import FIRST_FIELDS, Rustus, in_files

from tuswsgi.commands.cli import main
from tuswsgi.core.info import FileInfo, State
from tuswsgi.datastores.file import FileDataStore
from tuswsgi.infostores.file import FileInfoStore


@pytest.fixture(scope="module")
def redis_server() -> Iterator[PrivateRedis]:
    server = PrivateRedis()
    yield server
    server.remove()


@pytest.fixture(params=["files", "redis"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Rustus]]:
    """The DSN of a rustus' records, and the rustus."""
    data_dir = tmp_path / "data"
    if request.param == "files":
        # By default rustus keeps both in one directory.
        yield f"rustus+file://{data_dir}", Rustus(data_dir, in_files(data_dir))
        return
    dsn = request.getfixturevalue("redis_server").dsn
    with redis.Redis.from_url(dsn) as client:
        client.flushdb()
        yield f"rustus+{dsn}", Rustus(data_dir, client.set)


@pytest.fixture
def dsn(source: tuple[str, Rustus]) -> str:
    return source[0]


@pytest.fixture
def rustus(source: tuple[str, Rustus]) -> Rustus:
    return source[1]


@pytest.fixture
def infos(tmp_path: Path) -> FileInfoStore:
    store = FileInfoStore(tmp_path / "info")
    store.prepare()
    return store


class Copy:
    """Calls the command, with rustus' data directory as ours."""

    def __init__(self, dsn: str, tmp_path: Path) -> None:
        self.data_dir = tmp_path / "data"
        self._flags = ["--from", dsn, "--to", f"file://{tmp_path}/info"]

    def __call__(self, *flags: str, code: int = 0) -> str:
        all_flags = [*self._flags, "--data-dir", str(self.data_dir), *flags]
        result = CliRunner().invoke(main, ["info", "copy", *all_flags])
        assert result.exit_code == code, result.output
        return result.output


@pytest.fixture
def copy(dsn: str, tmp_path: Path) -> Copy:
    return Copy(dsn, tmp_path)


def only(infos: FileInfoStore) -> FileInfo:
    (info,) = infos.list()
    return info


def test_an_unfinished_upload_has_the_bytes_of_its_file(
    rustus: Rustus, copy: Copy, infos: FileInfoStore
) -> None:
    # The record is written after the bytes: here rustus died in between.
    id = rustus.upload(
        b"hello", 11, offset=2, metadata={"filename": "a.txt"}, created_at=1700000000
    )
    assert "1 copied" in copy()
    info = only(infos)
    assert (info.id, info.size, info.offset, info.state) == (id, 11, 5, State.RECEIVING)
    assert dict(info.metadata) == {"filename": b"a.txt"}
    assert info.created_at == 1700000000.0
    assert info.finished_at is None
    store = FileDataStore(copy.data_dir)
    assert store.offset(info) == 5
    assert store.location(info) == str(copy.data_dir / "2024/5/1" / id)


def test_a_deferred_length(rustus: Rustus, copy: Copy, infos: FileInfoStore) -> None:
    rustus.upload(b"hello", None)
    copy()
    info = only(infos)
    assert (info.size, info.offset, info.state) == (None, 5, State.RECEIVING)


@pytest.mark.parametrize("data", [b"hello", b""])
def test_a_finished_upload(rustus: Rustus, copy: Copy, infos: FileInfoStore, data: bytes) -> None:
    id = rustus.upload(data, len(data), directory="")
    os.utime(copy.data_dir / id, (1700000000.5, 1700000000.5))
    copy()
    info = only(infos)
    assert (info.size, info.offset, info.state) == (len(data), len(data), State.FINISHED)
    assert info.finished_at == 1700000000.5


def test_an_upload_whose_last_bytes_were_not_recorded_is_to_be_finished(
    rustus: Rustus, copy: Copy, infos: FileInfoStore
) -> None:
    rustus.upload(b"hello", 5, offset=4)
    copy()
    assert (only(infos).offset, only(infos).state) == (5, State.RECEIVING)


def test_partial_and_final_uploads(rustus: Rustus, copy: Copy, infos: FileInfoStore) -> None:
    parts = [rustus.upload(data, 5, is_partial=True) for data in (b"hello", b"world")]
    open_part = rustus.upload(b"he", 5, is_partial=True)
    final = rustus.upload(b"helloworld", 10, is_final=True, parts=parts)
    assert "4 copied" in copy("--url", "/uploads/")
    assert {infos.load(part).concat for part in parts} == {"partial"}
    assert all(infos.load(part).is_partial for part in [*parts, open_part])
    assert infos.load(open_part).state is State.RECEIVING
    info = infos.load(final)
    assert (info.is_final, info.state, info.size) == (True, State.FINISHED, 10)
    assert info.partial_uploads == tuple(parts)
    assert info.concat == f"final;/uploads/{parts[0]} /uploads/{parts[1]}"


def test_metadata_of_any_kind(rustus: Rustus, copy: Copy, infos: FileInfoStore) -> None:
    values = {
        "filename": "кошка \N{CAT FACE} größe.txt",
        "empty": "",
        "control": '\0\n\t\x7f\u2028"\\',
        "looks-like-base64": "aGVsbG8=",
        "long": "x" * 10_000,
        "p@ss!~": "1,2 3",
    }
    rustus.upload(b"", 5, metadata=values)
    copy()
    found = only(infos).metadata
    assert {key: value.decode() for key, value in found.items()} == values
    assert list(found) == list(values)


def test_records_of_the_first_releases(rustus: Rustus, copy: Copy, infos: FileInfoStore) -> None:
    rustus.upload(b"hello", 5, known=FIRST_FIELDS)
    copy()
    info = only(infos)
    assert (info.state, info.storage.type, info.is_partial) == (
        State.FINISHED,
        "file_storage",
        False,
    )


def test_ids_without_hyphens_are_found(rustus: Rustus, copy: Copy, infos: FileInfoStore) -> None:
    id = "0123456789abcdef0123456789abcdef"
    (copy.data_dir / id).parent.mkdir(exist_ok=True)
    (copy.data_dir / id).write_bytes(b"hello")
    record = {
        **{"id": id, "offset": 5, "length": 9, "path": str(copy.data_dir / id)},
        **{"created_at": 1, "deferred_size": False, "metadata": {}},
    }
    rustus.keep(id, json.dumps(record))
    copy()
    assert only(infos).id == id


@pytest.mark.parametrize("was", ["/srv/rustus/data", "./data", "data"])
def test_a_data_directory_that_moved(
    rustus: Rustus, copy: Copy, infos: FileInfoStore, was: str
) -> None:
    id = rustus.upload(b"hello", 11)
    other = rustus.upload(b"hello", 11, path=f"{was}/2024/5/1/moved")
    (copy.data_dir / "2024/5/1" / other).unlink()
    assert f"{other}: Its file {was}/2024/5/1/moved is not below" in copy(code=1)
    moved = rustus.upload(b"hello", 11)
    text = json.dumps(
        {
            **{"id": moved, "offset": 5, "length": 11, "path": f"{was}/2024/5/1/{moved}"},
            **{"created_at": 1, "deferred_size": False, "metadata": {}},
        }
    )
    rustus.keep(moved, text)
    copy(code=1)
    assert {info.storage.path for info in infos.list()} == {f"2024/5/1/{id}", f"2024/5/1/{moved}"}


def test_what_cannot_be_used_is_said_upload_by_upload(
    rustus: Rustus, copy: Copy, infos: FileInfoStore, tmp_path: Path
) -> None:
    outside = tmp_path / "elsewhere"
    outside.write_bytes(b"hello")
    reasons = {
        rustus.upload(b"", 5, storage="s3_storage"): "in s3_storage, not in files",
        rustus.upload(b"hello", 9, path=str(outside)): f"{outside} is not below",
        rustus.upload(b"hello", 9, path="../elsewhere"): "../elsewhere is not below",
        rustus.upload(b"hello", 9, path=None): "is not below",
        rustus.upload(b"hello", 3, offset=2): "5 bytes where the upload has 3",
        rustus.upload(b"he", 5, offset=5): "2 bytes where the upload has 5",
        rustus.upload(b"", None, is_final=True): "never concatenated",
        rustus.upload(b"", 5, metadata={"a\tb": ""}): "metadata cannot be sent",
        rustus.upload(b"", 5, id="another"): "It is the record of another",
        rustus.upload(b"", 5, created_at="today"): "not a record of rustus",
    }
    for text in ("", "{", "[]", "null", '{"id": 1}'):
        id = rustus.upload(b"", 5)
        rustus.keep(id, text)
        reasons[id] = "not a record of rustus"
    good = rustus.upload(b"hello", 9)
    lines = copy(code=1).splitlines()
    for id, reason in reasons.items():
        (line,) = (line for line in lines if line.startswith(f"{id}: "))
        assert reason in line
    assert f"1 copied, 0 overwritten, 0 there already, {len(reasons)} not copied." in lines
    assert only(infos).id == good


def test_finished_uploads_whose_files_an_application_took(
    rustus: Rustus, copy: Copy, infos: FileInfoStore
) -> None:
    taken = rustus.upload(b"hello", 5, created_at=1700000000)
    lost = rustus.upload(b"he", 5)
    for id in (taken, lost):
        (copy.data_dir / "2024/5/1" / id).unlink()
    assert "2 not copied" in copy(code=1)
    assert "1 copied, 0 overwritten, 0 there already, 1 not copied" in copy(
        "--without-files", code=1
    )
    info = only(infos)
    assert (info.id, info.offset, info.finished_at) == (taken, 5, 1700000000.0)


def test_the_second_run_finds_everything_there(rustus: Rustus, copy: Copy) -> None:
    for length in (5, 11):
        rustus.upload(b"hello", length, metadata={"a": "b", "c": "d"})
    copy()
    assert "0 copied, 0 overwritten, 2 there already." in copy()


def test_an_upload_that_went_on_since_is_not_taken_back(
    rustus: Rustus, copy: Copy, infos: FileInfoStore
) -> None:
    id = rustus.upload(b"hello", 11)
    copy()
    infos.save(infos.load(id).replace(state=State.FINISHED, offset=11, finished_at=5.0))
    assert "1 not copied" in copy(code=1)
    assert only(infos).state is State.FINISHED


def test_records_are_not_written_over_those_of_rustus(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    rustus = Rustus(data_dir, in_files(data_dir))
    id = rustus.upload(b"hello", 11)
    before = (data_dir / f"{id}.info").read_bytes()
    flags = ["--from", f"rustus+file://{data_dir}", "--to", f"file://{data_dir}"]
    result = CliRunner().invoke(main, ["info", "copy", *flags, "--data-dir", str(data_dir)])
    assert result.exit_code == 1
    assert f"{id}: Its record cannot be read" in result.output
    assert (data_dir / f"{id}.info").read_bytes() == before


def test_other_keys_of_the_redis_are_left_alone(
    redis_server: PrivateRedis, tmp_path: Path, infos: FileInfoStore
) -> None:
    with redis.Redis.from_url(redis_server.dsn) as client:
        client.flushdb()
        client.set("session:1", "x")
        client.hset("0123456789abcdef0123456789abcdef", "a", "b")
        id = Rustus(tmp_path / "data", client.set).upload(b"hello", 11)
        before = {key: client.dump(key) for key in client.scan_iter()}
        Copy(f"rustus+{redis_server.dsn}", tmp_path)()
        assert {key: client.dump(key) for key in client.scan_iter()} == before
    assert only(infos).id == id


@pytest.mark.parametrize(
    ("dsn", "code", "said"),
    [
        ("rustus+redis://127.0.0.1:1", 1, "Error: rustus' Redis does not answer"),
        ("rustus+file:///there/is/nothing", 1, "/there/is/nothing cannot be read"),
        ("rustus+file://relative", 1, "has to look like file:///directory"),
        ("rustus+mysql://127.0.0.1/db", 1, "The DSN of rustus' Redis is wrong"),
    ],
)
def test_a_source_that_is_not_there(dsn: str, code: int, said: str, tmp_path: Path) -> None:
    assert said in Copy(dsn, tmp_path)(code=code)
