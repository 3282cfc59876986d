"""What becomes of flags, variables and an INI file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuswsgi.config.backends import Backends
from tuswsgi.config.loading import DEFAULT, Config, all_options
from tuswsgi.config.server import LogLevel, ServerSettings
from tuswsgi.core.errors import ConfigurationError
from tuswsgi.core.extensions import Extension
from tuswsgi.core.options import MiB, Option
from tuswsgi.datastores.file import FileDataStore
from tuswsgi.datastores.memory import MemoryDataStore
from tuswsgi.datastores.settings import DataStoreName, DataStoreSettings
from tuswsgi.lockers.settings import LockerSettings
from tuswsgi.protocol.settings import UploadSettings

OPTIONS: dict[str, Option] = {one.key: one for one in all_options()}


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    return tmp_path / "tuswsgi.ini"


def problems(*args: object, **kwargs: object) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        Config.load(*args, **kwargs)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


def test_defaults() -> None:
    config = Config.load()
    settings = config.build(ServerSettings)
    assert (settings.host, settings.port, settings.url) == ("0.0.0.0", 1081, "/files")
    assert settings.workers is None
    assert config.build(UploadSettings) == UploadSettings()
    assert config.source(OPTIONS["port"]) == DEFAULT


def test_a_flag_wins_over_a_variable_over_the_file(ini: Path) -> None:
    ini.write_text("[tuswsgi]\nport = 1\nhost = a\nurl = /ini\n")
    environ = {"TUSWSGI_PORT": "2", "TUSWSGI_HOST": "b"}
    config = Config.load(ini, environ, {"port": "3"})
    settings = config.build(ServerSettings)
    assert (settings.port, settings.host, settings.url) == (3, "b", "/ini")
    assert config.source(OPTIONS["port"]) == "--port"
    assert config.source(OPTIONS["host"]) == "TUSWSGI_HOST"
    assert config.source(OPTIONS["url"]) == str(ini)


def test_our_variable_wins_over_rustus() -> None:
    environ = {"RUSTUS_SERVER_PORT": "1", "TUSWSGI_SERVER_PORT": "2"}
    assert Config.load(environ=environ).build(ServerSettings).port == 2
    assert Config.load(environ={**environ, "TUSWSGI_PORT": "3"}).build(ServerSettings).port == 3


def test_arguments_may_be_python_values() -> None:
    flags = {
        "max_file_size": 5 * MiB,
        "tus_extensions": (Extension.CREATION,),
        "data_dir": Path("/x"),
        "force_fsync": True,
        "storage": DataStoreName.MEMORY,
        "lock_timeout": 1.5,
        "expiration": None,
    }
    config = Config.load(flags=flags)
    assert config.values(UploadSettings)["max_file_size"] == 5 * MiB
    assert config.build(UploadSettings).tus_extensions == (Extension.CREATION,)
    settings = config.build(DataStoreSettings)
    assert settings.data_dir == Path("/x")
    assert settings.force_fsync is True
    assert settings.storage is DataStoreName.MEMORY
    assert config.build(LockerSettings).lock_timeout == 1.5


def test_all_problems_at_once(ini: Path) -> None:
    ini.write_text("[tuswsgi]\nport = 99999\nmax_file_size = big\nhsot = x\n\n[tuswgi]\na = b\n")
    environ = {"TUSWSGI_TUS_EXTENSIONS": "creation,foo", "RUSTUS_STORAGE": "hybrid-s3"}
    found = problems(ini, environ, {"prot": "1", "force_fsync": "maybe"})
    assert len(found) == 8
    assert f"{ini}: there is no key hsot in [tuswsgi]; did you mean host." in found
    assert f"{ini}: there is no section [tuswgi]; did you mean tuswsgi." in found
    assert "There is no option prot; did you mean port." in found
    assert any(line.startswith(f"[tuswsgi] port = 99999 (from {ini}): ") for line in found)
    assert any(line.startswith(f"[tuswsgi] max_file_size = big (from {ini}): ") for line in found)
    assert any("storage = hybrid-s3 (from RUSTUS_STORAGE): Not one of" in line for line in found)
    assert any("tus_extensions = creation,foo" in line and "foo: Not one" in line for line in found)


def test_no_interpolation_and_no_inline_comments(ini: Path) -> None:
    ini.write_text("[tuswsgi]\ndir_structure = %(x)s %d ${y} ; # z\n")
    assert Config.load(ini).values(FileDataStore)["dir_structure"] == "%(x)s %d ${y} ; # z"


def test_there_is_no_section_for_all_sections(ini: Path) -> None:
    ini.write_text("[DEFAULT]\nport = 1\n")
    assert problems(ini) == [f"{ini}: there is no section [DEFAULT]."]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"port = 1\n", "no section headers"),
        (b"[tuswsgi]\nport = 1\nport = 2\n", "already exists"),
        (b"[tuswsgi]\nport\n", "parsing errors"),
        (b"[tuswsgi]\nhost = \xff\n", "not UTF-8"),
    ],
)
def test_files_that_are_no_ini_files(ini: Path, text: bytes, problem: str) -> None:
    ini.write_bytes(text)
    (found,) = problems(ini)
    assert problem in found
    assert str(ini) in found


def test_a_file_that_is_not_there(ini: Path) -> None:
    assert problems(ini) == [f"{ini}: the file cannot be read: No such file or directory."]


def test_a_byte_order_mark_does_not_matter(ini: Path) -> None:
    ini.write_bytes("\ufeff[tuswsgi]\nport = 5\n".encode())
    assert Config.load(ini).build(ServerSettings).port == 5


def test_empty_text_unsets_what_may_be_unset(ini: Path) -> None:
    ini.write_text("[tuswsgi]\nmax_file_size = 5MB\nworkers =\ndir_structure =\n")
    config = Config.load(ini, {"TUSWSGI_MAX_FILE_SIZE": ""})
    assert config.build(UploadSettings).max_file_size is None
    assert config.build(ServerSettings).workers is None
    assert config.values(FileDataStore)["dir_structure"] == ""
    assert problems(environ={"TUSWSGI_PORT": ""}) == [
        "[tuswsgi] port =  (from TUSWSGI_PORT): Not a valid integer."
    ]


def test_a_variable_may_name_a_file_with_the_value(tmp_path: Path) -> None:
    secret = tmp_path / "dsn"
    secret.write_text("sqlite:////somewhere%20/x\n")
    config = Config.load(environ={"RUSTUS_INFO_DB_DSN_FILE": str(secret)})
    assert config.value(OPTIONS["info_db_dsn"]) == "sqlite:////somewhere%20/x"
    assert config.source(OPTIONS["info_db_dsn"]) == "RUSTUS_INFO_DB_DSN_FILE"


def test_the_value_itself_wins_over_its_file(tmp_path: Path) -> None:
    environ = {"TUSWSGI_PORT": "5", "TUSWSGI_PORT_FILE": str(tmp_path / "missing")}
    assert Config.load(environ=environ).build(ServerSettings).port == 5


def test_a_missing_value_file_is_a_problem(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    found = problems(environ={"TUSWSGI_PORT_FILE": str(missing)})
    assert found == [f"TUSWSGI_PORT_FILE: the file {missing} cannot be read."]


def test_secrets_do_not_appear_in_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(flags={"info_db_dsn": 12345})
    assert found == ["[tuswsgi] info_db_dsn = ******** (from --info-db-dsn): Not a valid string."]


def test_secrets_in_urls_do_not_appear_in_problems() -> None:
    (found,) = problems(flags={"hooks_http_urls": "ftp://anna:PASSWORD@host/x?token=PASSWORD,x"})
    assert "PASSWORD" not in found
    assert "Not an absolute URL" in found


def test_the_environment_may_name_the_file(ini: Path) -> None:
    ini.write_text("[tuswsgi]\nport = 5\n")
    environ = {"TUSWSGI_CONFIG": str(ini), "TUSWSGI_HOST": "h"}
    settings = Config.from_environment(environ).build(ServerSettings)
    assert (settings.host, settings.port) == ("h", 5)
    assert Config.from_environment({"TUSWSGI_CONFIG": ""}).build(ServerSettings).port == 1081


@pytest.mark.parametrize("text", ["WARN", "warn", "Warning"])
def test_log_levels_of_rustus_and_of_python(text: str) -> None:
    settings = Config.load(environ={"RUSTUS_LOG_LEVEL": text}).build(ServerSettings)
    assert settings.log_level is LogLevel.WARNING


@pytest.mark.parametrize("info_storage", ["db", "file", "memory"])
def test_backends_keep_everything_below_the_data_directory(
    tmp_path: Path, info_storage: str
) -> None:
    data = tmp_path / "data"
    flags = {"data_dir": str(data), "info_storage": f"{info_storage}-info-storage"}
    backends = Backends(Config.load(flags=flags))
    backends.prepare()
    assert isinstance(backends.data_store(), FileDataStore)
    assert [path.name for path in data.iterdir()] == [".tuswsgi"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_memory_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "storage": "memory-storage",
        "info_storage": "memory-info-storage",
        "locker": "memory-locker",
        "lock_timeout": "3s",
    }
    backends = Backends(Config.load(flags=names))
    backends.prepare()
    assert isinstance(backends.data_store(), MemoryDataStore)
    assert type(backends.info_store()).__name__ == "MemoryInfoStore"
    assert backends.locker().lock_timeout == 3.0
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_not_there_is_no_choice() -> None:
    (found,) = problems(flags={"info_storage": "paper-info-storage"})
    assert "Not one of db-info-storage, redis-info-storage, file-info-storage, " in found


class TestUnreadVariables:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("TUSWSGI_MAX_FILESIZE", "Did you mean TUSWSGI_MAX_FILE_SIZE?"),
            ("RUSTUS_DATADIR", "Did you mean RUSTUS_DATA_DIR?"),
            ("RUSTUS_HOOKS_KAFKA_URLS", "RUSTUS_HOOKS_KAFKA_URLS"),
            ("RUSTUS_S3_BUCKET", "RUSTUS_S3_BUCKET"),
        ],
    )
    def test_they_are_a_warning(self, name: str, hint: str) -> None:
        (warning,) = Config.load(environ={name: "1"}).warnings
        assert name in warning
        assert hint in warning
        assert "no effect" in warning

    def test_what_is_read_is_none(self, tmp_path: Path) -> None:
        secret = tmp_path / "dsn"
        secret.write_text("sqlite:///x.sqlite3")
        environ = {
            "TUSWSGI_CONFIG": "",
            "TUSWSGI_MAX_FILE_SIZE": "5GB",
            "RUSTUS_INFO_DB_DSN_FILE": str(secret),
            "PATH": "/bin",
        }
        assert not Config.load(environ=environ).warnings

    def test_those_of_kubernetes_are_no_options(self) -> None:
        environ = {
            "TUSWSGI_PORT": "tcp://10.96.0.7:1081",
            "TUSWSGI_SERVICE_HOST": "10.96.0.7",
            "TUSWSGI_SERVICE_PORT": "1081",
            "TUSWSGI_SERVICE_PORT_HTTP": "1081",
            "TUSWSGI_PORT_1081_TCP": "tcp://10.96.0.7:1081",
            "TUSWSGI_PORT_1081_TCP_ADDR": "10.96.0.7",
        }
        config = Config.load(environ=environ)
        assert config["port"] == 1081
        assert not config.warnings
