"""What is said over the control socket: one JSON object a line, a request and then its answer.

    {"do": "stop-turn", "session": "http:ada"}      --->
                                                    <---      {"ok": true, "stopped": true}

    {"do": "logs", "follow": true}                  --->
                                                    <---      {"record": {...}}
                                                    <---      {"dropped": 12}
                                                    <---      {"ok": true, "end": "..."}

An answer has `ok`; what has not comes before the answer. Several requests may follow each other
over one connection. A request that means nothing gets one error that says what is expected. Pure:
no I/O, no clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, cast

import attrs

from ._errors import ConfigError, GatewayError, GatewayStopping, NotFound, shown

LONGEST_REQUEST: Final = 64 * 1024
"""Bytes of a request, its newline included."""

LONGEST_ANSWER: Final = 16 * 1024 * 1024
"""Bytes of one line of an answer that a client takes."""

PATIENCE: Final = 10.0
"""Seconds that a peer gets for its next request, and to take an answer."""

FOLLOWING: Final = 300.0
"""Seconds that somebody who follows may leave a line unread (a paused terminal, say)."""

CONNECTIONS: Final = 16
"""Connections at once."""

UNREAD: Final = 2000
"""Records that wait for somebody who follows the log; the oldest is dropped, and counted."""

MOST_ROWS: Final = 200
"""Rows of the inbox and of the outbox that an overview has at the most."""


class NoGateway(GatewayError):
    """No gateway answers at the control socket of a store. Exit code 3."""


class ControlError(GatewayError):
    """The control socket cannot be used, or a request over it failed."""


class Forbidden(ControlError):
    """Whoever asks is neither the gateway's own user nor root."""


class BadRequest(ControlError):
    """A request that means nothing. The text says what is expected."""


class Kind(StrEnum):
    """What kind of error an answer tells; see `error_of`."""

    BAD_REQUEST = "bad-request"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    STOPPING = "stopping"
    CONFIG = "configuration"
    FAILED = "failed"


_KINDS: Final[tuple[tuple[type[GatewayError], Kind], ...]] = (
    (Forbidden, Kind.FORBIDDEN),
    (BadRequest, Kind.BAD_REQUEST),
    (NotFound, Kind.NOT_FOUND),
    (GatewayStopping, Kind.STOPPING),
    (ConfigError, Kind.CONFIG),
)

# ----- requests

_FLAG: Final = (bool, "true or false")
_NUMBER: Final = (int, "a number")
_TEXT: Final = (str, "a text")

_NOTHING: Final[Mapping[str, tuple[type, str]]] = MappingProxyType({})

VERBS: Final[Mapping[str, Mapping[str, tuple[type, str]]]] = MappingProxyType(
    {
        "status": _NOTHING,
        "overview": MappingProxyType({"rows": _NUMBER}),
        "turns": _NOTHING,
        "stop": MappingProxyType({"now": _FLAG, "restart": _FLAG}),
        "drain": _NOTHING,
        "undrain": _NOTHING,
        "stop-turn": MappingProxyType({"session": _TEXT}),
        "logs": MappingProxyType({"follow": _FLAG, "level": _TEXT, "last": _NUMBER}),
        "reload": _NOTHING,
        "quarantine-retry": MappingProxyType({"turn": _NUMBER}),
        "quarantine-drop": MappingProxyType({"turn": _NUMBER}),
        "dead-letter-retry": MappingProxyType({"delivery": _NUMBER}),
        "dead-letter-drop": MappingProxyType({"delivery": _NUMBER}),
    }
)
"""What can be asked, and with which values."""

NEEDED: Final = frozenset({"session", "turn", "delivery"})
"""Values without which a request means nothing; the others have a default."""

STREAMS: Final = frozenset({"logs"})
"""Requests whose peer may hang up before the answer, and is heard to."""

CHANGES: Final = frozenset(VERBS) - {"status", "overview", "turns", "logs"}
"""Requests that change something, and are told in the log."""


@attrs.frozen
class Request:
    """Something that is asked, and its values."""

    do: str
    values: Mapping[str, Any]

    def flag(self, name: str) -> bool:
        """A truth; false if it was not given."""
        return bool(self.values.get(name, False))

    def number(self, name: str, default: int = 0) -> int:
        """A number."""
        return int(self.values.get(name, default))

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        return str(self.values.get(name, default))


def parse_request(line: bytes) -> Request:
    """A request from its line. Raises `BadRequest`."""
    told = _object(line)
    do = told.pop("do", None)
    if not isinstance(do, str) or do not in VERBS:
        raise BadRequest(
            f"do: expected one of {', '.join(VERBS)}, got {shown(do)}; a gateway of another version"
            " knows other requests: restart it"
        )
    expected = VERBS[do]
    for name, value in told.items():
        if name not in expected:
            raise BadRequest(f"{do}: unknown value {shown(name)}; known: {_names(expected)}")
        _check(do, name, value, *expected[name])
    for name in expected.keys() & NEEDED - told.keys():
        raise BadRequest(f"{do}: {name} is missing")
    return Request(do, MappingProxyType(told))


def _object(line: bytes) -> dict[str, Any]:
    try:
        told: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON ({shown(line[:80])}): expected one object a line") from error
    if not isinstance(told, dict):
        raise BadRequest(f"expected a JSON object, got {shown(line[:80])}")
    return cast("dict[str, Any]", told)


def _names(expected: Mapping[str, object]) -> str:
    return ", ".join(expected) or "none"


def _check(do: str, name: str, value: object, kind: type, words: str) -> None:
    wrong = type(value) is not kind or (kind is int and not 0 <= cast("int", value) < 2**63)
    if wrong:
        raise BadRequest(f"{do}: {name}: expected {words}, got {shown(value)}")


# ----- answers


def encode(told: Mapping[str, Any]) -> bytes:
    """One line."""
    return json.dumps(told, separators=(",", ":")).encode() + b"\n"


def refusal(error: GatewayError) -> dict[str, Any]:
    """The answer that tells an error."""
    kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), Kind.FAILED)
    return {"ok": False, "kind": kind.value, "error": str(error)}


def error_of(answer: Mapping[str, Any]) -> GatewayError:
    """The error that an answer tells, as whoever asked raises it."""
    text = str(answer.get("error", "the request failed"))
    for cls, kind in _KINDS:
        if answer.get("kind") == kind.value:
            return cls(text)
    return ControlError(text)


class Lines:
    """Bytes as they arrive, cut into lines of a bounded length."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._rest = bytearray()

    def add(self, data: bytes) -> None:
        """Bytes that have arrived."""
        self._rest += data

    def next(self) -> bytes | None:
        """The next whole line, without its end. Raises `BadRequest` for one that is too long."""
        end = self._rest.find(b"\n", 0, self._longest)
        if end < 0:
            if len(self._rest) >= self._longest:
                raise BadRequest(f"the line is longer than {self._longest} bytes")
            return None
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line
