"""Who listens at the HTTP door, across all lives of its process: over event streams that go on
behind the last event that was seen, and over a WebSocket, which also takes messages.

Each keeps what it was told. That this is the session's journal, all of it, in order and once, is
checked in `_door_account`, when everything has ended.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import Any, Final

import attrs
import trio

from ._door_people import Person, Town
from ._door_wire import Gone, Refused, Socket, connected, conversing

NOT_KEPT: Final = ("hello", "progress", "gap", "end")
RESTARTS: Final = 1012


@attrs.define(eq=False)
class Log:
    """What somebody who follows one session was told, in order."""

    town: Town
    session: str
    events: list[tuple[int, str, dict[str, Any]]] = attrs.field(
        factory=list[tuple[int, str, dict[str, Any]]]
    )

    @property
    def last(self) -> int:
        """The place of the newest event that was seen."""
        return self.events[-1][0] if self.events else 0

    def take(self, seq: int, event: str, data: dict[str, Any]) -> None:
        """One event."""
        if seq <= self.last:
            self.town.complain(f"{self.session}: told {event} {seq} after {self.last}")
        if event == "settled":
            self.town.settled.add(data["id"])
        self.events.append((seq, event, data))
        self.town.figures["events"] += 1

    def goes_on(self, place: int) -> None:
        """A stream says where it begins."""
        if place != self.last:
            self.town.complain(f"{self.session}: goes on at {place}, {self.last} was the last")
        self.town.figures["streams"] += 1


@attrs.define(eq=False)
class Follower:
    """Follows one session over an event stream."""

    town: Town
    session: str
    log: Log = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.log = Log(self.town, self.session)

    async def live(self) -> None:
        """Follow until all is over."""
        while not self.town.over:
            try:
                await self._follow()
            except Gone:
                if not self.town.over:
                    await self.town.wait_a_moment()
            except Refused as refused:
                self.town.turned_away(f"who follows {self.session}", refused.answer)
                await self.town.wait_a_moment()

    async def _follow(self) -> None:
        target, headers = f"/v1/sessions/{self.session}/events", dict[str, str]()
        if self.log.last and self.town.dice.random() < 0.7:
            headers["last-event-id"] = str(self.log.last)
        else:
            target += f"?after={self.log.last}"
        leaves_after = self.town.dice.choice((5, 50, 10_000))
        async with connected(self.town.address, self.town.token) as wire:
            events = wire.events(target, headers=headers)
            async with aclosing(events):
                await self._listen(events, leaves_after)

    async def _listen(self, events: Any, leaves_after: int) -> None:
        heard, last = 0, ""
        async for one in events:
            heard, last = heard + 1, one.event
            if one.event == "hello":
                self.log.goes_on(one.data["seq"])
            elif one.event == "gap":
                self.town.complain(f"{self.session}: a gap, {one.data}")
            elif one.event not in NOT_KEPT:
                if one.id != one.data["seq"]:
                    self.town.complain(f"{self.session}: {one}")
                self.log.take(one.data["seq"], one.event, one.data)
            if heard >= leaves_after and not self.town.over:
                self.town.seen["a follower that left, and came back"] += 1
                return
        if last != "end" or not self.town.leaves:
            self.town.complain(f"{self.session}: the stream ended with {last!r}")
        self.town.seen["a stream that ended in order"] += 1


@attrs.define(eq=False)
class Talker(Person):
    """One WebSocket: follows its sessions, and sends messages."""

    logs: dict[str, Log] = attrs.field(init=False)
    acks: dict[str, trio.Event] = attrs.field(factory=dict[str, trio.Event])
    todo: str | None = None
    """What nobody has acknowledged."""

    def __attrs_post_init__(self) -> None:
        self.logs = {session: Log(self.town, session) for session in self.sessions}

    async def live(self) -> None:
        """Talk until closing time, then listen until all is over."""
        while not self.town.over:
            try:
                async with conversing(self.town.address, self.town.token) as socket:
                    await self._converse(socket)
            except Gone:
                if not self.town.over:
                    await self.town.wait_a_moment()

    async def _converse(self, socket: Socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak, socket, nursery.cancel_scope)
            in_order = await self._listen(socket)
            nursery.cancel_scope.cancel()
        if not in_order:
            await self.town.wait_a_moment()
            return
        if socket.code != RESTARTS or not self.town.leaves:
            self.town.complain(f"{self.name}: closed with {socket.code}")
        self.town.seen["a WebSocket closed with 1012"] += 1

    async def _listen(self, socket: Socket) -> bool:
        """Whether it ended in order."""
        said = socket.hear()
        try:
            async with aclosing(said):
                async for one in said:
                    self._heard(one)
        except Gone:
            return False
        return True

    async def _speak(self, socket: Socket, scope: trio.CancelScope) -> None:
        try:
            for session, log in self.logs.items():
                await socket.say(type="hello", session=session, last=log.last)
            if self.todo is not None:
                await self._deliver(socket, self.todo)
            while await self.town.think():
                id, session, text = self.next_message()
                self.todo = id
                self.town.noted(id, session, text)
                await self._deliver(socket, id)
        except Gone:
            scope.cancel()

    async def _deliver(self, socket: Socket, id: str) -> None:
        """Until it is acknowledged, or the connection has ended."""
        sent = self.town.sent[id]
        self.acks[id] = trio.Event()
        self.town.figures["requests"] += 1
        self.town.leaving()
        await socket.say(
            type="message", session=sent.session, id=id, text=sent.text, sender=self.name
        )
        sent.unanswered += 1  # until it is
        await self.acks[id].wait()
        self.todo = None

    def _heard(self, one: dict[str, Any]) -> None:
        kind, session = one["type"], one.get("session", "").removeprefix("http:")
        if kind == "welcome":
            self.logs[session].goes_on(one["seq"])
        elif kind == "event":
            self.logs[session].take(one["seq"], one["event"], one)
        elif kind == "ack":
            self._acknowledged(one)
        elif kind == "error" and self.town.leaves:
            self.town.figures["turned_away"] += 1
        elif kind != "progress":
            self.town.complain(f"{self.name}: {one}")

    def _acknowledged(self, one: dict[str, Any]) -> None:
        sent = self.town.sent[one["id"]]
        sent.unanswered -= 1
        self.town.acknowledge(one["id"], one["status"])
        self.mine.append(one["id"])
        self.acks[one["id"]].set()
