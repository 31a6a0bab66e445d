"""The lines that an agent's program reads and writes: what is in them, and what is wrong with them.

`process` has the contract, in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import orjson

from .._errors import GatewayError, InvalidInput, escape, unless_for_want_of_memory
from ..channels._fds import Line

if TYPE_CHECKING:
    from .._turns import Turn

MOST_NAMES: Final = 5
"""Unknown fields that an error names."""

LONGEST_QUOTE: Final = 200
"""Characters of a line that an error quotes."""


class ProcessFailed(GatewayError):
    """The program did not start, broke the contract, said `failed`, or ended without a reply."""


def opening(turn: Turn) -> dict[str, Any]:
    """What the program is told first of all."""
    resumed = turn.resumed
    return {
        "event": "turn",
        "turn": turn.id,
        "session": turn.session.name,
        "channel": turn.session.channel,
        "attempt": turn.attempt,
        "text": turn.text,
        "messages": [{"id": m.id, "text": m.text, "sender": m.sender} for m in turn.messages],
        "resumed": None if resumed is None else {
            "reason": resumed.reason, "at": resumed.at.isoformat(), "attempt": resumed.attempt,
        },
        "checkpoint": turn.checkpointed,
        "idempotency_key": turn.idempotency_key("turn"),
    }  # fmt: skip


def dump(answer: dict[str, Any]) -> bytes:
    """One line for the program."""
    return orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)


_TEXT: Final = (str,)
_ANY: Final = (object,)
FIELDS: Final[Mapping[str, Mapping[str, tuple[type, ...]]]] = {
    "say": {"text": _TEXT},
    "progress": {"text": _TEXT},
    "checkpoint": {"value": _ANY},
    "step": {"name": _TEXT, "effect": _TEXT},
    "done": {"name": _TEXT, "result": _ANY},
    "reply": {"text": (str, type(None))},
    "failed": {"error": _TEXT},
}
"""What the program may say, and the fields of it."""

_OPTIONAL: Final = frozenset({("step", "effect"), ("done", "result")})


def read_line(line: Line) -> tuple[str, dict[str, Any]]:
    """What a line says: the event, and its fields. Raises `ProcessFailed`, naming the line."""
    try:
        fields = _load(line)
        event = fields.pop("event", None)
        if not isinstance(event, str) or event not in FIELDS:
            raise InvalidInput(f"event: expected one of {', '.join(FIELDS)}, got {_json(event)}")
        _check_fields(event, fields)
    except InvalidInput as error:
        raise broken(line, str(error)) from None
    return event, fields


def _load(line: Line) -> dict[str, Any]:
    if line.data is None:
        raise InvalidInput(f"it is too long: {line.size} bytes")
    try:
        value = orjson.loads(line.data)
    except orjson.JSONDecodeError as error:
        unless_for_want_of_memory(error)
        raise InvalidInput(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(value, dict):
        raise InvalidInput('expected an object such as {"event": "reply", "text": "hi"}')
    return cast("dict[str, Any]", value)


def _check_fields(event: str, fields: dict[str, Any]) -> None:
    known = FIELDS[event]
    for name, types in known.items():
        if name not in fields:
            if (event, name) not in _OPTIONAL:
                raise InvalidInput(f"{event}: missing: {name}")
        elif not isinstance(fields[name], types):
            raise InvalidInput(f"{event}: {name}: expected a string, got {_json(fields[name])}")
    if extra := [_json(name) for name in fields if name not in known]:
        raise InvalidInput(f"{event}: unknown: {', '.join(extra[:MOST_NAMES])}")


def broken(line: Line, why: str) -> ProcessFailed:
    """The error for a line that is not in the contract."""
    told = "" if line.data is None else f": {short(escape(line.data.decode(errors='replace')))}"
    return ProcessFailed(f"line {line.number} of the program's output: {why}{told}")


def _json(value: object) -> str:
    return short(escape(orjson.dumps(value).decode()))


def short(text: str) -> str:
    """As much of a text as an error quotes."""
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 1]}…"
