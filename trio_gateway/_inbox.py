"""The inbox: deduplicate, commit, and only then acknowledge.

A message that finds its session idle and a slot free begins its turn in the very transaction that
accepts it. The inbox stays open while turns drain: what arrives then waits for the next boot.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import attrs
import trio

from ._errors import ConfigError, InvalidInput, Refused, StoreClosed, StoreError, shown
from ._events import InputRefused, MessageAccepted, MessageRefused, StoreTrouble, TurnSettled
from ._markers import TurnState
from ._messages import (
    Cursor,
    HistoryItem,
    Message,
    Receipt,
    ReceiptStatus,
    RefusalKind,
    SessionKey,
)
from ._policy import (
    Busy,
    Command,
    Limits,
    Refusal,
    check_key,
    check_limit,
    command_in,
    lone_surrogate,
    malformed,
    no_room,
)
from ._sessions import Session
from ._strangers import theirs
from ._turns import Desk, Turns, Why
from .store import Admitted, Arrival, WaitingSession

Authorize = Callable[[Message], Awaitable[bool]]
"""Asked for every message, and again for every turn that resumes: may its sender talk to the agent?
False and an exception both mean no."""


class Inbox:
    """Takes messages in."""

    def __init__(
        self,
        desk: Desk,
        turns: Turns,
        limits: Limits,
        authorize: Authorize | None,
        *,
        commands: bool,
    ) -> None:
        self._desk = desk
        self._turns = turns
        self._limits = limits
        self._authorize = authorize
        self._commands = commands
        self.open = True

    def use(self, limits: Limits, *, commands: bool) -> None:
        """Take messages in by these limits from now on; what was accepted stays."""
        self._limits, self._commands = limits, commands

    def accept(
        self, messages: Sequence[Message], cursor: Cursor | None
    ) -> Awaitable[tuple[Receipt, ...]]:
        """Take messages in with the cursor that covers them; receipts in the same order."""
        _check_messages(messages)
        _check_cursor(cursor)
        accept = self._accept_traced if self._desk.tracer.on else self._accept
        return accept(messages, cursor)

    async def _accept_traced(
        self, messages: Sequence[Message], cursor: Cursor | None
    ) -> tuple[Receipt, ...]:
        with self._desk.tracer.accepting(messages) as arrived:
            receipts = await self._accept(arrived.messages, cursor)
            arrived.answered(receipts)
            return receipts

    async def _accept(
        self, messages: Sequence[Message], cursor: Cursor | None
    ) -> tuple[Receipt, ...]:
        denied = await self._denied(messages)
        chosen: list[tuple[Session, Arrival]] = []
        refused: dict[int, Refusal] = {}
        for index, message in enumerate(messages):
            refusal = denied.get(index) or self._refusal(message)
            if refusal is None:
                chosen.append(self._expect(message))
            else:
                refused[index] = refusal
        # What a closing gateway refuses is to be sent again: it must not count as received.
        admitted = await self._commit(chosen, cursor if self.open else None)
        if not refused:
            return tuple([result.receipt for result in admitted])
        receipts: list[Receipt] = []
        accepted = iter(admitted)
        # What was committed is told, also to a caller that was cancelled meanwhile.
        with trio.CancelScope(shield=bool(admitted)):
            for index, message in enumerate(messages):
                refusal = refused.get(index)
                receipts.append(
                    await self._refuse(message, refusal) if refusal else next(accepted).receipt
                )
        return tuple(receipts)

    # ----- read and decide

    async def _denied(self, messages: Sequence[Message]) -> dict[int, Refusal]:
        """Ask the host's hook, for messages that are worth asking about."""
        if self._authorize is None:
            return {}
        denied: dict[int, Refusal] = {}
        for index, message in enumerate(messages):
            refusal = malformed(message, self._limits) or await _denial(self._authorize, message)
            if refusal is not None:
                denied[index] = refusal
        return denied

    def _refusal(self, message: Message) -> Refusal | None:
        refusal = malformed(message, self._limits)
        if refusal is None and not self.open:
            refusal = Refusal(
                "the gateway is closing; send it again", retryable=True, kind=RefusalKind.CLOSING
            )
        return refusal or self._no_room(message)

    def _no_room(self, message: Message) -> Refusal | None:
        sessions = self._desk.sessions
        if self._command(message) is not None:
            return None  # a full inbox must not keep anybody from saying /stop
        session = sessions.find(message.key)
        if session is not None and session.busy and self._desk.busy is Busy.REJECT:
            return Refusal(
                "busy with the message before; try again when it is answered",
                retryable=True,
                kind=RefusalKind.BUSY,
            )
        return no_room(
            self._limits,
            0 if session is None else session.open,
            sessions.open_messages + sessions.elsewhere,
        )

    def _command(self, message: Message) -> Command | None:
        return command_in(message.text) if self._commands else None

    def _expect(self, message: Message) -> tuple[Session, Arrival]:
        """Count the message as open before it is, and take the slot that its turn will need."""
        sessions = self._desk.sessions
        session = sessions.get(message.key)
        command = self._command(message)
        arrival = Arrival(
            message,
            session.key,
            command=command,
            arrived=self._desk.links.is_local(message.channel),
        )
        if command is None:
            sessions.opened(session, 1)
            if sessions.may_begin_at_once(session):
                arrival.begin = True
                sessions.occupy(session)
                self._turns.opening()
            arrival.interrupt = self._desk.busy is Busy.INTERRUPT and sessions.may_begin_turns
        session.accepting += 1
        return session, arrival

    async def _refuse(self, message: Message, refusal: Refusal) -> Receipt:
        if refusal.retryable and await self._is_known(message):
            # Sent again while there is no room: it was accepted before, and that stands.
            self._say_accepted(message, duplicate=True)
            return Receipt(status=ReceiptStatus.DUPLICATE, session=message.key, id=message.id)
        session = SessionKey(as_text(message.channel), as_text(message.session))
        self._desk.events.emit(
            MessageRefused(
                session=session,
                message_id=as_text(message.id),
                reason=refusal.for_log or refusal.reason,
                kind=refusal.kind,
            )
        )
        return Receipt(
            status=ReceiptStatus.REFUSED,
            session=session,
            id=message.id,
            reason=refusal.reason,
            retryable=refusal.retryable,
            refusal=refusal.kind,
        )

    async def _is_known(self, message: Message) -> bool:
        try:
            state, _ = await self._desk.store.replies_to(message.channel, message.id)
        except StoreError:
            return False  # nobody can tell: refused for now, which is true in any case
        return state is not None

    # ----- commit and act

    async def _commit(
        self, chosen: list[tuple[Session, Arrival]], cursor: Cursor | None
    ) -> tuple[Admitted, ...]:
        if not chosen and cursor is None:
            return ()
        try:
            admitted = await self._desk.store.accept([arrival for _, arrival in chosen], cursor)
        except BaseException as error:
            # Not accepted: neither by a failure of the store, nor cancelled before it was asked.
            for session, arrival in chosen:
                self._take_back(session, arrival)
            self._turns.dispatch()
            self._desk.on_quiet()
            if isinstance(error, StoreError) and not isinstance(error, StoreClosed):
                # Whoever sent it is told; whoever looks after the gateway has to know, too.
                self._desk.events.emit(StoreTrouble(operation="accept", error=str(error)))
            raise
        for (session, arrival), result in zip(chosen, admitted, strict=True):
            self._act(session, arrival, result)
        self._turns.dispatch()
        self._desk.on_quiet()
        return admitted

    def _take_back(self, session: Session, arrival: Arrival) -> None:
        session.accepting -= 1
        if arrival.command is None:
            self._desk.sessions.opened(session, -1)
        if arrival.begin:
            self._turns.opened()
            self._desk.sessions.vacate(session)
        else:
            self._desk.sessions.line_up(session)

    def _act(self, session: Session, arrival: Arrival, result: Admitted) -> None:
        sessions = self._desk.sessions
        session.id = result.session_id
        session.accepting -= 1
        duplicate = result.receipt.status is ReceiptStatus.DUPLICATE
        if arrival.command is None and duplicate:
            sessions.opened(session, -1)
        if result.changes:
            self._note_changes(session, result)
        if result.turn is not None:
            self._turns.start(session, result.turn)
        elif arrival.begin:
            sessions.vacate(session)
        else:
            sessions.line_up(session)
        if arrival.begin:
            self._turns.opened()
        if arrival.command is not None:
            self._desk.waiters.ended(session.key.channel, (arrival.message.id,))
        self._say_accepted(arrival.message, duplicate)

    def _note_changes(self, session: Session, result: Admitted) -> None:
        """What the arrival changed beyond itself: a turn stopped, messages ended or reopened."""
        desk = self._desk
        desk.sessions.queue(session, result.queued)
        self._note_open(session, result.reopened - len(result.resolved))
        if result.stopped is not None:
            replaced = not result.resolved
            session.collect = session.collect or replaced
            self.note_stopped(
                session.key, result.stopped, Why.REPLACED if replaced else Why.STOPPED
            )
        desk.outbox.put(result.deliveries)
        desk.waiters.ended(session.key.channel, result.resolved)

    def _note_open(self, session: Session, change: int) -> None:
        """So many messages more (or less) are open in a session. What was open at boot in a session
        of a channel that this gateway does not have was never counted in it."""
        sessions = self._desk.sessions
        if not self._desk.links.has(session.key.channel):
            apart = max(-change - session.open, 0)
            sessions.elsewhere -= apart
            change += apart
        sessions.opened(session, change)

    def note_requeued(self, waiting: WaitingSession) -> None:
        """Messages that had ended wait once more, in the store: here, too."""
        desk = self._desk
        if not desk.links.has(waiting.session.channel):
            desk.sessions.elsewhere += waiting.queued
            return
        session = desk.sessions.get(waiting.session)
        session.id = waiting.session_id
        desk.sessions.opened(session, waiting.queued)
        desk.sessions.queue(session, waiting.queued)
        desk.sessions.line_up(session)
        self._turns.dispatch()

    def note_stopped(self, key: SessionKey, turn: int, why: Why) -> None:
        """A turn was ended STOPPED in the store: end its child too."""
        child = self._turns.of_turn(turn)
        self._turns.cancel(turn, why)
        self._turns.give_up_resuming(key, turn)
        self._desk.events.emit(
            TurnSettled(
                session=key,
                turn=turn,
                attempt=child.turn.attempt if child else 0,
                state=TurnState.STOPPED,
                error=why.value,
            )
        )

    def _say_accepted(self, message: Message, duplicate: bool) -> None:
        if self._desk.events.heard:
            self._desk.events.emit(
                MessageAccepted(
                    session=message.key,
                    message_id=message.id,
                    text=message.text,
                    duplicate=duplicate,
                )
            )

    async def stop_turn(self, key: SessionKey) -> bool:
        """End the open turn of a session for good. False: it has none."""
        check_key(key)
        turn, resolved = await self._desk.store.stop_by_key(key)
        if turn is None:
            return False
        desk = self._desk
        session = desk.sessions.get(key)
        self._note_open(session, -len(resolved))
        self.note_stopped(key, turn, Why.STOPPED)
        desk.waiters.ended(key.channel, resolved)
        desk.sessions.let_go(session)  # its child may have ended before this came back
        desk.on_quiet()
        return True


