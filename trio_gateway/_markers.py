"""The marker: the durable state of a turn, and every way in which it may change.

Theory
------
A marker answers one question: *if the process vanished now, what should the next boot do?*

    (none) --begin--> RUNNING ---------------------> COMPLETED | FAILED | STOPPED
                       ^    \\                        ^
                resume |     \\ mark(reason)          | settle
                       |      v                      |
                       RESUME_PENDING ---------------'
                              \\--quarantine--> QUARANTINED
                              \\--expire------> EXPIRED

RUNNING         an attempt is under way, or was when its process died. Found at boot, of a dead
                epoch: the process died without warning. It is marked with reason CRASH, which
                charges it, and then resumes.
RESUME_PENDING  the attempt is not counted on any more. Somebody asked the process to stop
                (RESTART, SHUTDOWN: charged nothing) or it died (CRASH). Found at boot: resume.
the five ends   the turn is settled. No boot ever looks at it again.

Why the mark comes before the drain: between the request to stop and the last commit the process
may be killed at any instant. Marked first, every open turn is true at every one of those instants;
the turns that finish meanwhile change their own marker *in the transaction that settles them*.
A later sweep that "clears the markers of those that completed" cannot replace that: a kill
between a turn's end and the sweep would run a finished turn again.

Why a compare-and-set on (state, attempt): a process may hold on to an attempt that is over (a
thread that does not end, an agent that swallows its cancellation). Whatever such an attempt does
late names an old attempt number, and changes nothing.

Invariants
----------
I1  A turn has at least one attempt, and its number only grows: only RESUME adds one.
I2  `crashes` grows only by MARK with reason CRASH, once for each time the turn was found RUNNING.
    A planned stop leaves it alone. It is never reset: an end simply ends the counting.
I3  `interruptions` grows only by MARK with a planned reason; progress (a step, a checkpoint)
    sets it to zero.
I4  An end has no way out: no action leads out of COMPLETED, FAILED, STOPPED, QUARANTINED, EXPIRED.
I5  A reason is there exactly while the turn is RESUME_PENDING.

This file is the only one that says what leads where. The store's statements repeat the left-hand
sides as conditions; a test walks both side by side and compares them after every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import attrs


class TurnState(StrEnum):
    """The state that a marker shows."""

    RUNNING = "RUNNING"
    RESUME_PENDING = "RESUME_PENDING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    QUARANTINED = "QUARANTINED"
    EXPIRED = "EXPIRED"


OPEN: Final = frozenset({TurnState.RUNNING, TurnState.RESUME_PENDING})
ENDS: Final = frozenset(TurnState) - OPEN


class ResumeReason(StrEnum):
    """Why a turn has to be resumed."""

    RESTART = "restart"
    SHUTDOWN = "shutdown"
    CRASH = "crash"

    @property
    def planned(self) -> bool:
        """Whether somebody asked for it; a planned stop is nobody's failure."""
        return self is not ResumeReason.CRASH


class Action(StrEnum):
    """What can happen to a marker."""

    BEGIN = "begin"
    MARK = "mark"
    RESUME = "resume"
    COMPLETE = "complete"
    FAIL = "fail"
    STOP = "stop"
    QUARANTINE = "quarantine"
    EXPIRE = "expire"


TRANSITIONS: Final[Mapping[tuple[TurnState | None, Action], TurnState]] = MappingProxyType(
    {
        (None, Action.BEGIN): TurnState.RUNNING,
        (TurnState.RUNNING, Action.MARK): TurnState.RESUME_PENDING,
        (TurnState.RUNNING, Action.COMPLETE): TurnState.COMPLETED,
        (TurnState.RUNNING, Action.FAIL): TurnState.FAILED,
        (TurnState.RUNNING, Action.STOP): TurnState.STOPPED,
        (TurnState.RESUME_PENDING, Action.RESUME): TurnState.RUNNING,
        (TurnState.RESUME_PENDING, Action.COMPLETE): TurnState.COMPLETED,
        (TurnState.RESUME_PENDING, Action.FAIL): TurnState.FAILED,
        (TurnState.RESUME_PENDING, Action.STOP): TurnState.STOPPED,
        (TurnState.RESUME_PENDING, Action.QUARANTINE): TurnState.QUARANTINED,
        (TurnState.RESUME_PENDING, Action.EXPIRE): TurnState.EXPIRED,
    }
)

ENDED_BY: Final[Mapping[TurnState, Action]] = MappingProxyType(
    {
        TurnState.COMPLETED: Action.COMPLETE,
        TurnState.FAILED: Action.FAIL,
        TurnState.STOPPED: Action.STOP,
        TurnState.QUARANTINED: Action.QUARANTINE,
        TurnState.EXPIRED: Action.EXPIRE,
    }
)


class IllegalTransition(Exception):
    """A marker was asked to do what the table does not know. A bug in the caller."""


@attrs.frozen
class Marker:
    """The durable state of a turn, without the turn."""

    state: TurnState
    attempt: int = 1
    reason: ResumeReason | None = None
    crashes: int = 0
    interruptions: int = 0

    def __attrs_post_init__(self) -> None:
        if (self.reason is not None) != (self.state is TurnState.RESUME_PENDING):
            raise IllegalTransition(f"{self.state} with reason {self.reason} (invariant I5)")


def begin() -> Marker:
    """The marker of a turn's first attempt."""
    return Marker(TRANSITIONS[None, Action.BEGIN])


def advance(marker: Marker, action: Action, reason: ResumeReason | None = None) -> Marker:
    """The marker after `action`. MARK needs a `reason`; no other action takes one.

    Raises `IllegalTransition` for every pair that is not in `TRANSITIONS`.
    """
    state = TRANSITIONS.get((marker.state, action))
    if state is None:
        raise IllegalTransition(f"{marker.state} has no {action}")
    if (action is Action.MARK) != (reason is not None):
        raise IllegalTransition(f"{action} with reason {reason}")
    return Marker(
        state=state,
        attempt=marker.attempt + (action is Action.RESUME),
        reason=reason,
        crashes=marker.crashes + (reason is ResumeReason.CRASH),
        interruptions=marker.interruptions + (reason is not None and reason.planned),
    )


def progressed(marker: Marker) -> Marker:
    """The marker after a step or a checkpoint was remembered: interruptions start anew."""
    if marker.state not in OPEN:
        raise IllegalTransition(f"{marker.state} makes no progress")
    return attrs.evolve(marker, interruptions=0)
