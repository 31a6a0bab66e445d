"""A person's terminal: prompt, progress, answers rendered as Markdown.

Imported only where there is one: rich takes its time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.text import Text

from .._messages import Delivery, HistoryItem, ReplyKind
from ._face import remarks, visible
from ._fds import FdWriter

PROMPT: Final = "> "
STATUS_ROWS: Final = 8
"""Rows of progress that are shown at the most: the end of it."""

_WORKING: Final = "working"
_PADDING: Final = re.compile(r" +(?=\n)")

_CLEAR: Final = "\r\x1b[J"
"""Clears the row with the cursor, and all below it."""


class Terminal:
    """A conversation that scrolls, above a region at the bottom that is drawn again and again.

        > how is the weather?                 the past: printed once

        It is *sunny*.

        > _                                   the region: the prompt with the cursor,
        ⋯ looking at the thermometer          and below it what the agent is doing

    The cursor is always in the region's first row, so clearing it never takes a row of what
    somebody else (a log, an agent that prints) wrote in between. Whatever is printed goes above:
    clear the region, print, draw the region again. What is being typed just then goes out of
    sight, but not out of the terminal: Enter still sends it.
    """

    def __init__(self, writer: FdWriter, fd: int, session: str) -> None:
        self._writer = writer
        self._fd = fd
        self._session = session
        self._paint = _Paint()
        self._waiting: set[str] = set()
        self._status = ""
        self._rows = 0
        self._prompting = False
        self._greeted = False

    async def greet(self, history: Sequence[HistoryItem]) -> None:
        self._prompting = True
        await self._print("" if self._greeted else self._greeting(history))
        self._greeted = True

    def _greeting(self, history: Sequence[HistoryItem]) -> str:
        lines = [_memory(item, self._columns()) for item in history]
        lines += [
            f"This is session {visible(self._session)}. Ctrl-D: finish and leave. Ctrl-C: stop;"
            " what is unfinished goes on next time.",
        ]
        return self._paint.dim("\n".join(lines), self._columns()) + "\n"

    async def heard(self, text: str) -> None:
        # Enter has moved the cursor below what was typed: that has become the past by itself.
        # Written once more it is whole, also where an answer came in between; nothing typed
        # leaves nothing.
        typed = f"{self._prompt()}{visible(text)}\n" if text.strip() else ""
        one_row = len(PROMPT) + cell_len(text) < self._columns()
        await self._print(f"\x1b[1A{_CLEAR}{typed}" if self._prompting and one_row else "")

    async def show(self, delivery: Delivery) -> None:
        if delivery.final:
            self.wait_no_more(delivery.in_reply_to)
        if delivery.kind is not ReplyKind.NOTICE and delivery.session.name == self._session:
            self._status = ""
        columns = self._columns()
        about = [self._paint.dim(one, columns) for one in remarks(delivery, self._session)]
        await self._print("".join(["\n", *about, self._paint.delivery(delivery, columns), "\n"]))

    async def complain(self, error: str) -> None:
        await self._print(self._paint.error(visible(error), self._columns()))

    async def end_of_input(self) -> None:
        self._prompting = False
        await self._print("")

    def progress(self, text: str) -> None:
        if not text:
            self._waiting.clear()  # the turn has ended; it may have nothing to say
        self._show_status(text)

    def _show_status(self, text: str) -> None:
        self._status = text
        rows = self._status_rows()
        if (rows or self._rows) and self._writer.write_nowait(_below(rows).encode()):
            self._rows = len(rows)

    def wait_for(self, message: str) -> None:
        self._waiting.add(message)
        self._show_status(self._status)

    def wait_no_more(self, messages: Sequence[str]) -> None:
        self._waiting.difference_update(messages)

    def leave(self) -> None:
        self._prompting = False
        self._status = ""
        self._waiting.clear()
        self._writer.write_nowait(_CLEAR.encode())

    async def _print(self, text: str) -> None:
        """Put `text` above the region."""
        rows = self._status_rows()
        self._rows = len(rows)
        back = f"\x1b[{len(rows)}A" if rows else ""
        region = "\n".join(["", *rows]) + back + "\r" + self._prompt()
        await self._writer.write((_CLEAR + text + region).encode(errors="replace"))

    def _status_rows(self) -> tuple[str, ...]:
        text = self._status or (_WORKING if self._waiting else "")
        return self._paint.status(visible(text), self._columns()) if text else ()

    def _prompt(self) -> str:
        return self._paint.prompt(PROMPT) if self._prompting else ""

    def _columns(self) -> int:
        try:
            return max(os.get_terminal_size(self._fd).columns, 20)
        except OSError:
            return 80


class _Paint:
    """Text as rich shows it, as escape sequences."""

    def __init__(self) -> None:
        self._console = Console(force_terminal=True, highlight=False, markup=False, emoji=False)
        # HTML is text here: rich would leave it out.
        self._markdown = MarkdownIt("commonmark", {"html": False}).enable(
            ["table", "strikethrough"]
        )

    def delivery(self, delivery: Delivery, columns: int) -> str:
        text = visible(delivery.text)
        if delivery.kind in (ReplyKind.ANSWER, ReplyKind.SAY):
            return self._render(self._as_markdown(text), columns)
        style = {ReplyKind.NOTICE: "dim italic", ReplyKind.APOLOGY: "yellow"}
        return self._text(text, style.get(delivery.kind, ""), columns) + "\n"

    def _as_markdown(self, text: str) -> RenderableType:
        markdown = Markdown("", hyperlinks=False)
        markdown.parsed = self._markdown.parse(text)
        for token in markdown.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"  # in a chat, a new line is meant as one
        return markdown

    def dim(self, text: str, columns: int) -> str:
        return self._text(text, "dim", columns) + "\n"

    def error(self, text: str, columns: int) -> str:
        return self._text(text, "red", columns) + "\n"

    def prompt(self, text: str) -> str:
        return self._text(text, "bold cyan", 80)

    def status(self, text: str, columns: int) -> tuple[str, ...]:
        """The last rows of `text`, each less than a terminal's row."""
        lines = Text(text.expandtabs()).wrap(self._console, columns - 4)[-STATUS_ROWS:]
        marked = [("⋯ " if n == 0 else "  ") + line.plain for n, line in enumerate(lines)]
        return tuple(self._text(line, "dim", columns) for line in marked)

    def _text(self, text: str, style: str, columns: int) -> str:
        return self._render(Text(text, style), columns)

    def _render(self, what: RenderableType, columns: int) -> str:
        self._console.width = columns
        with self._console.capture() as capture:
            self._console.print(what, end="")
        return _PADDING.sub("", capture.get())


def _below(rows: Sequence[str]) -> str:
    """Draw `rows` below the cursor's, in place of what is there, and leave the cursor alone."""
    # Make room first: at the bottom of the screen that scrolls, and a saved position does not.
    room = "\x1bD" * len(rows) + (f"\x1b[{len(rows)}A" if rows else "")
    lines = "\n".join(rows)
    return f"{room}\x1b7\x1b[1B{_CLEAR}{lines}\x1b8"


def _memory(item: HistoryItem, columns: int) -> str:
    """One line of the past."""
    first, *more = visible(item.text).strip().splitlines() or [""]
    text = ("" if item.role == "agent" else PROMPT) + first
    return text[: columns - 2] + "…" if more or len(text) >= columns else text
