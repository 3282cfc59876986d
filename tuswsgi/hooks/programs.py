"""Runs programs while other requests go on, bounded in time and in what they may say.

This file owns how a program is started, watched and killed: under gevent by the hub,
elsewhere by the thread that waits for it. It does not know what programs are for.
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

#: How long a killed program may take to be gone, in seconds: what sits in a system call
#: that nothing interrupts must not hold us, too.
_GRACE = 5.0

#: How often a thread looks whether a program has ended whose output stays open, in seconds.
_TICK = 0.05

_CHUNK = 64 * 1024

#: The most that the kernel lets a pipe hold, in chunks.
_FULL_PIPE = 16

#: Python ignores these, and what is ignored stays so in the program that is started.
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)

#: Under gevent: who may start a program.
_turn = PerProcess(lambda: threading.Lock())


@dataclass(frozen=True)
class Program:
    """A program that is to be run.

    :param command: its path, which is not searched for, and its arguments.
    :param stdin: what it finds on its standard input, which it need not read.
    :param cwd: its working directory, ``None`` for ours.
    """

    command: Sequence[str | bytes]
    env: Mapping[str, str]
    stdin: bytes = b""
    cwd: Path | None = None


@dataclass(frozen=True)
class Ended:
    """What became of a program.

    :param code: its exit code; the number of the signal that ended it, below zero.
    :param output: the beginning of its standard output.
    :param errors: the end of its standard error.
    """

    code: int
    output: bytes
    errors: bytes


def run(program: Program, *, timeout: float, output: int, errors: int) -> Ended:
    """Run a program, as the leader of a new session, and wait for its end.

    Processes that it leaves in the background live on; what they write is thrown away.

    :param timeout: seconds after which it is killed, with all of its process group.
    :param output: how many bytes of its standard output are kept, the first ones.
    :param errors: how many bytes of its standard error are kept, the last ones.
    :raises TimeoutError: if it was killed.
    :raises OSError: if it could not be started.
    """
    with ExitStack() as stack:
        stdin = stack.enter_context(_readable(program.stdin))
        out = stack.enter_context(_Pipe(slice(output, None)))
        err = stack.enter_context(_Pipe(slice(None, -errors)))
        wait = _in_hub if is_cooperative() else _in_thread
        code = wait(program, stdin, (out, err), timeout)
        return Ended(code, bytes(out.kept), bytes(err.kept))


class _Pipe:
    """A pipe for what a program writes: some of it is kept, the rest is thrown away.

    :param surplus: what is too much of what has come by now.
    """

    def __init__(self, surplus: slice) -> None:
        self.kept = bytearray()
        #: Whether nobody can write to it any more.
        self.ended = False
        #: Whether it is read on in the background, and closed there.
        self.is_lent = False
        self._writer: int | None
        self.reader, self._writer = os.pipe()
        self._surplus = surplus
        os.set_blocking(self.reader, False)

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *exc: object) -> None:
        self.give_writer()
        if not self.is_lent:
            os.close(self.reader)

    @property
    def writer(self) -> int:
        """The end for the program."""
        assert self._writer is not None
        return self._writer

    def give_writer(self) -> None:
        """The program has its end by now: ours would hide that it closed it."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def take(self) -> bool:
        """Take some of what is there; return whether there may be more."""
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
        """Take what was written by a program that has ended.

        The pipe is lent if something in the background goes on writing to it.
        """
        for _ in range(_FULL_PIPE):
            if self.ended or not self.take():
                break
        self.is_lent = not self.ended


Pipes = tuple[_Pipe, _Pipe]


def _readable(content: bytes) -> IO[bytes]:
    """Return a file with `content`: unlike a pipe it does not wait for its reader."""
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
        pass  # it is gone, or not ours any more


def _too_slow(timeout: float) -> TimeoutError:
    return TimeoutError(f"it took longer than {round(timeout, 2):g} s and was killed")


def _in_hub(program: Program, stdin: IO[bytes], pipes: Pipes, timeout: float) -> int:
    from gevent import get_hub
    from gevent.event import Event

    loop = get_hub().loop
    # Children are reaped by the loop, which has to hear of them before the first is there.
    loop.install_sigchld()
    ended = Event()
    with _turn.get():
        # To start a program takes the kernel a millisecond: many are not started in a row.
        let_others_run()
        pid = _start(program, stdin, pipes)
        child = loop.child(pid)
        child.start(ended.set)
    readers = [loop.io(pipe.reader, 1, ref=False) for pipe in pipes]
    for pipe, reader in zip(pipes, readers, strict=True):
        pipe.give_writer()
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

    ``subprocess`` takes gevent ten times as long, and much longer in a large process.
    """
    command = list(program.command)
    if program.cwd is not None:
        # posix_spawn has no way to say where.
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
            pipe.give_writer()
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
    """Take what a program writes until it has ended."""
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
        # A process in the background may hold the pipes open after the program's end.
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
        pass  # the caller looks at the clock


def _take_all(pipe: _Pipe) -> None:
    os.set_blocking(pipe.reader, True)
    while pipe.take():
        pass
    os.close(pipe.reader)
