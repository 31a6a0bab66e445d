"""The table and the real store, walked side by side: whatever happens in whatever order, the rows
of the store say what `_markers.advance` says.

Each example is one live Trio run (in guest mode, pumped from the rules), on one store file. A crash
is the store's owner vanishing in the middle: the store is opened again, and finds what it left.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import attrs
import outcome
import trio
from helpers import rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trio_gateway import Instant, Message, ReplyKind, ResumeReason, SessionKey, TurnState
from trio_gateway._markers import (
    ENDED_BY,
    OPEN,
    TRANSITIONS,
    Action,
    Marker,
    advance,
    begin,
    progressed,
)
from trio_gateway.store import (
    Arrival,
    Begin,
    NewReply,
    PendingTurn,
    Settlement,
    SqliteStore,
    open_store,
)
from trio_gateway.testing import violations

T = TypeVar("T")

PENDING = TurnState.RESUME_PENDING
SESSIONS = ("ada", "bob", "cy")
PLANNED = (ResumeReason.RESTART, ResumeReason.SHUTDOWN)
SETTLED_BY_A_CHILD = (TurnState.COMPLETED, TurnState.FAILED)
ENDED_AT_BOOT = (TurnState.QUARANTINED, TurnState.EXPIRED, TurnState.FAILED)


class TickingClock:
    """A clock that goes on by a millisecond each time somebody looks."""

    def __init__(self) -> None:
        self._time = 1_000_000

    def now(self) -> Instant:
        self._time += 1000
        return Instant(self._time, self._time, "machine")


class GuestRun:
    """A Trio run that goes on only while `call` waits for something in it."""

    def __init__(self) -> None:
        self._soon: deque[Callable[[], object]] = deque()
        self._news = threading.Condition()
        self._done: outcome.Outcome[None] | None = None
        self._send: trio.MemorySendChannel[tuple[Any, ...]]
        self._started = False
        trio.lowlevel.start_guest_run(
            self._main, run_sync_soon_threadsafe=self._add, done_callback=self._finished
        )
        self._pump(lambda: self._started)

    def call(self, fn: Callable[..., Awaitable[T]], *args: object) -> T:
        """Run `fn(*args)` in the run, to its end."""
        box: list[outcome.Outcome[T]] = []
        self._send.send_nowait((fn, args, box))
        self._pump(lambda: bool(box))
        return box[0].unwrap()

    def close(self) -> None:
        """End the run."""
        self._send.close()
        self._pump(lambda: self._done is not None)
        assert self._done is not None
        self._done.unwrap()

    async def _main(self) -> None:
        self._send, receive = trio.open_memory_channel[tuple[Any, ...]](1)
        self._started = True
        async with receive:
            async for fn, args, box in receive:
                box.append(await outcome.acapture(fn, *args))

    def _add(self, fn: Callable[[], object]) -> None:
        with self._news:
            self._soon.append(fn)
            self._news.notify()

    def _finished(self, result: outcome.Outcome[None]) -> None:
        self._done = result

    def _pump(self, until: Callable[[], bool]) -> None:
        while not until():
            with self._news:
                assert self._soon or self._news.wait(10), "the run hangs"
                fn = self._soon.popleft()
            fn()


@attrs.define
class Model:
    """What the pure rules say of one turn."""

    session: str
    marker: Marker
    epoch: int


VISITED: set[tuple[TurnState | None, Action]] = set()


class MarkersAndStore(RuleBasedStateMachine):
    """Every rule does one thing to the store and, if the table allows it, to the model."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.exists() else None))
        self.path = self.folder / "gateway.db"
        self.clock = TickingClock()
        self.run = GuestRun()
        self.stack = AsyncExitStack()
        self.turns: dict[int, Model] = {}
        self.pending: dict[int, PendingTurn] = {}
        self.session_ids: dict[str, int] = {}
        self.messages = 0
        self._boot()

    def teardown(self) -> None:
        self.run.call(self.stack.aclose)
        self.run.close()
        assert violations(self.path) == ()
        shutil.rmtree(self.folder)

    def _boot(self) -> None:
        """Open the store: whatever a dead epoch left RUNNING crashed."""
        self.store: SqliteStore = self.run.call(
            self.stack.enter_async_context, open_store(self.path, clock=self.clock, inline=True)
        )
        recovered = self.run.call(self.store.recover)
        self.epoch = recovered.epoch
        for model in self.turns.values():
            if model.marker.state is TurnState.RUNNING:
                self._advance(model, Action.MARK, ResumeReason.CRASH)
        self.pending = {pending.id: pending for pending in recovered.turns}
        found = {id: pending.marker for id, pending in self.pending.items()}
        assert found == {id: m.marker for id, m in self.turns.items() if m.marker.state in OPEN}

    def _advance(self, model: Model, action: Action, reason: ResumeReason | None = None) -> None:
        VISITED.add((model.marker.state, action))
        model.marker = advance(model.marker, action, reason)

    def _is_live(self, model: Model, attempt: int) -> bool:
        """Whether an attempt may still write: the compare-and-set."""
        marker = model.marker
        return marker.state in OPEN and marker.attempt == attempt and model.epoch == self.epoch

    def _open_in(self, session: str) -> int | None:
        for id, model in self.turns.items():
            if model.session == session and model.marker.state in OPEN:
                return id
        return None

    def _has_mail(self, session: str) -> bool:
        query = "SELECT 1 FROM message WHERE session = ? AND state = 'queued'"
        return bool(rows(self.path, query, self.session_ids.get(session)))

    def _turn(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.turns)))

    def _pending_turn(self, data: st.DataObject) -> PendingTurn:
        """A turn as recovery found it: still so, or overtaken by events."""
        still = [id for id in self.pending if self._is_pending(self.pending[id])]
        overtaken = not still or data.draw(st.booleans())
        return self.pending[
            data.draw(st.sampled_from(sorted(self.pending if overtaken else still)))
        ]

    def _is_pending(self, pending: PendingTurn) -> bool:
        marker = self.turns[pending.id].marker
        return (marker.state, marker.attempt) == (PENDING, pending.marker.attempt)

    def _attempt(self, data: st.DataObject, model: Model) -> int:
        """The newest attempt, or one that is over."""
        return data.draw(st.integers(1, model.marker.attempt))

    # ----- begin

    @rule(session=st.sampled_from(SESSIONS), at_once=st.booleans())
    def accept(self, session: str, at_once: bool) -> None:
        self.messages += 1
        message = Message(session=session, id=f"m{self.messages}", text="hi")
        at_once = at_once and self._open_in(session) is None and not self._has_mail(session)
        arrival = Arrival(message, message.key, begin=at_once)
        (admitted,) = self.run.call(self.store.accept, [arrival])
        self.session_ids[session] = admitted.session_id
        assert (admitted.turn is not None) == at_once
        if admitted.turn is not None:
            self._begun(session, admitted.turn.id)

    @precondition(lambda self: self.session_ids)
    @rule(data=st.data(), collect=st.booleans())
    def begin(self, data: st.DataObject, collect: bool) -> None:
        session = data.draw(st.sampled_from(sorted(self.session_ids)))
        if self._open_in(session) is None:
            begun = self.run.call(self.store.begin, self._request(session, collect))
            if begun.turn is not None:
                self._begun(session, begun.turn.id)

    def _request(self, session: str, collect: bool = False) -> Begin:
        return Begin(SessionKey("local", session), self.session_ids[session], collect)

    def _begun(self, session: str, turn: int) -> None:
        assert turn not in self.turns
        VISITED.add((None, Action.BEGIN))
        self.turns[turn] = Model(session, begin(), self.epoch)

    # ----- mark, crash, boot, resume

    @rule(reason=st.sampled_from(PLANNED))
    def mark(self, reason: ResumeReason) -> None:
        running = [
            model for model in self.turns.values() if model.marker.state is TurnState.RUNNING
        ]
        assert self.run.call(self.store.mark_resume_pending, reason) == len(running)
        for model in running:
            self._advance(model, Action.MARK, reason)

    @rule(planned=st.booleans())
    def die_and_boot(self, planned: bool) -> None:
        if planned:
            self.mark(ResumeReason.SHUTDOWN)
        # No farewell is written: the next owner finds the file as it is.
        self.run.call(self.stack.aclose)
        self._boot()

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """As recovery found it: also twice, also when somebody has ended it meanwhile."""
        pending = self._pending_turn(data)
        model = self.turns[pending.id]
        allowed = self._is_pending(pending)
        turn = self.run.call(self.store.resume, pending)
        assert (turn is not None) == allowed
        if turn is not None:
            assert turn.resumed is not None
            assert turn.resumed.reason == model.marker.reason
            self._advance(model, Action.RESUME)
            model.epoch = self.epoch
            assert turn.attempt == model.marker.attempt

    # ----- ends

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), state=st.sampled_from(SETTLED_BY_A_CHILD), more=st.booleans())
    def settle(self, data: st.DataObject, state: TurnState, more: bool) -> None:
        """By a child: the newest attempt, or one that should know that it is over."""
        id = self._turn(data)
        model = self.turns[id]
        attempt = self._attempt(data, model)
        live = self._is_live(model, attempt)
        before = model.marker
        end = self._settlement(id, model, attempt, state)
        if more and live:
            end.next = self._request(model.session)
        settled = self.run.call(self.store.settle, end)
        if live:
            assert settled.applied
            self._advance(model, ENDED_BY[state])
        else:
            # The same end twice: its first commit may have been durable, though it failed.
            mine = before.state is state and before.attempt == attempt and model.epoch == self.epoch
            assert settled.applied == mine
        if settled.next is not None and settled.next.turn is not None:
            self._begun(model.session, settled.next.turn.id)

    def _settlement(self, id: int, model: Model, attempt: int, state: TurnState) -> Settlement:
        kind = ReplyKind.ANSWER if state is TurnState.COMPLETED else ReplyKind.APOLOGY
        key, number = SessionKey("local", model.session), self.session_ids[model.session]
        return Settlement(
            id, attempt, key, number, state, NewReply(0, kind, ("done",), True, (), True), None
        )

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), state=st.sampled_from(ENDED_AT_BOOT))
    def end_at_boot(self, data: st.DataObject, state: TurnState) -> None:
        pending = self._pending_turn(data)
        model = self.turns[pending.id]
        allowed = self._is_pending(pending)
        end = self._settlement(pending.id, model, pending.marker.attempt, state)
        (settled,) = self.run.call(self.store.end_pending, [end])
        assert settled.applied == allowed
        if allowed:
            self._advance(model, ENDED_BY[state])

    @precondition(lambda self: self.session_ids)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.session_ids)))
        stopped, ids = self.run.call(self.store.stop_by_key, SessionKey("local", session))
        assert stopped == self._open_in(session)
        assert bool(ids) == (stopped is not None)
        if stopped is not None:
            self._advance(self.turns[stopped], Action.STOP)

    # ----- what a turn does on its way

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), by_step=st.booleans())
    def progress(self, data: st.DataObject, by_step: bool) -> None:
        id = self._turn(data)
        model = self.turns[id]
        attempt = self._attempt(data, model)
        if by_step:
            self.messages += 1
            name = f"step{self.messages}"
            kept = self.run.call(self.store.remember, id, attempt, name, "safe", "1", 1)
        else:
            kept = self.run.call(self.store.checkpoint, id, attempt, "1")
        assert kept == self._is_live(model, attempt)
        if kept:
            model.marker = progressed(model.marker)

    # ----- after each of them

    @invariant()
    def the_rows_say_what_the_rules_say(self) -> None:
        query = "SELECT id, state, attempt, reason, crashes, interruptions FROM turn"
        assert {id: values for id, *values in rows(self.path, query)} == {
            id: [m.state, m.attempt, m.reason, m.crashes, m.interruptions]
            for id, m in ((id, model.marker) for id, model in self.turns.items())
        }


def test_p04_p05_p09_p10_the_table_and_the_store_agree_on_every_walk() -> None:
    VISITED.clear()
    run_state_machine_as_test(
        MarkersAndStore,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert set(TRANSITIONS) == VISITED
