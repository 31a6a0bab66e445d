"""SIGKILL at every I/O call of a life: in its boot, while it takes messages in, in the marking, the
drain and each settle, before the call and after it; and two more kills in the boots that recover.

A point is `ROUND:MOMENT:CALL`, `2:after:137` for one: in the story of round 2, right after the
137th call of a life. A sweep goes up from the first call until a life makes fewer and ends by
itself. The threads are real, and so the numbers move a little from one run to the next. Therefore a
failure also names the call and where in the story it was made, and `--only` tries the numbers
around until a life dies there again.

See `_killed_lives` for what happens at a point, `_deaths` and `_worlds` for what must be true.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

from ._killed_lives import LIFE_AT_MOST, LIVES, MOMENTS, Outcome, Point
from ._report import Campaign, Job, Skip
from ._sweeps import Sweeps, same_gateway, work_off

CAMPAIGN: Final = Campaign(
    name="kill-io",
    injects="SIGKILL before and after every I/O call of boot, load, marking, drain and settle",
    short="SIGKILL at I/O calls",
    promises=(1, 2, 3, 4, 5, 6, 7, 8, 9, 12),
    counted="points",
    must_see=(
        "killed while the store is made",
        "killed in a boot that finds open turns",
        "killed in a boot that has charged them",
        "killed between the stop and the marking",
        "killed in the drain, some turns settled, some open",
        "killed with a message accepted in the drain",
        "killed after the drain",
        "booted with a suspect",
        "resumed after a crash",
        "resumed after a shutdown",
    ),
)

SOURCE: Final = Path(__file__).with_name("_killat.c")

PATIENCE: Final = LIVES * LIFE_AT_MOST + 30.0
"""Seconds that a point may take."""

AROUND: Final = 30
"""How far from its number a call is looked for again."""

TRIES: Final = 20
"""How many lives die at the same call before it counts as one that breaks nothing."""


def run(job: Job) -> None:
    """See the module."""
    with library() as preloaded, ExitStack() as stack:
        crew = [stack.enter_context(server(preloaded)) for _ in range(max(1, job.jobs))]
        if job.only is not None:
            repeat(job, crew[0], job.only)
        else:
            sweep(job, crew)


def sweep(job: Job, crew: list[Server]) -> None:
    """From the first call upwards, after it and before it, round after round, until there were
    enough; the last sweep is finished. A quick one takes long strides."""
    stride = job.amount(24, 1, 1)
    sweeps = Sweeps(
        ((round, moment) for round in itertools.count() for moment in MOMENTS),
        first=lambda key: random.Random(f"{job.seed} {key}").randint(1, stride),
        stride=stride,
        enough=job.amount(80, 3_000, 20_000),
    )

    def attempt(server: Server, point: tuple[tuple[int, str], int]) -> Outcome:
        return server.attempt(_point(job.seed, *point[0], point[1]))

    def heard(point: tuple[tuple[int, str], int], outcome: Outcome) -> None:
        if outcome.ended:
            sweeps.ended(point[0])
        tell(job, f"{_point(job.seed, *point[0], point[1])}:{outcome.died_at}", outcome)

    work_off(sweeps, crew, attempt, heard)
    job.report.count(sweeps=sweeps.done)


def _point(seed: int, round: int, moment: str, call: int) -> Point:
    return Point(seed=seed, round=round, moment=moment, call=call)


# ----- trying them


@attrs.frozen
class Server:
    """A process that tries points, see `_killed_lives`."""

    process: subprocess.Popen[bytes]
    log: Path

    def attempt(self, point: Point) -> Outcome:
        """Try one point. A server that does not answer has failed, too."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = b""
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(attrs.asdict(point)).encode() + b"\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], PATIENCE)[0]:
                answer = self.process.stdout.readline()
        if not answer:
            return Outcome(failure=f"the server said nothing\n{self.log.read_text()[-3000:]}")
        return Outcome(**json.loads(answer))


def tell(job: Job, name: str, outcome: Outcome) -> None:
    """Count an outcome, or report its failure."""
    job.report.count(**outcome.figures)
    job.report.saw(*outcome.seen)
    if outcome.failure:
        job.report.fail(name, outcome.failure)


def repeat(job: Job, server: Server, name: str) -> None:
    """Try one point again; the lives after the first aim at where they aimed.

    Where the name says at which call the life died, the numbers around it are tried too, until one
    fails again, or until so many lives have died at that very call and nothing was amiss.
    """
    round, moment, call, *died_at = name.split(":", 3)
    number = int(call)
    point = Point(seed=job.seed, round=int(round), moment=moment, call=number, recovery=number)
    there = 0
    for distance in distances() if died_at else (0,):
        found = server.attempt(attrs.evolve(point, call=max(1, number + distance)))
        is_there = not died_at or found.died_at == died_at[0]
        there += is_there
        if found.failure or is_there:
            tell(job, name, found)
        if found.failure or there == TRIES:
            return
    if not there:
        job.report.fail(name, "no life died there: the story has changed")


def distances() -> Iterator[int]:
    """0, again and again, and ever further away in between."""
    for distance in range(AROUND + 1):
        yield from (0, distance, -distance)


# ----- the machinery


@contextmanager
def library() -> Generator[Path]:
    """`_killat.c`, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Skip("there is no C compiler: install gcc (or anything that is called cc)")
    if sys.platform != "linux":
        raise Skip("it puts a library in front of the C library, as only Linux lets it: use Linux")
    with tempfile.TemporaryDirectory(prefix="killat-") as folder:
        target = Path(folder) / "killat.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-ldl"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if made.returncode:
            raise Skip(f"{compiler} cannot compile {SOURCE.name}: {made.stderr[-500:]}")
        yield target


@contextmanager
def server(preloaded: Path) -> Generator[Server]:
    """A server; it is gone after the block."""
    log = preloaded.with_name(f"log-{len(list(preloaded.parent.iterdir()))}.txt")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}._killed_lives"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={
                **os.environ,
                **same_gateway(),
                "LD_PRELOAD": str(preloaded),
                "PYTHONHASHSEED": "0",
            },
        )
    try:
        yield Server(process, log)
    finally:
        with suppress(BrokenPipeError):
            process.communicate(timeout=PATIENCE)
        if process.poll() is None:
            process.kill()
            process.wait()
