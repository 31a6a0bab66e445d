"""`GET /v1/sessions/{key}/events`: what happens in a session, as Server-Sent Events.

Every event from the journal has its place as its id; a client that comes back with `Last-Event-ID`
goes on behind it, also after a crash. `progress` has no id: it is gone when it is over. `hello`
comes first, with the place where the stream begins; `gap` where what is asked for is forgotten;
`end` last, when the gateway stops.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import orjson
import trio
from starlette.requests import Request

from .._events import ProgressShown
from .._messages import SessionKey
from ._follow import Bell, told
from ._house import House
from ._request import as_number

Send = Callable[[Any], Awaitable[None]]
Tell = Callable[[str, Mapping[str, Any], int | None], Awaitable[None]]
"""Tells one event: its name, what there is to say, its place if it has one."""

HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
RETRY_MS: Final = 1000

LARGEST: Final = 2**62


def frame(event: str, data: Any, seq: int | None = None) -> bytes:
    """One event as it goes over the wire."""
    place = b"" if seq is None else b"id: %d\n" % seq
    return place + b"event: " + event.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


async def stream(request: Request, send: Send, body: Callable[[Send], Awaitable[None]]) -> None:
    """Send an event stream: `body` writes it, until it returns or the client has gone."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, request, nursery.cancel_scope)
        await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})

        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        await body(write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        nursery.cancel_scope.cancel()


async def watch(request: Request, scope: trio.CancelScope) -> None:
    """Hypercorn tells late, and only whoever asks, that the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass  # the rest of a body that nobody asked for
    scope.cancel()


async def get_events(house: House, request: Request, send: Send) -> None:
    """GET /v1/sessions/{key}/events"""
    session = house.session(request.path_params["key"])
    oldest, newest = await house.span(session)
    asked = _last_seen(request.headers, request.query_params)
    after = newest if asked is None else min(asked, newest)

    async def body(write: Send) -> None:
        async def tell(event: str, said: Mapping[str, Any], seq: int | None) -> None:
            await write(frame(event, said, seq))

        async def beat() -> None:
            await write(b": still here\n\n")

        await write(b"retry: %d\n\n" % RETRY_MS + frame("hello", {"seq": after}, after))
        if after + 1 < oldest:
            await write(frame("gap", {"from": after + 1, "to": oldest - 1}))
        await follow(house, session, after, tell, beat)
        await write(frame("end", {"reason": "the gateway stops"}))

    await stream(request, send, body)


def _last_seen(headers: Mapping[str, str], query: Mapping[str, str]) -> int | None:
    text = headers.get("last-event-id") or query.get("after")
    return None if not text else as_number("Last-Event-ID", text, LARGEST)


async def follow(
    house: House, session: SessionKey, after: int, tell: Tell, beat: Callable[[], Awaitable[None]]
) -> None:
    """Tell what happens in a session after a place, until the gateway stops; the last included.
    `beat` is called when nothing has happened for a while."""
    with house.bells.following(session) as bell:
        shown: ProgressShown | None = None
        while True:
            heard, closing = bell.rung, house.closing.is_set()
            after = await _catch_up(house, bell, session, after, tell)
            if bell.progress is not shown:
                shown = bell.progress
                if shown is not None:
                    said = {"turn": shown.turn, "attempt": shown.attempt, "text": shown.text}
                    await tell("progress", {**said, "draft": shown.draft}, None)
            if closing:
                return
            if not await wait_for_more(house, bell, heard):
                await beat()


async def _catch_up(house: House, bell: Bell, session: SessionKey, after: int, tell: Tell) -> int:
    while entries := await house.happened(bell, session, after):
        for entry in entries:
            await tell(entry.what, told(entry), entry.seq)
        after = entries[-1].seq
    return after


async def wait_for_more(house: House, bell: Bell, heard: int) -> bool:
    """Wait until something happens or the gateway stops. False: neither, for a heartbeat's time."""
    with trio.move_on_after(house.settings.heartbeat) as waited:
        async with trio.open_nursery() as nursery:

            async def until(wait: Callable[[], Awaitable[None]]) -> None:
                await wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, lambda: bell.wait(heard))
            nursery.start_soon(until, house.closing.wait)
    return not waited.cancelled_caught
