"""The control socket: who connects, what they ask, one bounded connection each.

It is there from when the store is locked until just before the lock is given back, so it answers
while a gateway starts and during the whole of a drain. A socket that is left over from a gateway
that was killed is replaced: whoever holds the lock knows that nobody listens there.

Nothing that happens here is a reason to stop a gateway: what fails is told in the log.
"""

from __future__ import annotations

import os
import socket
import stat
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from ._control import (
    CHANGES,
    CONNECTIONS,
    FOLLOWING,
    LONGEST_REQUEST,
    PATIENCE,
    STREAMS,
    BadRequest,
    ControlError,
    Forbidden,
    Lines,
    Request,
    encode,
    parse_request,
    refusal,
)
from ._control_address import Peer, address, may_control, peer_of, socket_of
from ._errors import GatewayError, shown

CLOSING: Final = 0.5
"""Seconds that those who follow get for the last lines when the gateway has stopped."""

HURRY: Final = 1.0
"""Seconds that who is turned away gets to take the reason."""

CHUNK: Final = 4096

Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Say = Callable[..., None]


class Respondent(Protocol):
    """Who answers requests."""

    async def answer(self, request: Request, peer: Peer, send: Send) -> Mapping[str, Any]:
        """The answer, without its `ok`; `send` tells something before it. Raises `GatewayError`."""
        ...

    def close(self) -> None:
        """The gateway has stopped: streams come to their end."""
        ...


@asynccontextmanager
async def control_socket(store: Path, respondent: Respondent, say: Say) -> AsyncGenerator[None]:
    """Answer at the control socket of `store`, whose lock is held, while the block lasts.

    Where there can be no socket, say so (`say` is a log's), and go on without.
    """
    path = socket_of(store.absolute())  # noqa: ASYNC240 - pure, but for the current folder
    listener = _listen_if_possible(path, say)
    if listener is None:
        yield
        return
    own = _identity(path)
    try:
        async with trio.open_nursery() as nursery:
            server = _Server(respondent, say)
            nursery.start_soon(server.serve, listener, nursery)
            try:
                yield
            finally:
                with trio.move_on_after(CLOSING, shield=True):
                    await server.close()
                nursery.cancel_scope.cancel(reason="the gateway has stopped")
    finally:
        listener.close()
        if own is not None and _identity(path) == own:
            with suppress(OSError):
                path.unlink()  # noqa: ASYNC240 - one call, at the end


def _listen_if_possible(path: Path, say: Say) -> socket.socket | None:
    try:
        return listen_at(path)
    except (OSError, ControlError) as error:
        why = error.strerror or error if isinstance(error, OSError) else error
        say("warning", "no_control_socket", path=str(path), error=str(why))
        return None


