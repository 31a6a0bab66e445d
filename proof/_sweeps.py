"""Points that are counted upwards, and several hands at them at once."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import attrs

from ._report import Enough

Key = TypeVar("Key")
Point = TypeVar("Point")
Hand = TypeVar("Hand")
Outcome = TypeVar("Outcome")


@attrs.define
class Sweeps(Generic[Key]):
    """For each key the numbers 1, 2, 3, until somebody says that this key has ended: there is no
    such number. Also in strides, from a number on that `first` gives.

    One key after the other. With `enough`, no further key is begun once so many points were given.
    """

    keys: Iterable[Key]
    first: Callable[[Key], int] = lambda key: 1
    stride: int = 1
    enough: int | None = None
    done: int = 0
    """The keys that are through."""
    _ended: set[Key] = attrs.field(factory=set[Key], init=False)

    def __iter__(self) -> Iterator[tuple[Key, int]]:
        given = 0
        for key in self.keys:
            if self.enough is not None and given >= self.enough:
                return
            for number in itertools.count(self.first(key), self.stride):
                if key in self._ended:
                    break
                given += 1
                yield key, number
            self.done += 1

    def abreast(self) -> Iterator[tuple[Key, int]]:
        """All keys side by side: each one's first number, each one's second. So hardly a number is
        given before it is known whether there is the one below it."""
        left = list(self.keys)
        for number in itertools.count(1):
            left = [key for key in left if key not in self._ended]
            if not left:
                return
            for key in left:
                if key not in self._ended:
                    yield key, number

    def ended(self, key: Key) -> None:
        """There are no more numbers for that key."""
        self._ended.add(key)


def work_off(
    points: Iterable[Point],
    hands: Sequence[Hand],
    attempt: Callable[[Hand, Point], Outcome],
    tell: Callable[[Point, Outcome], None],
) -> None:
    """Try all points, each hand on a thread of its own; `tell` hears of one at a time, and the
    points are asked by one at a time. Raises what is raised (`Enough`, for one) when all hands have
    finished what they had begun."""
    lock = threading.Lock()
    left = iter(points)
    stopped = threading.Event()

    def work(hand: Hand) -> None:
        try:
            while True:
                with lock:
                    given = [] if stopped.is_set() else list(itertools.islice(left, 1))
                if not given:
                    return
                outcome = attempt(hand, given[0])
                with lock:
                    tell(given[0], outcome)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(len(hands)) as pool:
        works = [pool.submit(work, hand) for hand in hands]
    errors = [error for error in (work.exception() for work in works) if error is not None]
    # Something that went wrong is news, where others merely had enough.
    for error in sorted(errors, key=lambda error: isinstance(error, Enough)):
        raise error


def same_gateway() -> dict[str, str]:
    """In such an environment a process finds the gateway that is found here, and this package."""
    return {"PYTHONPATH": os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)}
