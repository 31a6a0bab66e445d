"""Every write, as a method that runs inside a transaction that somebody else opens and commits.

A method reads what stands, decides by the pure rules, writes, and returns what became of it. It may
be run twice (a batch that failed is retried one by one, a commit whose outcome is unknown is
asked again), so each is written as insert-if-absent or compare-and-set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .. import _policy
from .._clock import Clock, Instant, as_datetime, as_microseconds, time_between
from .._markers import Marker, ResumeReason, TurnState
from .._messages import (
    LOCAL,
    Cursor,
    Delivery,
    Message,
    Receipt,
    ReceiptStatus,
    Reply,
    ReplyKind,
    SessionKey,
)
from .._policy import Command
from ._codec import (
    MOST_TRIES,
    BadRow,
    dump_body,
    dump_draft,
    dump_ids,
    load_delivery,
    load_json,
    load_message,
    load_name,
    load_reason,
    load_store_id,
    load_text,
)
from ._database import Database, Row, Values, select
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
from ._sql import query

MESSAGE_END: Final = {
    TurnState.COMPLETED: "answered",
    TurnState.FAILED: "failed",
    TurnState.STOPPED: "stopped",
    TurnState.QUARANTINED: "quarantined",
    TurnState.EXPIRED: "expired",
}
"""The end that a turn's messages reach with it."""

LOST: Final = "its session is gone: the row was damaged"
"""What is noted of what can be answered to nobody."""

COLLECT_AT_MOST: Final = 1000

SEEN_EVERY: Final = 1_000_000
"""Microseconds for which an epoch counts as seen: a turn that begins later notes it again, so that
a crash which cuts it is not dated from before it began."""

KNOWN_AT_MOST: Final = 10_000
"""Sessions whose numbers are remembered; a bound on memory, nothing else."""


