"""Bad input at every door of the real gateway: whatever comes in costs one clear error, nothing
that was accepted before is lost, and what is healthy beside it goes on (promise 14).

    jsonl      lines, through pipes, thousands a life        names      session names, ids, senders
    process    lines, through the real command               texts      there and back, in parts
    config     gateway.toml and the environment              agents     what agents do
    commands   words on a command line                       channels   what channels do
    pages      damaged files of a store                      hooks      what authorisation answers
    rows       insane rows of a store                        http       requests, bytes, frames

A point is a door and a number, `pages:17`: one batch of inputs, decided by the seed, the door and
the number, whatever else is run. Each batch runs in a process of its own kind beside others, which
is ended if it hangs, and whose death is a failure like any other.
"""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Final

import attrs
from hypothesis.configuration import set_hypothesis_home_dir

from . import (
    _bad_code,
    _bad_commands,
    _bad_http,
    _bad_lines,
    _bad_pages,
    _bad_rows,
    _bad_words,
)
from ._bad_lives import Batch, in_memory, story
from ._report import Campaign, Job

CAMPAIGN: Final = Campaign(
    name="bad-input",
    injects="bad input at every door: lines, requests, frames, names, texts, configurations,"
    " commands, agents, channels, hooks, damaged files, insane rows",
    short="bad input at every door",
    promises=(14, 1),
    counted="inputs",
    must_see=(
        "a last line without a newline",
        "a line longer than any is read",
        "the real command",
        "a life under an odd configuration",
        "a session of an odd name, shown",
        "messages of a channel that is not there",
        "a text in parts",
        "a dead letter",
        "a turn that failed alone",
        "a turn put aside because it was not allowed any more",
        "a damaged file refused, and left as it was",
        "a boot on a damaged file",
        "a store that is nobody's, refused",
        "a damaged session that goes on",
    ),
)

PATIENCE: Final = 180.0
"""Real seconds that a batch may take on a busy machine, before it counts as hanging."""


@attrs.frozen
class Door:
    """Where bad input comes in: in batches of how many, and how many batches. A batch is the same
    in every size of the campaign."""

    try_out: Callable[[Batch], None]
    batch: int
    quick: int
    ci: int
    long: int


DOORS: Final[Mapping[str, Door]] = {
    "pages": Door(_bad_pages.pages, 40, 3, 80, 1000),
    "rows": Door(_bad_rows.insane_rows, 40, 4, 80, 1000),
    "config": Door(_bad_commands.config, 250, 1, 40, 400),
    "agents": Door(_bad_code.agents, 200, 1, 20, 200),
    "texts": Door(_bad_words.texts, 250, 1, 24, 240),
    "channels": Door(_bad_code.channels, 250, 1, 20, 200),
    "http": Door(_bad_http.http, 600, 1, 24, 600),
    "hooks": Door(_bad_code.hooks, 300, 1, 12, 120),
    "commands": Door(_bad_commands.commands, 150, 1, 10, 100),
    "names": Door(_bad_words.names, 400, 1, 30, 300),
    "process": Door(_bad_lines.process, 400, 1, 8, 80),
    "jsonl": Door(_bad_lines.jsonl, 1500, 1, 34, 330),
}
"""The slow ones first, so that none of them is alone at the end."""


def run(job: Job) -> None:
    """Run every batch, or the one that was named."""
    todo: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    done: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
    points = list(_points(job))
    for point in points:
        todo.put(point)
    with tempfile.TemporaryDirectory(prefix="bad-input-", dir=in_memory()) as root:
        hands = [_Hand(job.seed, Path(root), todo, done) for _ in range(min(job.jobs, len(points)))]
        try:
            for _ in points:
                _report(job, done.get(timeout=2 * PATIENCE))
        finally:
            for hand in hands:
                hand.stop()


def _points(job: Job) -> Iterator[tuple[str, int]]:
    """Every batch, as a door and a number."""
    if job.only is not None:
        named, _, number = job.only.partition(":")
        if named not in DOORS or not number.isdecimal():
            raise ValueError(f"{job.only!r} is no point; one is pages:17, a door is {[*DOORS]}")
        yield named, int(number)
        return
    for name, door in DOORS.items():
        for n in range(job.amount(door.quick, door.ci, door.long)):
            yield name, n


def _report(job: Job, outcome: _Outcome) -> None:
    job.report.figures.update(outcome.figures)
    job.report.seen.update(outcome.seen)
    job.report.count(batches=1)
    if outcome.failure is not None:
        job.report.fail(outcome.point, outcome.failure)


# ----- one batch


@attrs.frozen
class _Outcome:
    """What came of one batch."""

    point: str
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])
    failure: str | None = None


def try_batch(name: str, number: int, seed: int, root: Path, size: int | None = None) -> _Outcome:
    """Run one batch in this process, in a folder of its own below `root`. Another `size` makes
    another batch of it, for a short try."""
    door = DOORS[name]
    failure: str | None = None
    with tempfile.TemporaryDirectory(dir=root) as folder:
        batch = Batch(name, number, size or door.batch, seed, Path(folder))
        try:
            door.try_out(batch)
        except AssertionError as error:
            failure = str(error) or story(error)
        except Exception as error:
            failure = story(error)
    return _Outcome(f"{name}:{number}", batch.figures, +batch.seen, failure)


# ----- processes


class _Hand(threading.Thread):
    """Has a process work through what is to be done; takes another one when it hangs or dies."""

    def __init__(
        self,
        seed: int,
        root: Path,
        todo: queue.SimpleQueue[tuple[str, int]],
        done: queue.SimpleQueue[_Outcome],
    ) -> None:
        super().__init__(daemon=True)
        self._seed = seed
        self._root = root
        self._todo = todo
        self._done = done
        self._stopped = False
        self._process: SpawnProcess | None = None
        self.start()

    def run(self) -> None:
        """Until there is nothing left."""
        while not self._stopped:
            try:
                name, number = self._todo.get_nowait()
            except queue.Empty:
                break
            self._done.put(self._try(name, number))
        self._end()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._stopped = True
        process = self._process
        if process is not None:
            process.kill()
        self.join(30.0)

    def _try(self, name: str, number: int) -> _Outcome:
        try:
            pipe = self._ready()
            pipe.send((name, number))
            if pipe.poll(PATIENCE):
                outcome: _Outcome = pipe.recv()
                return outcome
            failure = f"the batch did not end within {PATIENCE:.0f} s"
        except (EOFError, OSError):
            failure = f"the process died: {self._exit_code()}"
        self._end()
        return _Outcome(f"{name}:{number}", failure=failure)

    def _exit_code(self) -> int | None:
        process = self._process
        if process is None:
            return None
        process.join(5.0)
        return process.exitcode

    def _ready(self) -> Connection:
        """The pipe to a process that waits for something to do."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, far_end = context.Pipe()
            args = (far_end, self._seed, self._root)
            self._process = context.Process(target=_serve, args=args, daemon=True)
            self._process.start()
            far_end.close()
        return self._pipe

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join(10.0)
            self._pipe.close()


def _serve(pipe: Connection, seed: int, root: Path) -> None:
    """The life of such a process: one batch after the other, until nobody asks any more."""
    set_hypothesis_home_dir(root)
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        pipe.send(try_batch(name, number, seed, root))
