"""SIGKILL at every system call of a shutdown of the real command: a complete sweep of one.

    trio-gateway run agent.py:agent --jsonl      as a process, its turns under way
    strace -p THREAD                             attached to one of its threads; it kills the
                                                 process as that thread enters its k-th call of
                                                 one kind, which is then not carried out
    SIGTERM                                      the shutdown
    trio-gateway run agent.py:agent --jsonl      again, to the end of its input; then the account

A point is `STORY:THREAD:SYSCALL:K`, `0:writer:fdatasync:3` for one. strace counts for each thread
and kind of call, and so does this: 1, 2, 3, until the process comes to its end by itself. Which
kinds there are, a trace without a kill tells first. Left out is the thread in C that the watchdog
has in reserve: it is born in the shutdown, and touches its own stack and a lock.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Final

import attrs

from trio_gateway.testing import World

from ._deaths import Look, check_kept, look, told
from ._errand import conversations, sent
from ._platform import PATIENCE, Platform, effects, furnish, wait_until
from ._process import Process, scratch_folder, started
from ._report import Campaign, Job, Skip
from ._sweeps import Sweeps, same_gateway, work_off

CAMPAIGN: Final = Campaign(
    name="kill-syscalls",
    injects="SIGKILL at every system call of a shutdown of the real command, thread by thread",
    short="SIGKILL at system calls of a shutdown",
    promises=(1, 2, 3, 4, 5, 6, 7, 8, 9),
    counted="kills",
    must_see=(
        "killed before the markers were on disk",
        "killed when all were marked",
        "killed when some had settled in the drain",
        "killed when the end was written",
        "resumed after a crash",
        "resumed after a shutdown",
    ),
)

AGENT: Final = """
import ctypes
import os

from proof._errand import agent_that

# Lets strace attach where only ancestors may; elsewhere this says nothing.
PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)


def note(text):
    fd = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)


