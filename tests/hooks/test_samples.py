"""The samples in ``hooks`` do what their README says, alone and with a server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import services
from e2e.client import TUS, wait_until
from e2e.conftest import SERVE, Server, running

from hooks.broker import Inspector
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata, Storage
from tuswsgi.hooks.base import HookRequest
from tuswsgi.hooks.payloads import FormatName, decode_answer, payload_format

SAMPLES = Path(__file__).parent.parent.parent / "hooks"
EICAR = b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR-STANDARD" + b"-ANTIVIRUS-TEST-FILE!$H+H*"

BOTH_FORMATS = pytest.mark.parametrize("format", [FormatName.DEFAULT, FormatName.V2])
BOTH_LANGUAGES = pytest.mark.parametrize("language", ["python", "shell"])


def run(
    program: str,
    info: FileInfo,
    location: Path | None = None,
    *args: str,
    format: FormatName = FormatName.DEFAULT,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a sample as the server does."""
    type = HookType(args[0] if args else Path(program).name)
    request = RequestInfo("POST", "/files/", "127.0.0.1")
    hook = HookRequest(type, info, request, location and str(location))
    given = {"TUS_ID": info.id, "TUS_SIZE": str(info.size or 0), "TUS_OFFSET": str(info.offset)}
    payload = payload_format(format).encode(hook)
    return subprocess.run(
        [SAMPLES / program, *args, payload],
        input=payload,
        env={**os.environ, **given, **(env or {})},
        capture_output=True,
        text=True,
    )


def upload(size: int | None = 5, **metadata: str) -> FileInfo:
    return FileInfo("one", size, metadata=Metadata.of(metadata), storage=Storage("file_storage"))


@BOTH_FORMATS
def test_python_takes_what_it_knows_and_files_it(format: FormatName) -> None:
    ended = run("python/pre-create", upload(filename="../Me.JPG"), format=format)
    assert ended.returncode == 0
    answer = decode_answer(HookType.PRE_CREATE, ended.stdout)
    assert answer is not None
    assert answer.change is not None
    assert (answer.reject, answer.change.path) == (False, "pictures/one")


@pytest.mark.parametrize(
    ("info", "status"),
    [(upload(), 415), (upload(filename="a.exe"), 415), (upload(2**40, filename="a.mp4"), 413)],
)
def test_python_refuses_the_rest(info: FileInfo, status: int) -> None:
    ended = run("python/pre-create", info)
    answer = decode_answer(HookType.PRE_CREATE, ended.stdout)
    assert answer is not None
    assert (answer.reject, answer.status) == (True, status)


@BOTH_FORMATS
def test_the_shell_wants_a_name(format: FormatName) -> None:
    assert run("shell/pre-create", upload(filename="a"), format=format).returncode == 0
    refused = run("shell/pre-create", upload(), format=format)
    assert (refused.returncode, refused.stderr) == (1, "Please name your file.\n")


@BOTH_LANGUAGES
def test_parts_need_no_name(language: str) -> None:
    ended = run(f"{language}/pre-create", upload().replace(is_partial=True))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_python_writes_facts_and_may_do_so_twice(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"hello")
    inbox = tmp_path / "inbox"
    for _ in range(2):
        ended = run(
            "python/post-finish",
            upload(filename="a.txt"),
            tmp_path / "one",
            env={"INBOX": str(inbox)},
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        (file,) = inbox.iterdir()
        assert file.name == "one.json"
        assert json.loads(file.read_text()) == {
            "name": "a.txt",
            "path": str(tmp_path / "one"),
            "size": 5,
            "sha256": hashlib.sha256(b"hello").hexdigest(),
        }


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("a.txt", "txt"),
        ("../../etc/passwd", "bin"),
        ("a.t/xt", "bin"),
        ("a.$(id)", "bin"),
        ("", "bin"),
    ],
)
def test_the_shell_copies_and_may_do_so_twice(tmp_path: Path, name: str, extension: str) -> None:
    (tmp_path / "one").write_bytes(b"hello")
    inbox = tmp_path / "in box"
    for _ in range(2):
        ended = run(
            "shell/post-finish", upload(filename=name), tmp_path / "one", env={"INBOX": str(inbox)}
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        (file,) = inbox.iterdir()
        assert (file.name, file.read_bytes()) == (f"one.{extension}", b"hello")


@BOTH_LANGUAGES
def test_a_failed_post_finish_says_so(tmp_path: Path, language: str) -> None:
    env = {"INBOX": str(tmp_path / "inbox")}
    assert run(f"{language}/post-finish", upload(), tmp_path / "gone", env=env).returncode != 0


def test_one_program_for_all_events() -> None:
    refused = run("single_file_hook.sh", upload(), None, "pre-create")
    assert (refused.returncode, refused.stderr) == (1, "Please name your file.\n")
    assert run("single_file_hook.sh", upload(filename="a"), None, "pre-create").returncode == 0
    assert run("single_file_hook.sh", upload(), None, "post-receive").returncode == 0


def scan(path: Path, scanner: Path | None = None) -> tuple[bool, int | None]:
    """Return whether the scan refuses a file, and with which status."""
    # Without ClamAV, unless the test brings its own.
    directories = [str(scanner.parent)] if scanner else []
    env = {"PATH": ":".join([*directories, str(Path(sys.executable).parent)])}
    ended = run("virus_scan/pre-finish", upload(), path, env=env)
    assert ended.returncode == 0, ended.stderr
    answer = decode_answer(HookType.PRE_FINISH, ended.stdout)
    return (False, None) if answer is None else (answer.reject, answer.status)


def test_the_scan_knows_the_test_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"clean")
    assert scan(file) == (False, None)
    # Across the end of what is read at once.
    file.write_bytes(b"x" * (1024 * 1024 - 10) + EICAR + b"x")
    assert scan(file) == (True, 422)


