"""A Trio run that goes on only while somebody pumps it, and stands still in between.

For a campaign that plays a gateway's whole world from outside, one move at a time: `order` calls a
plain function inside the run, and comes back when everybody in there is blocked; `pass_time` lets
virtual time go by, from one deadline to the next. Trio calls this guest mode.

No thread is ever started. One task of ours always waits for all others to be blocked, or for a
moment of virtual time, so Trio's loop never has to wait for the real world. So everything happens
on the thread that pumps, in an order that Trio's loaded dice decide, and happens again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import outcome
import trio
import trio.abc
from trio.testing import MockClock, wait_all_tasks_blocked

MOST_TICKS: Final = 200_000
"""Turns of Trio's loop that one move may take. More than that is a loop without end."""


class Stuck(Exception):
    """The run neither comes to rest nor ends."""


class Guest:
    """One Trio run. `main` is its main function, `now` the time at which its clock begins.

    A thread can have one such run at a time, until it has `ended`.
    """

    def __init__(
        self,
        main: Callable[[], Awaitable[None]],
        now: float,
        instruments: Sequence[trio.abc.Instrument] = (),
    ) -> None:
        self.clock = MockClock()
        self.clock.jump(now)
        self.outcome: outcome.Outcome[None] | None = None
        self._main = main
        self._ticks: deque[Callable[[], object]] = deque()
        self._orders: deque[tuple[Sequence[Callable[[], object]], int]] = deque()
        self._pause: tuple[float, trio.Event] | None = None
        self._driver = trio.CancelScope()
        self._rests = False
        self._halted = False
        trio.lowlevel.start_guest_run(
            self._run,
            run_sync_soon_threadsafe=self._ticks.append,
            done_callback=self._note_end,
            clock=self.clock,
            instruments=instruments,
            host_uses_signal_set_wakeup_fd=True,
        )

    @property
    def ended(self) -> bool:
        """Whether its main function has returned, or raised."""
        return self.outcome is not None

    # ----- moves

    def rest(self) -> None:
        """Go on until everybody is blocked."""
        self._pump()

    def order(self, *calls: Callable[[], object], apart: int = 0) -> None:
        """Call these inside, so many turns of the loop apart, and go on until everybody is
        blocked."""
        self._orders.append((calls, apart))
        self._pump()

    def pass_time(self, seconds: float, until: trio.Event | None = None) -> None:
        """Let so much virtual time pass, or less: until that event comes."""
        self._pause = (seconds, trio.Event() if until is None else until)
        self._pump()

    def halt(self) -> None:
        """Called from inside: stop pumping. What is left of the step that is being made is made,
        and nothing after it."""
        self._halted = True

    def let_go(self) -> None:
        """Let what was halted come to its end, as fast as virtual time allows, so that the thread
        is free. Its owner sees to it that nothing of this counts."""
        self._halted = False
        self._orders.clear()
        self._driver.cancel()
        self._pump()
        if not self.ended:
            raise Stuck("what died does not let go of its thread")

    # ----- how it goes on

    def _pump(self) -> None:
        self._rests = False
        for _ in range(MOST_TICKS):
            if self._rests or self._halted or self.ended:
                return
            if not self._ticks:
                raise Stuck("somebody inside waits for a thread, or for real time")
            self._ticks.popleft()()
        raise Stuck(f"no rest after {MOST_TICKS} turns of the loop")

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drive)
            await self._main()
            nursery.cancel_scope.cancel()

    async def _drive(self) -> None:
        with self._driver:
            while True:
                await wait_all_tasks_blocked()
                if self._orders:
                    await self._obey(*self._orders.popleft())
                elif self._pause is not None:
                    (seconds, until), self._pause = self._pause, None
                    await self._let_time_pass(seconds, until)
                else:
                    self._rests = True
        self.clock.autojump_threshold = 0

    async def _obey(self, calls: Sequence[Callable[[], object]], apart: int) -> None:
        for call in calls:
            call()
            for _ in range(apart):
                await trio.lowlevel.checkpoint()

    async def _let_time_pass(self, seconds: float, until: trio.Event) -> None:
        self.clock.autojump_threshold = 0
        try:
            with trio.move_on_after(seconds):
                await until.wait()
        finally:
            self.clock.autojump_threshold = math.inf

    def _note_end(self, result: outcome.Outcome[None]) -> None:
        self.outcome = result
