"""Who waits for a message to reach its end, and who waits for everything to be quiet."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import attrs
import trio

from ._messages import Reply

Outcome = tuple[str, tuple[Reply, ...]]


@attrs.define(eq=False)
class Asked:
    """One message, and those who ask for its answer. `reached` is set when it has its end;
    `outcome` is that end and all that was said, where whoever ended it knows."""

    reached: trio.Event = attrs.field(factory=trio.Event)
    asking: int = 0
    outcome: Outcome | None = None


class Waiters:
    """Wakes whoever asked for a message's answer, or for the gateway to have nothing to do."""

    def __init__(self) -> None:
        self._asked: dict[tuple[str, str], Asked] = {}
        self._reading: set[Asked] = set()
        self._all_told: trio.Event | None = None
        self._idle: trio.Event | None = None
        self.abandoned: bool = False

    @contextmanager
    def asking(self, channel: str, message_id: str) -> Generator[Asked, None, None]:
        """Ask for a message: what is told when it reaches an end in this process. Until the block
        is left, whoever asks is counted as one who reads the answer."""
        name = (channel, message_id)
        asked = self._asked.setdefault(name, Asked())
        asked.asking += 1
        try:
            yield asked
        finally:
            asked.asking -= 1
            if not asked.asking:
                self._forget(name, asked)

    def _forget(self, name: tuple[str, str], asked: Asked) -> None:
        if self._asked.get(name) is asked:
            del self._asked[name]
        self._reading.discard(asked)
        if not self._reading and self._all_told is not None:
            self._all_told.set()

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ended(
        self, channel: str, message_ids: Iterable[str], outcome: Outcome | None = None
    ) -> None:
        """Messages have reached an end."""
        for message_id in message_ids:
            asked = self._asked.pop((channel, message_id), None)
            if asked is not None:
                self._reading.add(asked)
                asked.outcome = outcome
                asked.reached.set()

    async def wait_told(self) -> None:
        """Wait until all who asked for what has ended have read the answer."""
        if self._reading:
            self._all_told = trio.Event()
            await self._all_told.wait()

    def abandon(self) -> None:
        """The gateway has stopped: nobody's wait will end any other way."""
        self.abandoned = True
        for asked in self._asked.values():
            asked.reached.set()
        self._asked.clear()
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
