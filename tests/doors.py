"""What the tests of the HTTP door share: a gateway behind a real socket, a client, streams."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import h11
import httpx2
import trio

from trio_gateway import Agent, Gateway, Settings, open_gateway
from trio_gateway.http import HttpChannel, HttpSettings

TOKEN = "t0ken-of-the-tests-0123456789"
PATIENCE = 20.0


@attrs.define
class Door:
    """A gateway behind a real socket, and a client that has its token."""

    gateway: Gateway
    channel: HttpChannel
    client: httpx2.AsyncClient

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.channel.addresses[0]

    @property
    def address(self) -> tuple[str, int]:
        """The same, for a socket."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    async def post(self, session: str, text: str, **more: Any) -> httpx2.Response:
        """Hand in a message; `headers` among `more`, the rest are fields of the body."""
        headers = more.pop("headers", {})
        path = f"/v1/sessions/{session}/messages"
        return await self.client.post(path, json={"text": text, **more}, headers=headers)


@asynccontextmanager
async def open_door(
    where: Path,
    agent: Agent,
    *,
    http: HttpSettings | None = None,
    settings: Settings | None = None,
    hook_secret: bytes | None = None,
    **more: Any,
) -> AsyncGenerator[Door, None]:
    """Host `agent` behind HTTP on a free port."""
    chosen = attrs.evolve(http or HttpSettings(), bind="127.0.0.1:0")
    channel = HttpChannel(chosen, token=TOKEN, hook_secret=hook_secret)
    async with open_gateway(
        agent, store=where / "gateway.db", channels=[channel], settings=settings, **more
    ) as gateway:
        with trio.fail_after(PATIENCE):
            await channel.serving.wait()
        async with client_of(channel.addresses[0]) as client:
            yield Door(gateway, channel, client)


def client_of(url: str, token: str = TOKEN) -> httpx2.AsyncClient:
    """A client that has the token."""
    headers = {"authorization": f"Bearer {token}"}
    return httpx2.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)


@attrs.define
class Told:
    """One event of a stream."""

    event: str
    data: Any
    id: int | None = None


@asynccontextmanager
async def events_of(
    client: httpx2.AsyncClient, session: str, after: int | None = None
) -> AsyncGenerator[AsyncIterator[Told], None]:
    """Follow a session, over a connection of its own; `after` is the last id that was seen."""
    async with stream_of(client, f"/v1/sessions/{session}/events", after) as events:
        yield events


@asynccontextmanager
async def stream_of(
    client: httpx2.AsyncClient, target: str, after: int | None = None
) -> AsyncGenerator[AsyncIterator[Told], None]:
    """Follow any event stream."""
    url = client.base_url
    headers = {"host": url.netloc.decode(), "authorization": client.headers["authorization"]}
    if after is not None:
        headers["last-event-id"] = str(after)
    stream = await trio.open_tcp_stream(url.host, url.port or 80)
    async with stream:
        wire = h11.Connection(h11.CLIENT)
        request = h11.Request(method="GET", target=target, headers=list(headers.items()))
        await stream.send_all(wire.send(request) or b"")
        await stream.send_all(wire.send(h11.EndOfMessage()) or b"")
        events = _Events(stream, wire)
        while not events.begun:
            await events._receive()
        yield events


class _Events:
    """Reads an event stream. Ends in order only if the server ended it in order."""

    def __init__(self, stream: trio.SocketStream, wire: h11.Connection) -> None:
        self._stream = stream
        self._wire = wire
        self._text = ""
        self.begun = False
        self._ended = False

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Told:
        with trio.fail_after(PATIENCE):
            while True:
                block, blank, rest = self._text.partition("\n\n")
                if blank:
                    self._text = rest
                    if (one := _read(block)) is not None:
                        return one
                elif self._ended:
                    raise StopAsyncIteration
                else:
                    await self._receive()

    async def _receive(self) -> None:
        event = self._wire.next_event()
        if event is h11.NEED_DATA:
            self._wire.receive_data(await self._stream.receive_some())
        elif isinstance(event, h11.Response):
            assert event.status_code == 200, event
            self.begun = True
        elif isinstance(event, h11.Data):
            self._text += event.data.decode()
        elif isinstance(event, h11.EndOfMessage):
            self._ended = True


def _read(block: str) -> Told | None:
    """One event; None for a comment."""
    lines = [line for line in block.splitlines() if not line.startswith((":", "retry"))]
    fields = {name: value for name, _, value in (line.partition(": ") for line in lines)}
    if "event" not in fields:
        return None
    seq = int(fields["id"]) if "id" in fields else None
    return Told(fields["event"], json.loads(fields["data"]), seq)


async def read_until(events: AsyncIterator[Told], event: str) -> list[Told]:
    """All events up to the first of that name; without progress, which may be dropped."""
    seen: list[Told] = []
    async for one in events:
        if one.event != "progress":
            seen.append(one)
        if one.event == event:
            return seen
    raise AssertionError(f"the stream ended without {event}: {seen}")


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
