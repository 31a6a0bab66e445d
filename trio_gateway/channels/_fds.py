"""Standard input and output, read and written by a Trio task.

A terminal, a pipe or a socket on fd 0 or 1 is shared with other programs: the shell, the parent,
a sibling in a pipeline. Two things follow.

No O_NONBLOCK: the flag belongs to the open file, not to us, and would stay on the shell's terminal
after we are gone. And no threads: one that blocks in read() cannot be cancelled. So every read
waits until the kernel says that something is there, and every write until there is room, and then
writes no more than certainly fits: PIPE_BUF bytes into a pipe that polls writable.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import sys
from collections.abc import Awaitable, Callable
from typing import Final, cast

import attrs
import trio

from .._errors import ChannelEnded

CHUNK: Final = 65536
"""Bytes of one read: what a pipe holds, and so what becomes one batch of messages."""

MAX_LINE: Final = 16 * 1024 * 1024

_GONE: Final = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.EIO, errno.ENXIO, errno.ENOTCONN}
)
"""What the kernel says when whoever was at the other end has left."""


def keep_standard_fds() -> None:
    """Occupy fds 0, 1 and 2 where the parent closed them, before anything else gets that number.

    What is put there reads as ended and cannot be written, just like the closed one.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is the one just looked at. Of the three, only fd 2 may be
            # written into the void: nobody waits for an answer there.
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY if fd < 2 else os.O_WRONLY), True)


# ----- reading


@attrs.frozen
class Line:
    """One line of input, without its newline. `number` counts from 1, `size` is bytes.

    `data` is None when the line was longer than the reader takes; it was skipped.
    """

    number: int
    data: bytes | None
    size: int


