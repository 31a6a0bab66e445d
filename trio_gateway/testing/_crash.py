"""Kill my agent anywhere.

Whatever a gateway relies on, it commits. So there are only so many places where a death can make a
difference: before and after each commit. `kill_my_agent_anywhere` runs a scenario once for each of
them, in a process of its own that dies there (SIGKILL: no `finally`, no goodbye), boots the same
store again, and asks you whether the world is still in order.

An agent that charges a card, wrong:

    async def scenario(life):
        async def agent(turn):
            life.world.note(f"charged for {turn.text}")  # the bank: no crash takes this back
            return "Charged."

        async with life.open_gateway(agent) as gateway:
            await gateway.ask(Message(session="ada", id="m1", text="a book"))

    def check(world):
        assert world.notes == ("charged for a book",)

    def test_charges_once():
        kill_my_agent_anywhere(scenario, check)

    CrashFailure: point=3 before: assert ('charged for a book', 'charged for a book') == ...

It died when the bank had the money and the gateway did not know yet; the turn resumed, and charged
again. Right, for a bank that recognises a repeated request by its key:

        async def agent(turn):
            await turn.step(charge, turn.text, turn.idempotency_key("charge"))
            return "Charged."

A step that has finished is not run again, and one that was cut is run again under the same key.
Where the bank knows no keys, say `effect="unsafe"`: a turn that was cut in the middle of the charge
then gets a `StepInDoubt`, instead of charging again.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal, NoReturn, cast

import attrs
import trio
import trio.testing

from ._clock import VirtualClock
from ._invariants import check_invariants
from ._opener import GatewayOpener
from ._world import World

Moment = Literal["before", "after"]


@attrs.frozen
class CrashPoint:
    """A place to die: `before` or `after` the n-th commit of a life (from 1). Written `7 after`."""

    commit: int
    moment: Moment

    def __str__(self) -> str:
        return f"{self.commit} {self.moment}"

    @classmethod
    def parse(cls, text: str) -> CrashPoint:
        """Read `7 after`. Raises `ValueError`."""
        commit, _, moment = text.strip().partition(" ")
        if not commit.isdecimal() or moment not in ("before", "after"):
            raise ValueError(f"{text!r} is no crash point; write it like '7 after'")
        return cls(int(commit), "before" if moment == "before" else "after")


def every_crash_point() -> Iterator[CrashPoint]:
    """`1 before`, `1 after`, `2 before`, and so on without end."""
    commit = 0
    while True:
        commit += 1
        yield CrashPoint(commit, "before")
        yield CrashPoint(commit, "after")


def die() -> None:
    """End this process as a power cut would: nothing of it runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


class CrashPoints:
    """Counts the commits of a store, and dies at one of them.

    Hand it to `open_gateway(tap=...)` or `open_store(tap=...)`. Without a `point` it only counts.
    `death` is what happens there: the process is killed, unless told otherwise. One that raises
    before a commit (an `apsw.IOError`, say) makes it fail.
    """

    def __init__(
        self, point: CrashPoint | str | None = None, *, death: Callable[[], None] = die
    ) -> None:
        self.point: CrashPoint | None = CrashPoint.parse(point) if isinstance(point, str) else point
        self.commits: int = 0
        """How many commits were begun so far."""
        self._death = death

    def __call__(self, moment: str) -> None:
        """Called by the store around every commit, with "before" and "after"."""
        if moment == "before":
            self.commits += 1
        if self.point == CrashPoint(self.commits, cast("Moment", moment)):
            self._death()


@attrs.frozen(kw_only=True)
class Life:
    """One process's life, as a scenario gets it: from here to the end of the function, or to death.

    `number` is 1 in the first life, 2 after the first death, and so on.
    """

    world: World
    number: int
    open_gateway: GatewayOpener
    """Opens a gateway on the world's store that dies where this life is to end. See
    `trio_gateway.open_gateway`; store, clock and tap are taken care of."""


