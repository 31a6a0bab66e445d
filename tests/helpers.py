"""What the tests of behaviours share: one store over several boots, an agent on strings, a crash
without a process.

    async def test_something(machine: Machine, autojump_clock: MockClock) -> None:
        agent = Script()
        async with machine.boot(agent) as gateway:
            await gateway.accept(msg("ada", "m1", "hello"))
            await agent.wait_begun(1)
            machine.crash()                  # from now on: what SIGKILL at this instant would leave
            gateway.request_stop(now=True)
        async with machine.boot(agent) as gateway:
            ...

Time is virtual: a test takes `machine` (see conftest) and, for pytest-trio, `autojump_clock`.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeVar

import apsw
import trio

from trio_gateway import (
    LOCAL,
    Agent,
    Authorize,
    Channel,
    Event,
    Gateway,
    Message,
    Settings,
    Turn,
    open_gateway,
)
from trio_gateway.store import OpenTurnRow, read_store
from trio_gateway.testing import VirtualClock

E = TypeVar("E", bound=Event)

PATIENCE = 20.0
"""Real seconds that anything may take on a busy machine before a test fails."""


def msg(
    session: str, id: str, text: str = "hi", *, sender: str | None = None, channel: str = LOCAL
) -> Message:
    """A message, briefly."""
    return Message(session=session, id=id, text=text, sender=sender, channel=channel)


def crash_copy(store: Path) -> Path:
    """What a SIGKILL at this instant would leave: a copy of the database and its WAL, beside it.

    The SHM is not copied: SQLite rebuilds it from the WAL, as it does after a power cut.
    """
    copy = store.with_name(f"{store.name}+")
    shutil.copyfile(store, copy)
    wal = store.with_name(store.name + "-wal")
    if wal.exists():
        shutil.copyfile(wal, copy.with_name(copy.name + "-wal"))
    return copy


def rows(store: Path, sql: str, *args: Any) -> list[tuple[Any, ...]]:
    """What another process would read right now."""
    db: Any = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    with closing(db):
        return list(db.execute(sql, args))


class Log:
    """Every event of every boot, in order. Give it as `listen`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.hooks: list[Callable[[Event], None]] = []
        self._news = trio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        for hook in self.hooks:
            hook(event)
        self._news.set()
        self._news = trio.Event()

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    async def wait_for(self, kind: type[E], count: int = 1) -> list[E]:
        """Wait until there are `count` events of that kind in all."""
        while len(found := self.of(kind)) < count:
            await self._news.wait()
        return found


class Script:
    """An agent on strings: a turn says that it has begun, and ends when the test lets it.

    `open`: turns end at once. `release("a")` lets the turns of session `a` end, now and later.
    """

    def __init__(self, *, open: bool = False, answer: str = "re: {text}") -> None:
        self.turns: list[Turn] = []
        self.ended: list[Turn] = []
        self._answer = answer
        self._all = trio.Event()
        self._gates: dict[str, trio.Event] = {}
        self._news = trio.Event()
        if open:
            self._all.set()

    async def __call__(self, turn: Turn) -> str:
        self.turns.append(turn)
        self._tell()
        if not self._all.is_set():
            await self._gate(turn.session.name).wait()
        self.ended.append(turn)
        return self._answer.format(text=turn.text, attempt=turn.attempt)

    def _gate(self, session: str) -> trio.Event:
        return self._gates.setdefault(session, trio.Event())

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def release(self, *sessions: str) -> None:
        """Let the turns of these sessions end; of all, if none is named."""
        for session in sessions or list(self._gates):
            self._gate(session).set()
        if not sessions:
            self._all.set()

    async def wait_begun(self, count: int) -> list[Turn]:
        """Wait until `count` attempts have begun in all."""
        while len(self.turns) < count:
            await self._news.wait()
        return self.turns

    def turn_of(self, session: str) -> Turn:
        """The newest attempt in a session."""
        return next(turn for turn in reversed(self.turns) if turn.session.name == session)

    @property
    def begun(self) -> list[tuple[str, int, str]]:
        """Session, attempt and text of every attempt, in the order in which they began."""
        return [(turn.session.name, turn.attempt, turn.text) for turn in self.turns]


class Machine:
    """A machine that is booted again and again: one store, one virtual clock, one log of events."""

    def __init__(self, where: Path) -> None:
        self.store = where / "gateway.db"
        self.clock = VirtualClock()
        self.log = Log()
        self.commits = 0
        """Write transactions so far."""
        self.on_commit: Callable[[str], None] | None = None
        """Called with "before" and "after" around every commit; what it raises, the commit does."""

    def _tap(self, moment: str) -> None:
        self.commits += moment == "before"
        if self.on_commit is not None:
            self.on_commit(moment)

    @asynccontextmanager
    async def boot(
        self,
        agent: Agent,
        *channels: Channel,
        settings: Settings | None = None,
        authorize: Authorize | None = None,
    ) -> AsyncGenerator[Gateway, None]:
        """A gateway on this store, on virtual time."""
        async with open_gateway(
            agent,
            store=self.store,
            channels=channels,
            settings=settings,
            authorize=authorize,
            listen=self.log,
            clock=self.clock,
            inline_store=True,
            tap=self._tap,
        ) as gateway:
            yield gateway

    def crash(self) -> None:
        """From now on every boot finds what a SIGKILL at this instant would leave. Stop the old
        gateway quickly afterwards; whatever it still writes, nobody will see."""
        self.store = crash_copy(self.store)

    # ----- what another process reads

    def rows(self, sql: str, *args: Any) -> list[tuple[Any, ...]]:
        """Rows of the store, over a connection of its own."""
        return rows(self.store, sql, *args)

    def markers(self) -> dict[str, tuple[str, str | None]]:
        """The open turns by session name: state and reason."""
        return {row.session.name: (row.state, row.reason) for row in self.open_turns()}

    def open_turns(self) -> Sequence[OpenTurnRow]:
        """The open turns."""
        with closing(read_store(self.store)) as reader:
            return reader.open_turns()

    def fate(self, message_id: str) -> str:
        """The state of a message."""
        ((state,),) = self.rows("SELECT state FROM message WHERE id = ?", message_id)
        return str(state)

    def said(self, session: str | None = None) -> list[str]:
        """All texts in the store that somebody said, in order, in one session or in all."""
        found = self.rows(
            "SELECT session.name, delivery.text FROM delivery JOIN session"
            " ON session.id = delivery.session WHERE kind != 'notice' ORDER BY delivery.id"
        )
        return [text for name, text in found if session in (None, name)]


def settled_well(gateway: Gateway) -> None:
    """Nothing has leaked: no slot, no session, no count."""
    slots = gateway._settings.limits.turns  # the limit itself is no statistic
    assert gateway.statistics() == {
        "turns_running": 0,
        "slots_free": slots,
        "sessions_open": 0,
        "messages_open": 0,
        "undelivered": 0,
    }
