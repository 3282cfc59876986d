"""Unix datagram sockets of the processes of one host, by name in a directory."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import socket
import tempfile
from pathlib import Path

from tuswsgi.core.paths import adopt

#: The longest address that is bound as it is; the kernel takes 107 bytes.
_MAX_ADDRESS = 100


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


#: The kernel's name for this host until it boots again, empty if it has none.
BOOT_ID = _boot_id()

#: What the names of this host's sockets begin with.
_HOST = f"{BOOT_ID[:8]}-"


class SocketDirectory:
    """Sends to sockets in a directory, and binds them, however long its path is."""

    def __init__(self, directory: Path) -> None:
        self._directory = self._prefix = directory
        self._fd: int | None = None
        if len(os.fsencode(self.path(f"{_HOST}{2**32}-{0:08x}.sock"))) > _MAX_ADDRESS:
            self._shorten()
        self._outbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._outbox.setblocking(False)

    def new_name(self) -> str:
        """Return an unused name for a socket of this process."""
        return f"{_HOST}{os.getpid()}-{secrets.token_hex(4)}.sock"

    def path(self, name: str) -> Path:
        """Return the path of the socket `name`."""
        return self._directory / name

    def names(self) -> list[str]:
        """Return the names of this host's sockets, including those of dead processes.

        Where hosts share the directory, the sockets of other hosts would look dead.
        """
        return [path.name for path in self._directory.glob(f"{_HOST}*.sock")]

    def bind(self, name: str) -> socket.socket:
        """Return a new socket that receives what is sent to `name`."""
        inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        inbox.bind(str(self._prefix / name))
        # Processes that must not write to it could neither request a lock nor remove the socket
        # of a dead process.
        adopt(self.path(name), self._directory)
        return inbox

    def send(self, name: str, message: bytes) -> None:
        """Send without waiting.

        :raises OSError: if the process is dead, or its queue is full.
        """
        self._outbox.sendto(message, str(self._prefix / name))

    def remove_dead(self) -> None:
        """Remove the sockets of processes that died."""
        for name in self.names():
            try:
                self.send(name, b"")
            except ConnectionRefusedError:
                self.path(name).unlink(missing_ok=True)
            except OSError:
                pass  # alive but busy, or removed already

    def close(self) -> None:
        self._outbox.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _shorten(self) -> None:
        """Use a short path to the directory, or another directory if there is none."""
        if Path("/proc/self/fd").is_dir():
            self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            self._prefix = Path(f"/proc/self/fd/{self._fd}")
            return
        digest = hashlib.sha256(os.fsencode(self._directory)).hexdigest()
        self._directory = self._prefix = Path(tempfile.gettempdir()) / f"tuswsgi-{digest[:16]}"
        self._directory.mkdir(mode=0o700, exist_ok=True)
        if self._directory.stat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "Owned by another user", str(self._directory))
