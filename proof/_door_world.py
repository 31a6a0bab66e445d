"""One store behind the HTTP door: the lives of its process, one after the other, and how they end.

In worlds with an even number the process binds its port itself, and nobody listens between two
lives. In the others the port is there before and after it, as under systemd's socket activation,
and who comes between two lives waits.
"""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Final

import attrs
import trio

from trio_gateway._errors import unwrap

from ._door_agent import AGENT, CHILD
from ._door_people import Town
from ._door_wire import Gone, connected
from ._platform import PATIENCE, environment, furnish, rows
from ._process import told
from ._sweeps import same_gateway

TOKEN: Final = "token-of-the-door-0123456789abcdef"
SECRET: Final = b"secret of the door, 32 bytes...."

CONFIG: Final = """
[resume]
max_crashes = 1000000
max_interruptions = 1000000
within = "none"

[drain]
grace = "300ms"
budget = "3s"

[limits]
open_per_session = 100_000

[log]
level = "warning"

[channels.http]
bind = "127.0.0.1:{port}"
token = "{folder}/token"
hook_secret = "{folder}/hook-secret"
"""

STOP_AT_MOST: Final = 3.0 + 5.0
"""Seconds: the budget, and what a machine in company may add."""

COMMAND: Final = (sys.executable, "-m", "trio_gateway", "run", "agent.py:agent")
ACTIVATED: Final = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'
"""For a shell whose input is a socket: what systemd does with one that it has opened."""

PATIENT: Final = {"TRIO_GATEWAY_DRAIN__GRACE": "50s", "TRIO_GATEWAY_DRAIN__BUDGET": "55s"}


