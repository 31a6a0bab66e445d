"""Opens gateways for tests: always the same store and clock, so that each one is a boot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import attrs

from .. import Agent, Authorize, Channel, Clock, Event, Gateway, Settings, open_gateway


@attrs.frozen(kw_only=True)
class GatewayOpener:
    """Calls `open_gateway` with what a test has set up, and with what it is called with.

    `inline_store`: writes run in the loop, not on a thread. Under a virtual clock that is a must: a
    thread's work looks like idleness there, and time would run away.
    """

    store: Path
    clock: Clock | None = None
    channels: Sequence[Channel] = ()
    inline_store: bool = False
    tap: Callable[[str], None] | None = None

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
        """A gateway that hosts `agent`, as an async context manager; see `open_gateway`."""
        return open_gateway(
            agent,
            store=self.store,
            channels=self.channels if channels is None else channels,
            settings=settings,
            authorize=authorize,
            listen=listen,
            clock=self.clock,
            inline_store=self.inline_store,
            tap=tap or self.tap,
        )
