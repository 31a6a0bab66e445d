"""Any move at any moment: Hypothesis plays people, agents, platforms, the host, the disk and death,
one move at a time, against a real gateway; and whatever breaks is told as the shortest story.

The independent model of the promises is the one of `lives`. There, a seed throws dice for everybody
at once; here every single move is chosen, is made while the whole gateway stands still, and is
followed to rest (see `_moves`). A story that breaks a promise is then made shorter: a move that is
not needed is left out, an argument becomes the plainest that will do.

A point is such a story, packed; or the number of a chunk of examples that begin with one seed.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Final, TypeVar

import attrs
import outcome

from ._moves import KINDS, SETTINGS, Choices, Move, PromiseBroken, Story
from ._report import Campaign, Job, Skip
from ._spread import Tally, spread

T = TypeVar("T")

CAMPAIGN: Final = Campaign(
    name="machine",
    injects="one chosen move after the other on virtual time: messages, commands, everything an"
    " agent can do, moods of platforms, failing commits, stops, deaths at commits and steps, boots",
    short="moves chosen by Hypothesis",
    promises=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14),
    counted="examples",
    must_see=(
        "a marking failed",
        "a mixed drain",
        "a reply came again",
        "a step in doubt",
        "a step was remembered",
        "a suspect ran",
        "a turn asked for a restart",
        "a turn took a message",
        "accepted while draining",
        "asked and answered",
        "died while it stopped",
        "died with open turns",
        "left turns behind that did not end",
        "recognised a message sent again",
        "refused bad input",
        "resumed after a crash",
        "resumed after a restart",
        "resumed after a shutdown",
        "stopped by its user",
    ),
)

CHUNK: Final = 35
"""Examples that Hypothesis plays from one seed. With some of them it only looks around: they are
short, or are given up; 18 and more are whole."""

MOVES: Final = 50
"""Moves of one example."""

TRACE: Final = 30
"""How many of the last happenings a failure tells."""


def run(job: Job) -> None:
    """Play all chunks, or one point."""
    if find_spec("hypothesis") is None:
        raise Skip("hypothesis is not installed; pip install hypothesis")
    chunks = job.amount(2, 28, 280)
    points = [str(number) for number in range(chunks)] if job.only is None else [job.only]
    seconds = float(job.amount(10, 60, 300))
    chunk = partial(play, seed=job.seed, seconds=seconds)
    spread(job.report, job.jobs, points, chunk)


def play(
    point: str,
    tally: Tally,
    *,
    seed: int = 0,
    examples: int = CHUNK,
    moves: int = MOVES,
    seconds: float = 60.0,
) -> None:
    """Play the examples of a chunk until one breaks, and take so many seconds to make it shorter.
    Or play the one story that was packed."""
    from ._choosing import explore

    if not point.isdecimal():
        broken = retell(unpack(point))
        if broken is not None:
            tally.fail(point, broken.told())
        return
    begin = seed * 1_000_000 + int(point)
    story = on_a_thread(partial(explore, tally, begin, examples, moves))
    if story is None:
        return
    broken = retell(story)
    if broken is None:
        tally.fail(point, "a story broke, and does not break again:\n" + program(story))
        return
    broken = shorten(broken, time.monotonic() + seconds)
    tally.fail(pack(broken.moves), broken.told())


def on_a_thread(call: Callable[[], T]) -> T:
    """Call this on a thread of its own: one whose Trio run does not let go is lost to others."""
    box: list[outcome.Outcome[T]] = []
    thread = threading.Thread(target=lambda: box.append(outcome.capture(call)), daemon=True)
    thread.start()
    thread.join()
    return box[0].unwrap()


# ----- stories


@attrs.frozen
class Broken:
    """A story that breaks a promise: what broke, and what happened last."""

    moves: Sequence[Move]
    what: str
    trace: Sequence[str]

    @property
    def promise(self) -> str:
        """What kind of failure it is."""
        return self.what.partition(":")[0]

    def told(self) -> str:
        """All of it, for whoever has to find out."""
        trace = "\n".join(self.trace[-TRACE:])
        return f"{self.what}\n\n{program(self.moves)}\n\nAt the end (virtual seconds):\n{trace}"


def program(moves: Sequence[Move]) -> str:
    """A story as it can be read, a move a line."""
    return "\n".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in moves
    )


def pack(moves: Sequence[Move]) -> str:
    """A story as one word."""
    text = json.dumps(moves, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(zlib.compress(text, 9)).decode()


def unpack(word: str) -> list[Move]:
    """The story again. Raises `ValueError`."""
    try:
        found: Any = json.loads(zlib.decompress(base64.urlsafe_b64decode(word)))
    except zlib.error as error:
        raise ValueError(f"{word!r} is no packed story: {error}") from None
    return [(str(name), dict(arguments)) for name, arguments in found]


def retell(moves: Sequence[Move]) -> Broken | None:
    """Tell a story from its beginning to the end of all: how it breaks, or None."""
    return on_a_thread(partial(_retell, moves))


def _retell(moves: Sequence[Move]) -> Broken | None:
    (_, settings), *rest = moves
    story = Story(settings)
    try:
        story.begin()
        for name, arguments in rest:
            story.play(name, arguments)
        story.end()
    except PromiseBroken as error:
        return Broken(story.told, str(error), list(story.world.trace))
    except Exception as error:
        what = f"{error!r}:\n{''.join(traceback.format_exception(error))}"
        return Broken(story.told, what, list(story.world.trace))
    finally:
        story.close()
    return None


# ----- making them shorter


def shorten(broken: Broken, until: float) -> Broken:
    """The same failure, told with fewer and plainer moves; as far as that goes until then."""
    before = None
    while broken is not before and time.monotonic() < until:
        before = broken
        size = len(broken.moves) // 2
        while size:
            broken = _leave_out(broken, size, until)
            size //= 2
        broken = _make_plain(broken, until)
    return broken


def _leave_out(broken: Broken, size: int, until: float) -> Broken:
    """Leave out so many moves in a row, wherever that makes no difference; from the end on."""
    start = len(broken.moves) - size
    while start > 0:
        moves = broken.moves
        broken = _try([*moves[:start], *moves[start + size :]], broken, until)
        start = min(start, len(broken.moves)) - size
    return broken


def _make_plain(broken: Broken, until: float) -> Broken:
    """Give every argument the plainest value that makes no difference."""
    index = 0
    while index < len(broken.moves):
        for key, values in _choices(index, broken.moves[index][0]).items():
            broken = _make_argument_plain(broken, index, key, values, until)
        index += 1
    return broken


def _make_argument_plain(
    broken: Broken, index: int, key: str, values: Sequence[Any], until: float
) -> Broken:
    for value in values if isinstance(values, list) else values[:1]:
        if _is(broken.moves, index, key, value):
            break
        plainer = _try(_changed(broken.moves, index, key, value), broken, until)
        if plainer is not broken:
            return plainer
    return broken


def _choices(index: int, name: str) -> Choices:
    return SETTINGS if index == 0 else KINDS[name].choices


def _is(moves: Sequence[Move], index: int, key: str, value: Any) -> bool:
    """Whether that argument has this value; or there is none any more."""
    return index >= len(moves) or moves[index][1].get(key, value) == value


def _changed(moves: Sequence[Move], index: int, key: str, value: Any) -> Sequence[Move]:
    name, arguments = moves[index]
    return [*moves[:index], (name, {**arguments, key: value}), *moves[index + 1 :]]


def _try(moves: Sequence[Move], broken: Broken, until: float) -> Broken:
    """How this story breaks, if it breaks the same promise; else the one before."""
    found = None if time.monotonic() > until else retell(moves)
    return broken if found is None or found.promise != broken.promise else found
