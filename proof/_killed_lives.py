"""Lives of the real gateway that are killed at one of their I/O calls, forked from a server.

A server is a process with `_killat.c` in front of its C library and everything imported, and with
no thread, so that it may fork. For each point it makes a world in memory and lets four lives pass
in it, each a forked child that hosts the gateway as the command does: the real host with its
signal desk, the real store with its writer's thread, real time.

    1   dies at the point: somewhere between its birth and its end. It takes messages in, sends
        itself a SIGTERM when its turns are under way, marks, drains
    2   finds what 1 left, and dies at a pseudo-random call of its own
    3   so does this one
    4   is not killed: it ends everything, and leaves at the end of its input

It reads points as lines of JSON from standard input, and answers each with one.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, NoReturn

import attrs
import trio
import trio.testing

from trio_gateway import Event, Intake, ResumeRules, Settings
from trio_gateway._config import LogLevel
from trio_gateway._events import (
    DrainReport,
    GatewayStarted,
    StepRemembered,
    StopRequested,
    TurnSettled,
    TurnsMarked,
)
from trio_gateway._host import host
from trio_gateway._logs import Follower, Told
from trio_gateway._signals import SignalDesk
from trio_gateway.testing import SurvivingChannel, World
from trio_gateway.testing._schedule import schedule_by

from ._deaths import Look, check_kept, look, told
from ._errand import agent_that, conversations, said, sent
from ._worlds import all_ended, answered_once, exactly_the_interrupted_resumed

LIFE_AT_MOST: Final = 15.0
"""Seconds after which the kernel ends a life that hangs."""

NEVER: Final = 1 << 40
"""No life makes so many calls."""

MOMENTS: Final = ("after", "before")

LIVES: Final = 4
"""The first dies at the point, the last does not, those between while they recover."""

RECOVERY_CALLS: Final = (120, 160, 500)
"""A recovering life dies at one of so many calls of its own, if it makes them: in its boot, while
what was interrupted resumes, or anywhere."""

SETTINGS: Final = Settings(
    grace=0.015,
    budget=10.0,
    # Killed so often, an innocent turn is open at three crashes.
    resume=ResumeRules(within=None, max_crashes=1000, max_interruptions=1000),
)


@attrs.frozen(kw_only=True)
class Point:
    """Where the first life dies: before or after its `call`-th call. A round is a story of its own:
    other messages, another schedule, another platform."""

    seed: int
    round: int
    moment: str
    call: int
    recovery: int | None = None
    """What the recovering lives die by; that call, unless given."""

    def __str__(self) -> str:
        return f"{self.round}:{self.moment}:{self.call}"


@attrs.frozen
class Aim:
    """The call at which a life dies."""

    moment: str
    call: int

    @classmethod
    def by(cls, dice: random.Random) -> Aim:
        """A pseudo-random one, for a life that recovers."""
        return cls(dice.choice(MOMENTS), dice.randint(1, dice.choice(RECOVERY_CALLS)))


@attrs.define(kw_only=True)
class Outcome:
    """What became of a point."""

    ended: bool = False
    """The first life made fewer calls, and ended by itself."""
    died_at: str = ""
    """The call at which it died otherwise, and where in its story."""
    deaths: list[str] = attrs.field(factory=list[str])
    """At which call each life died, and where in its story."""
    seen: list[str] = attrs.field(factory=list[str])
    figures: dict[str, int] = attrs.field(factory=dict[str, int])
    failure: str = ""


@attrs.frozen(kw_only=True)
class Story:
    """What happens in the lives of one round."""

    messages: tuple[tuple[str, str, str], ...]
    """Session, id and text of each, in the order in which they are sent."""
    late: tuple[tuple[str, str, str], ...]
    """Those that are sent while the gateway drains."""
    idempotent: bool
    """Whether the platform knows its keys."""
    schedule: int

    @classmethod
    def of(cls, seed: int, round: int) -> Story:
        """The story of a round."""
        dice = random.Random(f"{seed} {round}")
        messages = sent(conversations(dice, 3))
        late = ((dice.choice("abc"), "late", "plain"), ("new", "latest", "plain"))
        return cls(
            messages=tuple(messages),
            late=late,
            idempotent=round % 2 == 0,
            schedule=dice.randrange(1 << 30),
        )

    @property
    def all(self) -> tuple[tuple[str, str, str], ...]:
        """Every message, in order."""
        return (*self.messages, *self.late)


# ----- in the child


class Jotter:
    """Notes in a world what happens in a life, by a call that is not counted."""

    def __init__(self, world: World) -> None:
        self._fd = os.open(
            world.folder / "notes.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600
        )

    def __call__(self, text: str) -> None:
        """Note it, in the way of `World.note`."""
        os.writev(self._fd, [json.dumps(text).encode() + b"\n"])

    def close(self) -> None:
        """Note nothing more."""
        os.close(self._fd)


@attrs.define
class Log:
    """The host's log: notes what the world can rely on once it is said."""

    jot: Jotter
    marked: trio.Event = attrs.field(factory=trio.Event)
    drained: bool = False

    def listener(self, event: Event) -> None:
        """See `HostLog`."""
        match event:
            case GatewayStarted():
                self.jot("started")
            case StopRequested():
                self.jot("stopping")
            case TurnsMarked():
                self.jot(f"marked {event.count}")
                self.marked.set()
            case DrainReport():
                self.jot("drained")
                self.drained = True
            case TurnSettled():
                self.jot(f"settled {event.turn}")
            case StepRemembered():
                self.jot(f"remembered {event.turn} {event.name}")
            case _:
                self.say(event.level, type(event).__name__, what=event)

    def recent(self) -> tuple[Told, ...]:
        """See `HostLog`. Nobody asks."""
        return ()

    def follow(self, follower: Follower) -> AbstractContextManager[None]:
        """See `HostLog`. Nobody follows."""
        return nullcontext()

    def use_level(self, level: LogLevel) -> None:
        """See `HostLog`. Nobody changes it."""

    def say(self, level: str, event: str, **fields: object) -> None:
        """See `HostLog`. Nobody who is merely killed has reason to complain."""
        if level in ("error", "critical"):
            self.jot(f"bad {event} {fields}")

    def flush(self, timeout: float) -> None:
        """See `HostLog`."""


