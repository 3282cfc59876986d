"""gunicorn's gevent worker, as ``tuswsgi serve`` uses it.

It tells the application about SIGTERM and leaves it to the application when a client that
asked is told to send its body. Everything also works under ``-k gevent``, where a client
that expects 100 gets it before anything was checked.
"""

from __future__ import annotations

from typing import Any

from gunicorn.workers.ggevent import GeventWorker

from tuswsgi.app import Tus


class TusWorker(GeventWorker):  # type: ignore[misc]  # gunicorn has no types
    """A gevent worker for applications that ``create_app`` made, and for any other."""

    _tus: Tus | None = None

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self._tus = getattr(self.wsgi, "extensions", {}).get("tuswsgi")
        if self._tus is not None:
            self._tus.start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        # This runs wherever SIGTERM struck: it sets latches and nothing more.
        super().handle_exit(sig, frame)
        if self._tus is not None:
            self._tus.stop_uploads()

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        if getattr(req, "_expected_100_continue", False):
            req._expected_100_continue = False
            req.body.send_continue = lambda: sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        super().handle_request(listener_name, req, sock, addr)
