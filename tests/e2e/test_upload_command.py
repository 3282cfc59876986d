"""``tuswsgi upload``: files that change, servers that say strange things, what is remembered."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from e2e.client import PATIENCE, content, wait_until
from e2e.conftest import Server
from tuswsgi.commands.client import Remembered, Upload, UploadFailed

Change = Callable[[Path], object]


def _shrink(file: Path) -> None:
    os.truncate(file, 400_000)


def _grow(file: Path) -> None:
    with file.open("ab") as more:
        more.write(b"another line\n")


def _rewrite(file: Path) -> None:
    with file.open("r+b") as same:
        same.write(b"other bytes, as many as before")


def _replace(file: Path) -> None:
    status, new = file.stat(), file.with_name("new")
    new.write_bytes(bytes(status.st_size))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(file)


@pytest.mark.parametrize("change", [_shrink, _grow, _rewrite, _replace, Path.unlink])
def test_a_file_that_changes_is_not_uploaded(
    tmp_path: Path, server: Server, change: Change
) -> None:
    file, state = _file(tmp_path), tmp_path / "state.json"
    seen = []

    def progress(offset: int, length: int) -> None:
        seen.append((offset, length))
        if offset == 400_000:
            change(file)

    with pytest.raises(UploadFailed, match="file was changed during the upload"):
        _upload(file, _url(server), state, progress=progress)
    assert seen[-1] == (400_000, 1_000_000)
    assert json.loads(state.read_text()) == {}


@pytest.mark.parametrize("change", [_shrink, _grow])
def test_the_command_fails_for_a_file_that_changes(
    tmp_path: Path, server: Server, change: Change
) -> None:
    file = _file(tmp_path)
    before = set(server.data_dir.iterdir())
    with _command(file, _url(server), tmp_path / "state.json", "--chunk-size", "100") as command:
        wait_until(lambda: _sizes(server, before), "the first bytes")
        change(file)
        out, err = command.communicate(timeout=PATIENCE)
    assert (command.returncode, out) == (1, "")
    assert "file was changed during the upload. Upload it again, or a copy" in err
    assert "100%" not in err


def test_an_interrupted_upload_is_resumed_by_the_same_command(
    tmp_path: Path, server: Server
) -> None:
    file = _file(tmp_path)
    state = tmp_path / "state.json"
    before = set(server.data_dir.iterdir())
    with _command(file, _url(server), state, "--chunk-size", "100") as command:
        wait_until(lambda: _sizes(server, before), "the first bytes")
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=PATIENCE)
    assert command.returncode == 1
    assert "Run the same command again to resume it." in err
    assert "Traceback" not in err
    without_scheme = _url(server).removeprefix("http://")
    with _command(file, without_scheme, state) as command:
        out, err = command.communicate(timeout=PATIENCE)
    assert command.returncode == 0, err
    assert len(set(server.data_dir.iterdir()) - before) == 1
    assert server.client.get(urlsplit(out.strip()).path).body == file.read_bytes()


def test_what_is_no_file_is_not_uploaded(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UploadFailed, match="null is not a regular file"):
        _upload(Path("/dev/null"), _url(server), tmp_path / "state.json")


def test_an_empty_file(tmp_path: Path, server: Server) -> None:
    file = tmp_path / "file"
    file.touch()
    assert server.stored(_upload(file, _url(server), tmp_path / "state.json")) == 0


class Strange:
    """A server that answers as it is told, and keeps what it was asked."""

    def __init__(self, answers: Mapping[str, tuple[int, Mapping[str, str]]]) -> None:
        self.answers = answers
        self.body = b""
        #: Method, path and credentials of each request.
        self.requests: list[tuple[str, str, str | None]] = []
        strange = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = (self.command, self.path, self.headers.get("Authorization"))
                strange.requests.append(request)
                status, headers = strange.answers[self.command]
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(strange.body))}.items():
                    self.send_header(name, value.format(port=strange.port))
                self.end_headers()
                self.wfile.write(strange.body)

            do_POST = do_HEAD = do_PATCH = _answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def count(self, method: str) -> int:
        return sum(request[0] == method for request in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_CREATED = (201, {"Location": "http://127.0.0.1:{port}/files/one"})


@pytest.fixture
def strange() -> Iterator[Callable[..., Strange]]:
    servers = []

    def start(
        head: Mapping[str, str], patch: Mapping[str, str], post: tuple[int, Mapping[str, str]]
    ) -> Strange:
        servers.append(Strange({"POST": post, "HEAD": (200, head), "PATCH": (204, patch)}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_server_without_progress_is_left_alone_after_some_attempts(
    tmp_path: Path, strange: Callable[..., Strange]
) -> None:
    server = strange({"Upload-Offset": "0"}, {"Upload-Offset": "0"}, _CREATED)
    said: list[str] = []
    with pytest.raises(UploadFailed, match="its offset is the same as before"):
        _upload(_file(tmp_path), _at(server), tmp_path / "state.json", say=said.append, retries=2)
    assert server.count("PATCH") == 3
    assert [line.rpartition("Trying again ")[2] for line in said] == ["in 0.5 s.", "in 1 s."]


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({}, "has no Upload-Offset"),
        ({"Upload-Offset": "many"}, "has a wrong Upload-Offset"),
        ({"Upload-Offset": "-5"}, "has a wrong Upload-Offset"),
        ({"Upload-Offset": "1000001"}, "has a wrong Upload-Offset"),
    ],
)
def test_a_server_that_tells_no_offset_is_not_believed(
    tmp_path: Path, strange: Callable[..., Strange], patch: Mapping[str, str], reason: str
) -> None:
    server = strange({}, patch, _CREATED)
    with pytest.raises(UploadFailed, match=reason):
        _upload(_file(tmp_path), _at(server), tmp_path / "state.json")


def test_an_empty_file_counts_when_the_server_has_it(
    tmp_path: Path, strange: Callable[..., Strange]
) -> None:
    file = tmp_path / "file"
    file.touch()
    server = strange({"Upload-Offset": "0", "Upload-Length": "0"}, {}, _CREATED)
    assert _upload(file, _at(server), tmp_path / "state.json").endswith("/files/one")
    server = strange({"Upload-Length": "0"}, {}, _CREATED)
    with pytest.raises(UploadFailed, match="has no Upload-Offset"):
        _upload(file, _at(server), tmp_path / "state.json")


@pytest.mark.parametrize("location", ["/files/one", "http://127.0.0.1:{port}/files/one"])
def test_a_password_goes_to_its_server_only(
    tmp_path: Path, strange: Callable[..., Strange], location: str
) -> None:
    offset = {"Upload-Offset": "1000000", "Upload-Length": "1000000"}
    server = strange(offset, {}, (201, {"Location": location}))
    file, state = _file(tmp_path), tmp_path / "state.json"
    url = f"http://me:hunter2@127.0.0.1:{server.port}/files/"
    with pytest.raises(UploadFailed):
        _upload(file, url, state)
    assert list(json.loads(state.read_text()).values()) == [f"{_at(server)}one"]
    assert "hunter2" not in state.read_text()
    assert _upload(file, url, state) == f"{_at(server)}one"
    credentials = "Basic bWU6aHVudGVyMg=="
    assert server.requests == [
        ("POST", "/files/", credentials),
        ("PATCH", "/files/one", credentials),
        ("HEAD", "/files/one", credentials),
    ]


def test_a_password_is_not_for_another_server(
    tmp_path: Path, strange: Callable[..., Strange]
) -> None:
    other = strange({}, {"Upload-Offset": "1000000"}, _CREATED)
    server = strange({}, {}, (201, {"Location": _at(other)}))
    _upload(_file(tmp_path), f"http://me:hunter2@127.0.0.1:{server.port}/", tmp_path / "state")
    assert other.requests == [("PATCH", "/files/", None)]


@pytest.mark.parametrize("on_another_server", [False, True])
def test_headers_go_to_their_server_only(
    tmp_path: Path, strange: Callable[..., Strange], on_another_server: bool
) -> None:
    other = strange({}, {"Upload-Offset": "1000000"}, _CREATED)
    location = _at(other) if on_another_server else "/files/one"
    server = strange({}, {"Upload-Offset": "1000000"}, (201, {"Location": location}))
    headers = ("--header", "Authorization: Bearer secret", "--header", "X-Other:1")
    with _command(_file(tmp_path), _at(server), tmp_path / "state", *headers) as command:
        assert command.wait(PATIENCE) == 0
    assert server.requests[0] == ("POST", "/files/", "Bearer secret")
    patched = other.requests if on_another_server else server.requests[1:]
    assert [request[2] for request in patched] == [None if on_another_server else "Bearer secret"]


def test_a_page_of_html_is_not_printed(tmp_path: Path, strange: Callable[..., Strange]) -> None:
    server = strange({}, {}, (403, {}))
    server.body = b"<!DOCTYPE html><html><h1>Go away</h1></html>"
    with pytest.raises(UploadFailed, match=r"^The server answered 403 \(Forbidden\)\.$"):
        _upload(_file(tmp_path), _at(server), tmp_path / "state.json")
    server.body = b"Uploads of cats only."
    with pytest.raises(UploadFailed, match=r"^The server answered 403: Uploads of cats only\.$"):
        _upload(_file(tmp_path), _at(server), tmp_path / "state.json")


def test_only_its_owner_can_read_what_is_remembered(tmp_path: Path, server: Server) -> None:
    state = tmp_path / "new" / "uploads.json"
    before = os.umask(0o022)
    try:
        _upload(_file(tmp_path), _url(server), state)
    finally:
        os.umask(before)
    modes = {path.name: _mode(path) for path in (state.parent, *state.parent.iterdir())}
    assert modes == {"new": 0o700, "uploads.json": 0o600, "uploads.json.lock": 0o600}


def test_a_file_of_before_is_not_for_everybody_any_more(tmp_path: Path) -> None:
    state = tmp_path / "uploads.json"
    state.write_text('{"one": "http://localhost/files/1"}')
    state.chmod(0o644)
    Remembered(state).set("two", "http://localhost/files/2")
    assert _mode(state) == 0o600
    assert Remembered(state).get("one") == "http://localhost/files/1"


def test_uploads_at_the_same_time_are_all_remembered(tmp_path: Path) -> None:
    state = tmp_path / "uploads.json"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tuswsgi.commands.client import Remembered\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for n in range(50):\n"
        "    Remembered(Path(sys.argv[1])).set(f'{sys.argv[2]}-{n}', 'http://localhost/')\n"
    )
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(state), str(n)], stdin=pipe, stdout=pipe, text=True
        )
        for n in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=PATIENCE)
    assert len(json.loads(state.read_text())) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == [state.name, f"{state.name}.lock"]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"KEY": 5}', b'{"KEY": null}'])
def test_what_cannot_be_understood_counts_as_nothing(
    tmp_path: Path, server: Server, text: bytes
) -> None:
    file, state = _file(tmp_path), tmp_path / "state.json"
    state.write_bytes(text.replace(b"KEY", _key(file, _url(server)).encode()))
    assert server.stored(_upload(file, _url(server), state)) == 1_000_000


@pytest.mark.parametrize("url", ["", "nonsense", "http://[", "http://127.0.0.1:x/", "{own}"])
def test_what_is_no_upload_of_the_file_is_begun_anew(
    tmp_path: Path, server: Server, url: str
) -> None:
    file, state = _file(tmp_path), tmp_path / "state.json"
    other = f"{_url(server)}{server.client.create(999).rpartition('/')[2]}"
    state.write_text(json.dumps({_key(file, _url(server)): url.format(own=other)}))
    assert server.stored(_upload(file, _url(server), state)) == 1_000_000


def test_an_upload_that_cannot_be_remembered_is_made(tmp_path: Path, server: Server) -> None:
    file = _file(tmp_path)
    state = file / "state.json"
    command = _command(file, _url(server), state)
    out, err = command.communicate(timeout=PATIENCE)
    assert (command.returncode, server.stored(out.strip())) == (0, 1_000_000)
    assert f"Unfinished uploads cannot be remembered in {state}: File exists." in err


def _upload(file: Path, url: str, state: Path, **options: object) -> str:
    defaults = {"progress": lambda offset, length: None, "say": print, "retries": 0}
    upload = Upload(
        file=file,
        url=url,
        remembered=Remembered(state),
        chunk_size=100_000,
        **{**defaults, **options},  # type: ignore[arg-type]
    )
    return upload.run()


def _command(file: Path, url: str, state: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tuswsgi", "upload", str(file), url, "--state", str(state)]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *flags], stdout=pipe, stderr=pipe, text=True)


def _file(directory: Path) -> Path:
    file = directory / "file"
    file.write_bytes(content(1_000_000))
    return file


def _sizes(server: Server, before: set[Path]) -> int:
    new = set(server.data_dir.iterdir()) - before
    return sum(path.stat().st_size for path in new if path.is_file())


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _key(file: Path, url: str) -> str:
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns} {url}"


def _url(server: Server) -> str:
    return f"http://{server.client.origin.host}/files/"


def _at(server: Strange) -> str:
    return f"http://127.0.0.1:{server.port}/files/"
