"""The gateway, driven the way the floor is: the same sessions, the same turns, in one process."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from time import perf_counter

import trio

from trio_gateway import (
    Channel,
    Delivery,
    Intake,
    Limits,
    Message,
    ResumeRules,
    Settings,
    Turn,
    open_gateway,
)

OPEN = Limits(turns=1_000_000, open_messages=10_000_000, deliveries=1_000_000)


class Wire(Channel):
    """A platform that takes every text at once and wakes who waits for it."""

    name = "wire"
    idempotent = True
    notices = False

    def __init__(self) -> None:
        self.intake: Intake | None = None
        self.ready = trio.Event()
        self.waiting: dict[str, trio.Event] = {}
        self.arrived = 0
        self.target = 0
        self.all_arrived = trio.Event()

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Channel`."""
        self.intake = intake
        task_status.started()
        self.ready.set()
        await trio.sleep_forever()

    async def send(self, delivery: Delivery) -> None:
        """See `Channel`."""
        await trio.lowlevel.checkpoint()
        self.arrived += 1
        event = self.waiting.pop(delivery.in_reply_to[0], None)
        if event is not None:
            event.set()
        if self.arrived == self.target:
            self.all_arrived.set()

    async def converse(self, session: int, turns: int) -> None:
        """One person: a message, its answer, the next message."""
        await self.ready.wait()
        assert self.intake is not None
        for n in range(turns):
            message_id = f"{session}-{n}"
            answered = self.waiting[message_id] = trio.Event()
            await self.intake.accept(message(session, message_id))
            await answered.wait()


def message(session: int, message_id: str) -> Message:
    """A message of the benchmark's channel."""
    return Message(session=f"s{session}", id=message_id, text="hello", channel="wire")


async def at_once(turn: Turn) -> str:
    """An agent that returns at once."""
    return "ok"


async def turns_per_second(path: Path, sessions: int, turns_each: int) -> float:
    """Turns per second, each accepted, begun, settled and delivered."""
    wire = Wire()
    async with open_gateway(
        at_once, store=path, channels=[wire], settings=Settings(limits=OPEN)
    ) as gateway:
        began = perf_counter()
        async with trio.open_nursery() as nursery:
            for session in range(sessions):
                nursery.start_soon(wire.converse, session, turns_each)
        took = perf_counter() - began
        await gateway.wait_idle()
    return sessions * turns_each / took


async def fill_with_running(path: Path, count: int, settings: Settings) -> dict[str, float]:
    """Have `count` turns running, then stop with no grace: the stop's phases, in seconds."""

    async def never(turn: Turn) -> str:
        await trio.sleep_forever()
        return ""

    wire = Wire()
    async with open_gateway(never, store=path, channels=[wire], settings=settings) as gateway:
        await wire.ready.wait()
        assert wire.intake is not None
        for start in range(0, count, 1000):
            many = range(start, min(start + 1000, count))
            await wire.intake.accept(*(message(n, f"{n}-0") for n in many))
        gateway.request_stop(now=True)
    assert gateway.report is not None
    assert gateway.report.marked == count
    return gateway.report.phases


async def boot_seconds(path: Path) -> float:
    """How long entering the block takes."""
    began = perf_counter()
    async with open_gateway(at_once, store=path, channels=[]):
        return perf_counter() - began


async def resumed_per_second(path: Path, count: int) -> float:
    """Turns per second, of `count` that were interrupted, from the boot on."""
    wire = Wire()
    wire.target = count
    settings = Settings(limits=OPEN, resume=ResumeRules(concurrency=count))
    began = perf_counter()
    async with open_gateway(at_once, store=path, channels=[wire], settings=settings) as gateway:
        await wire.all_arrived.wait()
        await gateway.wait_idle()
        return count / (perf_counter() - began)


async def memory_after(path: Path, sessions: int) -> float:
    """Resident memory in MB after `sessions` sessions were served once, a hundred at a time."""
    wire = Wire()
    async with open_gateway(
        at_once, store=path, channels=[wire], settings=Settings(limits=OPEN)
    ) as gateway:
        for start in range(0, sessions, 100):
            async with trio.open_nursery() as nursery:
                for session in range(start, min(start + 100, sessions)):
                    nursery.start_soon(wire.converse, session, 1)
        await gateway.wait_idle()
        gc.collect()
        return resident_mb()


def resident_mb() -> float:
    """This process's resident memory, in MB."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


async def drain_overhead_ms(path: Path, count: int, seconds: float) -> float:
    """How much longer than its turns a drain takes, when all `count` of them end together."""
    end = trio.Event()

    async def until(turn: Turn) -> str:
        await end.wait()
        return "ok"

    wire = Wire()
    settings = Settings(limits=OPEN, grace=30.0, budget=60.0)
    async with open_gateway(until, store=path, channels=[wire], settings=settings) as gateway:
        await wire.ready.wait()
        assert wire.intake is not None
        await wire.intake.accept(*(message(n, f"{n}-0") for n in range(count)))
        began = trio.current_time()
        gateway.request_stop()
        with trio.move_on_at(began + seconds):
            await trio.sleep_forever()
        end.set()
    assert gateway.report is not None
    assert len(gateway.report.settled) == count
    drained = gateway.report.phases["mark"] + gateway.report.phases["drain"]
    return (drained - seconds) * 1000