@attrs.define(eq=False)
class World:
    """One store and what happens to it."""

    folder: Path
    number: int
    town: Town
    listening: socket.socket | None
    process: trio.Process | None = None

    @property
    def store(self) -> Path:
        """Where the store is."""
        return self.folder / "gateway.db"

    @property
    def dice(self) -> random.Random:
        """Those of this world."""
        return self.town.dice

    def close(self) -> None:
        """The port is free again."""
        if self.listening is not None:
            self.listening.close()

    # ----- a life

    @asynccontextmanager
    async def alive(self, **env: str) -> AsyncGenerator[trio.Process, None]:
        """One life. At its end the process is gone, and so is every program that it ran."""
        self.town.begin_life()
        with (self.folder / "log.txt").open("ab") as log:
            process = await trio.lowlevel.open_process(
                self._command(),
                stdin=subprocess.DEVNULL if self.listening is None else self.listening,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**same_gateway(), **environment(self.folder), **env},
                start_new_session=True,
            )
        self.process = process
        try:
            yield process
        finally:
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    process.kill()
                await process.wait()
        self.town.figures["lives"] += 1
        await self._nothing_left()

    def _command(self) -> tuple[str, ...]:
        command = (*COMMAND, "--store", str(self.store))
        if self.listening is None:
            return command
        return ("sh", "-c", ACTIVATED, "sh", *command)

    async def serves(self) -> None:
        """Wait until it answers."""
        with trio.move_on_after(PATIENCE):
            while self.process is not None and self.process.poll() is None:
                with suppress(Gone):
                    async with connected(self.town.address) as wire:
                        if (await wire.ask("GET", "/startupz")).status == 200:
                            return
                await trio.sleep(0.02)
        raise AssertionError(f"does not serve\n{self.story}")

    async def until_drains(self) -> None:
        """Wait until it says that it drains."""
        async with connected(self.town.address) as wire:
            while (await wire.ask("GET", "/readyz")).status != 503:  # noqa: ASYNC110
                await trio.sleep(0.02)

    @property
    def story(self) -> str:
        """The end of what the processes have logged."""
        return (self.folder / "log.txt").read_text(errors="replace")[-3000:]

    async def until(self, met: Callable[[], bool], what: str) -> None:
        """Wait for something that nobody announces."""
        with trio.move_on_after(PATIENCE):
            while not met():  # noqa: ASYNC110 - another process does it
                if self.process is not None and self.process.poll() is not None:
                    raise AssertionError(f"left before {what}\n{self.story}")
                await trio.sleep(0.02)
            return
        raise AssertionError(f"never came: {what}\n{self.story}")

    # ----- programs

    def programs(self) -> list[int]:
        """The processes of programs that agents of this world run."""
        mark = b"DOOR_OF=" + os.fsencode(self.folder)
        found: list[int] = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    async def _nothing_left(self) -> None:
        """A gateway that has ended, however it did, leaves no program behind."""
        with trio.move_on_after(PATIENCE / 4):
            while self.programs():  # noqa: ASYNC110 - their guard does it
                await trio.sleep(0.02)
            return
        left = self.programs()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"programs were left behind by life {self.town.life}: {left}")

    # ----- how lives end

    async def killed(self, end: str) -> None:
        """With -9, at any moment."""
        assert self.process is not None
        if end != "killed at boot":
            await self.serves()
        await trio.sleep(self.dice.random() * 0.6)
        if end == "killed in the drain":
            self.town.stopping = True
            self.process.send_signal(SIGTERM)
            await trio.sleep(self.dice.random() * 0.4)
        if end == "killed at a request":
            with trio.move_on_after(1):
                await self.town.just_sent.wait()
            await trio.sleep(self.dice.random() * 0.006)
        if self.process.poll() is None:
            self.town.seen["killed above a program"] += bool(self.programs())
            self.process.kill()
            self.town.figures["kills"] += 1

    async def stopped(self, end: str) -> None:
        """By a signal, with a short grace."""
        assert self.process is not None
        await self.serves()
        await trio.sleep(self.dice.random() * 0.5)
        self.town.stopping = True
        began = trio.current_time()
        self.process.send_signal(SIGUSR1 if end == "stopped by USR1" else SIGTERM)
        await self.left(75 if end == "stopped by USR1" else 0)
        took = trio.current_time() - began
        assert took < STOP_AT_MOST, f"a stop took {took:.1f} s\n{self.story}"

    async def left(self, code: int) -> None:
        """Wait for the end."""
        assert self.process is not None
        with trio.move_on_after(PATIENCE):
            left_with = await self.process.wait()
            assert left_with == code, f"left with {left_with}, not {code}\n{self.story}"
            self.town.figures["stops"] += 1
            return
        raise AssertionError(f"still there after {PATIENCE:g} s\n{self.story}")

    # ----- what is open

    def all_ended(self) -> bool:
        """Whether every message has reached its end."""
        ended = "SELECT count(*) FROM message WHERE ended_at IS NULL"
        return rows(self.store, ended) == [(0,)]

    def newest(self) -> dict[str, int]:
        """By session: the newest place in its journal."""
        return dict(
            rows(
                self.store,
                "SELECT session.name, max(journal.seq) FROM journal"
                " JOIN session ON session.id = journal.session WHERE what != 'draft'"
                " GROUP BY session.name",
            )
        )

    def check_log(self) -> None:
        """Nothing that is a secret is in it."""
        log = (self.folder / "log.txt").read_text(errors="replace")
        assert TOKEN not in log, "the token is in the log"
        assert SECRET.decode() not in log, "the secret is in the log"


def make_world(folder: Path, seed: int, number: int, *, listens: bool) -> World:
    """A new one, in that folder. `listens`: the port outlives the process."""
    sock = socket.create_server(("127.0.0.1", _port(number)), backlog=1024)
    address = sock.getsockname()[:2]
    furnish(folder, CONFIG.format(port=address[1], folder=folder), AGENT)
    (folder / "child.sh").write_text(CHILD)
    for name, text in ("token", TOKEN), ("hook-secret", base64.b64encode(SECRET).decode()):
        (folder / name).touch(0o600)
        (folder / name).write_text(text)
    if not listens:
        sock.close()
    town = Town(address, TOKEN, SECRET, random.Random(f"{seed} {number}"))
    return World(folder, number, town, sock if listens else None)


def what_broke(world: World, error: Exception) -> str:
    """What went wrong first, and where; what else was complained of."""
    first = unwrap(error)
    return "\n".join([str(first).partition("\n")[0], told(first), *world.town.complaints[:3]])


def _port(number: int) -> int:
    """A free port below those that the system gives to clients: between two lives nobody listens,
    and one of them must not be connected to itself."""
    first = (number * 2003 + os.getpid() * 31) % 10_000
    for port in range(20_000 + first, 32_000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