def as_text(value: object) -> str:
    """What stands where a name should, for whoever reads what was refused."""
    return value if isinstance(value, str) else shown(value)


async def _denial(authorize: Authorize, message: Message) -> Refusal | None:
    """What the hook says. Its failure means no, and is for the log, not for the sender."""
    try:
        if await authorize(message):
            return None
    except BaseException as error:  # noqa: ASYNC103 - it raises what is not the hook's
        fault = shown(theirs(error))
        return Refusal(  # noqa: ASYNC104
            "not allowed",
            kind=RefusalKind.NOT_ALLOWED,
            for_log=f"not allowed: authorize failed with {fault}",
        )
    return Refusal("not allowed", kind=RefusalKind.NOT_ALLOWED)


def _check_messages(messages: Sequence[Message]) -> None:
    """Before anything is counted: what comes after a bad one would stay counted."""
    for message in messages:
        if not isinstance(message, Message):
            raise InvalidInput(f"expected a Message, got {type(message).__name__}")


def _check_cursor(cursor: Cursor | None) -> None:
    if cursor is None:
        return
    if not isinstance(cursor, Cursor):
        raise InvalidInput(f"cursor: expected a Cursor, got {type(cursor).__name__}")
    for name, text in (("channel", cursor.channel), ("value", cursor.value)):
        if not isinstance(text, str) or lone_surrogate(text) is not None:
            raise InvalidInput(f"cursor.{name}: expected Unicode text, got {shown(text)}")


