"""How a gateway stops. The order is the design.

    1 shut    no turn begins any more; messages are still accepted, for the next boot
    2 mark    every open turn is RESUME_PENDING, in one transaction
    3 tell    agents see `turn.draining`; people are told, best effort
    4 drain   open turns get a window; each that settles clears its own marker as it does; and so
              do replies that are being sent
    5 account what completed and is not written yet is written; what did not keeps its marker
    6 cancel  what is left, and wait for it to unwind, a little

Killed on any line, the markers are true: before 2 they say RUNNING (a crash, resumed), from 2 on
RESUME_PENDING (resumed, charged nothing), and from its settle on each turn is over by itself. So
5 is the second line, never the only one: a sweep that came after the drain and was all there is
would run finished turns again, if the process died between their end and the sweep.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import attrs
import trio

from ._errors import StoreError
from ._events import DrainReport, MarkingFailed, TurnsMarked
from ._markers import ResumeReason
from ._policy import StopPlan
from .store import Settlement, Store


class House(Protocol):
    """What a stop needs of the gateway around it."""

    def shut_door(self) -> None:
        """Begin no turn any more. Cannot fail, cannot wait."""
        ...

    def open_turns(self) -> frozenset[int]:
        """The turns that have a child here and are not settled."""
        ...

    def settled(self) -> frozenset[int]:
        """The turns that have settled since the door was shut, whoever settled them."""
        ...

    def children(self) -> frozenset[int]:
        """The turns whose children have not ended, settled or not."""
        ...

    def say(self, event: TurnsMarked | MarkingFailed) -> None:
        """Tell an event."""
        ...

    def show_draining(self) -> None:
        """Let agents see that the gateway drains."""
        ...

    async def tell_people(self) -> None:
        """Tell people whose turn is open. Best effort: failures are not ours."""
        ...

    async def wait_drained(self) -> None:
        """Wait until every child has settled, its commit included."""
        ...

    async def wait_sent(self) -> None:
        """Wait until no reply is in flight."""
        ...

    def unwritten(self) -> Sequence[Settlement]:
        """The ends of children whose agent completed and whose end is not on disk."""
        ...

    async def write_ends(self, ends: Sequence[Settlement]) -> None:
        """Write them, in one transaction."""
        ...

    def cancel_turns(self) -> None:
        """Cancel every child that is left, telling it why."""
        ...

    def undelivered(self) -> int:
        """Deliveries that are on their way."""
        ...


@attrs.define
class Window:
    """The drain's window, so that an impatient host can end it early."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def end_now(self) -> None:
        """Do not wait for open turns any longer."""
        self.scope.cancel(reason="the stop is to be quick")


async def shut_down(
    store: Store, house: House, plan: StopPlan, reason: ResumeReason, window: Window
) -> DrainReport:
    """Stop, and report. Takes no longer than the plan's budget, less what flushing needs."""
    phases: dict[str, float] = {}
    house.shut_door()
    open_before = house.open_turns()
    with _timed(phases, "mark"):
        marked = await _mark(store, house, plan, reason)
    house.show_draining()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.tell_people)
        with _timed(phases, "drain"):
            timed_out = await _drain(house, plan, window)
        nursery.cancel_scope.cancel(reason="the drain is over")
    with _timed(phases, "account"):
        await _account(store, house, plan)
    if marked is None:  # also where no child is left: a begin may have come back after the door
        marked = await _mark(store, house, plan, reason)
    with _timed(phases, "unwind"):
        await _unwind(house, plan)
    # Not before: an agent may answer its cancellation with its reply. And of those that do not end
    # at all, some have been ended by others (/stop), and will not resume.
    interrupted = open_before - house.settled()
    unresponsive = house.children() & interrupted
    return DrainReport(
        reason=reason,
        settled=tuple(sorted(open_before - interrupted)),
        interrupted=tuple(sorted(interrupted - unresponsive)),
        unresponsive=tuple(sorted(unresponsive)),
        marked=marked,
        timed_out=timed_out,
        undelivered=house.undelivered(),
        phases=phases,
    )


async def _mark(store: Store, house: House, plan: StopPlan, reason: ResumeReason) -> int | None:
    """Mark every open turn, before anything that can wait, block or fail. None: it failed, which is
    said, and changes nothing else: RUNNING resumes too, only less kindly."""
    began = trio.current_time()
    with trio.move_on_after(plan.mark, shield=True):
        try:
            count = await store.mark_resume_pending(reason)
        except StoreError as error:
            house.say(MarkingFailed(error=str(error)))
            return None
        if count:
            house.say(TurnsMarked(count=count, seconds=trio.current_time() - began))
        return count
    house.say(MarkingFailed(error=f"not written within {plan.mark:g} s"))
    return None


async def _drain(house: House, plan: StopPlan, window: Window) -> bool:
    """Wait for the last turn to settle and for the replies in flight, for as long as the window is
    open. True: it timed out."""
    with window.scope:
        with trio.move_on_after(plan.grace) as grace:
            await house.wait_drained()
            await house.wait_sent()
        return grace.cancelled_caught
    return True


async def _account(store: Store, house: House, plan: StopPlan) -> None:
    """The second line: a completed child whose marker still stands (its commit failed and was being
    retried) is written now; an interrupted child's marker stays."""
    ends = house.unwritten()
    if not ends:
        return
    with trio.move_on_after(plan.mark, shield=True):
        try:
            await house.write_ends(ends)
        except StoreError as error:
            house.say(MarkingFailed(error=f"ends of completed turns: {error}"))


async def _unwind(house: House, plan: StopPlan) -> None:
    """Cancel what is left; wait for it, then stop waiting."""
    house.cancel_turns()
    with trio.move_on_after(plan.unwind, shield=True):
        await house.wait_drained()


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Generator[None, None, None]:
    began = trio.current_time()
    try:
        yield
    finally:
        phases[name] = trio.current_time() - began
