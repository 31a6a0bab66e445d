"""Channels as the gateway runs them: started, started again with backoff, connected or not.

An exception in one channel is that channel's affair (it is served again); the others notice
nothing. Nothing here knows what flows.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import trio
from trio_util import AsyncBool

from ._errors import ChannelEnded, ConfigError, shown
from ._events import ChannelConnected, ChannelFailed, ChannelFinished
from ._messages import LOCAL, Intake, is_channel_name
from ._policy import retry_delay, split_text
from ._strangers import theirs
from ._stream import EventStream
from .channels import Channel

STEADY: Final = 60.0
"""Seconds of being connected after which earlier failures are forgotten."""


class Link:
    """One channel while the gateway runs. `connected` can be awaited."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.name: str = channel.name
        self.connected: AsyncBool = AsyncBool(False)
        self.input_ended: AsyncBool = AsyncBool(False)

    async def wait_connected(self) -> None:
        """Wait until the channel can send."""
        await self.connected.wait_value(True)


class Links:
    """The channels of one gateway, by name."""

    def __init__(
        self,
        channels: Sequence[Channel],
        events: EventStream,
        *,
        on_connect: Callable[[str], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._links: Mapping[str, Link] = _by_name(channels)
        self._events = events
        self._on_connect = on_connect
        self._on_end = on_end

    def get(self, name: str) -> Link | None:
        """The channel of that name, if the gateway has it."""
        return self._links.get(name)

    def __getitem__(self, name: str) -> Link:
        return self._links[name]

    def has(self, name: str) -> bool:
        """Whether this gateway serves the sessions of that channel."""
        return name in self._links or name == LOCAL

    @property
    def names(self) -> tuple[str, ...]:
        """What the channels are called."""
        return tuple(self._links)

    def connected(self, name: str) -> bool:
        """Whether turns of this channel's sessions can begin. The host's own always can."""
        link = self._links.get(name)
        return name == LOCAL if link is None else bool(link.connected.value)

    def is_local(self, name: str) -> bool:
        """Whether replies need no wire: who waits for them reads them from the store itself."""
        link = self._links.get(name)
        return name == LOCAL if link is None else link.channel.pulled

    @property
    def pulled(self) -> frozenset[str]:
        """The channels whose sessions have a journal."""
        return frozenset(name for name, link in self._links.items() if link.channel.pulled)

    def parts(self, name: str, text: str) -> tuple[str, ...]:
        """The text, cut to what the channel takes in one piece; whole, if it cannot say."""
        link = self._links.get(name)
        if link is None:
            return (text,)
        try:
            return split_text(text, link.channel.text_limit, link.channel.text_length)
        except BaseException as error:  # noqa: ASYNC103 - no await; what is not its own is raised
            self._note_fault(name, "text_length", theirs(error))
            return (text,)  # noqa: ASYNC104

    def shows_work(self, name: str) -> bool:
        """Whether the channel wants to know the end of every turn."""
        link = self._links.get(name)
        return link is not None and link.channel.shows_work

    def show(self, name: str, session: str, text: str) -> None:
        """Show a turn's progress, where the channel can; a fault of it is not the turn's."""
        link = self._links.get(name)
        if link is None or not link.connected.value:
            return
        try:
            link.channel.progress(session, text)
        except BaseException as error:  # noqa: ASYNC103 - no await; what is not its own is raised
            self._note_fault(name, "progress", theirs(error))

    def _note_fault(self, name: str, what: str, fault: BaseException) -> None:
        """The channel goes on: this is not about its connection."""
        self._events.emit(
            ChannelFailed(
                channel=name,
                error=f"{what}: {shown(fault)}",
                retry_in=0.0,
                traceback=_trace(fault),
            )
        )

    async def wait_input_ended(self) -> None:
        """Wait until no channel has more input; for ever, if there is no channel."""
        if not self._links:
            await trio.sleep_forever()
        for link in self._links.values():
            await link.input_ended.wait_value(True)

    async def serve_all(self, intake: Callable[[str], Intake]) -> None:
        """Serve every channel until cancelled."""
        async with trio.open_nursery() as nursery:
            for link in self._links.values():
                nursery.start_soon(self._serve, link, intake(link.name))

    async def _serve(self, link: Link, intake: Intake) -> None:
        failures = 0
        while True:
            since = trio.current_time()
            try:
                await link.channel.serve(intake, task_status=_Started(link, self._connect))
            except BaseException as error:  # noqa: ASYNC103 - it raises what is not the channel's
                fault = theirs(error)
                if isinstance(fault, ChannelEnded):
                    self._on_end(link.name)
                    return  # noqa: ASYNC104
                steady = bool(link.connected.value) and trio.current_time() - since > STEADY
                failures = 1 if steady else failures + 1
                await self._wait_after(link, fault, failures)  # noqa: ASYNC102
            else:
                self._finished(link)
                return

    def _connect(self, link: Link) -> None:
        link.connected.value = True
        self._events.emit(ChannelConnected(channel=link.name))
        self._on_connect(link.name)

    def _finished(self, link: Link) -> None:
        if not link.connected.value:
            self._connect(link)  # it had all its input before it said that it was there
        link.input_ended.value = True
        self._events.emit(ChannelFinished(channel=link.name))

    async def _wait_after(self, link: Link, error: BaseException, failures: int) -> None:
        link.connected.value = False
        delay = retry_delay(failures, random.random(), cap=60.0)
        self._events.emit(
            ChannelFailed(
                channel=link.name, error=shown(error), retry_in=delay, traceback=_trace(error)
            )
        )
        await trio.sleep(delay)


class _Started(trio.TaskStatus[None]):
    """What `serve` calls when it is connected; twice does no harm."""

    def __init__(self, link: Link, connect: Callable[[Link], None]) -> None:
        self._link = link
        self._connect = connect

    def started(self, value: Any = None) -> None:
        if not self._link.connected.value:
            self._connect(self._link)


def _by_name(channels: Sequence[Channel]) -> dict[str, Link]:
    links: dict[str, Link] = {}
    for channel in channels:
        if not is_channel_name(channel.name):
            raise ConfigError(
                f"{type(channel).__name__}.name is {shown(channel.name)}: use small letters,"
                " digits, _ and -"
            )
        if channel.name == LOCAL:
            raise ConfigError(
                f"{type(channel).__name__}.name is {LOCAL!r}, which is what the host's own sessions"
                " are called: rename it"
            )
        if channel.name in links:
            raise ConfigError(f"two channels are called {channel.name!r}: rename one")
        _check_limit(channel)
        links[channel.name] = Link(channel)
    return links


def _check_limit(channel: Channel) -> None:
    limit: object = channel.text_limit
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ConfigError(
            f"{type(channel).__name__}.text_limit is {shown(limit)}: use a number of characters, 1"
            " or more, or None"
        )


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
