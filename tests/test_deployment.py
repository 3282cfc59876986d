"""The files for systemd and containers: they name what there is, and are what they claim."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from private_servers import program

from tuswsgi.config.loading import Config, all_options
from tuswsgi.config.server import ServerSettings

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"

GRACEFUL = ServerSettings().graceful_timeout


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The systemd unit, with a program that is on this machine."""
    text = (CONF / "tuswsgi.service").read_text()
    assert "ExecStart=/opt/tuswsgi/bin/tuswsgi " in text
    file = tmp_path / "tuswsgi.service"
    file.write_text(text.replace("/opt/tuswsgi/bin/tuswsgi", sys.executable))
    return file


def settings_of(unit: Path) -> dict[str, str]:
    lines = (line.partition("=") for line in unit.read_text().splitlines())
    return {name: value for name, equals, value in lines if equals and not name.startswith("#")}


def analyze(*arguments: str) -> None:
    done = subprocess.run(
        [program("systemd-analyze"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


class TestUnit:
    def test_systemd_understands_it(self, unit: Path) -> None:
        analyze("verify", str(unit))

    def test_it_is_confined(self, unit: Path) -> None:
        # Of 10 for a service that may do everything; what systemd calls "OK" ends at 4.
        analyze("security", "--offline=yes", "--threshold=20", "--no-pager", str(unit))

    def test_the_command(self, unit: Path) -> None:
        _, command, *arguments = shlex.split(settings_of(unit)["ExecStart"])
        assert command == "serve"
        known = {flag for option in all_options() for flag in option.flags} | {"--config"}
        assert set(arguments[::2]) <= known

    def test_systemd_never_gives_it_up(self, unit: Path) -> None:
        assert settings_of(unit)["StartLimitIntervalSec"] == "0"
        assert settings_of(unit)["Restart"] == "always"

    def test_it_waits_for_a_graceful_stop(self, unit: Path) -> None:
        assert float(settings_of(unit)["TimeoutStopSec"]) > GRACEFUL


class TestDockerfile:
    TEXT = (CONF / "Dockerfile").read_text().replace("\\\n", " ")

    def test_its_files_are_there(self) -> None:
        for line in re.findall(r"^COPY (?!--from)(.+)$", self.TEXT, re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), source

    def test_its_options_exist(self) -> None:
        known = {name for option in all_options() for name in option.variables}
        named = set(re.findall(r"\b(TUSWSGI_[A-Z_]+)=", self.TEXT))
        assert named
        assert named <= known

    def test_the_last_stage(self) -> None:
        last = self.TEXT.rpartition("\nFROM ")[2]
        assert not re.search(r"\bpip\b|apt-get|COPY (?!--from=build)", last)
        user = re.findall(r"^USER (\S+)$", last, re.MULTILINE)
        assert user == ["10001:10001"]
        assert 'ENTRYPOINT ["tuswsgi"]' in last

    def test_its_extras_exist(self) -> None:
        setup = (ROOT / "setup.cfg").read_text()
        (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", self.TEXT, re.MULTILINE)
        for extra in extras.split(","):
            assert f"\n{extra} =\n" in setup


class TestCompose:
    @pytest.fixture
    def compose(self) -> dict[str, Any]:
        text = (CONF / "compose.yaml").read_text().replace("${PASSWORD:?}", "secret")
        assert "$" not in text.replace("$(openssl", "")
        compose: dict[str, Any] = yaml.safe_load(text)
        return compose

    def test_what_services_need_is_declared(self, compose: dict[str, Any]) -> None:
        services = compose["services"]
        for service in services.values():
            for other in service.get("depends_on", {}):
                # The servers have theirs from the image.
                assert "healthcheck" in services[other] or "build" in services[other]
            for volume in service.get("volumes", []):
                source = volume.partition(":")[0]
                assert source in compose["volumes"] or source in ("./nginx.conf", "./tls")

    def test_the_servers(self, compose: dict[str, Any]) -> None:
        services = [one for one in compose["services"].values() if one.get("image") == "tuswsgi"]
        assert len(services) == 2
        for service in services:
            config = Config.from_environment(service["environment"])
            assert config.build(ServerSettings).graceful_timeout == GRACEFUL
            assert float(service["stop_grace_period"].removesuffix("s")) > GRACEFUL
            assert service["read_only"] is True
            assert "uploads:/data" in service["volumes"]
            assert service["build"]["dockerfile"] == "conf/Dockerfile"

    def test_the_servers_that_nginx_gets(self, compose: dict[str, Any], tmp_path: Path) -> None:
        (*_, script) = compose["services"]["nginx"]["command"]
        for inside, outside in {
            "/etc/nginx/tuswsgi.conf": CONF / "nginx.conf",
            "/etc/nginx/conf.d/default.conf": tmp_path / "made.conf",
            "exec nginx -g 'daemon off;'": "true",
        }.items():
            assert inside in script
            script = script.replace(inside, str(outside))
        subprocess.run(["sh", "-c", script], check=True)
        made = (tmp_path / "made.conf").read_text()
        servers = re.findall(r"^ +server (\S+); server (\S+);$", made, re.MULTILINE)
        assert servers == [("tuswsgi-1:1081", "tuswsgi-2:1081")]
        assert {server.partition(":")[0] for server in servers[0]} <= set(compose["services"])


def test_what_the_page_about_deployment_names_is_there() -> None:
    page = (CONF / "DEPLOYMENT.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links
    for link in links:
        assert (CONF / link).exists(), link
    for file in re.findall(r"\bconf/[\w.]+", page):
        assert (ROOT / file).exists(), file
