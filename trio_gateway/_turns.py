"""Turns: one nursery child and one cancel scope each; the handle an agent holds; settling.

The life of a child:

    RUNNING on disk ---> agent(turn) ---> settle (marker, messages, reply: one transaction)
                            |                 |
                            |                 '--> its slot goes to whoever is next in line,
                            |                      in the same transaction where that is possible
                            '--> cancelled: by a stop (its marker stands), by the user or a newer
                                 message (already settled by whoever asked), by its time limit
                                 (settled FAILED here)

A slot is free only when the settle is on disk: while it cannot be written it is tried again.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from enum import Enum
from typing import Any, Final, NoReturn, TypeVar, overload

import attrs
import trio
from trio_util import AsyncBool

from . import _steps
from ._agents import AsyncAgent
from ._clock import Clock
from ._errors import (
    AgentMisuse,
    GatewayStopping,
    StepInDoubt,
    StoreClosed,
    StoreError,
    lone_cause,
    parted,
    unwrap,
)
from ._events import (
    MessageUnreadable,
    ProgressShown,
    ReplyCommitted,
    SettleDelayed,
    StepRemembered,
    StoreTrouble,
    TurnBegun,
    TurnInterrupted,
    TurnResumed,
    TurnSettled,
)
from ._links import Links
from ._markers import TurnState
from ._messages import HistoryItem, Message, ReplyKind, SessionKey
from ._outbox import Outbox
from ._policy import (
    SORRY,
    SORRY_TIME,
    SORRY_UNREADABLE,
    Busy,
    check_limit,
    in_doubt_text,
    retry_delay,
    unicode_text,
)
from ._sessions import Session, Sessions
from ._steps import Effect, Steps
from ._strangers import is_being_cancelled
from ._stream import EventStream
from ._tracing import NO_SPAN, Span, Tracer
from ._waiters import Outcome, Waiters
from .store import (
    MESSAGE_END,
    BadRow,
    Begin,
    Begun,
    NewReply,
    OpenTurn,
    PendingTurn,
    Resumed,
    Settled,
    Settlement,
    Store,
    Unreadable,
    reply_of,
)

T = TypeVar("T")

RETRY_CAP: Final = 10.0
"""Seconds between two tries of a settle at the most."""


MISSES: Final = 100
"""Begins in a row that find no mail where there is to be some."""


class Why(Enum):
    """Why a turn's scope was cancelled by us."""

    DRAINED = "the gateway stops; this turn resumes at the next boot"
    STOPPED = "stopped by the user"
    REPLACED = "a newer message arrived"


@attrs.define(eq=False)
class Running:
    """One child: what it runs, under which scope, and how far it is."""

    turn: OpenTurn
    session: Session
    scope: trio.CancelScope
    handle: Turn
    since: float
    over: trio.Event | None = None
    why: Why | None = None
    end: Settlement | None = None
    span: Span = NO_SPAN
    ended_at: float = 0.0
    settled: bool = False
    messages: list[Message] = attrs.field(factory=list[Message])

    def cancel(self, why: Why) -> None:
        """Cancel the child; the first reason counts."""
        self.why = self.why or why
        self.scope.cancel(reason=self.why.value)

    @property
    def step(self) -> str | None:
        """The step that it began last of those that it is in."""
        steps = self.handle._steps
        return steps.under_way[-1] if steps is not None and steps.under_way else None

    async def wait_over(self) -> None:
        """Wait until the child has ended, its commit included."""
        if self.handle._child is None:
            return  # it has, while the caller was busy
        if self.over is None:
            self.over = trio.Event()
        await self.over.wait()


@attrs.frozen(kw_only=True)
class TurnInfo:
    """A running turn at a glance. `running_for` is in seconds; `step` is the one that it is in, if
    it is in any."""

    id: int
    session: SessionKey
    attempt: int
    running_for: float
    step: str | None = None


@attrs.define(eq=False)
class Desk:
    """What every turn of one gateway works with."""

    store: Store
    links: Links
    sessions: Sessions
    outbox: Outbox
    waiters: Waiters
    events: EventStream
    clock: Clock
    tracer: Tracer
    busy: Busy
    time_limit: float | None
    draining: AsyncBool
    ask_restart: Callable[[Running], None]
    stop_reason: Callable[[], str]
    on_quiet: Callable[[], None]
    on_failure: Callable[[BaseException], None]


