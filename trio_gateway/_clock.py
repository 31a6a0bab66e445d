"""The only place that asks what time it is."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import attrs

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@attrs.frozen
class Instant:
    """A moment, told by two clocks. `wall` and `up` are microseconds.

    `wall` is since 1970, and somebody may set it; `up` is since the machine started, and nobody
    can. Two instants of one `machine` (one boot of it) are compared by `up`.
    """

    wall: int
    up: int
    machine: str


def time_between(earlier: Instant, later: Instant) -> timedelta:
    """How much time really passed; never less than nothing, whatever the wall clock did."""
    if earlier.machine and earlier.machine == later.machine:
        return timedelta(microseconds=max(0, later.up - earlier.up))
    return timedelta(microseconds=max(0, later.wall - earlier.wall))


class Clock(Protocol):
    """Where a gateway takes its time from. `testing` has one that follows Trio's virtual clock."""

    def now(self) -> Instant:
        """This moment."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def __init__(self) -> None:
        self._machine = _machine()
        self._ahead = _ahead_of_machine_ns()

    def now(self) -> Instant:
        """This moment, by CLOCK_REALTIME and CLOCK_BOOTTIME."""
        up = _uptime_ns() - self._ahead
        return Instant(time.time_ns() // 1000, up // 1000, self._machine)


def _uptime_ns() -> int:
    # CLOCK_BOOTTIME goes on while the machine sleeps; it is Linux's.
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _ahead_of_machine_ns() -> int:
    """By how much the uptime that this process is shown is not the machine's: a container may have
    a time namespace of its own, and the next one another."""
    try:
        text = Path("/proc/self/timens_offsets").read_text("ascii")
        found = {name: (int(s), int(ns)) for name, s, ns in map(str.split, text.splitlines())}
        seconds, nanoseconds = found["boottime"]
    except (OSError, ValueError, KeyError):
        return 0
    return seconds * 1_000_000_000 + nanoseconds


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""  # unknown: only the wall clock can be compared across processes


def as_datetime(microseconds: int) -> datetime:
    """Aware UTC, from microseconds since 1970. Never fails: out of range becomes the edge."""
    try:
        return _EPOCH + timedelta(microseconds=microseconds)
    except OverflowError:
        edge = datetime.min if microseconds < 0 else datetime.max
        return edge.replace(tzinfo=UTC)


def as_microseconds(moment: datetime) -> int:
    """Microseconds since 1970, from an aware datetime."""
    return (moment - _EPOCH) // timedelta(microseconds=1)
