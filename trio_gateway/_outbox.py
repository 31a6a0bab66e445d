"""The outbox: committed replies on their way. Every text that anybody says goes through here.

    settle, say, notice, command     committed: the row is in the store
              |
        a lane per session           in order, one delivery at a time; a retry waits here
              |
        senders of the channel       as many at once as the limit allows, first come first served
              |
        channel.send                 under the delivery's stable key
              |
        the recorder                 "delivered", for all that arrived meanwhile in one write

A lane is in memory while its session has something to deliver. A destination that has to wait
delays nobody else: its lane waits beside, without a sender.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import attrs
import trio

from ._clock import Clock, as_datetime
from ._errors import (
    ChannelEnded,
    RetryLater,
    StoreClosed,
    StoreError,
    Undeliverable,
    shown,
    words_of,
)
from ._events import DeadLettered, Delivered, DeliveryDelayed, StoreTrouble
from ._links import Link, Links
from ._messages import Delivery, ReplyKind, SessionKey
from ._policy import DeliveryRules, retry_delay
from ._sessions import Sessions
from ._strangers import theirs
from ._stream import EventStream
from ._tracing import Tracer
from .store import Store

NOTICE_TIMEOUT: Final = 2.0
"""Seconds that a notice may hold up the replies behind it."""

LONGEST_WAIT: Final = 86_400.0
"""Seconds that a delivery waits at the most: the wall clock may have jumped since it was told to,
and a platform can say anything."""

SHORTEST_WAIT: Final = 0.1
"""Seconds that it waits at the least: no platform is asked again in a tight loop."""


@attrs.define(eq=False)
class _Lane:
    """What one session has to deliver, in order. `held`: its first delivery is with a sender, or
    waits for its next try."""

    session: SessionKey
    queue: list[Delivery] = attrs.field(factory=list[Delivery])
    held: bool = False

    def add(self, delivery: Delivery) -> None:
        """In the order of the commits: those who wait for one transaction are woken in any order,
        and a /stop must not be answered before what was said until then."""
        at = len(self.queue)
        while at > self.held and self.queue[at - 1].id > delivery.id:
            at -= 1
        self.queue.insert(at, delivery)


@attrs.define(eq=False)
class _Wire:
    """The senders of one channel, and the lanes that wait for one."""

    link: Link
    at_once: int
    ready: deque[_Lane] = attrs.field(factory=deque[_Lane])
    idle: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)
    senders: int = 0


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
        tracer: Tracer,
        at_once: int,
        *,
        on_end: Callable[[str], None],
        on_quiet: Callable[[], None],
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._events = events
        self._rules = rules
        self._clock = clock
        self._tracer = tracer
        self._on_end = on_end
        self._on_quiet = on_quiet
        self._wires = {name: _Wire(links[name], at_once) for name in links.names}
        self._lanes: dict[SessionKey, _Lane] = {}
        self._nursery: trio.Nursery | None = None
        self._arrivals: list[Delivery] = []
        self._arrived = trio.Event()
        self._emptied: trio.Event | None = None
        self._sending = 0
        self._rested: trio.Event | None = None
        self.undelivered: int = 0
        """Deliveries that have not arrived, or whose arrival is not recorded."""

    async def run(self) -> None:
        """Deliver until cancelled. What has arrived by then is recorded all the same."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for wire in self._wires.values():
                    for _ in range(min(len(wire.ready), wire.at_once)):
                        self._add_sender(wire, nursery)
                await self._record_arrivals()
        finally:
            self._nursery = None
            if self._arrivals:
                # One try, which a cancellation does not keep from being made: a disk that stays
                # full must not keep the gateway.
                with trio.move_on_after(0, shield=True):
                    await self._record(self._arrivals)

    def use(self, rules: DeliveryRules, at_once: int) -> None:
        """Deliver by these rules from now on, with so many senders for each channel."""
        self._rules = rules
        for wire in self._wires.values():
            wire.at_once = at_once
            if self._nursery is not None:
                for _ in range(min(len(wire.ready), at_once - wire.senders)):
                    self._add_sender(wire, self._nursery)

    async def wait_empty(self) -> None:
        """Wait until nothing is left to deliver, and every arrival is recorded."""
        while self.undelivered:
            if self._emptied is None:
                self._emptied = trio.Event()
            await self._emptied.wait()

    async def wait_sent(self) -> None:
        """Wait until no reply is being sent or could be. What waits for its next try, or for its
        channel, is not in flight; a notice is not worth a wait."""
        while self._is_at_work():
            if self._rested is None:
                self._rested = trio.Event()
            await self._rested.wait()

    def _is_at_work(self) -> bool:
        return self._sending > 0 or any(
            wire.link.connected.value
            and any(lane.queue[0].kind is not ReplyKind.NOTICE for lane in wire.ready)
            for wire in self._wires.values()
        )

    def _note_rest(self) -> None:
        if self._rested is not None and not self._is_at_work():
            self._rested.set()
            self._rested = None

    def put(self, deliveries: Iterable[Delivery]) -> None:
        """Send these on their way, behind what their session has waiting. They are committed."""
        for delivery in deliveries:
            wire = self._wires.get(delivery.session.channel)
            if wire is None or wire.link.channel.pulled:
                # The host's own, for whom committed is delivered, as it is for whoever fetches what
                # is said; or a channel of another time, whose replies wait in the store until a
                # gateway has it again.
                continue
            self.undelivered += 1
            lane = self._lanes.get(delivery.session)
            if lane is None:
                lane = self._lanes[delivery.session] = _Lane(delivery.session)
                self._sessions.get(delivery.session).deliveries = 1
                lane.add(delivery)
                self._line_up(wire, lane)
            else:
                lane.add(delivery)

    # ----- lanes and senders

    def _line_up(self, wire: _Wire, lane: _Lane) -> None:
        """The lane's first delivery can be sent: wake a sender, or add one."""
        lane.held = False
        wire.ready.append(lane)
        if wire.idle:
            wire.idle.unpark()
        elif self._nursery is not None and wire.senders < wire.at_once:
            self._add_sender(wire, self._nursery)

    def _add_sender(self, wire: _Wire, nursery: trio.Nursery) -> None:
        wire.senders += 1
        nursery.start_soon(self._send_on, wire, name=f"sender of {wire.link.name}")

    async def _send_on(self, wire: _Wire) -> None:
        """A sender: the first delivery of one lane after the other, until it is one too many."""
        while wire.senders <= wire.at_once:
            self._note_rest()
            if not wire.link.connected.value:
                await wire.link.wait_connected()
            if wire.ready:
                # What was committed together is put together, by tasks that all run before this
                # one runs again: only then is it certain what a lane's first delivery is.
                await trio.lowlevel.cancel_shielded_checkpoint()
            if wire.ready:
                await self._send_first(wire, wire.ready.popleft())
            else:
                await wire.idle.park()
        wire.senders -= 1
        wire.idle.unpark()  # it may have been woken for a lane, which needs another one then

    async def _send_first(self, wire: _Wire, lane: _Lane) -> None:
        lane.held = True
        delivery = lane.queue[0]
        if delivery.not_before is not None:
            self._wait_until_due(wire, lane, delivery)
            return
        in_flight = delivery.kind is not ReplyKind.NOTICE
        self._sending += in_flight
        try:
            await self._try(wire, lane, delivery)
        finally:
            self._sending -= in_flight

    async def _try(self, wire: _Wire, lane: _Lane, delivery: Delivery) -> None:
        if not wire.link.channel.idempotent:
            await self._until_written(self._store.sending, delivery.id)
        try:
            sent = await self._send(wire.link, delivery)
        except BaseException as error:  # noqa: ASYNC103 - it raises what is not the channel's
            # What a channel says counts also where it comes out of a nursery, in a group.
            fault = theirs(error)
            await self._not_sent(wire, lane, delivery, fault)  # noqa: ASYNC102
        else:
            if sent:
                self._note_arrival(wire, lane, delivery)
            else:
                await self._failed(wire, lane, delivery, "the channel took too long")

    async def _send(self, link: Link, delivery: Delivery) -> bool:
        notice = delivery.kind is ReplyKind.NOTICE
        timeout = NOTICE_TIMEOUT if notice else self._rules.timeout
        with self._tracer.deliver(delivery) as span:
            with trio.CancelScope(relative_deadline=timeout) as scope:
                await link.channel.send(delivery)
            if scope.cancelled_caught:
                span.cancelled("time_limit")
        return not scope.cancelled_caught

    def _next(self, wire: _Wire, lane: _Lane) -> None:
        """The lane's first delivery is over with: its next one can go, behind the other lanes."""
        del lane.queue[0]
        if lane.queue:
            self._line_up(wire, lane)
            return
        del self._lanes[lane.session]
        session = self._sessions.find(lane.session)
        if session is not None:
            session.deliveries = 0
            self._sessions.let_go(session)

    def _over(self, count: int) -> None:
        """So many deliveries are done with, on disk too."""
        self.undelivered -= count
        if not self.undelivered:
            if self._emptied is not None:
                self._emptied.set()
                self._emptied = None
            self._on_quiet()

    # ----- arrived

    def _note_arrival(self, wire: _Wire, lane: _Lane, delivery: Delivery) -> None:
        self._arrivals.append(delivery)
        self._arrived.set()
        self._next(wire, lane)

    async def _record_arrivals(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            if self._arrivals:
                await self._record(self._arrivals)

    async def _record(self, arrivals: list[Delivery]) -> None:
        """Write that these have arrived; what arrives meanwhile is for the next time."""
        self._arrivals = []
        pairs = [(delivery.id, delivery.tries + 1) for delivery in arrivals]
        try:
            await self._until_written(self._store.delivered, pairs)
        except trio.Cancelled:
            self._arrivals = arrivals + self._arrivals  # for the last try, on the way out
            raise
        if self._events.heard:
            for delivery in arrivals:
                self._events.emit(Delivered(delivery=delivery))
        self._over(len(arrivals))

    # ----- did not arrive

    async def _not_sent(
        self, wire: _Wire, lane: _Lane, delivery: Delivery, error: BaseException
    ) -> None:
        if isinstance(error, ChannelEnded):
            # Nobody is there any more: it stays in the store, and the gateway is asked to stop.
            self._on_end(wire.link.name)
        elif isinstance(error, RetryLater):
            after = _wait_asked_for(error)
            await self._again(wire, lane, delivery, words_of(error), after, counts=False)
        elif isinstance(error, Undeliverable):
            await self._bury(wire, lane, delivery, words_of(error))
        else:
            await self._failed(wire, lane, delivery, shown(error))

    async def _failed(self, wire: _Wire, lane: _Lane, delivery: Delivery, error: str) -> None:
        tries = delivery.tries + 1
        if tries >= self._rules.max_tries:
            await self._bury(wire, lane, delivery, f"gave up after {tries} tries: {error}")
            return
        delay = retry_delay(
            tries, random.random(), first=self._rules.first_delay, cap=self._rules.max_delay
        )
        if not wire.link.channel.idempotent:
            delivery = attrs.evolve(delivery, repeat=True)
        await self._again(wire, lane, delivery, error, delay, counts=True)

    async def _again(
        self,
        wire: _Wire,
        lane: _Lane,
        delivery: Delivery,
        error: str,
        delay: float,
        *,
        counts: bool,
    ) -> None:
        if delivery.kind is ReplyKind.NOTICE:
            await self._until_written(self._store.drop, delivery.id, error)
            self._next(wire, lane)
            self._over(1)
            return
        not_before = self._clock.now().wall + int(delay * 1_000_000)
        lane.queue[0] = delivery = attrs.evolve(
            delivery, tries=delivery.tries + counts, not_before=as_datetime(not_before)
        )
        await self._until_written(
            self._store.delayed, delivery.id, delivery.tries, not_before, error, delivery.repeat
        )
        self._events.emit(
            DeliveryDelayed(delivery=_without_text(delivery), error=error, retry_in=delay)
        )
        self._wait_beside(wire, lane, delay)

    def _wait_until_due(self, wire: _Wire, lane: _Lane, delivery: Delivery) -> None:
        """Found at boot with a time before which it is not to be tried."""
        assert delivery.not_before is not None
        wait = (delivery.not_before - as_datetime(self._clock.now().wall)).total_seconds()
        self._wait_beside(wire, lane, min(max(wait, 0.0), LONGEST_WAIT))

    def _wait_beside(self, wire: _Wire, lane: _Lane, delay: float) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(self._come_back, wire, lane, delay)

    async def _come_back(self, wire: _Wire, lane: _Lane, delay: float) -> None:
        await trio.sleep(delay)
        lane.queue[0] = attrs.evolve(lane.queue[0], not_before=None)
        self._line_up(wire, lane)

    async def _bury(self, wire: _Wire, lane: _Lane, delivery: Delivery, error: str) -> None:
        if delivery.kind is ReplyKind.NOTICE:
            await self._until_written(self._store.drop, delivery.id, error)
        else:
            await self._until_written(self._store.dead, delivery.id, delivery.tries + 1, error)
            self._events.emit(DeadLettered(delivery=_without_text(delivery), error=error))
        self._next(wire, lane)
        self._over(1)

    async def _until_written(self, call: Callable[..., Awaitable[None]], *args: object) -> None:
        """Write until it is written: what was sent must not be sent again for a full disk."""
        tries = 0
        while True:
            try:
                await call(*args)
            except StoreClosed:
                # Turns that do not end keep the gateway from ending us, and it leaves without us.
                await trio.sleep_forever()
            except StoreError as error:
                tries += 1
                self._events.emit(StoreTrouble(operation="delivery", error=str(error)))
                await trio.sleep(retry_delay(tries, random.random(), cap=30.0))
            else:
                return


def _wait_asked_for(error: RetryLater) -> float:
    """Seconds: what a platform asks for, within reason; what is no number is the shortest wait."""
    try:
        after = float(getattr(error, "after", 0.0))
    except (TypeError, ValueError, OverflowError):
        return SHORTEST_WAIT
    # In this order, NaN is the shortest wait, too.
    return min(max(SHORTEST_WAIT, after), LONGEST_WAIT)


def _without_text(delivery: Delivery) -> Delivery:
    return attrs.evolve(delivery, text="")
