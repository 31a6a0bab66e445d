"""What there is to see, and what an operator does: sessions, messages, their lives, what was put
aside. Each shows what the command of the same name shows with `--json`."""

from __future__ import annotations

import time
from typing import Any, Final

import trio
from starlette.requests import Request
from starlette.responses import Response

from .._errors import NotFound
from .._gateway import GatewayState
from .._jsonable import jsonable
from ..store import MessageRow, StoreReader
from ._house import House
from ._messages import reply_told
from ._problem import Problem, answer
from ._request import number

MOST: Final = 500
"""Rows that one answer has at the most."""

ASKED_EVERY: Final = 1.0
"""Seconds for which an answer of /readyz stands: anybody may ask, and each asks the disk."""


async def get_sessions(house: House, request: Request) -> Response:
    """GET /v1/sessions"""
    limit = number(request, "limit", 50, MOST)
    rows = await house.ask(lambda reader: reader.sessions(limit))
    return answer({"ok": True, "sessions": jsonable(rows)})


async def get_messages(house: House, request: Request) -> Response:
    """GET /v1/sessions/{key}/messages: a page of a conversation, newest first."""
    session = house.session(request.path_params["key"])
    limit = max(1, number(request, "limit", 50, MOST))
    before = number(request, "before", 0, 2**62) or None

    def read(reader: StoreReader) -> tuple[list[dict[str, Any]], int | None]:
        page = reader.messages_before(session, before, limit)
        told = [_with_replies(reader, row) for _, row in page]
        return told, page[-1][0] if len(page) == limit else None

    told, following = await house.ask(read)
    return answer({"ok": True, "session": str(session), "messages": told, "before": following})


def _with_replies(reader: StoreReader, row: MessageRow) -> dict[str, Any]:
    _, replies = reader.replies_to(row.session.channel, row.id)
    told: dict[str, Any] = jsonable(row)
    return {**told, "replies": [reply_told(reply) for reply in replies]}


async def get_message(house: House, request: Request) -> Response:
    """GET /v1/messages/{id}: the life of a message, in each channel that has one of this id."""
    name = request.path_params["id"]
    lives = await house.ask(lambda reader: reader.explain(name))
    return answer({"ok": True, "id": name, "timelines": jsonable(lives)})


async def post_stop(house: House, request: Request) -> Response:
    """POST /v1/sessions/{key}/stop: end the open turn for good."""
    session = house.session(request.path_params["key"])
    return answer({"ok": True, "stopped": await house.gateway.stop_turn(session)})


async def get_quarantine(house: House, request: Request) -> Response:
    """GET /v1/quarantine"""
    rows = await house.ask(lambda reader: reader.quarantine())
    return answer({"ok": True, "quarantine": jsonable(rows)})


async def post_quarantine(house: House, request: Request) -> Response:
    """POST /v1/quarantine/{turn}/retry and /drop"""
    turn = _id(request, "turn")
    if request.path_params["what"] == "retry":
        done = await house.gateway.retry_quarantined(turn)
    else:
        done = bool(await house.gateway.drop_quarantined(turn))
    if not done:
        raise NotFound(f"no turn {turn} in quarantine")
    return answer({"ok": True, "turn": turn})


async def get_dead_letters(house: House, request: Request) -> Response:
    """GET /v1/dead-letters"""
    rows = await house.ask(lambda reader: reader.dead_letters())
    return answer({"ok": True, "dead_letters": jsonable(rows)})


async def post_dead_letter(house: House, request: Request) -> Response:
    """POST /v1/dead-letters/{delivery}/retry and /drop"""
    delivery = _id(request, "delivery")
    if request.path_params["what"] == "retry":
        done = await house.gateway.retry_dead_letter(delivery)
    else:
        done = await house.gateway.drop_dead_letter(delivery)
    if not done:
        raise NotFound(f"no dead letter {delivery}")
    return answer({"ok": True, "delivery": delivery})


def _id(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Problem(422, "invalid", f"{name}: expected its number")
    return int(text)


async def get_status(house: House, request: Request) -> Response:
    """GET /v1/status"""
    gateway = house.gateway
    counts = await house.ask(lambda reader: reader.counts())
    return answer(
        {
            "ok": True,
            "state": gateway.state.value.value,
            "epoch": gateway.epoch,
            "paused": gateway.paused,
            "channels": list(gateway.channels),
            "turns": jsonable(gateway.turns()),
            "open": gateway.statistics(),
            "stored": jsonable(counts),
        }
    )


# ----- for whoever watches the process


async def get_healthz(house: House, request: Request) -> Response:
    """GET /healthz: the loop turns."""
    await trio.lowlevel.checkpoint()
    return answer({"ok": True})


async def get_startupz(house: House, request: Request) -> Response:
    """GET /startupz: recovery is done. Nobody is heard before that."""
    await trio.lowlevel.checkpoint()
    state = house.gateway.state.value
    started = state is not GatewayState.STARTING
    return answer({"ok": started, "state": state.value}, 200 if started else 503)


class Readiness:
    """GET /readyz: whether this gateway should be sent messages. Asks the store at most once a
    second, whoever asks."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._asked = -ASKED_EVERY
        self._reasons: tuple[str, ...] = ()

    async def get(self, house: House, request: Request) -> Response:
        """200, or 503 with the reasons."""
        async with self._lock:
            if time.monotonic() - self._asked >= ASKED_EVERY:
                self._reasons = await house.gateway.check()
                self._asked = time.monotonic()
        # A drain is told at once, whatever was answered a moment ago.
        reasons = list(self._reasons)
        if house.draining and not any("draining" in reason for reason in reasons):
            reasons.append("the gateway is draining")
        headers = {} if not reasons else {"retry-after": "1"}
        return answer({"ok": not reasons, "reasons": reasons}, 503 if reasons else 200, headers)
