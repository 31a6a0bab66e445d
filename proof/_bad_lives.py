"""What every door of `bad-input` shares: a batch of inputs, and a gateway's life around it.

A batch is one life (or one store) with many bad inputs, and with good ones beside them. Whatever
must hold is an `AssertionError` where it does not; what the gateway raises and should not passes
through, and is a failure as well.
"""

from __future__ import annotations

import io
import os
import random
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import apsw
import attrs
import trio
import trio.testing

from trio_gateway import (
    Agent,
    Authorize,
    Channel,
    Event,
    Gateway,
    GatewayError,
    Message,
    Settings,
    Turn,
    open_gateway,
)
from trio_gateway._cli import main
from trio_gateway._events import GatewayFailed
from trio_gateway._policy import Limits
from trio_gateway.testing import VirtualClock, check_invariants
from trio_gateway.testing._schedule import schedule_by

E = TypeVar("E", bound=Event)

LONGEST: Final = 30 * 86_400.0
"""Virtual seconds that a life may take: a platform can ask to be left alone for a day."""

ROOM: Final = Limits(open_per_session=1_000_000, open_messages=1_000_000)
"""So much that nothing is refused for want of room."""

PLAIN: Final = Settings(limits=ROOM, commands=False, grace=5.0, budget=10.0)
"""Nothing is a command: what is sent is answered."""

EXIT_CODES: Final = (0, 1, 2, 78)


@attrs.define
class Batch:
    """Some inputs of one door, decided by `seed`, the door's name and `number`."""

    door: str
    number: int
    size: int
    seed: int
    folder: Path
    figures: Counter[str] = attrs.field(factory=Counter[str])
    seen: Counter[str] = attrs.field(factory=Counter[str])
    dice: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.dice = random.Random(f"{self.seed} {self.door} {self.number}")

    @property
    def store(self) -> Path:
        """Where the store of this batch is."""
        return self.folder / "gateway.db"

    def draw_seed(self) -> int:
        """A seed for Hypothesis."""
        return self.dice.getrandbits(48)

    def input(self, outcome: str, times: int = 1) -> None:
        """An input went in, and this came of it."""
        self.figures["inputs"] += times
        self.figures[f"{self.door}_inputs"] += times
        self.figures[f"{self.door}_{outcome}"] += times

    def error(self, error: BaseException) -> None:
        """An error of ours was raised, as it should be."""
        self.figures[f"error_{type(error).__name__}"] += 1


def ours(error: BaseException) -> GatewayError:
    """The error, if it is one that a door may raise: of this library, and in words."""
    if not isinstance(error, GatewayError) or not str(error).strip():
        raise AssertionError(f"no clear error: {error!r}") from error
    return error


def story(error: BaseException) -> str:
    """An error with its traceback, short enough for a report."""
    return "".join(traceback.format_exception(error))[-3500:]


# ----- a life


class Ears:
    """Hears every event of a life."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[E]) -> list[E]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


def in_virtual_time(life: Callable[[], Awaitable[None]]) -> None:
    """Run a life; time passes when there is nothing else to do. Never for ever, and each time in
    the same order."""
    schedule_by(0)

    async def bounded() -> None:
        with trio.fail_after(LONGEST):
            await life()

    trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))


@asynccontextmanager
async def hosted(
    batch: Batch,
    agent: Agent,
    *channels: Channel,
    settings: Settings = PLAIN,
    authorize: Authorize | None = None,
    ears: Ears | None = None,
) -> AsyncGenerator[Gateway, None]:
    """A gateway on the batch's store. However bad its inputs: its own code has not failed."""
    heard = ears or Ears()
    async with open_gateway(
        agent,
        store=batch.store,
        channels=channels,
        settings=settings,
        authorize=authorize,
        listen=heard,
        clock=VirtualClock(),
        inline_store=True,
    ) as gateway:
        yield gateway
    failed = heard.of(GatewayFailed)
    assert not failed, f"the gateway itself failed: {failed[0].error}\n{failed[0].traceback}"


async def whole(batch: Batch, gateway: Gateway, settings: Settings = PLAIN) -> None:
    """Everything that was accepted reaches its end, and nothing has leaked."""
    await gateway.wait_idle()
    left = gateway.statistics()
    slots = left.pop("slots_free")
    assert slots == settings.limits.turns, f"slots leaked: {slots} are free"
    assert not any(left.values()), f"something is still open: {left}"


async def echo(turn: Turn) -> str:
    """Answers with what it was asked."""
    await trio.lowlevel.checkpoint()
    return f"re: {turn.text}"


async def control(gateway: Gateway, id: str, session: str = "control") -> None:
    """A healthy message beside the bad ones is answered."""
    asked = Message(session=session, id=id, text=f"control {id}")
    replies = await gateway.ask(asked)
    assert replies, f"{id} was not answered"
    assert replies[-1].final, replies


def sound(batch: Batch, *, settled: bool = True) -> None:
    """Everything in the store fits together."""
    check_invariants(batch.store, settled=settled)


def rows(store: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """What another process reads in the store."""
    db: Any = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return list(db.execute(sql, values))
    finally:
        db.close()


def clear(folder: Path) -> None:
    """Leave nothing of an earlier life in a folder."""
    for path in folder.iterdir():
        path.unlink()


# ----- the command line, in this process


@attrs.frozen
class Answer:
    """What a command did."""

    code: int
    out: str
    err: str


def command(batch: Batch, *words: str, codes: Iterable[int] = EXIT_CODES) -> Answer:
    """Give a command. It may refuse, clearly, in a few lines; it must not fall over."""
    encoding = batch.dice.choice(("utf-8", "ascii", "latin-1"))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
    except SystemExit as error:
        raise AssertionError(f"{words}: left by SystemExit({error.code!r})") from error
    except Exception as error:
        raise AssertionError(f"{words}: {story(error)}") from error
    answer = Answer(code, _written(out), _written(err))
    assert code in codes, f"{words}: exit code {code}\n{answer.out}\n{answer.err}"
    said = answer.err if code else answer.out
    assert said.strip() or answer.out.strip(), f"{words}: exit code {code}, and not a word"
    assert "Traceback" not in answer.err, f"{words}: {answer.err}"
    assert len(answer.err.splitlines()) < 40, f"{words}: {answer.err}"
    return answer


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return cast("io.BytesIO", stream.buffer).getvalue().decode(stream.encoding)


def in_memory() -> str | None:
    """A folder in memory, where the machine has one: a store there syncs at once."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
