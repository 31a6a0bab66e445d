"""Values to JSON and back, by cattrs."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import attrs
import orjson
from cattrs import BaseValidationError, ForbiddenExtraKeysError
from cattrs.preconf.orjson import make_converter

from .._clock import as_datetime
from .._errors import lone_cause, unless_for_want_of_memory
from .._markers import ResumeReason
from .._messages import Delivery, Message, ReplyKind, SessionKey, is_traceparent
from ._records import Draft

_converter: Final = make_converter(forbid_extra_keys=False)


MOST_TRIES: Final = 1_000_000
"""More than anybody tries; a larger number is a damaged one, and must not grow."""


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


def load_message(
    key: SessionKey, message_id: str, body: bytes | None, traceparent: bytes | None = None
) -> Message:
    """A message from its row. Raises `BadRow`."""
    if body is None:
        raise BadRow("its text was forgotten")
    try:
        read = _converter.loads(body, Body)
    except (BaseValidationError, ForbiddenExtraKeysError, ValueError, TypeError, KeyError) as error:
        unless_for_want_of_memory(error)
        raise BadRow(f"its body is not readable: {lone_cause(error)}") from error
    return Message(
        session=key.name,
        id=message_id,
        text=read.text,
        sender=read.sender,
        channel=key.channel,
        traceparent=load_traceparent(traceparent),
    )


def load_traceparent(text: bytes | None) -> str | None:
    """A trace context from its row; an unreadable one is no reason to lose a message."""
    if not isinstance(text, bytes):
        return None
    read = text.decode(errors="replace")
    return read if is_traceparent(read) else None


def dump_ids(ids: tuple[str, ...]) -> str:
    """Message ids, as JSON."""
    return orjson.dumps(ids).decode()


def dump_draft(draft: Draft) -> str:
    """A draft's row in the journal, as JSON."""
    return orjson.dumps([draft.n, draft.start, draft.text]).decode()


def load_draft(turn: int, attempt: int, text: bytes) -> Draft:
    """A draft from its row. Raises `ValueError` or `TypeError` for what is none."""
    n, start, piece = orjson.loads(text)
    return Draft(turn, attempt, int(n), int(start), str(piece))


def load_text(text: bytes | None) -> str:
    """A text from its row, as far as it can be read; empty once forgotten."""
    return "" if text is None else text.decode(errors="replace")


def load_why(text: object) -> str | None:
    """Why something has ended, for whoever looks: a text, whatever a damaged page has there."""
    return None if text is None else str(text)


def load_json(text: bytes | None) -> str | None:
    """JSON from its row, as it is: what is wrong with it is found by whoever reads it."""
    return None if text is None else text.decode(errors="surrogateescape")


def load_name(text: bytes) -> str:
    """A name that must be what it was. Raises `BadRow`."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"the name {text!r} is not readable") from error


def load_store_id(row: tuple[Any, ...] | None) -> str:
    """Who a store is. Raises `BadRow`: keys are made of it, and must not change."""
    if row is None or not row[0]:
        raise BadRow("it does not say which store it is")
    return load_name(row[0])


def load_ids(text: bytes) -> tuple[str, ...]:
    """Message ids from JSON; unreadable ones are no reason to lose a reply."""
    try:
        return _converter.loads(text, tuple[str, ...])
    except (BaseValidationError, ValueError, TypeError) as error:
        unless_for_want_of_memory(error)
        return ()


def load_delivery(row: tuple[Any, ...]) -> Delivery:
    """A delivery from a row of `open_deliveries`. Raises `BadRow`."""
    return Delivery(
        id=row[0],
        session=SessionKey(row[1], row[2]),
        key=row[3],
        text=load_text(row[4]),
        in_reply_to=load_ids(row[5]),
        attempt=row[6],
        final=bool(row[7]),
        repeat=bool(row[8]),
        kind=_kind(row[9]),
        part=row[10],
        parts=row[11],
        turn=row[12],
        tries=min(row[13], MOST_TRIES),
        not_before=when(row[14]),
        traceparent=load_traceparent(row[15]),
    )


def _kind(text: str) -> ReplyKind:
    try:
        return ReplyKind(text)
    except ValueError:
        raise BadRow(f"its kind is {text!r}, which there is not") from None


_REASONS: Final = frozenset(ResumeReason)


def load_reason(text: str | None) -> ResumeReason:
    """Why a turn was interrupted; what cannot be read was no planned stop."""
    return ResumeReason(text) if text in _REASONS else ResumeReason.CRASH


def when(microseconds: int | None) -> datetime | None:
    """Aware UTC, or None."""
    return None if microseconds is None else as_datetime(microseconds)
