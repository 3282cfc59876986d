"""Hooks as programs: one for all events, one for each event in a directory, or both.

This file owns the arguments of programs and the meaning of their exit codes and output.
``hooks.programs`` runs them.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from marshmallow.validate import Range

from tuswsgi.core.display import printable
from tuswsgi.core.errors import HookBroken, HookFailed, HookRefusal
from tuswsgi.core.events import HookType
from tuswsgi.core.options import Duration, KiB, MiB, option
from tuswsgi.core.process import PerProcess
from tuswsgi.hooks import programs
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, ask_in_turn
from tuswsgi.hooks.payloads import BadAnswer, PayloadFormat, decode_answer

log = logging.getLogger(__name__)

#: The longest argument that Linux accepts, in bytes.
_LONGEST_ARGUMENT = 128 * KiB - 1

#: The longest answer, in bytes. Of longer output the beginning is logged.
_LONGEST_ANSWER = 1 * MiB

#: How much of the end of a program's standard error is kept, and how much of that is sent to
#: clients, in bytes.
_KEPT_ERRORS = 64 * KiB
_SHOWN_ERRORS = 4 * KiB

#: How much of a program's output is logged: lines, and characters of each.
_LOGGED_LINES = 50
_LOGGED_WIDTH = 500


@dataclass
class FileHook(Hook):
    """Hooks as programs.

    :param format: the format of the payload.
    """

    section: ClassVar[str] = "hooks"
    name: ClassVar[str] = "file"

    format: PayloadFormat
    file: Path | None = option(
        None,
        "A program to run for every event. Its arguments are the event's name and the payload, "
        "which is also on its standard input.",
        rustus="HOOKS_FILE",
    )
    dir: Path | None = option(
        None,
        "A directory of programs, each with the name of its event. The only argument is the "
        "payload, which is also on the standard input.",
        rustus="HOOKS_DIR",
    )
    file_timeout: float = option(
        60.0, "How long a program may delay a request; then it is killed.", kind=Duration
    )
    file_programs: int = option(
        32,
        "How many programs of blocking hooks a worker runs at once. Further requests wait for up "
        "to `file_timeout`; then clients are told to retry (503). `delivery_pool` limits the "
        "programs of other hooks.",
        validate=Range(min=1),
    )
    file_post_timeout: float = option(
        3600.0,
        "How long a program of a post-hook may take; then it is killed, and the event is "
        "delivered again.",
        kind=Duration,
    )

    def __post_init__(self) -> None:
        # The working directory may change later.
        self.file = self.file and self.file.absolute()
        self.dir = self.dir and self.dir.absolute()
        self._turns = PerProcess(lambda: threading.Semaphore(self.file_programs))

    def prepare(self) -> None:
        if self.file is not None:
            _warn_if_missing(self.file)
        if self.dir is not None and not self.dir.is_dir():
            log.warning("The directory of hooks %s does not exist", self.dir)
        elif self.dir is not None:
            for type in sorted(self.types):
                _warn_if_missing(self.dir / type.value)

    def send(self, request: HookRequest) -> HookResponse | None:
        programs = self._programs(request.type)
        return ask_in_turn([partial(self._run, program) for program in programs], request)

    def _programs(self, type: HookType) -> Iterator[Path]:
        if self.file is not None:
            yield self.file
        if self.dir is not None:
            yield self.dir / type.value

    def _run(self, path: Path, request: HookRequest) -> HookResponse | None:
        turn = self._turn(request) if request.type.blocking else nullcontext(self.file_post_timeout)
        try:
            if not path.exists():
                self._skip_missing(path, request.type)
                return None
            if not os.access(path, os.X_OK):
                raise PermissionError
            with turn as timeout:
                outcome = programs.run(
                    self._program(path, request),
                    timeout=timeout,
                    output=_LONGEST_ANSWER + 1,
                    errors=_KEPT_ERRORS,
                )
        except TimeoutError as error:
            raise HookFailed(f"{path}: {error}") from None
        except OSError as error:
            raise HookFailed(f"{path} cannot be run: {_reason(error, path)}") from None
        _log_lines(request, "stderr", outcome.errors)
        return self._interpret(path, request, outcome)

    @contextmanager
    def _turn(self, request: HookRequest) -> Iterator[float]:
        """Wait until a request may run its program; yield how long that may take, in seconds.

        :raises TimeoutError: if the request's time is up before.
        """
        timeout = request.time_left(self.file_timeout)
        deadline = time.monotonic() + timeout
        turns = self._turns.get()
        if not turns.acquire(timeout=timeout):
            raise TimeoutError(f"{self.file_programs} other programs are running (file_programs)")
        try:
            yield max(0.0, deadline - time.monotonic())
        finally:
            turns.release()

    def _program(self, path: Path, request: HookRequest) -> programs.Program:
        payload = self.format.encode(request).encode()
        arguments: list[str | bytes] = [] if path != self.file else [request.type.value]
        if len(payload) <= _LONGEST_ARGUMENT:
            arguments.append(payload)
        info = request.info
        as_tusd = self.format.follows_tusd
        has_id = not (as_tusd and request.type is HookType.PRE_CREATE)
        env = os.environ | {
            "TUS_ID": info.id if has_id else "",
            # As in tusd, whose deferred lengths are 0.
            "TUS_SIZE": str(info.size or 0),
            "TUS_OFFSET": str(info.offset),
        }
        # As in tusd, programs of a directory run in it.
        cwd = path.parent if as_tusd and path != self.file else None
        return programs.Program([str(path), *arguments], env, payload, cwd)

    def _skip_missing(self, path: Path, type: HookType) -> None:
        # rustus: "If some hook file isn't found, rustus throws an error."
        if type.blocking and not self.format.follows_tusd:
            raise HookFailed(f"There is no program {path}.")
        log.info("%s is not delivered: there is no program %s", type, path)

    def _interpret(
        self, path: Path, request: HookRequest, outcome: programs.Outcome
    ) -> HookResponse | None:
        """Return the answer of a program that has ended, or raise its refusal or failure."""
        answer = _answer(path, request, outcome)
        if outcome.code == 0 or (answer is not None and answer.reject):
            return answer
        errors = outcome.errors[-_SHOWN_ERRORS:].decode("utf-8", "replace").strip()
        if outcome.code < 0:
            raise HookFailed(f"{path} was killed by signal {-outcome.code}.")
        if not request.type.blocking:
            last = errors.rpartition("\n")[2][:_LOGGED_WIDTH]
            raise HookFailed(f"{path} ended with exit code {outcome.code}: {last}")
        # The statuses of tusd and of rustus.
        raise HookRefusal(500 if self.format.follows_tusd else 400, errors or None)


def _answer(path: Path, request: HookRequest, outcome: programs.Outcome) -> HookResponse | None:
    """Return the answer on a program's standard output; log any other output.

    :raises HookBroken: if the answer to a blocking hook is invalid.
    """
    try:
        if len(outcome.output) > _LONGEST_ANSWER and outcome.output.lstrip().startswith(b"{"):
            raise BadAnswer("It is too long.")
        answer = decode_answer(request.type, outcome.output) if outcome.output else None
    except BadAnswer as error:
        if request.type.blocking and outcome.code == 0:
            raise HookBroken(f"The answer of {path} is invalid: {error}") from None
        # The event has been delivered; running the program again would not improve the answer.
        reason = printable(str(error))
        log.warning("The answer of %s to %s is invalid: %s", path, request.type, reason)
        return None
    if answer is None:
        _log_lines(request, "stdout", outcome.output)
    return answer


def _warn_if_missing(path: Path) -> None:
    """Log a program that cannot be run. It may be installed before it is needed."""
    if not path.exists():
        log.warning("There is no program %s for hooks", path)
    elif path.is_dir() or not os.access(path, os.X_OK):
        log.warning("The program %s for hooks is not executable", path)


def _reason(error: OSError, path: Path) -> str:
    if isinstance(error, FileNotFoundError) and path.exists():
        return "the interpreter that its first line names is missing"
    if isinstance(error, PermissionError):
        return "it is not executable"
    if error.errno == errno.ENOEXEC:
        return "its first line names no interpreter (#!)"
    return error.strerror or str(error)


def _log_lines(request: HookRequest, stream: str, output: bytes) -> None:
    """Log what a program wrote, which may contain text of clients."""
    lines = output.decode("utf-8", "replace").splitlines()
    for line in lines[-_LOGGED_LINES:]:
        shown = printable(line)[:_LOGGED_WIDTH]
        log.info("%s of %s, %s: %s", request.type, request.info.id, stream, shown)
