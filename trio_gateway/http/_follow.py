"""Who follows a session is woken when something has happened in it, and reads its journal.

What a follower is told comes from the journal alone, so that nothing is told before it is on disk,
and whoever comes back goes on from where it was. Progress is not on disk, and has no place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import trio

from .._errors import StoreError
from .._events import (
    DeliveryEvent,
    Event,
    ProgressShown,
    ReplyCommitted,
    TurnInterrupted,
    TurnSettled,
    TurnsMarked,
)
from .._gateway import Gateway
from .._messages import SessionKey
from ..store import JournalEntry

KEPT: Final = 500
"""Entries that a session's bell has at hand, for followers that are a little behind."""


class Bell:
    """Rings when something happened in one session, and has at hand what it was.

    `since`: all that happened after this place is at hand; None: nobody knows yet.
    """

    def __init__(self) -> None:
        self.followers = 0
        self.rung = 0
        self.since: int | None = None
        self.progress: ProgressShown | None = None
        self._entries: deque[JournalEntry] = deque()
        self._event = trio.Event()

    def put(self, entry: JournalEntry) -> None:
        """One more thing happened."""
        if len(self._entries) >= KEPT:
            self.since = self._entries.popleft().seq
        self._entries.append(entry)

    def at_hand(self, after: int) -> list[JournalEntry] | None:
        """What happened after a place; None where the store has to be asked."""
        if self.since is None or after < self.since:
            return None
        return [entry for entry in self._entries if entry.seq > after]

    def forget(self) -> None:
        """Nobody knows what has happened: who follows asks the store."""
        self.since = None
        self._entries.clear()

    def ring(self) -> None:
        """Wake all who wait."""
        self.rung += 1
        self._event.set()
        self._event = trio.Event()

    async def wait(self, heard: int) -> None:
        """Wait until it has rung more often than `heard`."""
        if self.rung == heard:
            await self._event.wait()
        else:
            await trio.lowlevel.checkpoint()


class Bells:
    """The bells of all sessions that somebody follows.

    One reader reads for all of them what has happened, of many sessions at once: a thousand
    followers must not ask the store a thousand times. `news` is set when there is something to
    read.
    """

    def __init__(self) -> None:
        self._bells: dict[SessionKey, Bell] = {}
        self.news = trio.Event()

    def __bool__(self) -> bool:
        return bool(self._bells)

    @contextmanager
    def following(self, session: SessionKey) -> Generator[Bell, None, None]:
        """The session's bell, for as long as the block lasts."""
        bell = self._bells.setdefault(session, Bell())
        bell.followers += 1
        self.news.set()
        try:
            yield bell
        finally:
            bell.followers -= 1
            if not bell.followers:
                del self._bells[session]

    def hear(self, event: Event) -> None:
        """Note what an event says: there are news, or a turn has made progress."""
        if not self._bells:
            return
        session = event.delivery.session if isinstance(event, DeliveryEvent) else about(event)
        bell = None if session is None else self._bells.get(session)
        if bell is None:
            if isinstance(event, TurnsMarked):
                self.news.set()
            return
        if isinstance(event, ProgressShown):
            bell.progress = event if event.text else None
            bell.ring()
            return
        if isinstance(event, TurnSettled | TurnInterrupted | ReplyCommitted):
            bell.progress = None
        self.news.set()

    def begin(self, newest: int) -> None:
        """From this place on, all that happens will be put. Whoever has asked the store before that
        asks again: something may have happened in between."""
        for bell in self._bells.values():
            if bell.since is None:
                bell.since = newest
                bell.ring()

    def put(self, session: SessionKey, entry: JournalEntry) -> None:
        """Something happened; whoever follows is woken."""
        if (bell := self._bells.get(session)) is not None:
            bell.put(entry)
            bell.ring()

    def forget(self) -> None:
        """What has happened could not be read."""
        for bell in self._bells.values():
            bell.forget()
            bell.ring()


class Reader:
    """Reads the journal for all bells, from where it was."""

    def __init__(self, bells: Bells, gateway: Gateway, channel: str) -> None:
        self._bells = bells
        self._gateway = gateway
        self._channel = channel
        self._place: int | None = None

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            await self._bells.news.wait()
            self._bells.news = trio.Event()
            try:
                await self._read()
            except StoreError:
                self._place = None
                self._bells.forget()

    async def _read(self) -> None:
        if not self._bells:
            self._place = None  # nobody listens: what happens now need not be read
            return
        if self._place is None:
            self._place = await self._gateway.inspect(lambda reader: reader.journal_newest())
        while found := await self._since(self._place):
            # Bells that came meanwhile have all of it, too: it is put after they were hung.
            self._bells.begin(self._place)
            for session, entry in found:
                self._bells.put(session, entry)
            self._place = found[-1][1].seq
            if len(found) < KEPT:
                break
        self._bells.begin(self._place)

    async def _since(self, place: int) -> Sequence[tuple[SessionKey, JournalEntry]]:
        channel = self._channel
        return await self._gateway.inspect(
            lambda reader: reader.journal_since(channel, place, KEPT)
        )


def about(event: Event) -> SessionKey | None:
    """The session that an event is about, if it says."""
    return getattr(event, "session", None)


def told(entry: JournalEntry) -> dict[str, Any]:
    """A journal's entry as clients are told it."""
    said: dict[str, Any] = {"seq": entry.seq, "at": stamp(entry.at)}
    if entry.message_id is not None:
        said["id"] = entry.message_id
    if entry.turn is not None:
        said["turn"] = entry.turn
    if entry.attempt is not None:
        said["attempt"] = entry.attempt
    match entry.what:
        case "accepted":
            said |= {"text": entry.text, "sender": entry.sender}
        case "settled" | "requeued":
            said["state"] = entry.detail
        case "begun":
            said["messages"] = entry.messages
        case "resumed" | "interrupted":
            said |= {"messages": entry.messages, "reason": entry.detail}
        case "reply":
            said |= {
                "key": entry.key,
                "text": entry.text,
                "kind": None if entry.kind is None else entry.kind.value,
                "final": entry.final,
                "in_reply_to": entry.messages,
            }
        case _:
            said["text"] = entry.text
    return said


def stamp(at: datetime) -> str:
    """A time as ISO 8601 in UTC."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