class Turns:
    """The nursery of turns: starts children, settles them, and knows who is open."""

    def __init__(self, desk: Desk) -> None:
        self.desk = self._desk = desk
        self._open: dict[int, Running] = {}
        self._resuming: dict[int, trio.Event] = {}
        self._stopped_early: dict[int, Why] = {}
        self._emptied: trio.Event | None = None
        self._opening = 0
        self.settled_late: set[int] = set()
        """Turns that have settled since the door was shut, whoever settled them."""

    @asynccontextmanager
    async def hosting(self, agent: AsyncAgent) -> AsyncGenerator[None, None]:
        """Turns can run while the block lasts; leaving it waits for every child."""
        async with trio.open_nursery() as nursery:
            self._agent = agent
            self._nursery = nursery
            # What a task has in its context variables goes on in those that it starts: a turn must
            # not find what the turn before it, which gave it its slot, had there.
            self._context = copy_context()
            yield

    # ----- who is open

    def __len__(self) -> int:
        return len(self._open)

    def running(self) -> tuple[Running, ...]:
        """The children that have not ended."""
        return tuple(self._open.values())

    def of_turn(self, turn: int) -> Running | None:
        """The child of a turn, if it has one."""
        return self._open.get(turn)

    async def wait_empty(self) -> None:
        """Wait until every child has ended, its commit included."""
        while self._open:
            if self._emptied is None:
                self._emptied = trio.Event()
            await self._emptied.wait()

    def cancel(self, turn: int, why: Why) -> None:
        """Cancel the child of a turn that somebody else has settled."""
        self._note_late(turn)
        child = self._open.get(turn)
        if child is not None:
            child.settled = True
            child.cancel(why)
        elif self._opening:
            # Its begin is committed and its child about to start: `_start` looks here.
            self._stopped_early[turn] = why

    # ----- beginning

    def opening(self) -> None:
        """A begin is on its way to the disk."""
        self._opening += 1

    def opened(self) -> None:
        """It came back; its child, if any, was started."""
        self._opening -= 1
        if not self._opening:
            self._stopped_early.clear()

    def start(self, session: Session, turn: OpenTurn) -> None:
        """Start the child of a turn that is RUNNING on disk. The session has its slot.

        With the door shut nothing starts: the turn was marked with the others, and resumes.
        """
        if self._stopped_early.pop(turn.id, None) is not None:
            self._release(session)
            self._over(turn.id)
        elif self._desk.sessions.door_open:
            self._open[turn.id] = child = self._child(session, turn)
            name = f"turn {turn.id} ({turn.session})"
            self._context.run(lambda: self._nursery.start_soon(self._live, child, name=name))

    def dispatch(self) -> None:
        """Begin turns for those in line, as far as there are slots."""
        while (claim := self._desk.sessions.next_claim()) is not None:
            if claim.pending is None:
                self._nursery.start_soon(self._guard, self._begin, claim.session)
            else:
                self._nursery.start_soon(self._guard, self._resume, claim.session, claim.pending)

    async def _guard(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            await work(*args)
        except Exception as error:
            self._desk.on_failure(error)

    async def _begin(self, session: Session) -> None:
        desk = self._desk
        request = desk.sessions.begin_request(session)
        self.opening()
        try:
            begun = await self._until_written("begin", desk.store.begin, request)
            if begun is not None:
                self._go_on(session, begun)
        except StoreError:
            session.collect = request.collect
            self._set_aside(session, None)
        finally:
            self.opened()

    def _set_aside(self, session: Session, pending: PendingTurn | None) -> None:
        """Something about this very turn is damaged: it must not keep its slot from the others."""
        self._desk.sessions.set_aside(session, None if pending is None else pending.id)
        self._nursery.start_soon(self._guard, self._bring_back, session.key, pending)
        self._after_change()

    async def _bring_back(self, key: SessionKey, pending: PendingTurn | None) -> None:
        """What is damaged may be mended in a while."""
        with trio.move_on_after(RETRY_CAP):
            await self._desk.sessions.wait_shut()
        self._desk.sessions.bring_back(key, pending)
        self.dispatch()

    def _go_on(self, session: Session, begun: Begun) -> None:
        """Start what a begin found; the session has a slot."""
        note_unreadable(self._desk, session, begun.unreadable)
        if begun.turn is not None:
            session.misses = 0
            session.queued -= len(begun.turn.messages)
            self.start(session, begun.turn)
            return
        session.misses += 1
        if session.misses > MISSES:
            # A few can be news of what took the mail that is still under way. So many can not: the
            # count is wrong, and believing it would ask for ever.
            session.queued = session.misses = 0
        self._release(session)

    # ----- resuming

    async def resume(self, pending: PendingTurn) -> None:
        """Put an interrupted turn in line; return when its next attempt has ended."""
        over = self._resuming[pending.id] = trio.Event()
        if self._desk.sessions.line_up_resume(pending):
            self.dispatch()
            await over.wait()
        else:
            del self._resuming[pending.id]
            await trio.lowlevel.checkpoint()

    def give_up_resuming(self, key: SessionKey, turn: int) -> None:
        """A turn that waits to resume was ended: its session goes on without waiting for it."""
        session = self._desk.sessions.find(key)
        if session is not None and self._desk.sessions.release_hold(session, turn):
            self._over(turn)
            self._after_change()

    async def _resume(self, session: Session, pending: PendingTurn) -> None:
        self.opening()
        try:
            turn = await self._until_written("resume", self._desk.store.resume, pending)
            if turn is not None:
                note_unreadable(self._desk, session, turn.unreadable, waited=False)
                self.start(session, turn)
                return
        except BadRow as bad:
            sorry = self.apology(pending, SORRY_UNREADABLE)
            end = pending_end(pending, TurnState.FAILED, str(bad), sorry)
            await self._write_pending_ends([(pending, end)])
        except StoreError:
            self._set_aside(session, pending)
            return
        finally:
            self.opened()
        # It has ended meanwhile, or just now.
        self._release(session)
        self._over(pending.id)

    def apology(self, pending: PendingTurn, text: str) -> NewReply:
        """What the sender of a turn is told that does not resume."""
        return self.new_reply(pending.session, ReplyKind.APOLOGY, text, pending.message_ids)

    async def end_pending_turns(self, ends: Sequence[tuple[PendingTurn, Settlement]]) -> None:
        """End turns that were interrupted and are not resumed; their sessions go on. They have no
        slot yet."""
        await self._write_pending_ends(ends)
        for pending, _ in ends:
            self.give_up_resuming(pending.session, pending.id)

    async def _write_pending_ends(self, ends: Sequence[tuple[PendingTurn, Settlement]]) -> None:
        store = self._desk.store
        settled = await self._until_written(
            "end", store.end_pending, [end for _, end in ends], for_good=True
        )
        for (pending, end), result in zip(ends, settled or (), strict=False):
            if result.applied:
                self._note_pending_end(pending, end, result)

    def _note_pending_end(self, pending: PendingTurn, end: Settlement, result: Settled) -> None:
        desk = self._desk
        desk.sessions.opened(desk.sessions.get(pending.session), -len(pending.message_ids))
        desk.outbox.put(result.deliveries)
        desk.events.emit(TurnSettled(**_who(end), state=end.state, error=end.error))
        desk.waiters.ended(end.session.channel, pending.message_ids)

    def _over(self, turn: int) -> None:
        """Wake who waits for the end of a resumed attempt."""
        over = self._resuming.pop(turn, None)
        if over is not None:
            over.set()

    async def _until_written(
        self,
        what: str,
        call: Callable[..., Awaitable[T]],
        *args: object,
        for_good: bool = False,
    ) -> T | None:
        """Write until it is written; None when the door was shut before that. Raises `StoreError`
        where trying again does not help, unless it is to be tried again all the same."""
        tries = 0
        while self._desk.sessions.door_open:
            try:
                return await call(*args)
            except StoreClosed:
                return None
            except StoreError as error:
                tries += 1
                self._desk.events.emit(StoreTrouble(operation=what, error=str(error)))
                if not (error.retryable or for_good):
                    raise
                with trio.move_on_after(retry_delay(tries, random.random(), cap=RETRY_CAP)):
                    # A stop does not wait for the next try.
                    await self._desk.sessions.wait_shut()
        return None

    # ----- a child's life

    def _child(self, session: Session, turn: OpenTurn) -> Running:
        limit = self._desk.time_limit
        scope = trio.CancelScope() if limit is None else trio.CancelScope(relative_deadline=limit)
        handle = Turn(self._desk, turn)
        child = Running(
            turn, session, scope, handle, trio.current_time(), messages=handle._messages
        )
        handle._child = child
        return child

    async def _live(self, child: Running) -> None:
        with self._desk.tracer.turn(child.turn) as child.span:
            await self._live_traced(child)

    async def _live_traced(self, child: Running) -> None:
        try:
            if child.why is None:  # else it was ended before it could even start
                self._say_begun(child.turn)
            child.end = end = await self._attempt(child)
            child.handle._close()
            settled, heir = (None, None) if end is None else await self._settle(child, end)
            if end is None or settled is None:
                child.span.cancelled(_why_in_a_word(child, self._desk))
                self._say_interrupted(child)
                self._ended(child)
            else:
                if settled.applied:
                    child.span.note("outcome", end.state.value.lower())
                else:  # somebody else has ended it
                    child.span.cancelled(_why_in_a_word(child, self._desk))
                self._note_settled(child, end, settled)
                self._hand_over(child, settled, heir)
        except BaseException as error:  # noqa: ASYNC103 - what is no Exception is re-raised
            # Not the agent's: that is caught where it is called. Ours: stop in order. Or what owns
            # the agent has fallen over, and cancels all that runs inside it.
            self._gone(child)
            child.span.cancelled("host")
            if not isinstance(error, Exception):
                raise
            self._desk.on_failure(error)

    async def _attempt(self, child: Running) -> Settlement | None:
        """Call the agent once: how the turn ends, or None when it was interrupted or has been
        settled by somebody else."""
        if child.why is not None:
            return None  # before it could even start
        try:
            with child.scope:
                text = await self._agent(child.handle)
                return self._completed(child, text)
        except GeneratorExit:
            raise  # Trio itself is gone
        except BaseException as error:  # noqa: ASYNC103 - it raises what is not the agent's
            return self._fell_over(child, error)  # noqa: ASYNC104
        if child.why is None:
            child.span.cancelled("time_limit")
            return self._end(child, TurnState.FAILED, SORRY_TIME, "took longer than its time limit")
        return None

    def _fell_over(self, child: Running, error: BaseException) -> Settlement | None:
        """What an error that came out of an agent means. `sys.exit()` is one like any other."""
        cancelled, rest = parted(error, trio.Cancelled)
        if cancelled is not None and is_being_cancelled():
            raise cancelled  # by who hosts us, not by us: it goes on its way
        interrupt, _ = parted(rest, KeyboardInterrupt)
        if interrupt is not None:
            # Python raises it wherever it happens to be: it is meant for the host, not the agent.
            self._desk.on_failure(interrupt)
            return None
        return self._failed(child, error)

    def _completed(self, child: Running, text: object) -> Settlement | None:
        if child.why in (Why.STOPPED, Why.REPLACED):
            return None
        if text is not None and not isinstance(text, str):
            raise AgentMisuse(
                f"the agent returned {type(text).__name__!r}: return the reply as a str, or None"
            )
        return self._end(child, TurnState.COMPLETED, text or None, None)

    def _failed(self, child: Running, error: BaseException) -> Settlement | None:
        """FAILED, unless the error is only how the agent took its cancellation."""
        if child.why is not None:
            return None
        trace = "".join(traceback.format_exception(error))
        child.span.failed(type(unwrap(error)).__name__)
        end = self._end(child, TurnState.FAILED, apology_for(error), _one_line(error))
        child.handle._traceback = trace
        return end

    def _end(
        self, child: Running, state: TurnState, text: str | None, error: str | None
    ) -> Settlement:
        turn = child.turn
        kind = ReplyKind.ANSWER if state is TurnState.COMPLETED else ReplyKind.APOLOGY
        about = tuple(message.id for message in child.messages)
        reply = None if text is None else self.new_reply(turn.session, kind, text, about)
        if reply is not None:
            reply.traceparent = child.span.traceparent
        return Settlement(turn.id, turn.attempt, turn.session, turn.session_id, state, reply, error)

    def new_reply(
        self, session: SessionKey, kind: ReplyKind, text: str, about: tuple[str, ...]
    ) -> NewReply:
        """The reply with which a turn settles, ready for its session's channel."""
        links = self._desk.links
        parts = links.parts(session.channel, unicode_text(text))
        return NewReply(0, kind, parts, True, about, links.is_local(session.channel))

    # ----- settling

    async def _settle(
        self, child: Running, end: Settlement
    ) -> tuple[Settled | None, Session | None]:
        child.ended_at = trio.current_time()
        with self._desk.tracer.settle() as span:
            settled, heir = await self._write_end(child, end)
            if settled is None:
                span.cancelled(_why_in_a_word(child, self._desk))
            return settled, heir

    async def _write_end(
        self, child: Running, end: Settlement
    ) -> tuple[Settled | None, Session | None]:
        """Write the end, again and again until it is written or the gateway leaves (None), and
        with it the begin of whoever is next (the heir of the slot)."""
        tries = 0
        while True:
            # Once it has failed, alone: the reason may be the other's.
            heir = None if tries else self._desk.sessions.next_begin_after(child.session)
            end.next = None if heir is None else self._desk.sessions.begin_request(heir)
            if heir is not None:
                self.opening()
            try:
                return await self._desk.store.settle(end), heir
            except StoreClosed:
                return None, None  # it did not end when it was told to, and the gateway has left
            except StoreError as error:
                tries += 1
                self._disinherit(child, heir, end.next)
                end.next = None  # a stop may write this end, and must begin nothing with it
                delay = retry_delay(tries, random.random(), cap=RETRY_CAP)
                self._desk.events.emit(SettleDelayed(**_who(end), error=str(error), retry_in=delay))
                if not await self._pause(child, delay):
                    return None, None

    def _disinherit(self, child: Running, heir: Session | None, request: Begin | None) -> None:
        if heir is None or request is None:
            return
        self.opened()
        heir.collect = request.collect
        if heir is not child.session:
            heir.busy = False
            self._desk.sessions.line_up(heir)

    async def _pause(self, child: Running, delay: float) -> bool:
        """Wait before the next try; False when the gateway does not wait any longer."""
        with trio.CancelScope() as child.scope:
            if child.why is Why.DRAINED:
                child.scope.cancel(reason=child.why.value)
            await trio.sleep(delay)
        return not child.scope.cancelled_caught

    def _note_settled(self, child: Running, end: Settlement, settled: Settled) -> None:
        """Tell everybody who should know; once, whoever wrote the end."""
        if child.settled:
            return
        child.settled = True
        self._note_late(child.turn.id)
        if not settled.applied:
            return  # somebody else has ended it, and told
        desk = self._desk
        desk.sessions.opened(child.session, -len(child.messages))
        desk.outbox.put(settled.deliveries)
        self._say_settled(child, end, settled)
        if desk.waiters:
            ids = [message.id for message in child.messages]
            desk.waiters.ended(end.session.channel, ids, _outcome(child, end, settled))

    def _note_late(self, turn: int) -> None:
        if not self._desk.sessions.door_open:
            self.settled_late.add(turn)

    def _hand_over(self, child: Running, settled: Settled, heir: Session | None) -> None:
        """Give the slot to the heir's turn, or back."""
        if heir is None or settled.next is None:
            self._ended(child)
            return
        if heir is not child.session:
            child.session.busy = False
            self._desk.sessions.line_up(child.session)
        self._remove(child)
        self._go_on(heir, settled.next)
        self.opened()
        self._after_change()

    def _ended(self, child: Running) -> None:
        self._remove(child)
        self._release(child.session)

    def _remove(self, child: Running) -> None:
        self._open.pop(child.turn.id, None)
        # Cut the circle between the two, so that memory is free at once and not when the collector
        # comes round: at thousands of turns a second it is what limits them.
        child.handle._child = None
        if child.over is not None:
            child.over.set()
        if self._resuming:
            self._over(child.turn.id)

    def _gone(self, child: Running) -> None:
        """The child is no more, and its marker stands; no turn takes its place."""
        self._remove(child)
        self._note_empty()

    def _release(self, session: Session) -> None:
        self._desk.sessions.vacate(session)
        self._after_change()

    def _after_change(self) -> None:
        self.dispatch()
        self._note_empty()
        self._desk.on_quiet()

    def _note_empty(self) -> None:
        if not self._open and self._emptied is not None:
            self._emptied.set()
            self._emptied = None

    def unsettled(self) -> tuple[Running, ...]:
        """Children whose agent has ended and whose end is not on disk yet."""
        return tuple(child for child in self._open.values() if child.end and not child.settled)

    def account(self, ends: Sequence[Settlement], results: Iterable[Settled]) -> None:
        """Note children whose ends the stop itself has written."""
        for end, settled in zip(ends, results, strict=True):
            child = self._open.get(end.turn)
            if child is not None:
                self._note_settled(child, end, settled)

    # ----- telling

    def _say_begun(self, turn: OpenTurn) -> None:
        if not self._desk.events.heard:
            return
        ids = tuple(message.id for message in turn.messages)
        who: dict[str, Any] = {"session": turn.session, "turn": turn.id, "attempt": turn.attempt}
        who["waited"] = max(0, turn.began_at - min(turn.accepted_at, default=turn.began_at)) / 1e6
        if turn.resumed is None:
            self._desk.events.emit(TurnBegun(**who, messages=ids))
            return
        self._desk.events.emit(
            TurnResumed(
                **who,
                messages=ids,
                reason=turn.resumed.reason,
                interrupted_at=turn.resumed.at,
                alone=turn.alone,
            )
        )

    def _say_interrupted(self, child: Running) -> None:
        if child.settled or child.why in (Why.STOPPED, Why.REPLACED):
            return  # whoever ended it has told
        why = child.why.value if child.why else "the gateway left"
        turn = child.turn
        self._desk.events.emit(
            TurnInterrupted(session=turn.session, turn=turn.id, attempt=turn.attempt, reason=why)
        )

    def _say_settled(self, child: Running, end: Settlement, settled: Settled) -> None:
        events = self._desk.events
        if not events.heard:
            return  # the busiest path of all
        events.emit(
            TurnSettled(
                **_who(end),
                state=end.state,
                error=end.error,
                traceback=child.handle._traceback,
                settling=trio.current_time() - child.ended_at,
            )
        )
        if (reply := reply_of(settled.deliveries)) is not None:
            events.emit(ReplyCommitted(**_who(end), key=reply.key, text=reply.text, final=True))


def _outcome(child: Running, end: Settlement, settled: Settled) -> Outcome | None:
    """How a turn's messages ended, and all that was said to them: for who waits, so that not each
    of them asks the store. None where more was said than its last reply."""
    reply = reply_of(settled.deliveries)
    if reply is None or end.attempt > 1 or child.handle._said:
        return None
    return MESSAGE_END[end.state], (reply,)


def _why_in_a_word(child: Running, desk: Desk) -> str:
    """Why an attempt does not end by itself."""
    if child.why is Why.STOPPED:
        return "stop_command"
    if child.why is Why.REPLACED:
        return "superseded"
    return desk.stop_reason()


def note_unreadable(
    desk: Desk, session: Session, unreadable: Iterable[Unreadable], *, waited: bool = True
) -> None:
    """Messages that could not be read back have ended, in the store: here, too. They `waited`, or
    a turn had taken them."""
    for bad in unreadable:
        if waited:
            desk.sessions.queue(session, -1)
        desk.sessions.opened(session, -1)
        desk.outbox.put(bad.deliveries)
        desk.events.emit(
            MessageUnreadable(session=session.key, message_id=bad.message_id, error=bad.error)
        )
        desk.waiters.ended(session.key.channel, (bad.message_id,))


def _who(end: Settlement) -> dict[str, Any]:
    return {"session": end.session, "turn": end.turn, "attempt": end.attempt}


def _one_line(error: BaseException) -> str:
    return unicode_text(f"{type(error).__name__}: {lone_cause(error)}")


def apology_for(error: BaseException) -> str:
    """What the sender is told. A step in doubt is named: that is for them to know."""
    error = unwrap(error)
    name = getattr(error, "name", None) if isinstance(error, StepInDoubt) else None
    return in_doubt_text(name) if isinstance(name, str) else SORRY


def pending_end(
    pending: PendingTurn, state: TurnState, why: str, reply: NewReply | None
) -> Settlement:
    """How a turn ends that is not resumed."""
    return Settlement(
        pending.id, pending.marker.attempt, pending.session, pending.session_id, state, reply, why
    )


class Turn:
    """What an agent holds: one attempt to answer one or more messages of one session.

    Valid while the agent's call lasts. For the async methods from a plain agent (which runs in a
    thread): `trio.from_thread.run(turn.say, "...")`.
    """

    __slots__ = (
        "__weakref__", "_checkpoint", "_child", "_closed", "_desk", "_messages", "_said",
        "_showing", "_steps", "_traceback", "_turn",
    )  # fmt: skip

    def __init__(self, desk: Desk, turn: OpenTurn) -> None:
        self._desk = desk
        self._turn = turn
        self._messages = list(turn.messages)
        self._said = 0
        self._closed = False
        self._showing = False
        self._traceback: str | None = None
        self._child: Running | None = None
        self._steps: Steps | None = None
        self._checkpoint = turn.checkpoint

    def __repr__(self) -> str:
        return f"<Turn {self._turn.id} of {self._turn.session}, attempt {self._turn.attempt}>"

    # ----- what it is about

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages to answer, in the order of acceptance; at least one. In a resumed turn, the
        original ones."""
        return tuple(self._messages)

    @property
    def message(self) -> Message:
        """The newest of `messages`."""
        return self._messages[-1]

    @property
    def text(self) -> str:
        """The texts of `messages`, joined by newlines."""
        if len(self._messages) == 1:
            return self._messages[0].text
        return "\n".join(message.text for message in self._messages)

    @property
    def session(self) -> SessionKey:
        """The conversation that this is part of."""
        return self._turn.session

    @property
    def id(self) -> int:
        """The turn's number in its store; the same in all attempts."""
        return self._turn.id

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._turn.attempt

    @property
    def resumed(self) -> Resumed | None:
        """None in a first attempt. Else why and when (aware UTC) the last one was interrupted, and
        which attempt that was."""
        return self._turn.resumed

    @property
    def draining(self) -> AsyncBool:
        """True once the gateway wants to stop: finish soon, or save what you have with
        `checkpoint`. `await turn.draining.wait_value(True)` waits for it."""
        return self._desk.draining

    # ----- saying

    async def say(self, text: str) -> None:
        """Say something before the final reply: committed when this returns, delivered at once.

        A resumed turn that says the same again at the same place is not heard twice. The commit
        cannot be cancelled once begun. Raises `TypeError` for anything but a `str`.
        """
        if not isinstance(text, str):
            raise TypeError(f"say: expected a str, got {type(text).__name__}")
        self._must_be_open("say")
        self._said += 1
        links, turn = self._desk.links, self._turn
        reply = NewReply(
            self._said,
            ReplyKind.SAY,
            links.parts(turn.session.channel, unicode_text(text)),
            False,
            tuple(message.id for message in self._messages),
            links.is_local(turn.session.channel),
            None if self._child is None else self._child.span.traceparent,
        )
        said = await self._write(
            self._desk.store.say, turn.id, turn.attempt, turn.session, turn.session_id, reply
        )
        if said is None:
            raise AgentMisuse("say: this turn is over")
        self._desk.outbox.put(said.deliveries)
        if self._desk.events.heard and not said.repeated:
            key = said.deliveries[0].key if said.deliveries else ""
            self._desk.events.emit(
                ReplyCommitted(
                    session=turn.session,
                    turn=turn.id,
                    attempt=turn.attempt,
                    key=key,
                    text=text,
                    final=False,
                )
            )

    def progress(self, text: str, *, draft: bool = False) -> None:
        """Show what the turn is doing: ephemeral, replaces what was shown before, may be dropped,
        and is gone when the turn ends. Does not wait.

        `draft`: the text is how the next reply begins, as far as it is written. A channel that
        streams answers to its clients sends what has been added.
        """
        if not self._closed:
            _in_loop(self._show, text, draft)

    def _show(self, text: str, draft: bool = False) -> None:
        self._showing = bool(text)
        turn = self._turn
        self._desk.links.show(turn.session.channel, turn.session.name, text)
        if self._desk.events.heard:
            self._desk.events.emit(
                ProgressShown(
                    session=turn.session,
                    turn=turn.id,
                    attempt=turn.attempt,
                    text=text,
                    draft=draft,
                )
            )

    # ----- remembering

    @overload
    async def step(
        self,
        fn: Callable[..., Awaitable[T]],
        *args: Any,
        name: str | None = None,
        effect: str = ...,
    ) -> T: ...
    @overload
    async def step(
        self, fn: Callable[..., T], *args: Any, name: str | None = None, effect: str = ...
    ) -> T: ...
    async def step(
        self,
        fn: Callable[..., Any],
        *args: Any,
        name: str | None = None,
        effect: str = "idempotent",
    ) -> Any:
        """Run `fn(*args)` once over all attempts of this turn, and return its result.

        A step that has finished is not run again: its result comes from the store. One that was
        cut in the middle is run again if `effect` is `"safe"` (it changes nothing outside) or
        `"idempotent"` (the outside recognises a repeat; hand it `idempotency_key`); if it is
        `"unsafe"`, this raises `StepInDoubt`.

        `fn` is an async function, or a plain one, which runs in a thread. The default name is the
        function's, and in a loop the n-th use is its own step; so the order of a turn's uses of
        one name must be the same in every attempt. The result must be JSON values or attrs
        classes, read back by `fn`'s return annotation; else `StepNotStorable`. What `fn` raises
        passes through and is not remembered. A cancellation reaches `fn`, but not the commit.
        """
        self._must_be_open("step")
        if self._steps is None:
            steps = self._turn.steps or {}
            known = {name: step.result if step.done else None for name, step in steps.items()}
            self._steps = Steps(_Memory(self, self._desk, self._turn), known)
        return await self._steps.do(fn, args, name, Effect.of(effect))

    def idempotency_key(self, name: str) -> str:
        """A key for the outside world: the same in every attempt of this turn, different for every
        other turn and name."""
        return f"{self._desk.store.store_id}-{self._turn.id}-{name}"

    async def checkpoint(self, value: object) -> None:
        """Keep `value` (JSON values or attrs classes) for the next attempt; the last one counts.

        Raises `StepNotStorable`. The commit cannot be cancelled once begun.
        """
        self._must_be_open("checkpoint")
        text = _steps.dump("the checkpoint", value)
        turn = self._turn
        if not await self._write(self._desk.store.checkpoint, turn.id, turn.attempt, text):
            raise AgentMisuse("checkpoint: this turn is over")
        self._checkpoint = text

    @property
    def checkpointed(self) -> Any:
        """What the last `checkpoint` of this turn kept, in this attempt or an earlier one, as JSON
        values; None if there was none."""
        if self._checkpoint is None:
            return None
        return _steps.load("the checkpoint", self._checkpoint, Any)

    async def history(self, limit: int = 50) -> tuple[HistoryItem, ...]:
        """The last `limit` lines of this conversation before this turn, oldest first. Raises
        `InvalidInput` for a limit that is no number."""
        check_limit(limit)
        return await self._desk.store.history(self._turn.session, self._turn.id, limit)

    # ----- the rest

    def arrivals(self) -> AsyncIterator[Message]:
        """Messages that arrive in this session while the turn runs, taken into it one by one.

        Only with the busy policy `steer`. A message that was taken is answered by this turn (it is
        in `messages` from then on, also after a resume); what is not taken waits. The iteration
        ends when the gateway drains. Raises `AgentMisuse` with another policy.
        """
        if self._desk.busy is not Busy.STEER:
            raise AgentMisuse(f'arrivals: needs busy = "steer", it is "{self._desk.busy}"')
        return _Arrivals(self)

    async def take(self) -> Message | None:
        """The message that waits longest in this session, taken into this turn, or None."""
        self._must_be_open("take")
        turn = self._turn
        session = None if self._child is None else self._child.session
        if session is None or session.queued <= 0:
            await trio.lowlevel.checkpoint()
            return None
        request = Begin(turn.session, turn.session_id, False)
        taken = await self._write(self._desk.store.take, turn.id, turn.attempt, request)
        note_unreadable(self._desk, session, taken.unreadable)
        if taken.message is not None:
            self._desk.sessions.queue(session, -1)
            self._messages.append(taken.message)
            if self._child is not None:
                self._child.span.link(taken.message.traceparent)
        return taken.message

    async def leave(self) -> NoReturn:
        """Leave this turn where it is, for the next boot: for an agent that is between two steps
        when the gateway drains, and would begin something long.

        The turn ends at once, as it would at the end of the drain: it is cancelled, resumes, and
        knows its steps. The drain does not wait for it any longer. Raises `AgentMisuse` as long as
        the gateway does not drain.
        """
        self._must_be_open("leave")
        if self._child is None or not self.draining.value:
            raise AgentMisuse("leave: the gateway does not drain: wait for `turn.draining` first")
        self._child.cancel(Why.DRAINED)
        await trio.sleep_forever()

    def request_restart(self) -> None:
        """Ask the gateway to restart (it exits with 75) once this turn has settled.

        The drain does not begin before that. A resumed turn that had asked before does not ask
        again.
        """
        self._must_be_open("request_restart")
        if not self._turn.restart_asked and self._child is not None:
            self._turn.restart_asked = True
            _in_loop(self._desk.ask_restart, self._child)

    def _must_be_open(self, what: str) -> None:
        if self._closed:
            raise AgentMisuse(f"{what}: this turn is over")

    def _why_cancelled(self) -> str:
        """Why something of this turn is cancelled, in a word: it may be the agent's own doing."""
        child = self._child
        if child is None or not child.scope.cancel_called:
            return "agent"
        return "time_limit" if child.why is None else _why_in_a_word(child, self._desk)

    async def _write(self, call: Callable[..., Awaitable[T]], *args: object) -> T:
        """Write until it is written: a full disk delays the agent, and loses nothing."""
        tries = 0
        while True:
            try:
                return await call(*args)
            except StoreClosed as error:
                raise GatewayStopping("the gateway has stopped") from error
            except StoreError as error:
                if not error.retryable:
                    raise
                tries += 1
                self._desk.events.emit(StoreTrouble(operation="turn", error=str(error)))
                await trio.sleep(retry_delay(tries, random.random(), cap=RETRY_CAP))

    def _close(self) -> None:
        """The agent's call is over; what was shown goes with it."""
        self._closed = True
        self._steps = None  # a circle: its memory writes through this turn
        session, links = self._turn.session, self._desk.links
        if self._showing or links.shows_work(session.channel):
            links.show(session.channel, session.name, "")


def _in_loop(call: Callable[..., None], *args: object) -> None:
    """Call it in the event loop: at once, or out of a plain agent's thread."""
    if trio.lowlevel.in_trio_run():
        call(*args)
    else:
        trio.from_thread.run_sync(call, *args)


class _Memory:
    """Keeps the steps of one attempt in the store."""

    def __init__(self, turn: Turn, desk: Desk, open_turn: OpenTurn) -> None:
        self._write = turn._write
        self._why_cancelled = turn._why_cancelled
        self._desk = desk
        self._turn = open_turn

    async def begin_step(self, name: str, effect: str) -> None:
        """Keep that an unsafe step is about to run."""
        turn, store = self._turn, self._desk.store
        if not await self._write(store.begin_step, turn.id, turn.attempt, name, effect):
            raise AgentMisuse(f"step {name!r}: this turn is over")

    async def remember(self, name: str, effect: str, result: str, began_at: int) -> None:
        """Keep a step's result: also when the turn was cancelled while the step ended."""
        turn = self._turn
        args = (turn.id, turn.attempt, name, effect, result, began_at)
        kept = await self._once(args)
        if kept is None:
            kept = await self._write(self._desk.store.remember, *args)
        if not kept:
            raise AgentMisuse(f"step {name!r}: this turn is over")
        self._desk.events.emit(
            StepRemembered(session=turn.session, turn=turn.id, attempt=turn.attempt, name=name)
        )

    async def _once(self, args: tuple[Any, ...]) -> bool | None:
        try:
            return await self._desk.store.remember(*args)
        except StoreClosed as error:
            raise GatewayStopping("the gateway has stopped") from error
        except StoreError as error:
            self._desk.events.emit(StoreTrouble(operation="turn", error=str(error)))
            return None  # tried again, as long as the turn is not cancelled

    def now(self) -> int:
        """Microseconds since 1970."""
        return self._desk.clock.now().wall

    @contextmanager
    def traced(self, name: str, *, remembered: bool = False) -> Generator[None, None, None]:
        """Around a step: its span."""
        with self._desk.tracer.step(name, remembered=remembered) as span:
            try:
                yield
            except trio.Cancelled:
                span.cancelled(self._why_cancelled())
                raise


class _Arrivals:
    """Iterates over `Turn.arrivals`; a class, so that leaving a loop early leaves nothing open."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def __aiter__(self) -> _Arrivals:
        return self

    async def __anext__(self) -> Message:
        turn = self._turn
        while turn._desk.sessions.door_open and not turn._closed:
            message = await turn.take()
            if message is not None:
                return message
            if turn._child is None:
                break
            await turn._desk.sessions.wait_mail(turn._child.session)
        raise StopAsyncIteration