agent = agent_that(note, note, lambda turn: turn.resumed is None)
"""

CONFIG: Final = """
[drain]
grace = "40ms"
budget = "10s"
"""

THREADS: Final = ("main", "desk", "log", "stall", "pool", "writer")
"""The threads of the command, in the order in which it starts them."""

NOT_OURS: Final = ("restart_syscall",)
"""What a thread does because strace attaches to it."""

TRACED: Final = re.compile(r"(\d+) +(\w+)\(")


@attrs.frozen
class Spot:
    """Which calls are counted: one thread's, of one kind. Of no kind: nothing is killed, and all
    calls are written down."""

    story: int
    thread: str
    syscall: str

    def __str__(self) -> str:
        return f"{self.story}:{self.thread}:{self.syscall}"


Point = tuple[Spot, int]


@attrs.define
class Outcome:
    """What became of a point."""

    killed: bool = False
    calls: list[Spot] = attrs.field(factory=list[Spot])
    """Every call of the shutdown, if nothing was killed."""
    figures: dict[str, int] = attrs.field(factory=dict[str, int])
    seen: list[str] = attrs.field(factory=list[str])
    failure: str = ""


def run(job: Job) -> None:
    """See the module."""
    if shutil.which("strace") is None:
        raise Skip("there is no strace: install it (apt install strace)")
    if job.only is not None:
        story, thread, syscall, number = job.only.split(":")
        again = (Spot(int(story), thread, syscall), int(number))
        tell(job, again, attempt(job.seed, again))
        return
    calls = [call for story in range(job.amount(1, 1, 3)) for call in calls_of(job, story)]
    if not calls:
        return  # an undisturbed shutdown fails, and that has been told
    spots = list(dict.fromkeys(calls))
    sweeps = Sweeps(spots)
    is_quick = bool(job.amount(1, 0, 0))
    points = sample(calls, 6, random.Random(job.seed)) if is_quick else sweeps.abreast()

    def heard(point: Point, outcome: Outcome) -> None:
        if not outcome.killed:
            sweeps.ended(point[0])
        tell(job, point, outcome)

    hands = range(max(1, job.jobs))
    work_off(points, hands, lambda _, point: attempt(job.seed, point), heard)
    job.report.count(sweeps=0 if is_quick else len(spots))


def calls_of(job: Job, story: int) -> list[Spot]:
    """Every call of an undisturbed shutdown, in order."""
    undisturbed = (Spot(story, "main", ""), 0)
    outcome = attempt(job.seed, undisturbed)
    tell(job, undisturbed, outcome)
    job.report.count(calls=len(outcome.calls))
    return outcome.calls


def sample(calls: Sequence[Spot], count: int, dice: random.Random) -> list[Point]:
    """So many of them, spread over the whole shutdown."""
    numbers = Counter[Spot]()
    points: list[Point] = []
    for spot in calls:
        numbers[spot] += 1
        points.append((spot, numbers[spot]))
    start = dice.random()
    return [points[int((n + start) * len(points) / count)] for n in range(count)]


def attempt(seed: int, point: Point) -> Outcome:
    """Try one point, in a world of its own. What broke is in the outcome."""
    spot, number = point
    outcome = Outcome()
    with scratch_folder() as folder:
        shutdown = Shutdown(folder, seed, spot.story)
        try:
            outcome.killed = shutdown.first_life(spot, number)
            outcome.calls = shutdown.calls
            outcome.seen += shutdown.states(outcome.killed)
            outcome.figures = shutdown.second_life()
        except AssertionError as error:
            notes = " | ".join(effects(folder))
            outcome.failure = f"{error}\nnotes: {notes}\n{shutdown.platform.log()}"
    outcome.figures |= {"points": 1, "kills": int(outcome.killed)}
    return outcome


def tell(job: Job, point: Point, outcome: Outcome) -> None:
    """Count an outcome, or report its failure."""
    job.report.count(**outcome.figures)
    job.report.saw(*outcome.seen)
    if outcome.failure:
        job.report.fail(f"{point[0]}:{point[1]}", outcome.failure)


# ----- one shutdown


class Shutdown:
    """The shutdown of one gateway, and the boot after it."""

    def __init__(self, folder: Path, seed: int, story: int) -> None:
        furnish(folder, CONFIG, AGENT)
        self.platform = Platform(folder)
        self.world = World(folder)
        self.calls: list[Spot] = []
        self._story = story
        self._messages = sent(conversations(random.Random(f"{seed} {story}"), 3))
        self._left = Look()
        self._notes: list[str] = []

    def first_life(self, spot: Spot, number: int) -> bool:
        """Up to the end of a shutdown, or to the kill at that call; whether it came to that."""
        trace = self.world.folder / "trace.txt"
        with started(self.platform, env=same_gateway()) as gateway:
            self._occupy(gateway)
            threads = threads_of(gateway.pid)
            assert spot.thread in threads, f"it has no thread {spot.thread}, only {threads}"
            with traced(gateway, threads[spot.thread], trace, spot.syscall, number):
                gateway.signal(SIGTERM)
                code = gateway.wait()
            self._note_log(gateway)
        assert code == 0 or (code == -SIGKILL and spot.syscall), f"ended with {code}"
        if not spot.syscall:
            self.calls = calls_in(trace, self._story, threads)
        self._look_at_death(code)
        return code != 0

    def _occupy(self, gateway: Process) -> None:
        """Hand in all messages, and wait until their turns wait for the stop, and the log, which is
        loaded last, has told so."""
        gateway.send(*(self.platform.new(session, text) for session, _, text in self._messages))
        self.platform.wait_accepted()
        waiting = {id for _, id, text in self._messages if text != "plain"}
        wait_until(
            lambda: waiting <= set(told(effects(self.world.folder), "waits")), "waiting turns"
        )
        begun = len(told(effects(self.world.folder), "began"))
        wait_until(lambda: gateway.log().count("turn_begun") >= begun, "the log of it")

    def _look_at_death(self, code: int) -> None:
        self._left = look(self.world)
        self._check(Look(), self._left, self._notes)
        if code == 0:
            assert self._left.ended, "left in order, and did not note it"

    def _check(self, before: Look, now: Look, life: Sequence[str]) -> None:
        accepted = [f"accepted {id}" for id in self.platform.accepted]
        replies = [event for event in self.platform.events if event["event"] == "reply"]
        keys = {reply["key"] for reply in replies}
        check_kept(before, now, [*self._notes, *accepted], life, keys)

    def _note_log(self, gateway: Process) -> list[str]:
        """What this life has logged, after the fact each time, as notes."""
        noted = list(notes_of(gateway.log()))
        self._notes += noted
        return noted

    def states(self, killed: bool) -> Iterator[str]:
        """The interesting states that the shutdown has come through."""
        left = self._left
        if not killed:
            return
        if left.ended:
            yield "killed when the end was written"
        elif any(turn.state == "RUNNING" for turn in left.turns.values()):
            yield "killed before the markers were on disk"
        elif settled_in_drain(left, effects(self.world.folder)):
            yield "killed when some had settled in the drain"
        else:
            yield "killed when all were marked"
        for reason in set(left.open.values()):
            yield f"resumed after a {reason}"

    def second_life(self) -> dict[str, int]:
        """Boot again, let everything end, and add up. Raises `AssertionError`."""
        before = len(effects(self.world.folder))
        with started(self.platform, env=same_gateway()) as gateway:
            gateway.end_input()
            code = gateway.wait()
            life = self._note_log(gateway)
        assert code == 0, f"the next life ended with {code}"
        self._check(self._left, look(self.world), life)
        began = [note.split() for note in told(effects(self.world.folder)[before:], "began")]
        resumed = {turn: reason for turn, _, reason in began if reason != "fresh"}
        assert resumed == self._left.open, f"open were {self._left.open}, resumed {resumed}"
        return self.platform.account()


def notes_of(log: str) -> Iterator[str]:
    """What a log says, in the words of `_deaths`. A death may have cut its last line."""
    for line in log.splitlines():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["level"] in ("error", "critical"):
                yield f"bad {line}"
            elif record["event"] == "turn_settled":
                yield f"settled {record['turn']}"
            elif record["event"] == "turns_marked":
                yield f"marked {record['count']}"
            elif record["event"] == "step_remembered":
                yield f"remembered {record['turn']} {record['name']}"


def settled_in_drain(left: Look, notes: Sequence[str]) -> bool:
    """Whether some turns have settled that saw the drain, while others are open."""
    saw = set(map(int, told(notes, "draining")))
    return bool(left.open) and any(left.turns[turn].settled for turn in saw)


# ----- strace


def threads_of(process: int) -> dict[str, int]:
    """The threads of a gateway process that serves, by name."""
    found = sorted(int(thread.name) for thread in Path(f"/proc/{process}/task").iterdir())
    names = [*THREADS, *(f"thread-{number}" for number in range(len(THREADS), len(found)))]
    return dict(zip(names, found, strict=False))


def calls_in(trace: Path, story: int, threads: Mapping[str, int]) -> list[Spot]:
    """Every call of those threads that a trace tells of, in order."""
    names = {thread: name for name, thread in threads.items()}
    calls = [TRACED.match(line) for line in trace.read_text(errors="replace").splitlines()]
    return [
        Spot(story, names[int(call[1])], call[2])
        for call in calls
        if call and int(call[1]) in names and call[2] not in NOT_OURS
    ]


@contextmanager
def traced(
    gateway: Process, thread: int, trace: Path, syscall: str, number: int
) -> Generator[None]:
    """strace is attached to the gateway while the block lasts: to all of it, or to one thread, to
    kill it at the `number`-th call of one kind. Raises `Skip` where it may not attach."""
    how = ["-f", "-p", str(gateway.pid)]
    if syscall:
        how = ["-p", str(thread), "-e", f"trace={syscall}"]
        how += ["-e", f"inject={syscall}:signal=KILL:when={number}"]
    with trace.with_name("strace.txt").open("w+") as errors:
        strace = subprocess.Popen(["strace", "-o", str(trace), *how], stderr=errors)
        try:
            wait_attached(gateway, strace, thread)
            errors.seek(0)
            if gateway.alive and strace.poll() is not None:
                raise Skip(f"strace may not attach; run as root: {errors.read()[-300:]}")
            yield
            strace.wait(PATIENCE)
        finally:
            strace.kill()
            strace.wait()


def wait_attached(gateway: Process, strace: subprocess.Popen[bytes], thread: int) -> None:
    """Until the kernel says so, or one of the two is gone."""
    status = Path(f"/proc/{gateway.pid}/task/{thread}/status")

    def attached() -> bool:
        with suppress(OSError):
            if "TracerPid:\t0\n" not in status.read_text():
                return True
        return not gateway.alive or strace.poll() is not None

    wait_until(attached, "strace's hold")
    time.sleep(0.01)  # between the hold and the first stop
