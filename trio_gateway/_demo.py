"""`trio-gateway demo`: a gateway is stopped, killed in the middle of that, and started again.

The gateways are real processes and the signals are real signals. What is shown was read from what
the processes wrote or from the store that they left; nothing is known in advance.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from ._config import ENV_PREFIX
from ._errors import GatewayError
from ._views import Listing, Screen
from .channels.jsonl import JsonlChannel
from .store import OpenTurnRow, Timeline, TimelineEntry, read_store

PATIENCE: Final = 25.0
"""Seconds that everything may take."""

PACKAGE: Final = __name__.partition(".")[0]

NAMES: Final = ("short", "long", "stuck")
"""The three turns: session, message and text have the same name."""

CONFIG: Final = """\
[drain]
grace = "15s"
budget = "25s"
[log]
format = "json"
level = "debug"
"""


class DemoFailed(GatewayError):
    """Something did not happen that should have."""


def demonstrate(screen: Screen) -> int:
    """Run the demonstration; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="trio-gateway-demo-") as folder:
        demo = Demo(Path(folder), screen)
        try:
            trio.run(demo.run)
        except trio.TooSlowError:
            raise DemoFailed(f"the demonstration took more than {PATIENCE:g} s") from None
        except BaseExceptionGroup as group:
            raise _lone(group) from None
        return demo.conclude()


@attrs.frozen
class Act:
    """What the demonstration itself did or read, and when."""

    at: datetime
    who: str
    what: str
    detail: str = ""


@attrs.frozen(kw_only=True)
class Reply:
    """A reply that a gateway wrote: to which message, by which life of the gateway."""

    to: str
    text: str
    life: int


class Demo:
    """One demonstration, in a folder of its own."""

    def __init__(self, folder: Path, screen: Screen) -> None:
        self.store = folder / "demo.db"
        self.config = folder / "gateway.toml"
        self.config.write_text(CONFIG, "utf-8")
        self._screen = screen
        self._acts: list[Act] = []
        self._replies: list[Reply] = []
        self._left: tuple[OpenTurnRow, ...] = ()
        self._begun = datetime.now(UTC)

    async def run(self) -> None:
        """Everything that happens, in order. Raises `TooSlowError`, `DemoFailed`."""
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_obey_stop)
                await self._first_life()
                self._look_at_what_is_left()
                await self._second_life()
                nursery.cancel_scope.cancel()

    def _look_at_what_is_left(self) -> None:
        with closing(read_store(self.store)) as reader:
            self._left = reader.open_turns()
        for turn in self._left:
            self.act("the store", f"{turn.session.name} is {turn.state}", turn.reason or "")

    async def _first_life(self) -> None:
        async with self._gateway(1) as gateway:
            for name in NAMES:
                await gateway.send({"session": name, "id": name, "text": name})
            for name in NAMES:
                await gateway.expect("turn_begun", name)
            self.act("you", "SIGTERM", "please stop; open turns may finish")
            gateway.process.send_signal(signal.SIGTERM)
            # Not just said but noted as said: killed between the two, it would be said again.
            await gateway.expect("delivered", "short")
            self.act("you", "SIGKILL", "in the middle of the drain")
            gateway.process.kill()
            await gateway.process.wait()

    async def _second_life(self) -> None:
        async with self._gateway(2) as gateway:
            # The marked ones answer by themselves; nobody sends anything again.
            for turn in self._left:
                await gateway.expect("delivered", turn.session.name)
            await gateway.end_input()
            code = await gateway.process.wait()
            self.act("gateway 2", f"left with exit code {code}")

    @asynccontextmanager
    async def _gateway(self, life: int) -> AsyncGenerator[_Gateway]:
        process = await trio.lowlevel.open_process(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
        gateway = _Gateway(self, process, life)
        self.act(gateway.name, "started", f"process {process.pid}")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(gateway.read_output)
                nursery.start_soon(gateway.read_log)
                yield gateway
        finally:
            with trio.CancelScope(shield=True):
                await gateway.close()

    def _command(self) -> list[str]:
        target = f"{PACKAGE}._demo_agent:agent"
        named = ["--config", str(self.config), "--store", str(self.store)]
        return [str(sys.executable), "-m", PACKAGE, "run", target, "--jsonl", *named]

    # ----- what is told

    def act(self, who: str, what: str, detail: str = "") -> None:
        """Note something and say it at once."""
        act = Act(datetime.now(UTC), who, what, detail)
        self._acts.append(act)
        seconds = (act.at - self._begun).total_seconds()
        self._screen.line(f"{seconds:6.2f}  {who:10}  {what}{f': {detail}' if detail else ''}")

    def reply(self, reply: Reply) -> None:
        """Note a reply that a gateway wrote."""
        self._replies.append(reply)
        self.act(f"gateway {reply.life}", f"answers {reply.to}", reply.text)

    def conclude(self) -> int:
        """Show what the store says about it all; 0 if every message was answered just once."""
        with closing(read_store(self.store)) as reader:
            lives = [life for name in NAMES for life in reader.explain(name)]
        self._screen.line("\nfrom the store, one line for each change of it:\n")
        self._screen.listing(self._timeline(lives))
        self._screen.line("\nso:\n")
        self._screen.listing(self._account(lives))
        wrong = list(self._wrong(lives))
        for problem in wrong:
            self._screen.line(f"but {problem}")
        if not wrong:
            self._screen.line("\nthree messages, three answers: none lost, none twice")
        return int(bool(wrong))

    def _timeline(self, lives: list[Timeline]) -> Listing:
        entries = [
            Act(entry.at, life.message.id, entry.what, entry.detail)
            for life in lives
            for entry in life.entries
        ]
        signals = [act for act in self._acts if act.what.startswith("SIG") or act.what == "started"]
        told = sorted([*entries, *signals], key=lambda act: act.at)
        return Listing(
            columns=("seconds", "who", "what", "detail"),
            rows=tuple((self._since(act.at), act.who, act.what, act.detail) for act in told),
            empty="nothing happened",
        )

    def _since(self, at: datetime) -> str:
        return f"{(at - self._begun).total_seconds():.3f}"

    def _account(self, lives: list[Timeline]) -> Listing:
        return Listing(
            columns=("turn", "at the kill", "answered by", "attempts", "steps", "answer"),
            rows=tuple(self._row(life) for life in lives),
            empty="nothing was accepted",
        )

    def _row(self, life: Timeline) -> tuple[str, ...]:
        name = life.message.id
        left = next((turn for turn in self._left if turn.session.name == name), None)
        replies = [reply for reply in self._replies if reply.to == name]
        return (
            name,
            "settled" if left is None else f"{left.state} ({left.reason})",
            ", ".join(f"gateway {reply.life}" for reply in replies) or "nobody",
            str(len(_attempts(life))),
            _steps(life),
            ", ".join(reply.text for reply in replies) or "none",
        )

    def _wrong(self, lives: list[Timeline]) -> Iterator[str]:
        for life in lives:
            name = life.message.id
            answers = [reply for reply in self._replies if reply.to == name]
            left = any(turn.session.name == name for turn in self._left)
            if life.message.state != "answered" or len(answers) != 1:
                yield f"{name} has {len(answers)} answers and is {life.message.state}"
            if len(_attempts(life)) != 1 + left:
                yield f"{name} took {len(_attempts(life))} attempts"
        if {turn.session.name for turn in self._left} != set(NAMES) - {"short"}:
            yield "other turns were open at the kill than the two that had not settled"


def _lone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What failed, without the nursery's wrapping, which tells nobody anything."""
    error: BaseException = group
    inner: tuple[BaseException, ...] = group.exceptions
    while len(inner) == 1:
        error = inner[0]
        inner = getattr(error, "exceptions", ())
    return error


def _attempts(life: Timeline) -> list[TimelineEntry]:
    return [entry for entry in life.entries if entry.what.startswith("turn RUNNING")]


def _steps(life: Timeline) -> str:
    """How many steps each attempt did."""
    done = [entry.detail for entry in life.entries if entry.what == "step"]
    counts = [
        sum(f"attempt {n})" in step for step in done) for n in range(1, len(_attempts(life)) + 1)
    ]
    return " + ".join(map(str, counts)) if done else "-"


def _environment() -> dict[str, str]:
    """Ours, without what would configure the gateways otherwise than the demonstration says."""
    return {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(ENV_PREFIX) and "__" in name)
    }


