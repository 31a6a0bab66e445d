"""What a supervisor (systemd, or whatever sets NOTIFY_SOCKET) is told. Without one, nothing.

READY=1 after recovery; RELOADING=1, and READY=1 once more, around a reload. STOPPING=1 only when
the open turns are marked: from that message on, systemd counts down to its SIGKILL.
EXTEND_TIMEOUT_USEC only on real progress: while the start gets further, and in a stop while turns
really settle, never for longer than our own budget lasts. WATCHDOG=1 from the event loop, and only
while the store takes writes. STATUS= says what goes on.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from ._errors import StoreClosed, StoreError, StoreFull
from ._events import (
    DrainReport,
    Event,
    GatewayStarted,
    MarkingFailed,
    StopRequested,
    TurnSettled,
    TurnsMarked,
)

STATUS_EVERY: Final = 2.0
"""Seconds between two changes of the status at the least."""

START_STEP: Final = 30.0
"""Seconds that the next step of a start may take, once one was made."""


class Supervisor:
    """The notification socket of whoever supervises this process."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the NUL of Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._ping_every = watchdog_interval(environ) if address else None
        self._ready = False
        self._stop_requested = False
        self._stopping = False
        self._status = ""
        self._news = trio.Event()

    def tell(self, *assignments: str) -> bool:
        """Send `NAME=value` pairs in one datagram; whether it was sent. Never waits, never raises:
        a supervisor that does not listen is no reason to fail. From any thread."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError:
            return False
        return True

    def starting(self) -> None:
        """The agent is loaded, and the store is opened next."""
        self.tell("STATUS=opening the store", _extend(START_STEP))

    def ready(self) -> None:
        """Recovery is done, and messages are taken."""
        self._ready = True
        self._status = "serving"
        self.tell("READY=1", f"STATUS={self._status}")

    def reloading(self) -> None:
        """The configuration is read again; `reloaded` follows."""
        if not self._stopping:
            now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            self.tell("RELOADING=1", f"MONOTONIC_USEC={now}", "STATUS=reading the configuration")

    def reloaded(self) -> None:
        """It was read, whatever came of it; a stop that has begun meanwhile goes before."""
        if not self._stopping:
            self.tell("READY=1", f"STATUS={self._status}")

    def hear(self, event: Event, time_left: Callable[[], float]) -> None:
        """Tell what follows from `event`; `time_left` says how much of our budget is left (s)."""
        self._news.set()
        if isinstance(event, StopRequested):
            self._stop_requested = True
        elif isinstance(event, TurnsMarked):
            self._stop(f"STATUS=draining {event.count} turns")
        elif isinstance(event, MarkingFailed | DrainReport):
            self._stop("STATUS=stopping")
        elif isinstance(event, TurnSettled):
            if self._stop_requested:
                self.tell(_extend(time_left()))
            elif not self._ready:
                self.tell(_extend(START_STEP))
        elif isinstance(event, GatewayStarted):
            self.tell(f"STATUS=resuming {event.resuming} turns", _extend(START_STEP))

    def _stop(self, status: str) -> None:
        if not self._stopping:
            self._stopping = True
            self.tell("STOPPING=1", status)

    # ----- services, for a nursery; each ends at once where it has nobody to tell

    async def keep_alive(
        self, touch: Callable[[], Awaitable[None]], complain: Callable[[StoreError], None]
    ) -> None:
        """Ping the watchdog for ever, after each `touch` of the store that was written; `complain`
        once when it is not. A store that hangs, or fails, gives no sign of life."""
        failing = False
        while self._ping_every is not None:
            next_time = trio.current_time() + self._ping_every
            trouble = await _trouble_of(touch)
            if trouble is None:
                self.tell("WATCHDOG=1")
            elif isinstance(trouble, StoreClosed):
                return
            elif not failing:
                complain(trouble)
            failing = trouble is not None
            await trio.sleep_until(next_time)

    async def keep_status(self, describe: Callable[[], str]) -> None:
        """Tell what `describe` says for ever: soon after something has happened, if it is new."""
        while self._address:
            await self._news.wait()
            self._news = trio.Event()
            if (status := describe()) != self._status:
                self._status = status
                self.tell(f"STATUS={status}")
            await trio.sleep(STATUS_EVERY)

    def interject(self, status: str) -> None:
        """Tell something instead of the status, until `go_on`. From any thread."""
        self.tell(f"STATUS={status}")

    def go_on(self) -> None:
        """Tell the status as it was. From any thread."""
        self.tell(f"STATUS={self._status}")


async def _trouble_of(touch: Callable[[], Awaitable[None]]) -> StoreError | None:
    try:
        await touch()
    except StoreFull:
        return None  # an answer; to be killed makes no room, and is counted against the turns
    except StoreError as error:
        return error
    return None


def watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Seconds between two pings, half of what the watchdog waits; None: there is none for us."""
    us, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", str(os.getpid()))
    if pid != str(os.getpid()) or not re.fullmatch(r"(?a:[1-9]\d{0,17})", us):
        return None
    return int(us) / 2_000_000


def _extend(seconds: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={round(seconds * 1_000_000)}"


def status_of(state: str, counts: Mapping[str, int]) -> str:
    """What goes on, in one line, from a gateway's state and statistics."""
    return (
        f"{state}: turns running {counts['turns_running']}, messages open"
        f" {counts['messages_open']}, replies on their way {counts['undelivered']}"
    )