Scenario = Callable[[Life], Awaitable[None]]
"""What happens in one life. It runs again after a death, so it hands in the same messages again,
under the same ids: as a platform does, which had no acknowledgement."""


@attrs.frozen(kw_only=True)
class CrashReport:
    """What a campaign did. `commits` of the undisturbed scenario; `points` of the first life that
    were died at; `deaths` and `lives` in all; `seconds` that it took."""

    commits: int
    points: int
    deaths: int
    lives: int
    seconds: float


class CrashFailure(AssertionError):
    """The world was not in order after a death. `point` reproduces it, given as `only`."""

    def __init__(self, point: str, what: str) -> None:
        super().__init__(f"point={point}: {what}")
        self.point = point


def kill_my_agent_anywhere(
    scenario: Scenario,
    check: Callable[[World], None],
    *,
    recover: Scenario | None = None,
    after_death: Callable[[World], None] | None = None,
    deaths: int = 1,
    only: str | None = None,
    virtual_time: bool = False,
    timeout: float = 60.0,
) -> CrashReport:
    """Run `scenario`, dying before and after each of its commits; boot again after each; `check`.

    Each time, a fresh `World` is made; a forked child runs the scenario in it and dies; a second
    child runs `recover` (unless given: the scenario again) to its end; then `check(world)` runs
    here, and so does `check_invariants` on the store. `after_death(world)`, if given, may look at
    the world between death and recovery. With `deaths=2` the recovery dies everywhere too, and so
    on: the number of lives is a power of it.

    `only` repeats one case, as it was reported: `"7 after"`, or `"7 after, 2 before"`.
    `virtual_time`: sleeping costs no time; only for agents that use neither threads nor real I/O.
    `timeout`: seconds of real time that one life may take.

    Raises `CrashFailure` on the first case that fails; its text begins with what to pass as `only`.
    For POSIX. Call it from plain code, not from inside a Trio run: it forks.
    """
    if trio.lowlevel.in_trio_run():
        raise RuntimeError("kill_my_agent_anywhere forks: call it from a plain (not async) test")
    campaign = _Campaign(scenario, recover or scenario, check, after_death, virtual_time, timeout)
    with tempfile.TemporaryDirectory(prefix="crash-", dir=_memory()) as folder:
        return campaign.run(Path(folder), deaths, only)


