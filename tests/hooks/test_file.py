"""Hooks that are programs: what they are told, and what their exit codes and answers mean."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2e.client import wait_until

from tuswsgi.core.errors import HookFailed, HookRefusal
from tuswsgi.core.events import HookType, RequestInfo
from tuswsgi.core.info import FileInfo, Metadata
from tuswsgi.hooks.base import HookRequest, HookResponse
from tuswsgi.hooks.file import FileHook
from tuswsgi.hooks.manager import HookManager
from tuswsgi.hooks.payloads import FormatName, payload_format
from tuswsgi.hooks.settings import HookSettings
from tuswsgi.infostores.memory import MemoryInfoStore
from tuswsgi.outbox.events import event_of
from tuswsgi.outbox.outbox import Outbox
from tuswsgi.outbox.settings import DeliverySettings

INFO = FileInfo(id="a1", size=10, offset=3, metadata=Metadata.of({"filename": b"a b.txt"}))
REQUEST = RequestInfo("POST", "/files/", "192.0.2.1", 4711, {"x-test": "1"})

#: Formats that behave as rustus, and the one that behaves as tusd.
RUSTUS = (FormatName.DEFAULT, FormatName.V2, FormatName.TUSD)
TUSD = FormatName.TUSD_V2

Write = Callable[..., Path]


def hook(format: FormatName = FormatName.DEFAULT, **options) -> FileHook:
    made = FileHook(format=payload_format(format), **options)
    made.types = frozenset(HookType)
    return made


def request(type: HookType = HookType.PRE_CREATE, info: FileInfo = INFO) -> HookRequest:
    return HookRequest(type, info, REQUEST)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a program in shell and return its path."""

    def write(script: str, name: str = "hook") -> Path:
        path = tmp_path / "hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """Where programs note what they were told: ``TOLD`` in their environment."""
    return tmp_path / "told"


@pytest.fixture(autouse=True)
def environment(told: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("TOLD", str(told))
    caplog.set_level(logging.INFO, "tuswsgi")


class TestTelling:
    @pytest.mark.parametrize("format", FormatName)
    def test_one_program_for_all(self, write: Write, told: Path, format: FormatName) -> None:
        program = write('printf "%s\\n" "$#" "$1" "$2" >"$TOLD"; cat >>"$TOLD"')
        sent = request(HookType.POST_FINISH)
        assert hook(format, file=program).send(sent) is None
        count, name, argument, stdin = told.read_text().split("\n")
        assert (count, name) == ("2", "post-finish")
        assert argument == stdin == payload_format(format).encode(sent)
        assert json.loads(stdin) == payload_format(format).dump(sent)

    @pytest.mark.parametrize("format", FormatName)
    def test_one_program_for_each(self, write: Write, told: Path, format: FormatName) -> None:
        program = write('printf "%s\\n" "$#" "$1" >"$TOLD"; cat >>"$TOLD"', "post-create")
        sent = request(HookType.POST_CREATE)
        assert hook(format, dir=program.parent).send(sent) is None
        count, argument, stdin = told.read_text().split("\n")
        assert count == "1"
        assert argument == stdin == payload_format(format).encode(sent)

    @pytest.mark.parametrize(
        ("format", "type", "info", "expected"),
        [
            (TUSD, HookType.PRE_CREATE, INFO, ["", "10", "3"]),
            (TUSD, HookType.POST_CREATE, INFO, ["a1", "10", "3"]),
            (FormatName.DEFAULT, HookType.PRE_CREATE, INFO, ["a1", "10", "3"]),
            (TUSD, HookType.POST_CREATE, INFO.replace(size=None), ["a1", "0", "3"]),
            (TUSD, HookType.POST_CREATE, INFO.replace(size=0, offset=0), ["a1", "0", "0"]),
        ],
    )
    def test_the_environment(
        self, write: Write, told: Path, format: FormatName, type, info, expected
    ) -> None:
        program = write('printf "%s\\n" "$TUS_ID" "$TUS_SIZE" "$TUS_OFFSET" "$HOME" >"$TOLD"')
        hook(format, file=program).send(request(type, info))
        assert told.read_text().split("\n") == [*expected, os.environ.get("HOME", ""), ""]

    def test_text_arrives_as_it_is(self, write: Write, told: Path) -> None:
        sent = request(
            info=INFO.replace(
                metadata=Metadata.of({"name": "gr\u00fc\u00df \u4f60'\"$(id)\n".encode()})
            )
        )
        program = write('printf "%s" "$2" >"$TOLD"')
        hook(file=program).send(sent)
        payload = json.loads(told.read_bytes())
        assert payload["upload"]["metadata"]["name"] == "gr\u00fc\u00df \u4f60'\"$(id)\n"

    def test_a_long_payload_is_on_the_input_only(self, write: Write, told: Path) -> None:
        program = write('echo "$#" "$1" >"$TOLD"; wc -c >>"$TOLD"')
        sent = request(info=INFO.replace(metadata=Metadata.of({"name": b"x" * 131_072})))
        hook(file=program).send(sent)
        arguments, size = told.read_text().splitlines()
        assert arguments == "1 pre-create"
        assert int(size) == len(payload_format(FormatName.DEFAULT).encode(sent).encode())

    def test_the_longest_payload_that_is_an_argument(self, write: Write, told: Path) -> None:
        program = write('echo "${#2}" >"$TOLD"')
        short = request(info=INFO.replace(metadata=Metadata.of({"name": b""})))
        free = 131_071 - len(payload_format(FormatName.DEFAULT).encode(short).encode())
        for more, expected in ((0, "131071"), (1, "0")):
            name = b"x" * (free + more)
            hook(file=program).send(
                request(info=INFO.replace(metadata=Metadata.of({"name": name})))
            )
            assert told.read_text().strip() == expected

    def test_the_working_directory(self, write: Write, told: Path) -> None:
        program = write('pwd >"$TOLD"', "post-create")
        hook(dir=program.parent).send(request(HookType.POST_CREATE))
        assert told.read_text().strip() == os.getcwd()
        # tusd's hooks find each other by relative paths.
        hook(TUSD, dir=program.parent).send(request(HookType.POST_CREATE))
        assert told.read_text().strip() == str(program.parent)

    def test_relative_paths(
        self, write: Write, told: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = write('echo >"$TOLD"')
        monkeypatch.chdir(program.parent.parent)
        made = hook(file=Path("hooks/hook"))
        monkeypatch.chdir("/")
        made.send(request())
        assert told.exists()


class TestRefusing:
    @pytest.mark.parametrize(
        ("format", "status"), [*((format, 400) for format in RUSTUS), (TUSD, 500)]
    )
    def test_by_exit_code(self, write: Write, format: FormatName, status: int) -> None:
        program = write("echo This upload is not allowed >&2; exit 1")
        with pytest.raises(HookRefusal) as caught:
            hook(format, file=program).send(request())
        assert caught.value.status == status
        assert caught.value.body == "This upload is not allowed"

    def test_without_a_word(self, write: Write) -> None:
        with pytest.raises(HookRefusal) as caught:
            hook(file=write("exit 7")).send(request())
        assert caught.value.body is None

    def test_with_many_words(self, write: Write) -> None:
        program = write("yes refused | head -c 1000000 >&2; echo at last >&2; exit 1")
        with pytest.raises(HookRefusal) as caught:
            hook(file=program).send(request())
        assert caught.value.body is not None
        assert len(caught.value.body) <= 4096
        assert caught.value.body.endswith("refused\nat last")

    @pytest.mark.parametrize("code", [0, 1])
    def test_by_an_answer(self, write: Write, code: int) -> None:
        answer = {"RejectUpload": True, "HTTPResponse": {"StatusCode": 403, "Body": "no"}}
        program = write(f"echo '{json.dumps(answer)}'; exit {code}")
        said = hook(TUSD, file=program).send(request())
        assert said is not None
        assert (said.reject, said.status, said.body) == (True, 403, "no")

    @pytest.mark.parametrize(
        "answer", ['{"HTTPResponse": {"StatusCode": 201}}', '{"RejectUpload": 1}']
    )
    def test_the_exit_code_counts_more_than_other_answers(self, write: Write, answer: str) -> None:
        with pytest.raises(HookRefusal) as caught:
            hook(TUSD, file=write(f"echo '{answer}'; exit 1")).send(request())
        assert caught.value.status == 500

    def test_an_event_that_is_over_cannot_be_refused(self, write: Write) -> None:
        program = write("echo what >&2; echo went wrong >&2; exit 3")
        with pytest.raises(HookFailed, match="exit code 3: went wrong"):
            hook(file=program).send(request(HookType.POST_FINISH))


class TestHowMany:
    #: Notes how many of it run, and ends when the gate is there.
    COUNTING = """
        touch "$TOLD.run.$$"
        ls "$TOLD".run.* | wc -l >> "$TOLD"
        while [ ! -e "$TOLD.gate" ]; do sleep 0.01; done
        rm "$TOLD.run.$$"
    """

    def test_requests_wait_for_their_turn(self, write: Write, told: Path) -> None:
        one = hook(file=write(self.COUNTING), file_programs=2)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(one.send, request()) for _ in range(8)]
            wait_until(lambda: told.exists() and len(told.read_text().split()) == 2, "two of them")
            told.with_name("told.gate").touch()
            assert [answer.result() for answer in answers] == [None] * 8
        counts = [int(count) for count in told.read_text().split()]
        assert len(counts) == 8
        assert max(counts) == 2

    def test_who_waits_too_long_is_told_to_come_back(self, write: Write) -> None:
        one = hook(file=write(self.COUNTING), file_programs=1, file_timeout=0.5)
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(one.send, request()) for _ in range(4)]
            assert all(isinstance(answer.exception(), HookFailed) for answer in answers)
        # All of them have given back their turns.
        write("exit 0")
        assert one.send(request()) is None

    def test_other_events_do_not_wait(self, write: Write, told: Path) -> None:
        one = hook(file=write(self.COUNTING), file_programs=1)
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(one.send, request())
            wait_until(told.exists, "the first one")
            other = pool.submit(one.send, request(HookType.POST_FINISH))
            wait_until(lambda: told.read_text().split() == ["1", "2"], "the second one")
            told.with_name("told.gate").touch()
            assert waiting.result() is other.result() is None

    def test_greenlets_wait_for_each_other(self, write: Write) -> None:
        program = """
            from gevent import monkey
            monkey.patch_all()
            import sys, time, gevent
            from pathlib import Path
            from hooks.test_file import hook, request

            one, ticks = hook(file=Path(sys.argv[1]), file_programs=1), []
            def tick():
                while True:
                    ticks.append(time.monotonic())
                    gevent.sleep(0.01)
            ticker = gevent.spawn(tick)
            gevent.joinall([gevent.spawn(one.send, request()) for _ in range(4)], raise_error=True)
            # They ran one after the other, and others meanwhile.
            assert ticks[-1] - ticks[0] > 0.8, ticks
            assert len(ticks) > 20
        """
        script = textwrap.dedent(program)
        command = [sys.executable, "-c", script, str(write("sleep 0.25"))]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, timeout=60)


class TestAnswering:
    def test_a_change(self, write: Write) -> None:
        said = hook(file=write("""echo '{"ChangeFileInfo": {"ID": "b2"}}'""")).send(request())
        assert said is not None
        assert said.change is not None
        assert said.change.id == "b2"

    def test_to_stop_an_upload(self, write: Write) -> None:
        program = write("""echo '{"StopUpload": true}'""")
        said = hook(TUSD, file=program).send(request(HookType.POST_RECEIVE))
        assert said is not None
        assert said.stop

    @pytest.mark.parametrize("output", ["hello", "null", "[]", '{"a": 1}', "{", "3"])
    def test_anything_else_is_for_the_log(self, write: Write, caplog, output: str) -> None:
        assert hook(file=write(f"echo '{output}'")).send(request()) is None
        assert f"pre-create of a1, stdout: {output}" in caplog.text

    def test_what_clients_say_is_told_from_the_log_s_own(self, write: Write, caplog) -> None:
        hook(file=write(r"printf 'one\033[2J\rERROR two\n\377\n' >&2")).send(request())
        assert caplog.messages == [
            "pre-create of a1, stderr: one\\x1b[2J",
            "pre-create of a1, stderr: ERROR two",
            "pre-create of a1, stderr: \ufffd",
        ]

    def test_what_clients_say_does_nothing_to_a_terminal(self, write: Write, caplog) -> None:
        program = write(r"printf 'no \033]0;x\007' >&2; exit 3")
        receiver, infos = hook(file=program), MemoryInfoStore()
        settings = DeliverySettings(delivery_attempts=1)
        manager = HookManager([receiver], HookSettings(), lambda info: None)
        outbox = Outbox(infos, manager, settings, lambda request, answer: None)
        outbox.start()
        try:
            info = FileInfo(id="a1")
            infos.create(info, [event_of(request(HookType.POST_FINISH), "file", time.time())])
            outbox.wake("a1")
            wait_until(lambda: infos.undelivered(dead=True), "the failure")
        finally:
            outbox.stop(5)
        (event,) = infos.undelivered(dead=True)
        assert event.error is not None
        assert event.error.endswith(r"ended with exit code 3: no \x1b]0;x\x07")
        assert r"no \x1b]0;x\x07" in caplog.text
        assert "\x1b" not in caplog.text

    def test_the_log_does_not_overflow(self, write: Write, caplog) -> None:
        hook(file=write("yes x | head -c 3000000; yes x | tr -d '\\n' | head -c 9999 >&2")).send(
            request()
        )
        assert len(caplog.messages) < 100
        assert max(map(len, caplog.messages)) < 1000

    def test_a_wrong_answer(self, write: Write, caplog) -> None:
        program = write("""echo '{"RejectUpload": "yes"}'""")
        with pytest.raises(HookFailed, match="answer"):
            hook(file=program).send(request())
        # Nobody waits for it: the event has been told.
        assert hook(file=program).send(request(HookType.POST_FINISH)) is None
        assert "answer" in caplog.text

    def test_an_endless_answer(self, write: Write) -> None:
        program = write(
            """printf '{"RejectUpload": true, "a": "'; yes | head -c 2000000; echo '"}'"""
        )
        with pytest.raises(HookFailed, match="too long"):
            hook(file=program).send(request())


class TestBoth:
    def test_in_their_order(self, write: Write, told: Path) -> None:
        file = write('echo file >>"$TOLD"')
        directory = write('echo directory >>"$TOLD"', "pre-create").parent
        hook(file=file, dir=directory).send(request())
        assert told.read_text() == "file\ndirectory\n"

    @pytest.mark.parametrize("no", ["exit 1", """echo '{"RejectUpload": true}'"""])
    def test_the_first_refusal_is_the_last_word(self, write: Write, told: Path, no: str) -> None:
        made = hook(file=write(no), dir=write('echo >"$TOLD"', "pre-create").parent)
        try:
            said = made.send(request())
            assert said is not None
            assert said.reject
        except HookRefusal:
            pass
        assert not told.exists()

    def test_the_second_sees_what_the_first_changed(self, write: Write, told: Path) -> None:
        file = write("""echo '{"ChangeFileInfo": {"ID": "b2"}}'""")
        second = write(
            """echo "$TUS_ID $1" >"$TOLD"; echo '{"HTTPResponse": {"Body": "x"}}'""", "pre-create"
        )
        said = hook(file=file, dir=second.parent).send(request())
        assert said is not None
        assert said.change is not None
        assert (said.change.id, said.body) == ("b2", "x")
        id, payload = told.read_text().split(" ", 1)
        assert id == json.loads(payload)["upload"]["id"] == "b2"


class TestMissing:
    @pytest.fixture(params=["file", "dir"])
    def options(self, request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
        return {request.param: tmp_path / "nothing"}

    def test_rustus_refuses_what_waits(self, options: dict[str, Path]) -> None:
        for format in RUSTUS:
            # Not for good: clients shall come back once the operator has seen it.
            with pytest.raises(HookFailed, match="There is no program"):
                hook(format, **options).send(request())

    def test_tusd_goes_on(self, options: dict[str, Path]) -> None:
        assert hook(TUSD, **options).send(request()) is None

    @pytest.mark.parametrize("format", FormatName)
    def test_events_that_are_over_are_skipped(
        self, options: dict[str, Path], caplog, format: FormatName
    ) -> None:
        assert hook(format, **options).send(request(HookType.POST_FINISH)) is None
        assert "no program" in caplog.text

    def test_it_is_told_at_start(self, options: dict[str, Path], caplog) -> None:
        hook(**options).prepare()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert str(*options.values()) in record.getMessage()

    def test_only_what_is_enabled_is_missed(self, write: Write, caplog) -> None:
        made = hook(dir=write("", "pre-create").parent)
        made.types = {HookType.PRE_CREATE}
        made.prepare()
        assert not caplog.records
        made.types = {HookType.PRE_CREATE, HookType.POST_FINISH}
        made.prepare()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "hooks/post-finish" in caplog.text

    def test_it_may_come_and_go(self, write: Write) -> None:
        program = write("")
        made = hook(file=program)
        assert made.send(request()) is None
        program.unlink()
        with pytest.raises(HookFailed):
            made.send(request())


class TestBroken:
    @pytest.mark.parametrize("type", [HookType.PRE_CREATE, HookType.POST_FINISH])
    @pytest.mark.parametrize("format", [FormatName.DEFAULT, TUSD])
    def test_not_executable(self, write: Write, caplog, format, type: HookType) -> None:
        program = write("", type.value)
        program.chmod(0o644)
        for options in ({"file": program}, {"dir": program.parent}):
            with pytest.raises(HookFailed, match="cannot be run: it is not executable"):
                hook(format, **options).send(request(type))
        hook(file=program).prepare()
        assert "not executable" in caplog.text

    def test_no_interpreter(self, write: Write) -> None:
        program = write("")
        program.write_text("exit 0")
        with pytest.raises(HookFailed, match="its first line names no interpreter"):
            hook(file=program).send(request())
        program.write_text("#!/no/such/shell\nexit 0")
        with pytest.raises(HookFailed, match="names is missing"):
            hook(file=program).send(request())

    def test_killed(self, write: Write) -> None:
        # By a lack of memory, e.g.: that is not what the application decided.
        with pytest.raises(HookFailed, match="signal 9"):
            hook(file=write("kill -9 $$")).send(request())

    @pytest.mark.parametrize(
        ("type", "option"),
        [
            (HookType.PRE_FINISH, "file_timeout"),
            (HookType.POST_FINISH, "file_post_timeout"),
        ],
    )
    def test_too_slow(self, write: Write, type: HookType, option: str) -> None:
        program = write("sleep 1000")
        with pytest.raises(HookFailed, match=r"longer than 0\.2 s"):
            hook(file=program, **{option: 0.2}).send(request(type))


def test_a_program_that_accepts(write: Write) -> None:
    said = hook(TUSD, file=write('echo \'{"HTTPResponse": {"Header": {}}}\'')).send(request())
    assert said in (None, HookResponse())