async def _obey_stop() -> None:
    """Whoever stops the demonstration must not leave its gateways behind."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async for number in signals:
            raise DemoFailed(f"stopped by {signal.Signals(number).name}")


class _Gateway:
    """One life of the gateway, as a process that we talk to over JSON lines."""

    def __init__(self, demo: Demo, process: trio.Process, life: int) -> None:
        self.process = process
        self.life = life
        self.name = f"gateway {life}"
        self._demo = demo
        self._told: set[tuple[str, str]] = set()
        self._news = trio.Event()
        self._ended = False
        self._last_words: list[str] = []

    async def send(self, message: dict[str, str]) -> None:
        """Hand in one message."""
        assert self.process.stdin is not None
        try:
            await self.process.stdin.send_all(json.dumps(message).encode() + b"\n")
        except trio.BrokenResourceError:
            raise self._failed("it does not take messages") from None

    async def end_input(self) -> None:
        """Close its standard input: it leaves when everything is answered."""
        assert self.process.stdin is not None
        await self.process.stdin.aclose()

    async def expect(self, event: str, name: str) -> None:
        """Wait until its log tells an event of that name about the session `name`."""
        while (event, f"{JsonlChannel.name}:{name}") not in self._told:
            if self._ended:
                raise self._failed(f"it ended before {event} of {name}")
            await self._news.wait()

    async def read_output(self) -> None:
        """Take in what it writes to standard output, until it is gone."""
        await _each_line(self.process.stdout, self._hear)

    async def read_log(self) -> None:
        """Take in its log, until it is gone."""
        await _each_line(self.process.stderr, self._overhear)
        self._ended = True
        self._news.set()

    async def close(self) -> None:
        """Leave nothing behind."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                await pipe.aclose()

    def _hear(self, line: str) -> None:
        told = json.loads(line)
        if told["event"] == "reply":
            to = ", ".join(told["in_reply_to"])
            self._demo.reply(Reply(to=to, text=told["text"], life=self.life))

    def _overhear(self, line: str) -> None:
        self._last_words = [*self._last_words[-9:], line]
        record: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
        event = record.get("event", "")
        if (say := _SAID.get(event)) is not None:
            self._demo.act(self.name, say.format_map(record))
        self._told.add((event, record.get("session", "")))
        self._news.set()
        self._news = trio.Event()

    def _failed(self, what: str) -> DemoFailed:
        return DemoFailed("\n".join([f"{self.name}: {what}", *self._last_words]))


_SAID: Final = {
    "gateway_started": "recovers {resuming} turns",
    "stop_requested": "hears {by}",
    "turns_marked": "has marked {count} turns to resume",
    "turn_resumed": "goes on with turn {turn}, attempt {attempt}",
}
"""What is said of some records in a gateway's log, with their own values."""


async def _each_line(pipe: trio.abc.ReceiveStream | None, take: Callable[[str], None]) -> None:
    """Hand every line of a pipe to `take`; what a killed process left of one is no line."""
    assert pipe is not None
    rest = b""
    while data := await pipe.receive_some():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            take(line.decode())
