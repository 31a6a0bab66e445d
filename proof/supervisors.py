"""The other supervisors that people run a gateway under: supervisord, tini, and a shell or the
gateway itself as number 1 of a container.

Each point is one store under one kind of supervision: `KIND:STORE:CYCLES`. A container is made of
private process numbers: when its number 1 dies, everything in it dies; and a signal that number 1
has no handler for does not exist. What stops it does what `docker stop` does: SIGTERM to number 1,
and SIGKILL when its time is over.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final, Protocol

import attrs

from ._platform import PATIENCE, wait_until
from ._process import scratch_folder
from ._report import Campaign, Job, Skip
from ._supervised import Outcome, Supervised, deal, lives, play
from ._systemd import children, gateway_below

CAMPAIGN: Final = Campaign(
    name="supervisors",
    injects="what supervisord, tini, a shell or nobody as number 1 of a container do to the process"
    " that they run: stops too short for the drain, kills, restarts, signals that never arrive",
    short="the same by supervisord, tini, shells",
    promises=(1, 2, 4, 5, 6, 9),
    counted="cycles",
    must_see=(
        "shell: killed in a drain that was too long for it",
        "shell: killed with -9 in the load",
        "shell: stopped in order",
        "shell: exit 75, and started again",
        "shell: everything died at once",
        "deaf-shell: killed without having heard of the stop",
        "number-1: killed in a drain that was too long for it",
        "number-1: stopped in order",
    ),
)

SHORT: Final = (0.3, 3.0)
"""Grace and budget of an ordinary stop, in seconds."""

ROOMY: Final = (6.0, 9.0)
"""Grace and budget of a stop that is to be cut short."""

AMPLE: Final = 15.0
"""Seconds that a supervisor waits which is not to cut a stop short."""

CYCLES: Final = 5
"""Cycles of one store."""


def run(job: Job) -> None:
    """Play every kind of supervision that this machine has."""
    check_machine()
    points = [job.only] if job.only is not None else list(_points(job))
    play(job, points, lambda outcome: play_store(outcome, job.seed))


def _points(job: Job) -> Sequence[str]:
    cycles = job.amount(1, 10, 50)
    points: list[str] = []
    for kind in KEEPERS:
        if lacking := lacks(kind):
            print(f"SKIPPED supervisors: {kind}: {lacking}", file=sys.stderr, flush=True)
            job.report.count(kinds_skipped=1)
            job.report.saw(f"{kind}: skipped")
            continue
        job.report.count(kinds=1)
        points += [f"{kind}:{n}:{min(CYCLES, cycles)}" for n in range(-(-cycles // CYCLES))]
    return points


def check_machine() -> None:
    """Raise `Skip` where there can be no container, with what would help."""
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("setpriv"):
        raise Skip("needs Linux and its unshare and setpriv: apt-get install util-linux")
    if container("true", stderr=None).wait(PATIENCE):
        raise Skip("private process numbers are not to be had: run it as root")


def play_store(outcome: Outcome, seed: int) -> None:
    """One store through its cycles, and the account at the end."""
    kind, store, cycles = outcome.point.split(":")
    dice = random.Random(f"{seed}/{outcome.point}")
    load = random.Random(dice.random())
    with scratch_folder() as folder, Supervised(folder, load) as gateway:
        keeper = KEEPERS[kind](gateway)
        kept = _Kept(kind, gateway, keeper, dice, outcome)
        try:
            # Each kind begins elsewhere, so that few cycles are different ones.
            first = int(store) * CYCLES + list(KEEPERS).index(kind)
            for cycle in deal(keeper.cycles, seed, first, int(cycles)):
                kept.play(cycle)
            kept.finish()
            keeper.close()
            outcome.count(stores=1, **gateway.account())
        except Exception as error:
            error.add_note(f"cycles: {' '.join(kept.story)}")
            error.add_note(f"log: {gateway.platform.log()[-1500:]}")
            raise
        finally:
            keeper.close()


# ----- what happens to it


@attrs.define(eq=False)
class _Kept:
    """A gateway in the hands of a supervisor. Each cycle is one method."""

    kind: str
    gateway: Supervised
    keeper: Keeper
    dice: random.Random
    outcome: Outcome
    story: list[str] = attrs.field(factory=list[str])
    _given: tuple[tuple[float, float], float] = (SHORT, AMPLE)

    def play(self, cycle: Callable[[_Kept], None]) -> None:
        """One cycle."""
        self.story.append(cycle.__name__)
        cycle(self)
        self.outcome.count(cycles=1)

    def finish(self) -> None:
        """Let the last lives end everything. What hangs ends in its second attempt, for which it
        may need one more stop."""
        self.up()
        self.gateway.wait_accepted()
        self.gateway.wait_answered(stuck=False)
        if self.gateway.unanswered():
            self.keeper.stop()
            self.up()
        self.gateway.wait_answered(stuck=True)
        if not self.keeper.listens:
            self.hit(signal.SIGTERM)
        end = self.keeper.stop() if self.keeper.listens else self.keeper.wait_end()
        assert end == "exited 0", end

    def overrun(self) -> None:
        """A drain that is longer than what the supervisor waits."""
        self.up(ROOMY, self.dice.uniform(0.3, 0.8))
        self.load()
        end = self.keeper.stop()
        assert end == "killed", end
        assert self.gateway.found(), "nothing was interrupted"
        self.saw("killed in a drain that was too long for it")

    def unheard(self) -> None:
        """A stop that the gateway never hears of."""
        self.up(SHORT, self.dice.uniform(0.1, 0.5))
        self.load()
        end = self.keeper.stop()
        assert end == "killed", end
        assert not lives(self.gateway.folder)[-1].asked, "it has heard of it"
        found = self.gateway.found().values()
        assert any(marker.state == "RUNNING" for marker in found), found
        self.saw("killed without having heard of the stop")

    def stopped(self) -> None:
        """A stop that is given all its time."""
        self.up()
        self.load()
        end = self.keeper.stop()
        assert end == "exited 0", end
        running = [m for m in self.gateway.found().values() if m.state == "RUNNING"]
        assert not running, f"left running on disk: {running}"
        self.saw("stopped in order")

    def switched_off(self) -> None:
        """The supervisor itself is stopped, and stops the gateway first."""
        self.up()
        self.load()
        end = self.keeper.shut_down()
        assert end == "exited 0", end
        self.saw("switched off in order")

    def killed(self) -> None:
        """kill -9 somewhere in the load."""
        self.up()
        self.gateway.feed(self.dice.uniform(0, 0.3))
        self.hit(signal.SIGKILL)
        end = self.keeper.wait_end()
        assert end == "killed", end
        self.saw("killed with -9 in the load")
        self.outcome.count(kills=1)

    def killed_in_drain(self) -> None:
        """kill -9 somewhere in the drain."""
        self.up()
        self.load()
        self.keeper.ask_to_stop()
        time.sleep(self.dice.uniform(0, 0.35))
        self.hit(signal.SIGKILL)
        end = self.keeper.wait_end()
        assert end in ("killed", "exited 0"), end
        if end == "killed":
            self.saw("killed with -9 in the drain")
            self.outcome.count(kills=1)

    def asks_for_restart(self) -> None:
        """Somebody asks for a restart: exit 75, and it is started again."""
        self.up()
        self.load()
        boots = self.gateway.boots
        self.hit(signal.SIGUSR1)
        end = self.keeper.wait_end()
        assert end == "exited 75", end
        self.up()
        self.gateway.wait_boot(boots)
        self.saw("exit 75, and started again")

    def all_die(self) -> None:
        """Everything dies at once, the supervisor first."""
        self.up()
        self.load()
        self.gateway.feed(self.dice.uniform(0, 0.2))
        self.keeper.close()
        self.saw("everything died at once")
        self.outcome.count(kills=1)

    # ----- their parts

    def up(self, limits: tuple[float, float] = SHORT, patience: float = AMPLE) -> None:
        """Have it serve, with these limits, by a supervisor that waits so long for it."""
        if self._given != (limits, patience):
            self.keeper.stop()
            self.gateway.set_limits(*limits)
            self._given = limits, patience
        self.keeper.start(patience)
        self.gateway.send("ada", "plain")
        self.gateway.wait_accepted()

    def load(self) -> None:
        """Give it work, some of which does not end by itself, and wait until it has it."""
        self.gateway.top_up()
        self.gateway.wait_accepted(*(self.gateway.hang("long") for _ in range(2)))

    def hit(self, number: signal.Signals) -> None:
        """Send the gateway a signal, if it is there."""
        pid = gateway_below(self.keeper.pid)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def saw(self, state: str) -> None:
        """The campaign has come through this state."""
        self.outcome.seen.append(f"{self.kind}: {state}")


Cycle = Callable[[_Kept], None]

CYCLES_OF_ALL: Final[tuple[Cycle, ...]] = (
    _Kept.overrun,
    _Kept.killed,
    _Kept.asks_for_restart,
    _Kept.killed_in_drain,
    _Kept.stopped,
    _Kept.all_die,
    _Kept.switched_off,
)
CYCLES_OF_THE_DEAF: Final[tuple[Cycle, ...]] = (
    _Kept.killed,
    _Kept.asks_for_restart,
    _Kept.all_die,
    _Kept.unheard,
)


# ----- who does it


def container(*command: str, stderr: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start a command as number 1 of private process numbers."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *own, "--pid", "--fork", "--mount-proc",
         "--kill-child=SIGKILL", *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if stderr is None else stderr, start_new_session=True,
    )  # fmt: skip


class Keeper(Protocol):
    """Whatever starts and stops a gateway. Ends are told as `exited CODE` and `killed`."""

    cycles: Sequence[Cycle]
    """What is played with it."""
    listens: bool
    """Whether a stop reaches the gateway."""

    @property
    def pid(self) -> int:
        """The process beneath which all of its processes are; 0 if there are none."""
        ...

    def start(self, patience: float) -> None:
        """Have the gateway run; a stop will be given so many seconds."""
        ...

    def ask_to_stop(self) -> None:
        """Ask it to stop, and do not wait."""
        ...

    def stop(self) -> str:
        """Stop it, if it is there; how it ended."""
        ...

    def shut_down(self) -> str:
        """Stop the supervisor itself, in order; how the gateway ended."""
        ...

    def wait_end(self) -> str:
        """Wait until the gateway ends, which somebody has seen to; how."""
        ...

    def close(self) -> None:
        """Kill everything at once."""
        ...


@attrs.define(eq=False)
class _Container:
    """A container whose number 1 is, or starts, the gateway. It ends with the gateway."""

    place: Supervised
    cycles: Sequence[Cycle] = CYCLES_OF_ALL
    first: Sequence[str] = ()
    """Number 1, before the script that it is to start."""
    listens: bool = True
    _process: subprocess.Popen[bytes] | None = None
    _patience: float = AMPLE

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self, patience: float) -> None:
        self._patience = patience if self.listens else min(patience, 0.5)
        if self._process is None:
            with self._complaints.open("wb") as complaints:
                command = (*self.first, "bash", str(self.place.start_script))
                self._process = container(*command, stderr=complaints)

    def ask_to_stop(self) -> None:
        self._signal(signal.SIGTERM)

    def stop(self) -> str:
        if self._process is None:
            return ""
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._patience)
            return self.wait_end()
        self.close()
        return "killed"

    def shut_down(self) -> str:
        return self.stop()

    def wait_end(self) -> str:
        assert self._process is not None
        code = self._process.wait(PATIENCE)
        self._process = None
        # Number 1 says 137 of a child that was killed. Of number 1 itself unshare says so by dying
        # likewise, or, where it is older, by failing to.
        killed = code in (137, -signal.SIGKILL) or b"sigprocmask" in self._complaints.read_bytes()
        return "killed" if killed else f"exited {code}"

    def close(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(PATIENCE)
        self._process = None

    @property
    def _complaints(self) -> Path:
        return self.place.folder / "container.txt"

    def _signal(self, number: signal.Signals) -> None:
        for one in children(self.pid):
            with suppress(ProcessLookupError):
                os.kill(one, number)


FORWARDING: Final = """
trap 'stopping=1; kill -TERM $child' TERM
"$@" & child=$!
wait $child; code=$?
if [ -n "$stopping" ]; then wait $child; code=$?; fi
exit $code
"""
"""A shell that is number 1 and passes the stop on. Its first `wait` ends with the signal."""

DEAF: Final = """
"$@"
exit $?
"""
"""A shell that is number 1 and has no handler: SIGTERM does not exist for it."""


SUPERVISORD: Final = """
[supervisord]
nodaemon = true
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
childlogdir = {folder}

