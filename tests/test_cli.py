"""The command line, but for the server that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tuswsgi.commands.cli import main

#: rustus' core options: the key, its flags, its variable, and a value as rustus takes it.
RUSTUS = [
    ("host", ["--host"], "SERVER_HOST", "127.0.0.1"),
    ("port", ["--port"], "SERVER_PORT", "8080"),
    ("url", ["--url"], "URL", "/uploads"),
    ("workers", ["--workers", "-w"], "WORKERS", "3"),
    ("storage", ["--storage", "-s"], "STORAGE", "file-storage"),
    ("data_dir", ["--data-dir"], "DATA_DIR", "/srv/data"),
    ("dir_structure", ["--dir-structure"], "DIR_STRUCTURE", "{year}/{month}/env[HOSTNAME]"),
    ("info_storage", ["--info-storage", "-i"], "INFO_STORAGE", "file-info-storage"),
    ("info_dir", ["--info-dir"], "INFO_DIR", "/srv/info"),
    ("cors", ["--cors"], "CORS", "https://*.example.org,http://localhost"),
    ("max_body_size", ["--max-body-size", "-m"], "MAX_BODY_SIZE", "1000"),
    ("max_file_size", ["--max-file-size"], "MAX_FILE_SIZE", "1000000"),
    ("tus_extensions", ["--tus-extensions"], "TUS_EXTENSIONS", "getting,creation,checksum"),
    ("log_level", ["--log-level"], "LOG_LEVEL", "ERROR"),
]

SWITCHES = [
    ("force_fsync", "--force-fsync", "FORCE_FSYNC"),
    ("allow_empty", "--allow-empty", "ALLOW_EMPTY"),
    ("remove_parts", "--remove-parts", "REMOVE_PARTS"),
    ("behind_proxy", "--behind-proxy", "BEHIND_PROXY"),
    (
        "disable_health_access_log",
        "--disable-health-access-log",
        "DISABLE_HEALTH_ACCESS_LOG",
    ),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("TUSWSGI_", "RUSTUS_")):
            monkeypatch.delenv(name)


def run(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], env=env)


def shown(*args: object, env: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """Return each option's value and source, as ``config show`` prints them.

    The keys of sections other than the main one are like ``hooks.amqp.url``.
    """
    result = run("config", "show", *args, env=env)
    assert result.exit_code == 0, result.output
    values, prefix = {}, ""
    for line in result.stdout.splitlines():
        if line.startswith("["):
            prefix = f"{line.strip('[]')}.".removeprefix("tuswsgi.")
        elif " = " in f"{line} ":
            key, _, rest = line.partition(" =")
            value, _, source = rest.rpartition("  # ")
            values[prefix + key] = (value.strip(), source)
    return values


@pytest.mark.parametrize(("key", "flags", "variable", "text"), RUSTUS, ids=lambda x: str(x))
def test_options_of_rustus(key: str, flags: list[str], variable: str, text: str) -> None:
    expected = text.lower() if key == "log_level" else text
    for flag in flags:
        assert shown(flag, text)[key] == (expected, flags[0])
    for name in (f"RUSTUS_{variable}", f"TUSWSGI_{variable}", f"TUSWSGI_{key.upper()}"):
        assert shown(env={name: text})[key] == (expected, name)


@pytest.mark.parametrize(("key", "flag", "variable"), SWITCHES)
def test_switches_of_rustus(key: str, flag: str, variable: str) -> None:
    assert shown(flag)[key] == ("true", flag)
    assert shown(f"--no-{flag[2:]}")[key] == ("false", flag)
    for name in (f"RUSTUS_{variable}", f"TUSWSGI_{variable}"):
        assert shown(env={name: "true"})[key] == ("true", name)
        assert shown(env={name: "false"})[key] == ("false", name)


def test_the_dsn_of_rustus_is_taken_and_masked() -> None:
    for env in ({"RUSTUS_INFO_DB_DSN": "x://a:b@c"}, {"TUSWSGI_INFO_DB_DSN": "x://a:b@c"}):
        assert shown(env=env)["info_db_dsn"] == ("********", *env)
    assert shown("--info-db-dsn", "x://a:b@c")["info_db_dsn"] == ("********", "--info-db-dsn")


@pytest.mark.parametrize("command", ["check", "show"])
def test_credentials_for_every_origin_are_a_mistake(command: str) -> None:
    result = run("config", command, "--cors-credentials")
    assert result.exit_code == 2
    assert "cors_credentials = true: With cors = * pages of every origin" in result.stderr


def test_a_list_by_a_repeated_flag() -> None:
    assert shown("--cors", "http://a", "--cors", "http://b")["cors"][0] == "http://a,http://b"


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "x.ini"
    file.write_text("[tuswsgi]\nport = 1\nhost = ini\nurl = /ini\n")
    env = {"TUSWSGI_PORT": "2", "TUSWSGI_HOST": "env", "TUSWSGI_CONFIG": str(file)}
    for args in (("--port", 3), ("--port", 3, "-c", file)):
        values = shown(*args, env=env)
        assert values["port"] == ("3", "--port")
        assert values["host"] == ("env", "TUSWSGI_HOST")
        assert values["url"] == ("/ini", str(file))
        assert values["storage"] == ("file-storage", "default")


def test_check_of_a_correct_configuration() -> None:
    result = run("config", "check", "--port", 5)
    assert result.exit_code == 0
    assert result.stdout == "The configuration is correct.\n"


def test_check_finds_directories_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run(
        *("config", "check", "--data-dir", "/proc/nothing/here", "--runtime-dir", file),
        *("--info-storage", "file-info-storage", "--info-dir", file / "info"),
    )
    assert result.exit_code == 2
    assert sorted(result.stderr.splitlines()) == [
        "[tuswsgi] data_dir = /proc/nothing/here: It cannot be made: "
        "No such file or directory (/proc/nothing).",
        f"[tuswsgi] info_dir = {file}/info: It cannot be made: File exists ({file}).",
        f"[tuswsgi] runtime_dir = {file}: It cannot be made: File exists ({file}).",
    ]


def test_check_makes_no_directories(tmp_path: Path) -> None:
    assert run("config", "check", "--data-dir", tmp_path / "a" / "b").exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("gc", "--dry-run"),
        ("gc",),
        ("uploads", "list"),
        ("uploads", "show", "id"),
        ("uploads", "rm", "--yes", "id"),
        ("hooks", "pending"),
        ("db", "version"),
        ("info", "copy", "--to", "sqlite:////nowhere/info.sqlite3"),
    ],
    ids=" ".join,
)
def test_a_misspelt_data_directory_is_not_made(tmp_path: Path, command: tuple[str, ...]) -> None:
    missing = tmp_path / "missing"
    result = run(*command, "--data-dir", missing)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"[tuswsgi] data_dir = {missing}: There is no such directory."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["check", "show"])
def test_every_problem_is_a_line_and_the_exit_code_is_2(command: str) -> None:
    result = run("config", command, "--port", "x", env={"TUSWSGI_STORAGE": "y"})
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "[tuswsgi] port = x (from --port): Not a valid integer.",
        "[tuswsgi] storage = y (from TUSWSGI_STORAGE): Not one of file-storage, memory-storage.",
    ]


def test_workers_do_not_share_memory() -> None:
    result = run("config", "check", "-s", "memory-storage", "-w", "2")
    assert result.exit_code == 2
    assert "there can be only one" in result.stderr
    assert run("config", "check", "-s", "memory-storage").exit_code == 0


def test_docs_are_written_checked_and_printed(tmp_path: Path) -> None:
    where = ("--directory", tmp_path / "conf")
    assert run("config", "docs", "--check", *where).exit_code == 1
    assert run("config", "docs", *where).exit_code == 0
    result = run("config", "docs", "--check", *where)
    assert (result.exit_code, result.output) == (0, "")
    file = tmp_path / "conf" / "tuswsgi.ini"
    file.write_text(file.read_text().replace(";port = 1081", ";port = 80"))
    result = run("config", "docs", "--check", *where)
    assert result.exit_code == 1
    assert "-;port = 80" in result.stdout
    assert "+;port = 1081" in result.stdout
    printed = run("config", "docs", "--stdout").stdout
    assert (tmp_path / "conf" / "README.md").read_text() in printed


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from tuswsgi.commands.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'flask', 'gevent', 'gunicorn', 'marshmallow', 'peewee', 'requests', 'ssl'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout


def test_serve_is_patched_before_anything_is_imported() -> None:
    code = (
        "import sys\n"
        "from gevent import monkey\n"
        "def patch_all():\n"
        "    sys.exit(', '.join({'ssl', 'marshmallow', 'peewee'} & set(sys.modules)) or None)\n"
        "monkey.patch_all = patch_all\n"
        "from tuswsgi.commands.cli import main\n"
        "main(['serve'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_does_not_patch_when_it_is_imported() -> None:
    code = (
        "import socket, sys, tuswsgi, tuswsgi.commands.cli\n"
        "import tuswsgi.config.backends, tuswsgi.serving.settings\n"
        "sys.exit(socket.socket.__module__ != 'socket' or 'gevent' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_serve_help_lists_the_options_in_groups() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tuswsgi", "serve", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "How the server listens, works and logs:" in done.stdout
    assert "-s, --storage" in done.stdout
    assert "--force-fsync / --no-force-fsync" in done.stdout
    assert "TUSWSGI_MAX_FILE_SIZE" in done.stdout


def test_an_unknown_flag_is_a_usage_error() -> None:
    result = run("config", "show", "--prot", "5")
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_upload_names_the_extra_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tusclient", "tusclient.client"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tuswsgi.commands.client", raising=False)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    result = run("upload", file, "http://localhost:1/files/")
    assert result.exit_code == 1
    assert "pip install 'tuswsgi-server[client]'" in result.stderr


def test_upload_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = run("upload", tmp_path / "missing", "http://localhost:1/files/")
    assert result.exit_code == 2
    assert "missing" in result.stderr


@pytest.mark.parametrize("header", ["secret", ": secret", "X: secret\r\nY: z"])
def test_upload_takes_headers_only(tmp_path: Path, header: str) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run("upload", file, "http://localhost:1/", "--header", header)
    assert result.exit_code == 2
    assert "Not a header such as" in result.stderr
    assert "secret" not in result.stderr


def test_upload_takes_sizes_for_its_chunks(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    result = run("upload", file, "http://localhost:1/", "--chunk-size", "big")
    assert result.exit_code == 2
    assert "Not a size" in result.stderr


def test_version() -> None:
    assert run("--version").output.startswith("tuswsgi")
