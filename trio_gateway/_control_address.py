"""Where the control socket of a store is, and who is at the other end of a connection."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import attrs

from ._control import ControlError

LONGEST_ADDRESS: Final = 107
"""Bytes that fit into the address of a unix socket, without the NUL behind them."""


def socket_of(store: Path) -> Path:
    """Where the gateway of a store is asked: beside it."""
    return store.with_name(store.name + ".sock")


@contextmanager
def address(path: Path) -> Generator[str]:
    """The address of the socket at `path`, for the length of the block.

    A path that is too long is reached through a descriptor of its folder, so that only its name
    must fit. Raises `ControlError` where that is no help, and `OSError` for what is no folder.
    """
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        near = f"/proc/self/fd/{folder}/{path.name}"
        if len(os.fsencode(near)) > LONGEST_ADDRESS:
            raise ControlError(
                f"{path.name}: a unix socket cannot have a name of {len(os.fsencode(path.name))}"
                " bytes; give the store a shorter one"
            )
        yield near
    finally:
        os.close(folder)


@attrs.frozen
class Peer:
    """Who is at the other end, as the kernel tells it. `pid` is 0 where it cannot be seen."""

    pid: int
    uid: int


class Connection(Protocol):
    """A socket, Trio's or the library's own."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """An option, as bytes."""
        ...


def peer_of(connection: Connection) -> Peer:
    """Who has connected, or who listens. Raises `OSError`."""
    size = struct.calcsize("3i")
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack("3i", told)
    return Peer(pid, uid)


def may_control(peer: Peer, own: int) -> bool:
    """Whether a peer may control a gateway of the user `own`: that user, and root."""
    return peer.uid in (own, 0)
