"""Clients of the HTTP door that share no code with it: requests, event streams, a WebSocket.

    async with connected(address, token) as wire:
        answer = await wire.ask("POST", "/v1/sessions/ada/messages", {"text": "hi"})
        async for event in wire.events("/v1/sessions/ada/events?after=41"): ...

Whoever speaks to a process that is killed hears of it as `Gone`: the answer is not whole, and
nobody knows what became of the request. Every wait has an end.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import attrs
import h11
import trio
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

PATIENCE: Final = 60.0
"""Seconds that an answer may take on a busy machine."""

Address: TypeAlias = tuple[str, int]


class Gone(Exception):
    """The other side has closed, or never listened; what was asked may have been heard."""


@attrs.frozen
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Its body."""
        return json.loads(self.body)

    def __str__(self) -> str:
        return f"{self.status} {self.body[:300]!r}"


@attrs.frozen
class Told:
    """One event of a stream."""

    event: str
    data: Any
    id: int | None


class Refused(Exception):
    """Another answer than the stream that was asked for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer))
        self.answer = answer


async def connect(address: Address, token: str = "") -> Wire:
    """A connection of its own. Raises `Gone` where nobody listens."""
    return Wire(await _open(address), token)


@asynccontextmanager
async def connected(address: Address, token: str = "") -> AsyncGenerator[Wire, None]:
    """The same, for as long as the block lasts."""
    wire = await connect(address, token)
    try:
        yield wire
    finally:
        await wire.aclose()


async def _open(address: Address) -> trio.SocketStream:
    sock = trio.socket.socket()
    try:
        with trio.fail_after(PATIENCE):
            await sock.connect(address)
    except OSError as error:
        sock.close()
        raise Gone(f"nobody listens: {error}") from None
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


class Wire:
    """One connection, and the requests that go over it, one at a time."""

    def __init__(self, stream: trio.SocketStream, token: str) -> None:
        self._stream = stream
        self._token = token
        self._http = h11.Connection(h11.CLIENT)
        self.sent = False
        """Whether the last request has left as a whole: if nobody answers, it may be known."""

    async def aclose(self) -> None:
        """Hang up."""
        await trio.aclose_forcefully(self._stream)

    async def ask(
        self,
        method: str,
        target: str,
        fields: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Ask, and wait for the whole answer. `fields` become a body of JSON. Raises `Gone`."""
        data = body if body is not None else b"" if fields is None else json.dumps(fields).encode()
        with trio.fail_after(PATIENCE):
            await self._request(method, target, data, headers or {})
            head = await self._head()
            return await self._whole(head)

    async def events(
        self,
        target: str,
        *,
        method: str = "GET",
        fields: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Told, None]:
        """Ask for an event stream, and tell what comes, until it ends in order. Raises `Gone` when
        it ends otherwise, `Refused` for another answer. The longest silence is `PATIENCE`."""
        data = b"" if fields is None else json.dumps(fields).encode()
        with trio.fail_after(PATIENCE):
            await self._request(method, target, data, headers or {})
            head = await self._head()
            if head.status_code != 200:
                raise Refused(await self._whole(head))
        text = ""
        while True:
            with trio.fail_after(PATIENCE):
                event = await self._next()
            if isinstance(event, h11.EndOfMessage):
                return
            if isinstance(event, h11.Data):
                *blocks, text = (text + event.data.decode()).split("\n\n")
                for block in blocks:
                    if (told := _read(block)) is not None:
                        yield told

    async def _request(
        self, method: str, target: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        self.sent = False
        given = {"host": "localhost", "content-length": str(len(body)), **headers}
        if self._token:
            given["authorization"] = f"Bearer {self._token}"
        if self._http.our_state is h11.DONE:
            try:
                self._http.start_next_cycle()
            except h11.LocalProtocolError:
                raise Gone("it has said that it closes") from None
        request = h11.Request(method=method, target=target, headers=list(given.items()))
        parts: tuple[Any, ...] = (request, h11.Data(data=body), h11.EndOfMessage())
        try:
            pieces: list[bytes] = [self._http.send(part) or b"" for part in parts]
            sent = b"".join(pieces)
            await self._stream.send_all(sent)
        except (h11.LocalProtocolError, trio.BrokenResourceError, OSError) as error:
            raise Gone(f"it takes no request: {error}") from None
        self.sent = True

    async def _head(self) -> h11.Response:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event

    async def _whole(self, head: h11.Response) -> Answer:
        body = b""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                body += event.data
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in head.headers}
        return Answer(head.status_code, headers, body)

    async def _next(self) -> Any:
        while True:
            try:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    self._http.receive_data(await self._stream.receive_some())
                    continue
            except (h11.RemoteProtocolError, trio.BrokenResourceError, OSError) as error:
                raise Gone(f"in the middle of an answer: {error}") from None
            if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                raise Gone("closed instead of answering")
            return event


