"""A thousand conversations under steady load, for minutes: the process is killed, stopped and
restarted at random, with each of the five busy policies; then it lives undisturbed for a while, to
see whether it grows.

A point is the number of a world: one store, one crowd, one process at a time. Two run beside each
other. `_crowd` is who writes, `_reckoning` what must have become of it in the end.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM, SIGUSR1
from typing import Final

import attrs

from trio_gateway.testing import check_invariants

from ._crowd import AGENT, Crowd
from ._limits import fds, status_of
from ._platform import PATIENCE, furnish, open_turns, rows
from ._process import Process, scratch_folder, started, told
from ._reckoning import Reckoning
from ._report import Campaign, Job

CAMPAIGN: Final = Campaign(
    name="soak",
    injects="random kills, stops and restarts under load, with all policies, and minutes of load",
    short="random kills, stops and restarts under load",
    promises=(1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12),
    counted="kills",
    must_see=(
        "killed at boot",
        "killed in the load",
        "killed in the drain",
        "stopped by TERM",
        "stopped by TERM twice",
        "stopped by INT twice",
        "stopped by USR1",
        "restarted by a turn",
        "fed until the input ended",
        "a turn stopped by its user",
        "a turn replaced by a newer message",
        "a message taken by steering",
        "messages answered together",
        "a message refused and given up",
        "a step in doubt",
        "resumed after a crash",
        "resumed after a shutdown",
        "resumed after a restart",
        "a long life",
    ),
)

SIGNALS: Final = {
    "stopped by TERM": (SIGTERM,),
    "stopped by TERM twice": (SIGTERM, SIGTERM),
    "stopped by INT twice": (SIGINT, SIGINT),
    "stopped by USR1": (SIGUSR1,),
}

ENDS: Final = (
    *("killed at boot",) * 3, *("killed in the load",) * 8, *("killed in the drain",) * 6,
    *SIGNALS, "restarted by a turn", "fed until the input ended",
)  # fmt: skip
"""How lives end, and how often."""

STATES: Final = {
    "stops": "a turn stopped by its user",
    "replaced": "a turn replaced by a newer message",
    "taken_by_steering": "a message taken by steering",
    "answered_together": "messages answered together",
    "refused": "a message refused and given up",
    "in_doubt": "a step in doubt",
    "resumed_crash": "resumed after a crash",
    "resumed_shutdown": "resumed after a shutdown",
    "resumed_restart": "resumed after a restart",
}
"""Figures of the account without which it has not proved much."""

POLICIES: Final = ("steer", "interrupt", "collect", "queue", "reject")

CONFIG: Final = """
[resume]
max_crashes = 1000000
max_interruptions = 1000000
within = "none"

[drain]
grace = "300ms"
budget = "2s"

[limits]
open_per_session = 100_000