@attrs.frozen
class ChannelIntake:
    """The inbox as one channel sees it: messages and cursor are this channel's."""

    inbox: Inbox
    desk: Desk
    name: str

    async def accept(self, *messages: Message, cursor: str | None = None) -> tuple[Receipt, ...]:
        """See `Intake.accept`."""
        _check_messages(messages)
        for message in messages:
            if message.channel != self.name:
                raise ConfigError(
                    f"channel {self.name!r} handed in a message of channel"
                    f" {shown(message.channel)}: set Message.channel to the channel's name"
                )
        covered = None if cursor is None else Cursor(channel=self.name, value=cursor)
        return await self.inbox.accept(messages, covered)

    async def cursor(self) -> str | None:
        """See `Intake.cursor`."""
        return await self.desk.store.cursor(self.name)

    async def history(self, session: str, limit: int) -> tuple[HistoryItem, ...]:
        """See `Intake.history`."""
        key = SessionKey(self.name, session)
        check_key(key)
        check_limit(limit)
        return await self.desk.store.history(key, None, limit)

    def refused_input(self, where: str, error: str) -> None:
        """See `Intake.refused_input`."""
        self.desk.events.emit(InputRefused(channel=self.name, where=where, error=error))


def refused_error(receipt: Receipt) -> Refused:
    """The error for a message that was refused."""
    return Refused(f"message {shown(receipt.id)} was refused: {receipt.reason}")
