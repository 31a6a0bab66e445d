"""The sockets: connections are counted, served by hypercorn's protocols, and closed in order.

Hypercorn's own `serve` ends what is open rudely when it stops, and lets a client that does not
read hold a connection for ever; so the accepting and the ending are ours, the protocols its own.
"""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from .._errors import ConfigError, shown
from ._settings import HttpSettings

BACKLOG: Final = 1024
MESSAGE_BYTES: Final = 1024 * 1024
PING_EVERY: Final = 20.0

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def open_sockets(bind: str) -> list[socket.socket]:
    """Listening sockets for `bind`. Raises `ConfigError` where there can be none."""
    try:
        return [_unix(bind[5:])] if bind.startswith("unix:") else _tcp(bind)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"channels.http.bind: cannot listen at {shown(bind)}: {error}; name a free"
            ' host:port, like "127.0.0.1:8080"'
        ) from error


def _unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen(BACKLOG)
    return sock


def _tcp(bind: str) -> list[socket.socket]:
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError("expected host:port")
    host = host.removeprefix("[").removesuffix("]")
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    sock = socket.create_server(cast("Any", address[:2]), family=family, backlog=BACKLOG)
    return [sock]


def told(sock: socket.socket) -> str:
    """Where a socket listens, as a client would write it."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Wire:
    """One connection, as hypercorn uses a stream. What is not read in time ends it."""

    def __init__(self, stream: trio.SocketStream, send_time: float) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._send_time = send_time

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(self._send_time) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, limit: int) -> bytes:
        return bytes(await self._stream.receive_some(limit))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Drop it: whoever waits to send or receive is woken."""
        self.socket.close()


class _Http1(H11Protocol):
    """Hypercorn's own, which lets anybody change to HTTP/2, without a token: there, its times and
    bounds are none, and a client that gives it no window keeps a connection for ever."""

    async def _check_protocol(self, event: object) -> None:
        await trio.lowlevel.checkpoint()


class _Context(WorkerContext):
    """Hypercorn's own, in one connection: nobody sleeps until the next ping when it is over."""

    def __init__(self, whole: WorkerContext) -> None:
        super().__init__(None)
        self.terminate = whole.terminate
        self.terminated = whole.terminated
        self.over = trio.Event()

    async def sleep(self, wait: float) -> None:  # type: ignore[override]
        with trio.move_on_after(wait):
            await self.over.wait()


class _Conversation(TCPServer):
    """Hypercorn's own, which would wait out an idle client's time after the client has gone, and
    which in a stop would close a connection that has just been made, on its first request."""

    async def _read_data(self) -> None:
        one, context = self.protocol, _Context(self.context)
        one.protocol = _Http1(
            one.app, one.config, cast("Any", context), one.task_group, one.state, one.ssl,
            one.client, one.server, one.send,
        )  # fmt: skip
        await super()._read_data()
        context.over.set()
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        with trio.move_on_after(self.config.keep_alive_timeout):
            await self.context.terminated.wait()
            if not getattr(self.protocol.protocol, "keep_alive_requests", 0):
                await trio.sleep_forever()
        # A request that came in this very moment has ended the idling: that is heard of here.
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            await self._initiate_server_close()


class Server:
    """Accepts connections until `close`, then lets those that are open end."""

    def __init__(
        self,
        app: Asgi,
        settings: HttpSettings,
        on_fault: Callable[[BaseException], None],
    ) -> None:
        self._app = ASGIWrapper(cast("Any", app))
        self._settings = settings
        self._on_fault = on_fault
        self._config = _config(settings)
        self._context = WorkerContext(None)
        self._accepting = trio.CancelScope()
        self._closed = trio.Event()
        self._last = trio.CancelScope()
        self._conversing: trio.CancelScope | None = None
        self._wires: set[_Wire] = set()
        self._peers: Counter[str] = Counter()
        self.turned_away: int = 0
        """Connections beyond the limits, which were closed at once."""
        self.broken: int = 0
        """Connections that the client left in the middle."""

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._wires)

    async def run(self, sockets: Sequence[socket.socket]) -> None:
        """Serve until `close`, and until all connections have ended, or the time for that has."""
        listeners = [trio.SocketListener(_as_trio(sock)) for sock in sockets]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_late)
                async with trio.open_nursery() as conversations:
                    with self._accepting:
                        await trio.serve_listeners(
                            self._converse, listeners, handler_nursery=conversations
                        )
                    await self._context.terminated.set()
                    self._conversing = conversations.cancel_scope
                    self._closed.set()
                nursery.cancel_scope.cancel()
        finally:
            for wire in self._wires.copy():
                wire.abort()

    async def _end_late(self) -> None:
        """After `close`, end what has not ended in time. Dropped and not only cancelled: hypercorn
        shields what it sends to a client that does not read."""
        await self._closed.wait()
        with self._last:
            await trio.sleep_forever()
        for wire in self._wires:
            wire.abort()
        if self._conversing is not None:
            self._conversing.cancel()

    def close(self, within: float) -> None:
        """Accept no more, and give what is open `within` seconds to end. Again: the shorter time
        counts."""
        self._accepting.cancel()
        self._last.deadline = min(self._last.deadline, trio.current_time() + within)

    async def _converse(self, stream: trio.SocketStream) -> None:
        peer = _peer(stream)
        if not self._has_room(peer):
            self.turned_away += 1
            stream.socket.close()
            return
        wire = _Wire(stream, self._settings.send_time)
        self._wires.add(wire)
        self._peers[peer] += 1
        try:
            await _Conversation(
                self._app,
                self._config,
                self._context,
                ConnectionState({}),
                cast("Any", wire),
            ).run()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            self.broken += 1
        except* Exception as error:
            self._on_fault(error)
        finally:
            wire.abort()
            self._wires.discard(wire)
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]

    def _has_room(self, peer: str) -> bool:
        settings = self._settings
        return len(self._wires) < settings.connections and self._peers[peer] < settings.per_peer


def _as_trio(sock: socket.socket) -> trio.socket.SocketType:
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


def _peer(stream: trio.SocketStream) -> str:
    try:
        name: Any = stream.socket.getpeername()
    except OSError:
        return ""
    return "unix" if isinstance(name, str | bytes) else str(name[0])


def _config(settings: HttpSettings) -> Config:
    config = Config()
    config.errorlog = None
    config.accesslog = None
    config.include_server_header = False
    # From the first byte, or the last response, to the end of the head of a request.
    config.keep_alive_timeout = math.ceil(settings.header_time)
    config.keep_alive_max_requests = 1_000_000
    config.h11_max_incomplete_size = 16 * 1024
    config.websocket_max_message_size = MESSAGE_BYTES
    config.websocket_ping_interval = PING_EVERY
    return config
