"""Who waits for a message to reach its end, and who waits for everything to be quiet."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

import trio


class Waiters:
    """Wakes whoever asked for a message's answer, or for the gateway to have nothing to do."""

    def __init__(self) -> None:
        # Weak: who asked holds the event, and several may ask for one message.
        self._events: WeakValueDictionary[tuple[str, str], trio.Event] = WeakValueDictionary()
        self._idle: trio.Event | None = None
        self.abandoned: bool = False

    def event(self, channel: str, message_id: str) -> trio.Event:
        """An event that is set when the message reaches an end in this process. Keep it for as
        long as you wait."""
        return self._events.setdefault((channel, message_id), trio.Event())

    def __bool__(self) -> bool:
        return bool(self._events)

    def ended(self, channel: str, message_ids: Iterable[str]) -> None:
        """Messages have reached an end."""
        for message_id in message_ids:
            event = self._events.pop((channel, message_id), None)
            if event is not None:
                event.set()

    def abandon(self) -> None:
        """The gateway has stopped: nobody's wait will end any other way."""
        self.abandoned = True
        for event in list(self._events.values()):
            event.set()
        self._events.clear()
        self.idle()

    def idle(self) -> None:
        """There is nothing to do."""
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    async def wait_idle(self) -> None:
        """Wait until somebody calls `idle`."""
        if self._idle is None:
            self._idle = trio.Event()
        await self._idle.wait()
