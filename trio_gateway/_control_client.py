"""Asking a running gateway over its control socket, from a command."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, cast

from ._control import (
    LONGEST_ANSWER,
    PATIENCE,
    BadRequest,
    ControlError,
    Lines,
    NoGateway,
    encode,
    error_of,
)
from ._control_address import Peer, address, peer_of, socket_of
from .store import holder_of

CHUNK: Final = 65536

ANSWERED: Final = 30.0
"""Seconds that an answer may take: a disk that is busy is waited for."""

LOOK_EVERY: Final = 0.1
"""Seconds between two looks for what cannot be waited for: a process that is not there yet."""


class Control:
    """A connection to a gateway. Made by `connected`."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = Lines(LONGEST_ANSWER)
        self.peer: Peer = peer_of(connection)
        """The process that listens."""

    def ask(self, do: str, **values: str | int) -> dict[str, Any]:
        """Ask, and return the answer. Raises the error that it tells, and `ControlError`."""
        for told in self.stream(do, patience=ANSWERED, **values):
            if "ok" in told:
                return told
        raise ControlError(f"the gateway hung up before it answered ({do})")

    def stream(
        self, do: str, *, patience: float | None = ANSWERED, **values: str | int
    ) -> Iterator[dict[str, Any]]:
        """Ask, and yield what is told: the answer last, unless the gateway goes away before.

        `patience`: seconds to wait for each line; None: for ever.
        """
        # Who turns us away does not wait for what we ask, and has said why.
        with _told_clearly(do), suppress(BrokenPipeError):
            self._socket.settimeout(PATIENCE)
            self._socket.sendall(encode({"do": do, **values}))
        self._socket.settimeout(patience)
        while (line := self._next(do)) is not None:
            told = _parsed(line)
            if told.get("ok") is False:
                raise error_of(told)
            yield told
            if "ok" in told:
                return

    def _next(self, do: str) -> bytes | None:
        with _told_clearly(do):
            while (line := self._lines.next()) is None:
                data = self._socket.recv(CHUNK)
                if not data:
                    return None
                self._lines.add(data)
            return line


def _parsed(line: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        told: object = json.loads(line)
        if isinstance(told, dict):
            return cast("dict[str, Any]", told)
    raise ControlError("what answers at the control socket is no gateway")


@contextmanager
def _told_clearly(do: str) -> Generator[None]:
    try:
        yield
    except TimeoutError:
        raise ControlError(
            f"the gateway does not answer ({do}): its event loop is blocked, or the machine is; its"
            " log tells, and kill -USR2 shows where it is"
        ) from None
    except BadRequest as error:
        raise ControlError(f"what answers at the control socket is no gateway: {error}") from error
    except ConnectionError as error:
        raise ControlError(f"the gateway hung up ({do})") from error
    except OSError as error:
        raise ControlError(f"the control socket failed ({do}): {error.strerror}") from error


@contextmanager
def connected(store: Path) -> Generator[Control]:
    """A connection to the gateway that has `store`, for the length of the block.

    Raises `NoGateway` where none runs, and `ControlError` where one cannot be asked.
    """
    with closing(_connect(store)) as connection:
        yield Control(connection)


def _connect(store: Path) -> socket.socket:
    path = socket_of(store)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        made.settimeout(PATIENCE)
        with address(path) as where:
            made.connect(where)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        made.close()
        raise _nobody(store) from None
    except OSError as error:
        made.close()
        raise ControlError(
            f"{path} cannot be reached ({error.strerror or error}): ask as the gateway's own user,"
            " or as root"
        ) from error
    except BaseException:
        made.close()
        raise
    return made


def _nobody(store: Path) -> ControlError | NoGateway:
    """Nobody listens: because nobody is there, or because who is has no socket."""
    with suppress(OSError):
        if (holder := holder_of(store)) is not None:
            return ControlError(
                f"process {holder} has {store} open, and cannot be asked: it is only starting or"
                " about to end, or a program of its own that hosts an agent, or its log says"
                " no_control_socket"
            )
    return NoGateway(f"no gateway runs on {store}; start one with trio-gateway run, or name another"
                     " store with --store")  # fmt: skip


def runs(store: Path) -> bool:
    """Whether a gateway answers for `store`."""
    try:
        with connected(store):
            return True
    except ControlError:
        raise
    except NoGateway:
        return False


# ----- waiting for a process


class Process:
    """Another process, known before it is asked to go, so that no later one is taken for it."""

    def __init__(self, pid: int, store: Path) -> None:
        self.pid = pid
        self._store = store
        self._fd = -1
        with suppress(OSError):
            self._fd = os.pidfd_open(pid) if pid > 0 else -1

    def wait_gone(self, patience: float) -> bool:
        """Wait until it has ended, at most `patience` seconds; whether it has."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(patience * 1000))
        # Of another namespace: all that can be seen is that it gives its store back.
        deadline = time.monotonic() + patience
        while holder_of(self._store) is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_EVERY)
        return True

    def close(self) -> None:
        """Watch it no more."""
        if self._fd >= 0:
            os.close(self._fd)


def wait_for_another(store: Path, pid: int, patience: float) -> Mapping[str, Any] | None:
    """Wait until another process than `pid` answers for `store`, at most `patience` seconds: its
    status, once it serves; None: there is none."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with suppress(NoGateway, ControlError), connected(store) as control:
            told = control.ask("status")
            if told.get("pid") != pid and told.get("state") == "serving":
                return told
        time.sleep(LOOK_EVERY)
    return None
