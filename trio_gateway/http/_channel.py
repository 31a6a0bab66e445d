"""The HTTP door as a channel: it lives as long as replies may still leave, and closes in order."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from .._errors import ConfigError, shown
from .._events import DrainReport, Event
from .._gateway import Gateway
from .._messages import Delivery, Intake
from ..channels import Channel
from ._app import App
from ._drafts import Drafts
from ._follow import Reader
from ._guard import Guard
from ._house import House
from ._metrics import Metrics
from ._settings import HttpSettings
from ._wire import Server, open_sockets, told


class HttpChannel(Channel):
    """The gateway behind an HTTP API. Clients fetch what is said, and so miss nothing.

    `token` lets in; see `read_token`. `hook_secret`: that of webhooks, which come in signed and
    without a token; None: there are none. `sockets`: listening, opened by somebody else (systemd);
    without them it opens its own. `addresses` tells where, once it serves. Raises
    `ConfigError` on serving where it cannot listen.
    """

    name = "http"
    idempotent = True
    notices = False
    pulled = True

    def __init__(
        self,
        settings: HttpSettings | None = None,
        *,
        token: str,
        hook_secret: bytes | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        self.settings: HttpSettings = settings or HttpSettings()
        self.addresses: tuple[str, ...] = ()
        """Where it listens, like `http://127.0.0.1:8080`."""
        self.serving: trio.Event = trio.Event()
        """Set when it serves, and `addresses` says where."""
        self._guard = Guard(token, self.settings)
        self._hook_secret = hook_secret
        self._sockets = tuple(sockets)
        self._house: House | None = None

    def attach(self, gateway: Gateway) -> None:
        """See `Channel.attach`."""
        self._house = House(
            gateway,
            self.settings,
            self._guard,
            self.name,
            Metrics(gateway),
            hook_secret=self._hook_secret,
        )

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until the gateway has drained; then let what is open end, within the budget."""
        house = self._house
        if house is None:
            raise ConfigError("an HttpChannel is served by a gateway: give it to open_gateway")
        sockets = self._sockets or tuple(open_sockets(self.settings.bind))
        self._sockets = ()
        self.addresses = tuple(told(sock) for sock in sockets)
        drafts = Drafts(house)
        server = Server(
            App(house, lambda error: intake.refused_input("a request", shown(error))),
            self.settings,
            lambda error: intake.refused_input("a connection", shown(error)),
        )
        with house.gateway.listen(_Ear(house, drafts, server)):
            task_status.started()
            self.serving.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drafts.run)
                nursery.start_soon(house.metrics.run)
                nursery.start_soon(Reader(house.bells, house.gateway, self.name).run)
                await _serve(server, sockets, house.gateway.plan.spare / 2)
                nursery.cancel_scope.cancel()

    async def send(self, delivery: Delivery) -> None:
        """Nothing to do: it is in the journal, where clients fetch it."""
        await trio.lowlevel.checkpoint()


async def _serve(server: Server, sockets: Sequence[socket.socket], last: float) -> None:
    """Run the server. A cancellation closes it: what is open by then has `last` seconds more."""
    async with trio.open_nursery() as nursery:
        ended = trio.Event()

        async def run() -> None:
            # Never cancelled from outside: it ends by `close`, which has a bound.
            with trio.CancelScope(shield=True):
                await server.run(sockets)
            ended.set()

        nursery.start_soon(run)
        try:
            await ended.wait()
        except trio.Cancelled:
            server.close(last)
            raise


class _Ear:
    """Hears the gateway's events for the door."""

    def __init__(self, house: House, drafts: Drafts, server: Server) -> None:
        self._house = house
        self._drafts = drafts
        self._server = server

    def __call__(self, event: Event) -> None:
        self._drafts.hear(event)
        self._house.board.hear(event, self._house.gateway.turns)
        self._house.bells.hear(event)
        if isinstance(event, DrainReport):
            # All turns are done with, and what comes now is for the next life: no connection more,
            # streams come to their ends, requests that are under way are answered.
            self._house.close()
            self._server.close(self._house.gateway.plan.flush)
