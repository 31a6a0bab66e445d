"""Who has mail and no open turn, and whose place in line comes next. Bookkeeping, no I/O.

A session is in memory only while it has something open; an idle one costs nothing. The store has
the truth; this is what the running process knows of it without asking.

    line      those who wait for a slot, first come first served, whatever their session
    parked    those whose channel is not connected; they join the line when it is
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import attrs
import trio

from ._messages import SessionKey
from ._policy import may_begin
from .store import Begin, PendingTurn


@attrs.define(eq=False)
class Session:
    """What is open in one session.

    `open` counts messages that have not reached an end, those on their way into the store
    included; `queued` those in the store that no turn has taken. `busy`: a turn is open, or
    about to be. `pending` is the turn that is to resume, until it does: it keeps the session
    busy. `accepting` counts commits on their way. `collect`: the next turn takes all. `aside`: its
    turn could not begin, and it waits until that is tried again.
    `misses`: begins in a row that found no mail.
    """

    key: SessionKey
    id: int | None = None
    open: int = 0
    queued: int = 0
    accepting: int = 0
    busy: bool = False
    pending: int | None = None
    in_line: bool = False
    aside: bool = False
    collect: bool = False
    misses: int = 0
    deliveries: int = 0
    mail: trio.Event | None = None


@attrs.frozen(eq=False)
class Claim:
    """A place in line: the next turn of a session, or (`pending`) one of its turns that resumes."""

    session: Session
    pending: PendingTurn | None = None


class Sessions:
    """All sessions with something open, the line, and the slots."""

    def __init__(self, slots: int, connected: Callable[[str], bool], *, collect: bool) -> None:
        self._sessions: dict[SessionKey, Session] = {}
        self._line: deque[Claim] = deque()
        self._parked: dict[str, deque[Claim]] = {}
        self._connected = connected
        self.collect: bool = collect
        """Whether a turn takes all that waits in its session."""
        self.slots_free: int = slots
        """Below zero while more turns run than there are slots any more."""
        self.open_messages: int = 0
        """Messages that have not reached an end, in the sessions of this gateway's channels."""
        self.elsewhere: int = 0
        """The same, in sessions of channels that this gateway does not have."""
        self.door_open: bool = True
        """The door to turns: shut by a stop, never opened again."""
        self.paused: bool = False
        """Whether no turn begins for now, though the door is open."""
        self._shut = trio.Event()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def get(self, key: SessionKey) -> Session:
        """The session, made if nothing was open in it. Give it back with `let_go`."""
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = Session(key)
        return session

    def find(self, key: SessionKey) -> Session | None:
        """The session, if something is open in it."""
        return self._sessions.get(key)

    def let_go(self, session: Session) -> None:
        """Forget the session if nothing is open in it any more, and nobody holds it."""
        if not (
            session.open
            or session.busy
            or session.in_line
            or session.accepting
            or session.deliveries
        ):
            self._sessions.pop(session.key, None)

    # ----- counting

    def opened(self, session: Session, count: int) -> None:
        """`count` messages more (or less) are open."""
        session.open += count
        self.open_messages += count

    def queue(self, session: Session, count: int) -> None:
        """`count` messages more (or less) wait in the store; who waits for mail is woken.

        Those who wait for commits are woken in any order. So a message can be heard to be taken
        before it is heard to wait, and the count is below zero for a moment; in the end it is
        right, because every change is counted once.
        """
        session.queued += count
        if session.mail is not None and session.queued > 0:
            session.mail.set()
            session.mail = None

    async def wait_mail(self, session: Session) -> None:
        """Wait until a message waits in the session, or the door is shut."""
        if session.queued > 0 or not self.door_open:
            await trio.lowlevel.checkpoint()
            return
        if session.mail is None:
            session.mail = trio.Event()
        await session.mail.wait()

    @property
    def may_begin_turns(self) -> bool:
        """Whether turns begin at all."""
        return self.door_open and not self.paused

    def shut_door(self) -> None:
        """No turn begins any more. Does not wait, cannot fail."""
        self.door_open = False
        self._shut.set()
        for session in self._sessions.values():
            if session.mail is not None:
                session.mail.set()

    async def wait_shut(self) -> None:
        """Wait until the door is shut."""
        await self._shut.wait()

    @property
    def quiet(self) -> bool:
        """Whether no message is open anywhere."""
        return self.open_messages == 0

    # ----- beginning

    def may_begin_at_once(self, session: Session) -> bool:
        """Whether a message for this session can begin its turn in the transaction that accepts it:
        nobody is before it, neither in its session nor in line."""
        return (
            not (session.queued > 0 or session.accepting or session.in_line or self._line)
        ) and may_begin(
            door_open=self.may_begin_turns,
            connected=self._connected(session.key.channel),
            session_busy=session.busy,
            slots_free=self.slots_free,
        )

    def add_slots(self, count: int) -> None:
        """There are `count` slots more (or less); no turn loses the one that it has."""
        self.slots_free += count

    def occupy(self, session: Session) -> None:
        """Take a slot for a turn of this session."""
        session.busy = True
        self.slots_free -= 1

    def vacate(self, session: Session) -> None:
        """Give the slot back, and line the session up again if it has mail."""
        session.busy = False
        self.slots_free += 1
        self.line_up(session)

    def set_aside(self, session: Session, pending: int | None = None) -> None:
        """Give the slot back without lining the session up, whatever arrives in it: its turn cannot
        begin for now. `pending` is the turn that it is to resume, which keeps it busy."""
        session.busy, session.pending = pending is not None, pending
        session.aside = True
        self.slots_free += 1

    def bring_back(self, key: SessionKey, pending: PendingTurn | None) -> None:
        """Line a session up again that was set aside. By its name: it may have ended meanwhile, and
        begun anew."""
        session = self.find(key)
        if session is None or not session.aside:
            return
        session.aside = False
        if pending is None or not self.line_up_resume(pending):
            self.line_up(session)

    def line_up(self, session: Session) -> None:
        """Put the session at the end of the line, if it has mail and no open turn."""
        waits = session.queued > 0 and not session.aside
        if waits and not session.busy and not session.in_line:
            session.in_line = True
            self._enqueue(Claim(session))
        else:
            self.let_go(session)

    def hold(self, session: Session, turn: int) -> None:
        """Keep the session busy for a turn that is to resume."""
        session.busy, session.pending = True, turn

    def release_hold(self, session: Session, turn: int) -> bool:
        """The turn that kept the session busy will not resume: the session goes on. False: it does
        not keep it busy (any more)."""
        if session.pending != turn:
            return False
        session.busy, session.pending, session.aside = False, None, False
        self.line_up(session)
        return True

    def line_up_resume(self, pending: PendingTurn) -> bool:
        """Put a turn that resumes at the end of the line; its session is busy since boot. False: it
        was ended before its turn came."""
        session = self._sessions.get(pending.session)
        if session is None or session.pending != pending.id:
            return False
        self._enqueue(Claim(session, pending))
        return True

    def _enqueue(self, claim: Claim) -> None:
        channel = claim.session.key.channel
        if self._connected(channel):
            self._line.append(claim)
        else:
            self._parked.setdefault(channel, deque()).append(claim)

    def connect(self, channel: str) -> None:
        """The channel is connected: who waited for it joins the line."""
        self._line.extend(self._parked.pop(channel, ()))

    def next_claim(self) -> Claim | None:
        """Take the first in line and a slot for it; None if there is nobody, or no slot."""
        if not self.may_begin_turns or self.slots_free <= 0:
            return None
        claim = self._first(lambda _: True)
        if claim is not None:
            self.occupy(claim.session)
            claim.session.pending = None
        return claim

    def next_begin_after(self, session: Session) -> Session | None:
        """Whose turn begins in the transaction that settles one of `session`: the first in line,
        or `session` itself if it alone has mail. It takes over the slot.

        None also when a resumed turn is first: it needs a transaction of its own.
        """
        if not self.may_begin_turns or self.slots_free < 0:
            return None
        if self._line:
            claim = self._first(lambda claim: claim.pending is None)
            if claim is None:
                return None
            claim.session.busy = True
            return claim.session
        return session if session.queued > 0 and self._connected(session.key.channel) else None

    def _first(self, wanted: Callable[[Claim], bool]) -> Claim | None:
        """Take the first in line whose channel is connected, if it is `wanted`."""
        while self._line:
            claim = self._line[0]
            if self._is_void(claim):
                self._line.popleft()
            elif not self._connected(claim.session.key.channel):
                self._line.popleft()
                self._enqueue(claim)
            elif not wanted(claim):
                return None
            else:
                claim.session.in_line = False
                return self._line.popleft()
        return None

    def _is_void(self, claim: Claim) -> bool:
        """Whether what the claim was for has ended meanwhile (/stop)."""
        if claim.pending is not None:
            return claim.session.pending != claim.pending.id
        if claim.session.queued > 0:
            return False
        claim.session.in_line = False
        self.let_go(claim.session)
        return True

    def begin_request(self, session: Session) -> Begin:
        """What to ask the store for: one message, or all that wait."""
        collect = self.collect or session.collect
        session.collect = False
        return Begin(session.key, session.id or 0, collect)
