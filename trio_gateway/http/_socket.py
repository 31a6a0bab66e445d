"""`/v1/ws`: the same messages and events over one WebSocket. One JSON object per text frame.

    in   {"type":"hello","session":"ada","last":41}     follow a session, from behind a place
         {"type":"message","session":"ada","id":"m1","text":"hi","sender"?}
    out  {"type":"welcome","session","seq"}
         {"type":"gap","session","from","to"}           what was asked for and is forgotten
         {"type":"ack","session","id","status":"accepted"|"duplicate"}
         {"type":"event","session","event","seq",...}   what happened; see the event stream
         {"type":"progress","session","turn","text",...}
         {"type":"error","error":{"type","message"},"id"?}

`ack` comes after the commit: a message without one is to be sent again, under the same id. When the
gateway stops, the connection is closed with 1012 (service restart).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
import trio
from starlette.websockets import WebSocket

from .._messages import Message, SessionKey
from ._events import LARGEST, follow
from ._house import House
from ._messages import accept
from ._problem import Problem, problem_of
from ._request import as_object, only, text_of

RESTART: Final = 1012
SESSIONS: Final = 100
"""Sessions that one connection follows at the most."""


async def talk(house: House, socket: WebSocket) -> None:
    """Serve one WebSocket that was let in."""
    await socket.accept()
    conversation = _Conversation(house, socket)
    async with trio.open_nursery() as nursery:
        conversation.nursery = nursery
        nursery.start_soon(conversation.end_with_the_gateway)
        await conversation.listen()
        nursery.cancel_scope.cancel()


class _Conversation:
    def __init__(self, house: House, socket: WebSocket) -> None:
        self._house = house
        self._socket = socket
        self._following: set[SessionKey] = set()
        self._lock = trio.Lock()
        self._told: set[SessionKey] = set()
        self._all_told = trio.Event()
        self.nursery: trio.Nursery

    async def end_with_the_gateway(self) -> None:
        """Close in order when the gateway stops, once all followers have caught up."""
        await self._house.closing.wait()
        if self._following - self._told:
            with trio.move_on_after(1):
                await self._all_told.wait()
        async with self._lock:
            await self._socket.close(RESTART, "the gateway restarts")
        self.nursery.cancel_scope.cancel()

    async def listen(self) -> None:
        """Take what comes, until the client goes."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            await self._take(message.get("text"))

    async def _take(self, text: str | None) -> None:
        fields: Mapping[str, Any] = {}
        try:
            if text is None:
                raise Problem(422, "invalid", "expected a frame of text, got one of bytes")
            fields = as_object(text.encode("utf-8", "replace"))
            await self._obey(dict(fields))
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            said: dict[str, Any] = {"error": {"type": problem.kind, "message": problem.message}}
            if isinstance(fields.get("id"), str):
                said["id"] = fields["id"]
            await self._say("error", said)

    async def _obey(self, fields: dict[str, Any]) -> None:
        match fields.pop("type", None):
            case "hello":
                await self._hello(fields)
            case "message":
                await self._message(fields)
            case other:
                raise Problem(422, "invalid", f'type: expected "hello" or "message", got {other!r}')

    async def _hello(self, fields: dict[str, Any]) -> None:
        only(fields, "session", "last")
        session = self._house.session(text_of(fields, "session"))
        if session in self._following:
            raise Problem(422, "invalid", f"session {session} is followed already")
        if len(self._following) >= SESSIONS:
            raise Problem(429, "too_many", f"at most {SESSIONS} sessions on one connection")
        oldest, newest = await self._house.span(session)
        last = fields.get("last")
        if last is not None and (type(last) is not int or not 0 <= last <= LARGEST):
            raise Problem(422, "invalid", "last: expected the seq of the last event, or null")
        after = newest if last is None else min(last, newest)
        self._following.add(session)
        await self._say("welcome", {"session": str(session), "seq": after})
        if after + 1 < oldest:
            gap = {"session": str(session), "from": after + 1, "to": oldest - 1}
            await self._say("gap", gap)
        self.nursery.start_soon(self._follow, session, after)

    async def _message(self, fields: dict[str, Any]) -> None:
        only(fields, "session", "id", "text", "sender")
        session = self._house.session(text_of(fields, "session"))
        if session.channel != self._house.channel:
            raise Problem(422, "invalid", f"session {session} belongs to another channel")
        sender = fields.get("sender")
        receipt = await accept(
            self._house,
            Message(
                session=session.name,
                id=text_of(fields, "id"),
                text=text_of(fields, "text"),
                sender=None if sender is None else text_of(fields, "sender"),
                channel=session.channel,
            ),
        )
        await self._say(
            "ack", {"session": str(session), "id": receipt.id, "status": receipt.status.value}
        )

    async def _follow(self, session: SessionKey, after: int) -> None:
        name = str(session)

        async def tell(event: str, said: Mapping[str, Any], seq: int | None) -> None:
            kind = {"event": event} if seq is not None else {}
            await self._say(
                "progress" if seq is None else "event", {"session": name, **kind, **said}
            )

        # Hypercorn's pings are the heartbeat.
        await follow(self._house, session, after, tell, trio.lowlevel.checkpoint)
        self._told.add(session)
        if self._told >= self._following:
            self._all_told.set()

    async def _say(self, kind: str, fields: dict[str, Any]) -> None:
        async with self._lock:
            await self._socket.send_text(orjson.dumps({"type": kind, **fields}).decode())
