"""The WebSocket of the HTTP door: frames that are none, nearly one, or one with odd things in it.
Each text that is a frame is answered once; what is no frame ends the connection, and no other."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from typing import Any, Final

import trio
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from ._bad_http_inputs import TOKEN
from ._bad_lives import Batch
from ._inputs import as_line, as_table, broken, drawn, endless, json_value, odd_fields

PATIENCE: Final = 60.0
ANSWERS: Final = ("ack", "error", "welcome")


async def frames(batch: Batch, address: tuple[str, int]) -> None:
    """A tenth of the batch again, as frames, over a few connections."""
    dice, left = batch.dice, max(4, batch.size // 10)
    fields = endless(drawn(odd_fields, max(8, left // 4), batch.draw_seed()), dice)
    values = endless(drawn(json_value, max(8, left // 4), batch.draw_seed()), dice)
    while left > 0:
        async with await trio.open_tcp_stream(*address) as stream:
            talk = _Talk(batch, stream)
            await talk.shake_hands()
            for _ in range(dice.randrange(5, 40)):
                left -= 1
                frame = next(fields) if dice.random() < 0.7 else next(values)
                await talk.say(_text_of(frame, dice))
            await talk.break_off(dice)


def _text_of(fields: Any, dice: random.Random) -> str:
    table = as_table(fields)
    if table is not None:
        kind = dice.choice(("message", "message", "hello", "hello", "bye", None))
        fields = {"type": kind, **table}
        if kind == "hello" and dice.random() < 0.7:
            last = dice.choice((0, None, -1, True, "0", 10**30))
            fields = {"type": kind, "session": table.get("session", "ada"), "last": last}
    data = as_line(fields, dice)
    if dice.random() < 0.2:
        data = broken(data, dice)
    return data.decode("utf-8", "replace")


class _Talk:
    """One connection."""

    def __init__(self, batch: Batch, stream: trio.SocketStream) -> None:
        self._batch = batch
        self._stream = stream
        self._wire = WSConnection(ConnectionType.CLIENT)
        self._text = ""
        self._ended = False

    async def shake_hands(self) -> None:
        """Become a WebSocket."""
        head = [(b"authorization", b"Bearer " + TOKEN.encode())]
        request = ws.Request(host="localhost", target="/v1/ws", extra_headers=head)
        await self._stream.send_all(self._wire.send(request))
        event = await self._next()
        assert isinstance(event, ws.AcceptConnection), f"no WebSocket: {event}"

    async def say(self, text: str) -> None:
        """One text, which has one answer; a text that is too long may end the connection."""
        if self._ended:
            return
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(self._wire.send(ws.TextMessage(text)))
        while True:
            said = await self._hear()
            if said is None:
                self._ended = True
                assert len(text) > 1_000_000, f"the connection ended after {text[:300]!r}"
                self._batch.input("frame closed")
                return
            if said["type"] in ANSWERS:
                break
        if said["type"] == "error":
            assert said["error"]["message"].strip(), said
            assert said["error"]["type"] not in ("failed", ""), said
        self._batch.input(f"frame {said['type']}")

    async def break_off(self, dice: random.Random) -> None:
        """Bytes that are no frame: the connection ends."""
        if self._ended:
            return
        good = self._wire.send(ws.TextMessage('{"type": "message"}'))
        way = dice.random()
        data = broken(good, dice) if way < 0.5 else dice.randbytes(dice.randrange(1, 300))
        if way > 0.9:
            data = self._wire.send(ws.BytesMessage(b"\0\1"))
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(data)
            await self._stream.send_eof()
        while await self._hear() is not None:
            pass
        self._batch.input("frame broken")

    async def _hear(self) -> dict[str, Any] | None:
        """The next object; None: the connection has ended."""
        while True:
            event = await self._next()
            if event is None or isinstance(event, ws.CloseConnection):
                return None
            if isinstance(event, ws.TextMessage):
                self._text += event.data
                if event.message_finished:
                    text, self._text = self._text, ""
                    said: dict[str, Any] = json.loads(text)
                    return said

    async def _next(self) -> ws.Event | None:
        with trio.fail_after(PATIENCE):
            while True:
                for event in self._wire.events():
                    return event
                try:
                    data = await self._stream.receive_some()
                    if not data:
                        return None
                    self._wire.receive_data(bytes(data))
                except (
                    RemoteProtocolError, LocalProtocolError, trio.BrokenResourceError
                ):  # fmt: skip
                    return None
