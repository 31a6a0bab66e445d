"""Run an agent through seeded lives, and find the first seed that breaks it.

    bank = []

    async def careless(turn):
        bank.append(turn.message.id)          # the world outside: no crash takes this back
        await trio.sleep(1)
        return "Charged."

    def check(story):
        assert len(bank) == len(set(bank)), f"charged twice: {bank}"

    lives(careless, seeds=1000, check=check)

    LivesFailure: seed 3: charged twice: ['m1', 'm1'] ...

A seed decides everything: when people write, how tasks are scheduled, when the gateway is stopped
or dies, what the disk and the platforms do. So a seed that fails fails again: `seeds=[3]`.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs
import trio

from .. import Settings, Turn
from ._seeded import SeededLives, Trouble

TIMEOUT: Final = 90.0
"""Seconds of real time that one child may take."""

SEEDS_PER_CHILD: Final = 20
"""As far as the world outside can be put back: a fork costs half as much as its lives."""


@attrs.frozen(kw_only=True)
class Fate:
    """What became of one accepted message, over all lives: its one end, the turn that ended it
    (None: none ever took it), and the texts that the platform showed in answer, in order, repeats
    left out. `session` is as `str(turn.session)` says it, `end` is `answered`, `failed`, `stopped`,
    `quarantined` or `expired`. Words to the gateway itself (/stop, ...) are no such messages."""

    session: str
    id: str
    text: str
    end: str
    turn: int | None
    replies: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Story:
    """What an outsider saw of one seed, for a check of one's own."""

    seed: int
    messages: tuple[Fate, ...]

    def ended(self, end: str) -> tuple[str, ...]:
        """The ids of messages that ended so: `answered`, `failed`, `stopped`, ..."""
        return tuple(message.id for message in self.messages if message.end == end)


@attrs.frozen(kw_only=True)
class LivesReport:
    """What was lived. `figures` counts (seeds, lives, deaths, stops, messages, turns, ...), `seen`
    says in how many seeds each interesting state was come through."""

    figures: dict[str, int]
    seen: dict[str, int]
    seconds: float


class LivesFailure(AssertionError):
    """A promise, or a check, did not hold. `seed` repeats it; `trace` is what happened last."""

    def __init__(self, seed: int, what: str, trace: Sequence[str]) -> None:
        story = "\n".join(trace)
        super().__init__(
            f"seed {seed}: {what}\n\nWhat happened (virtual seconds):\n{story}\n\n"
            f"It happens again with seeds=[{seed}]."
        )
        self.seed = seed
        self.what = what
        self.trace: tuple[str, ...] = tuple(trace)


@attrs.frozen(kw_only=True)
class Outcome:
    """What one seed came to."""

    seed: int
    broken: list[str]
    figures: dict[str, int]
    seen: dict[str, int]
    trace: list[str]


def lives(
    agent: Callable[[Turn], Awaitable[str | None]],
    seeds: int | Iterable[int] = 1000,
    *,
    check: Callable[[Story], None] | None = None,
    texts: Sequence[str] = ("hello",),
    settings: Settings | None = None,
    trouble: Trouble | None = None,
    workers: int = 1,
) -> LivesReport:
    """Run `agent` through the lives of many seeds; raise `LivesFailure` for the first that breaks.

    Each seed is a handful of lives of one gateway on one store, the last of them calm, on virtual
    time: people write, and say /stop; platforms and disks fail; the gateway is stopped, or dies.
    After every commit and at every end of a life, all promises are checked against an independent
    model. After the last life, so is your `check`, which raises what it likes. An agent that raises
    breaks no promise: its message ends `failed`, and that is for your check to find.

    `agent` is an async function; whatever it does to Python objects outside of itself is the world
    outside, which no death takes back. Each seed begins with those objects as they are now, in a
    forked child: agent and check run there, and what they change does not come back. An agent that
    uses threads or real I/O works, but virtual time runs on while it waits: stops cut it, and a
    seed may not repeat.

    `seeds`: which, or how many (from 0). `texts`: what people write. `settings`: else the seed
    decides, the busy policy included. `trouble`: how often things go wrong. `workers`: processes at
    once. A seed that takes longer than 90 s, or one life of it 30 s, in real time, is a failure.
    For POSIX.

    Raises `LivesFailure`; `TypeError` if the agent is no async function, `ValueError` for a number
    or a choice that leaves nothing to do, and `RuntimeError` inside a Trio run: it forks, so call
    it from plain code.
    """
    _must_be_usable(agent)
    if workers < 1:
        raise ValueError(f"lives: workers must be 1 or more, not {workers}")
    if isinstance(texts, str) or not texts:
        raise ValueError(f"lives: texts must be several texts to choose from, not {texts!r}")
    began = time.monotonic()
    figures: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    plan = Plan(agent, check, tuple(texts), settings, trouble or Trouble())
    for outcome in explore(plan, _chosen(seeds), workers):
        if outcome.broken:
            raise LivesFailure(outcome.seed, "\n".join(outcome.broken[:5]), outcome.trace)
        figures.update(outcome.figures)
        seen.update(outcome.seen)
    if not figures["seeds"]:
        raise ValueError("lives: no seed was lived; give at least one")
    return LivesReport(figures=dict(figures), seen=dict(seen), seconds=time.monotonic() - began)


def _chosen(seeds: int | Iterable[int]) -> Iterable[int]:
    """The seeds, or the one that `pytest --gateway-seed` names."""
    if one := os.environ.get("GATEWAY_TEST_SEED"):
        return [int(one)]
    return range(seeds) if isinstance(seeds, int) else seeds


