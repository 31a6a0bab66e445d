"""What comes in: bodies within their bounds, JSON objects, numbers in queries, names in paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import orjson
import trio
from starlette.requests import Request

from .._errors import shown
from .._messages import SessionKey, is_channel_name, is_traceparent
from ._problem import Problem
from ._settings import HttpSettings


async def read_body(request: Request, settings: HttpSettings) -> bytes:
    """The body. Raises `Problem`: 413, 408, and 400 for a client that left."""
    size = request.headers.get("content-length", "0")
    if size.isascii() and size.isdigit() and int(size) > settings.body_bytes:
        raise _too_large(settings)
    body = bytearray()
    with trio.move_on_after(settings.body_time):
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "gone", "the client has left")
            body += message.get("body", b"")
            if len(body) > settings.body_bytes:
                raise _too_large(settings)
            if not message.get("more_body", False):
                return bytes(body)
    raise Problem(408, "slow", f"the body took longer than {settings.body_time:g} s", CLOSE)


CLOSE: Mapping[str, str] = {"connection": "close"}


def _too_large(settings: HttpSettings) -> Problem:
    return Problem(413, "too_large", f"the body is larger than {settings.body_bytes} bytes", CLOSE)


async def read_object(request: Request, settings: HttpSettings) -> dict[str, Any]:
    """The body as a JSON object. Raises `Problem`."""
    return as_object(await read_body(request, settings))


def as_object(body: bytes) -> dict[str, Any]:
    """JSON as an object. Raises `Problem` (422)."""
    try:
        value = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise Problem(422, "not_json", f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Problem(422, "invalid", 'expected a JSON object such as {"text": "hi"}')
    return cast("dict[str, Any]", value)


def text_of(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A field that is a text. Raises `Problem` (422)."""
    value = fields.get(name, default)
    if isinstance(value, str):
        return value
    what = "missing" if name not in fields else f"expected a string, got {type(value).__name__}"
    raise Problem(422, "invalid", f"{name}: {what}")


def only(fields: Mapping[str, Any], *known: str) -> None:
    """Refuse fields that mean nothing here. Raises `Problem` (422)."""
    if extra := [name for name in fields if name not in known]:
        raise Problem(
            422,
            "invalid",
            f"unknown: {', '.join(shown(name[:40]) for name in extra[:5])};"
            f" known: {', '.join(known)}",
        )


def number(request: Request, name: str, default: int, most: int) -> int:
    """A number in the query, from 0 to `most`. Raises `Problem` (422)."""
    text = request.query_params.get(name)
    return default if text is None else as_number(name, text, most)


def as_number(name: str, text: str, most: int) -> int:
    """A number from 0 to `most`. Raises `Problem` (422)."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most):
        raise Problem(422, "invalid", f"{name}: expected a number from 0 to {most}")
    return int(text)


def trace_of(request: Request) -> str | None:
    """The trace that a request is part of; one that makes no sense is none, as W3C has it."""
    given = request.headers.get("traceparent")
    return given if is_traceparent(given) else None


def session_of(key: str, own: str, channels: tuple[str, ...]) -> SessionKey:
    """The session that a path names: `channel:name` of a channel that there is, else a name of this
    channel's own. Raises `Problem` (422)."""
    channel, colon, name = key.partition(":")
    if colon and name and is_channel_name(channel) and channel in channels:
        return SessionKey(channel, name)
    if not key:
        raise Problem(422, "invalid", "the session has no name")
    return SessionKey(own, key)
