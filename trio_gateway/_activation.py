"""Sockets that whoever started this process has opened for it (systemd's socket activation).

Connections that arrive while nobody serves wait in such a socket, so that a restart refuses none.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Final

from ._errors import ConfigError

FIRST_FD: Final = 3
MOST_FDS: Final = 1024
NAMELESS: Final = "unknown"
"""How systemd calls a socket that was given no name."""


def listen_fds(
    environ: MutableMapping[str, str] = os.environ,
) -> Mapping[str, tuple[socket.socket, ...]]:
    """The listening sockets that were passed to this process, by name (`FileDescriptorName=`).

    Takes LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES out of `environ`, so that they mean nothing to
    a child process and a second call finds nothing; the descriptors are closed on exec from then
    on. The caller owns the sockets, which block. Empty where nothing was passed, or where it was
    meant for another process.

    Raises `ConfigError` for what is no listening stream socket.
    """
    count = environ.pop("LISTEN_FDS", "")
    pid = environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "")
    if not count or pid != str(os.getpid()):
        return MappingProxyType({})
    fds = range(FIRST_FD, FIRST_FD + _number_of(count))
    found: dict[str, tuple[socket.socket, ...]] = {}
    for fd, name in zip(fds, _names(names, len(fds)), strict=True):
        found[name] = (*found.get(name, ()), _adopt(fd, name))
    return MappingProxyType(found)


def _number_of(count: str) -> int:
    if not (count.isascii() and count.isdecimal()) or not 0 <= int(count) <= MOST_FDS:
        raise ConfigError(f"LISTEN_FDS: expected a number of sockets, got {count[:20]!r}")
    return int(count)


def _names(names: str, count: int) -> list[str]:
    """One name for each; without names at all, the one that stands for none."""
    if not names:
        return [NAMELESS] * count
    told = names.split(":")
    if len(told) != count:
        raise ConfigError(f"LISTEN_FDNAMES: {len(told)} names for {count} sockets")
    return told


def _adopt(fd: int, name: str) -> socket.socket:
    what = f"the socket {name!r} that was passed as descriptor {fd}"
    try:
        os.set_inheritable(fd, False)
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}; look at the .socket unit") from error
    if is_socket:
        adopted = socket.socket(fileno=fd)
        if adopted.type == socket.SOCK_STREAM and _listens(adopted):
            return adopted
        adopted.detach()  # whoever passed it may know what it is for
    raise ConfigError(f"{what} listens for no connections: the .socket unit needs ListenStream=")


def _listens(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
