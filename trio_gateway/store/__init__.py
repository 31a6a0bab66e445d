"""The store: the contract, in the domain's verbs, and SQLite's way of keeping it.

Whoever writes a second store keeps these rules; `testing.check_store` holds it to them.

1. A verb returns after its change is durable, or raises `StoreError` having changed nothing that it
   knows of. A commit whose outcome is unknown is asked again: every verb may be run twice.
2. Changes take effect in the order in which the verbs were called.
3. A caller that waits for a change cannot be cancelled out of knowing its outcome (but for
   `mark_resume_pending`, `clear_resume_pending`, `notify` and `end_epoch`, whose deadline is the
   stop's: the write itself goes on). `settle`, `remember` and `delivered` tell what has happened
   already: they are written also for a caller that is cancelled when it calls.
4. Every change of a marker is a compare-and-set on (state, attempt, epoch). No verb assumes that
   this process is the only one: what a second gateway changed is seen and respected.
5. No verb costs more as stored sessions grow; boot costs what is open.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from .._markers import ResumeReason
from .._messages import Cursor, Delivery, HistoryItem, Message, Reply, SessionKey
from ._codec import BadRow
from ._database import SENSELESS
from ._ledger import MESSAGE_END, Ledger, reply_of
from ._lock import holder_of
from ._reads import (
    Counts,
    DeadLetter,
    Gauges,
    JournalEntry,
    MessageRow,
    OpenTurnRow,
    OutboxRow,
    QuarantineRow,
    SessionRow,
    StoreReader,
    Timeline,
    TimelineEntry,
)
from ._records import (
    Admitted,
    Arrival,
    Begin,
    Begun,
    Draft,
    Forgotten,
    NewReply,
    OpenTurn,
    PendingTurn,
    Recovered,
    Resumed,
    Said,
    Settled,
    Settlement,
    Step,
    Taken,
    Unreadable,
    WaitingSession,
)
from ._sqlite import SqliteStore, edit_store, open_store, read_store

T = TypeVar("T")


class Store(Protocol):
    """What the flow asks of a store. See the module for the rules that all verbs keep.

    The busiest verbs promise something to await and not a coroutine function, so that a store may
    hand its writer's own coroutine out.
    """

    @property
    def store_id(self) -> str:
        """Who this store is; keys of replies and steps begin with it."""
        ...

    async def recover(self, pulled: frozenset[str] = frozenset()) -> Recovered:
        """Open an epoch: charge what dead epochs left RUNNING, and return all that is open.
        `pulled` are the channels whose sessions have a journal, and whose replies have arrived
        when they are committed."""
        ...

    async def touch(self) -> None:
        """Note that this epoch lives: the best answer to "when did it die?"."""
        ...

    async def end_epoch(self, ending: str) -> None:
        """Note that this epoch ends in order, and how."""
        ...

    def accept(
        self, arrivals: Sequence[Arrival], cursor: Cursor | None = None
    ) -> Awaitable[tuple[Admitted, ...]]:
        """Take messages in, insert-if-absent, with the cursor that covers them; begin turns,
        replace turns and obey commands where an arrival says so; all in one transaction."""
        ...

    async def cursor(self, channel: str) -> str | None:
        """The cursor committed last for a channel."""
        ...

    async def stop_by_key(self, key: SessionKey) -> tuple[int | None, tuple[str, ...]]:
        """End a session's open turn for good: its id, and its messages' ids."""
        ...

    def begin(self, request: Begin) -> Awaitable[Begun]:
        """Begin the next turn of a session: RUNNING, with the mail that waits longest."""
        ...

    async def resume(self, pending: PendingTurn) -> OpenTurn | None:
        """Begin the next attempt of an interrupted turn; None if it has ended meanwhile. Messages
        that cannot be read back end; raises `BadRow` if that is all of them."""
        ...

    def settle(self, end: Settlement) -> Awaitable[Settled]:
        """End a turn: marker, messages, reply, and the begin of the next, together or not."""
        ...

    async def end_pending(self, ends: Sequence[Settlement]) -> tuple[Settled, ...]:
        """End turns that are RESUME_PENDING and will not be resumed."""
        ...

    async def mark_resume_pending(self, reason: ResumeReason) -> int:
        """Mark every turn of this epoch that is RUNNING, in one transaction; return how many."""
        ...

    def mark_resume_pending_from_thread(self, reason: ResumeReason, timeout: float) -> int | None:
        """The same, for a thread, when the loop does not answer. None: not done in time."""
        ...

    async def clear_resume_pending(self, ends: Sequence[Settlement]) -> tuple[Settled, ...]:
        """Settle turns whose children completed but whose settle was never written."""
        ...

    async def ask_restart(self, turn: int) -> None:
        """Remember that a turn has asked for a restart."""
        ...

    async def take(self, turn: int, attempt: int, request: Begin) -> Taken:
        """Let a running turn take the message that waits longest in its session."""
        ...

    async def begin_step(self, turn: int, attempt: int, name: str, effect: str) -> bool:
        """Note that an unsafe step is about to run. False: the attempt is over."""
        ...

    def remember(
        self, turn: int, attempt: int, name: str, effect: str, result: str, began_at: int
    ) -> Awaitable[bool]:
        """Keep a step's result (JSON). False: the attempt is over."""
        ...

    async def checkpoint(self, turn: int, attempt: int, value: str) -> bool:
        """Keep a turn's checkpoint (JSON). False: the attempt is over."""
        ...

    def say(
        self, turn: int, attempt: int, session: SessionKey, session_id: int, reply: NewReply
    ) -> Awaitable[Said | None]:
        """Commit a reply in mid-turn. None: the attempt is over."""
        ...

    async def notify(
        self, sessions: Sequence[tuple[SessionKey, int]], what: str, text: str
    ) -> tuple[Delivery, ...]:
        """Put notices into the outbox, one per session, `what` and epoch at the most."""
        ...

    async def note_drafts(self, drafts: Sequence[Draft]) -> None:
        """Put the growing texts of replies into the journal. Those of attempts that are over are
        left out."""
        ...

    def sending(self, delivery: int) -> Awaitable[None]:
        """Note that a delivery goes over a wire that cannot recognise a repeat."""
        ...

    def delivered(self, arrivals: Sequence[tuple[int, int]]) -> Awaitable[None]:
        """Note that deliveries have arrived: pairs of an id and how often it was tried."""
        ...

    async def delayed(
        self, delivery: int, tries: int, not_before: int, error: str, repeat: bool
    ) -> None:
        """Note that a delivery is tried again, not before (microseconds since 1970)."""
        ...

    async def dead(self, delivery: int, tries: int, error: str) -> None:
        """Give a delivery up, where a person can see it."""
        ...

    async def drop(self, delivery: int, error: str) -> None:
        """Give a notice up."""
        ...

    async def forget(self, after_seq: int, keep: int, remember: int) -> Forgotten:
        """One bite of retention."""
        ...

    async def history(
        self, session: SessionKey, turn: int | None, limit: int
    ) -> tuple[HistoryItem, ...]:
        """The last lines of a conversation before a turn (None: before now)."""
        ...

    async def replies_to(
        self, channel: str, message_id: str
    ) -> tuple[str | None, tuple[Reply, ...]]:
        """How a message stands (None: never seen), and what was said to it."""
        ...

    async def messages_of(self, pending: PendingTurn) -> tuple[Message, ...]:
        """The messages of an interrupted turn that can be read. Raises `BadRow` if none can."""
        ...

    async def open_turns(self) -> tuple[OpenTurnRow, ...]:
        """Every open turn and its marker."""
        ...

    async def inspect(self, question: Callable[[StoreReader], T]) -> T:
        """Let `question` read the store; what it returns."""
        ...

    async def requeue_quarantined(self, turn: int) -> WaitingSession | None:
        """The messages of a quarantined turn wait once more: in which session, and how many. None:
        no such turn."""
        ...

    async def drop_quarantined(self, turn: int) -> tuple[str, ...]:
        """The messages of a quarantined turn end for good: their ids."""
        ...

    async def resend_dead(self, delivery: int) -> Delivery | None:
        """A dead letter is on its way once more. None: no such dead letter."""
        ...

    async def drop_dead(self, delivery: int) -> bool:
        """Give a dead letter up for good. False: no such dead letter."""
        ...


__all__ = [
    "MESSAGE_END",
    "SENSELESS",
    "Admitted",
    "Arrival",
    "BadRow",
    "Begin",
    "Begun",
    "Counts",
    "DeadLetter",
    "Draft",
    "Forgotten",
    "Gauges",
    "JournalEntry",
    "Ledger",
    "MessageRow",
    "NewReply",
    "OpenTurn",
    "OpenTurnRow",
    "OutboxRow",
    "PendingTurn",
    "QuarantineRow",
    "Recovered",
    "Resumed",
    "Said",
    "SessionRow",
    "Settled",
    "Settlement",
    "SqliteStore",
    "Step",
    "Store",
    "StoreReader",
    "Taken",
    "Timeline",
    "TimelineEntry",
    "Unreadable",
    "WaitingSession",
    "edit_store",
    "holder_of",
    "open_store",
    "read_store",
    "reply_of",
]
