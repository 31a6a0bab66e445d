"""What the page knows of this life beside the store: what turns say of themselves, and the drain.

It hears the gateway's events. Nothing here is a source of truth: after a restart it is empty, and
the store has all that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

import attrs

from .._events import (
    DeliveryEvent,
    DrainReport,
    Event,
    MarkingFailed,
    ProgressShown,
    ReplyCommitted,
    StepRemembered,
    StopRequested,
    TurnBegun,
    TurnEvent,
    TurnInterrupted,
    TurnSettled,
    TurnsMarked,
    TurnsPaused,
    TurnUnresponsive,
)
from .._messages import SessionKey
from .._turns import TurnInfo
from ._follow import Bell, about

Fate = Literal["open", "settled", "resumes"]


@attrs.define(kw_only=True)
class Leaving:
    """A turn that was open when the stop began, and what became of it."""

    turn: int
    session: SessionKey
    attempt: int
    fate: Fate = "open"
    detail: str = ""


@attrs.define(kw_only=True)
class Drain:
    """A stop as it happens."""

    reason: str
    by: str
    since: datetime
    turns: dict[int, Leaving] = attrs.field(factory=dict[int, Leaving])
    marked: int | None = None
    failed: str | None = None
    """Why the open turns could not be marked."""
    report: DrainReport | None = None

    def count(self, fate: Fate) -> int:
        """How many turns have met this fate."""
        return sum(turn.fate == fate for turn in self.turns.values())

    def _of(self, event: TurnEvent) -> Leaving:
        known = Leaving(turn=event.turn, session=event.session, attempt=event.attempt)
        return self.turns.setdefault(event.turn, known)

    def hear(self, event: Event) -> None:
        """Note what an event says about the stop."""
        match event:
            case TurnsMarked():
                self.marked = event.count
            case MarkingFailed():
                self.failed = event.error
            case TurnBegun():
                self._of(event)
            case TurnSettled():
                turn = self._of(event)
                turn.fate, turn.detail = "settled", event.state.value
            case TurnInterrupted():
                turn = self._of(event)
                turn.fate, turn.detail = "resumes", event.reason
            case TurnUnresponsive():
                turn = self._of(event)
                turn.fate, turn.detail = "resumes", "it does not end when it is cancelled"
            case DrainReport():
                self.report = event
            case _:
                return


class Board:
    """Hears the gateway for the page. `bell` rings when the overview has changed.

    Its bells are no journal's: they ring for sessions of every channel.
    """

    def __init__(self) -> None:
        self.bell = Bell()
        self.drain: Drain | None = None
        self.said: dict[int, ProgressShown] = {}
        """What each open turn said last of what it is doing, or the reply that it drafts."""
        self._sessions: dict[SessionKey, Bell] = {}

    def hear(self, event: Event, turns: Callable[[], Sequence[TurnInfo]]) -> None:
        """Note what an event says. `turns` tells which are running."""
        if isinstance(event, StopRequested):
            self._begin_drain(event, turns())
        elif self.drain is not None:
            self.drain.hear(event)
        if isinstance(event, ProgressShown):
            self._note(event)
        elif isinstance(event, TurnSettled | TurnInterrupted | ReplyCommitted):
            self.said.pop(event.turn, None)
        if self.bell.followers and not _is_detail(event):
            self.bell.ring()
        if self._sessions:
            self._ring(event)

    @contextmanager
    def watching(self) -> Generator[Bell, None, None]:
        """The bell of the overview, for as long as the block lasts."""
        self.bell.followers += 1
        self.bell.ring()  # nobody has counted what happened while nobody looked
        try:
            yield self.bell
        finally:
            self.bell.followers -= 1

    @contextmanager
    def following(self, session: SessionKey) -> Generator[Bell, None, None]:
        """The bell of one session, of whichever channel, for as long as the block lasts."""
        bell = self._sessions.setdefault(session, Bell())
        bell.followers += 1
        try:
            yield bell
        finally:
            bell.followers -= 1
            if not bell.followers:
                del self._sessions[session]

    def _ring(self, event: Event) -> None:
        if isinstance(event, TurnsMarked | TurnsPaused | StopRequested):
            for bell in self._sessions.values():
                bell.ring()
            return
        session = event.delivery.session if isinstance(event, DeliveryEvent) else about(event)
        followed = None if session is None else self._sessions.get(session)
        if followed is not None:
            followed.ring()

    def _begin_drain(self, event: StopRequested, turns: Sequence[TurnInfo]) -> None:
        self.drain = Drain(
            reason=event.reason.value,
            by=event.by,
            since=datetime.now(UTC),
            turns={
                one.id: Leaving(turn=one.id, session=one.session, attempt=one.attempt)
                for one in turns
            },
        )

    def _note(self, event: ProgressShown) -> None:
        if event.text:
            self.said[event.turn] = event
        else:
            self.said.pop(event.turn, None)


def _is_detail(event: Event) -> bool:
    """Whether an event changes nothing that the overview shows."""
    return isinstance(event, StepRemembered) or (isinstance(event, ProgressShown) and event.draft)