def _must_be_usable(agent: object) -> None:
    if trio.lowlevel.in_trio_run():
        raise RuntimeError("lives forks: call it from a plain (not async) test")
    target = agent if iscoroutinefunction(agent) else getattr(agent, "__call__", None)  # noqa: B004
    if not iscoroutinefunction(target):
        raise TypeError(f"lives: expected an async function of a Turn, got {agent!r}")


@attrs.frozen
class Plan:
    agent: Callable[[Turn], Awaitable[str | None]]
    check: Callable[[Story], None] | None
    texts: tuple[str, ...]
    settings: Settings | None
    trouble: Trouble
    forget: Callable[[], None] | None = None
    """Puts the world outside back to its beginning, so that one child can live several seeds."""


def explore(plan: Plan, seeds: Iterable[int], workers: int) -> Iterator[Outcome]:
    """The outcome of each seed, in the order of the seeds."""
    waiting = _chunks(seeds, 1 if plan.forget is None else SEEDS_PER_CHILD)
    running: list[_Child] = []
    with tempfile.TemporaryDirectory(prefix="lives-", dir=_memory()) as folder:
        try:
            while True:
                while len(running) < workers and (chunk := next(waiting, None)) is not None:
                    running.append(_Child(plan, chunk, Path(folder) / str(chunk[0])))
                if not running:
                    return
                yield from running.pop(0).outcomes()
        finally:
            for child in running:
                child.kill()


def _chunks(seeds: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    rest = iter(seeds)
    while chunk := tuple(itertools.islice(rest, size)):
        yield chunk


def _memory() -> str | None:
    """Dying loses nothing here that was written, so a disk that syncs would only cost time."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class _Child:
    """One seed or several, in a process of their own."""

    def __init__(self, plan: Plan, seeds: tuple[int, ...], folder: Path) -> None:
        self._seeds = seeds
        self._folder = folder
        self._read_fd, write_fd = os.pipe()
        with warnings.catch_warnings():
            # Python warns of forking beside threads. The child does without those of its parent.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            os.close(self._read_fd)
            _be_child(plan, seeds, folder, write_fd)
        os.close(write_fd)

    def outcomes(self) -> Iterator[Outcome]:
        """Wait for them."""
        try:
            data, in_time = self._read()
        finally:
            self.kill()
        lines = data.splitlines()
        for seed, line in itertools.zip_longest(self._seeds, lines):
            how = "ended without a word" if in_time else "was not over in time"
            yield Outcome(**json.loads(line)) if line else _broken(seed, f"the seed {how}")

    def _read(self) -> tuple[bytes, bool]:
        """All that the child says, and whether it came to its end."""
        data, deadline = b"", time.monotonic() + TIMEOUT
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._read_fd], [], [], left)[0]:
                chunk = os.read(self._read_fd, 1 << 16)
                if not chunk:
                    return data, True
                data += chunk
        return data, False

    def kill(self) -> None:
        """It is over, or is to be."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._read_fd)
        shutil.rmtree(self._folder, ignore_errors=True)


def _broken(seed: int, how: str) -> Outcome:
    return Outcome(seed=seed, broken=[how], figures={}, seen={}, trace=[])


def _be_child(plan: Plan, seeds: tuple[int, ...], folder: Path, write_fd: int) -> NoReturn:
    gc.disable()  # dead lives are to stay as they are, and the living are short
    try:
        for seed in seeds:
            _tell(write_fd, _outcome_of(plan, seed, folder / str(seed)))
            if plan.forget is not None:
                plan.forget()
    finally:
        os._exit(0)  # whatever has happened: never back into the program that was forked


def _outcome_of(plan: Plan, seed: int, folder: Path) -> Outcome:
    try:
        return live_seed(plan, seed, folder)
    except (Exception, SystemExit):
        return _broken(seed, traceback.format_exc())


def _tell(write_fd: int, outcome: Outcome) -> None:
    data = json.dumps(attrs.asdict(outcome)).encode() + b"\n"
    while data:
        data = data[os.write(write_fd, data) :]


def live_seed(plan: Plan, seed: int, folder: Path) -> Outcome:
    """Live one seed, here."""
    folder.mkdir(parents=True)
    seeded = SeededLives(seed, plan.agent, folder, plan.texts, plan.trouble, plan.settings)
    seeded.run()
    broken = seeded.model.broken
    if not broken and plan.check is not None:
        try:
            plan.check(_story(seeded))
        except AssertionError as error:
            broken = [str(error) or traceback.format_exc()]
        except Exception:
            broken = [traceback.format_exc()]
    return Outcome(
        seed=seed,
        broken=broken,
        figures={"seeds": 1, **seeded.model.figures},
        seen={state: 1 for state, count in seeded.model.seen.items() if count},
        trace=list(seeded.trace) if broken else [],
    )


def _story(seeded: SeededLives) -> Story:
    record = seeded.model.record
    replies: dict[tuple[str, str], list[str]] = {}
    for delivery in seeded.model.arrived.values():
        for id in delivery.in_reply_to:
            replies.setdefault((delivery.session.channel, id), []).append(delivery.text)
    return Story(
        seed=seeded.seed,
        messages=tuple(
            Fate(
                session=f"{row.channel}:{record.sessions[row.session][1]}",
                id=row.id,
                text=_text(record.bodies[key]),
                end=row.state,
                turn=row.turn,
                replies=tuple(replies.get(key, ())),
            )
            for key, row in record.messages.items()
            if row.turn is not None or row.state != "answered"
        ),
    )


def _text(body: Any) -> str:
    return str(json.loads(body)["text"])
