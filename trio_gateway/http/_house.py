"""What all parts of the HTTP door share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import attrs
import trio

from .._errors import NotFound
from .._gateway import Gateway, GatewayState
from .._messages import SessionKey
from ..store import JournalEntry, StoreReader
from ._board import Board
from ._follow import Bell, Bells
from ._guard import Guard
from ._metrics import Metrics
from ._request import session_of
from ._settings import HttpSettings

T = TypeVar("T")

PAGE: int = 200
"""Entries of a journal that are read at once."""


class Streamed:
    """The sessions whose growing replies are kept, because somebody reads them as they grow."""

    def __init__(self) -> None:
        self._readers: Counter[SessionKey] = Counter()

    def __contains__(self, session: SessionKey) -> bool:
        return session in self._readers

    @contextmanager
    def reading(self, session: SessionKey) -> Generator[None, None, None]:
        """One reader more, for as long as the block lasts."""
        self._readers[session] += 1
        try:
            yield
        finally:
            self._readers[session] -= 1
            if not self._readers[session]:
                del self._readers[session]


@attrs.define(eq=False)
class House:
    """The gateway and what is around it. `closing` is set when no more requests are taken."""

    gateway: Gateway
    settings: HttpSettings
    guard: Guard
    channel: str
    metrics: Metrics
    hook_secret: bytes | None = attrs.field(default=None, repr=False)
    bells: Bells = attrs.field(factory=Bells)
    board: Board = attrs.field(factory=Board)
    closing: trio.Event = attrs.field(factory=trio.Event)
    streaming: Streamed = attrs.field(factory=Streamed)
    _waiting: set[trio.CancelScope] = attrs.field(factory=set[trio.CancelScope])

    def close(self) -> None:
        """No more requests are taken; whoever waits for something waits no longer."""
        self.closing.set()
        for scope in self._waiting:
            scope.cancel()

    @contextmanager
    def until_closing(self, scope: trio.CancelScope) -> Generator[None, None, None]:
        """Cancel `scope` when the gateway closes."""
        self._waiting.add(scope)
        if self.closing.is_set():
            scope.cancel()
        try:
            yield
        finally:
            self._waiting.discard(scope)

    @property
    def draining(self) -> bool:
        """Whether a stop has begun."""
        return self.gateway.state.value in (GatewayState.DRAINING, GatewayState.STOPPED)

    def session(self, key: str) -> SessionKey:
        """The session that a path names. Raises `Problem`."""
        return session_of(key, self.channel, self.gateway.channels)

    async def ask(self, question: Callable[[StoreReader], T]) -> T:
        """Ask the store."""
        return await self.gateway.inspect(question)

    async def journal(
        self, session: SessionKey, after: int, *, drafts: bool = False
    ) -> Sequence[JournalEntry]:
        """What happened in a session after a place."""
        return await self.ask(lambda reader: reader.journal(session, after, PAGE, drafts=drafts))

    async def happened(
        self, bell: Bell, session: SessionKey, after: int, *, drafts: bool = False
    ) -> Sequence[JournalEntry]:
        """The same, for who follows the session: mostly at hand. At the very end it is asked of the
        store, which knows what nobody has heard of yet."""
        found = None if self.closing.is_set() else bell.at_hand(after)
        if found is None:
            return await self.journal(session, after, drafts=drafts)
        await trio.lowlevel.checkpoint()
        return found if drafts else [entry for entry in found if entry.what != "draft"]

    async def span(self, session: SessionKey) -> tuple[int, int]:
        """The oldest and the newest place in a session's journal, see `StoreReader.journal_span`.
        Raises `NotFound` for a session that has none."""
        if session.channel != self.channel:
            raise NotFound(
                f"session {session} has no journal, its channel delivers by itself; only sessions"
                f" of {self.channel} can be followed"
            )
        return await self.ask(lambda reader: reader.journal_span(session))
