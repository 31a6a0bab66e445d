"""`console`: a person at a terminal, or a pipe in a shell.

On a terminal: a prompt, the end of the conversation so far, what the agent is doing while it does
it, answers rendered as Markdown. The keyboard is read in the terminal's own line mode: what one
can edit is a line, and it is sent with Enter.

Through pipes: one message per line in, answers out, and nothing else on standard output.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Final

import trio

from .._errors import GatewayError
from .._messages import Delivery, HistoryItem, Intake, Message, Receipt, ReplyKind
from . import Channel
from ._face import Face, remarks, visible
from ._fds import FdWriter, Line, LineReader, serve_lines

HISTORY: Final = 10
"""Lines of the conversation that are shown at the start."""

ROOM_AFTER: Final = 20
"""A pipe whose message found no room tries again after so many answers, or after a second."""


class ConsoleChannel(Channel):
    """One conversation over standard input and output. `session` names it."""

    name = "console"
    idempotent = False
    shows_work = True

    def __init__(
        self, session: str = "console", *, read_fd: int = 0, write_fd: int = 1, notes_fd: int = 2
    ) -> None:
        self._session = session
        self._reader = LineReader(read_fd)
        self._writer = FdWriter(write_fd)
        self.interactive: bool = _is_terminal(read_fd, write_fd)
        """Whether a person sits there."""
        self.notices: bool = self.interactive
        self._face = self._make_face(write_fd, notes_fd)
        self._answers = 0
        self._room = trio.Event()

    def _make_face(self, write_fd: int, notes_fd: int) -> Face:
        if self.interactive:
            from ._terminal import Terminal

            return Terminal(self._writer, write_fd, self._session)
        return _Plain(self._writer, FdWriter(notes_fd, "standard error"), self._session)

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """Take lines until the input ends. Raises `ChannelEnded` when the output is closed."""
        await self._face.greet(await intake.history(self._session, HISTORY))
        task_status.started()

        async def take(lines: tuple[Line, ...]) -> None:
            for line in lines:
                await self._take(line, intake)

        try:
            await serve_lines(self._reader, self._writer, take)
            await self._face.end_of_input()
        finally:
            self._face.leave()

    async def send(self, delivery: Delivery) -> None:
        """Show one text. Raises `ChannelEnded` when the output is closed."""
        await self._face.show(delivery)
        self._answers += delivery.final
        if self._answers % ROOM_AFTER == 0:
            self._room.set()

    def progress(self, session: str, text: str) -> None:
        """Show what the turn is doing, on a terminal."""
        if session == self._session:
            self._face.progress(text)

    async def _take(self, line: Line, intake: Intake) -> None:
        text, error = _read(line)
        await self._face.heard(text)
        if error:
            intake.refused_input(f"line {line.number}", error)
            await self._face.complain(error)
        elif text.strip():
            await self._hand_in(text, intake)

    async def _hand_in(self, text: str, intake: Intake) -> None:
        message = Message(session=self._session, id=uuid.uuid4().hex, text=text, channel=self.name)
        self._face.wait_for(message.id)
        try:
            receipt = await self._accept(message, intake)
        except GatewayError as error:
            await self._refused(message, f"not accepted, send it again: {error}")
        else:
            if not receipt.accepted:
                await self._refused(message, _why(receipt))

    async def _accept(self, message: Message, intake: Intake) -> Receipt:
        while True:
            self._room = trio.Event()
            (receipt,) = await intake.accept(message)
            if receipt.accepted or self.interactive or not receipt.retryable:
                return receipt
            # A pipe can wait, and nobody would send the line again.
            with trio.move_on_after(1.0):
                await self._room.wait()

    async def _refused(self, message: Message, why: str) -> None:
        self._face.wait_no_more((message.id,))
        await self._face.complain(why)


# ----- through pipes


class _Plain:
    """Answers on standard output, and nothing else there."""

    def __init__(self, out: FdWriter, notes: FdWriter, session: str) -> None:
        self._out = out
        self._notes = notes
        self._session = session

    async def greet(self, history: Sequence[HistoryItem]) -> None:
        await trio.lowlevel.checkpoint()

    async def heard(self, text: str) -> None:
        await trio.lowlevel.checkpoint()

    async def show(self, delivery: Delivery) -> None:
        for remark in remarks(delivery, self._session):
            self._note(remark)
        if delivery.kind is ReplyKind.NOTICE:
            self._note(delivery.text)
            return
        end = "" if delivery.text.endswith("\n") else "\n"
        await self._out.write((delivery.text + end).encode(errors="replace"))

    async def complain(self, error: str) -> None:
        await trio.lowlevel.checkpoint()
        self._note(error)

    async def end_of_input(self) -> None:
        await trio.lowlevel.checkpoint()

    def progress(self, text: str) -> None:
        """Not shown: there is one stream, and it is for answers."""

    def wait_for(self, message: str) -> None:
        """Nothing shows that somebody waits."""

    def wait_no_more(self, messages: Sequence[str]) -> None:
        """Nothing shows that somebody waits."""

    def leave(self) -> None:
        """Nothing is left on the screen."""

    def _note(self, text: str) -> None:
        line = f"trio-gateway: {visible(text)}\n"
        self._notes.write_nowait(line.encode(errors="replace"))


# ----- a line


def _read(line: Line) -> tuple[str, str]:
    """The text of a line, or what is wrong with it."""
    if line.data is None:
        return "", f"line {line.number} is too long: {line.size} bytes"
    try:
        return line.data.decode().removesuffix("\r"), ""
    except UnicodeDecodeError:
        return "", f"line {line.number} is not UTF-8 text"


def _why(receipt: Receipt) -> str:
    return f"not accepted: {receipt.reason or 'refused'}"


def _is_terminal(*fds: int) -> bool:
    # Terminals that know no escape sequence are treated as pipes.
    return all(map(os.isatty, fds)) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
