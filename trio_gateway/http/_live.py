"""The page as it changes: parts of it, drawn again when something has happened, as Server-Sent
Events. A part that has not changed is not sent; a slow store is not asked more often for it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio
from starlette.requests import Request

from .._messages import SessionKey
from ._events import RETRY_MS, frame, stream, wait_for_more
from ._follow import Bell
from ._house import House
from ._parts import conversation_parts, overview_part

Write = Callable[[bytes], Awaitable[None]]
Parts = Mapping[str, str]

PAUSE: Final = 0.25
"""Seconds between two drawings."""

SHARE: Final = 4
"""A drawing that took long is not done again before that many times as long."""


class Drawn:
    """The overview, drawn once for all who look at it."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._heard = -1
        self._closing = False
        self._parts: Parts = {}

    async def parts(self, house: House) -> Parts:
        """The overview as it is now."""
        async with self._lock:
            # Asked before it is drawn: what happens meanwhile is drawn the next time.
            heard, closing = house.board.bell.rung, house.closing.is_set()
            if (heard, closing) != (self._heard, self._closing):
                self._parts = {"overview": await overview_part(house)}
                self._heard, self._closing = heard, closing
            return self._parts


class Overview:
    """GET /live"""

    def __init__(self) -> None:
        self._drawn = Drawn()

    async def get(self, house: House, request: Request, send: Write) -> None:
        """The overview as it changes."""

        async def draw() -> Parts:
            return await self._drawn.parts(house)

        async def body(write: Write) -> None:
            with house.board.watching() as bell:
                await _follow(house, bell, draw, write)

        await stream(request, send, body)


async def get_live_session(house: House, request: Request, send: Write) -> None:
    """GET /live/sessions/{key}: one conversation as it changes."""
    session = house.session(request.path_params["key"])
    await conversation_parts(house, session)  # what cannot be shown is told before the stream

    async def body(write: Write) -> None:
        await _follow_session(house, session, write)

    await stream(request, send, body)


async def _follow_session(house: House, session: SessionKey, write: Write) -> None:
    async def draw() -> Parts:
        return await conversation_parts(house, session)

    with house.board.following(session) as bell:
        await _follow(house, bell, draw, write)


async def _follow(
    house: House, bell: Bell, draw: Callable[[], Awaitable[Parts]], write: Write
) -> None:
    """Write what `draw` draws whenever the bell has rung, until the gateway stops."""
    await write(b"retry: %d\n\n" % RETRY_MS)
    sent: dict[str, str] = {}
    while True:
        heard, closing = bell.rung, house.closing.is_set()
        began = time.monotonic()
        for name, html in (await draw()).items():
            if sent.get(name) != html:
                sent[name] = html
                await write(frame(name, html))
        if closing:
            await write(frame("end", {"reason": "the gateway stops"}))
            return
        await trio.sleep(max(PAUSE, SHARE * (time.monotonic() - began)))
        while not await wait_for_more(house, bell, heard):
            await write(b": still here\n\n")