[log]
level = "warning"
"""
"""Killed at random, an innocent turn may well be open at three crashes in a row."""

STOP_AT_MOST: Final = 2.0 + 3.0
"""Seconds: the budget, and what a machine in company may add."""


@attrs.define(eq=False)
class World:
    """One store and what happens to it."""

    folder: Path
    number: int
    crowd: Crowd
    dice: random.Random
    open_before: dict[int, dict[int, str]] = attrs.field(factory=dict[int, dict[int, str]])
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])
    ends: list[str] = attrs.field(factory=list[str])
    policies: list[str] = attrs.field(factory=list[str])
    growth: Growth | None = None

    def whole(self, plan: Plan) -> None:
        """Everything, and the account of it."""
        deadline = time.monotonic() + plan.short_lives
        for number in itertools.count():
            self.short_life()
            if number % 20 == 0:
                check_invariants(self.crowd.store)
            if time.monotonic() > deadline:
                break
        self.long_life(plan)
        self.last_life()
        if self.growth is not None:
            self.growth.check()
        self.figures += Reckoning(self.crowd, self.open_before, self.crowd.life).check()
        for figure, state in STATES.items():
            if self.figures[figure]:
                self.seen[state] += self.figures[figure]

    # ----- lives

    @contextmanager
    def alive(self, policy: str) -> Generator[Process]:
        """One life; at its end the process is gone, and has written all that it will."""
        people = self.crowd
        people.life += 1
        people.policy, people.stopping = policy, False
        self.open_before[people.life] = self._open_turns()
        env = {
            "LIFE": str(people.life),
            "TRIO_GATEWAY_TURNS__BUSY": policy,
            "TMPDIR": str(self.folder / "tmp"),
        }
        with started(people, env=env, again=0.02) as gateway:
            yield gateway
            if gateway.alive:
                gateway.kill()
            gateway.wait()
        self.figures["lives"] += 1

    def _open_turns(self) -> dict[int, str]:
        """A store whose maker was killed has nothing open."""
        if not self.crowd.store.exists():
            return {}
        made = rows(self.crowd.store, "SELECT 1 FROM sqlite_schema WHERE name = 'turn'")
        return open_turns(self.crowd.store) if made else {}

    def short_life(self) -> None:
        """A life that ends soon, in one of all ways."""
        if not self.ends:
            self.ends = list(ENDS)
            self.dice.shuffle(self.ends)
        if not self.policies:
            self.policies = list(POLICIES)
            self.dice.shuffle(self.policies)
        end = self.ends.pop()
        with self.alive(self.policies.pop()) as gateway:
            getattr(self, f"_{end.partition(' ')[0]}")(gateway, end)
        self.seen[end] += 1

    def feed(self, gateway: Process, seconds: float) -> bool:
        """Keep it busy for so long. False: it has left."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not gateway.send(*self.crowd.top_up()):
                return False
            with self.crowd.news:
                self.crowd.news.wait(min(left, 0.02))
        return True

    def _serves(self, gateway: Process) -> None:
        """Feed it until it says something."""
        heard = len(self.crowd.taken) + len(self.crowd.heard)
        deadline = time.monotonic() + PATIENCE
        while len(self.crowd.taken) + len(self.crowd.heard) == heard:
            assert time.monotonic() < deadline, f"says nothing\n{gateway.story}"
            assert self.feed(gateway, 0.02), gateway.story

    # ----- how lives end

    def _killed(self, gateway: Process, end: str) -> None:
        if end != "killed at boot":
            self._serves(gateway)
        self.feed(gateway, self.dice.random() * 0.6)
        if end == "killed in the drain":
            self.crowd.stopping = True
            gateway.signal(SIGTERM)
            self.feed(gateway, self.dice.random() * 0.4)
        if gateway.alive:
            gateway.kill()
            self.figures["kills"] += 1

    def _stopped(self, gateway: Process, end: str) -> None:
        self._serves(gateway)
        self.feed(gateway, self.dice.random() * 0.5)
        self.crowd.stopping = True
        began = time.monotonic()
        gateway.signal(*SIGNALS[end])
        self.feed(gateway, self.dice.random() * 0.2)
        self._left(gateway, 75 if SIGUSR1 in SIGNALS[end] else 0)
        took = time.monotonic() - began
        assert took < STOP_AT_MOST, f"a stop took {took:.1f} s\n{gateway.story}"
        self.figures["stopped_in_order"] += 1

    def _restarted(self, gateway: Process, end: str) -> None:
        self._serves(gateway)
        with self.crowd.news:
            line = self.crowd.new(f"asks-{self.crowd.life}", "restarts")
            self.crowd.stopping = True
        gateway.send(line)
        self.feed(gateway, 0.1)
        self._left(gateway, 75)

    def _fed(self, gateway: Process, end: str) -> None:
        self._serves(gateway)
        self.feed(gateway, self.dice.random() * 0.5)
        gateway.end_input()
        self._left(gateway, 0)

    def _left(self, gateway: Process, code: int) -> None:
        left_with = gateway.wait()
        assert left_with == code, f"left with {left_with} instead of {code}\n{gateway.story}"

    # ----- a long life, and the last one

    def long_life(self, plan: Plan) -> None:
        """Undisturbed, under the same load all the time, watched from outside."""
        policy = POLICIES[self.number % len(POLICIES)]
        with self.alive(policy) as gateway:
            self._serves(gateway)
            self._warm_up(gateway, plan)
            growth = Growth(policy, plan.long_life)
            while growth.goes_on:
                assert self.feed(gateway, 0.2), gateway.story
                growth.look(gateway.pid, self.crowd, self.folder)
            self.crowd.stopping = True
            gateway.signal(SIGTERM)
            self._left(gateway, 0)
        self.seen["a long life"] += 1
        self.growth = growth

    def _warm_up(self, gateway: Process, plan: Plan) -> None:
        """Until every session was seen, and every cache is full."""
        began, enough = time.monotonic(), len(self.crowd.taken) + plan.warm_up
        while len(self.crowd.taken) < enough and time.monotonic() < began + PATIENCE:
            assert self.feed(gateway, 0.2), gateway.story

    def last_life(self) -> None:
        """What anybody still wants is accepted, and everything is answered."""
        with self.alive("queue") as gateway:
            self.crowd.wait_for(lambda: self.crowd.idle, "acceptance of all")
            gateway.end_input()
            self._left(gateway, 0)


def make_world(folder: Path, seed: int, number: int) -> World:
    """A new one, in that folder."""
    furnish(folder, CONFIG, AGENT)
    (folder / "tmp").mkdir()
    dice = random.Random(f"{seed} {number}")
    return World(folder, number, Crowd(folder, dice), dice)


