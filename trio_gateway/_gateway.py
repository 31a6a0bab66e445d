"""The gateway: the blocks, nested so that the order of the blocks is the order of the shutdown.

    store                     last: nothing is left to write
      deliveries              committed replies still leave, over channels that are still connected
        intake                the inbox stays open while turns drain
          agent               what the agent owns outlives its turns
            turns             first: one child, one cancel scope, per turn
              recover
              until a stop is requested

All of it lives in one task beside the caller's block, shielded from the caller's cancellation:
a stop is ours to order, and marks before it cancels.
"""

from __future__ import annotations

import os
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
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import Any, Final, TypeAlias, TypeVar, cast, overload

import attrs
import trio
from trio_util import AsyncBool, AsyncValue

from . import _recovery, _shutdown
from ._agents import Agent, opened
from ._clock import Clock, SystemClock
from ._errors import (
    GatewayStopping,
    InvalidInput,
    NotFound,
    StoreClosed,
    StoreError,
    needs_extra,
    shown,
    unwrap,
)
from ._events import (
    DrainReport,
    Event,
    GatewayFailed,
    GatewayStarted,
    StopRequested,
    StoreTrouble,
    TextsForgotten,
    TurnsPaused,
    TurnUnresponsive,
)
from ._inbox import Authorize, ChannelIntake, Inbox, as_text, refused_error
from ._links import Links
from ._markers import ResumeReason, TurnState
from ._messages import (
    LOCAL,
    Cursor,
    Delivery,
    HistoryItem,
    Message,
    Receipt,
    ReceiptStatus,
    Reply,
    SessionKey,
)
from ._outbox import Outbox
from ._policy import (
    RESUMED_NOTICE,
    STOPPING_NOTICE,
    Busy,
    StopPlan,
    Verdict,
    check_key,
    check_limit,
    plan_stop,
    retry_delay,
)
from ._sessions import Sessions
from ._settings import Settings
from ._stream import EventStream
from ._tally import Tally
from ._tracing import NO_TRACES, Tracer, TracerProvider
from ._turns import RETRY_CAP, Desk, Running, TurnInfo, Turns, Why, pending_end
from ._waiters import Asked, Outcome, Waiters
from .channels import Channel
from .store import (
    MESSAGE_END,
    Draft,
    PendingTurn,
    Recovered,
    Settlement,
    SqliteStore,
    StoreReader,
    open_store,
)
from .store._writer import no_tap

TOUCH_EVERY: Final = 30.0
"""Seconds between two notes that this process lives; what a crash is dated by."""

FORGET_EVERY: Final = 3600.0
"""Seconds between two rounds of retention."""

T = TypeVar("T")

Beside: TypeAlias = "Callable[[Gateway], AbstractAsyncContextManager[None]]"

_ENDS: Final = frozenset(MESSAGE_END.values())


