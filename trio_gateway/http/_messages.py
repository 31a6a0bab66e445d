"""Messages in: accepted is kept, and said so after the commit; replies out, for who waits."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

import attrs
import trio
from starlette.requests import Request
from starlette.responses import Response

from .._errors import GatewayStopping
from .._gateway import Question
from .._messages import Message, Receipt, ReceiptStatus, RefusalKind, Reply, SessionKey
from ..store import JournalEntry
from ._house import House
from ._problem import RETRY_SOON, Problem, answer
from ._request import only, read_object, text_of, trace_of

ENDS: Final = frozenset({"answered", "failed", "stopped", "quarantined", "expired"})

_REFUSED: Final[Mapping[RefusalKind | None, tuple[int, Mapping[str, str]]]] = {
    RefusalKind.MALFORMED: (422, {}),
    RefusalKind.TOO_LARGE: (413, {}),
    RefusalKind.NOT_ALLOWED: (403, {}),
    RefusalKind.BUSY: (429, {"retry-after": "5"}),
    RefusalKind.FULL: (429, {"retry-after": "5"}),
    RefusalKind.CLOSING: (503, RETRY_SOON),
}

_WAIT: Final = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6}(?:\.\d{1,3})?)\"?", re.ASCII)

AFTER_RESTART: Final = "the gateway is stopping: this is kept, and answered after the restart"


async def accept(house: House, message: Message, question: Question | None = None) -> Receipt:
    """Hand a message in. Raises `Problem` where the kernel refuses it, and (409) where its id was
    given to another one before."""
    receipt = await (question.accept() if question else house.gateway.accept(message))
    if not receipt.accepted:
        status, headers = _REFUSED[receipt.refusal]
        kind = "refused" if receipt.refusal is None else receipt.refusal.value
        raise Problem(status, kind, receipt.reason or "refused", headers)
    if receipt.status is ReceiptStatus.DUPLICATE:
        await _check_same(house, message)
    return receipt


async def _check_same(house: House, message: Message) -> None:
    known = await house.ask(lambda reader: reader.message(message.channel, message.id))
    if known is None or (
        known.session == message.key and (known.text is None or known.text == message.text)
    ):
        return
    raise Problem(
        409, "conflict", f"message {message.id!r} was accepted before, with another text or session"
    )


async def post_message(house: House, request: Request) -> Response:
    """POST /v1/sessions/{key}/messages"""
    session = house.session(request.path_params["key"])
    if session.channel != house.channel:
        raise Problem(
            422,
            "invalid",
            f"session {session} belongs to another channel; here messages go to {house.channel}",
        )
    fields = await read_object(request, house.settings)
    message = attrs.evolve(
        _message(house, session, fields, request.headers.get("idempotency-key")),
        traceparent=trace_of(request),
    )
    wait = _asked_to_wait(house, request.headers.get("prefer", ""))
    if wait is None or house.draining:  # what begins after the restart is not worth a wait
        return _accepted(house, await accept(house, message))
    with house.gateway.question(message) as question:
        receipt = await accept(house, message, question)
        outcome = await outcome_within(house, question, wait)
    if outcome is None:
        return _accepted(house, receipt)
    state, replies = outcome
    said = {"state": state, "replies": [reply_told(reply) for reply in replies]}
    return answer(_receipt(receipt) | said, 200, {"preference-applied": f"wait={wait:g}"})


def _accepted(house: House, receipt: Receipt) -> Response:
    note = {"note": AFTER_RESTART} if house.draining else {}
    return answer(_receipt(receipt) | note, 202)


def _message(house: House, session: SessionKey, fields: dict[str, Any], key: str | None) -> Message:
    only(fields, "id", "text", "sender")
    given = text_of(fields, "id") if "id" in fields else None
    if given is not None and key is not None and given != key:
        raise Problem(422, "invalid", "id and the Idempotency-Key header differ: give one of them")
    if given is None:
        given = f"m-{secrets.token_hex(12)}" if key is None else key
    sender = fields.get("sender")
    return Message(
        session=session.name,
        id=given,
        text=text_of(fields, "text"),
        sender=None if sender is None else text_of(fields, "sender"),
        channel=house.channel,
    )


def _asked_to_wait(house: House, prefer: str) -> float | None:
    found = _WAIT.search(prefer.lower())
    return None if found is None else min(float(found[1]), house.settings.longest_wait)


async def outcome_within(
    house: House, question: Question, seconds: float
) -> tuple[str, tuple[Reply, ...]] | None:
    """How a message ended and what was said to it; None if that takes longer, or until after the
    restart."""
    with trio.CancelScope(relative_deadline=seconds) as waiting, house.until_closing(waiting):
        try:
            return await question.outcome()
        except GatewayStopping:
            return None
    return None


def _receipt(receipt: Receipt) -> dict[str, Any]:
    return {
        "ok": True,
        "receipt": {
            "status": receipt.status.value,
            "session": str(receipt.session),
            "id": receipt.id,
        },
    }


def reply_told(reply: Reply) -> dict[str, Any]:
    """A reply as clients are told it."""
    return {
        "key": reply.key,
        "text": reply.text,
        "kind": reply.kind.value,
        "final": reply.final,
        "attempt": reply.attempt,
        "in_reply_to": list(reply.in_reply_to),
    }


@attrs.frozen
class Place:
    """Where the journal of one message begins."""

    session: SessionKey
    before: int


async def place_of(house: House, message_id: str) -> Place | None:
    """Where a message was accepted, in the journal of its session."""
    found = await house.ask(lambda reader: reader.journal_place(house.channel, message_id))
    return None if found is None else Place(found[0], found[1] - 1)


def is_end_of(entry: JournalEntry, message_id: str) -> bool:
    """Whether an entry tells that a message has reached its end."""
    return entry.what == "settled" and entry.message_id == message_id
