"""Logs: flat lines made of events, that block nobody and tell no secret."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

from trio_gateway import _logs
from trio_gateway._config import LogFormat, LogLevel
from trio_gateway._errors import escape
from trio_gateway._events import (
    DeadLettered,
    Delivered,
    DrainReport,
    Event,
    GatewayStarted,
    MessageAccepted,
    ReplyCommitted,
    TurnResumed,
    TurnSettled,
)
from trio_gateway._logs import QUEUE, event_level, event_name, logging_to_stderr, secrets_in
from trio_gateway._markers import ResumeReason, TurnState
from trio_gateway._messages import Delivery, ReplyKind, SessionKey

ADA = SessionKey("jsonl", "ada")
TEXT = "what Ada said in confidence"

DELIVERY = Delivery(
    id=7,
    session=ADA,
    key="s.1.a",
    text=TEXT,
    in_reply_to=("m1",),
    attempt=1,
    final=True,
    repeat=False,
    kind=ReplyKind.ANSWER,
)
EVENTS: tuple[Event, ...] = (
    MessageAccepted(session=ADA, message_id="m1", text=TEXT, duplicate=False),
    ReplyCommitted(session=ADA, turn=1, attempt=1, key="s.1.a", text=TEXT, final=True),
    Delivered(delivery=DELIVERY),
    DeadLettered(delivery=DELIVERY, error="blocked"),
)


def failed(traceback: str, session: SessionKey = ADA) -> TurnSettled:
    return TurnSettled(
        session=session,
        turn=1,
        attempt=2,
        state=TurnState.FAILED,
        error="ValueError",
        traceback=traceback,
    )


def written(
    *events: Event, level: LogLevel = LogLevel.INFO, log_format: LogFormat = LogFormat.JSON
) -> str:
    """What a log of `events` writes."""
    reading, writing = os.pipe()
    with logging_to_stderr(level, log_format, fd=writing) as log:
        for event in events:
            log.listener(event)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_an_event_is_one_flat_record() -> None:
    resumed = TurnResumed(
        session=ADA,
        turn=3,
        attempt=2,
        messages=("m1", "m2"),
        reason=ResumeReason.CRASH,
        interrupted_at=datetime(2026, 11, 1, 12, 0, tzinfo=UTC),
        alone=False,
    )
    report = DrainReport(
        reason=ResumeReason.SHUTDOWN,
        settled=(1, 2),
        interrupted=(),
        unresponsive=(),
        marked=2,
        timed_out=False,
        undelivered=0,
        phases={"mark": 0.00123456789, "drain": 1.0},
    )
    first, second = records(written(resumed, report))
    assert datetime.fromisoformat(first.pop("timestamp")).utcoffset() is not None
    assert first == {
        "level": "info",
        "event": "turn_resumed",
        "session": "jsonl:ada",
        "turn": 3,
        "attempt": 2,
        "messages": ["m1", "m2"],
        "waited": 0.0,
        "reason": "crash",
        "interrupted_at": "2026-11-01T12:00:00.000000Z",
        "alone": False,
    }
    assert (second["phases_mark"], second["phases_drain"]) == (0.001235, 1.0)


def test_every_kind_of_event_has_a_name_and_a_level() -> None:
    kinds = [Event]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert len(kinds) > 25
    for kind in kinds:
        assert LogLevel(kind.level)
    assert event_name(EVENTS[0]) == "message_accepted"
    assert event_level(failed("")) is LogLevel.ERROR


def test_texts_are_told_at_debug_only() -> None:
    assert TEXT not in written(*EVENTS)
    at_debug = records(written(*EVENTS, level=LogLevel.DEBUG))
    assert [(one["level"], one.get("text")) for one in at_debug] == [
        ("debug", TEXT),
        ("debug", TEXT),
        ("debug", TEXT),
        ("error", None),
    ]


def test_levels_below_the_chosen_one_are_not_told() -> None:
    settled = TurnSettled(session=ADA, turn=1, attempt=1, state=TurnState.COMPLETED)
    assert written(settled, level=LogLevel.WARNING) == ""
    assert records(written(settled))[0]["state"] == "COMPLETED"


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])
def test_a_failed_turn_tells_its_traceback(log_format: LogFormat) -> None:
    told = written(failed("Traceback:\n  line 1\nValueError: no"), log_format=log_format)
    assert "Traceback:" in told
    assert "ValueError: no" in told


EVIL = 'x\n2026 [error] forged level=critical\r\x1b[2J\x07\x85\u2028\u202e\ud800 "'


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])
def test_p14_nobody_can_write_a_log_line_through_a_message(log_format: LogFormat) -> None:
    session = SessionKey("jsonl", EVIL)
    told = written(failed(f"Traceback:\n{EVIL}", session), log_format=log_format)
    lines = told.split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines), lines
    heads = [line for line in lines if not line.startswith("    | ")]
    assert len(heads) == 1, lines
    if log_format is LogFormat.JSON:
        assert json.loads(told)["session"] == f"jsonl:{EVIL}"


def test_escape_keeps_what_people_write() -> None:
    assert escape("Grüße, 你好 🎉") == "Grüße, 你好 🎉"
    assert escape("a\nb\tc\x1b\u202e") == "a\\nb\\tc\\x1b\\u202e"


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])
def test_secrets_of_the_environment_are_never_told(
    log_format: LogFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOT_TOKEN", "hunter2-hunter2")
    monkeypatch.setenv("db_password", "hunter2-hunter2-long\nwith a line")
    monkeypatch.setenv("SHORT_KEY", "short")
    told = written(
        failed("ConnectError: https://x/hunter2-hunter2/getMe short"),
        failed("refused: hunter2-hunter2-long\nwith a line", SessionKey("a", "hunter2-hunter2")),
        log_format=log_format,
    )
    assert "hunter2" not in told
    assert "with a line" not in told
    assert "[secret]" in told
    assert "getMe short" in told


def test_secrets_are_found_by_name_and_longest_first() -> None:
    environ = {"API_KEY": "12345678", "X_SECRET": "1234567890", "HOME": "/home/ada/longer"}
    assert secrets_in(environ) == ("1234567890", "12345678")


def test_the_host_can_say_something_itself() -> None:
    reading, writing = os.pipe()
    with logging_to_stderr(LogLevel.INFO, LogFormat.CONSOLE, fd=writing) as log:
        log.say("info", "store_opened", path=Path("a b.db"), tries=2, ok=True)
        log.say("debug", "not_told")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    assert 'store_opened path="a b.db" tries=2 ok=yes' in told
    assert "not_told" not in told


def test_what_cannot_be_told_does_not_end_the_log() -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    reading, writing = os.pipe()
    with logging_to_stderr(LogLevel.INFO, LogFormat.JSON, fd=writing) as log:
        log.say("info", "first", what=Unspeakable())
        log.say("info", "second")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        first, second = records(pipe.read())
    assert (first["event"], first["about"]) == ("log_record_unreadable", "first")
    assert second["event"] == "second"


def test_p14_a_process_that_cannot_import_any_more_still_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No descriptor is left to import what makes the lines; later there is one."""

    def cannot(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    reading, writing = os.pipe()
    monkeypatch.setattr(_logs, "_console_chain", cannot)
    with logging_to_stderr(LogLevel.INFO, LogFormat.CONSOLE, fd=writing) as log:
        log.say("info", "first", who="ada\x1b[2J")
        assert log.flush(5)
        monkeypatch.undo()
        log.say("info", "second")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        first, second = pipe.read().splitlines()
    assert records(first)[0]["event"] == "first"
    assert "\\u001b[2J" in first
    assert second.endswith("second")


def test_p14_an_error_of_its_own_does_not_end_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with logging_to_stderr(LogLevel.INFO, LogFormat.JSON, fd=writing) as log:
        assert log.flush(5)
        with monkeypatch.context() as patch:
            patch.setattr(_logs.Renderer, "line", lambda *_: 1 / 0)
            log.say("info", "first")
            assert not log.flush(0.2)
        log.say("info", "second")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = records(pipe.read())
    assert told[0]["event"] == "log_dropped"
    assert told[-1]["event"] == "second"


# ----- a disk without room


def test_p14_a_log_on_a_full_disk_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """A file that may not grow is what a full disk is: for a while."""
    program = (
        "import resource\n"
        "from trio_gateway._config import LogFormat, LogLevel\n"
        "from trio_gateway._logs import logging_to_stderr\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "def room(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))\n"
        "with logging_to_stderr(LogLevel.INFO, LogFormat.AUTO) as log:\n"
        "    for event, size in ('first', hard), ('lost', 150), ('lost', 150), ('last', hard):\n"
        "        room(size)\n"
        "        log.say('info', event, filling='x' * 40)\n"
        "        assert log.flush(20)\n"
    )
    with (tmp_path / "log").open("wb") as file:
        done = subprocess.run([sys.executable, "-c", program], stderr=file, timeout=60, check=False)
    assert done.returncode == 0
    first, cut, dropped, last = (tmp_path / "log").read_text().splitlines()
    assert records(first)[0]["event"] == "first"
    assert len(first) + 1 + len(cut) == 150
    assert (records(dropped)[0]["event"], records(dropped)[0]["count"]) == ("log_dropped", 2)
    assert records(last)[0]["event"] == "last"


