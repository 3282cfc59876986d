"""Brings hooks to programs: one for all events, one per event in a directory, or both.

This file owns how a program is told of a hook and what its exit code and its output mean.
How programs run, and how long they may, is the business of ``tuswsgi.hooks.programs``.
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

#: What Linux takes as one argument, in bytes.
_LONGEST_ARGUMENT = 128 * KiB - 1

#: The longest answer. Of more output the beginning is logged.
_LONGEST_ANSWER = 1 * MiB

#: How much of a program's standard error is kept, and how much of that a client gets to
#: see, in bytes from its end.
_KEPT_ERRORS = 64 * KiB
_SHOWN_ERRORS = 4 * KiB

#: How much of what a program writes is logged, in lines and in characters of each.
_LOGGED_LINES = 50
_LOGGED_WIDTH = 500


@dataclass
class FileHook(Hook):
    """Hooks that are programs.

    :param format: what the payload looks like.
    """

    section: ClassVar[str] = "hooks"
    name: ClassVar[str] = "file"

    format: PayloadFormat
    file: Path | None = option(
        None,
        "A program that is run for every event, with the event's name and the payload as its "
        "arguments; the payload is on its standard input, too.",
        rustus="HOOKS_FILE",
    )
    dir: Path | None = option(
        None,
        "A directory of programs, each named like its event, with the payload as the only "
        "argument and on the standard input.",
        rustus="HOOKS_DIR",
    )
    file_timeout: float = option(
        60.0, "How long a program may keep a request waiting; then it is killed.", kind=Duration
    )
    file_programs: int = option(
        32,
        "How many programs a worker runs at once for requests that wait for them. Further requests "
        "wait for their turn, within `file_timeout`, and are told to come back after that (503). "
        "For events that no request waits for, `delivery_pool` says how many.",
        validate=Range(min=1),
    )
    file_post_timeout: float = option(
        3600.0,
        "How long a program may take for an event that no request waits for; then it is "
        "killed, and the event is delivered again.",
        kind=Duration,
    )

    def __post_init__(self) -> None:
        # The working directory may be another one later on.
        self.file = self.file and self.file.absolute()
        self.dir = self.dir and self.dir.absolute()
        self._turns = PerProcess(lambda: threading.Semaphore(self.file_programs))

    def prepare(self) -> None:
        if self.file is not None:
            _look_at(self.file)
        if self.dir is not None and not self.dir.is_dir():
            log.warning("There is no directory of hooks %s", self.dir)
        elif self.dir is not None:
            for type in sorted(self.types):
                _look_at(self.dir / type.value)

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
                self._do_without(path, request.type)
                return None
            if not os.access(path, os.X_OK):
                raise PermissionError
            with turn as timeout:
                ended = programs.run(
                    self._program(path, request),
                    timeout=timeout,
                    output=_LONGEST_ANSWER + 1,
                    errors=_KEPT_ERRORS,
                )
        except TimeoutError as error:
            raise HookFailed(f"{path}: {error}") from None
        except OSError as error:
            raise HookFailed(f"{path} cannot be run: {_reason(error, path)}") from None
        _log_lines(request, "stderr", ended.errors)
        return self._understood(path, request, ended)

    @contextmanager
    def _turn(self, request: HookRequest) -> Iterator[float]:
        """Wait until a request may have its program; yields how long that may take.

        :raises TimeoutError: if its time is over before.
        """
        timeout = request.time_left(self.file_timeout)
        deadline = time.monotonic() + timeout
        turns = self._turns.get()
        if not turns.acquire(timeout=timeout):
            raise TimeoutError(f"{self.file_programs} others ran all the time (file_programs)")
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
        # tusd runs the programs of a directory in it.
        cwd = path.parent if as_tusd and path != self.file else None
        return programs.Program([str(path), *arguments], env, payload, cwd)

    def _do_without(self, path: Path, type: HookType) -> None:
        # "If some hook file isn't found, rustus throws an error."
        if type.blocking and not self.format.follows_tusd:
            raise HookFailed(f"There is no program {path}.")
        log.info("Nobody hears of %s: there is no program %s", type, path)

    def _understood(
        self, path: Path, request: HookRequest, ended: programs.Ended
    ) -> HookResponse | None:
        """Return what a program that has ended means."""
        answer = _answer(path, request, ended)
        if ended.code == 0 or (answer is not None and answer.reject):
            return answer
        errors = ended.errors[-_SHOWN_ERRORS:].decode("utf-8", "replace").strip()
        if ended.code < 0:
            raise HookFailed(f"{path} was ended by signal {-ended.code}.")
        if not request.type.blocking:
            last = errors.rpartition("\n")[2][:_LOGGED_WIDTH]
            raise HookFailed(f"{path} ended with exit code {ended.code}: {last}")
        # The statuses are tusd's and rustus'.
        raise HookRefusal(500 if self.format.follows_tusd else 400, errors or None)


def _answer(path: Path, request: HookRequest, ended: programs.Ended) -> HookResponse | None:
    """Return the answer on a program's standard output; what is none goes to the log.

    :raises HookBroken: if a request waits for an answer that cannot be understood.
    """
    try:
        if len(ended.output) > _LONGEST_ANSWER and ended.output.lstrip().startswith(b"{"):
            raise BadAnswer("It is too long.")
        answer = decode_answer(request.type, ended.output) if ended.output else None
    except BadAnswer as error:
        if request.type.blocking and ended.code == 0:
            raise HookBroken(f"The answer of {path} is wrong: {error}") from None
        # It was told of the event, which is what counts.
        said = printable(str(error))
        log.warning("The answer of %s to %s is wrong: %s", path, request.type, said)
        return None
    if answer is None:
        _log_lines(request, "stdout", ended.output)
    return answer


def _look_at(path: Path) -> None:
    """Warn of a program that cannot be run; the reason may pass before it is needed."""
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
    """Log what a program wrote, in which clients may have had their say."""
    lines = output.decode("utf-8", "replace").splitlines()
    for line in lines[-_LOGGED_LINES:]:
        shown = printable(line)[:_LOGGED_WIDTH]
        log.info("%s of %s, %s: %s", request.type, request.info.id, stream, shown)
