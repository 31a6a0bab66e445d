"""Values to JSON and back, by cattrs."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import attrs
import orjson
from cattrs import BaseValidationError, ForbiddenExtraKeysError
from cattrs.preconf.orjson import make_converter

from .._clock import as_datetime
from .._errors import lone_cause
from .._messages import Delivery, Message, ReplyKind, SessionKey

_converter: Final = make_converter(forbid_extra_keys=False)


def _strict(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


_converter.register_structure_hook(str, _strict)


@attrs.frozen
class Body:
    """What a message's row keeps as JSON."""

    text: str
    sender: str | None = None


class BadRow(Exception):
    """A row that cannot be read back; the text says what is wrong with it."""


_unstructure_body: Final = _converter.get_unstructure_hook(Body)


def dump_body(message: Message) -> str:
    """A message's body, as JSON."""
    return orjson.dumps(_unstructure_body(Body(message.text, message.sender))).decode()


# Texts that people or agents wrote come as bytes: what the database calls text need not be one, if
# a bit fell over, and it is ours to say whose trouble that is.


def load_message(key: SessionKey, message_id: str, body: bytes | None) -> Message:
    """A message from its row. Raises `BadRow`."""
    if body is None:
        raise BadRow("its text was forgotten")
    try:
        read = _converter.loads(body, Body)
    except (BaseValidationError, ForbiddenExtraKeysError, ValueError, TypeError, KeyError) as error:
        raise BadRow(f"its body is not readable: {lone_cause(error)}") from error
    return Message(
        session=key.name, id=message_id, text=read.text, sender=read.sender, channel=key.channel
    )


def dump_ids(ids: tuple[str, ...]) -> str:
    """Message ids, as JSON."""
    return orjson.dumps(ids).decode()


def load_text(text: bytes | None) -> str:
    """A text from its row, as far as it can be read; empty once forgotten."""
    return "" if text is None else text.decode(errors="replace")


def load_json(text: bytes | None) -> str | None:
    """JSON from its row, as it is: what is wrong with it is found by whoever reads it."""
    return None if text is None else text.decode(errors="surrogateescape")


def load_ids(text: bytes) -> tuple[str, ...]:
    """Message ids from JSON; unreadable ones are no reason to lose a reply."""
    try:
        return _converter.loads(text, tuple[str, ...])
    except (BaseValidationError, ValueError, TypeError):
        return ()


def load_delivery(row: tuple[Any, ...]) -> Delivery:
    """A delivery from a row of `open_deliveries`."""
    return Delivery(
        id=row[0],
        session=SessionKey(row[1], row[2]),
        key=row[3],
        text=load_text(row[4]),
        in_reply_to=load_ids(row[5]),
        attempt=row[6],
        final=bool(row[7]),
        repeat=bool(row[8]),
        kind=ReplyKind(row[9]),
        part=row[10],
        parts=row[11],
        turn=row[12],
        tries=row[13],
        not_before=when(row[14]),
    )


def when(microseconds: int | None) -> datetime | None:
    """Aware UTC, or None."""
    return None if microseconds is None else as_datetime(microseconds)
