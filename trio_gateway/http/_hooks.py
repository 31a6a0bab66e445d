"""`POST /hooks/{session}`: messages from services that sign what they send (Standard Webhooks).

The signature is over the raw bytes, and is checked before anything is parsed. What is older or
newer than five minutes is refused; the same id again, within them or a year later, is recognised by
the store, in the transaction that would accept it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from .._errors import ConfigError
from .._messages import Message
from ._house import House
from ._messages import accept
from ._problem import Problem, answer
from ._request import as_object, read_body, trace_of
from ._token import read_private

WINDOW: Final = 300
"""Seconds by which a webhook's time may be off, both ways."""

SHORTEST: Final = 24
"""Bytes of a secret; the standard says so."""


def read_secret(path: Path) -> bytes:
    """The secret in a file, written `whsec_…` (base64) as the services show it. Raises
    `ConfigError`."""
    text = read_private(path, "the secret of webhooks")
    try:
        secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ConfigError(f"{path}: expected a secret like whsec_MfKQ9r8GKYqrTwjU…") from None
    if len(secret) < SHORTEST:
        raise ConfigError(f"{path}: the secret is shorter than {SHORTEST} bytes")
    return secret


def check(
    secret: bytes, headers: Mapping[str, str], body: bytes, now: Callable[[], float] = time.time
) -> str:
    """The id of a webhook that is genuine. Raises `Problem` (401) for any other."""
    name = headers.get("webhook-id", "")
    stamp = headers.get("webhook-timestamp", "")
    if not name or not (stamp.isascii() and stamp.isdigit() and len(stamp) < 16):
        raise Problem(401, "unsigned", "expected the headers webhook-id and webhook-timestamp")
    signed = f"{name}.{stamp}.".encode("utf-8", "replace") + body
    right = b"v1," + base64.b64encode(hmac.digest(secret, signed, "sha256"))
    given = headers.get("webhook-signature", "").encode("utf-8", "replace").split(b" ")
    if not any(hmac.compare_digest(one, right) for one in given):
        raise Problem(401, "bad_signature", "the signature is not that of this body")
    if abs(now() - int(stamp)) > WINDOW:
        raise Problem(401, "stale", f"the time is off by more than {WINDOW} s")
    return name


async def post_hook(house: House, request: Request) -> Response:
    """POST /hooks/{session}: the body is the message's text, or its `text` if it is JSON that has
    one."""
    if house.hook_secret is None:
        raise Problem(404, "not_found", "webhooks are not set up: channels.http.hook_secret")
    body = await read_body(request, house.settings)
    name = check(house.hook_secret, request.headers, body)
    receipt = await accept(
        house,
        Message(
            session=request.path_params["session"],
            id=f"hook-{name}",
            text=_text(body),
            sender="webhook",
            channel=house.channel,
            traceparent=trace_of(request),
        ),
    )
    return answer({"ok": True, "status": receipt.status.value}, 202)


def _text(body: bytes) -> str:
    try:
        text = as_object(body).get("text")
    except Problem:
        text = None
    return text if isinstance(text, str) else body.decode("utf-8", "replace")