[unix_http_server]
file = {folder}/supervisord.sock

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[program:patient]
command = bash {folder}/start.sh
autostart = false
autorestart = unexpected
exitcodes = 0
startsecs = 0
stopwaitsecs = 15

[program:hurried]
command = bash {folder}/start.sh
autostart = false
autorestart = unexpected
exitcodes = 0
startsecs = 0
stopwaitsecs = 1
"""
"""The same program twice: what a stop is given cannot be changed while it is known."""


@attrs.define(eq=False)
class _Supervisord:
    """supervisord, as number 1 of a container. It starts again by itself what was not stopped."""

    place: Supervised
    cycles: Sequence[Cycle] = CYCLES_OF_ALL
    listens: bool = True
    _process: subprocess.Popen[bytes] | None = None
    _program: str = "patient"
    _told: int = 0
    """The ends that were asked for."""

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def start(self, patience: float) -> None:
        self._program = "hurried" if patience < 1 else "patient"
        if self._process is None:
            self._boot()
        if self._state() != "RUNNING":
            self._ask("startProcess", self._program)

    def ask_to_stop(self) -> None:
        self._ask("stopProcess", self._program, False)

    def stop(self) -> str:
        if self._process is None or self._state() != "RUNNING":
            return ""
        self._ask("stopProcess", self._program)
        return self.wait_end()

    def shut_down(self) -> str:
        assert self._process is not None
        self._signal(signal.SIGTERM)
        self._process.wait(PATIENCE)
        self._process = None
        return self.wait_end()

    def wait_end(self) -> str:
        wait_until(lambda: len(self._ends()) > self._told, "an end that supervisord tells of")
        code, killer, again = self._ends()[self._told]
        self._told += 1
        if again:
            wait_until(lambda: self._state() == "RUNNING", "a restart by supervisord")
        return f"exited {code}" if code else f"by {killer}".replace("by SIGKILL", "killed")

    def close(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(PATIENCE)
        self._process = None

    # ----- how

    def _boot(self) -> None:
        folder = self.place.folder
        config = folder / "supervisord.conf"
        config.write_text(SUPERVISORD.format(folder=folder))
        (folder / "supervisord.sock").unlink(missing_ok=True)
        self._process = container(
            sys.executable, "-m", "supervisor.supervisord", "-c", str(config), stderr=None
        )
        wait_until(self._answers, "an answer of supervisord")

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self._ask("getState")["statename"] == "RUNNING")
        return False

    def _state(self) -> str:
        return str(self._ask("getProcessInfo", self._program)["statename"])

    def _ask(self, what: str, *about: Any) -> Any:
        path = self.place.folder / "supervisord.sock"
        with xmlrpc.client.ServerProxy("http://localhost", _OverUnix(path)) as server:
            return getattr(server.supervisor, what)(*about)

    def _ends(self) -> list[tuple[str, str, str]]:
        """Every end that it has logged: an exit code or a signal, and whether it starts again."""
        log = (self.place.folder / "supervisord.log").read_text()
        how = r"(?:exit status (\d+)|terminated by (\w+))[^;)]*(; not expected)?"
        return re.findall(rf"(?:exited|stopped): \w+ \({how}", log)

    def _signal(self, number: signal.Signals) -> None:
        for one in children(self.pid):
            with suppress(ProcessLookupError):
                os.kill(one, number)


class _OverUnix(xmlrpc.client.Transport):
    """XML-RPC through a socket in the file system."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """A connection to the socket, whoever the host is."""
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
        through = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            through.settimeout(PATIENCE)
            through.connect(str(self._path))
        except OSError:
            through.close()
            raise
        connection.sock = through
        self._connection = (host, connection)  # for `close` to find
        return connection


def _shell(script: str) -> Sequence[str]:
    return ("bash", "-c", script, "bash")


KEEPERS: Final[Mapping[str, Callable[[Supervised], Keeper]]] = MappingProxyType(
    {
        "shell": partial(_Container, first=_shell(FORWARDING)),
        "tini": partial(_Container, first=("tini", "--")),
        "supervisord": _Supervisord,
        "deaf-shell": partial(
            _Container, first=_shell(DEAF), cycles=CYCLES_OF_THE_DEAF, listens=False
        ),
        "number-1": _Container,
    }
)


def lacks(kind: str) -> str:
    """What this machine lacks for a kind of supervision, and where it is to be had."""
    if kind == "supervisord" and importlib.util.find_spec("supervisor") is None:
        return "there is no supervisord: pip install supervisor"
    if kind == "tini" and shutil.which("tini") is None:
        return "there is no tini: apt-get install tini"
    return ""
