"""A clock for tests on virtual time."""

from __future__ import annotations

from datetime import timedelta

import trio

from .. import Instant

_START = 1_767_225_600_000_000  # 2026-01-01 00:00:00 UTC


class VirtualClock:
    """Follows Trio's clock (use it with `autojump_clock`), from 2026-01-01 on.

    One object serves several boots in one test: time does not go back between them. `jump` sets
    the wall clock, as somebody with a wrong time server would; `up` is not moved by it. `machine`
    is the name of this boot of the machine: change it for a reboot.
    """

    def __init__(self, machine: str = "virtual") -> None:
        self.machine = machine
        self._offset = 0

    def now(self) -> Instant:
        """This moment."""
        up = int(trio.current_time() * 1_000_000)
        return Instant(_START + up + self._offset, up, self.machine)

    def jump(self, by: timedelta) -> None:
        """Move the wall clock forwards, or backwards."""
        self._offset += by // timedelta(microseconds=1)
