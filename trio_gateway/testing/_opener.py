"""Opens gateways for tests: always the same store, clock and channel, so each one is a boot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import attrs

from .. import Agent, Authorize, Channel, Event, Gateway, Settings, open_gateway
from ._clock import VirtualClock
from ._memory import MemoryChannel


@attrs.frozen
class GatewayOpener:
    """Calls `open_gateway` with what a test has set up; what the `open_test_gateway` fixture is.

    Writes run in the loop, not on a thread: under a virtual clock a thread's work would look like
    idleness, and time would run away.
    """

    store: Path
    clock: VirtualClock
    channel: MemoryChannel

    def __call__(
        self,
        agent: Agent,
        *,
        channels: Sequence[Channel] | None = None,
        settings: Settings | None = None,
        authorize: Authorize | None = None,
        listen: Callable[[Event], None] | None = None,
        tap: Callable[[str], None] | None = None,
    ) -> AbstractAsyncContextManager[Gateway]:
        """A gateway that hosts `agent`, as an async context manager; see `open_gateway`.

        `channels` is the one memory channel unless given.
        """
        return open_gateway(
            agent,
            store=self.store,
            channels=[self.channel] if channels is None else channels,
            settings=settings,
            authorize=authorize,
            listen=listen,
            clock=self.clock,
            inline_store=True,
            tap=tap,
        )
