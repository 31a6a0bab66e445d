"""Notices a blocked event loop while it is blocked, and says which turn blocks it, and where.

A thread asks the loop for a sign of life, twice a second. While it waits for one for too long, it
looks at what the loop's thread is doing. A sign costs one callback; the steps of tasks cost
nothing more than before. What is told are places in code; no line of it, and no value.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import attrs
import trio

from ._tasktree import is_trios

ASK_EVERY: Final = 0.5
"""Seconds from one sign of life to the next question."""

STALL_AFTER: Final = 1.0
"""Seconds without an answer, after which the loop counts as blocked."""

SECOND_CHANCE: Final = 0.05
"""Seconds that a loop gets on top: a process that was frozen answers as soon as it goes on."""

TELL_EVERY: Final = 10.0
"""Seconds between two stalls that are told; those between are counted."""

LINES: Final = 20
"""Places of the stack that are told, from the innermost outwards."""


@attrs.frozen(kw_only=True)
class Stall:
    """A loop that does not go on. `stack` has the innermost place last."""

    turn: str | None
    """The name of the turn whose task it is; None: no turn's."""
    task: str | None
    stack: tuple[str, ...]
    untold: int
    """Stalls since the last one that was told."""


@contextmanager
def watching_for_stalls(
    began: Callable[[Stall], None], ended: Callable[[float], None]
) -> Generator[None]:
    """Watch the current event loop. Each stall that is told has one call of `began`, while it
    lasts, and one of `ended` with its length in seconds: on the watching thread, so neither may
    wait for the loop."""
    watch = _Watch(began, ended)
    watch.start()
    try:
        yield
    finally:
        watch.close()


class _Watch:
    def __init__(self, began: Callable[[Stall], None], ended: Callable[[float], None]) -> None:
        self._began = began
        self._ended = ended
        self._token = trio.lowlevel.current_trio_token()
        self._root = trio.lowlevel.current_root_task()
        self._loop = threading.get_ident()
        self._answered = threading.Event()
        self._closed = threading.Event()
        self._told_at = -TELL_EVERY
        self._untold = 0
        self._thread = threading.Thread(target=self._keep, name="stall-watch", daemon=True)

    def start(self) -> None:
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):
            self._closed.set()  # no room for a thread: nobody watches, and all else goes on

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._answered.set()
            self._thread.join(STALL_AFTER)

    def _keep(self) -> None:
        while not self._closed.wait(ASK_EVERY):
            asked = time.monotonic()
            self._answered.clear()
            try:
                self._token.run_sync_soon(self._answered.set, idempotent=True)
            except trio.RunFinishedError:
                return
            if self._is_stalled():
                self._tell(asked)

    def _is_stalled(self) -> bool:
        return not (
            self._answered.wait(STALL_AFTER)
            or self._answered.wait(SECOND_CHANCE)
            or self._closed.is_set()
        )

    def _tell(self, asked: float) -> None:
        if asked < self._told_at + TELL_EVERY:
            self._untold += 1
            self._answered.wait()
            return
        self._began(self._look())
        self._told_at, self._untold = asked, 0
        self._answered.wait()
        self._ended(time.monotonic() - asked)

    def _look(self) -> Stall:
        task = running_task(self._root)
        frame = sys._current_frames().get(self._loop)
        return Stall(
            turn=None if task is None else _turn_of(task),
            task=None if task is None else task.name,
            stack=tuple(reversed(list(_places(frame)))),
            untold=self._untold,
        )


def running_task(root: trio.lowlevel.Task | None) -> trio.lowlevel.Task | None:
    """The task at or below `root` that is in the middle of a step; from any thread."""
    tasks = [] if root is None else [root]
    while tasks:
        task = tasks.pop()
        if getattr(task.coro, "cr_running", False):
            return task
        for nursery in task.child_nurseries:
            tasks += nursery.child_tasks
    return None


def _turn_of(task: trio.lowlevel.Task | None) -> str | None:
    """The name of the turn that a task is, or that has started it."""
    while task is not None and not task.name.startswith("turn "):
        task = None if task.parent_nursery is None else task.parent_nursery.parent_task
    return None if task is None else task.name


def _places(frame: FrameType | None) -> Iterator[str]:
    """From the innermost outwards, as far as it is the task's: Trio's own comes next."""
    while frame is not None and is_trios(frame):
        frame = frame.f_back
    left = LINES
    while frame is not None and left and not is_trios(frame):
        yield f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        frame, left = frame.f_back, left - 1