def listen_at(path: Path) -> socket.socket:
    """A socket at `path` that only its owner can connect to, in place of one that nobody serves any
    more. Raises `ControlError` and `OSError`."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ControlError(f"{path} is no socket: move it away, and start again")
        path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.setblocking(False)
        # Private from its first moment on. What another thread makes in this one is private, too.
        before = os.umask(0o177)
        try:
            with address(path) as where:
                made.bind(where)
        finally:
            os.umask(before)
        made.listen(CONNECTIONS)
    except BaseException:
        made.close()
        raise
    return made


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        about = path.lstat()
        return about.st_dev, about.st_ino
    return None


class _Server:
    """All connections."""

    def __init__(self, respondent: Respondent, say: Say) -> None:
        self._respondent = respondent
        self._say = say
        self._open = 0
        self._closing = False
        self._emptied = trio.Event()
        self._accepting = trio.CancelScope()
        self._idle: set[trio.CancelScope] = set()

    async def serve(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        """Take connections until `close`."""
        try:
            with self._accepting:
                await trio.serve_listeners(
                    self._connected,
                    [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
                    handler_nursery=nursery,
                )
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._say("error", "control_socket_failed", error=shown(error))

    async def close(self) -> None:
        """Take no connection and no request any more; wait for the answers that are under way."""
        self._closing = True
        self._accepting.cancel()
        self._respondent.close()
        for scope in tuple(self._idle):
            scope.cancel()
        if self._open:
            await self._emptied.wait()

    # ----- one connection

    async def _connected(self, stream: trio.SocketStream) -> None:
        self._open += 1
        try:
            async with stream:
                await self._talk(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # it hung up
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self._say("error", "control_failed", error=shown(error), traceback=trace)
        finally:
            self._open -= 1
            if self._closing and not self._open:
                self._emptied.set()

    async def _talk(self, stream: trio.SocketStream) -> None:
        peer = peer_of(stream.socket)
        if (turned_away := self._turned_away(peer)) is not None:
            why = str(turned_away)
            self._say("warning", "control_refused", uid=peer.uid, pid=peer.pid, error=why)
            await _send(stream, refusal(turned_away), HURRY)
            return
        lines = Lines(LONGEST_REQUEST)
        while not self._closing:
            try:
                line = await self._next_line(stream, lines)
                if line is None:
                    return
                request = parse_request(line)
            except BadRequest as error:
                # What follows could be the rest of it: whoever talks so talks no further.
                await _send(stream, refusal(error))
                return
            await _send(stream, await self._answer(request, peer, stream))

    def _turned_away(self, peer: Peer) -> ControlError | None:
        if not may_control(peer, os.geteuid()):
            return Forbidden(
                f"user {peer.uid} may not control this gateway: its own user ({os.geteuid()})"
                " and root may"
            )
        if self._open > CONNECTIONS:
            return ControlError(f"{CONNECTIONS} connections are open already; try again later")
        return None

    async def _next_line(self, stream: trio.SocketStream, lines: Lines) -> bytes | None:
        """The next request; None when there is none to come."""
        with trio.move_on_after(PATIENCE) as scope:
            self._idle.add(scope)
            try:
                while (line := lines.next()) is None:
                    data = await stream.receive_some(CHUNK)
                    if not data:
                        return None
                    lines.add(data)
                return line
            finally:
                self._idle.discard(scope)
        if self._closing:
            return None
        raise BadRequest(f"no request within {PATIENCE:g} s")

    async def _answer(
        self, request: Request, peer: Peer, stream: trio.SocketStream
    ) -> Mapping[str, Any]:
        if request.do in CHANGES:
            asked = dict(request.values)
            self._say("info", "control", do=request.do, uid=peer.uid, pid=peer.pid, asked=asked)
        try:
            if request.do in STREAMS:
                return {"ok": True, **await self._streamed(request, peer, stream)}
            return {"ok": True, **await self._respondent.answer(request, peer, _nobody)}
        except GatewayError as error:
            return refusal(error)
        except OSError:
            raise
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            self._say("error", "control_failed", error=shown(error), traceback=trace)
            return refusal(ControlError(f"{request.do} failed in the gateway; its log says why"))

    async def _streamed(
        self, request: Request, peer: Peer, stream: trio.SocketStream
    ) -> Mapping[str, Any]:
        """An answer that can be long in coming; who hangs up does not get it."""

        async def send(told: Mapping[str, Any]) -> None:
            await _send(stream, told, FOLLOWING)

        async def until_gone() -> None:
            with suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
            raise trio.BrokenResourceError("the peer has hung up")

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_gone)
                answer = await self._respondent.answer(request, peer, send)
                nursery.cancel_scope.cancel(reason="it is answered")
        except* trio.BrokenResourceError as group:
            raise trio.BrokenResourceError("the peer has hung up") from group
        return answer


async def _nobody(told: Mapping[str, Any]) -> None:
    await trio.lowlevel.checkpoint()
    raise AssertionError(f"no stream, and yet it tells {told}")


async def _send(
    stream: trio.SocketStream, told: Mapping[str, Any], patience: float | None = None
) -> None:
    """Write one line; who does not take it in time has hung up."""
    with trio.move_on_after(PATIENCE if patience is None else patience) as scope:
        await stream.send_all(encode(told))
    if scope.cancelled_caught:
        raise trio.BrokenResourceError("the peer does not take what it has asked for")
