"""``tuswsgi serve`` and ``conf/gunicorn.conf.py``, from the first line to the last."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

from e2e.client import PATIENCE, content, wait_until
from e2e.conftest import Serve, Server, running

ROOT = Path(__file__).parent.parent.parent


def refused(*flags: object, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Return the exit code and the only output of a server that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "tuswsgi", "serve", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **(environ or {})},
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def status_of_options(server: Server) -> int:
    return server.client.request("OPTIONS", "/files/", {}).status


def test_from_the_ready_line_to_sigterm(serve: Serve) -> None:
    server = serve(workers=4)
    assert status_of_options(server) == 204
    server.signal(signal.SIGTERM)
    assert server.wait(15) == 0
    assert server.log.count("You can now upload files to: http://127.0.0.1:") == 1


def test_many_files_may_be_open(serve: Serve) -> None:
    server = serve()
    for worker in server.workers():
        (line,) = (
            line
            for line in Path(f"/proc/{worker}/limits").read_text().splitlines()
            if line.startswith("Max open files")
        )
        soft, hard = line.split()[3:5]
        assert soft == hard


def test_a_reload_takes_the_new_configuration(tmp_path: Path, serve: Serve) -> None:
    file = tmp_path / "tuswsgi.ini"
    file.write_text("[tuswsgi]\nmax_file_size = 1000\n")
    server = serve("-c", str(file))
    assert _max_size(server) == "1000"
    old = set(server.workers())
    file.write_text("[tuswsgi]\nmax_file_size = 2000\n")
    server.signal(signal.SIGHUP)
    wait_until(lambda: not old & set(server.workers()), "the old workers' end")
    assert _max_size(server) == "2000"
    assert server.log.count("You can now upload") == 1


def test_a_reload_of_a_wrong_configuration_changes_nothing(tmp_path: Path, serve: Serve) -> None:
    file = tmp_path / "tuswsgi.ini"
    file.write_text("[tuswsgi]\nmax_file_size = 1000\n")
    server = serve("-c", str(file))
    file.write_text("[tuswsgi]\nmax_file_size = big\n")
    server.signal(signal.SIGHUP)
    server.wait_for("goes on as before")
    server.wait_for(r"max_file_size = big")
    assert _max_size(server) == "1000"


def test_tls(tmp_path: Path, serve: Serve) -> None:
    certificate, key = _self_signed(tmp_path)
    context = ssl.create_default_context(cafile=str(certificate))
    server = serve("--certfile", str(certificate), "--keyfile", str(key), tls=context)
    assert "You can now upload files to: https://127.0.0.1:" in server.log
    assert status_of_options(server) == 204


def test_unix_socket(tmp_path: Path, serve: Serve) -> None:
    path = tmp_path / "x.sock"
    server = serve("--unix-sock", str(path))
    assert f"through the unix socket: {path}\n" in server.log
    assert status_of_options(server) == 204
    code, text = refused("--unix-sock", path, "--data-dir", tmp_path / "other")
    assert (code, text) == (1, f"The server cannot listen at {path}: Address already in use.\n")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not path.exists()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        flags = ("--host", "127.0.0.1", "--port", port, "--data-dir", tmp_path)
        code, text = refused(*flags)
    expected = f"The server cannot listen at 127.0.0.1:{port}: Address already in use.\n"
    assert (code, text) == (1, expected)


def test_a_data_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, text = refused("--port", 0, "--data-dir", tmp_path / "file" / "data")
    assert code == 1
    assert text.count("\n") == 1
    assert str(tmp_path / "file" / "data") in text


def test_a_wrong_configuration() -> None:
    code, text = refused("--port", "x", environ={"TUSWSGI_STORAGE": "y"})
    assert code == 2
    assert len(text.splitlines()) == 2


def test_gunicorn_with_our_conf(tmp_path: Path) -> None:
    environ = {
        "TUSWSGI_HOST": "127.0.0.1",
        "TUSWSGI_PORT": "0",
        "TUSWSGI_WORKERS": "2",
        "TUSWSGI_DATA_DIR": str(tmp_path / "data"),
        "PYTHONPATH": str(ROOT),
    }
    command = [
        *(sys.executable, "-m", "gunicorn"),
        *("-c", str(ROOT / "conf" / "gunicorn.conf.py"), "--chdir", str(ROOT), "wsgi:application"),
    ]
    with running(Server(command, tmp_path / "data", environ)) as server:
        # While the second worker is still starting: it must not forget the signal.
        server.signal(signal.SIGTERM)
        assert server.wait(15) == 0
        server.start()
        assert status_of_options(server) == 204
        wait_until(lambda: len(server.workers()) == 2, "both workers")


def test_gunicorn_with_our_conf_and_a_wrong_configuration() -> None:
    conf = str(ROOT / "conf" / "gunicorn.conf.py")
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", conf, "--chdir", str(ROOT), "wsgi:application"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TUSWSGI_PORT": "x"},
    )
    assert done.returncode == 1
    assert done.stderr == "[tuswsgi] port = x (from TUSWSGI_PORT): Not a valid integer.\n"


def test_upload_with_the_client(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    file = tmp_path / "äöü \N{GRINNING FACE}.txt"
    file.write_bytes(content(300_000))
    url = _upload(server, file, tmp_path / "state.json", "--chunk-size", "100kB")
    assert server.stored(url) == 300_000
    assert server.file(url).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "state.json").read_text()) == {}


def test_the_client_goes_on_after_a_sigkill(tmp_path: Path, serve: Serve) -> None:
    server = serve("--port", str(_free_port()))
    file, state = tmp_path / "file", tmp_path / "state.json"
    file.write_bytes(content(1_000_000))
    path = server.client.create(1_000_000)
    server.client.patch(path, 0, content(1_000_000)[:400_000])
    url = _url(server)
    state.write_text(json.dumps({_key(file, url): url.removesuffix("/files/") + path}))
    server.restart()
    assert _upload(server, file, state).endswith(path)
    assert server.file(path).read_bytes() == content(1_000_000)


def test_the_client_begins_anew_if_the_server_forgot(tmp_path: Path, serve: Serve) -> None:
    server = serve()
    file, state = tmp_path / "file", tmp_path / "state.json"
    file.write_bytes(b"abc")
    state.write_text(json.dumps({_key(file, _url(server)): f"{_url(server)}{'0' * 32}"}))
    url = _upload(server, file, state)
    assert server.file(url).read_bytes() == b"abc"


def test_the_client_says_why_it_gives_up(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    done = _run_upload(
        file, f"http://127.0.0.1:{_free_port()}/", tmp_path / "state", "--retries", "1"
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "The server cannot be reached: Connection refused. Trying again in 0.5 s." in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "Error: The server cannot be reached: Connection refused."
    )


def _upload(server: Server, file: Path, state: Path, *flags: str) -> str:
    done = _run_upload(file, _url(server), state, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _run_upload(file: Path, url: str, state: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tuswsgi", "upload", str(file), url, "--state", str(state)]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=PATIENCE)


def _url(server: Server) -> str:
    return server.wait_for(r"upload files to: (\S+)")[1]


def _key(file: Path, url: str) -> str:
    status = file.stat()
    return f"{file} {status.st_size} {status.st_mtime_ns} {url}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _max_size(server: Server) -> str | None:
    return server.client.request("OPTIONS", "/files/", {}).headers.get("tus-max-size")


def _self_signed(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate)),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
