"""How the command line shows things: a table for people, one JSON document for programs.

On a terminal, rich draws; into a pipe or a file go plain aligned columns, one row a line, never
wrapped and without colours. Whatever somebody wrote into a message is escaped before it is shown.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

import attrs

from ._config import Config
from ._errors import GatewayError, escape
from ._jsonable import jsonable
from ._messages import HistoryItem, SessionKey
from .store import (
    DeadLetter,
    MessageRow,
    OpenTurnRow,
    QuarantineRow,
    SessionRow,
    Timeline,
    TimelineEntry,
)

if TYPE_CHECKING:
    from ._allowance import Finding

SHORT: Final = 60
"""Characters of a text in a list; `--json` has all of it."""

_COLORS: Final = {
    "ok": "green",
    "answered": "green",
    "COMPLETED": "green",
    "delivered": "green",
    "RUNNING": "cyan",
    "RESUME_PENDING": "yellow",
    "queued": "yellow",
    "warn": "yellow",
    "stopped": "yellow",
    "fail": "red",
    "failed": "red",
    "FAILED": "red",
    "quarantined": "red",
    "QUARANTINED": "red",
    "expired": "red",
    "dead": "red",
}


@attrs.frozen(kw_only=True)
class Listing:
    """A table: every cell is a text on one line. `empty` is said where there are no rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    empty: str
    title: str = ""


# ----- the screen


class Screen:
    """Standard output, as a person or a program reads it."""

    def __init__(self, out: TextIO | None = None) -> None:
        stream = out or cast("TextIO | None", sys.stdout)
        if stream is None:
            raise GatewayError("standard output is closed: there is nowhere to answer to")
        self.out = stream
        self.terminal = stream.isatty()

    def json(self, value: object) -> None:
        """One JSON document, in ASCII: every terminal and every locale can take it."""
        self.line(json.dumps(jsonable(value), indent=2))

    def line(self, text: str = "") -> None:
        """One line, as it is."""
        encoding = self.out.encoding or "utf-8"
        self.out.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self.out.flush()

    def listing(self, listing: Listing) -> None:
        """A table, or what is said where there is nothing to list."""
        if listing.title:
            self.line(listing.title)
        if not listing.rows:
            self.line(listing.empty)
        elif self.terminal:
            self._draw(listing)
        else:
            for line in plain(listing):
                self.line(line)

    def _draw(self, listing: Listing) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column in listing.columns:
            table.add_column(column, overflow="fold")
        for row in listing.rows:
            table.add_row(*(Text(cell, style=color(cell)) for cell in row))
        Console(file=self.out).print(table)


def color(cell: str) -> str:
    """The style of a cell, by the word that it ends with."""
    return next((_COLORS[word] for word in reversed(cell.split(" ")) if word in _COLORS), "")


def plain(listing: Listing) -> list[str]:
    """The table as aligned columns, two spaces between them."""
    from rich.cells import cell_len

    rows = [tuple(column.upper() for column in listing.columns), *listing.rows]
    widths = [max(cell_len(row[n]) for row in rows) for n in range(len(listing.columns))]
    return [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


# ----- values


def moment(at: datetime | None, *, exact: bool = False) -> str:
    """A time as people here read it: local, with milliseconds if `exact`; `-` for none."""
    if at is None:
        return "-"
    try:
        local = at.astimezone()
    except (OverflowError, ValueError, OSError):
        local = at  # the year 1 or 9999, out of a damaged row
    if exact:
        return f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d}"
    return f"{local:%Y-%m-%d %H:%M:%S}"


def short(text: str | None, length: int = SHORT) -> str:
    """A text for a cell: on one line, and not too long."""
    if text is None:
        return "-"
    told = escape(text[: length + 1])
    return told if len(told) <= length else f"{told[: length - 1]}…"


def cell(value: object) -> str:
    """Anything for a cell; `-` for what is not there."""
    return "-" if value is None else escape(str(value))


# ----- the listings


def sessions(rows: Sequence[SessionRow]) -> Listing:
    """Sessions, the newest message first."""
    return Listing(
        columns=("session", "state", "turn", "attempt", "waiting", "last message"),
        rows=tuple(
            (
                cell(row.session),
                _state(row.state, row.reason),
                cell(row.turn),
                cell(row.attempt),
                cell(row.waiting),
                moment(row.last_message_at),
            )
            for row in rows
        ),
        empty="no sessions yet",
    )


def _state(state: str, reason: str | None) -> str:
    return escape(f"{state} ({reason})" if reason else state)