def _memory() -> str | None:
    """A file system in memory, if there is one: a killed process loses nothing that it has written,
    synced or not, and syncing is most of what a life costs."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def live(
    scenario: Scenario,
    world: World,
    *,
    point: CrashPoint | str | None = None,
    number: int = 1,
    virtual_time: bool = False,
    timeout: float = 60.0,
) -> bool:
    """Run one life of `scenario` in a forked child; True if it was killed, False if it ended.

    It dies at `point`, or wherever the scenario itself calls `die()`. Raises `LifeFailed` when it
    raised, was ended by another signal, or was not over after `timeout` seconds. See
    `kill_my_agent_anywhere` for the other arguments.
    """
    if isinstance(point, str):
        point = CrashPoint.parse(point)
    body = partial(_live, scenario, world, number, point, virtual_time)
    code = _in_child(body, timeout, world.folder)
    if code == -signal.SIGALRM:
        raise LifeFailed(f"life {number} was not over after {timeout:g} s")
    if code > 0:
        raise LifeFailed(f"life {number} failed\n{(world.folder / FAILURE).read_text('utf-8')}")
    if code not in (0, -signal.SIGKILL):
        raise LifeFailed(f"life {number} was ended by {signal.Signals(-code).name}")
    return code != 0


class LifeFailed(AssertionError):
    """A life of a scenario did not end well, and not by a death that was meant."""


def _live(
    scenario: Scenario, world: World, number: int, point: CrashPoint | None, virtual_time: bool
) -> None:
    """In the child: the whole life."""
    opener = GatewayOpener(
        store=world.store,
        clock=VirtualClock() if virtual_time else None,
        inline_store=virtual_time,
        tap=CrashPoints(point),
    )
    life = Life(world=world, number=number, open_gateway=opener)
    clock = trio.testing.MockClock(autojump_threshold=0) if virtual_time else None
    trio.run(scenario, life, clock=clock)


Death = tuple[CrashPoint, ...]
"""Where the first life died, the second, and so on."""


@attrs.define
class _Campaign:
    scenario: Scenario
    recover: Scenario
    check: Callable[[World], None]
    after_death: Callable[[World], None] | None
    virtual_time: bool
    timeout: float
    lives: int = 0
    deaths: int = 0
    points: int = 0
    worlds: int = 0

    def run(self, folder: Path, deaths: int, only: str | None) -> CrashReport:
        began = time.monotonic()
        empty = World(folder / "0")
        empty.folder.mkdir()
        if only is None:
            self._explore(empty, (), deaths)
        else:
            self._repeat(empty, tuple(map(CrashPoint.parse, only.split(","))))
        return CrashReport(
            commits=self.points // 2,
            points=self.points,
            deaths=self.deaths,
            lives=self.lives,
            seconds=time.monotonic() - began,
        )

    def _explore(self, world: World, before: Death, deaths: int) -> None:
        """Go on from `world`: to the end, and dying everywhere, `deaths` times in a row."""
        self._finish(self._copy(world), before)
        points = every_crash_point() if deaths else ()
        for point in points:
            copy, death = self._copy(world), (*before, point)
            if not self._dies(copy, death):
                break
            self.points += not before
            self._explore(copy, death, deaths - 1)
            shutil.rmtree(copy.folder)

    def _repeat(self, world: World, death: Death) -> None:
        for count in range(1, len(death) + 1):
            if not self._dies(world, death[:count]):
                raise ValueError(f"{_named(death[:count])} is not reached")
        self._finish(world, death)

    def _copy(self, world: World) -> World:
        self.worlds += 1
        copy = world.folder.parent / str(self.worlds)
        shutil.copytree(world.folder, copy)
        return World(copy)

    # ----- one life

    def _dies(self, world: World, death: Death) -> bool:
        """Live until the last point of `death`; False if it is not reached."""
        if not self._live(world, death, death[-1]):
            return False
        self.deaths += 1
        if self.after_death is not None:
            with _blaming(death):
                self.after_death(world)
        return True

    def _finish(self, world: World, death: Death) -> None:
        """Live to the end, then look at the world."""
        if self._live(world, death, None):
            raise CrashFailure(_named(death), "the last life was killed")
        with _blaming(death):
            check_invariants(world.store)
            self.check(world)

    def _live(self, world: World, death: Death, point: CrashPoint | None) -> bool:
        self.lives += 1
        number = len(death) + (point is None)
        scenario = self.scenario if number == 1 else self.recover
        with _blaming(death):
            return live(
                scenario,
                world,
                point=point,
                number=number,
                virtual_time=self.virtual_time,
                timeout=self.timeout,
            )


@contextmanager
def _blaming(death: Death) -> Generator[None, None, None]:
    """Say where the process died that led to a failure."""
    try:
        yield
    except Exception as error:
        raise CrashFailure(_named(death), str(error) or repr(error)) from error


FAILURE: Final = "failure.txt"
"""Where a life that failed leaves its traceback."""


def _named(death: Death) -> str:
    return ", ".join(map(str, death)) or "none"


def _in_child(body: Callable[[], None], timeout: float, folder: Path) -> int:
    """Run `body` in a forked child; its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        # Python warns of forking beside threads. Those that may be there are Trio's idle ones,
        # which the child does without, and the child does nothing that would need the others.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _be_child(body, timeout, folder)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _be_child(body: Callable[[], None], timeout: float, folder: Path) -> NoReturn:
    code = 1
    try:
        gc.freeze()  # what the parent left lying about is the parent's to clean up
        # The kernel's own alarm, with the default action: it ends whatever hangs in here.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        body()
        code = 0
    except BaseException:  # noqa: ASYNC103 - told, and the process ends on the next line
        (folder / FAILURE).write_text(traceback.format_exc(), "utf-8")
    finally:
        os._exit(code)
