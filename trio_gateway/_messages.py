"""What flows: the values that travel between a channel, the gateway and an agent.

Nothing here does anything. A channel knows this file and its own contract, and no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal, Protocol

import attrs

from ._errors import InvalidInput, shown

LOCAL: Final = "local"
"""The channel of messages that the host program hands in itself, and whose replies it reads
with `Gateway.ask`: for it, committed is delivered."""

_CHANNEL_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_TRACEPARENT: Final = re.compile(
    "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


@attrs.frozen
class SessionKey:
    """Names one conversation: a channel, and the channel's own name for the conversation.

    Written `channel:name`. A channel's name has no colon, so the first colon ends it and
    distinct keys never meet, whatever the name contains. A key is data: no path is built from it.
    """

    channel: str
    name: str

    def __str__(self) -> str:
        return f"{self.channel}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> SessionKey:
        """Read `channel:name`. Raises `InvalidInput` where the channel part is missing."""
        if not isinstance(text, str):
            raise InvalidInput(f"a session key is a text, got {type(text).__name__}")
        channel, colon, name = text.partition(":")
        if not colon or not is_channel_name(channel) or not name:
            raise InvalidInput(f"{shown(text)} is not a session key; write it as channel:name")
        return cls(channel, name)


def is_channel_name(name: str) -> bool:
    """Whether `name` can name a channel: a small letter, then small letters, digits, `_`, `-`."""
    return isinstance(name, str) and _CHANNEL_NAME.fullmatch(name) is not None


def is_traceparent(text: object) -> bool:
    """Whether `text` is a trace context as W3C writes it in the header `traceparent`."""
    return isinstance(text, str) and _TRACEPARENT.fullmatch(text) is not None


@attrs.frozen(kw_only=True)
class Message:
    """What somebody sent.

    `id` is the platform's: unique within the channel, the same when the platform sends it again.
    `sender` is the platform's immutable id of who sent it, never a display name. `traceparent` is
    the trace (W3C) that it is part of; kept with it, so that its turn goes on in that trace.
    """

    session: str
    id: str
    text: str
    sender: str | None = None
    channel: str = LOCAL
    traceparent: str | None = None

    @property
    def key(self) -> SessionKey:
        """The session that this message belongs to."""
        return SessionKey(self.channel, self.session)


class ReceiptStatus(StrEnum):
    """What became of a message at the inbox."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    REFUSED = "refused"


class RefusalKind(StrEnum):
    """Why the inbox does not take a message, for programs."""

    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    NOT_ALLOWED = "not_allowed"
    BUSY = "busy"
    FULL = "full"
    CLOSING = "closing"


@attrs.frozen(kw_only=True)
class Receipt:
    """The inbox's answer for one message, given after the commit.

    `refused` carries a `reason` that a channel can show to the sender; nothing was stored.
    `retryable` says whether the same message can be accepted later (a full inbox, a closing
    gateway), so that a channel knows whether to keep it. `refusal` is the reason for programs.
    """

    status: ReceiptStatus
    session: SessionKey
    id: str
    reason: str | None = None
    retryable: bool = False
    refusal: RefusalKind | None = None

    @property
    def accepted(self) -> bool:
        """Whether the message is on disk, by this arrival or an earlier one."""
        return self.status is not ReceiptStatus.REFUSED


class ReplyKind(StrEnum):
    """Why a text is said."""

    ANSWER = "answer"
    """What the agent returned: settles the turn."""
    SAY = "say"
    """What the agent said on the way."""
    APOLOGY = "apology"
    """Settles a turn that did not end well; shows nothing of what went wrong inside."""
    COMMAND = "command"
    """The gateway's own answer to a chat command."""
    NOTICE = "notice"
    """News of the gateway itself (it restarts, it goes on): best effort, for its epoch only."""


@attrs.frozen(kw_only=True)
class Reply:
    """A text that was said, as one piece, and committed.

    `key` is stable: the same reply has the same key at every attempt to deliver it, in every
    process. `final` is true for the reply with which a turn settled.
    """

    session: SessionKey
    key: str
    text: str
    in_reply_to: tuple[str, ...]
    attempt: int
    final: bool
    kind: ReplyKind


@attrs.frozen(kw_only=True)
class Delivery:
    """One reply, or one part of a long one, on its way to one destination.

    `repeat` is true when an earlier try may have arrived (the process died between the sending
    and the record of it, on a channel without idempotent send). `final` is true for the last
    part of the reply with which a turn settled. `part` counts from 1. `traceparent` is the trace
    (W3C) of the attempt that said it.
    """

    id: int
    session: SessionKey
    key: str
    text: str
    in_reply_to: tuple[str, ...]
    attempt: int
    final: bool
    repeat: bool
    kind: ReplyKind
    part: int = 1
    parts: int = 1
    turn: int | None = None
    tries: int = 0
    not_before: datetime | None = None
    traceparent: str | None = None


@attrs.frozen(kw_only=True)
class Cursor:
    """A channel's place in its platform's stream (poll offset, sync token).

    Handed to `accept` with the messages that it covers; both are one transaction.
    """

    channel: str
    value: str


@attrs.frozen(kw_only=True)
class HistoryItem:
    """One line of a conversation's past, oldest first: who said what, when (aware UTC)."""

    role: Literal["user", "agent"]
    text: str
    at: datetime
    message_id: str | None = None


class Intake(Protocol):
    """The inbox as a channel sees it."""

    async def accept(self, *messages: Message, cursor: str | None = None) -> tuple[Receipt, ...]:
        """Hand in messages of this channel; return one receipt each, after the commit.

        Raises `StoreError` when nothing could be written: the messages were not accepted, so do
        not acknowledge them. A gateway that is closing refuses messages, and leaves the cursor
        where it was.
        """
        ...

    async def cursor(self) -> str | None:
        """The cursor committed last for this channel, or None."""
        ...

    async def history(self, session: str, limit: int) -> tuple[HistoryItem, ...]:
        """The last `limit` lines of a session of this channel, oldest first."""
        ...

    def refused_input(self, where: str, error: str) -> None:
        """Record that the channel met input it could not read (it goes to events and logs)."""
        ...


TextLength = Callable[[str], int]