# ----- a standard error that nobody reads


@pytest.fixture(name="full_pipe")
def _full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe with no room in it: what a stopped reader leaves behind."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 65536)
    except BlockingIOError:
        os.set_blocking(writing, True)
    yield reading, writing
    for fd in (reading, writing):
        os.close(fd)


STARTED = GatewayStarted(
    epoch=1, previous_stop=None, resuming=0, quarantined=0, expired=0, waiting=0, undelivered=0
)


def test_p11_a_blocked_standard_error_blocks_nobody(full_pipe: tuple[int, int]) -> None:
    reading, writing = full_pipe
    began = time.monotonic()
    with logging_to_stderr(LogLevel.INFO, LogFormat.JSON, fd=writing) as log:
        for _ in range(QUEUE + 500):
            log.listener(STARTED)
        assert time.monotonic() - began < 15
        assert log.flush(0.05) is False
        # Once somebody reads again, everything that was kept is written, and the rest is counted.
        text: list[bytes] = []
        reader = threading.Thread(target=_read_until, args=(reading, b"last_words", text))
        reader.start()
        assert log.flush(20)
        log.say("info", "last_words")
        reader.join(20)
    told = records(b"".join(text).decode().lstrip("x"))
    drops = [one["count"] for one in told if one["event"] == "log_dropped"]
    kept = sum(one["event"] == "gateway_started" for one in told)
    assert drops
    assert kept + sum(drops) == QUEUE + 500