def messages(rows: Sequence[MessageRow]) -> Listing:
    """Messages and what became of them, oldest first."""
    return Listing(
        columns=("accepted", "message", "state", "turn", "text", "error"),
        rows=tuple(
            (
                moment(row.accepted_at),
                cell(row.id),
                cell(row.state),
                cell(row.turn),
                short(row.text),
                short(row.error),
            )
            for row in rows
        ),
        empty="no messages",
    )


def session_heading(
    session: SessionKey, turn: OpenTurnRow | None, rows: Sequence[MessageRow]
) -> str:
    """One line about a session."""
    waiting = sum(row.state == "queued" for row in rows)
    if turn is None:
        return f"{cell(session)}: idle, {waiting} messages waiting"
    state = _state(turn.state, turn.reason)
    return (
        f"{cell(session)}: turn {turn.turn} {state}, attempt {turn.attempt},"
        f" {waiting} messages waiting"
    )


def conversation(items: Sequence[HistoryItem]) -> Listing:
    """What was said, oldest first."""
    return Listing(
        columns=("at", "who", "text"),
        rows=tuple((moment(item.at), item.role, short(item.text)) for item in items),
        empty="nothing was said yet",
    )


def timeline(told: Timeline) -> Listing:
    """The life of one message."""
    message = told.message
    about = f"message {cell(message.id)} of {cell(message.session)}: {cell(message.state)}"
    return Listing(
        title=f"{about}\n{short(message.text)}",
        columns=("at", "what", "detail"),
        rows=tuple(_timeline_row(entry) for entry in told.entries),
        empty="nothing is known about it",
    )


def _timeline_row(entry: TimelineEntry) -> tuple[str, str, str]:
    return (moment(entry.at, exact=True), escape(entry.what), escape(entry.detail))


def quarantine(rows: Sequence[QuarantineRow]) -> Listing:
    """Turns that were put aside."""
    return Listing(
        columns=("turn", "session", "messages", "attempts", "crashes", "stops", "since", "why"),
        rows=tuple(
            (
                cell(row.turn),
                cell(row.session),
                cell(", ".join(message.id for message in row.messages)),
                cell(row.attempts),
                cell(row.crashes),
                cell(row.interruptions),
                moment(row.quarantined_at),
                short(row.why),
            )
            for row in rows
        ),
        empty="nothing is in quarantine",
    )


def dead_letters(rows: Sequence[DeadLetter]) -> Listing:
    """Deliveries that were given up."""
    return Listing(
        columns=("delivery", "session", "key", "tries", "since", "text", "error"),
        rows=tuple(
            (
                cell(row.delivery),
                cell(row.session),
                cell(row.key),
                cell(row.tries),
                moment(row.created_at),
                short(row.text),
                short(row.error),
            )
            for row in rows
        ),
        empty="there are no dead letters",
    )


def facts(about: Iterable[tuple[str, object]]) -> list[str]:
    """Name and value, one a line, aligned; a text keeps its length."""
    told = [(name, moment(v) if isinstance(v, datetime) else cell(v)) for name, v in about]
    width = max((len(name) for name, _ in told), default=0)
    return [f"{name:{width}}  {value}" for name, value in told]


def findings(found: Sequence[Finding]) -> Listing:
    """What the doctor found."""
    return Listing(
        columns=("", "check", "found"),
        rows=tuple((str(one.status), one.check, escape(one.found)) for one in found),
        empty="nothing was checked",
    )


# ----- the configuration


def config_as_toml(config: Config) -> list[str]:
    """Every effective value as `gateway.toml` would say it, and where it came from."""
    shown = config.shown()
    told = [f"{one.key.rpartition('.')[2]} = {_toml(one.value)}" for one in shown]
    width = max(len(text) for text in told)
    lines: list[str] = []
    section = ""
    for one, text in zip(shown, told, strict=True):
        if section != (section := one.key.rpartition(".")[0]):
            lines += ["", f"[{section}]"]
        lines.append(f"{text:{width}}  # {escape(one.origin)}")
    return [*lines[1:], *(f"# warning: {warning}" for warning in config.warnings())]


def _toml(value: object) -> str:
    """A value as TOML writes it: as JSON does, but for what stands in no sixteen bits, and for the
    one control character that JSON leaves as it is."""
    return _PAIR.sub(_joined, json.dumps(value)).replace("\x7f", "\\u007f")


_PAIR: Final = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")


def _joined(pair: re.Match[str]) -> str:
    both = bytes.fromhex(pair[1] + pair[2]).decode("utf-16-be")
    return f"\\U{ord(both):08x}"


def config_as_json(config: Config) -> dict[str, Any]:
    """The same for programs."""
    return {
        "file": None if config.file is None else str(config.file),
        "values": {one.key: {"value": one.value, "from": one.origin} for one in config.shown()},
        "warnings": list(config.warnings()),
    }
