"""What a supervisor (systemd, or whatever sets NOTIFY_SOCKET) is told. Without one, nothing.

READY=1 after recovery. STOPPING=1 only when the open turns are marked: from that message on,
systemd counts down to its SIGKILL. EXTEND_TIMEOUT_USEC only while turns really settle, and never
for longer than our own budget lasts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping

from ._events import (
    DrainReport,
    Event,
    GatewayStarted,
    MarkingFailed,
    StopRequested,
    TurnSettled,
    TurnsMarked,
)


class Supervisor:
    """The notification socket of whoever supervises this process."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # An @ stands for the NUL of Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._stop_requested = False
        self._stopping = False

    def tell(self, *assignments: str) -> bool:
        """Send `NAME=value` pairs in one datagram; whether it was sent. Never waits, never raises:
        a supervisor that does not listen is no reason to fail."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError:
            return False
        return True

    def ready(self) -> None:
        """Recovery is done, and messages are taken."""
        self.tell("READY=1", "STATUS=serving")

    def hear(self, event: Event, time_left: Callable[[], float]) -> None:
        """Tell what follows from `event`; `time_left` says how much of our budget is left (s)."""
        if isinstance(event, StopRequested):
            self._stop_requested = True
        elif isinstance(event, TurnsMarked):
            self._stop(f"STATUS=draining {event.count} turns")
        elif isinstance(event, MarkingFailed | DrainReport):
            self._stop("STATUS=stopping")
        elif isinstance(event, TurnSettled) and self._stop_requested:
            self.tell(f"EXTEND_TIMEOUT_USEC={round(time_left() * 1_000_000)}")
        elif isinstance(event, GatewayStarted):
            self.tell(f"STATUS=resuming {event.resuming} turns")

    def _stop(self, status: str) -> None:
        if not self._stopping:
            self._stopping = True
            self.tell("STOPPING=1", status)
