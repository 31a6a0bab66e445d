"""Every checkpoint of a turn cancelled: a turn with steps, says and checkpoints is cancelled at its
first checkpoint, its second, and so on until it has no more; in every way in which a turn is
cancelled. Each time nothing may be lost, nothing doubled, and it resumes, or is over for good."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import apsw
import attrs
import pytest
import trio
import trio.testing
from test_crash_points import check_steps, remembering
from trio.testing import MockClock
from worlds import (
    all_ended,
    answered_once,
    boot,
    exactly_the_interrupted_resumed,
    noted,
    rows,
    shown_to,
)

from trio_gateway import Busy, Gateway, Message, SessionKey, Settings, StoreIOError, Turn
from trio_gateway._policy import SORRY_TIME
from trio_gateway.testing import GatewayOpener, Life, VirtualClock, World

SESSION = SessionKey("memory", "ada")


@attrs.define(eq=False)
class Trigger(trio.abc.Instrument):
    """Does something at the n-th checkpoint of a task, at the moment when the task yields."""

    at: int
    do: Callable[[], object]
    task: trio.lowlevel.Task | None = None
    seen: int = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.seen += 1
            if self.seen == self.at:
                self.do()

    @property
    def reached(self) -> bool:
        return self.seen >= self.at


@attrs.define(eq=False)
class Case:
    """One run: a world, the gateway that lives in it, and what cancels the turn."""

    world: World
    gateway: Gateway | None = None
    nursery: trio.Nursery | None = None
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    @property
    def running(self) -> Gateway:
        assert self.gateway is not None
        return self.gateway

    def start(self, call: Callable[..., Awaitable[object]], *args: object) -> None:
        assert self.nursery is not None
        self.nursery.start_soon(call, *args)


Cancel: TypeAlias = "Callable[[Case], object]"


async def run(
    folder: Path, at: int, cancel: Cancel, settings: Settings, clock: VirtualClock | None
) -> tuple[World, bool]:
    """Cancel the turn at one checkpoint, and then boot again and see it through; whether there was
    such a checkpoint."""
    world = World(folder / str(at))
    world.folder.mkdir()
    opener = GatewayOpener(store=world.store, clock=clock, inline_store=clock is not None)
    life = Life(world=world, number=1, open_gateway=opener)
    case = Case(world)
    trigger = Trigger(at, lambda: cancel(case))
    trio.lowlevel.add_instrument(trigger)

    async def act(life: Life, turn: Turn) -> str:
        if trigger.task is None:
            trigger.task = trio.lowlevel.current_task()
        return await remembering(life, turn)

    channel = world.platform()
    with case.scope:
        async with (
            trio.open_nursery() as case.nursery,
            boot(life, act, channels=[channel], settings=settings) as case.gateway,
        ):
            await channel.receive("ada", "m1", "go")
            await case.gateway.wait_idle()
    trio.lowlevel.remove_instrument(trigger)
    async with boot(life, act, channels=[channel], settings=settings) as gateway:
        await gateway.wait_idle()
    return world, trigger.reached


async def at_every_checkpoint(
    folder: Path,
    cancel: Cancel,
    check: Callable[[World], None],
    settings: Settings | None = None,
    *,
    threaded: bool = False,
) -> int:
    """Run until there is no such checkpoint any more, checking each time; how many there were."""
    clock = None if threaded else VirtualClock()
    at, reached = 0, True
    while reached:
        at += 1
        world, reached = await run(folder, at, cancel, settings or Settings(), clock)
        check(world)
    return at - 1


def resumed_and_answered(world: World) -> None:
    all_ended(world)
    answered_once(world, "m1")
    exactly_the_interrupted_resumed(world)
    check_steps(world)
    said, answer = shown_to(world, "ada")
    assert said == "On it."
    assert answer in ("seen, paid, shot", "seen, paid, in doubt")


def is_stopping(case: Case) -> None:
    case.running.request_stop(now=True)


def is_left(case: Case) -> None:
    case.scope.cancel()


@pytest.mark.parametrize("cancel", [is_stopping, is_left])
async def test_p05_p08_a_stop_at_every_checkpoint_resumes_the_turn(
    memory_path: Path, autojump_clock: MockClock, cancel: Cancel
) -> None:
    assert await at_every_checkpoint(memory_path, cancel, resumed_and_answered) > 10


@pytest.mark.parametrize("cancel", [is_stopping, is_left])
async def test_p05_p08_the_same_while_a_thread_writes(memory_path: Path, cancel: Cancel) -> None:
    count = await at_every_checkpoint(memory_path, cancel, resumed_and_answered, threaded=True)
    assert count > 10


async def test_p05_a_stop_without_any_window_at_every_checkpoint_resumes_the_turn(
    memory_path: Path, autojump_clock: MockClock
) -> None:
    """The drain ends as it begins: the cancellation follows hard on the mark."""
    settings = Settings(grace=0.0, budget=10.0)
    count = await at_every_checkpoint(memory_path, is_stopping, resumed_and_answered, settings)
    assert count > 10


async def test_p10_a_stop_by_the_user_at_every_checkpoint_is_for_good(
    memory_path: Path, autojump_clock: MockClock
) -> None:
    def cancel(case: Case) -> None:
        case.start(case.running.stop_turn, SESSION)

    def check(world: World) -> None:
        ((state,),) = rows(world.store, "SELECT state FROM message")
        all_ended(world, **({} if state == "answered" else {"m1": "stopped"}))
        exactly_the_interrupted_resumed(world)
        check_steps(world)
        assert len(noted(world, "began")) == 1

    assert await at_every_checkpoint(memory_path, cancel, check) > 10


async def test_a_time_limit_at_every_checkpoint_ends_the_turn_once(
    memory_path: Path, autojump_clock: MockClock
) -> None:
    """Time passes while the turn waits there: the deadline cancels it at that very checkpoint."""

    def cancel(case: Case) -> None:
        autojump_clock.jump(200)

    def check(world: World) -> None:
        ((state,),) = rows(world.store, "SELECT state FROM message")
        all_ended(world, **({} if state == "answered" else {"m1": "failed"}))
        answered_once(world, "m1")
        exactly_the_interrupted_resumed(world)
        check_steps(world)
        assert (shown_to(world, "ada")[-1] == SORRY_TIME) == (state == "failed")

    settings = Settings(time_limit=100)
    assert await at_every_checkpoint(memory_path, cancel, check, settings) > 10


async def test_p02_a_newer_message_at_every_checkpoint_is_answered_with_the_older_one(
    memory_path: Path, autojump_clock: MockClock
) -> None:
    def cancel(case: Case) -> None:
        message = case.world.platform().message("ada", "m2", "and this")
        case.start(case.running.accept, message)

    def check(world: World) -> None:
        ids = [id for (id,) in rows(world.store, "SELECT id FROM message")]
        all_ended(world)
        answered_once(world, *ids)  # m1 alone, where there was no such checkpoint any more
        exactly_the_interrupted_resumed(world)

    settings = Settings(busy=Busy.INTERRUPT)
    assert await at_every_checkpoint(memory_path, cancel, check, settings) > 10


# ----- who waits for quiet is woken, whoever brought it about


class Gate:
    """A tap that holds commits up on the store's thread, and may fail them."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._held = threading.Event()
        self.failure: Exception | None = None

    def __call__(self, moment: str) -> None:
        if moment == "before":
            self._held.set()
            assert self._open.wait(10)
            if self.failure is not None:
                raise self.failure

    def shut(self) -> None:
        self._held.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def wait_held(self) -> None:
        assert await trio.to_thread.run_sync(self._held.wait, 10)


@pytest.mark.parametrize("fails", [False, True], ids=["a duplicate", "a failing disk"])
async def test_wait_idle_outlasts_an_arrival_that_comes_to_nothing(
    memory_path: Path, fails: bool
) -> None:
    gate = Gate()
    message = Message(session="ada", id="m1", text="hi")

    async def send() -> None:
        try:
            await gateway.accept(message)
        except StoreIOError:
            assert fails

    opener = GatewayOpener(store=memory_path / "gateway.db", tap=gate)
    async with opener(lambda turn: "done") as gateway, trio.open_nursery() as nursery:
        if not fails:
            await gateway.ask(message)
        gate.shut()
        nursery.start_soon(send)
        await gate.wait_held()
        gate.failure = apsw.IOError("EIO") if fails else None
        with trio.fail_after(10):
            async with trio.open_nursery() as waiting:
                waiting.start_soon(gateway.wait_idle)
                await trio.testing.wait_all_tasks_blocked()
                gate.open()
        gate.failure = None
        assert gateway.statistics()["sessions_open"] == 0
