"""How programs are run: what they get, what is taken of them, and that they always end."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tuswsgi.core.process import is_cooperative
from tuswsgi.hooks.programs import Outcome, Program, run

#: For what takes milliseconds on an idle machine, in seconds.
SOON = 60.0


def shell(
    script: str, *arguments: str | Path, stdin: bytes = b"", timeout: float = SOON, cwd=None
) -> Outcome:
    program = Program(["/bin/sh", "-c", script, "sh", *map(str, arguments)], os.environ, stdin, cwd)
    return run(program, timeout=timeout, output=1000, errors=100)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children() -> list[str]:
    """Return the states of this process' children."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            states.append(state)
    return states


def is_alive(pid: str) -> bool:
    try:
        stat = Path("/proc", pid, "stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    # Whoever is the parent now may take its time to look at the dead.
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def together(count: int, function: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=function, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_it_reads_writes_and_ends() -> None:
    assert shell("cat; echo no >&2; exit 3", stdin=b"hello") == Outcome(3, b"hello", b"no\n")


@pytest.mark.parametrize("script", ["exec <&-; sleep 0.1", "head -c 1 >/dev/null", "true"])
def test_it_need_not_read(script: str) -> None:
    assert shell(script, stdin=b"x" * 1_000_000).code == 0


def test_it_can_read_a_lot() -> None:
    assert shell("wc -c", stdin=b"x" * 1_000_000).output.strip() == b"1000000"


def test_its_output_is_bounded() -> None:
    ended = shell("echo first; yes | head -c 3000000; yes | head -c 300000 >&2; echo last >&2")
    assert ended.code == 0
    assert len(ended.output) == 1000
    assert ended.output.startswith(b"first\ny\n")
    assert len(ended.errors) == 100
    assert ended.errors.endswith(b"y\nlast\n")


def test_it_may_close_its_output_and_live_on(tmp_path: Path) -> None:
    ended = shell('exec >&- 2>&-; sleep 0.2; echo >"$1"; exit 4', tmp_path / "done")
    assert ended.code == 4
    assert (tmp_path / "done").exists()


def test_what_it_leaves_in_the_background_lives_on(tmp_path: Path) -> None:
    script = """
        (until [ -e "$1" ]; do sleep 0.01; done; yes | head -c 1000000 && echo >"$2") &
        echo started
    """
    ended = shell(script, tmp_path / "go", tmp_path / "done")
    assert ended == Outcome(0, b"started\n", b"")
    (tmp_path / "go").touch()
    wait_for((tmp_path / "done").exists)


def test_it_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(TimeoutError, match=r"longer than 0\.5 s"):
        shell('sleep 1000 & echo $! $$ >"$1"; sleep 1000', pids, timeout=0.5)
    for pid in pids.read_text().split():
        wait_for(lambda pid=pid: not is_alive(pid))


@pytest.mark.skipif(not is_cooperative(), reason="threads are not killed")
def test_it_is_killed_with_the_greenlet_that_waits_for_it(tmp_path: Path) -> None:
    import gevent

    pid = tmp_path / "pid"
    waiting = gevent.spawn(shell, 'echo $$ >"$1.new"; mv "$1.new" "$1"; sleep 1000', pid)
    wait_for(pid.exists)
    waiting.kill()
    wait_for(lambda: not is_alive(pid.read_text().strip()))


def test_it_is_killed_though_it_talks_without_end() -> None:
    with pytest.raises(TimeoutError):
        shell("yes", timeout=0.5)


def test_a_signal_ends_it() -> None:
    assert shell("kill -SEGV $$").code == -11


def test_it_leads_a_session_in_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "a b"
    directory.mkdir()
    # Process, parent, group, session.
    script = "pwd; read -r line </proc/$$/stat; set -- ${line##*)}; echo $$ $3 $4"
    output = shell(script, cwd=directory).output.decode()
    where, who = output.splitlines()
    assert where == str(directory)
    assert len(set(who.split())) == 1


def test_it_gets_nothing_of_ours() -> None:
    with open(os.devnull) as held:
        fds = shell("ls /proc/$$/fd").output.split()
        assert str(held.fileno()).encode() not in fds
    # Some that our own parent gave away to everybody may be there.
    assert {b"0", b"1", b"2"} <= set(fds)
    assert all(int(fd) < 3 or os.get_inheritable(int(fd)) for fd in fds)


def test_its_signals_are_the_usual_ones() -> None:
    lines = shell("exec cat /proc/self/status").output.decode().splitlines()
    masks = dict(line.split(":\t") for line in lines if line.startswith("Sig"))
    sigpipe = 1 << 12
    assert not int(masks["SigIgn"], 16) & sigpipe
    assert int(masks["SigBlk"], 16) == 0


def test_nothing_stays_behind(tmp_path: Path) -> None:
    shell("true")
    fds, others = os.listdir("/proc/self/fd"), len(children())
    for _ in range(10):
        shell("echo")
        with pytest.raises(TimeoutError):
            shell("sleep 1000", timeout=0)
        with pytest.raises(FileNotFoundError):
            run(Program([str(tmp_path / "none")], {}), timeout=SOON, output=1, errors=1)
    wait_for(lambda: len(children()) <= others)
    # gevent closes them when nobody can wait for them any more.
    wait_for(lambda: len(os.listdir("/proc/self/fd")) <= len(fds))


def test_what_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_text("echo")
    with pytest.raises(PermissionError):
        run(Program([str(path)], {}), timeout=SOON, output=1, errors=1)
    path.chmod(0o755)
    with pytest.raises(OSError, match="format") as caught:
        run(Program([str(path)], {}), timeout=SOON, output=1, errors=1)
    assert caught.value.errno == errno.ENOEXEC


def test_many_run_at_once(tmp_path: Path) -> None:
    # Each waits for all of them.
    script = 'echo >"$1/$2"; until [ $(ls "$1" | wc -l) -ge 50 ]; do sleep 0.1; done; cat'
    codes = []

    def one(number: int) -> None:
        ended = shell(script, tmp_path, str(number), stdin=b"%d" % number)
        codes.append((ended.code, ended.output == b"%d" % number))

    together(50, one)
    assert codes == [(0, True)] * 50


def test_others_go_on(tmp_path: Path) -> None:
    def wait_or_work(number: int) -> None:
        if number == 0:
            assert shell('until [ -e "$1" ]; do sleep 0.01; done', tmp_path / "go").code == 0
        else:
            for _ in range(100):
                time.sleep(0.001)
            (tmp_path / "go").touch()

    together(2, wait_or_work)


@pytest.mark.skipif(is_cooperative(), reason="this is it")
@pytest.mark.parametrize("file", [__file__, Path(__file__).parent / "test_file.py"])
def test_all_of_it_under_gevent(file: str) -> None:
    """Everything is promised where gevent has patched the process, too."""
    patched = (
        "from gevent import monkey; monkey.patch_all()\n"
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", str(file)]
    ended = subprocess.run(
        [sys.executable, "-c", patched, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=4 * SOON,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
