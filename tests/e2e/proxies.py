"""Proxies with the files that we ship, on ports of their own.

What a file says is left as it is but for the names, ports and certificates that no two
machines share.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from private_servers import PrivateServer, program

CONF = Path(__file__).parent.parent.parent / "conf"

#: The path of uploads in all of the files.
URL = "/uploads/files/"


class Proxy(PrivateServer):
    """A proxy that serves https and passes requests on to a server.

    :param upstream: host and port of the server, or the path of its unix socket.
    """

    death = signal.SIGTERM  # the masters take their workers with them

    def __init__(self, upstream: tuple[str, int] | str, certificate: Path, key: Path) -> None:
        self._upstream = upstream
        self._tls = (certificate, key)
        super().__init__()

    def adapt(self, shipped: str, replacements: dict[str, str]) -> str:
        """Return the text of a file that we ship, with something else in some places."""
        text = (CONF / shipped).read_text()
        for old, new in replacements.items():
            assert old in text, f"{shipped} lacks {old!r}"
            text = text.replace(old, new)
        return text

    def prepare(self) -> None:
        for source, name in zip(self._tls, ("cert.pem", "key.pem"), strict=True):
            file = shutil.copy(source, self.directory / name)
            if self._account:
                shutil.chown(file, self._account)

    @property
    def server(self) -> str:
        """The server as URLs have it."""
        assert not isinstance(self._upstream, str)
        name, port = self._upstream
        return f"{name}:{port}"


class Nginx(Proxy):
    def prepare(self) -> None:
        super().prepare()
        is_unix = isinstance(self._upstream, str)
        upstream = f"unix:{self._upstream}" if is_unix else self.server
        site = self.adapt(
            "nginx.conf",
            {
                "127.0.0.1:1081": upstream,
                "listen 80;": f"listen unix:{self.directory}/http.sock;",
                "    listen [::]:80;\n": "",
                "listen 443 ": f"listen 127.0.0.1:{self.port} ",
                "    listen [::]:443 ssl http2;\n": "",
                "/etc/nginx/tls": str(self.directory),
            },
        )
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.directory}/{kind};\n" for kind in kinds)
        user = "user root;\n" if os.getuid() == 0 else ""  # so that it reaches unix sockets
        (self.directory / "nginx.conf").write_text(
            f"{user}pid {self.directory}/pid;\nerror_log stderr warn;\nworker_processes 2;\n"
            "events { worker_connections 1024; }\n"
            f"http {{\naccess_log off;\n{temporary}{site}}}\n"
        )

    def command(self) -> list[str]:
        file = str(self.directory / "nginx.conf")
        return [program("nginx"), "-e", "stderr", "-c", file, "-g", "daemon off;"]


class Caddy(Proxy):
    def prepare(self) -> None:
        super().prepare()
        site = f"https://127.0.0.1:{self.port} {{\n\ttls cert.pem key.pem"
        text = self.adapt(
            "proxies/Caddyfile", {"files.example.org {": site, "127.0.0.1:1081": self.server}
        )
        own = "{\n\tadmin off\n\tauto_https off\n\tstorage file_system data\n}\n"
        (self.directory / "Caddyfile").write_text(own + text)

    def command(self) -> list[str]:
        return [program("caddy"), "run", "--adapter", "caddyfile", "--config", "Caddyfile"]


class Apache(Proxy):
    user = "www-data"

    def prepare(self) -> None:
        super().prepare()
        modules = Path(program("apache2")).parent.parent / "lib" / "apache2" / "modules"
        text = self.adapt(
            "proxies/apache.conf",
            {
                "*:443": f"127.0.0.1:{self.port}",
                "127.0.0.1:1081": self.server,
                "/etc/apache2/tls": str(self.directory),
            },
        )
        names = ("mpm_event", "authz_core", "headers", "http2", "proxy", "proxy_http")
        loaded = "".join(
            f"LoadModule {name}_module {modules}/mod_{name}.so\n"
            for name in (*names, "reqtimeout", "socache_shmcb", "ssl")
        )
        (self.directory / "apache.conf").write_text(
            f"{loaded}ServerRoot {self.directory}\nServerName 127.0.0.1\nPidFile pid\n"
            f"DefaultRuntimeDir {self.directory}\nMutex file:{self.directory}\n"
            f"ErrorLog {self.directory}/errors\nListen 127.0.0.1:{self.port}\n{text}"
        )

    def command(self) -> list[str]:
        file = str(self.directory / "apache.conf")
        return [program("apache2"), "-D", "FOREGROUND", "-f", file]
