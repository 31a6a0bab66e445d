"""`trio-gateway top`: look after look at a running gateway, until somebody has seen enough.

A gateway that goes away is waited for: so a restart is watched from one process to the next.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import _operating_views as views
from ._control import ControlError, NoGateway
from ._control_client import Control, connected
from ._views import Listing, Screen, color

ROWS: Final = 100
"""Rows of the inbox and of the outbox that are asked for; the screen shows what fits."""

HEAD_ROWS: Final = 7
"""Rows of the head, and of the foot."""

LEAST: Final = 2
"""Rows of a table at the least, however small the terminal is."""

LEAVE: Final = frozenset(b"qQ\x03\x04")
"""What leaves: q, and Ctrl-C and Ctrl-D where they arrive as characters."""

Told = Mapping[str, Any]


def watch(store: Path, every: float, screen: Screen) -> int:
    """Look until q or Ctrl-C; once, where this is no terminal. Raises `NoGateway` at first."""
    with connected(store) as control:
        told: Told = control.ask("overview", rows=ROWS)
    if not (screen.terminal and sys.stdin.isatty()):
        Console(file=screen.out).print(frame(told, None))
        return 0
    console = Console(file=screen.out)
    live = Live(console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), _keys() as keyboard, live:
        _look_again(store, every, keyboard, live, told)
    return 0


def _look_again(store: Path, every: float, keyboard: int, live: Live, told: Told) -> None:
    while True:
        live.update(frame(told, live.console.size.height), refresh=True)
        if _wants_to_leave(keyboard, every):
            return
        told = _next(store, told)


def _next(store: Path, told: Told) -> Told:
    """The next look; of a gateway that is not there the last one, and that it is gone."""
    try:
        with connected(store) as control:
            return _overview(control)
    except NoGateway:
        return {**told, "gone": "no gateway runs; waiting for the next"}
    except ControlError as error:
        return {**told, "gone": str(error)}


def _overview(control: Control) -> Told:
    return control.ask("overview", rows=ROWS)


# ----- the keyboard


@contextmanager
def _keys() -> Generator[int]:
    """Standard input, with every key told at once and none shown."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _wants_to_leave(fd: int, seconds: float) -> bool:
    ready, _, _ = select.select([fd], [], [], seconds)
    if not ready:
        return False
    keys = os.read(fd, 1024)
    return not keys or bool(LEAVE & set(keys))


# ----- the picture


def frame(told: Told, height: int | None) -> RenderableType:
    """One look, in at most `height` rows; None: as many as it takes."""
    tables = (
        ("turns", views.turns(told["turns"])),
        ("inbox", views.inbox(told["inbox"])),
        ("outbox", views.outbox(told["outbox"])),
    )
    sizes = _sizes([len(listing.rows) for _, listing in tables], height)
    parts = [
        _table(name, listing, size) for (name, listing), size in zip(tables, sizes, strict=True)
    ]
    foot = [] if height is None else [Text("q leaves", style="dim")]
    return Group(_head(told), *parts, *foot)


def _sizes(wanted: list[int], height: int | None) -> list[int]:
    """How many rows each table gets: what it wants, or its share of what there is."""
    if height is None:
        return wanted
    room = height - HEAD_ROWS - 3 * len(wanted)
    sizes = [min(rows, LEAST) for rows in wanted]
    for n, rows in enumerate(wanted):
        share = max(0, room - sum(sizes))
        sizes[n] += min(rows - sizes[n], share)
    return sizes


def _head(told: Told) -> RenderableType:
    line = Text()
    line.append(f"process {told['pid']}", style="bold")
    line.append(f"  {told['version']}  up {views.span(told['up_for'])}  epoch {told['epoch']}")
    state = Text(views.state_line(told), style=_state_style(told))
    stored = told["stored"]
    counts = Text(
        f"turns {stored['running']} running, {stored['resume_pending']} to resume"
        f"  messages {stored['waiting']} waiting  replies {stored['undelivered']} on their way"
        f"  aside {stored['quarantined']}+{stored['dead_letters']}"
    )
    lines: list[RenderableType] = [line, state, counts]
    if "gone" in told:
        lines[1] = Text(str(told["gone"]), style="bold red")
    for one in (*lines, state):
        if isinstance(one, Text):
            one.no_wrap, one.overflow = True, "ellipsis"
    return Panel(Group(*lines), title="trio-gateway", title_align="left", box=box.ROUNDED)


def _state_style(told: Told) -> str:
    if told["stop"] is not None:
        return "yellow"
    return "magenta" if told["paused"] else "green"


def _table(name: str, listing: Listing, size: int) -> RenderableType:
    more = len(listing.rows) - size
    rest = f" (and {more} more)" if more > 0 else ""
    title = Text(f"{name}{rest}", style="bold")
    if not listing.rows:
        return Group(title, Text(f"  {listing.empty}", style="dim"), Text())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for column in listing.columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for row in listing.rows[:size]:
        table.add_row(*(Text(cell, style=color(cell)) for cell in row))
    return Group(title, table, Text())