def _read(block: str) -> Told | None:
    """One event of a stream; None for a comment, and for what only sets the client's clock."""
    fields: dict[str, str] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        fields[name] = value.removeprefix(" ")
    if "data" not in fields:
        return None
    data = fields["data"]
    said = data if data == "[DONE]" else json.loads(data)
    number = int(fields["id"]) if "id" in fields else None
    return Told(fields.get("event", "message"), said, number)


# ----- WebSocket


@asynccontextmanager
async def conversing(address: Address, token: str) -> AsyncGenerator[Socket, None]:
    """A WebSocket. Raises `Gone`, also where the answer is not one."""
    stream = await _open(address)
    async with stream:
        socket = Socket(stream)
        with trio.fail_after(PATIENCE):
            await socket.shake_hands(token)
        yield socket


class Socket:
    """One WebSocket, of texts that are JSON. `code`: how the other side closed it, once it has."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._wire = WSConnection(ConnectionType.CLIENT)
        self._lock = trio.Lock()
        self._heard: deque[ws.Event] = deque()
        self._text = ""
        self.code: int | None = None

    async def shake_hands(self, token: str) -> None:
        """Become a WebSocket. Raises `Gone`."""
        head = [(b"authorization", b"Bearer " + token.encode())]
        await self._send(ws.Request(host="localhost", target="/v1/ws", extra_headers=head))
        event = await self._next()
        if not isinstance(event, ws.AcceptConnection):
            raise Gone(f"no WebSocket: {event}")

    async def say(self, **fields: Any) -> None:
        """Send one object. Raises `Gone`."""
        await self._send(ws.TextMessage(json.dumps(fields)))

    async def hear(self) -> AsyncGenerator[dict[str, Any], None]:
        """What comes, until the other side closes in order. Raises `Gone` if it does otherwise."""
        while True:
            event = await self._next()
            if isinstance(event, ws.TextMessage):
                self._text += event.data
                if event.message_finished:
                    text, self._text = self._text, ""
                    yield json.loads(text)
            elif isinstance(event, ws.Ping):
                await self._send(event.response())
            elif isinstance(event, ws.CloseConnection):
                self.code = int(event.code)
                return

    async def _send(self, event: ws.Event) -> None:
        try:
            async with self._lock:
                await self._stream.send_all(self._wire.send(event))
        except (LocalProtocolError, trio.BrokenResourceError, OSError) as error:
            raise Gone(f"it takes nothing: {error}") from None

    async def _next(self) -> ws.Event:
        """Pings come every 20 s, so that silence for `PATIENCE` is the end."""
        while not self._heard:
            try:
                with trio.fail_after(PATIENCE):
                    data = await self._stream.receive_some()
                if not data:
                    raise Gone("closed without a word")
                self._wire.receive_data(bytes(data))
                self._heard.extend(self._wire.events())
            except (RemoteProtocolError, trio.BrokenResourceError, OSError) as error:
                raise Gone(f"in the middle: {error}") from None
        return self._heard.popleft()
