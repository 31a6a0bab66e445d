"""The store's own writer, on its own thread, in step with a loop on virtual time.

A thread's work looks like idleness to a virtual clock, which would run away meanwhile; and what the
thread finds in its queue, and so what it commits together, is an accident of timing. Here the two
take turns: the thread works while the loop stands still, on what the loop has handed in by then.
Mostly that is all that it had to hand in; now and then, by the dice, the thread comes earlier and
finds less. So group commit is as it is in life, and the same seed gives the same batches.

    async with in_step(dice):
        async with open_gateway(...):    # not inline
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from queue import Empty, SimpleQueue
from typing import Any, Final

import trio

from trio_gateway import Instant
from trio_gateway.store import _writer

_PATIENCE: Final = 30.0
"""Seconds that the other side may take on a busy machine."""

_START: Final = 1_767_225_600_000_000  # 2026-01-01 00:00:00 UTC

_EARLY: Final = 0.2
"""How likely the thread gets to work although the loop has more to do."""


class _Queue:
    """The writer's queue. The thread gets something only while the door is open."""

    def __init__(self, bell: threading.Condition) -> None:
        self._bell = bell
        self._items: deque[Any] = deque()
        self._open = False
        self._at_work = False
        self._at_end = False
        self.largest = 0
        """The most that the thread was given at once."""

    def put(self, item: Any) -> None:
        """Hand something in. The end lets the thread go its own way: the loop waits for it."""
        with self._bell:
            self._items.append(item)
            if item is None:
                self._open = True
                self._bell.notify_all()

    def get(self) -> Any:
        """Wait for the first of what is there: the thread has finished what it had."""
        with self._bell:
            self._at_work = False
            self._bell.notify_all()
            self._bell.wait_for(lambda: self._open and self._items)
            self._at_work = True
            return self._take()

    def get_nowait(self) -> Any:
        """The next of what is there."""
        with self._bell:
            if not self._items:
                raise Empty
            return self._take()

    def _take(self) -> Any:
        item = self._items.popleft()
        self._at_end = item is None
        return item

    def is_empty(self) -> bool:
        """Whether there is nothing for the thread to do."""
        return not self._items

    def serve(self) -> None:
        """In the loop: let the thread work until nothing is left."""
        with self._bell:
            self.largest = max(self.largest, len(self._items))
            self._open = True
            self._bell.notify_all()
            if not self._bell.wait_for(self._is_served, _PATIENCE):
                raise RuntimeError(f"the store's thread did not finish within {_PATIENCE:g} s")
            self._open = False

    def _is_served(self) -> bool:
        return self._at_end or not (self._items or self._at_work)


class Turns(trio.abc.Instrument):
    """Gives the thread its turn when the loop has nothing to do."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._bell = threading.Condition()
        self._queues: list[_Queue] = []

    def make_queue(self) -> _Queue:
        """The queue of one more writer."""
        self._queues.append(_Queue(self._bell))
        return self._queues[-1]

    @property
    def largest_batch(self) -> int:
        """The most operations that a thread was given at once."""
        return max((queue.largest for queue in self._queues), default=0)

    def before_io_wait(self, timeout: float) -> None:
        """Trio calls this in each round, before it waits for whatever comes."""
        if not all(queue.is_empty() for queue in self._queues):
            idle = not trio.lowlevel.current_statistics().tasks_runnable
            if idle or self._dice.random() < _EARLY:
                for queue in self._queues:
                    queue.serve()


async def _inline(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return call(*args)


class SharedClock:
    """A clock that follows Trio's, like `VirtualClock`, also for whoever asks from a thread."""

    def __init__(self) -> None:
        self._clock = trio.lowlevel.current_clock()

    def now(self) -> Instant:
        """This moment."""
        up = int(self._clock.current_time() * 1_000_000)
        return Instant(_START + up, up, "virtual")


@asynccontextmanager
async def in_step(dice: random.Random) -> AsyncGenerator[Turns]:
    """For this block, a store's writer takes turns with the loop; whatever else would be done in a
    thread is done in the loop."""
    turns = Turns(dice)
    threads = trio.to_thread.run_sync
    setattr(_writer, "SimpleQueue", turns.make_queue)  # noqa: B010 - a module is not made for it
    setattr(trio.to_thread, "run_sync", _inline)  # noqa: B010
    trio.lowlevel.add_instrument(turns)
    try:
        yield turns
    finally:
        trio.lowlevel.remove_instrument(turns)
        setattr(_writer, "SimpleQueue", SimpleQueue)  # noqa: B010
        setattr(trio.to_thread, "run_sync", threads)  # noqa: B010
