"""Spreads the points of a campaign over a few processes.

Each is forked from here, tries its share of the points, and says how it went after each; so a
failure is heard of at once, and what is left after the last one that counts is not tried any more.
"""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, TypeAlias

import attrs

from ._report import Report

_PATIENCE: Final = 120.0
"""Seconds that one point may still take when nobody wants to know any more."""

_FORK: Final = multiprocessing.get_context("fork")


@attrs.define
class Tally:
    """What one or more points have shown; see `Report` for the words."""

    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])
    failures: list[tuple[str, str]] = attrs.field(factory=list[tuple[str, str]])

    def count(self, **figures: int) -> None:
        """Add to the figures."""
        self.figures.update(figures)

    def saw(self, *states: str) -> None:
        """The campaign has come through these states."""
        self.seen.update(states)

    def fail(self, point: str, what: str) -> None:
        """Something broke."""
        self.failures.append((point, what))

    def hand_to(self, report: Report) -> None:
        """Move all of it into a report. Raises `Enough` when there is enough."""
        report.count(**self.figures)
        report.saw(*self.seen.elements())
        for point, what in self.failures:
            report.fail(point, what)


Try: TypeAlias = Callable[[str, Tally], None]
"""Tries one point. What it raises is a failure of that point."""


def spread(report: Report, jobs: int, points: Sequence[str], try_one: Try) -> None:
    """Try every point, in so many processes. Raises `Enough`."""
    if jobs <= 1 or len(points) <= 1:
        for point in points:
            _tried(point, try_one).hand_to(report)
        return
    processes: list[BaseProcess] = []
    pipes: list[Connection[Any, Any]] = []
    try:
        for number in range(jobs):
            process, pipe = _start(points[number::jobs], try_one)
            processes.append(process)
            pipes.append(pipe)
        _collect(pipes, report)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.close()  # whoever is still at it ends with the point at hand
            process.join(_PATIENCE)
            process.kill()
            process.join()


def _start(points: Sequence[str], try_one: Try) -> tuple[BaseProcess, Connection[Any, Any]]:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(points, try_one, theirs), daemon=True)
    with warnings.catch_warnings():
        # Python warns of forking beside threads. Those that may be here are idle, and what is
        # forked does without.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return process, ours


def _work(points: Sequence[str], try_one: Try, pipe: Connection[Any, Any]) -> None:
    with suppress(BrokenPipeError):
        for point in points:
            pipe.send(_tried(point, try_one))
        pipe.send(None)


def _tried(point: str, try_one: Try) -> Tally:
    tally = Tally()
    try:
        try_one(point, tally)
    except Exception as error:
        text = str(error) or repr(error)
        if not isinstance(error, AssertionError):
            text = "".join(traceback.format_exception(error))
        tally.fail(point, text)
    return tally


def _collect(pipes: list[Connection[Any, Any]], report: Report) -> None:
    waiting: list[Any] = list(pipes)
    while waiting:
        for pipe in wait(waiting):
            assert isinstance(pipe, Connection)
            try:
                tally: Tally | None = pipe.recv()
            except EOFError:
                raise RuntimeError("a process of the campaign died") from None
            if tally is None:
                waiting.remove(pipe)
            else:
                tally.hand_to(report)
