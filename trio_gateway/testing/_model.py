"""What a stranger can know of a gateway, and what must be true of it: the promises, told anew.

The model knows nothing of how the gateway works. It hears what goes in (messages, receipts, stops),
sees what comes out (calls of the agent, texts at the platform), looks at the disk over a connection
of its own after every commit and at every death, and compares. It shares no code with what it
watches: the table of markers, the verdicts and the counts are written here a second time, from the
text of the promises.

It never raises where it is called, which is inside the gateway: what it finds is kept in `broken`,
one line each, beginning with the promise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import attrs

from .. import (
    Busy,
    Delivery,
    DrainReport,
    Event,
    Message,
    Receipt,
    ReceiptStatus,
    ReplyKind,
    Settings,
    Turn,
)
from .._events import (
    ChannelConnected,
    ChannelFailed,
    MarkingFailed,
    StopRequested,
    TurnsMarked,
)
from ._snapshot import MessageRow, Record, Snapshot, TurnRow

Key = tuple[str, str]
"""Channel and id of a message, or channel and name of a session."""

_MOVES: Final = {
    "RUNNING": ("RESUME_PENDING", "COMPLETED", "FAILED", "STOPPED"),
    "RESUME_PENDING": (
        "RUNNING", "COMPLETED", "FAILED", "STOPPED", "QUARANTINED", "EXPIRED",
    ),
}  # fmt: skip
"""From which state a marker may go where. Nothing leads out of an end."""

_END_OF_MESSAGE: Final = {
    "COMPLETED": "answered",
    "FAILED": "failed",
    "STOPPED": "stopped",
    "QUARANTINED": "quarantined",
    "EXPIRED": "expired",
}

SUSPECT: Final = 2
"""From so many crashes on, a turn that resumes has no other such turn beside it."""

AT_ONCE: Final = 8
"""How many messages can be on their way to the disk beside each other."""

SLACK: Final = timedelta(seconds=35)
"""How exactly a crash can be dated: a gateway notes that it lives every thirty seconds."""


@attrs.define
class Told:
    """A message that a receipt called accepted or known, first at that time."""

    message: Message
    at: float
    accepted: bool = False
    """By that receipt; else it was called known."""


@attrs.define
class Interrupted:
    """A turn that was open when a life ended."""

    reason: str
    attempt: int
    crashes: int
    since: float
    machine: str


@attrs.define(eq=False)
class Model:
    """One store, over all lives. Times are seconds of Trio's virtual clock, which only goes on."""

    settings: Settings
    idempotent: Mapping[str, bool]
    budget: float
    grace: float = 0.0
    broken: list[str] = attrs.field(factory=list[str])
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])

    # ----- over all lives
    accepted: dict[Key, Told] = attrs.field(factory=dict[Key, Told])
    asked: dict[Key, str] = attrs.field(factory=dict[Key, str])
    """The text of everything that was ever handed in, accepted or not."""
    batches: dict[str, dict[int, tuple[str, ...]]] = attrs.field(
        factory=dict[str, dict[int, tuple[str, ...]]]
    )
    """Which messages a cursor of a channel covers."""
    arrived: dict[str, Delivery] = attrs.field(factory=dict[str, Delivery])
    """What the platforms were sent first under each key, in the order of arrival."""
    newest_in: dict[Key, int] = attrs.field(factory=dict[Key, int])
    """The newest of the agent's replies that arrived in each session."""
    reopened: set[Key] = attrs.field(factory=set[Key])
    """Messages that were tried again after they had ended."""
    returned: dict[int, str | None] = attrs.field(factory=dict[int, "str | None"])
    """What the agent returned for each turn, the last time."""
    fell: set[int] = attrs.field(factory=set[int])
    """Turns whose agent has failed in the last attempt."""
    asked_restart: Counter[int] = attrs.field(factory=Counter[int])
    marked: dict[int, tuple[float, str]] = attrs.field(factory=dict[int, tuple[float, str]])
    """When each turn was marked last, and during which boot of the machine."""
    machine: str = ""
    record: Record = attrs.field(factory=Record)
    """All that stood on disk when the last life ended."""

    channels: dict[int, str] = attrs.field(factory=dict[int, str])
    """The channel of each session, by its number on disk."""

    # ----- this life
    now: float = 0.0
    connected: dict[str, float | None] = attrs.field(factory=dict[str, "float | None"])
    """Since when each channel is away; None: it is connected."""
    connected_at: dict[str, float] = attrs.field(factory=dict[str, float])
    room_since: float = 0.0
    """When there was last a turn too many for another one that resumes."""
    disk_failed: bool = False
    busy_until: float = 0.0
    """When a turn settled last, or the call of an agent or a sending ended."""
    disk: Snapshot = attrs.field(factory=Snapshot)
    open_before: dict[int, Interrupted] = attrs.field(factory=dict[int, Interrupted])
    resumed: set[int] = attrs.field(factory=set[int])
    settled_here: set[int] = attrs.field(factory=set[int])
    ended_at: dict[int, float] = attrs.field(factory=dict[int, float])
    active: dict[Key, Turn] = attrs.field(factory=dict[Key, Turn])
    being_stopped: set[int] = attrs.field(factory=set[int])
    """Turns that the host ends, while it has not heard of it."""
    since: dict[int, float] = attrs.field(factory=dict[int, float])
    """When the attempts of this life began."""
    booted: bool = False
    stop_at: float | None = None
    stop_reason: str | None = None
    has_marked: bool = False
    marking_failed: bool = False
    report: DrainReport | None = None
    left: bool = False

    def hold(self, promise: int, holds: bool, what: str) -> None:
        """Note it unless the promise holds."""
        if not holds:
            self.broken.append(f"promise {promise}: {what}")

    # ----- a life begins and ends

    def begin_life(self, now: float, machine: str) -> None:
        """A process is about to be started on what stands on disk (`record`). `machine` names this
        boot of the machine."""
        self.now = now
        self.machine = machine
        self.disk = self.record
        self.resumed, self.settled_here, self.being_stopped = set(), set(), set()
        self.active, self.since, self.ended_at = {}, {}, {}
        self.booted = self.has_marked = self.marking_failed = self.left = False
        self.stop_at = self.stop_reason = self.report = None
        self.connected, self.disk_failed, self.busy_until = {}, False, now
        self.connected_at, self.room_since = {}, now
        self.channels = {id: channel for id, (channel, _) in self.record.sessions.items()}
        self.figures["lives"] += 1

    def end_life(self, record: Record, now: float, *, died: bool) -> None:
        """The process is gone. `record` is what it left on disk."""
        self.now = now
        self.figures["deaths"] += died
        self.figures["ends"] += not died
        if died and self.stop_at is not None:
            self.seen["died while it stopped"] += 1
        if not died and self.booted and self.stop_at is not None and not self.marking_failed:
            mine = [t for t in record.turns.values() if t.epoch == self.disk.epoch]
            unmarked = [t.id for t in mine if t.state == "RUNNING"]
            self.hold(4, not unmarked, f"the gateway has stopped, {unmarked} are not marked")
        self._compare(record)
        self.open_before = {
            turn.id: self._interrupted(turn) for turn in record.turns.values() if turn.open
        }
        self.seen["died with open turns"] += died and bool(self.open_before)
        self.seen["a mixed drain"] += bool(
            self.has_marked and self.open_before and self.settled_here
        )
        self.record = record

    def _interrupted(self, turn: TurnRow) -> Interrupted:
        before = self.record.turns.get(turn.id)
        if before == turn and turn.id in self.open_before:
            return self.open_before[turn.id]  # this life never came to it
        crashed = turn.state == "RUNNING"
        if crashed:
            self.marked[turn.id] = (self.now, self.machine)
        since, machine = self.marked[turn.id]
        return Interrupted(
            reason="crash" if crashed else str(turn.reason),
            attempt=turn.attempt,
            crashes=turn.crashes + crashed,
            since=since,
            machine=machine,
        )

    def _compare(self, record: Record) -> None:
        """What was on disk stays there; what is said to have arrived has."""
        for key, told in self.accepted.items():
            self._kept(key, told, record)
        for name, before in self.record.deliveries.items():
            after = record.deliveries.get(name)
            self.hold(7, after is not None, f"reply {name} was committed, and is gone")
            if after is not None:
                self.hold(7, after.text == before.text, f"reply {name} changed its text")
        for delivery in record.deliveries.values():
            channel = record.sessions[delivery.session][0]
            if delivery.state == "delivered" and channel in self.idempotent:
                came = delivery.key in self.arrived
                self.hold(7, came, f"reply {delivery.key} is called delivered and never arrived")
            dropped = delivery.state == "dropped"
            news = delivery.kind == "notice"
            self.hold(7, news or not dropped, f"reply {delivery.key} was dropped, and is no news")
        for place, step in self.record.steps.items():
            if step.state == "done":
                self.hold(8, record.steps.get(place) == step, f"{step} was done, and changed")
        self._answers(record)

    def _answers(self, record: Record) -> None:
        """What the agent has returned is what its turn has settled with."""
        said: dict[int, str] = {}
        for delivery in record.deliveries.values():
            if delivery.kind == "answer" and delivery.turn is not None:
                said[delivery.turn] = said.get(delivery.turn, "") + delivery.text
        told = {d.turn for d in record.deliveries.values() if d.kind == "apology"}
        for turn in record.turns.values():
            if turn.state in ("FAILED", "QUARANTINED", "EXPIRED"):
                self.hold(1, turn.id in told, f"turn {turn.id} is {turn.state}, nobody was told")
        for id, text in self.returned.items():
            row = record.turns.get(id)
            if row is not None and row.state == "COMPLETED":
                kept = said.get(id) == (text or None)
                self.hold(6, kept, f"turn {id} returned {text!r}, and has said {said.get(id)!r}")

    def _kept(self, key: Key, told: Told, record: Record) -> None:
        row, body = record.messages.get(key), record.bodies.get(key)
        self.hold(1, row is not None, f"message {key} was accepted, and is not on disk")
        if row is None or body is None:
            return
        message = told.message
        self.hold(1, json.loads(body)["text"] == message.text, f"message {key} changed its text")
        session = record.sessions[row.session]
        self.hold(1, session == (message.channel, message.session), f"message {key} moved")

    # ----- after every commit

    def commit(self, disk: Snapshot, now: float) -> None:
        """Something was committed; this is what stands on disk now."""
        self.now = now
        old, self.disk = self.disk, disk
        recovering = disk.epoch > old.epoch and not self.booted
        for turn in disk.turns.values():
            before = old.turns.get(turn.id)
            if before is None:
                self._begun(turn)
            elif before != turn:
                self._changed(before, turn, recovering)
        for message in disk.messages.values():
            before_it = old.messages.get((message.channel, message.id))
            if before_it != message:
                self._message_changed(old, before_it, message)
        if recovering:
            self._recovered()
        self._marked_together()
        self._told_after_marking(old)
        self._cursors_cover()
        self.figures["commits"] += 1

    def _begun(self, turn: TurnRow) -> None:
        name = f"turn {turn.id}"
        fresh = (turn.attempt, turn.crashes, turn.interruptions) == (1, 0, 0)
        # One batch can hold a message and the /stop that ends its turn.
        self.hold(3, fresh and turn.state in ("RUNNING", "STOPPED"), f"{name} begins as {turn}")
        self.hold(9, self.booted, f"{name} begins before the boot has recovered")
        self.hold(4, self.stop_at is None, f"{name} begins after the stop was asked for")
        open_here = [
            other for other in self.disk.turns.values()
            if other.open and other.session == turn.session
        ]  # fmt: skip
        self.hold(2, len(open_here) <= 1, f"session {turn.session} has two open turns")
        self._slots()
        self.figures["turns"] += 1

    def _slots(self) -> None:
        running = sum(
            turn.state == "RUNNING" and turn.epoch == self.disk.epoch
            for turn in self.disk.turns.values()
        )
        limit = self.settings.limits.turns
        self.hold(6, running <= limit, f"{running} turns at once, {limit} are allowed")

    def _changed(self, old: TurnRow, new: TurnRow, recovering: bool) -> None:
        name = f"turn {new.id}"
        if old.state != new.state:
            allowed = new.state in _MOVES.get(old.state, ())
            self.hold(5, allowed, f"{name} goes from {old.state} to {new.state}")
        if new.state == "RUNNING" and old.state == "RESUME_PENDING":
            self._resumes(old, new)
        elif new.state == "RESUME_PENDING" and old.state == "RUNNING":
            self._is_marked(old, new, recovering)
        elif not new.open and old.open:
            self._ends(old, new)
        else:
            same = (old.attempt, old.crashes) == (new.attempt, new.crashes)
            self.hold(9, same, f"{name} was {old}, is {new}")
            less = new.interruptions in (old.interruptions, 0)
            self.hold(9, less, f"{name} counts {new.interruptions} interruptions by itself")

    def _resumes(self, old: TurnRow, new: TurnRow) -> None:
        name = f"turn {new.id}"
        found = self.open_before.get(new.id)
        self.hold(5, found is not None, f"{name} resumes, and was not interrupted")
        self.hold(5, new.id not in self.resumed, f"{name} resumes twice in one life")
        self.hold(5, new.attempt == old.attempt + 1, f"{name}: {old.attempt} -> {new.attempt}")
        self.hold(9, new.crashes == old.crashes, f"{name} is charged by resuming, or forgiven")
        self.hold(9, old.crashes < self.settings.resume.max_crashes, f"{name} resumes, a killer")
        most = self.settings.resume.max_interruptions
        self.hold(9, old.interruptions < most, f"{name} resumes, without progress")
        self.hold(4, self.stop_at is None, f"{name} resumes after the stop was asked for")
        self._is_connected(name, new.session)
        self.resumed.add(new.id)
        self.seen[f"resumed after a {found.reason if found else '?'}"] += 1
        self._slots()

    def _is_connected(self, name: str, session: int) -> None:
        """A session whose channel is away resumes when it connects."""
        channel = self.channels.get(session)
        if channel is not None and channel in self.idempotent and not self.disk_failed:
            away = self.connected.get(channel, -1.0)
            self.hold(5, away is None or away == self.now, f"{name} resumes, {channel} is away")

    def _is_marked(self, old: TurnRow, new: TurnRow, recovering: bool) -> None:
        name = f"turn {new.id}"
        self.hold(5, new.attempt == old.attempt, f"{name} changes its attempt when it is marked")
        if recovering:
            charged = (new.reason, new.crashes) == ("crash", old.crashes + 1)
            self.hold(9, charged, f"{name} was cut by a crash, and is {new}")
            self.hold(9, new.interruptions == old.interruptions, f"{name}: a crash is no stop")
            return
        planned = (new.reason, new.crashes) == (self.stop_reason, old.crashes)
        self.hold(9, planned, f"{name} was cut by a planned stop, and is {new}")
        once = new.interruptions == old.interruptions + 1
        self.hold(9, once, f"{name} counts {new.interruptions} interruptions for one stop")
        self.hold(4, self.stop_at is not None, f"{name} is marked, and nobody asked for a stop")
        self.has_marked = True
        self.marked[new.id] = (self.now, self.machine)

    def _ends(self, old: TurnRow, new: TurnRow) -> None:
        name = f"turn {new.id}"
        self.figures[new.state] += 1
        self.busy_until = self.now
        self.ended_at[new.id] = self.now
        if new.state in ("COMPLETED", "FAILED"):
            ours = new.epoch == self.disk.epoch
            self.hold(5, ours, f"{name} is {new.state}, and no attempt of it was made")
            self.settled_here.add(new.id)
            if new.state == "FAILED":
                due = new.id in self.fell or self._took_too_long(new.id)
                self.hold(5, due, f"{name} is FAILED, and its agent has not failed")
        elif new.state == "QUARANTINED":
            rules = self.settings.resume
            due = old.crashes >= rules.max_crashes or old.interruptions >= rules.max_interruptions
            self.hold(9, due, f"{name} is quarantined after {old.crashes} crashes")
        elif new.state == "EXPIRED":
            self.hold(5, self._is_stale(new.id) is not False, f"{name} expires too early")
        left = [m.id for m in self.disk.messages.values() if m.turn == new.id]
        running = [id for id in left if self._state_of(id, new.id) == "running"]
        self.hold(6, not running, f"{name} is {new.state}, its messages {running} are not")

    def _took_too_long(self, turn: int) -> bool:
        limit = self.settings.time_limit
        return limit is not None and self.now - self.since.get(turn, 0.0) >= limit - 1e-6

    def _state_of(self, id: str, turn: int) -> str:
        return next(m.state for m in self.disk.messages.values() if m.id == id and m.turn == turn)

    def _is_stale(self, turn: int) -> bool | None:
        """Whether an interrupted turn is older than allowed; None: too close to tell."""
        within = self.settings.resume.within
        found = self.open_before.get(turn)
        if within is None or found is None:
            return False
        if found.machine != self.machine:
            return None  # the wall clock alone tells, and that may have been set
        age = timedelta(seconds=self.now - found.since)
        if abs(age - within) <= SLACK:
            return None
        return age > within

    # ----- what one commit must have done together

    def _recovered(self) -> None:
        """The boot's first commit: everything of a dead epoch is charged, and nothing else is."""
        self.booted = True
        for id, found in self.open_before.items():
            turn = self.disk.turns.get(id)
            if turn is None or not turn.open:
                self.hold(5, False, f"turn {id} was interrupted, and is {turn}")
                continue
            is_so = (turn.state, turn.reason, turn.crashes)
            wanted = ("RESUME_PENDING", found.reason, found.crashes)
            self.hold(9, is_so == wanted, f"turn {id}: {wanted} was to be found, it is {is_so}")

    def _marked_together(self) -> None:
        """A stop marks all or none: in one transaction."""
        mine = [t for t in self.disk.turns.values() if t.epoch == self.disk.epoch and t.open]
        marked = [t.id for t in mine if t.reason in ("restart", "shutdown")]
        running = [t.id for t in mine if t.state == "RUNNING"]
        both = bool(marked and running)
        self.hold(4, not both, f"turns {marked} are marked, {running} are not")

    def _told_after_marking(self, old: Snapshot) -> None:
        """Nobody is told of a stop before it has marked; but where it could not."""
        if self.disk.stop_notices > old.stop_notices and not self.marking_failed:
            running = [
                t.id for t in self.disk.turns.values()
                if t.state == "RUNNING" and t.epoch == self.disk.epoch
            ]  # fmt: skip
            self.hold(4, not running, f"people are told of the stop before {running} are marked")

    def _cursors_cover(self) -> None:
        for channel, value in self.disk.cursors.items():
            for number, ids in self.batches.get(channel, {}).items():
                if number <= int(value):
                    lost = [id for id in ids if (channel, id) not in self.disk.messages]
                    self.hold(1, not lost, f"cursor {value} of {channel} covers {lost}: not there")

    def _message_changed(self, old: Snapshot, before: MessageRow | None, new: MessageRow) -> None:
        key = (new.channel, new.id)
        if before is not None and before.ended:
            if not new.ended:
                self.hold(
                    10, self._may_reopen(new), f"message {key} was {before.state}, comes back"
                )
                self.reopened.add(key)
            return
        if new.state == "running" and (before is None or before.state == "queued"):
            self._in_order(new)
        if (
            new.ended
            and new.turn is not None
            and self.disk.turns[new.turn].state in _END_OF_MESSAGE
        ):
            due = _END_OF_MESSAGE[self.disk.turns[new.turn].state]
            together = new.state == due or new.state == "stopped"
            self.hold(6, together, f"message {key} is {new.state}, its turn {due}")
        if before is None and new.state == "answered" and new.turn is None:
            self._command_obeyed(old, new)

    def _may_reopen(self, message: MessageRow) -> bool:
        """Somebody has said /retry in this session, later."""
        return any(
            other.session == message.session
            and other.seq > message.seq
            and self.asked.get((other.channel, other.id)) == "/retry"
            for other in self.disk.messages.values()
        )

    def _in_order(self, message: MessageRow) -> None:
        """Nobody in its session was before it, but for what is tried again."""
        if (message.channel, message.id) in self.reopened:
            return
        passed = [
            other.id for other in self.disk.messages.values()
            if other.session == message.session and other.seq < message.seq
            and other.state == "queued" and (other.channel, other.id) not in self.reopened
        ]  # fmt: skip
        self.hold(2, not passed, f"message {message.id} is taken before {passed}")

    def _command_obeyed(self, old: Snapshot, command: MessageRow) -> None:
        """A /stop ends the open turn in the transaction that accepts it, or else what waits."""
        if self.asked.get((command.channel, command.id)) != "/stop":
            return
        mine = [t for t in old.turns.values() if t.session == command.session and t.open]
        for turn in mine:
            state = self.disk.turns[turn.id].state
            self.hold(10, state == "STOPPED", f"turn {turn.id} was stopped, and is {state}")
            self.seen["stopped by its user"] += 1

    # ----- what goes in

    def hands_in(self, message: Message) -> None:
        """A message is on its way to the inbox."""
        self.asked[message.channel, message.id] = message.text

    def receipt(self, message: Message, receipt: Receipt, *, well_formed: bool = True) -> None:
        """What the inbox said."""
        key = (message.channel, message.id)
        if not well_formed:
            refused = receipt.status is ReceiptStatus.REFUSED and bool(receipt.reason)
            self.hold(14, refused, f"bad input was {receipt.status}: {receipt.reason!r}")
            self.seen["refused bad input"] += 1
            return
        if receipt.status is ReceiptStatus.REFUSED:
            self._refused(message, receipt)
            return
        self.hold(1, key in self.disk.messages, f"message {key} is acknowledged, not on disk")
        if receipt.status is ReceiptStatus.DUPLICATE:
            self.seen["recognised a message sent again"] += 1
        else:
            self.hold(1, self._is_first(key), f"message {key} is accepted twice")
            self.figures["messages"] += 1
            self.seen["accepted while draining"] += self.stop_at is not None
        told = self.accepted.setdefault(key, Told(message, self.now))
        told.accepted = told.accepted or receipt.status is ReceiptStatus.ACCEPTED

    def _is_first(self, key: Key) -> bool:
        """Nobody was told before that it is there; but for who sent it in the same instant, and may
        hear first that it is known."""
        told = self.accepted.get(key)
        return told is None or (not told.accepted and told.at == self.now)

    def _refused(self, message: Message, receipt: Receipt) -> None:
        busy = self.settings.busy is Busy.REJECT and "busy" in (receipt.reason or "")
        closing = self.report is not None or self.left
        due = busy or closing or self._is_full(message)
        self.hold(12, due, f"message {message.id} is refused: {receipt.reason}")
        known = (message.channel, message.id) in self.disk.messages
        self.hold(1, not known, f"message {message.id} was accepted, and is refused")
        self.figures["refused"] += 1

    def _is_full(self, message: Message) -> bool:
        """The inbox is at one of its limits. A message is counted before it is on disk, so what is
        handed in at the same time can be one too many for another."""
        limits = self.settings.limits
        waiting = [m for m in self.disk.messages.values() if not m.ended]
        here = [m for m in waiting if m.channel == message.channel]
        return (
            len(waiting) >= limits.open_messages - AT_ONCE
            or len(here) >= limits.open_per_session - AT_ONCE
            or len(message.text.encode()) > limits.message_bytes
            or max(len(message.session), len(message.id)) > limits.key_length
        )

    # ----- what the agent sees

    def begins(self, turn: Turn) -> None:
        """The agent is called."""
        key = (turn.session.channel, turn.session.name)
        row = self.disk.turns.get(turn.id)
        known = row is not None and row.attempt == turn.attempt and self._may_be_called(row)
        self.hold(3, known, f"turn {turn.id}, attempt {turn.attempt} is called, on disk is {row}")
        beside = self.active.get(key)
        self.hold(2, beside is None, f"turns {beside} and {turn} of one session at once")
        self.active[key] = turn
        self.fell.discard(turn.id)
        self.since[turn.id] = self.now
        self.figures["attempts"] += 1
        if row is not None and row.open:
            self._told_right(turn, row)
            if row.crashes >= SUSPECT:
                self._alone(turn)
            elif turn.id in self.open_before and not self.disk_failed:
                self._waited_for_nobody(turn, key[0])

    def _may_be_called(self, row: TurnRow) -> bool:
        """It is open; or a /stop, or a message that replaces it, is on disk and not yet
        acknowledged, or the host's own stop: the gateway is about to cancel what is beginning in
        the same breath."""
        return (row.open or row.id in self.being_stopped) or any(
            row.state == "STOPPED"
            and message.session == row.session
            and (message.channel, message.id) not in self.accepted
            for message in self.disk.messages.values()
        )

    def _told_right(self, turn: Turn, row: TurnRow) -> None:
        ids = [m.id for m in self.disk.messages.values() if m.turn == turn.id and not m.ended]
        got = [message.id for message in turn.messages]
        self.hold(5, got == ids, f"turn {turn.id} is to answer {ids}, and is handed {got}")
        found, resumed = self.open_before.get(turn.id), turn.resumed
        if found is None:
            self.hold(5, resumed is None, f"turn {turn.id} is new, and is told {resumed}")
            return
        told = resumed and (str(resumed.reason), resumed.attempt)
        wanted = (found.reason, found.attempt)
        self.hold(5, told == wanted, f"turn {turn.id} was cut by {wanted}, and is told {told}")

    def _waited_for_nobody(self, turn: Turn, channel: str) -> None:
        """It resumes as soon as its channel is there, and room for another turn."""
        since = max(self.room_since, self.connected_at.get(channel, self.now))
        waited = self.now - since
        self.hold(2, waited < 0.05, f"turn {turn.id} resumes {waited:.3f} s after it could")

    def _is_crowded(self) -> bool:
        """Whether so many turns run that one that resumes has to wait."""
        rules = self.settings
        return len(self.active) >= min(rules.limits.turns, rules.resume.concurrency)

    def _alone(self, turn: Turn) -> None:
        others = [
            other.id for other in self.active.values()
            if other.id != turn.id and self.disk.turns[other.id].crashes >= SUSPECT
        ]  # fmt: skip
        self.hold(9, not others, f"suspects {turn.id} and {others} run beside each other")
        self.seen["a suspect ran"] += 1

    def returns(self, turn: Turn, answer: object) -> None:
        """The agent has returned. What is no answer is a failure of it."""
        if answer is None or isinstance(answer, str):
            self.returned[turn.id] = answer
        else:
            self.fell.add(turn.id)

    def falls_over(self, turn: Turn) -> None:
        """The agent has raised what is no cancellation."""
        self.fell.add(turn.id)

    def ends(self, turn: Turn, now: float) -> None:
        """The agent's call is over."""
        self.busy_until = now
        if self._is_crowded():
            self.room_since = now
        self.active.pop((turn.session.channel, turn.session.name), None)

    # ----- what comes out

    def sending_ended(self, now: float) -> None:
        """A channel has returned from a sending, or raised."""
        self.busy_until = now

    def disk_fails(self) -> None:
        """A commit fails, or reports that it did: much is tried again from here on."""
        self.disk_failed = True

    def arrives(self, delivery: Delivery) -> None:
        """A platform was sent a text."""
        key, session = delivery.key, (delivery.session.channel, delivery.session.name)
        first = self.arrived.get(key)
        if first is None:
            self._arrives_first(delivery, session)
            return
        self.hold(7, first.text == delivery.text, f"reply {key} comes again with another text")
        says = delivery.repeat or self.idempotent[session[0]]
        self.hold(7, says, f"reply {key} comes again, and does not say so")
        self.seen["a reply came again"] += 1

    def _arrives_first(self, delivery: Delivery, session: Key) -> None:
        self.arrived[delivery.key] = delivery
        self.figures["texts"] += 1
        if delivery.kind not in (ReplyKind.NOTICE, ReplyKind.COMMAND):  # the agent said it
            newest = self.newest_in.get(session, 0)
            self.hold(7, delivery.id > newest, f"reply {delivery.key} comes after a later one")
            self.newest_in[session] = max(newest, delivery.id)

    def hears(self, event: Event, now: float) -> None:
        """The gateway says what happens."""
        self.now = now
        if isinstance(event, StopRequested):
            self._stop_asked(event)
        elif isinstance(event, MarkingFailed):
            self.marking_failed = True
            self.seen["a marking failed"] += 1
        elif isinstance(event, TurnsMarked):
            self.seen["marked"] += 1
        elif isinstance(event, DrainReport):
            self._reported(event)
        elif isinstance(event, ChannelConnected):
            self.connected[event.channel] = None
            self.connected_at[event.channel] = now
        elif isinstance(event, ChannelFailed) and event.retry_in:
            self.connected[event.channel] = now

    def _stop_asked(self, event: StopRequested) -> None:
        self.stop_at, self.stop_reason = self.now, str(event.reason)
        word, _, number = event.by.partition(" ")
        if word == "turn" and number.isdecimal():
            self._asked_for_restart(int(number))

    def _asked_for_restart(self, turn: int) -> None:
        """Promise 13: it settles first, and does not ask again at the next boot."""
        self.asked_restart[turn] += 1
        self.hold(13, self.asked_restart[turn] == 1, f"turn {turn} asks for a restart again")
        open_still = turn in self.disk.turns and self.disk.turns[turn].open
        waited = self.now - self.since.get(turn, 0.0) >= self.grace - 1e-6
        settled = not open_still or waited
        self.hold(13, settled, f"turn {turn} asked for a restart, and is its victim")
        self.seen["a turn asked for a restart"] += 1

    def _reported(self, report: DrainReport) -> None:
        self.report = report
        if not report.timed_out and not self.disk_failed:
            idle = self.now - max(self.busy_until, self.stop_at or 0.0)
            self.hold(
                11, idle < 0.05, f"the drain went on for {idle:.3f} s with nothing to wait for"
            )
        for turn in report.settled:
            row = self.disk.turns.get(turn)
            ended = row is not None and not row.open
            self.hold(6, ended, f"turn {turn} is reported settled, and is {row}")
        for turn in (*report.interrupted, *report.unresponsive):
            row = self.disk.turns.get(turn)
            # An end that was on its way back from the disk in this very instant is not known yet.
            is_so = row is not None and (row.open or self.ended_at.get(turn) == self.now)
            self.hold(5, is_so, f"turn {turn} is interrupted, and is {row}")
        if not self.marking_failed:
            running = [t.id for t in self.disk.turns.values() if t.state == "RUNNING"]
            self.hold(4, not running, f"the stop is over, and {running} are not marked")

    def has_stopped(self, now: float) -> None:
        """The gateway's block is left, or its host left instead."""
        if self.stop_at is not None:
            took = now - self.stop_at
            bounded = took <= self.budget + 1e-6
            self.hold(11, bounded, f"the stop took {took:.2f} s, its budget is {self.budget:g} s")
            self.figures["stops"] += 1

    def all_has_ended(self, record: Record) -> None:
        """After a last life in which nothing went wrong: everything has come to its end."""
        for key in self.accepted:
            row = record.messages.get(key)
            self.hold(1, row is not None and row.ended, f"message {key} never ended: {row}")
        for delivery in record.deliveries.values():
            left = delivery.state in ("pending", "sending")
            self.hold(7, not left, f"reply {delivery.key} never left")
        finals = Counter(
            (d.session.channel, id)
            for d in self.arrived.values()
            if d.final and d.kind is ReplyKind.ANSWER
            for id in d.in_reply_to
        )
        twice = [key for key, count in finals.items() if count > 1 and key not in self.reopened]
        self.hold(6, not twice, f"messages {twice} are answered twice")