class LineReader:
    """Reads lines from a file descriptor that it does not own."""

    def __init__(self, fd: int, max_line: int = MAX_LINE) -> None:
        self._fd = fd
        self._max_line = max_line
        self._partial = bytearray()
        self._size = 0
        self._number = 0
        self._ended = False
        self._back: tuple[Line, ...] = ()

    async def receive(self) -> tuple[Line, ...]:
        """All lines that are there, at least one; empty at the end of the input.

        A last line without a newline counts. Cancelled, nothing is lost: the next call goes on.
        Raises `ChannelEnded` when the descriptor cannot be read at all (a directory, say).
        """
        if self._back:
            await trio.lowlevel.checkpoint()
            lines, self._back = self._back, ()
            return lines
        while not self._ended:
            await self._wait_readable()
            if lines := self._feed(self._read()):
                return lines
        await trio.lowlevel.checkpoint()
        return ()

    def put_back(self, lines: tuple[Line, ...]) -> None:
        """The next `receive` returns these."""
        self._back = lines

    async def _wait_readable(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._fd)
        except OSError:
            # A regular file is always readable, and epoll refuses it; whatever else is wrong
            # with the descriptor, reading it tells.
            await trio.lowlevel.checkpoint()

    def _read(self) -> bytes | None:
        try:
            return os.read(self._fd, CHUNK)
        except BlockingIOError:
            return None  # another reader of the same terminal or pipe was faster
        except OSError as error:
            if error.errno in _GONE:
                return b""
            raise ChannelEnded(f"the input cannot be read: {error.strerror}") from error

    def _feed(self, data: bytes | None) -> tuple[Line, ...]:
        if data is None:
            return ()
        if not data:
            self._ended = True
            return (self._cut(),) if self._size else ()
        *complete, rest = data.split(b"\n")
        lines: list[Line] = []
        for piece in complete:
            self._extend(piece)
            lines.append(self._cut())
        self._extend(rest)
        return tuple(lines)

    def _extend(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._max_line:
            self._partial += piece
        else:
            self._partial.clear()  # keep counting, stop keeping: resync at the next newline

    def _cut(self) -> Line:
        self._number += 1
        fits = self._size <= self._max_line
        line = Line(self._number, bytes(self._partial) if fits else None, self._size)
        self._partial.clear()
        self._size = 0
        return line


# ----- writing


class FdWriter:
    """Writes whole texts to a file descriptor that it does not own, one after the other.

    A reader that stops reading makes `write` wait; it never blocks the event loop.
    """

    def __init__(self, fd: int, what: str = "standard output") -> None:
        self._fd = _own_terminal(fd)
        self._what = what
        self._lock = trio.StrictFIFOLock()
        self._push_some = _send_some if _is_socket(fd) else os.write
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)
        self._rest = memoryview(b"")

    async def write(self, data: bytes) -> None:
        """Write all of `data`, never mixed with another write's.

        Cancelled before the first byte, nothing was written; in the middle, whoever writes next
        finishes it first, so that lines stay whole. Raises `ChannelEnded` when nobody can read it
        any more, and `OSError` for anything else (a full disk behind a redirection).
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            await self._drain()
            await self._write(data)
        finally:
            self._lock.release()
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _write(self, data: bytes) -> None:
        self._rest = memoryview(data)
        try:
            await self._drain()
        finally:
            if len(self._rest) == len(data):
                self._rest = memoryview(b"")

    def write_nowait(self, data: bytes) -> bool:
        """Write `data` if there is room just now; say whether it is on its way."""
        if self._lock.locked() or self._rest or not self._has_room():
            return False
        self._rest = memoryview(data)
        try:
            while self._rest and self._has_room():
                self._push()
        except (ChannelEnded, OSError):
            self._rest = memoryview(b"")  # whoever writes next, and may wait, meets it again
            return False
        return True

    async def wait_closed(self) -> None:
        """Wait until nobody can read what is written any more; for ever, where nobody can tell.

        Without this, a gateway whose reader has left would notice with its next answer only.
        """
        if sys.platform != "linux":
            await trio.sleep_forever()
        try:
            epoll = select.epoll()
        except OSError:
            await trio.sleep_forever()  # no descriptor is left; nobody else is to suffer from it
        with epoll:
            try:
                # No event asked for: an epoll tells of errors and hang-ups all the same, and is
                # itself readable when it has something to tell.
                epoll.register(self._fd, 0)
            except OSError:
                await trio.sleep_forever()  # a regular file has no reader
            await trio.lowlevel.wait_readable(epoll.fileno())

    async def _drain(self) -> None:
        while self._rest:
            if not self._has_room():
                await trio.lowlevel.wait_writable(self._fd)
            self._push()
            if self._rest:
                await trio.lowlevel.checkpoint()  # a long text must not keep the loop

    def _has_room(self) -> bool:
        # Much cheaper than a round through the event loop, and nearly always true. Also true of
        # an error: writing then tells which.
        return bool(self._poll.poll(0))

    def _push(self) -> None:
        try:
            written = self._push_some(self._fd, self._rest[: select.PIPE_BUF])
        except BlockingIOError:
            return  # somebody else filled the pipe in between
        except OSError as error:
            if error.errno in _GONE:
                self._rest = memoryview(b"")
                raise ChannelEnded(f"{self._what} is closed: nobody reads the answers") from error
            raise
        self._rest = self._rest[written:]


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False


def _send_some(fd: int, data: memoryview) -> int:
    """Write to a socket what fits, without a flag that outlives the call."""
    shared = socket.socket(fileno=fd)
    try:
        return shared.send(data, socket.MSG_DONTWAIT)
    finally:
        shared.detach()


def _own_terminal(fd: int) -> int:
    """A terminal opened once more, for us alone, so that O_NONBLOCK is nobody else's business.

    A terminal that polls writable may have room for a single byte, and block on the second. Not
    every terminal may be opened again (after `su`): then the shared one has to do.
    """
    try:
        if os.isatty(fd):
            return os.open(os.ttyname(fd), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return fd
    return fd


# ----- both


async def serve_lines(
    reader: LineReader,
    writer: FdWriter,
    take: Callable[[tuple[Line, ...]], Awaitable[None]],
) -> None:
    """Hand the lines of `reader` to `take`, batch by batch, until the input ends.

    Raises `ChannelEnded` as soon as nobody can read from `writer` any more.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_raise_when_closed, writer)
            while lines := await reader.receive():
                try:
                    await take(lines)
                except trio.Cancelled:
                    # Not handed in, or not answered: whoever reads next does it, and what was
                    # accepted all the same is recognised.
                    reader.put_back(lines)
                    raise
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _only(group) from None


async def _raise_when_closed(writer: FdWriter) -> None:
    await writer.wait_closed()
    raise ChannelEnded("standard output is closed: nobody reads the answers")


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error itself, out of the nursery's wrapping, where there is but one."""
    ended, others = group.split(ChannelEnded)
    if ended is not None and others is None:
        return _first(ended)
    return _first(group) if len(group.exceptions) == 1 else group


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
