"""The `console` channel: on a pseudo-terminal, whose screen is read back, and through pipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from test_jsonl import NotingIntake, delivery, serve

from trio_gateway._errors import ChannelEnded, StoreFull
from trio_gateway._messages import (
    Delivery,
    HistoryItem,
    Message,
    Receipt,
    ReceiptStatus,
    ReplyKind,
    SessionKey,
)
from trio_gateway.channels.console import ConsoleChannel

COLUMNS, ROWS = 60, 20


class Screen:
    """What a terminal shows of what was written to it: as much of one as the channel uses."""

    def __init__(self) -> None:
        self.rows = [""]
        self.x = self.y = 0
        self._kept = (0, 0)

    def feed(self, data: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b[78D]|[^\x1b]", data):
            self._obey(part)

    def _obey(self, part: str) -> None:
        if len(part) == 1:
            self._put(part)
        elif part == "\x1b7":
            self._kept = (self.x, self.y)
        elif part == "\x1b8":
            self.x, self.y = self._kept
        elif part == "\x1bD":
            self._down(1)
        else:
            self._sequence(int(re.sub(r"\D", "", part) or 1), part[-1])

    def _put(self, char: str) -> None:
        if char == "\r":
            self.x = 0
        elif char == "\n":
            self._down(1)
        else:
            row = self.rows[self.y].ljust(self.x)
            self.rows[self.y] = row[: self.x] + char + row[self.x + 1 :]
            self.x += 1

    def _down(self, rows: int) -> None:
        self.y += rows
        self.rows += [""] * (self.y + 1 - len(self.rows))

    def _sequence(self, number: int, letter: str) -> None:
        if letter == "A":
            self.y = max(0, self.y - number)
        elif letter == "B":
            self.y = min(len(self.rows) - 1, self.y + number)
        elif letter == "J":
            self.rows[self.y :] = [self.rows[self.y][: self.x]]
        else:
            assert letter == "m", f"unexpected sequence {letter}"

    @property
    def text(self) -> str:
        """All rows, without what is blank at their ends; the cursor as ▌."""
        rows = list(self.rows)
        row = rows[self.y].ljust(self.x)
        rows[self.y] = row[: self.x] + "▌" + row[self.x :]
        return "\n".join(row.rstrip() for row in rows).strip("\n")


class Person:
    """Somebody at a terminal."""

    def __init__(self, keyboard: int, channel: ConsoleChannel, intake: NotingIntake) -> None:
        self._keyboard = keyboard
        self.channel = channel
        self.intake = intake
        self.screen = Screen()

    async def types(self, text: str) -> None:
        os.write(self._keyboard, text.encode())
        await self.looks()

    async def sends(self, text: str) -> str:
        """Type a line; return the id that its message got."""
        before = len(self.intake.messages)
        await self.types(text + "\n")
        assert len(self.intake.messages) == before + 1, self.screen.text
        return self.intake.messages[-1].id

    async def looks(self) -> str:
        """What there is to see, once everything has been drawn."""
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked(0.02)
            self.screen.feed(_read(self._keyboard))
        return self.screen.text


def _read(fd: int) -> str:
    data = b""
    try:
        while some := os.read(fd, 65536):
            data += some
    except (BlockingIOError, OSError):
        return data.decode()
    return data.decode()


@contextmanager
def terminal() -> Generator[tuple[int, int]]:
    keyboard, screen = os.openpty()
    termios.tcsetwinsize(screen, (ROWS, COLUMNS))
    os.set_blocking(keyboard, False)
    try:
        yield keyboard, screen
    finally:
        os.close(keyboard)
        os.close(screen)


@asynccontextmanager
async def at_a_terminal(*history: HistoryItem, session: str = "ada") -> AsyncGenerator[Person]:
    """Somebody who talks to a channel that is being served."""
    with terminal() as (keyboard, screen):
        channel = ConsoleChannel(session, read_fd=screen, write_fd=screen, notes_fd=screen)
        person = Person(keyboard, channel, NotingIntake(history))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, channel, person.intake)
            await person.looks()
            yield person
            nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _terminal_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


def answer(text: str, *about: str, **fields: Any) -> Delivery:
    session = SessionKey("console", "ada")
    return delivery(text, **{"session": session, "in_reply_to": about} | fields)


# ----- on a terminal


async def test_a_conversation() -> None:
    async with at_a_terminal() as person:
        asked = await person.sends("how is the weather?")
        assert person.intake.messages[0].text == "how is the weather?"
        assert person.intake.messages[0].session == "ada"
        assert (await person.looks()).endswith("> how is the weather?\n> ▌\n⋯ working")
        person.channel.progress("ada", "looking outside")
        assert (await person.looks()).endswith("> how is the weather?\n> ▌\n⋯ looking outside")
        await person.channel.send(answer("It is **sunny**.\nAnd <warm>.", asked))
        assert (await person.looks()).endswith(
            "> how is the weather?\n\nIt is sunny.\nAnd <warm>.\n\n> ▌"
        )


async def test_ids_are_never_used_twice() -> None:
    async with at_a_terminal() as person:
        ids = [await person.sends("again") for _ in range(3)]
    async with at_a_terminal() as person:
        ids.append(await person.sends("again"))
    assert len(set(ids)) == 4


async def test_progress_streams_below_what_is_being_typed() -> None:
    async with at_a_terminal() as person:
        asked = await person.sends("go")
        await person.types("and th")
        for n in range(1, 30):
            person.channel.progress("ada", "word " * n * 3)
            await person.looks()
        shown = person.screen.text
        assert "> go\n> and th▌\n⋯ word" in shown
        assert shown.count("word") < 30 * 3, "only the end of a long progress is shown"
        await person.types("en")
        assert "> and then▌\n" in person.screen.text
        person.channel.progress("ada", "")
        assert (await person.looks()).endswith("> go\n> and then▌")
        await person.channel.send(answer("done", asked))
        assert (await person.looks()).endswith("\ndone\n\n> ▌")
        await person.types("\n")
        assert person.intake.messages[-1].text == "and then"
        assert "done\n\n> and then\n> ▌\n⋯ working" in person.screen.text


async def test_an_empty_line_is_no_message_and_leaves_no_trace() -> None:
    async with at_a_terminal() as person:
        before = person.screen.text
        await person.types("\n")
        await person.types("  \n")
        assert person.intake.messages == []
        assert person.screen.text == before


async def test_the_past_is_shown_at_the_start() -> None:
    at = datetime.now(UTC)
    past = [
        HistoryItem(role="user", text="what is a gateway?", at=at),
        HistoryItem(role="agent", text="A door.\nWith a memory.", at=at),
        HistoryItem(role="user", text="x" * 200, at=at),
    ]
    async with at_a_terminal(*past) as person:
        rows = person.screen.text.splitlines()
        assert rows[:2] == ["> what is a gateway?", "A door.…"]
        assert rows[2].endswith("x…")
        assert len(rows[2]) < COLUMNS
        assert rows[3].startswith("This is session ada.")
        assert rows[-1] == "> ▌"


async def test_what_is_not_accepted_is_told() -> None:
    async with at_a_terminal() as person:
        person.intake.error = StoreFull("the disk is full")
        await person.types("hello\n")
        assert person.screen.text.endswith(
            "> hello\nnot accepted, send it again: the disk is full\n> ▌"
        )


async def test_nobody_who_writes_a_text_commands_the_terminal() -> None:
    async with at_a_terminal() as person:
        asked = await person.sends("x")
        person.channel.progress("ada", "\x1b[2Jgone\x07")
        assert "⋯ ␛[2Jgone␇" in await person.looks()
        await person.channel.send(answer("\x1b]0;title\x07 \x9b2J text", asked))
        assert "␛]0;title␇ �2J text" in await person.looks()


async def test_notices_repeats_and_other_sessions_say_what_they_are() -> None:
    async with at_a_terminal() as person:
        asked = await person.sends("x")
        await person.channel.send(
            answer("I am restarting.", asked, kind=ReplyKind.NOTICE, final=False)
        )
        assert (await person.looks()).endswith("I am restarting.\n\n> ▌\n⋯ working")
        await person.channel.send(answer("again", asked, repeat=True))
        assert (await person.looks()).endswith("this may be a repeat:\nagain\n\n> ▌")
        other = SessionKey("console", "bob")
        await person.channel.send(answer("for bob", "m9", session=other))
        assert (await person.looks()).endswith("in session bob:\nfor bob\n\n> ▌")
        assert person.channel.notices


async def test_what_others_print_is_not_taken_away() -> None:
    async with at_a_terminal() as person:
        asked = await person.sends("x")
        person.channel.progress("ada", "busy")
        await person.looks()
        person.screen.feed("\r\x1b[Ja log line\r\nand another\r\n")
        await person.channel.send(answer("done", asked))
        assert (await person.looks()).endswith("a log line\nand another\n\ndone\n\n> ▌")


async def test_the_end_of_the_input_takes_the_prompt_away_and_answers_still_come() -> None:
    with terminal() as (keyboard, screen):
        channel = ConsoleChannel("ada", read_fd=screen, write_fd=screen, notes_fd=screen)
        person = Person(keyboard, channel, NotingIntake())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, channel, person.intake)
            await person.looks()
            asked = await person.sends("x")
            await person.types("\x04")
        await channel.send(answer("done", asked))
        assert (await person.looks()).endswith("> x\n\ndone\n\n▌")


async def test_a_terminal_that_goes_away_ends_the_channel() -> None:
    keyboard, screen = os.openpty()
    channel = ConsoleChannel("ada", read_fd=screen, write_fd=screen, notes_fd=screen)
    try:
        os.close(keyboard)
        with trio.fail_after(2), pytest.raises(ChannelEnded):
            await serve_bare(channel)
    finally:
        os.close(screen)


async def serve_bare(channel: ConsoleChannel) -> None:
    await channel.serve(NotingIntake(), task_status=trio.TASK_STATUS_IGNORED)


async def test_a_dumb_terminal_is_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    async with at_a_terminal() as person:
        asked = await person.sends("x")
        await person.channel.send(answer("*plain*", asked))
        assert (await person.looks()).splitlines() == ["x", "*plain*", "▌"]


# ----- through pipes


def run(where: Path, given: bytes, agent: str = "return turn.text") -> tuple[int, bytes, bytes]:
    """A whole process: exit code, standard output, standard error."""
    source = where / "bot.py"
    source.write_text(f"async def agent(turn):\n    {agent}\n")
    done = subprocess.run(
        [sys.executable, "-m", "trio_gateway", "run", f"{source}:agent"],
        input=given,
        capture_output=True,
        timeout=30,
        cwd=where,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_hello_is_answered_and_nothing_else_is_said(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, b"hello\n")
    assert (code, out) == (0, b"hello\n")
    assert b"Traceback" not in err


def test_each_line_is_a_message_and_empty_ones_are_none(tmp_path: Path) -> None:
    given = "a\n\n  \nß\r\n**c**".encode()
    assert run(tmp_path, given)[:2] == (0, "a\nß\n**c**\n".encode())


def test_p14_a_line_that_is_not_text_costs_one_note(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, b"a\n\xff\nb\n")
    assert (code, out) == (0, b"a\nb\n")
    assert b"trio-gateway: line 2 is not UTF-8 text" in err


def test_a_pipe_waits_for_room_instead_of_losing_lines(tmp_path: Path) -> None:
    lines = b"".join(b"%d\n" % n for n in range(300))
    code, out, _ = run(tmp_path, lines)
    assert (code, out) == (0, lines)


def test_a_reader_that_leaves_early_is_a_stop_not_a_traceback(tmp_path: Path) -> None:
    source = tmp_path / "bot.py"
    source.write_text("async def agent(turn):\n    return turn.text\n")
    command = f"yes | {sys.executable} -m trio_gateway run {source}:agent | head -n 3"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        timeout=30,
        cwd=tmp_path,
        check=False,
    )
    assert done.stdout == b"y\ny\ny\n"
    assert b"Traceback" not in done.stderr


async def test_through_pipes_notes_go_to_standard_error() -> None:
    (read_in, write_in), (read_out, write_out), (read_err, write_err) = (
        os.pipe(),
        os.pipe(),
        os.pipe(),
    )
    channel = ConsoleChannel("ada", read_fd=read_in, write_fd=write_out, notes_fd=write_err)
    assert not channel.notices
    channel.progress("ada", "not shown")
    await channel.send(answer("a\n", "m1", repeat=True))
    await channel.send(answer("news", kind=ReplyKind.NOTICE, final=False))
    assert os.read(read_out, 100) == b"a\n"
    assert os.read(read_err, 1000) == (b"trio-gateway: this may be a repeat:\ntrio-gateway: news\n")
    for fd in (read_in, write_in, read_out, write_out, read_err, write_err):
        os.close(fd)


class FullIntake(NotingIntake):
    """Has no room until somebody makes some."""

    room = False

    async def accept(self, *messages: Message, cursor: str | None = None) -> tuple[Receipt, ...]:
        if self.room:
            return await super().accept(*messages, cursor=cursor)
        await trio.lowlevel.checkpoint()
        return tuple(
            Receipt(
                status=ReceiptStatus.REFUSED,
                session=message.key,
                id=message.id,
                reason="full",
                retryable=True,
            )
            for message in messages
        )


async def test_a_refused_line_of_a_pipe_is_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    intake = FullIntake()
    channel = ConsoleChannel("ada", read_fd=read_in, write_fd=write_out, notes_fd=write_out)
    os.write(write_in, b"hello\n")
    os.close(write_in)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, channel, intake)
        await trio.sleep(2.5)
        intake.room = True
    assert [message.text for message in intake.messages] == ["hello"]
    for fd in (read_in, read_out, write_out):
        os.close(fd)