def _one(rows: Iterable[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    # Reads to the end, so that no cursor is left open inside the transaction.
    found = list(rows)
    return found[0] if found else None


def _ids(rows: Iterable[tuple[Any, ...]]) -> tuple[str, ...]:
    """Message ids that a statement returned, as bytes: one that cannot be read must not keep the
    statement from being carried out."""
    return tuple([row[0].decode(errors="backslashreplace") for row in rows])


class Ledger:
    """The writes of one store in one epoch. Used by one thread at a time: the writer's."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._run = db.execute
        self._clock = clock
        self._now = clock.now()
        self._known: dict[SessionKey, tuple[int, int]] = {}
        self._pulled: frozenset[str] = frozenset()
        self._epoch = 0
        self._seen_up = -SEEN_EVERY
        self._store_id = load_store_id(self._first("store_id"))
        self._last_turn: int = (self._first("newest_turn") or (0,))[0]

    def _all(self, name: str, values: Values = ()) -> list[Row]:
        """All rows of a query."""
        return select(self._db, query(name), values)

    def _first(self, name: str, values: Values = ()) -> Row | None:
        """Its first row, if it has one."""
        found = select(self._db, query(name), values)
        return found[0] if found else None

    @property
    def store_id(self) -> str:
        """Who this store is; every key begins with it."""
        return self._store_id

    def begins(self) -> None:
        """A transaction begins: all that happens in it happens at one instant."""
        self._now = self._clock.now()

    def rolled_back(self) -> None:
        """What was done in this transaction was not: forget what was learnt in it."""
        self._known.clear()
        self._seen_up = -SEEN_EVERY

    def _new_turn_id(self) -> int:
        # Counted here and not by the database: a transaction that rolls back leaves a gap, never
        # a number that is given twice.
        self._last_turn += 1
        return self._last_turn

    # ----- boot and end

    def recover(self, pulled: frozenset[str] = frozenset()) -> Recovered:
        """Open an epoch, charge what the last one left RUNNING, and list all that is open.
        `pulled` are the channels whose sessions have a journal."""
        now = self._now
        self._pull(pulled)
        ending = self._first("last_ending")
        self._run(query("add_epoch"), (os.getpid(), now.machine, now.wall, now.wall, now.up))
        self._epoch = self._db.last_insert_rowid()
        lost = self._end_lost(now.wall)
        self._run(query("charge_crashed"))
        self._run(query("drop_old_notices"), (self._epoch,))
        self._run(query("doubt_sending"))
        (open_messages,) = self._first("count_open") or (0,)
        deliveries, unreadable = self._open_deliveries()
        return Recovered(
            epoch=self._epoch,
            previous_stop=ending[0] if ending else "first",
            turns=tuple(self._pending_turn(row, now) for row in self._all("pending_turns")),
            waiting=tuple(
                WaitingSession(SessionKey(channel, name), session, count)
                for channel, name, session, count, _ in self._all("waiting_sessions")
            ),
            deliveries=deliveries,
            open_messages=open_messages,
            lost=lost + unreadable,
        )

    def _pull(self, channels: frozenset[str]) -> None:
        """From here on these channels' sessions have a journal, and no others."""
        self._pulled = channels
        known = {name for (name,) in self._all("pulled_channels")}
        for name in known - channels:
            self._run(query("pull_no_more"), (name,))
        for name in channels - known:
            self._run(query("pull"), (name,))
            # What was on its way to a channel of that name is there to be fetched.
            self._run(query("arrive_pulled"), (self._now.wall, name))

    def _end_lost(self, now: int) -> int:
        """End what can be answered to nobody, because its session is gone; return how much."""
        turns = list(self._run(query("end_lost_turns"), (now, LOST)))
        for (turn,) in turns:
            self._run(query("end_messages_of"), ("failed", now, LOST, turn))
        lost = len(turns)
        for name, values in (("end_lost_messages", (now, LOST)), ("bury_lost_deliveries", (LOST,))):
            self._run(query(name), values)
            lost += self._db.changes()
        return lost

    def _open_deliveries(self) -> tuple[tuple[Delivery, ...], int]:
        """What is on its way, and how many rows were no deliveries: dead letters from now on."""
        good: list[Delivery] = []
        rows = self._all("open_deliveries")
        for row in rows:
            try:
                good.append(load_delivery(row))
            except BadRow as bad:
                self._run(query("delivery_dead"), (0, str(bad), row[0]))
        return tuple(good), len(rows) - len(good)

    def _pending_turn(self, row: tuple[Any, ...], now: Instant) -> PendingTurn:
        turn, session_id, channel, name, attempt, reason, crashes, interruptions = row[:8]
        marked = Instant(wall=row[8], up=row[9], machine=row[10])
        return PendingTurn(
            id=turn,
            session=SessionKey(channel, name),
            session_id=session_id,
            marker=Marker(
                TurnState.RESUME_PENDING, attempt, load_reason(reason), crashes, interruptions
            ),
            interrupted_for=time_between(marked, now),
            message_ids=self._message_ids(turn),
        )

    def touch(self) -> None:
        """Note that this process lives."""
        now = self._now
        self._run(query("touch_epoch"), (now.wall, now.up, self._epoch))
        self._seen_up = now.up

    def _be_seen(self) -> None:
        """An attempt begins: note that the process lives, unless that was noted a moment ago."""
        if not 0 <= self._now.up - self._seen_up < SEEN_EVERY:
            self.touch()

    def end_epoch(self, ending: str) -> None:
        """Note that this process leaves in order."""
        now = self._now
        self._run(query("end_epoch"), (now.wall, now.up, ending, self._epoch))

    # ----- the inbox

    def accept(self, arrivals: Sequence[Arrival], cursor: Cursor | None) -> tuple[Admitted, ...]:
        """Take messages in, with the cursor that covers them."""
        now = self._now.wall
        admitted = tuple(self._accept_one(arrival, now) for arrival in arrivals)
        if cursor is not None:
            self._run(query("set_cursor"), (cursor.channel, cursor.value, now))
        return admitted

    def _accept_one(self, arrival: Arrival, now: int) -> Admitted:
        message = arrival.message
        session_id, conversation = self._session(arrival.key)
        turn_id = self._new_turn_id() if arrival.begin else None
        state = "answered" if arrival.command else "running" if turn_id else "queued"
        self._run(
            query("add_message"),
            (
                message.channel,
                message.id,
                session_id,
                conversation,
                state,
                turn_id,
                dump_body(message),
                now,
                now if arrival.command else None,
                message.traceparent,
            ),
        )
        if not self._db.changes():
            return Admitted(_receipt(arrival, ReceiptStatus.DUPLICATE), session_id)
        receipt = _receipt(arrival, ReceiptStatus.ACCEPTED)
        if arrival.command:
            return self._obey(arrival, arrival.command, receipt, session_id, now)
        if turn_id:
            self._be_seen()
            self._run(
                query("add_turn"), (turn_id, session_id, conversation, self._epoch, now, None)
            )
            turn = OpenTurn(
                id=turn_id,
                session=arrival.key,
                session_id=session_id,
                attempt=1,
                messages=(message,),
                began_at=now,
                accepted_at=(now,),
            )
            return Admitted(receipt, session_id, turn)
        if arrival.interrupt and (stopped := self._replace(session_id, now)):
            return Admitted(receipt, session_id, stopped=stopped[0], queued=1 + stopped[1])
        return Admitted(receipt, session_id, queued=1)

    def _session(self, key: SessionKey) -> tuple[int, int]:
        """A session's number and conversation; it is made if it was never seen."""
        known = self._known.get(key)
        if known is not None:
            return known
        row = self._first("session_id", (key.channel, key.name))
        if row is None:
            self._run(query("add_session"), (key.channel, key.name))
            row = (self._db.last_insert_rowid(), 0)
        if len(self._known) >= KNOWN_AT_MOST:
            self._known.clear()
        self._known[key] = found = (int(row[0]), int(row[1]))
        return found

    def _replace(self, session_id: int, now: int) -> tuple[int, int] | None:
        """Stop the open turn of a session for a newer message: (the turn, how many wait again)."""
        row = _one(self._run(query("stop_turn"), (now, _policy.REPLACED, session_id)))
        if row is None:
            return None
        self._run(query("requeue_messages_of"), (row[0],))
        return int(row[0]), self._db.changes()

    def get_cursor(self, channel: str) -> str | None:
        """A channel's place in its platform's stream."""
        row = _one(self._run(query("get_cursor"), (channel,)))
        return None if row is None else str(row[0])

    # ----- chat commands

    def _obey(
        self, arrival: Arrival, command: Command, receipt: Receipt, session_id: int, now: int
    ) -> Admitted:
        admitted = Admitted(receipt, session_id)
        text = self._do(command, admitted, now)
        message = arrival.message
        admitted.deliveries = self._insert(
            arrival.key,
            session_id,
            NewReply(1, ReplyKind.COMMAND, (text,), True, (message.id,), arrival.arrived),
            f"{self._store_id}-c-{message.channel}-{message.id}",
            attempt=1,
            turn=None,
        )
        return admitted

    def _do(self, command: Command, admitted: Admitted, now: int) -> str:
        """Carry a command out; note in `admitted` what it changed; return what to say."""
        if command is Command.STOP:
            return self._stop(admitted, now)
        if command is Command.RETRY:
            return self._retry_last(admitted)
        if command is Command.NEW:
            self._run(query("new_conversation"), (admitted.session_id,))
            self._known.clear()
            return _policy.NEW_TEXT
        if command is Command.STATUS:
            return self._status(admitted.session_id)
        return _policy.HELP_TEXT

    def _stop(self, admitted: Admitted, now: int) -> str:
        stopped = self.stop_session(admitted.session_id, _policy.STOPPED_BY_USER, now)
        admitted.stopped, admitted.resolved = stopped
        if admitted.resolved:
            return _policy.STOPPED_TEXT
        waiting = list(self._run(query("stop_waiting"), (now, admitted.session_id)))
        admitted.resolved = _ids(waiting)
        admitted.queued = -len(waiting)
        return _policy.STOPPED_TEXT if waiting else _policy.NOTHING_TO_STOP

    def stop_session(
        self, session_id: int, why: str, now: int | None = None
    ) -> tuple[int | None, tuple[str, ...]]:
        """End the open turn of a session, if any, for good: (the turn, its messages' ids)."""
        now = self._now.wall if now is None else now
        row = _one(self._run(query("stop_turn"), (now, why, session_id)))
        if row is None:
            return None, ()
        ids = self._message_ids(row[0])
        self._run(query("end_messages_of"), ("stopped", now, None, row[0]))
        return int(row[0]), ids

    def stop_by_key(self, key: SessionKey) -> tuple[int | None, tuple[str, ...]]:
        """`stop_session` for whoever knows only the key."""
        row = self._first("session_id", (key.channel, key.name))
        return (None, ()) if row is None else self.stop_session(row[0], _policy.STOPPED_BY_HOST)

    def _retry_last(self, admitted: Admitted) -> str:
        row = self._first("last_unanswered", (admitted.session_id,))
        if row is None or row[2] == "answered":
            return _policy.NOTHING_TO_RETRY
        admitted.queued = admitted.reopened = len(self._requeue(seq=row[0], turn=row[1]))
        return _policy.RETRY_TEXT

    def _requeue(self, *, seq: int, turn: int | None) -> tuple[str, ...]:
        if turn is None:
            rows = list(self._run(query("retry_message"), (seq,)))
        else:
            rows = list(self._run(query("retry_turn_messages"), (turn,)))
        return _ids(rows)

    def _status(self, session_id: int) -> str:
        row = self._first("open_turn_of", (session_id,))
        (waiting,) = self._first("count_waiting", (session_id,)) or (0,)
        state, attempt = (row[1], row[2]) if row else (None, 0)
        return _policy.status_text(state, attempt, waiting)

    # ----- turns

    def begin(self, request: Begin) -> Begun:
        """Begin the next turn of a session with the message that waits longest (or all of them)."""
        now = self._now.wall
        unreadable: list[Unreadable] = []
        while rows := self._waiting(request):
            good: list[tuple[int, Message, int]] = []
            for seq, message_id, body, _, _, at, trace in rows:
                try:
                    message = load_message(request.session, message_id, body, trace)
                    good.append((seq, message, at))
                except BadRow as bad:
                    unreadable.append(self._give_up(request, seq, message_id, str(bad), now))
            if not good:
                continue
            try:
                turn = self._begin_with(request, good, rows[0][3], rows[0][4], now)
            except BadRow as bad:
                unreadable += [self._give_up(request, n, m.id, str(bad), now) for n, m, _ in good]
            else:
                return Begun(turn, tuple(unreadable))
        return Begun(None, tuple(unreadable))

    def _waiting(self, request: Begin) -> list[tuple[Any, ...]]:
        """What the next turn takes. All that waits, too, where a turn was stopped for a newer
        message: that is on disk, so the next one gets both also after a crash in between."""
        limit = COLLECT_AT_MOST if request.collect else 1
        rows = self._all("waiting_messages", (request.session_id, limit))
        if limit == 1 and rows and rows[0][3] is not None and self._was_replaced(rows[0][3]):
            limit = COLLECT_AT_MOST
            rows = self._all("waiting_messages", (request.session_id, limit))
        return rows

    def _begin_with(
        self,
        request: Begin,
        taken: list[tuple[int, Message, int]],
        retry_of: int | None,
        conversation: int,
        now: int,
    ) -> OpenTurn:
        goes_on = retry_of is not None and not self._was_replaced(retry_of)
        steps = self._steps(retry_of) if retry_of is not None and goes_on else None
        turn_id = self._new_turn_id()
        self._be_seen()
        self._run(
            query("add_turn"),
            (turn_id, request.session_id, conversation, self._epoch, now, retry_of),
        )
        for seq, _, _ in taken:
            self._run(query("take_message"), (turn_id, seq))
        turn = OpenTurn(
            id=turn_id,
            session=request.session,
            session_id=request.session_id,
            attempt=1,
            messages=tuple([message for _, message, _ in taken]),
            steps=steps,
            began_at=now,
            accepted_at=tuple([at for _, _, at in taken]),
        )
        if goes_on:
            self._run(query("copy_steps"), (turn_id, retry_of))
        return turn

    def _was_replaced(self, turn: int) -> bool:
        """Whether a turn was stopped for a newer message: the next one has another question to
        answer, and what the first remembered may be the answer to the wrong one."""
        row = self._first("why_ended", (turn,))
        return row is not None and row[0] == _policy.REPLACED

    def _give_up(self, request: Begin, seq: int, message_id: str, why: str, now: int) -> Unreadable:
        self._run(query("end_message"), ("failed", now, why, seq))
        deliveries = self._insert(
            request.session,
            request.session_id,
            NewReply(
                1,
                ReplyKind.APOLOGY,
                (_policy.SORRY_UNREADABLE,),
                True,
                (message_id,),
                arrived=request.session.channel == LOCAL,
            ),
            # With the time: whoever asks for it to be tried again is told again.
            f"{self._store_id}-m-{seq}-{now}",
            attempt=1,
            turn=None,
        )
        return Unreadable(message_id, why, deliveries)

    def resume(self, pending: PendingTurn) -> OpenTurn | None:
        """Begin the next attempt of an interrupted turn. None: it has ended meanwhile.

        Messages that cannot be read end. Raises `BadRow` if that is all of them, and for a turn
        that makes no sense.
        """
        key = (pending.id, pending.marker.attempt)
        if pending.marker.attempt > MOST_TRIES:
            raise BadRow(f"it says that it was tried {pending.marker.attempt} times")
        self._be_seen()
        self._run(query("keep_attempt"), key)
        self._run(query("resume_turn"), (self._epoch, self._now.wall, *key))
        if not self._db.changes():
            return None
        messages, accepted_at, bad = self._read(pending)
        checkpoint, restart_asked, reason, at = self._first("resumed_turn", (pending.id,)) or (
            None,
            0,
            "crash",
            0,
        )
        return OpenTurn(
            id=pending.id,
            session=pending.session,
            session_id=pending.session_id,
            attempt=pending.marker.attempt + 1,
            messages=messages,
            unreadable=self._give_up_all(pending, bad),
            resumed=Resumed(load_reason(reason), as_datetime(at), pending.marker.attempt),
            checkpoint=load_json(checkpoint),
            steps=self._steps(pending.id),
            restart_asked=bool(restart_asked),
            alone=pending.marker.crashes >= _policy.SUSPECT_AT,
            began_at=self._now.wall,
            accepted_at=accepted_at,
        )

    def messages_of(self, pending: PendingTurn) -> tuple[Message, ...]:
        """The messages of an interrupted turn that can be read. Raises `BadRow` if none can."""
        return self._read(pending)[0]

    def _read(
        self, pending: PendingTurn
    ) -> tuple[tuple[Message, ...], tuple[int, ...], list[tuple[int, str, BadRow]]]:
        """The messages that can be read and when they were accepted; number, id and fault of those
        that cannot."""
        good: list[Message] = []
        accepted_at: list[int] = []
        bad: list[tuple[int, str, BadRow]] = []
        for message_id, body, seq, at, trace in self._all("messages_of", (pending.id,)):
            try:
                good.append(load_message(pending.session, message_id, body, trace))
                accepted_at.append(at)
            except BadRow as fault:
                bad.append((seq, message_id, fault))
        if not good:
            raise bad[0][2] if bad else BadRow("it has no message any more")
        return tuple(good), tuple(accepted_at), bad

    def _give_up_all(
        self, pending: PendingTurn, bad: list[tuple[int, str, BadRow]]
    ) -> tuple[Unreadable, ...]:
        request = Begin(pending.session, pending.session_id, False)
        now = self._now.wall
        return tuple(
            self._give_up(request, seq, message_id, str(fault), now)
            for seq, message_id, fault in bad
        )

    def _message_ids(self, turn: int) -> tuple[str, ...]:
        return tuple([row[0] for row in self._all("message_ids_of", (turn,))])

    def _steps(self, turn: int) -> dict[str, Step]:
        """What a turn remembers. Raises `BadRow` for a step that cannot be told by its name: it
        would be done again."""
        steps = [
            Step(load_name(name), state == "done", load_json(result))
            for name, state, result in self._all("steps_of", (turn,))
        ]
        return {step.name: step for step in steps}

    def settle(self, end: Settlement) -> Settled:
        """End a turn: marker, messages, reply and the next turn of a session, together."""
        now = self._now.wall
        self._run(
            query("end_turn"), (end.state, now, end.error, end.turn, end.attempt, self._epoch)
        )
        if self._db.changes():
            deliveries = self._end_with(end, now)
        elif self._settled_before(end):
            # An earlier commit of this same settle returned an error and was durable all the same.
            rows = self._all("deliveries_of", (end.turn,))
            deliveries = tuple(load_delivery(row) for row in rows)
        else:
            return Settled(False, next=self.begin(end.next) if end.next else None)
        return Settled(True, deliveries, self.begin(end.next) if end.next else None)

    def _end_with(self, end: Settlement, now: int) -> tuple[Delivery, ...]:
        # The reply first: whoever reads the journal finds it before the end of its messages.
        deliveries = () if end.reply is None else self._insert_last(end, end.reply)
        error = None if end.state is TurnState.COMPLETED else end.error
        self._run(query("end_messages_of"), (MESSAGE_END[end.state], now, error, end.turn))
        return deliveries

    def _insert_last(self, end: Settlement, reply: NewReply) -> tuple[Delivery, ...]:
        return self._insert(
            end.session,
            end.session_id,
            reply,
            f"{self._store_id}-{end.turn}-end",
            attempt=end.attempt,
            turn=end.turn,
        )

    def _settled_before(self, end: Settlement) -> bool:
        return self._first("turn_fate", (end.turn,)) == (
            end.state,
            end.attempt,
            self._epoch,
        )

    def end_pending(self, ends: Sequence[Settlement]) -> tuple[Settled, ...]:
        """End turns that recovery does not resume, all in one transaction."""
        now = self._now.wall
        return tuple(self._end_pending_one(end, now) for end in ends)

    def _end_pending_one(self, end: Settlement, now: int) -> Settled:
        self._run(query("end_pending_turn"), (end.state, now, end.error, end.turn, end.attempt))
        if not self._db.changes():
            return Settled(False)
        return Settled(True, self._end_with(end, now))

    def mark_resume_pending(self, reason: ResumeReason) -> int:
        """Mark every turn of this epoch that is RUNNING; return how many. Twice changes nothing."""
        now = self._now
        self._run(query("mark_resume_pending"), (reason, now.wall, now.up, self._epoch))
        return self._db.changes()

    def clear_resume_pending(self, ends: Sequence[Settlement]) -> tuple[Settled, ...]:
        """Settle turns whose children completed but whose own settle was never written: the second
        line behind `settle`, in one transaction."""
        return tuple(self.settle(end) for end in ends)

    def ask_restart(self, turn: int) -> None:
        """Remember that a turn asked for a restart."""
        self._run(query("ask_restart"), (turn,))

    def take(self, turn: int, attempt: int, request: Begin) -> Taken:
        """Let a running turn take the message that waits longest in its session."""
        if not self._is_open(turn, attempt):
            return Taken(None)
        now = self._now.wall
        unreadable: list[Unreadable] = []
        while row := self._first("waiting_messages", (request.session_id, 1)):
            seq, message_id, body, _, _, _, trace = row
            try:
                message = load_message(request.session, message_id, body, trace)
            except BadRow as bad:
                unreadable.append(self._give_up(request, seq, message_id, str(bad), now))
                continue
            self._run(query("take_message"), (turn, seq))
            return Taken(message, tuple(unreadable))
        return Taken(None, tuple(unreadable))

    # ----- steps

    def begin_step(self, turn: int, attempt: int, name: str, effect: str) -> bool:
        """Note that an unsafe step is about to run. False: the attempt is over."""
        if not self._is_open(turn, attempt):
            return False
        now = self._now.wall
        self._run(query("begin_step"), (turn, name, effect, attempt, now))
        return True

    def remember(
        self, turn: int, attempt: int, name: str, effect: str, result: str, began_at: int
    ) -> bool:
        """Keep a step's result. False: the attempt is over."""
        self._run(query("progressed"), (turn, attempt, self._epoch))
        if not self._db.changes():
            return False
        now = self._now.wall
        self._run(query("finish_step"), (turn, name, effect, result, attempt, began_at, now))
        return True

    def checkpoint(self, turn: int, attempt: int, value: str) -> bool:
        """Keep a turn's checkpoint. False: the attempt is over."""
        self._run(query("set_checkpoint"), (value, turn, attempt, self._epoch))
        return bool(self._db.changes())

    def _is_open(self, turn: int, attempt: int) -> bool:
        return self._first("is_open", (turn, attempt, self._epoch)) is not None

    # ----- replies

    def say(
        self, turn: int, attempt: int, session: SessionKey, session_id: int, reply: NewReply
    ) -> Said | None:
        """Commit what a turn says on its way. None: the attempt is over.

        The n-th thing said keeps its key over all attempts. A resumed turn that says the same
        again at the same place is not heard twice; one that says something else is heard.
        """
        if not self._is_open(turn, attempt):
            return None
        key = f"{self._store_id}-{turn}-{reply.n}"
        earlier = self._said_before(turn, reply)
        if reply.parts in earlier:
            return Said((), repeated=True)
        if earlier:
            key = f"{key}a{attempt}"
        return Said(
            self._insert(session, session_id, reply, key, attempt=attempt, turn=turn), False
        )

    def _said_before(self, turn: int, reply: NewReply) -> tuple[tuple[str, ...], ...]:
        rows = self._run(query("reply_parts"), (turn, reply.n, reply.kind))
        by_attempt: dict[int, list[str]] = {}
        for attempt, text in list(rows):
            by_attempt.setdefault(attempt, []).append(load_text(text))
        return tuple(tuple(parts) for parts in by_attempt.values())

    def notify(
        self, sessions: Sequence[tuple[SessionKey, int]], what: str, text: str
    ) -> tuple[Delivery, ...]:
        """Put one notice for each session into the outbox; once per session, `what` and epoch."""
        made: list[Delivery] = []
        for session, session_id in sessions:
            made += self._insert(
                session,
                session_id,
                NewReply(1, ReplyKind.NOTICE, (text,), False, ()),
                f"{self._store_id}-n-{what}-{self._epoch}-{session_id}",
                attempt=1,
                turn=None,
            )
        return tuple(made)

    def _insert(
        self,
        session: SessionKey,
        session_id: int,
        reply: NewReply,
        key: str,
        *,
        attempt: int,
        turn: int | None,
    ) -> tuple[Delivery, ...]:
        now = self._now.wall
        about = dump_ids(reply.about)
        parts = len(reply.parts)
        arrived = reply.arrived or session.channel in self._pulled
        state, arrived_at = ("delivered", now) if arrived else ("pending", None)
        made: list[Delivery] = []
        for part, text in enumerate(reply.parts, 1):
            part_key = key if parts == 1 else f"{key}.{part}"
            final = reply.final and part == parts
            self._run(
                query("add_delivery"),
                (
                    part_key, session_id, turn, reply.n, part, parts, reply.kind, about, text,
                    attempt, final, state, self._epoch, now, arrived_at, reply.traceparent,
                ),
            )  # fmt: skip
            if not self._db.changes():
                continue
            made.append(
                Delivery(
                    id=self._db.last_insert_rowid(),
                    session=session,
                    key=part_key,
                    text=text,
                    in_reply_to=reply.about,
                    attempt=attempt,
                    final=final,
                    repeat=False,
                    kind=reply.kind,
                    part=part,
                    parts=parts,
                    turn=turn,
                    traceparent=reply.traceparent,
                )
            )
        return tuple(made)

    def note_drafts(self, drafts: Sequence[Draft]) -> None:
        """Put the growing texts of replies into the journal: drafts of turns that are open in this
        attempt, the others are left out."""
        now = self._now.wall
        for draft in drafts:
            if self._is_open(draft.turn, draft.attempt):
                detail = dump_draft(draft)
                self._run(query("add_draft"), (now, draft.attempt, detail, draft.turn))

    # ----- the outbox

    def sending(self, delivery: int) -> None:
        """Note that a delivery is about to go over a wire that cannot recognise a repeat."""
        self._run(query("delivery_sending"), (delivery,))

    def delivered(self, arrivals: Sequence[tuple[int, int]]) -> None:
        """The platform has these: pairs of a delivery and how often it was tried."""
        now = self._now.wall
        self._db.executemany(
            query("delivery_arrived"), ((now, tries, delivery) for delivery, tries in arrivals)
        )

    def delayed(self, delivery: int, tries: int, not_before: int, error: str, repeat: bool) -> None:
        """It is to be tried again."""
        self._run(query("delivery_delayed"), (tries, not_before, error, repeat, delivery))

    def dead(self, delivery: int, tries: int, error: str) -> None:
        """It is given up."""
        self._run(query("delivery_dead"), (tries, error, delivery))

    def drop(self, delivery: int, error: str) -> None:
        """A notice that could not be sent in time."""
        self._run(query("delivery_dropped"), (error, delivery))

    # ----- what an operator does

    def retry_quarantined(self, turn: int) -> tuple[str, ...]:
        """The messages of a quarantined turn wait once more: their ids. Empty: no such turn."""
        if self._first("quarantined_turn", (turn,)) is None:
            return ()
        return self._requeue(seq=0, turn=turn)

    def requeue_quarantined(self, turn: int) -> WaitingSession | None:
        """The same, for a gateway that runs: the session, and how many of its messages wait once
        more. None: no such turn."""
        row = self._first("quarantined_session", (turn,))
        if row is None:
            return None
        channel, name, session_id = row
        count = len(self._requeue(seq=0, turn=turn))
        return WaitingSession(SessionKey(channel, name), session_id, count)

    def drop_quarantined(self, turn: int) -> tuple[str, ...]:
        """The messages of a quarantined turn end for good: their ids. Empty: no such turn."""
        return _ids(self._run(query("drop_quarantined"), (turn,)))

    def retry_dead(self, delivery: int) -> bool:
        """Send a dead letter once more. False: no such dead letter."""
        return _one(self._run(query("retry_dead"), (delivery,))) is not None

    def resend_dead(self, delivery: int) -> Delivery | None:
        """The same, for a gateway that runs: the delivery. None: no such dead letter."""
        if not self.retry_dead(delivery):
            return None
        row = self._first("one_delivery", (delivery,))
        return None if row is None else load_delivery(row)

    def drop_dead(self, delivery: int) -> bool:
        """Give a dead letter up. False: no such dead letter."""
        return _one(self._run(query("drop_dead"), (delivery,))) is not None

    # ----- retention

    def forget(self, after_seq: int, keep: int, remember: int, at_most: int = 500) -> Forgotten:
        """One bite: forget texts that ended before `keep` and ids that ended before `remember`
        (microseconds since 1970), going up from `after_seq`."""
        rows = self._all("old_messages", (after_seq, at_most))
        texts = messages = 0
        for seq, _, turn, _, ended_at, has_text in rows:
            if ended_at is None:
                continue
            if ended_at < remember:
                messages += 1
                self._forget_message(seq, turn)
            elif ended_at < keep and has_text:
                texts += 1
                self._forget_text(seq, turn)
        self._run(query("forget_loose"), (remember,))
        self._run(query("forget_journal"), (keep, at_most))
        done = len(rows) < at_most
        return Forgotten(texts, messages, None if done else int(rows[-1][0]))

    def _forget_text(self, seq: int, turn: int | None) -> None:
        self._run(query("forget_text"), (seq,))
        if turn is not None:
            self._run(query("forget_replies"), (turn,))
            self._run(query("forget_steps"), (turn,))

    def _forget_message(self, seq: int, turn: int | None) -> None:
        self._run(query("forget_message"), (seq,))
        if turn is None:
            return
        for name in ("forget_deliveries", "forget_steps", "forget_attempts", "forget_turn"):
            self._run(query(name), (turn,))


def _receipt(arrival: Arrival, status: ReceiptStatus) -> Receipt:
    return Receipt(status=status, session=arrival.key, id=arrival.message.id)


def reply_of(deliveries: Sequence[Delivery]) -> Reply | None:
    """The reply that one or more deliveries carry, as one piece again; None for no delivery."""
    if not deliveries:
        return None
    first, last = deliveries[0], deliveries[-1]
    return Reply(
        session=first.session,
        key=first.key if first.parts == 1 else first.key.rpartition(".")[0],
        text="".join(delivery.text for delivery in deliveries),
        in_reply_to=first.in_reply_to,
        attempt=first.attempt,
        final=last.final,
        kind=first.kind,
    )


def deadline_us(clock: Clock, seconds: float) -> int:
    """Microseconds since 1970, `seconds` from now."""
    return clock.now().wall + int(seconds * 1_000_000)


__all__ = ["MESSAGE_END", "Ledger", "as_microseconds", "deadline_us", "reply_of"]