def test_a_scan_that_fails_is_to_be_repeated(tmp_path: Path) -> None:
    assert scan(tmp_path / "gone") == (True, 503)


@pytest.mark.parametrize("program", ["clamdscan", "clamscan"])
@pytest.mark.parametrize(
    ("code", "expected"), [(0, (False, None)), (1, (True, 422)), (2, (True, 503))]
)
def test_clamav_is_asked(
    tmp_path: Path, program: str, code: int, expected: tuple[bool, int | None]
) -> None:
    file, scanner = tmp_path / "a file", tmp_path / "bin" / program
    file.write_bytes(b"clean")
    scanner.parent.mkdir()
    scanner.write_text(
        f'#!/bin/sh\nfor last; do :; done\n[ "$last" = "{file}" ] || exit 9\necho x\nexit {code}\n'
    )
    scanner.chmod(0o755)
    assert scan(file, scanner) == expected


@contextmanager
def serving(tmp_path: Path, *flags: object, **environ: str) -> Iterator[Server]:
    data_dir = tmp_path / "data"
    command = [*SERVE, "--data-dir", str(data_dir), "--workers", "1", *map(str, flags)]
    with running(Server(command, data_dir, environ)) as server:
        yield server


def metadata(name: str) -> dict[str, str]:
    return {"upload_metadata": f"filename {b64encode(name.encode()).decode()}"}