def _read_until(fd: int, end: bytes, into: list[bytes]) -> None:
    while not into or end not in into[-1]:
        into.append(os.read(fd, 1 << 20))


def test_the_end_waits_for_a_blocked_standard_error_only_so_long(
    full_pipe: tuple[int, int],
) -> None:
    began = time.monotonic()
    with logging_to_stderr(LogLevel.INFO, LogFormat.JSON, fd=full_pipe[1]) as log:
        log.listener(STARTED)
    assert 0.9 < time.monotonic() - began < 15


def test_a_standard_error_that_is_gone_is_not_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with logging_to_stderr(LogLevel.INFO, LogFormat.JSON, fd=writing) as log:
        log.listener(STARTED)
        assert log.flush(5)
        log.listener(STARTED)
        assert log.flush(5)
    os.close(writing)


def test_a_standard_error_that_does_not_block_is_waited_for(tmp_path: Path) -> None:
    """A shell can leave a non-blocking terminal or pipe behind."""
    program = (
        "import os\n"
        "from trio_gateway._config import LogFormat, LogLevel\n"
        "from trio_gateway._logs import logging_to_stderr\n"
        "os.set_blocking(2, False)\n"
        "with logging_to_stderr(LogLevel.INFO, LogFormat.AUTO) as log:\n"
        "    for n in range(5000): log.say('info', 'line', n=n)\n"
        "    assert log.flush(20)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, timeout=60, check=False
    )
    assert done.returncode == 0
    assert [one["n"] for one in records(done.stderr.decode())] == list(range(5000))