# ----- does it grow?


MAY_GROW_KB: Final = 1536
"""What caches that fill up late may add."""

MAY_GROW_PER_MESSAGE: Final = 50
"""Bytes. A turn that is not let go is twenty times as much."""

WAL_AT_MOST_KB: Final = 64 * 1024


@attrs.define
class Growth:
    """What a process uses while it lives, and how many messages it has taken meanwhile."""

    policy: str
    seconds: float
    began: float = attrs.field(factory=time.monotonic)
    taken: list[int] = attrs.field(factory=list[int])
    rss_kb: list[int] = attrs.field(factory=list[int])
    fds: list[int] = attrs.field(factory=list[int])
    threads: list[int] = attrs.field(factory=list[int])
    files: list[int] = attrs.field(factory=list[int])
    wal_kb: list[int] = attrs.field(factory=list[int])

    @property
    def goes_on(self) -> bool:
        """Whether there is more to see."""
        return time.monotonic() < self.began + self.seconds

    def look(self, pid: int, people: Crowd, folder: Path) -> None:
        """Take one sample."""
        self.taken.append(len(people.taken))
        self.rss_kb.append(status_of(pid, "VmRSS"))
        self.threads.append(status_of(pid, "Threads"))
        self.fds.append(len(fds(pid)))
        self.files.append(sum(len(files) for _, _, files in os.walk(folder)))
        self.wal_kb.append(people.store.with_name("gateway.db-wal").stat().st_size >> 10)

    @property
    def quarter(self) -> int:
        """Samples in a quarter of the time."""
        return max(1, len(self.taken) // 4)

    @property
    def grown_kb(self) -> float:
        """From the second quarter of the time to the last."""
        early = self.rss_kb[self.quarter : 2 * self.quarter] or self.rss_kb
        return statistics.median(self.rss_kb[-self.quarter :]) - statistics.median(early)

    def check(self) -> None:
        """Raise `AssertionError` where it has grown."""
        n = self.quarter
        messages = (self.taken[-1] - self.taken[0]) / 2
        allowed = MAY_GROW_KB + messages * MAY_GROW_PER_MESSAGE / 1024
        assert self.grown_kb <= allowed, (
            f"memory grew by {self.grown_kb} kB over {messages:.0f} messages"
            f" ({self.policy}): {self.rss_kb}"
        )
        # The least of a time: what is open for a moment only is not kept.
        for what, counts in (("descriptors", self.fds), ("threads", self.threads)):
            assert min(counts[-n:]) <= min(counts[:n]), f"more {what} ({self.policy}): {counts}"
        assert self.files[-1] <= self.files[0], f"more files ({self.policy}): {self.files}"
        assert max(self.wal_kb) <= WAL_AT_MOST_KB, f"a long WAL ({self.policy}): {self.wal_kb}"

    def figures(self) -> dict[str, int]:
        """What is worth telling."""
        per_message = self.grown_kb * 2048 / max(1, self.taken[-1] - self.taken[0])
        return {
            "long_life_messages": self.taken[-1] - self.taken[0],
            "rss_mb_start": round(self.rss_kb[0] / 1024),
            "rss_mb_end": round(self.rss_kb[-1] / 1024),
            "grown_bytes_per_message": round(per_message),
            "fds": max(self.fds),
            "threads": max(self.threads),
            "wal_mb": round(max(self.wal_kb) / 1024),
        }


# ----- the whole


@attrs.frozen
class Plan:
    """How much of what: seconds of short lives, messages before a long life is watched, seconds for
    which it is."""

    short_lives: float
    warm_up: int
    long_life: float


def run(job: Job) -> None:
    """So many worlds beside each other; each is short lives, a long one, and the last one."""
    plan = Plan(job.amount(4, 48, 380), job.amount(0, 5_000, 20_000), job.amount(2, 20, 180))
    numbers = [int(job.only)] if job.only is not None else list(range(job.jobs))
    with ThreadPoolExecutor(len(numbers)) as pool:
        lived = list(pool.map(partial(_live, job.seed, plan), numbers))
    grown = [world.growth for world, _ in lived if world.growth is not None]
    if grown:
        # Not sums: of the one that grew most.
        job.report.count(**max(grown, key=lambda growth: growth.grown_kb).figures())
    for number, (world, failure) in zip(numbers, lived, strict=True):
        job.report.count(**world.figures)
        job.report.seen.update(world.seen)
        if failure is not None:
            job.report.fail(str(number), failure)


def _live(seed: int, plan: Plan, number: int) -> tuple[World, str | None]:
    """One world from its beginning to its account; and what does not add up."""
    with scratch_folder() as folder:
        world = make_world(folder, seed, number)
        try:
            world.whole(plan)
        except Exception as error:
            return world, told(error)
    return world, None