def post(server: Server, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.request("POST", "/files/", {**TUS, "Upload-Length": 5, **named})


def test_python_programs(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    flags = ["--hooks-dir", SAMPLES / "python", "--hooks", "pre-create,post-finish"]
    with serving(tmp_path, *flags, INBOX=str(inbox)) as server:
        refused = post(server)
        assert refused.status == 415
        assert refused.headers["content-type"] == "application/json"
        assert "We accept only" in json.loads(refused.body)["message"]
        path = server.client.create(5, **metadata("me.jpg"))
        server.client.finish(path, b"hello")
        id = path.rpartition("/")[2]
        assert (server.data_dir / "pictures" / id).read_bytes() == b"hello"
        facts = inbox / f"{id}.json"
        wait_until(facts.exists, "the facts")
        assert json.loads(facts.read_text())["sha256"] == hashlib.sha256(b"hello").hexdigest()


@pytest.mark.parametrize("flag", ["--hooks-dir", "--hooks-file"])
def test_shell_programs(tmp_path: Path, flag: str) -> None:
    inbox = tmp_path / "inbox"
    sample = "shell" if flag == "--hooks-dir" else "single_file_hook.sh"
    flags = [flag, SAMPLES / sample, "--hooks", "pre-create,post-finish"]
    with serving(tmp_path, *flags, INBOX=str(inbox)) as server:
        refused = post(server)
        assert (refused.status, refused.body) == (400, b"Please name your file.")
        path = server.client.create(5, **metadata("a.txt"))
        server.client.finish(path, b"hello")
        copy = inbox / f"{path.rpartition('/')[2]}.txt"
        wait_until(copy.exists, "the copy")
        assert copy.read_bytes() == b"hello"


def test_the_scan_with_a_server(tmp_path: Path) -> None:
    flags = ["--hooks-dir", SAMPLES / "virus_scan", "--hooks", "pre-finish"]
    bare = {"PATH": str(Path(sys.executable).parent)}  # Without ClamAV.
    with serving(tmp_path, *flags, **bare) as server:
        clean = server.client.create(5)
        server.client.finish(clean, b"hello")
        path = server.client.create(len(EICAR))
        refused = server.client.patch(path, 0, EICAR)
        assert refused.status == 422
        assert json.loads(refused.body) == {"message": "This file contains a virus."}
        assert server.client.get(path).status >= 400
        assert server.client.get(clean).body == b"hello"


class Program:
    """A sample that runs beside the server, and what it says."""

    def __init__(self, command: list[object], ready: str, **environ: str) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=SAMPLES,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environ},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.ready = self.wait_for(ready)
        except AssertionError:
            self.stop()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.lines.append(line)

    def wait_for(self, pattern: str) -> re.Match[str]:
        found: list[re.Match[str]] = []

        def look() -> bool:
            found.extend(filter(None, (re.search(pattern, line) for line in self.lines)))
            return bool(found) or self._process.poll() is not None

        wait_until(look, f"{pattern} in what the sample says")
        assert found, self.lines
        return found[0]

    def stop(self) -> None:
        # Celery takes ten seconds to end by itself.
        self._process.kill()
        self._process.wait()
        self._reader.join()


@contextmanager
def beside(command: list[object], ready: str, **environ: str) -> Iterator[Program]:
    program = Program(command, ready, **environ)
    try:
        yield program
    finally:
        program.stop()


def test_the_http_receiver(tmp_path: Path) -> None:
    secret = {"HOOKS_SECRET": "s3cret", "TOKEN": "jwt"}
    command: list[object] = [sys.executable, "http_receiver.py", 0]
    with beside(command, r"Running on (http://\S+)", **secret) as receiver:
        flags = [
            *("--hooks-http-urls", f"{receiver.ready[1]}/hooks"),
            *("--hooks-http-proxy-headers", "Authorization", "--http-hook-timeout", 30),
        ]
        with serving(tmp_path, *flags, TUSWSGI_HOOKS_HTTP_SECRET="s3cret") as server:
            assert post(server).status == 401
            assert post(server, Authorization="Bearer other").status == 401
            token = {"authorization": "Bearer jwt"}
            path = server.client.create(5, **metadata("a.txt"), **token)
            server.client.finish(path, b"hello")
            receiver.wait_for(rf"post-finish {path.rpartition('/')[2]} a\.txt")
        with serving(tmp_path, *flags, TUSWSGI_HOOKS_HTTP_SECRET="other") as server:
            assert post(server, Authorization="Bearer jwt").status == 403


def test_the_grpc_server(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    command: list[object] = [sys.executable, "grpc_server.py", 0]
    with beside(command, r"Listening on port (\d+)") as receiver:
        flags = ["--hooks-grpc", f"localhost:{receiver.ready[1]}", "--hooks-grpc-timeout", 30]
        with serving(tmp_path, *flags) as server:
            refused = post(server)
            assert (refused.status, refused.body) == (400, b"Please name your file.\n")
            path = server.client.create(5, **metadata("a.txt"))
            server.client.finish(path, b"hello")
            receiver.wait_for(rf"post-finish {path.rpartition('/')[2]} 5")


def test_the_tasks_of_celery(tmp_path: Path) -> None:
    pytest.importorskip("celery")
    url = services.find("TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672")
    name = f"tuswsgi-test-{uuid4().hex}"
    inspector = Inspector(url, name)
    try:
        queue = inspector.queue()
        inspector.exchange()
        command: list[object] = [
            *(sys.executable, "-m", "celery", "-A", "celery_tasks", "worker"),
            *("--pool", "solo", "--queues", queue, "--loglevel", "info"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]
        flags = [
            *("--hooks-amqp-url", url, "--hooks-amqp-exchange", queue),
            *("--hooks-amqp-exchange-kind", "direct", "--hooks-amqp-routing-key", queue),
            *("--hooks-amqp-celery", "--hooks", "post-create,post-finish"),
        ]
        with (
            beside(command, r"celery@.* ready", CELERY_BROKER_URL=url) as worker,
            serving(tmp_path, *flags) as server,
        ):
            path = server.client.create(5, **metadata("a.txt"))
            server.client.finish(path, b"hello")
            id = path.rpartition("/")[2]
            worker.wait_for(rf"POST CREATE: .*'id': '{id}'")
            worker.wait_for(rf"POST FINISH: .*'id': '{id}'")
    finally:
        inspector.close()


def test_each_sample_is_in_the_readme_and_can_be_run() -> None:
    readme = (SAMPLES / "README.md").read_text()
    for sample in SAMPLES.iterdir():
        if sample.name in {"README.md", "__pycache__"}:
            continue
        assert f"({sample.name})" in readme
        programs = sample.iterdir() if sample.is_dir() else [sample]
        for program in programs:
            assert os.access(program, os.X_OK), program
            assert program.read_bytes().startswith(b"#!"), program