class GatewayState(Enum):
    """Where a gateway is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Gateway:
    """Hosts one agent. Made by `open_gateway`."""

    def __init__(
        self,
        agent: Agent,
        channels: Sequence[Channel],
        settings: Settings,
        authorize: Authorize | None,
        clock: Clock,
        tracer: Tracer,
        store: Callable[..., AbstractAsyncContextManager[SqliteStore]],
        beside: Beside,
    ) -> None:
        self._agent = agent
        self._settings = settings
        self._authorize = authorize
        self._clock = clock
        self._tracer = tracer
        self._open_store = store
        self._beside = beside
        self._events = EventStream(self._fail)
        self._waiters = Waiters()
        self._links = Links(
            channels,
            self._events,
            on_connect=self._on_connect,
            on_end=lambda name: self.request_stop(by=f"channel {name} has ended"),
        )
        self._sessions = Sessions(
            settings.limits.turns, self._links.connected, collect=settings.busy is Busy.COLLECT
        )
        self._draining = AsyncBool(False)
        self._recovered = trio.Event()
        self._stop_requested = trio.Event()
        self._stopped = trio.Event()
        self._window = _shutdown.Window()
        self._tally: Tally | None = None
        self.plan: StopPlan = plan_stop(settings.grace, settings.budget)
        """The stop's budget and its windows, in seconds."""
        self.state: AsyncValue[GatewayState] = AsyncValue(GatewayState.STARTING)
        """Where the gateway is in its life; can be awaited."""
        self.stop_reason: ResumeReason | None = None
        """Why it stops; None while it does not."""
        self.report: DrainReport | None = None
        """What the stop did; None before."""
        self.failure: BaseException | None = None
        """What failed of the gateway's own code; leaving the block raises it."""
        self.epoch: int = 0
        """The number of this life in the store."""
        self.on_unresponsive: Callable[[DrainReport], None] | None = None
        """Called when turns did not end after they were cancelled, with everything written and the
        store closed: for a host that owns the process and can leave. Without it, leaving the block
        waits for those turns, as Trio does."""
        for channel in channels:
            channel.attach(self)

    # ----- for the host program

    @overload
    async def accept(self, message: Message, /, *, cursor: Cursor | None = None) -> Receipt: ...
    @overload
    async def accept(
        self, messages: Iterable[Message], /, *, cursor: Cursor | None = None
    ) -> tuple[Receipt, ...]: ...
    async def accept(
        self, messages: Message | Iterable[Message], /, *, cursor: Cursor | None = None
    ) -> Receipt | tuple[Receipt, ...]:
        """Hand in one message (one receipt) or a batch (a tuple of them, in order), with the
        channel's cursor that covers them. Returns after the commit.

        Also while the gateway drains: such messages are answered after the next boot. Raises
        `StoreError` if nothing could be written, and `InvalidInput` for what is no message or no
        cursor; nothing was accepted then. A cancellation counts only until the commit has begun.

        A gateway that is closing refuses messages, and leaves the cursor where it was.
        """
        if isinstance(messages, Message):
            return (await self._inbox.accept((messages,), cursor))[0]
        if not isinstance(messages, Iterable):
            raise InvalidInput(f"expected a Message or several, got {type(messages).__name__}")
        return await self._inbox.accept(tuple(messages), cursor)

    async def ask(self, message: Message) -> tuple[Reply, ...]:
        """Hand in a message and wait until it is settled; return what was said to it, in order,
        the final reply (or apology) last. A message that was answered before is not answered
        again: its replies come from the store.

        Raises `Refused`, `StoreError`, and `GatewayStopping` if the gateway stops before the
        message is settled: it is kept, and is answered after the next boot. Cancelling the wait
        does not cancel the turn.
        """
        if not isinstance(message, Message):
            raise InvalidInput(f"expected a Message, got {type(message).__name__}")
        with self.question(message) as question:
            receipt = await question.accept()
            if not receipt.accepted:
                raise refused_error(receipt)
            return (await question.outcome())[1]

    @contextmanager
    def question(self, message: Message) -> Generator[Question, None, None]:
        """`ask` in two steps, for who has something to do between them:

            with gateway.question(message) as question:
                receipt = await question.accept()
                state, replies = await question.outcome()

        Leaving the block gives the wait up, not the message.
        """
        # A name that is none is nobody's: the inbox says what is wrong with it.
        channel, message_id = as_text(message.channel), as_text(message.id)
        with self._waiters.asking(channel, message_id) as asked:
            yield Question(self, message, asked)

    async def outcome(
        self, channel: str, message_id: str, *, wait: bool = False
    ) -> tuple[str, tuple[Reply, ...]]:
        """How an accepted message stands (`queued`, `running`, or its end: `answered`, `failed`,
        `stopped`, `quarantined`, `expired`) and what was said to it so far.

        `wait`: until it has reached its end. Raises `NotFound`; `GatewayStopping` if the gateway
        stops before that; `StoreError`.
        """
        with self._waiters.asking(channel, message_id) as asked:
            state, replies = await self._outcome_now(channel, message_id)
            if state is None:
                raise NotFound(f"no message {shown(message_id)} of channel {shown(channel)}")
            if not wait or state in _ENDS:
                return state, replies
            return await self._outcome_of(channel, message_id, asked)

    async def _outcome_of(self, channel: str, message_id: str, asked: Asked) -> Outcome:
        """Wait for the end of a message that has none yet."""
        await asked.reached.wait()
        if asked.outcome is not None:
            return asked.outcome
        state, replies = await self._outcome_now(channel, message_id)
        if state not in _ENDS:
            raise _stopping(message_id)
        return state, replies

    async def _outcome_now(
        self, channel: str, message_id: str
    ) -> tuple[str | None, tuple[Reply, ...]]:
        try:
            return await self._store.replies_to(channel, message_id)
        except StoreClosed:
            raise _stopping(message_id) from None

    async def history(self, session: SessionKey, limit: int = 50) -> tuple[HistoryItem, ...]:
        """The last `limit` lines of a conversation, oldest first. Raises `InvalidInput`."""
        check_key(session)
        check_limit(limit)
        return await self._store.history(session, None, limit)

    async def stop_turn(self, session: SessionKey) -> bool:
        """End the open turn of a session for good, like /stop. False: it has none. Raises
        `InvalidInput`."""
        return await self._inbox.stop_turn(session)

    async def touch(self) -> None:
        """Write into the store that this process lives, and return after the commit: so the store
        answers. Cancelled, it waits no longer; the write goes on. Raises `StoreError`."""
        await self._store.touch()

    def turns(self) -> tuple[TurnInfo, ...]:
        """The turns that are running."""
        now = trio.current_time()
        return tuple(
            TurnInfo(
                id=child.turn.id,
                session=child.turn.session,
                attempt=child.turn.attempt,
                running_for=now - child.since,
                step=child.step,
            )
            for child in self._turns.running()
        )

    # ----- for whoever looks after it

    @property
    def clock(self) -> Clock:
        """Where it takes its time from."""
        return self._clock

    @property
    def channels(self) -> tuple[str, ...]:
        """What its channels are called."""
        return self._links.names

    async def inspect(self, question: Callable[[StoreReader], T]) -> T:
        """Ask the store: `await gateway.inspect(lambda reader: reader.sessions(50))`. `question` is
        called on the store's reading thread. Raises `NotFound` and `StoreError`."""
        return await self._store.inspect(question)

    async def check(self, within: float = 2.0) -> tuple[str, ...]:
        """Why this gateway should not be sent messages now, one text each; empty: it is ready. Asks
        the store to write, for at most `within` seconds."""
        reasons: list[str] = []
        if (state := self.state.value) is not GatewayState.SERVING:
            reasons.append(f"the gateway is {state.value}")
        if self.paused:
            reasons.append("turns are paused: trio-gateway undrain")
        if away := [name for name in self._links.names if not self._links.connected(name)]:
            reasons.append(f"not connected: {', '.join(away)}")
        if (trouble := await self._store_trouble(within)) is not None:
            reasons.append(trouble)
        return tuple(reasons)

    async def _store_trouble(self, within: float) -> str | None:
        try:
            with trio.move_on_after(within) as waited:
                await self._store.touch()
        except StoreError as error:
            return f"the store: {error}"
        return f"the store has not written within {within:g} s" if waited.cancelled_caught else None

    @property
    def paused(self) -> bool:
        """Whether turns are kept from beginning; see `pause`."""
        return self._sessions.paused

    def pause(self, *, by: str = "the host") -> None:
        """Begin no turn until `unpause`: messages are accepted and wait, open turns go on. It ends
        with the process."""
        self._set_paused(True, by)

    def unpause(self, *, by: str = "the host") -> None:
        """Let turns begin again."""
        self._set_paused(False, by)

    def _set_paused(self, paused: bool, by: str) -> None:
        if self._sessions.paused is paused:
            return
        self._sessions.paused = paused
        self._events.emit(TurnsPaused(paused=paused, by=by))
        self._turns.dispatch()

    def reconfigure(self, settings: Settings) -> None:
        """Go on with other settings: what arrives, begins or is sent from now on is held to them.
        The rules of `resume` are read at a start, and wait for the next one. Raises
        `GatewayStopping` once a stop was asked for, and changes nothing then."""
        if self.stop_reason is not None or not self._recovered.is_set():
            raise GatewayStopping("the gateway is not serving; its settings stay as they are")
        before, self._settings = self._settings, settings
        self.plan = plan_stop(settings.grace, settings.budget)
        self._sessions.add_slots(settings.limits.turns - before.limits.turns)
        self._sessions.collect = settings.busy is Busy.COLLECT
        self._turns.desk.busy, self._turns.desk.time_limit = settings.busy, settings.time_limit
        self._inbox.use(settings.limits, commands=settings.commands)
        self._outbox.use(settings.delivery, settings.limits.deliveries)
        self._turns.dispatch()

    async def retry_quarantined(self, turn: int) -> bool:
        """Let the messages of a turn that was put aside wait for an answer once more. False: there
        is no such turn. Raises `StoreError`."""
        waiting = await self._store.requeue_quarantined(turn)
        if waiting is None:
            return False
        self._inbox.note_requeued(waiting)
        return True

    async def drop_quarantined(self, turn: int) -> tuple[str, ...]:
        """Give the messages of a turn that was put aside up for good: their ids. Empty: there is no
        such turn. Raises `StoreError`."""
        return await self._store.drop_quarantined(turn)

    async def retry_dead_letter(self, delivery: int) -> bool:
        """Send a reply that was given up once more. False: there is no such dead letter. Raises
        `StoreError`."""
        letter = await self._store.resend_dead(delivery)
        if letter is None:
            return False
        self._outbox.put((letter,))
        return True

    async def drop_dead_letter(self, delivery: int) -> bool:
        """Give a dead letter up for good. False: there is none. Raises `StoreError`."""
        return await self._store.drop_dead(delivery)

    async def note_drafts(self, drafts: Sequence[Draft]) -> None:
        """Keep how replies grow in the journals of their sessions; for a channel that is pulled.
        Raises `StoreError`."""
        await self._store.note_drafts(drafts)

    def events(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """What happens from now on: `async with gateway.events() as events: async for ...`. The
        iteration ends when the gateway has stopped."""
        return self._events.subscribe()

    def listen(self, listener: Callable[[Event], None]) -> AbstractContextManager[None]:
        """Call `listener` with each event while the block lasts. It must not block."""
        return self._events.listen(listener)

    def count(self) -> Tally:
        """Count what happens from now on, for the rest of this life; asked again, the same tally.
        `Channel.attach` is early enough for the boot to be counted, too."""
        if self._tally is None:
            self._tally = Tally((*self._links.names, LOCAL), trio.current_time)
            self._events.add(self._tally.hear)
        return self._tally

    def _note_commit(self, operations: int, seconds: float) -> None:
        if self._tally is not None:
            self._tally.note_commit(operations, seconds)

    @property
    def draining(self) -> AsyncBool:
        """True once a stop has marked the open turns; can be awaited."""
        return self._draining

    def statistics(self) -> dict[str, int]:
        """What is open in this process, in numbers."""
        return {
            "turns_running": len(self._turns),
            "slots_free": self._sessions.slots_free,
            "sessions_open": len(self._sessions),
            "messages_open": self._sessions.open_messages,
            "undelivered": self._outbox.undelivered,
        }

    # ----- stopping and waiting

    def request_stop(
        self,
        reason: ResumeReason = ResumeReason.SHUTDOWN,
        *,
        by: str = "the host",
        now: bool = False,
    ) -> None:
        """Ask the gateway to stop. The first call counts, and gives the reason; a later one changes
        nothing, but for `now=True`, which ends the drain's window at once."""
        if now:
            self._window.end_now()
        if self.stop_reason is None:
            self.stop_reason = reason
            self._sessions.shut_door()
            self._stop_requested.set()
            self._events.emit(StopRequested(reason=reason, by=by))

    async def wait_stop_requested(self) -> None:
        """Wait until somebody has asked for a stop."""
        await self._stop_requested.wait()

    async def wait_input_ended(self) -> None:
        """Wait until no channel has more input; for ever, if there is no channel."""
        await self._links.wait_input_ended()

    async def wait_idle(self) -> None:
        """Wait until every accepted message has reached its end and every reply has arrived."""
        while not self._is_idle() and not self._waiters.abandoned:
            await self._waiters.wait_idle()

    def mark_from_thread(self, reason: ResumeReason, timeout: float) -> int | None:
        """Mark every open turn from a thread, for a watchdog whose loop does not answer. `timeout`
        in seconds; None: not done in time, or nothing is open yet."""
        store = getattr(self, "_store", None)
        return None if store is None else store.mark_resume_pending_from_thread(reason, timeout)

    def _is_idle(self) -> bool:
        return self._sessions.quiet and not self._turns and not self._outbox.undelivered

    def _on_quiet(self) -> None:
        if self._is_idle():
            self._waiters.idle()

    def _on_connect(self, channel: str) -> None:
        self._sessions.connect(channel)
        self._turns.dispatch()

    # ----- the blocks

    async def _live(self) -> None:
        try:
            await self._live_in_blocks()
        except BaseExceptionGroup as group:
            raise unwrap(group) from None  # the nurseries' wrapping says nothing to the caller
        finally:
            self.state.value = GatewayState.STOPPED
            self._stopped.set()
            self._waiters.abandon()
            self._events.close()
        if self.failure is not None:
            raise self.failure

    async def _live_in_blocks(self) -> None:
        # One block a line, though one statement could open several: the nesting is the design.
        with trio.CancelScope(shield=True):
            async with self._open_store(meter=self._note_commit) as self._store:
                async with self._beside(self):
                    async with self._deliveries():
                        async with self._intake():
                            async with opened(self._agent) as agent:
                                async with self._turns.hosting(agent):
                                    await self._recover()
                                    self._recovered.set()
                                    await self._until_stopped()
                    # Who asked for what has settled reads the answer from the store.
                    with trio.move_on_after(self.plan.spare):
                        await self._waiters.wait_told()

    @asynccontextmanager
    async def _deliveries(self) -> AsyncGenerator[None, None]:
        """Committed replies leave, over channels that are served, until the end."""
        try:
            async with trio.open_nursery() as nursery:
                self._wires = nursery
                self._outbox = self._make_outbox()
                self._turns = Turns(self._make_desk())
                nursery.start_soon(self._guard, self._outbox.run)
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True):
                        await self._flush()
                    nursery.cancel_scope.cancel(reason="the gateway has stopped")
        finally:
            with trio.CancelScope(shield=True):
                await self._note_end()

    @asynccontextmanager
    async def _intake(self) -> AsyncGenerator[None, None]:
        """The inbox is open while turns run and while they drain."""
        settings = self._settings
        self._inbox = Inbox(
            self._turns.desk,
            self._turns,
            settings.limits,
            self._authorize,
            commands=settings.commands,
        )
        try:
            yield
        finally:
            self._inbox.open = False

    async def _recover(self) -> None:
        house = _House(self)
        self._recovery = await _recovery.recover(self._store, house, self._settings.resume)
        recovered = self._recovery.recovered
        self.epoch = recovered.epoch
        self._events.emit(
            GatewayStarted(
                epoch=self.epoch,
                previous_stop=recovered.previous_stop,
                resuming=len(self._recovery.resuming),
                quarantined=self._recovery.count(Verdict.QUARANTINE),
                expired=self._recovery.count(Verdict.EXPIRE),
                waiting=sum(waiting.queued for waiting in recovered.waiting),
                undelivered=len(recovered.deliveries),
            )
        )

    async def _until_stopped(self) -> None:
        try:
            await self._serve()
        finally:
            # Also when what the agent owns falls over and cancels all that is inside it: there is
            # no window then, but a mark.
            self.request_stop(by="the agent's own block", now=not self._stop_requested.is_set())
            with trio.CancelScope(shield=True):
                await self._shut_down(self.stop_reason or ResumeReason.SHUTDOWN)

    async def _serve(self) -> None:
        async with trio.open_nursery() as services:
            self._services = services
            services.start_soon(self._guard, self._resume_all)
            services.start_soon(self._guard, self._touch)
            services.start_soon(self._guard, self._forget)
            self._wires.start_soon(self._guard, self._links.serve_all, self._intake_of)
            self._turns.dispatch()
            self.state.value = GatewayState.SERVING
            await self._stop_requested.wait()
            services.cancel_scope.cancel(reason="the gateway stops")

    async def _shut_down(self, reason: ResumeReason) -> None:
        self.state.value = GatewayState.DRAINING
        self.report = await _shutdown.shut_down(
            self._store, _House(self), self.plan, reason, self._window
        )
        self._events.emit(self.report)
        if self._turns:
            await self._leave_behind(self.report)

    async def _leave_behind(self, report: DrainReport) -> None:
        """Some turns do not end. Everything else does: a host that can leave is let go."""
        for child in self._turns.running():
            self._events.emit(
                TurnUnresponsive(
                    session=child.turn.session,
                    turn=child.turn.id,
                    attempt=child.turn.attempt,
                    waited=self.plan.unwind,
                )
            )
        if self.on_unresponsive is not None:
            self._inbox.open = False
            await self._flush()
            await self._note_end()
            with trio.move_on_after(self.plan.spare):
                await self._store.aclose()
            self.on_unresponsive(report)

    async def _flush(self) -> None:
        """Let committed replies leave, for a moment; what does not leave is kept."""
        with trio.move_on_after(self.plan.flush):
            await self._outbox.wait_empty()

    async def _note_end(self) -> None:
        """So that the next boot knows that this life ended in order."""
        if not self.epoch:
            return  # it never began
        ending = "failure" if self.failure else str(self.stop_reason or "shutdown")
        trouble = f"not written within {self.plan.spare:g} s"
        with trio.move_on_after(self.plan.spare, shield=True):
            try:
                await self._store.end_epoch(ending)
                return
            except StoreError as error:
                trouble = str(error)
        self._events.emit(StoreTrouble(operation="end of epoch", error=trouble))

    # ----- services: each is guarded

    async def _guard(self, service: Callable[..., Awaitable[None]], *args: Any) -> None:
        """A failure of our own code is a reason to stop in order: mark, drain, leave with 1."""
        try:
            await service(*args)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = unwrap(error)
        trace = "".join(traceback.format_exception(error))
        self._events.emit(GatewayFailed(error=shown(error), traceback=trace))
        self.request_stop(by="a failure of the gateway itself")

    async def _resume_all(self) -> None:
        await _recovery.resume_all(
            self._recovery,
            self._store,
            _House(self),
            self._settings.resume,
            self._authorize,
            RESUMED_NOTICE,
        )

    async def _touch(self) -> None:
        """While turns run, note now and then that this process lives: a crash is dated by it."""
        while True:
            await trio.sleep(TOUCH_EVERY)
            if self._turns:
                await self._tolerantly("touch", self._store.touch)

    async def _forget(self) -> None:
        """Retention: in small bites, so that nobody waits behind one."""
        while True:
            await trio.sleep(FORGET_EVERY)
            await self._tolerantly("forget", self._forget_once)

    async def _forget_once(self) -> None:
        now = self._clock.now().wall
        keep = now - _microseconds(self._settings.keep)
        remember = now - _microseconds(self._settings.remember)
        texts = messages = 0
        seq: int | None = 0
        while seq is not None:
            bite = await self._store.forget(seq, keep, remember)
            texts, messages, seq = texts + bite.texts, messages + bite.messages, bite.next_seq
            await trio.sleep(0.01)
        if texts or messages:
            self._events.emit(TextsForgotten(texts=texts, messages=messages))

    async def _tolerantly(self, what: str, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except StoreError as error:
            self._events.emit(StoreTrouble(operation=what, error=str(error)))

    def _ask_restart(self, child: Running) -> None:
        if not self._stop_requested.is_set():
            self._services.start_soon(self._guard, self._restart_after, child)

    async def _restart_after(self, child: Running) -> None:
        """Let the turn that asked settle first (promise 13); not for longer than a window."""
        await self._keep_asked(child)
        with trio.move_on_after(self.plan.grace):
            await child.wait_over()
        self.request_stop(ResumeReason.RESTART, by=f"turn {child.turn.id}")

    async def _keep_asked(self, child: Running) -> None:
        """Note that the turn has asked, so that its next attempt does not ask again. Until that is
        written there is no restart, unless the turn has settled: then there is no next attempt."""
        tries = 0
        while True:
            try:
                return await self._store.ask_restart(child.turn.id)
            except StoreError as error:
                tries += 1
                self._events.emit(StoreTrouble(operation="ask for a restart", error=str(error)))
                with trio.move_on_after(retry_delay(tries, random.random(), cap=RETRY_CAP)):
                    return await child.wait_over()

    def _intake_of(self, channel: str) -> ChannelIntake:
        return ChannelIntake(self._inbox, self._turns.desk, channel)

    # ----- the parts

    def _make_outbox(self) -> Outbox:
        return Outbox(
            self._store,
            self._links,
            self._sessions,
            self._events,
            self._settings.delivery,
            self._clock,
            self._tracer,
            self._settings.limits.deliveries,
            on_end=lambda name: self.request_stop(by=f"channel {name} has ended"),
            on_quiet=self._on_quiet,
        )

    def _make_desk(self) -> Desk:
        return Desk(
            store=self._store,
            links=self._links,
            sessions=self._sessions,
            outbox=self._outbox,
            waiters=self._waiters,
            events=self._events,
            clock=self._clock,
            tracer=self._tracer,
            busy=self._settings.busy,
            time_limit=self._settings.time_limit,
            draining=self._draining,
            ask_restart=self._ask_restart,
            stop_reason=lambda: str(self.stop_reason or "host"),
            on_quiet=self._on_quiet,
            on_failure=self._fail,
        )


class Question:
    """One message, on its way to its answer. Made by `Gateway.question`."""

    def __init__(self, gateway: Gateway, message: Message, asked: Asked) -> None:
        self._gateway = gateway
        self._message = message
        self._asked = asked
        self._duplicate = False

    async def accept(self) -> Receipt:
        """Hand the message in; see `Gateway.accept`."""
        receipt = await self._gateway.accept(self._message)
        self._duplicate = receipt.status is ReceiptStatus.DUPLICATE
        return receipt

    async def outcome(self) -> tuple[str, tuple[Reply, ...]]:
        """Wait until the message, which was accepted, has reached its end: which, and what was said
        to it, in order. Raises `GatewayStopping` if the gateway stops before, and `StoreError`.
        Cancelling the wait does not cancel the turn."""
        channel, message_id = self._message.channel, self._message.id
        if self._duplicate:
            return await self._gateway.outcome(channel, message_id, wait=True)
        return await self._gateway._outcome_of(channel, message_id, self._asked)


def _stopping(message_id: str) -> GatewayStopping:
    return GatewayStopping(
        f"the gateway stops; message {shown(message_id)} is kept: ask again after the boot"
    )


def _microseconds(span: timedelta) -> int:
    return span // timedelta(microseconds=1)


class _House:
    """The gateway as recovery and shutdown see it: what they need, by the names that they use."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._sessions = gateway._sessions
        self._turns = gateway._turns
        self._outbox = gateway._outbox
        self._links = gateway._links
        self._events = gateway._events

    # ----- for recovery

    def pulled_channels(self) -> frozenset[str]:
        return self._links.pulled

    def knows_channel(self, channel: str) -> bool:
        return self._links.has(channel)

    def connected(self, channel: str) -> bool:
        return self._links.connected(channel)

    async def wait_connected(self, channel: str) -> None:
        link = self._links.get(channel)
        if link is not None:
            await link.wait_connected()

    def place(self, recovered: Recovered) -> None:
        sessions = self._sessions
        for pending in recovered.turns:
            if self.knows_channel(pending.session.channel):
                session = sessions.get(pending.session)
                session.id = pending.session_id
                sessions.hold(session, pending.id)
                sessions.opened(session, len(pending.message_ids))
        for waiting in recovered.waiting:
            if self.knows_channel(waiting.session.channel):
                session = sessions.get(waiting.session)
                session.id = waiting.session_id
                sessions.opened(session, waiting.queued)
                sessions.queue(session, waiting.queued)
                sessions.line_up(session)
        sessions.elsewhere = recovered.open_messages - sessions.open_messages
        self._outbox.put(recovered.deliveries)

    def end_of(self, pending: PendingTurn, state: TurnState, why: str, apology: str) -> Settlement:
        return pending_end(pending, state, why, self._turns.apology(pending, apology))

    async def end(self, ends: Sequence[tuple[PendingTurn, Settlement]]) -> None:
        if ends:
            await self._turns.end_pending_turns(ends)

    async def resume(self, pending: PendingTurn) -> None:
        await self._turns.resume(pending)

    def send(self, deliveries: Sequence[Delivery]) -> None:
        self._outbox.put(deliveries)

    def wants_notice(self, channel: str) -> bool:
        link = self._links.get(channel)
        notices = self._gateway._settings.notices
        return notices and link is not None and link.channel.notices

    # ----- for the shutdown

    def shut_door(self) -> None:
        self._sessions.shut_door()

    def open_turns(self) -> frozenset[int]:
        # A child whose end the account has written only waits for its next try.
        return frozenset(child.turn.id for child in self._turns.running() if not child.settled)

    def settled(self) -> frozenset[int]:
        return frozenset(self._turns.settled_late)

    def children(self) -> frozenset[int]:
        return frozenset(child.turn.id for child in self._turns.running())

    def say(self, event: Event) -> None:
        self._events.emit(event)

    def show_draining(self) -> None:
        self._gateway.draining.value = True

    async def tell_people(self) -> None:
        who = [
            (child.turn.session, child.turn.session_id)
            for child in self._turns.running()
            if self.wants_notice(child.turn.session.channel)
        ]
        if not who:
            return
        try:
            self.send(await self._gateway._store.notify(who, "stopping", STOPPING_NOTICE))
        except StoreError as error:
            self.say(StoreTrouble(operation="notice", error=str(error)))

    async def wait_drained(self) -> None:
        await self._turns.wait_empty()

    async def wait_sent(self) -> None:
        await self._outbox.wait_sent()

    def unwritten(self) -> Sequence[Settlement]:
        # The child's own settle can be in the writer's hands still, with a begin in it that must
        # not be made by the stop.
        ends = [child.end for child in self._turns.unsettled() if child.end is not None]
        return [attrs.evolve(end, next=None) for end in ends]

    async def write_ends(self, ends: Sequence[Settlement]) -> None:
        self._turns.account(ends, await self._gateway._store.clear_resume_pending(ends))

    def cancel_turns(self) -> None:
        for child in self._turns.running():
            child.cancel(Why.DRAINED)

    def undelivered(self) -> int:
        return self._outbox.undelivered


@asynccontextmanager
async def open_gateway(
    agent: Agent,
    *,
    store: str | os.PathLike[str] = "gateway.db",
    channels: Sequence[Channel] = (),
    settings: Settings | None = None,
    authorize: Authorize | None = None,
    listen: Callable[[Event], None] | None = None,
    clock: Clock | None = None,
    inline_store: bool = False,
    tap: Callable[[str], None] | None = None,
    tracer_provider: TracerProvider | None = None,
    beside: Callable[[Gateway], AbstractAsyncContextManager[None]] | None = None,
) -> AsyncGenerator[Gateway, None]:
    """Host `agent` for the length of the block; leaving the block drains.

    Entering: opens the store at the path `store`, recovers what was interrupted, and serves
    `channels`. Leaving, in whatever way: marks the open turns, lets them settle within the grace
    of `settings`, and leaves the others to the next boot; `gateway.report` says what happened. A
    cancelled block has no grace: the turns are marked, then cancelled.

    `authorize` is asked for every message and for every turn that resumes. `listen` hears every
    event of this life, the first and the last included; it must not block. `tracer_provider` is
    one of OpenTelemetry, which gets spans; flushing it is its owner's. `beside` is a block that is
    opened once the store is locked, and closed just before the lock is given back; its code runs
    shielded, and must end soon when it is left. `clock`, `inline_store` and `tap` are for tests;
    see `trio_gateway.testing`.

    Raises `StoreInUse`, `StoreCorrupt`, `StoreSchemaError`, `StoreIOError`, `AgentNotUsable`,
    `ConfigError` on entering; what the body raised, or the failure of the gateway's own code, on
    leaving.
    """
    clock = clock or SystemClock()
    tracer = NO_TRACES if tracer_provider is None else _tracer_of(tracer_provider)
    made = Gateway(
        agent,
        channels,
        settings or Settings(),
        authorize,
        clock,
        tracer,
        partial(open_store, store, clock=clock, inline=inline_store, tap=tap or no_tap),
        beside or _nothing_beside,
    )
    if listen is not None:
        made._events.add(listen)
    try:
        async with trio.open_nursery() as nursery:
            try:
                # Not `nursery.start`: cancelled, it would wait for a boot that waits for a stop.
                nursery.start_soon(made._live)  # noqa: ASYNC113 - awaited on the next line
                await made._recovered.wait()
                yield made
            except (trio.Cancelled, BaseExceptionGroup) as error:
                made.request_stop(by="the block was left", now=_is_cancelled(error))
                raise
            finally:
                made.request_stop(by="the block was left")
                with trio.CancelScope(shield=True):
                    await made._stopped.wait()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            # The nursery is ours, and its wrapping says nothing to the caller.
            raise group.exceptions[0] from group.exceptions[0].__cause__  # noqa: ASYNC123
        raise


def _tracer_of(provider: TracerProvider) -> Tracer:
    with needs_extra("otel", "tracer_provider"):
        from ._traces import OtelTracer
    return OtelTracer(provider)


def _nothing_beside(_: Gateway) -> AbstractAsyncContextManager[None]:
    return nullcontext()


def _is_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return group.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)
