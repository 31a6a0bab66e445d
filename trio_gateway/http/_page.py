"""The page for people: plain links and forms that work by themselves; a script makes it live.

Its forms are safe from other sites: a browser says with each where it comes from, and the guard
looks at that; the cookie does not go along from elsewhere either.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

import attrs
import trio
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from .._messages import Message
from ._guard import COOKIE, COOKIE_LIFE, headers_of
from ._house import House
from ._html import HEADERS, page, render, session_url
from ._look import post_dead_letter, post_quarantine
from ._messages import accept
from ._parts import overview_part, read_conversation, turn_part
from ._problem import Problem
from ._request import number, read_body
from ._settings import HttpSettings

FIELDS: Final = 8
"""Fields that a form of ours has at the most."""

LOGIN_BYTES: Final = 16 * 1024
"""What somebody may send who has not signed in."""

BY: Final = "the page"

DONE: Final[Mapping[str, str]] = {
    "retried": "Its messages wait for an answer once more.",
    "dropped": "The turn was given up for good.",
    "resent": "The reply is on its way once more.",
    "discarded": "The reply was given up for good.",
    "paused": "No turn begins until you let them. Messages are accepted and wait.",
    "unpaused": "Turns begin again.",
    "stopped": "The turn was stopped for good.",
    "idle": "There was no open turn to stop.",
    "kept": "The message is kept. It is answered after the restart.",
}
"""What is said after something was done, by the word in the address."""

FILES: Final = ("/style.css", "/page.js", "/icon.svg")

_FOLDER: Final = Path(__file__).parent / "templates"
_KINDS: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


# ----- signing in


async def get_login(house: House, request: Request) -> Response:
    """GET /login"""
    await trio.lowlevel.checkpoint()
    return page("login.html", wrong=False)


async def post_login(house: House, request: Request) -> Response:
    """POST /login: the token, for a cookie."""
    fields = await _form(request, attrs.evolve(house.settings, body_bytes=LOGIN_BYTES))
    if not house.guard.is_token(fields.get("token", "").strip()):
        house.guard.failed("" if request.client is None else request.client.host)
        return page("login.html", 403, wrong=True)
    response = _see("/")
    response.set_cookie(
        COOKIE,
        house.guard.cookie(),
        max_age=COOKIE_LIFE,
        path="/",
        secure=_is_https(request),
        httponly=True,
        samesite="strict",
    )
    return response


def _is_https(request: Request) -> bool:
    # A header that anybody can send may only make the cookie stricter.
    forwarded = request.headers.get("x-forwarded-proto", "")
    return request.url.scheme == "https" or forwarded.lower().startswith("https")


async def post_logout(house: House, request: Request) -> Response:
    """POST /logout"""
    await trio.lowlevel.checkpoint()
    response = _see("/login")
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


# ----- what there is to see


async def get_overview(house: House, request: Request) -> Response:
    """GET /"""
    return page("overview.html", part=await overview_part(house), notice=_notice(request))


async def get_session(house: House, request: Request) -> Response:
    """GET /sessions/{key}: a conversation, and a box to take part in it."""
    session = house.session(request.path_params["key"])
    before = number(request, "before", 0, 2**62) or None
    read = await read_conversation(house, session, before)
    return page(
        "session.html",
        session=session,
        own=session.channel == house.channel,
        newest=before is None,
        part=render("conversation.part.html", conversation=read),
        turn_part=turn_part(house, read),
        notice=_notice(request),
    )


async def get_sessions(house: House, request: Request) -> Response:
    """GET /sessions?key=NAME: to that session."""
    await trio.lowlevel.checkpoint()
    return _see(session_url(house.session(request.query_params.get("key", "").strip())))


async def get_message(house: House, request: Request) -> Response:
    """GET /messages/{id}: what happened to a message."""
    named = request.path_params.get("id") or request.query_params.get("id", "")
    lives = await house.ask(lambda reader: reader.explain(named))
    return page("message.html", id=named, lives=lives, notice=None)


def _notice(request: Request) -> str | None:
    return DONE.get(request.query_params.get("done", ""))


# ----- what an operator does


async def post_message(house: House, request: Request) -> Response:
    """POST /sessions/{key}/messages: say something, from a form."""
    session = house.session(request.path_params["key"])
    if session.channel != house.channel:
        raise Problem(422, "invalid", f"session {session} belongs to another channel")
    fields = await _form(request, house.settings)
    await accept(
        house,
        Message(
            session=session.name,
            id=f"m-{secrets.token_hex(12)}",
            text=fields.get("text", "").replace("\r\n", "\n"),  # as browsers send lines
            channel=session.channel,
        ),
    )
    return _see(session_url(session), "kept" if house.draining else None)


async def post_stop(house: House, request: Request) -> Response:
    """POST /sessions/{key}/stop: end the open turn for good."""
    session = house.session(request.path_params["key"])
    stopped = await house.gateway.stop_turn(session)
    return _see(session_url(session), "stopped" if stopped else "idle")


async def post_put_aside(house: House, request: Request) -> Response:
    """POST /quarantine/{turn}/retry and /drop"""
    await post_quarantine(house, request)
    return _see("/", "retried" if request.path_params["what"] == "retry" else "dropped")


async def post_letter(house: House, request: Request) -> Response:
    """POST /dead-letters/{delivery}/retry and /drop"""
    await post_dead_letter(house, request)
    return _see("/", "resent" if request.path_params["what"] == "retry" else "discarded")


async def post_pause(house: House, request: Request) -> Response:
    """POST /pause: begin no turn for now."""
    await trio.lowlevel.checkpoint()
    house.gateway.pause(by=BY)
    return _see("/", "paused")


async def post_unpause(house: House, request: Request) -> Response:
    """POST /unpause: let turns begin again."""
    await trio.lowlevel.checkpoint()
    house.gateway.unpause(by=BY)
    return _see("/", "unpaused")


async def _form(request: Request, settings: HttpSettings) -> dict[str, str]:
    """The fields of a form. Raises `Problem`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise Problem(415, "wrong_type", "expected a form: application/x-www-form-urlencoded")
    body = await read_body(request, settings)
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=FIELDS, errors="strict"
        )
    except ValueError:
        raise Problem(422, "invalid", "the form cannot be read") from None
    return dict(pairs)


def _see(url: str, done: str | None = None) -> RedirectResponse:
    """Off to another page, whatever the method was."""
    return RedirectResponse(url if done is None else f"{url}?done={done}", 303, HEADERS)


# ----- files, and what goes wrong


async def get_file(house: House, request: Request) -> Response:
    """GET /style.css, /page.js, /icon.svg"""
    found = _FOLDER / request.url.path.rpartition("/")[2]
    body = await trio.Path(found).read_bytes()
    headers = {**HEADERS, "cache-control": "no-cache"}
    return Response(body, 200, headers, media_type=_KINDS[found.suffix])


def told(problem: Problem, scope: Mapping[str, Any]) -> Response | None:
    """What went wrong, as a page; None for who does not look with a browser."""
    if scope["type"] != "http" or scope["path"].startswith("/v1/"):
        return None
    if "text/html" not in headers_of(scope).get("accept", ""):
        return None
    if problem.status == 401:
        return _see("/login")
    response = page("problem.html", problem.status, problem=problem)
    response.headers.update(problem.headers)
    return response
