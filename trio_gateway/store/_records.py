"""What goes into the store's verbs and what comes out of them."""

from __future__ import annotations

from datetime import datetime, timedelta

import attrs

from .._markers import Marker, ResumeReason, TurnState
from .._messages import Delivery, Message, Receipt, ReplyKind, SessionKey
from .._policy import Command

# Every record here is read-only by convention, not by attrs' `frozen`: one or more of them is made
# for every turn on the busiest path, and a frozen class costs three times as much to make.


@attrs.define
class Resumed:
    """What an agent is told when its turn goes on: why and when it was interrupted (aware UTC),
    and which attempt that was."""

    reason: ResumeReason
    at: datetime
    attempt: int


@attrs.define
class OpenTurn:
    """A turn that is RUNNING on disk, with all that its agent needs."""

    id: int
    session: SessionKey
    session_id: int
    attempt: int
    messages: tuple[Message, ...]
    resumed: Resumed | None = None
    checkpoint: str | None = None
    steps: dict[str, Step] | None = None
    restart_asked: bool = False
    alone: bool = False
    unreadable: tuple[Unreadable, ...] = ()
    """Messages of an earlier attempt that cannot be read back: they ended, the turn goes on."""
    began_at: int = 0
    """When this attempt began, in microseconds since 1970."""
    accepted_at: tuple[int, ...] = ()
    """When each of `messages` was accepted."""


@attrs.define
class Step:
    """A step as the store knows it. `result` is JSON; None while it is only begun."""

    name: str
    done: bool
    result: str | None


@attrs.define
class Begin:
    """Ask for the next turn of a session, if it has mail. `collect`: all that waits, not one."""

    session: SessionKey
    session_id: int
    collect: bool


@attrs.define
class Unreadable:
    """A stored message that could not be read back: ended `failed` in the same transaction."""

    message_id: str
    error: str
    deliveries: tuple[Delivery, ...]


@attrs.define
class Taken:
    """The answer to a running turn that takes mail: the message, if there was one, and what could
    not be read on the way."""

    message: Message | None
    unreadable: tuple[Unreadable, ...] = ()


@attrs.define
class Begun:
    """The answer to `Begin`: the turn, if there was mail, and what could not be read on the way."""

    turn: OpenTurn | None
    unreadable: tuple[Unreadable, ...] = ()


@attrs.define
class NewReply:
    """A reply about to be committed. `n` is its number within the turn, from 1; together with the
    turn it makes the key. `arrived`: there is no wire to send it over, committed is delivered."""

    n: int
    kind: ReplyKind
    parts: tuple[str, ...]
    final: bool
    about: tuple[str, ...]
    arrived: bool = False
    traceparent: str | None = None


@attrs.define
class Arrival:
    """A message at the inbox, and what else its acceptance may do in the same transaction.

    `begin`: begin a turn with it. `interrupt`: stop the session's open turn, so that the next one
    gets both. `command`: it is no message for the agent but a word to the gateway.
    """

    message: Message
    key: SessionKey
    begin: bool = False
    interrupt: bool = False
    command: Command | None = None
    arrived: bool = False


@attrs.define
class Admitted:
    """What became of an `Arrival`.

    `queued` and `ended` say by how much the session's waiting and open messages changed, beyond the
    arrival itself; `stopped` is the turn that it stopped, `resolved` the ids of messages that it
    ended.
    """

    receipt: Receipt
    session_id: int
    turn: OpenTurn | None = None
    deliveries: tuple[Delivery, ...] = ()
    stopped: int | None = None
    queued: int = 0
    reopened: int = 0
    resolved: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether it changed anything but its own message and turn."""
        return bool(self.queued or self.deliveries or self.resolved or self.stopped is not None)


@attrs.define
class Settlement:
    """How a turn ends, and which turn begins in the same transaction, if any.

    Applies only while the turn is open, in this attempt (`attempt`), in this epoch.
    """

    turn: int
    attempt: int
    session: SessionKey
    session_id: int
    state: TurnState
    reply: NewReply | None = None
    error: str | None = None
    next: Begin | None = None


@attrs.define
class Settled:
    """`applied` is false when the turn had ended before, or goes on in a later attempt."""

    applied: bool
    deliveries: tuple[Delivery, ...] = ()
    next: Begun | None = None


@attrs.define
class PendingTurn:
    """An open turn of a dead epoch, as recovery finds it: its marker, and how long ago it was
    interrupted. What its agent needs is read when it resumes."""

    id: int
    session: SessionKey
    session_id: int
    marker: Marker
    interrupted_for: timedelta
    message_ids: tuple[str, ...]


@attrs.define
class WaitingSession:
    """A session with accepted messages that no turn has taken: `queued` of them."""

    session: SessionKey
    session_id: int
    queued: int


@attrs.define
class Recovered:
    """All that is open. `previous_stop` is how the last epoch ended; None: it died."""

    epoch: int
    previous_stop: str | None
    turns: tuple[PendingTurn, ...]
    waiting: tuple[WaitingSession, ...]
    deliveries: tuple[Delivery, ...]
    open_messages: int
    lost: int = 0
    """Rows that made no sense, and were ended."""


@attrs.define
class Said:
    """The outcome of committing a reply in mid-turn: `repeated` when an earlier attempt had said
    the same at the same place, so that nothing is sent again."""

    deliveries: tuple[Delivery, ...]
    repeated: bool


@attrs.define
class Draft:
    """How a reply grows: what follows the first `start` characters of the draft before it. `n`
    counts the replies of this attempt that were committed before it."""

    turn: int
    attempt: int
    n: int
    start: int
    text: str


@attrs.define
class Forgotten:
    """What one bite of retention removed, and where to go on (None: the end was reached)."""

    texts: int
    messages: int
    next_seq: int | None
