"""The one stream of events: listeners hear at once, subscribers read a buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import trio

from ._events import Event, EventsDropped

BUFFER: Final = 10_000


class EventStream:
    """Says events to listeners (at once, in the same breath) and to subscribers (buffered).

    A listener that raises is not called again; `on_fault` is told, and whoever says events is not
    disturbed.
    """

    def __init__(self, on_fault: Callable[[Exception], None]) -> None:
        self._listeners: list[Callable[[Event], None]] = []
        self._subscriptions: set[_Subscription] = set()
        self._closed = False
        self._on_fault = on_fault

    def emit(self, event: Event) -> None:
        """Say `event`. Never waits, never raises; a listener must not wait either."""
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception as error:
                self._remove(listener)
                self._on_fault(error)

    @property
    def heard(self) -> bool:
        """Whether anybody listens; saves building an event for nobody on the busiest paths."""
        return bool(self._listeners)

    def add(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with each event, as long as the stream lives."""
        self._listeners.append(listener)

    @contextmanager
    def listen(self, listener: Callable[[Event], None]) -> Generator[None, None, None]:
        """Call `listener` with each event until the block ends."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._remove(listener)

    def _remove(self, listener: Callable[[Event], None]) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    @asynccontextmanager
    async def subscribe(self) -> AsyncGenerator[AsyncIterator[Event], None]:
        """Yield an iterator over the events from now on.

        A subscriber that is slower than the gateway loses the oldest events beyond a buffer of
        10,000 and is told how many by `EventsDropped`; the gateway never waits for it. The
        iteration ends when the stream is closed and everything was read.
        """
        await trio.lowlevel.checkpoint()
        inbox = _Subscription()
        if self._closed:
            inbox.end()
        self._subscriptions.add(inbox)
        try:
            with self.listen(inbox.put):
                yield inbox
        finally:
            self._subscriptions.discard(inbox)

    def close(self) -> None:
        """The gateway has stopped: subscribers read what they have, and come to an end."""
        self._closed = True
        for inbox in self._subscriptions:
            inbox.end()


class _Subscription:
    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._ended = False
        self._arrived = trio.Event()

    def put(self, event: Event) -> None:
        if self._ended:
            return
        if len(self._events) >= BUFFER:
            self._events.popleft()
            self._dropped += 1
        self._events.append(event)
        self._arrived.set()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    def __aiter__(self) -> _Subscription:
        return self

    async def __anext__(self) -> Event:
        await self._arrived.wait()
        while not (self._events or self._ended):
            await self._arrived.wait()  # another reader was quicker
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            return EventsDropped(count=dropped)
        if not self._events:
            raise StopAsyncIteration
        event = self._events.popleft()
        if not (self._events or self._ended):
            self._arrived = trio.Event()
        return event
