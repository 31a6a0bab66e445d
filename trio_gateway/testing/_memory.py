"""A chat platform in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from trio_util import AsyncBool

from .. import Channel, Delivery, Intake, Message, Receipt


class MemoryChannel(Channel):
    """A channel whose platform is this object.

    `sent` is what arrived, in order. `before_send`, if set, is awaited with each delivery before it
    arrives: raise there to fail, sleep to be slow. `connected=False` makes it connect only when
    `connect()` is called; `break_down(error)` ends the connection with an error.
    """

    def __init__(
        self,
        name: str = "memory",
        *,
        idempotent: bool = True,
        text_limit: int | None = None,
        notices: bool = False,
        connected: bool = True,
    ) -> None:
        self.name = name
        self.idempotent = idempotent
        self.text_limit = text_limit
        self.notices = notices
        self.sent: list[Delivery] = []
        self.shown: list[tuple[str, str]] = []
        self.before_send: Callable[[Delivery], Awaitable[None]] | None = None
        self.serving: int = 0
        """How often `serve` was called."""
        self._may_connect = AsyncBool(connected)
        self._ready = AsyncBool(False)
        self._broken: Exception | None = None
        self._break = trio.Event()
        self._input_ended = False
        self._arrived = trio.Event()
        self._intake: Intake | None = None

    # ----- the test's side

    def connect(self) -> None:
        """Let the channel connect."""
        self._may_connect.value = True

    def break_down(self, error: Exception) -> None:
        """End the connection with `error`; the gateway will serve the channel again."""
        self._broken = error
        self._break.set()

    def end_input(self) -> None:
        """There is no more input: `serve` returns, sending still works."""
        self._input_ended = True
        self._break.set()

    async def wait_ready(self) -> None:
        """Wait until the channel is connected and can hand in messages."""
        await self._ready.wait_value(True)

    async def receive(self, session: str, id: str, text: str, sender: str | None = None) -> Receipt:
        """Have somebody send a message; return the inbox's receipt."""
        (receipt,) = await self.receive_all(self.message(session, id, text, sender))
        return receipt

    def message(self, session: str, id: str, text: str, sender: str | None = None) -> Message:
        """A message of this channel."""
        return Message(session=session, id=id, text=text, sender=sender, channel=self.name)

    async def receive_all(
        self, *messages: Message, cursor: str | None = None
    ) -> tuple[Receipt, ...]:
        """Have several messages arrive at once, with the cursor that covers them."""
        await self.wait_ready()
        if self._intake is None:
            raise RuntimeError("the channel is ready without an intake")
        return await self._intake.accept(*messages, cursor=cursor)

    async def cursor(self) -> str | None:
        """The cursor that the gateway has for this channel."""
        await self.wait_ready()
        if self._intake is None:
            raise RuntimeError("the channel is ready without an intake")
        return await self._intake.cursor()

    async def wait_sent(self, count: int) -> tuple[Delivery, ...]:
        """Wait until `count` texts have arrived in all; return them."""
        while len(self.sent) < count:
            await self._arrived.wait()
        return tuple(self.sent)

    def texts(self, session: str | None = None) -> list[str]:
        """What arrived, in one session or in all."""
        return [d.text for d in self.sent if session in (None, d.session.name)]

    # ----- the gateway's side

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Channel.serve`."""
        self.serving += 1
        await self._may_connect.wait_value(True)
        self._break = trio.Event()
        self._intake = intake
        task_status.started()
        self._ready.value = True
        try:
            await self._break.wait()
        finally:
            self._ready.value = self._input_ended
        if self._broken is not None:
            broken, self._broken = self._broken, None
            raise broken

    async def send(self, delivery: Delivery) -> None:
        """See `Channel.send`."""
        if self.before_send is not None:
            await self.before_send(delivery)
        else:
            await trio.lowlevel.checkpoint()
        self.sent.append(delivery)
        self._arrived.set()
        self._arrived = trio.Event()

    def progress(self, session: str, text: str) -> None:
        """See `Channel.progress`."""
        self.shown.append((session, text))
