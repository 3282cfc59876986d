"""Runs programs with a timeout and a bound on their output.

Under gevent, the hub starts and watches a program, so that other greenlets go on; elsewhere, the
calling thread does.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tuswsgi.core.process import PerProcess, is_cooperative, let_others_run

#: How long to wait for the end of a killed program, in seconds. One in an uninterruptible
#: system call may take for ever.
_GRACE = 5.0

#: How often a thread checks whether a program has ended whose output is still open, in seconds.
_TICK = 0.05

_CHUNK = 64 * 1024

#: The largest capacity of a pipe on Linux, in chunks.
_FULL_PIPE = 16

#: Signals that Python ignores. Programs would inherit that.
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)

#: Held under gevent while a program is started.
_turn = PerProcess(lambda: threading.Lock())


@dataclass(frozen=True)
class Program:
    """A program to run.

    :param command: its path, which is not looked up in ``PATH``, and its arguments.
    :param stdin: its standard input, which it need not read.
    :param cwd: its working directory, ``None`` for ours.
    """

    command: Sequence[str | bytes]
    env: Mapping[str, str]
    stdin: bytes = b""
    cwd: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program.

    :param code: its exit code, or the negative number of the signal that killed it.
    :param output: the beginning of its standard output.
    :param errors: the end of its standard error.
    """

    code: int
    output: bytes
    errors: bytes


def run(program: Program, *, timeout: float, output: int, errors: int) -> Outcome:
    """Run a program in a new session and wait for its end.

    Processes that it leaves in the background live on; their output is discarded.

    :param timeout: seconds after which its process group is killed.
    :param output: how many bytes of the beginning of its standard output to keep.
    :param errors: how many bytes of the end of its standard error to keep.
    :raises TimeoutError: if it was killed.
    :raises OSError: if it could not be started.
    """
    with ExitStack() as stack:
        stdin = stack.enter_context(_readable(program.stdin))
        out = stack.enter_context(_Pipe(slice(output, None)))
        err = stack.enter_context(_Pipe(slice(None, -errors)))
        wait = _in_hub if is_cooperative() else _in_thread
        code = wait(program, stdin, (out, err), timeout)
        return Outcome(code, bytes(out.kept), bytes(err.kept))


class _Pipe:
    """A pipe for a program's output, of which a part is kept.

    :param surplus: the slice to discard after each read.
    """

    def __init__(self, surplus: slice) -> None:
        self.kept = bytearray()
        #: Whether all writers have closed it.
        self.ended = False
        #: Whether a reader in the background drains and closes it.
        self.is_lent = False
        self._writer: int | None
        self.reader, self._writer = os.pipe()
        self._surplus = surplus
        os.set_blocking(self.reader, False)

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_writer()
        if not self.is_lent:
            os.close(self.reader)

    @property
    def writer(self) -> int:
        """The program's end."""
        assert self._writer is not None
        return self._writer

    def close_writer(self) -> None:
        """Close our copy of the program's end, so that the pipe ends when the program does."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def take(self) -> bool:
        """Read once; return whether there may be more."""
        try:
            chunk = os.read(self.reader, _CHUNK)
        except BlockingIOError:
            return False
        self.ended = not chunk
        if not self.is_lent:
            self.kept += chunk
            del self.kept[self._surplus]
        return bool(chunk)

    def take_rest(self) -> None:
        """Read the rest of the output of a program that has ended.

        If a process in the background has the pipe open, it becomes lent.
        """
        for _ in range(_FULL_PIPE):
            if self.ended or not self.take():
                break
        self.is_lent = not self.ended


Pipes = tuple[_Pipe, _Pipe]


def _readable(content: bytes) -> IO[bytes]:
    """Return a file with this content. Unlike a pipe, it needs no writer beside the reader."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin")
    else:
        fd, name = tempfile.mkstemp()
        os.unlink(name)
    file = os.fdopen(fd, "w+b")
    file.write(content)
    file.seek(0)
    return file


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended, or changed its user


def _too_slow(timeout: float) -> TimeoutError:
    return TimeoutError(f"it took longer than {round(timeout, 2):g} s and was killed")


def _in_hub(program: Program, stdin: IO[bytes], pipes: Pipes, timeout: float) -> int:
    from gevent import get_hub
    from gevent.event import Event

    loop = get_hub().loop
    # The loop reaps children. Its handler must exist before the first child does.
    loop.install_sigchld()
    ended = Event()
    with _turn.get():
        # The kernel takes a millisecond to start a program. Many in a row would block others.
        let_others_run()
        pid = _start(program, stdin, pipes)
        child = loop.child(pid)
        child.start(ended.set)
    readers = [loop.io(pipe.reader, 1, ref=False) for pipe in pipes]
    for pipe, reader in zip(pipes, readers, strict=True):
        pipe.close_writer()
        reader.start(_take_some, pipe, reader)
    try:
        if not ended.wait(timeout):
            _kill(pid)
            ended.wait(_GRACE)
            raise _too_slow(timeout)
        for pipe in pipes:
            pipe.take_rest()
        return os.waitstatus_to_exitcode(child.rstatus)
    finally:
        if not ended.is_set():
            _kill(pid)
        child.close()
        for pipe, reader in zip(pipes, readers, strict=True):
            if not pipe.is_lent:
                reader.close()


def _take_some(pipe: _Pipe, reader: Any) -> None:
    pipe.take()
    if pipe.ended:
        reader.close()
        if pipe.is_lent:
            os.close(pipe.reader)


def _start(program: Program, stdin: IO[bytes], pipes: Pipes) -> int:
    """Start a program and return its pid.

    gevent's ``subprocess`` takes ten times as long, and much longer in a large process.
    """
    command = list(program.command)
    if program.cwd is not None:
        # posix_spawn cannot set a working directory.
        command = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(program.cwd), *command]
    fds = (stdin.fileno(), *(pipe.writer for pipe in pipes))
    return os.posix_spawn(
        command[0],
        command,
        program.env,
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(fds)],
        setsid=True,
        setsigmask=(),
        setsigdef=_IGNORED,
    )


def _in_thread(program: Program, stdin: IO[bytes], pipes: Pipes, timeout: float) -> int:
    out, err = pipes
    process = subprocess.Popen(
        program.command,
        stdin=stdin,
        stdout=out.writer,
        stderr=err.writer,
        env=program.env,
        cwd=program.cwd,
        start_new_session=True,
    )
    try:
        for pipe in pipes:
            pipe.close_writer()
        _follow(process, pipes, timeout)
    finally:
        if process.returncode is None:
            _kill(process.pid)
            _wait(process, _GRACE)
    for pipe in pipes:
        pipe.take_rest()
        if pipe.is_lent:
            threading.Thread(target=_take_all, args=(pipe,), daemon=True).start()
    return process.returncode


def _follow(process: subprocess.Popen[bytes], pipes: Pipes, timeout: float) -> None:
    """Read a program's output until it has ended."""
    deadline = time.monotonic() + timeout
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe.reader, select.POLLIN)
    while process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _too_slow(timeout)
        if all(pipe.ended for pipe in pipes):
            _wait(process, left)
            continue
        # A process in the background may keep the pipes open after the program's end.
        poll.poll(1000 * min(left, _TICK))
        for pipe in pipes:
            if not pipe.ended:
                pipe.take()
                if pipe.ended:
                    poll.unregister(pipe.reader)


def _wait(process: subprocess.Popen[bytes], timeout: float) -> None:
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass  # the caller checks the deadline


def _take_all(pipe: _Pipe) -> None:
    os.set_blocking(pipe.reader, True)
    while pipe.take():
        pass
    os.close(pipe.reader)
