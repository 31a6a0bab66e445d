"""`trio-gateway top`: what one look shows, and a person who watches in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
from processes import GatewayProcess, launch
from rich.console import Console

from trio_gateway._top import LEAST, _sizes, frame

PATIENCE = 20.0
ROWS, COLUMNS = 30, 100

AGENT = """
import trio
async def think():
    await trio.sleep(60)
async def agent(turn):
    turn.progress("begun")
    await turn.step(think)
"""


# ----- one look


def turn(n: int) -> dict[str, Any]:
    return {
        "turn": n, "session": f"chat:s{n}", "attempt": 1, "marker": "RUNNING", "reason": None,
        "begun_at": "2026-01-01T00:00:00Z", "running_for": 61.5, "step": None,
    }  # fmt: skip


def overview(turns: int = 0, **more: Any) -> dict[str, Any]:
    stored = dict.fromkeys(
        ("running", "resume_pending", "waiting", "undelivered", "quarantined", "dead_letters"), 0
    )
    return {
        "pid": 42, "version": "1.2.3", "up_for": 3700, "epoch": 7, "state": "serving",
        "stop": None, "paused": False, "paused_by": None, "stored": stored,
        "turns": [turn(n) for n in range(turns)], "inbox": [], "outbox": [], **more,
    }  # fmt: skip


def drawn(told: Mapping[str, Any], height: int | None = None, width: int = COLUMNS) -> str:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(told, height))
    return capture.get()


def test_a_look_shows_the_process_and_its_turns() -> None:
    told = drawn(overview(2))
    assert "process 42  1.2.3  up 1h 1m  epoch 7" in told
    assert re.search(r"^1 +chat:s1 +1 +1m 1s +RUNNING +-", told, re.M)
    assert "no message waits" in told
    assert "no reply is on its way" in told


def test_a_pause_and_a_stop_are_told_in_the_head() -> None:
    assert "serving, paused by ada" in drawn(overview(paused=True, paused_by="ada"))
    stop = {
        "reason": "restart", "by": "SIGUSR1", "marked": 5, "settled": 3, "interrupted": 1,
        "left": 12.7,
    }  # fmt: skip
    told = drawn(overview(state="draining", stop=stop))
    assert "draining (restart): 5 turns marked, 3 settled, 1 to resume; at most 12s left" in told
    assert "no gateway runs" in drawn(overview(gone="no gateway runs; waiting for the next"))


@pytest.mark.parametrize("height", [20, 24, 50])
def test_a_look_fits_into_the_terminal(height: int) -> None:
    told = drawn(overview(500), height)
    assert len(told.splitlines()) <= height
    assert re.search(r"turns \(and \d+ more\)", told)


@pytest.mark.parametrize("width", [20, 60, 200])
def test_no_line_is_longer_than_the_terminal_is_wide(width: int) -> None:
    assert max(map(len, drawn(overview(5), 30, width).splitlines())) <= width


def test_every_table_gets_something() -> None:
    assert _sizes([500, 500, 500], 10) == [LEAST] * 3
    assert _sizes([1, 2, 3], None) == [1, 2, 3]
    assert sum(_sizes([500, 3, 0], 40)) <= 40


def test_p14_what_somebody_wrote_is_obeyed_by_no_terminal() -> None:
    evil = {**turn(1), "session": "chat:\x1b[31m[bold]x", "step": "a\nb\x07"}
    told = drawn(overview(turns=0) | {"turns": [evil]})
    assert "\x1b" not in told
    assert "\x07" not in told
    assert "[bold]x" in told


# ----- a person who watches


class Terminal:
    """`trio-gateway top` in a terminal of its own."""

    def __init__(self, store: Path) -> None:
        self._keyboard, screen = pty.openpty()
        termios.tcsetwinsize(screen, (ROWS, COLUMNS))
        self.before = termios.tcgetattr(screen)
        self._screen = screen
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trio_gateway", "top", "--every", "0.1", "--store", str(store)],
            stdin=screen, stdout=screen, stderr=screen, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color"},
            # Its own terminal, so that Ctrl-C there is a signal here.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._seen = ""

    def sees(self, text: str) -> None:
        """Wait until `text` is drawn, in what is drawn from now on."""
        self._seen = ""
        deadline = time.monotonic() + PATIENCE
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen[-3000:]
            if select.select([self._keyboard], [], [], 0.1)[0]:
                self._seen += os.read(self._keyboard, 65536).decode(errors="replace")

    def types(self, keys: bytes) -> int:
        """Type something that ends it; its exit code."""
        os.write(self._keyboard, keys)
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self._keyboard], [], [], 0.05)[0]:
                self._seen += os.read(self._keyboard, 65536).decode(errors="replace")
        return self.process.wait()

    def is_as_before(self) -> bool:
        """Whether the terminal is what it was."""
        return termios.tcgetattr(self._screen) == self.before

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self._keyboard)
        os.close(self._screen)


@contextmanager
def watching(where: Path) -> Generator[tuple[GatewayProcess, Terminal]]:
    with launch(where, AGENT, grace=60, budget=90) as gateway:
        gateway.send("ada", "m1", "hi")
        gateway.expect("progress")
        terminal = Terminal(where / "gateway.db")
        try:
            terminal.sees("jsonl:ada")
            yield gateway, terminal
        finally:
            terminal.close()


@pytest.mark.parametrize("key", [b"q", b"Q", b"\x03", b"\x04"])
def test_it_is_left_by_a_key_and_leaves_the_terminal_as_it_was(
    memory_path: Path, key: bytes
) -> None:
    with watching(memory_path) as (_, terminal):
        assert terminal.types(key) == 0
        assert terminal.is_as_before()


def test_it_shows_a_drain_the_end_and_the_next_life(memory_path: Path) -> None:
    with watching(memory_path) as (gateway, terminal):
        gateway.signal(SIGTERM)
        terminal.sees("draining (shutdown)")
        gateway.kill()
        terminal.sees("no gateway runs; waiting for the next")
        with launch(memory_path, AGENT):
            terminal.sees("epoch 2")
            assert terminal.types(b"q") == 0
