"""Who may come in. Asked once for every request and every WebSocket, before anything is read.

A token is needed from everywhere, also from this machine: who can reach a port need not be who
owns the store. A browser's requests carry its Host and Origin, which a page of somebody else
cannot forge: that refuses DNS rebinding and cross-site requests, also where the cookie goes along.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from ._problem import Problem
from ._settings import HttpSettings

COOKIE: Final = "trio_gateway"
COOKIE_LIFE: Final = 7 * 86_400
"""Seconds that somebody who has signed in at the page stays so."""

TRIES: Final = 10
"""Wrong tokens from one address, after which it is told to wait."""

LOCKED: Final = 60.0
"""Seconds for which it is, and in which its wrong tokens are counted."""

ADDRESSES: Final = 4096
"""Addresses whose wrong tokens are counted, the newest."""

OPEN: Final = frozenset({"/healthz", "/readyz", "/startupz", "/login", "/style.css", "/icon.svg"})
"""Paths without a token: what they tell is no secret."""


@attrs.define
class _Failures:
    count: int
    since: float


HEAD_BYTES: Final = 16 * 1024
"""The largest head of a request: the values of its headers."""


def headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """The headers of a request; of one that came several times, the first."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return found


class Guard:
    """Lets requests in, or raises `Problem`."""

    def __init__(
        self,
        token: str,
        settings: HttpSettings,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(b"trio-gateway page\0" + self._token).digest()
        self._hosts = frozenset(name.lower() for name in settings.hosts)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.origins)
        self._clock = clock
        self._wall = wall
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def __repr__(self) -> str:
        return "<Guard>"

    def admit(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Let a request in. Raises `Problem`: 401, 403, 421, 429 or 431."""
        if sum(map(len, headers.values())) > HEAD_BYTES:
            raise Problem(431, "too_large", f"the headers are larger than {HEAD_BYTES} bytes")
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        path = scope["path"]
        if path in OPEN or path.startswith("/hooks/"):
            return
        if not (self._has_token(headers) or self._has_cookie(headers)):
            self._fail(_peer(scope), headers)

    # ----- Host and Origin

    def _check_host(self, host: str) -> None:
        name = _name_of(host)
        if name is None:
            raise Problem(400, "bad_host", "the request has no Host header that can be read")
        if name != "localhost" and not _is_address(name) and name not in self._hosts:
            raise Problem(
                421, "wrong_host", "this gateway is not reached by that name: channels.http.hosts"
            )

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        if origin.lower() in self._origins:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise Problem(
                403, "wrong_origin", "pages of that site may not call this: channels.http.origins"
            )

    # ----- the token, and the page's cookie

    def is_token(self, text: str) -> bool:
        """Whether it is the token; takes as long for a wrong one."""
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._token)

    def _has_token(self, headers: Mapping[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self.is_token(given.strip())

    def cookie(self) -> str:
        """What the page's cookie holds for who has shown the token."""
        until = str(int(self._wall()) + COOKIE_LIFE)
        return f"{until}.{self._sign(until)}"

    def _sign(self, until: str) -> str:
        return base64.urlsafe_b64encode(hmac.digest(self._key, until.encode(), "sha256")).decode()

    def _has_cookie(self, headers: Mapping[str, str]) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        until, _, signature = ("" if found is None else found.value).partition(".")
        genuine = hmac.compare_digest(
            signature.encode("utf-8", "replace"), self._sign(until).encode()
        )
        return genuine and until.isascii() and until.isdigit() and int(until) > self._wall()

    # ----- who guesses has to wait

    def failed(self, peer: str) -> None:
        """A wrong token came from `peer`. Raises `Problem` (429) where there were too many."""
        now = self._clock()
        known = self._failures.pop(peer, None)
        if known is None or now - known.since > LOCKED:
            known = _Failures(0, now)
        known.count += 1
        self._failures[peer] = known
        while len(self._failures) > ADDRESSES:
            self._failures.popitem(last=False)
        if known.count > TRIES:
            wait = max(1, round(known.since + LOCKED - now))
            raise Problem(
                429,
                "too_many_attempts",
                "too many wrong tokens from this address; wait",
                {"retry-after": str(wait)},
            )

    def _fail(self, peer: str, headers: Mapping[str, str]) -> None:
        if "authorization" in headers:
            self.failed(peer)
        raise Problem(
            401,
            "unauthorized",
            "a token is needed: Authorization: Bearer ...; see trio-gateway token",
            {"www-authenticate": "Bearer"},
        )


def _peer(scope: Mapping[str, Any]) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _name_of(host: str) -> str | None:
    """The name in a Host header, without its port; None for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.username is not None or parts.path or parts.query or parts.fragment:
        return None
    return parts.hostname


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
