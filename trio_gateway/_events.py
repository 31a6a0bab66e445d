"""What happened, as typed values. Logs, metrics, pages and tests all read this one stream.

An event is said after the fact that it tells is on disk. No event carries a secret; what people and
agents say is only in events of debug level, for whoever subscribes.
"""

from __future__ import annotations

from datetime import datetime

import attrs

from ._markers import ResumeReason, TurnState
from ._messages import Delivery, RefusalKind, SessionKey


@attrs.frozen(kw_only=True)
class Event:
    """Something that happened. `level` is the level at which a log tells it."""

    level = "info"


@attrs.frozen(kw_only=True)
class GatewayStarted(Event):
    """Recovery is done; turns resume and channels connect from here on."""

    epoch: int
    previous_stop: str | None
    resuming: int
    quarantined: int
    expired: int
    waiting: int
    undelivered: int


@attrs.frozen(kw_only=True)
class MessageAccepted(Event):
    """A message is on disk; `duplicate` if it was before."""

    level = "debug"
    session: SessionKey
    message_id: str
    text: str
    duplicate: bool


@attrs.frozen(kw_only=True)
class MessageRefused(Event):
    """The inbox did not take a message, for `reason`; its sender may have been told less."""

    level = "warning"
    session: SessionKey
    message_id: str
    reason: str
    kind: RefusalKind = RefusalKind.MALFORMED


@attrs.frozen(kw_only=True)
class InputRefused(Event):
    """A channel met input that it could not read."""

    level = "warning"
    channel: str
    where: str
    error: str


@attrs.frozen(kw_only=True)
class MessageUnreadable(Event):
    """A stored message could not be read back. It ended `failed`; nothing else did."""

    level = "error"
    session: SessionKey
    message_id: str
    error: str


@attrs.frozen(kw_only=True)
class TurnEvent(Event):
    """Something about one turn."""

    session: SessionKey
    turn: int
    attempt: int


@attrs.frozen(kw_only=True)
class TurnBegun(TurnEvent):
    """RUNNING is on disk; the agent is called next. `waited`: how long ago, in seconds, the first
    of its messages was accepted."""

    messages: tuple[str, ...]
    waited: float = 0.0


@attrs.frozen(kw_only=True)
class TurnResumed(TurnBegun):
    """An interrupted turn goes on with a new attempt."""

    reason: ResumeReason
    interrupted_at: datetime
    alone: bool


@attrs.frozen(kw_only=True)
class TurnSettled(TurnEvent):
    """A turn has ended, on disk, with everything that ends with it. `settling`: seconds from the
    agent's end until that was on disk; None where no agent's call has ended the turn."""

    state: TurnState
    error: str | None = None
    traceback: str | None = None
    settling: float | None = None


@attrs.frozen(kw_only=True)
class TurnInterrupted(TurnEvent):
    """A turn's child has ended without settling; its marker stands."""

    level = "warning"
    reason: str


@attrs.frozen(kw_only=True)
class TurnUnresponsive(TurnEvent):
    """A turn did not end when it was cancelled. Its marker stands."""

    level = "error"
    waited: float


@attrs.frozen(kw_only=True)
class SettleDelayed(TurnEvent):
    """A settle could not be written; it is tried again, and the turn's slot is not free."""

    level = "error"
    error: str
    retry_in: float


@attrs.frozen(kw_only=True)
class StepRemembered(TurnEvent):
    """A step's result is on disk; no later attempt does it again."""

    level = "debug"
    name: str


@attrs.frozen(kw_only=True)
class ReplyCommitted(TurnEvent):
    """A reply is on disk and on its way."""

    level = "debug"
    key: str
    text: str
    final: bool


@attrs.frozen(kw_only=True)
class ProgressShown(TurnEvent):
    """A turn said what it is doing; ephemeral. `draft`: the text is how its next reply begins."""

    level = "debug"
    text: str
    draft: bool = False


@attrs.frozen(kw_only=True)
class AgentWrote(TurnEvent):
    """The program that runs a turn (`agents.ProcessAgent`) wrote a line to its standard error."""

    line: str


@attrs.frozen(kw_only=True)
class ModelDelayed(TurnEvent):
    """A model server did not answer (`agents.OpenAIAgent`), and is asked again."""

    level = "warning"
    error: str
    retry_in: float


@attrs.frozen(kw_only=True)
class DeliveryEvent(Event):
    """Something about one delivery. Above debug level its text is left out; `delivery.key` names
    it."""

    delivery: Delivery


@attrs.frozen(kw_only=True)
class Delivered(DeliveryEvent):
    """The platform has the text, and the store knows."""

    level = "debug"


@attrs.frozen(kw_only=True)
class DeliveryDelayed(DeliveryEvent):
    """A sending failed and is tried again."""

    level = "warning"
    error: str
    retry_in: float


@attrs.frozen(kw_only=True)
class DeadLettered(DeliveryEvent):
    """A delivery is given up. `trio-gateway dead-letters` shows and retries it."""

    level = "error"
    error: str


@attrs.frozen(kw_only=True)
class ChannelConnected(Event):
    """A channel can send and receive."""

    channel: str


@attrs.frozen(kw_only=True)
class ChannelFinished(Event):
    """A channel has no more input."""

    channel: str


@attrs.frozen(kw_only=True)
class ChannelFailed(Event):
    """A channel fell over and is started again."""

    level = "error"
    channel: str
    error: str
    retry_in: float
    traceback: str | None = None


@attrs.frozen(kw_only=True)
class TurnsPaused(Event):
    """Somebody asked that no turn begins for now (`paused`), or that turns begin again."""

    level = "warning"
    paused: bool
    by: str


@attrs.frozen(kw_only=True)
class StopRequested(Event):
    """Somebody asked the gateway to stop."""

    reason: ResumeReason
    by: str


@attrs.frozen(kw_only=True)
class TurnsMarked(Event):
    """Every open turn is RESUME_PENDING, in one transaction."""

    count: int
    seconds: float


@attrs.frozen(kw_only=True)
class MarkingFailed(Event):
    """The open turns could not be marked. The next boot resumes them all the same, as a crash."""

    level = "critical"
    error: str


@attrs.frozen(kw_only=True)
class DrainReport(Event):
    """What a stop did. Times are seconds; `phases` has one entry for each phase that ran.

    `settled`, `interrupted` and `unresponsive` are turns that were open when the stop began: their
    ids. What is in the last two resumes at the next boot, but for an end that was on its way to the
    disk when the stop gave its turn up: the store knows, and the boot asks the store.
    """

    reason: ResumeReason
    settled: tuple[int, ...]
    interrupted: tuple[int, ...]
    unresponsive: tuple[int, ...]
    marked: int | None
    timed_out: bool
    undelivered: int
    phases: dict[str, float]


@attrs.frozen(kw_only=True)
class StoreTrouble(Event):
    """The store failed an operation; who waits for it was told or tries again."""

    level = "error"
    operation: str
    error: str


@attrs.frozen(kw_only=True)
class TextsForgotten(Event):
    """Retention removed texts and ids that were older than `store.keep` and `store.remember`."""

    texts: int
    messages: int


@attrs.frozen(kw_only=True)
class GatewayFailed(Event):
    """The gateway's own code failed. It marks, drains and leaves with exit code 1."""

    level = "critical"
    error: str
    traceback: str


@attrs.frozen(kw_only=True)
class EventsDropped(Event):
    """This subscriber was too slow: `count` events were dropped before the next one."""

    level = "warning"
    count: int
