"""The outbox: committed replies on their way. Every text that anybody says goes through here.

    settle, say, notice, command          (committed: the row is in the store)
              |
           a lane per session             in order; one delivery at a time; retries wait here
              |
           channel.send                   under the delivery's stable key
              |
           delivered | dead               committed again

A lane is a task that lives while its session has something to deliver. One destination that has
to wait delays nobody else.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import attrs
import trio

from ._clock import Clock, as_datetime
from ._errors import ChannelEnded, RetryLater, StoreClosed, StoreError, Undeliverable
from ._events import DeadLettered, Delivered, DeliveryDelayed, StoreTrouble
from ._links import Link, Links
from ._messages import Delivery, ReplyKind, SessionKey
from ._policy import DeliveryRules, retry_delay
from ._sessions import Sessions
from ._stream import EventStream
from .store import Store

NOTICE_TIMEOUT: Final = 2.0
"""Seconds that a notice may hold up the replies behind it."""

LONGEST_WAIT: Final = 86_400.0
"""Seconds that a delivery found at boot waits at the most: the wall clock may have jumped."""

@attrs.define(eq=False)
class _Lane:
    session: SessionKey
    queue: list[Delivery] = attrs.field(factory=list[Delivery])


class Outbox:
    """Delivers what was committed. `run` is its life; `put` hands deliveries to it."""

    def __init__(
        self,
        store: Store,
        links: Links,
        sessions: Sessions,
        events: EventStream,
        rules: DeliveryRules,
        clock: Clock,
        *,
        on_end: Callable[[str], None],
        on_quiet: Callable[[], None],
    ) -> None:
        self._store = store
        self._links = links
        self._sessions = sessions
        self._events = events
        self._rules = rules
        self._clock = clock
        self._on_end = on_end
        self._on_quiet = on_quiet
        self._lanes: dict[SessionKey, _Lane] = {}
        self._nursery: trio.Nursery | None = None
        self._waiting: list[_Lane] = []
        self._emptied: trio.Event | None = None
        self.undelivered = 0

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for lane in self._waiting:
                nursery.start_soon(self._empty, lane)
            self._waiting.clear()
            await trio.sleep_forever()

    def put(self, deliveries: Iterable[Delivery]) -> None:
        """Send these on their way, behind what their session has waiting. They are committed."""
        for delivery in deliveries:
            if self._links.get(delivery.session.channel) is None:
                # The host's own, for whom committed is delivered; or a channel of another time,
                # whose replies wait in the store until a gateway has it again.
                continue
            self._lane(delivery.session).queue.append(delivery)
            self.undelivered += 1

    def _lane(self, key: SessionKey) -> _Lane:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key)
            self._sessions.get(key).deliveries = 1
            if self._nursery is None:
                self._waiting.append(lane)
            else:
                self._nursery.start_soon(self._empty, lane)
        return lane

    async def wait_empty(self) -> None:
        """Wait until nothing is left to deliver."""
        while self._lanes:
            self._emptied = trio.Event()
            await self._emptied.wait()

    async def _empty(self, lane: _Lane) -> None:
        while lane.queue:
            await self._deliver(lane.queue[0])
            del lane.queue[0]
            self.undelivered -= 1
        del self._lanes[lane.session]
        session = self._sessions.get(lane.session)
        session.deliveries = 0
        self._sessions.let_go(session)
        if not self._lanes:
            if self._emptied is not None:
                self._emptied.set()
            self._on_quiet()

    async def _deliver(self, delivery: Delivery) -> None:
        """Try until it has arrived, or is given up."""
        link = self._links[delivery.session.channel]
        next_try: Delivery | None = delivery
        while next_try is not None:
            await self._wait_for(link, next_try)
            next_try = await self._try(link, next_try)

    async def _wait_for(self, link: Link, delivery: Delivery) -> None:
        if delivery.not_before is not None:
            wait = delivery.not_before - as_datetime(self._clock.now().wall)
            await trio.sleep(min(max(wait.total_seconds(), 0.0), LONGEST_WAIT))
        if not link.connected.value:
            await link.wait_connected()

    async def _try(self, link: Link, delivery: Delivery) -> Delivery | None:
        """One sending: None when it is over with, else the delivery as it is to be tried again."""
        if not link.channel.idempotent:
            await self._record(self._store.sending, delivery.id)
        try:
            sent = await self._send(link, delivery)
        except ChannelEnded:
            self._on_end(link.name)
            await trio.sleep_forever()
        except RetryLater as error:
            return await self._again(delivery, str(error), error.after, counts=False)
        except Undeliverable as error:
            await self._bury(delivery, str(error) or "undeliverable")
            return None
        except Exception as error:
            return await self._failed(link, delivery, repr(error))
        if not sent:
            return await self._failed(link, delivery, "the channel took too long")
        await self._record(self._store.delivered, delivery.id, delivery.tries + 1)
        if self._events.heard:
            self._events.emit(Delivered(delivery=delivery))
        return None

    async def _send(self, link: Link, delivery: Delivery) -> bool:
        try:
            link.sending.acquire_nowait()
        except trio.WouldBlock:
            await link.sending.acquire()
        notice = delivery.kind is ReplyKind.NOTICE
        try:
            timeout = NOTICE_TIMEOUT if notice else self._rules.timeout
            with trio.CancelScope(relative_deadline=timeout) as scope:
                await link.channel.send(delivery)
            return not scope.cancelled_caught
        finally:
            link.sending.release()

    async def _failed(self, link: Link, delivery: Delivery, error: str) -> Delivery | None:
        tries = delivery.tries + 1
        if delivery.kind is ReplyKind.NOTICE:
            await self._record(self._store.drop, delivery.id, error)
            return None
        if tries >= self._rules.max_tries:
            await self._bury(delivery, f"gave up after {tries} tries: {error}")
            return None
        delay = retry_delay(
            tries, random.random(), first=self._rules.first_delay, cap=self._rules.max_delay
        )
        if not link.channel.idempotent:
            delivery = attrs.evolve(delivery, repeat=True)
        return await self._again(delivery, error, delay, counts=True)

    async def _again(
        self, delivery: Delivery, error: str, delay: float, *, counts: bool
    ) -> Delivery | None:
        if delivery.kind is ReplyKind.NOTICE:
            await self._record(self._store.drop, delivery.id, error)
            return None
        now = self._clock.now().wall
        not_before = now + int(delay * 1_000_000)
        tries = delivery.tries + counts
        delivery = attrs.evolve(delivery, tries=tries, not_before=as_datetime(not_before))
        await self._record(
            self._store.delayed, delivery.id, tries, not_before, error, delivery.repeat
        )
        self._events.emit(DeliveryDelayed(delivery=delivery, error=error, retry_in=delay))
        await trio.sleep(delay)
        return attrs.evolve(delivery, not_before=None)

    async def _bury(self, delivery: Delivery, error: str) -> None:
        await self._record(self._store.dead, delivery.id, delivery.tries + 1, error)
        self._events.emit(DeadLettered(delivery=delivery, error=error))

    async def _record(self, call: Callable[..., Awaitable[None]], *args: object) -> None:
        """Write until it is written: what was sent must not be sent again for a full disk."""
        tries = 0
        while True:
            try:
                await call(*args)
            except StoreClosed:
                raise
            except StoreError as error:
                tries += 1
                self._events.emit(StoreTrouble(operation="delivery", error=str(error)))
                await trio.sleep(retry_delay(tries, random.random(), cap=30.0))
            else:
                return