class Sender(SurvivingChannel):
    """The chat platform in a life: sends what nobody acknowledged and, now and then, what somebody
    did; then sends the process a SIGTERM, or in the last life ends its input."""

    def __init__(self, world: World, story: Story, log: Log, jot: Jotter, number: int) -> None:
        record = world.folder / "arrived-memory.jsonl"
        super().__init__(record, "memory", idempotent=story.idempotent)
        self._story = story
        self._log = log
        self._jot = jot
        self._is_last = number == LIVES
        self._known = told(world.notes, "accepted")
        self._again = random.Random(f"{story.schedule} {number}")

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Channel.serve`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._play)
            await super().serve(intake, task_status=task_status)
            nursery.cancel_scope.cancel()

    async def _play(self) -> None:
        await self.wait_ready()
        for message in self._story.messages:
            await self._hand_in(*message)
        if self._is_last:
            await self._hand_in_late()
            self.end_input()
            return
        # Until every turn is where it wants to be when the stop comes; the writer works apart.
        await trio.testing.wait_all_tasks_blocked(0.004)
        signal.raise_signal(signal.SIGTERM)
        await self._log.marked.wait()
        await self._hand_in_late()

    async def _hand_in_late(self) -> None:
        for message in self._story.late:
            await self._hand_in(*message)

    async def _hand_in(self, session: str, id: str, text: str) -> None:
        if id in self._known and self._again.random() < 0.8:
            return
        receipt = await self.receive(session, id, text)
        if not receipt.accepted:
            if not self._log.drained:  # until then the inbox is open, promise 12
                self._jot(f"bad {id} was refused: {receipt.reason}")
            return
        self._jot(f"accepted {id}")
        if id in self._known and receipt.status != "duplicate":
            self._jot(f"bad {id} was accepted twice")


def live(world: World, story: Story, number: int) -> int:
    """One life, as the command leads it; its exit code."""
    signals = SignalDesk()
    signals.install()
    jot = Jotter(world)
    log = Log(jot)
    last = number == LIVES
    agent = agent_that(world.note, jot, lambda turn: not last)
    channel = Sender(world, story, log, jot, number)
    return host(
        agent, store=world.store, channels=[channel], settings=SETTINGS, log=log, signals=signals
    )


def _be_child(world: World, story: Story, number: int, aim: Aim) -> NoReturn:
    """In the forked child: aim, live, leave."""
    code = 1
    try:
        # The kernel's own alarm, with the default action: it ends whatever hangs in here.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LIFE_AT_MOST)
        to_log = os.open(world.folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(to_log, 1)
        os.dup2(to_log, 2)
        record = os.open(world.folder / "death.txt", os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600)
        schedule_by(story.schedule + number)
        library = ctypes.CDLL(None)
        library.killat_aim(ctypes.c_long(aim.call), aim.moment == "after", record)
        code = live(world, story, number)
        os.writev(record, [b"ended"])
    except BaseException:  # noqa: ASYNC103 - told, and the process ends on the next line
        traceback.print_exc()
    finally:
        os._exit(code)


# ----- in the server


@attrs.define
class Case:
    """One point: a world, and its lives so far."""

    world: World
    story: Story
    point: Point
    outcome: Outcome = attrs.field(factory=Outcome)

    def run(self) -> None:
        """Let all lives pass, and look at the world after each. Raises `AssertionError`."""
        point = self.point
        dice = random.Random(f"{point.round} {point.moment} {point.recovery or point.call}")
        aims = [Aim(point.moment, point.call), Aim.by(dice), Aim.by(dice), Aim("before", NEVER)]
        before = Look()
        for number, aim in enumerate(aims, 1):
            before = self._life(number, aim, before)
            if number == 1 and not self.outcome.deaths:
                self.outcome.ended = True
                return
        self._at_the_end()

    def _life(self, number: int, aim: Aim, before: Look) -> Look:
        jot = Jotter(self.world)
        jot(f"boot {json.dumps(before.open)}")
        jot.close()
        noted_before = len(self.world.notes)
        status = self._fork(number, aim)
        notes = self.world.notes
        life = notes[noted_before:]
        death = self._death(number, status)
        if death:
            self.outcome.died_at = self.outcome.died_at or f"{death} {phase(life)}"
            self.outcome.deaths.append(f"life {number} {aim.moment} {death} {phase(life)}")
        now = look(self.world)
        check_kept(before, now, notes, life, {text.key for text in self.world.arrived()})
        if death:
            self.outcome.seen += states(before, now, life)
        if any(turn.is_suspect for turn in before.turns.values()):
            self.outcome.seen.append("booted with a suspect")
        return now

    def _fork(self, number: int, aim: Aim) -> int:
        pid = os.fork()
        if pid == 0:
            _be_child(self.world, self.story, number, aim)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def _death(self, number: int, status: int) -> str:
        """The call at which the life has died; empty if it ended by itself."""
        record = (self.world.folder / "death.txt").read_text()
        if status == 0 and record == "ended":
            return ""
        how = f"life {number} ended with {status}, recorded {record!r}"
        assert record, how
        assert status == -signal.SIGKILL, how
        return record

    def _at_the_end(self) -> None:
        """Everything is answered: once, in order, and nothing was done twice."""
        world, story = self.world, self.story
        all_ended(world)
        answered_once(world, *(id for _, id, _ in story.all), forgetful=not story.idempotent)
        exactly_the_interrupted_resumed(world)
        shots = Counter(told(world.notes, "shot"))
        assert all(count == 1 for count in shots.values()), f"an unsafe effect twice: {shots}"
        for session in sorted({session for session, _, _ in story.all}):
            expected = [(id, kind) for name, id, kind in story.all if name == session]
            self._in_order(session, expected)
        self._add_up()

    def _in_order(self, session: str, expected: Sequence[tuple[str, str]]) -> None:
        shown = [text for text in self.world.shown() if text.session == session]
        texts = [(id, text.text) for text in shown for id in text.in_reply_to]
        wanted = [(id, pattern) for id, kind in expected for pattern in said(id, kind)]
        fits = [id for id, _ in texts] == [id for id, _ in wanted] and all(
            text in pattern for (_, text), (_, pattern) in zip(texts, wanted, strict=True)
        )
        assert fits, f"session {session} was shown {texts}, expected {wanted}"

    def _add_up(self) -> None:
        notes, arrived = self.world.notes, self.world.arrived()
        reasons = Counter(note.split()[2] for note in told(notes, "began"))
        self.outcome.figures = {
            "points": 1,
            "kills": len(self.outcome.deaths),
            "resumed": reasons.total() - reasons["fresh"],
            "repeats": len(arrived) - len(self.world.shown()),
            "in_doubt": sum(text.text.startswith("in doubt") for text in self.world.shown()),
        }
        self.outcome.seen += [f"resumed after a {r}" for r in reasons if r != "fresh"]


def phase(life: Sequence[str]) -> str:
    """Where in its story a life was when it died, by what it noted."""
    said = {note.partition(" ")[0] for note in life}
    for word, where in (
        ("drained", "after the drain"),
        ("marked", "in the drain"),
        ("stopping", "between the stop and the marking"),
        ("started", "while it served"),
    ):
        if word in said:
            return where
    return "in the boot"


def states(before: Look, now: Look, life: Sequence[str]) -> Iterator[str]:
    """The interesting states that a death came through."""
    where = phase(life)
    yield f"killed {where}"
    if not now.made:
        yield "killed while the store is made"
    if where == "in the boot" and before.open:
        yield "killed in a boot that finds open turns"
        if now.epochs > before.epochs:
            yield "killed in a boot that has charged them"
    if where == "in the drain":
        marked_at = next(i for i, note in enumerate(life) if note.startswith("marked"))
        if told(life[marked_at:], "settled") and now.open:
            yield "killed in the drain, some turns settled, some open"
        if "late" in now.messages - before.messages:
            yield "killed with a message accepted in the drain"


def attempt_point(point: Point) -> Outcome:
    """Try one point, in a world of its own. What broke is in the outcome."""
    with tempfile.TemporaryDirectory(prefix="kill-io-", dir=_memory()) as folder:
        case = Case(World(Path(folder)), Story.of(point.seed, point.round), point)
        try:
            case.run()
        except Exception as error:
            log = case.world.folder / "log.txt"
            case.outcome.failure = "\n".join(
                [
                    str(error) or repr(error),
                    *case.outcome.deaths,
                    f"story: {case.story}",
                    "notes: " + " | ".join(case.world.notes),
                    log.read_text(errors="replace")[-2000:] if log.exists() else "",
                ]
            )
        return case.outcome


def _memory() -> str | None:
    """A file system in memory: a killed process loses nothing that it has written, synced or not,
    and syncing is most of what a life costs."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def serve() -> None:
    """Answer points until there are no more."""
    for line in sys.stdin:
        outcome = attempt_point(Point(**json.loads(line)))
        print(json.dumps(attrs.asdict(outcome)), flush=True)


if __name__ == "__main__":
    serve()
