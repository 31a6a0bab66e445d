"""The public test bench: the suites hold what we ship, and catch what breaks the contract; the
campaign finds the agent that charges twice; the fixtures work."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import apsw
import pytest
import trio
from trio.testing import MockClock

from trio_gateway import (
    Delivery,
    Intake,
    Message,
    RetryLater,
    Settings,
    StoreError,
    Turn,
    TurnState,
    Undeliverable,
)
from trio_gateway.channels.console import ConsoleChannel
from trio_gateway.channels.jsonl import JsonlChannel
from trio_gateway.store import Settled, Settlement, SqliteStore, Store, open_store
from trio_gateway.testing import (
    CHANNEL_CHECKS,
    STORE_CHECKS,
    ChannelBench,
    CrashFailure,
    CrashPoint,
    CrashPoints,
    GatewayOpener,
    Life,
    LifeFailed,
    MakeBench,
    MemoryChannel,
    MemoryIntake,
    OpenStore,
    VirtualClock,
    World,
    check_channel,
    check_invariants,
    check_store,
    die,
    every_crash_point,
    kill_my_agent_anywhere,
    live,
    violations,
)

StoreCheck: TypeAlias = Callable[[OpenStore], Awaitable[None]]
ChannelCheck: TypeAlias = Callable[[MakeBench], Awaitable[None]]


def name_of(check: object) -> str:
    return getattr(check, "__name__", str(check))


# ----- check_store


def stores_in(folder: Path, *, inline: bool) -> OpenStore:
    """Stores by name, in a folder."""

    def open_named(name: str) -> AbstractAsyncContextManager[Store]:
        return open_store(folder / f"{name}.db", inline=inline)

    return open_named


@pytest.mark.parametrize("inline", [False, True], ids=["on a thread", "in the loop"])
@pytest.mark.parametrize("check", STORE_CHECKS, ids=name_of)
async def test_our_store_keeps_the_contract(
    check: StoreCheck, inline: bool, memory_path: Path
) -> None:
    await check(stores_in(memory_path, inline=inline))


class Forgetful(SqliteStore):
    """Breaks one rule: a late attempt settles, too."""

    async def settle(self, end: Settlement) -> Settled:
        ((attempt,),) = self._reader._db.execute(
            "SELECT attempt FROM turn WHERE id = ?", (end.turn,)
        )
        end.attempt = attempt
        return await super().settle(end)


async def test_check_store_catches_a_store_that_breaks_a_rule(tmp_path: Path) -> None:
    @asynccontextmanager
    async def open_forgetful(name: str) -> AsyncGenerator[Store]:
        async with open_store(tmp_path / name, inline=True) as store:
            store.__class__ = Forgetful
            yield store

    with pytest.raises(AssertionError, match="the old attempt cannot settle"):
        await check_store(open_forgetful)


# ----- check_channel: the memory


@asynccontextmanager
async def memory_bench() -> AsyncGenerator[ChannelBench]:
    channel = MemoryChannel()

    async def wait_heard(count: int) -> Sequence[str]:
        return [delivery.text for delivery in await channel.wait_sent(count)]

    async def cut() -> None:
        channel.break_down(ConnectionError("cut"))

    async def fail_once(error: Exception) -> None:
        async def fail(_: Delivery) -> None:
            channel.before_send = None
            await trio.lowlevel.checkpoint()
            raise error

        channel.before_send = fail
        await trio.lowlevel.checkpoint()

    yield ChannelBench(
        channel=channel,
        say=partial(say_in_the_background, channel),
        wait_heard=wait_heard,
        cut=cut,
        be_busy=lambda after: fail_once(RetryLater(after)),
        be_gone=partial(fail_once, Undeliverable("gone")),
    )


async def say_in_the_background(channel: MemoryChannel, session: str, id: str, text: str) -> None:
    """A person does not learn what the store had to say."""
    try:
        await channel.receive(session, id, text)
    except StoreError:
        await trio.lowlevel.checkpoint()


# ----- check_channel: through pipes


class Pipes:
    """A channel's standard input and output, and the other ends of them."""

    def __init__(self) -> None:
        self.stdin, far_in = os.pipe()
        far_out, self.stdout = os.pipe()
        self.input = trio.lowlevel.FdStream(far_in)
        self.output = trio.lowlevel.FdStream(far_out)
        self._buffer = b""
        self.lines: list[bytes] = []

    async def aclose(self) -> None:
        await self.input.aclose()
        await self.output.aclose()
        os.close(self.stdin)
        os.close(self.stdout)

    async def read_line(self) -> None:
        """Read on until there is one line more."""
        while b"\n" not in self._buffer:
            self._buffer += await self.output.receive_some()
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.lines.append(line)


@asynccontextmanager
async def jsonl_bench() -> AsyncGenerator[ChannelBench]:
    pipes = Pipes()

    async def say(session: str, id: str, text: str) -> None:
        line = json.dumps({"session": session, "id": id, "text": text})
        await pipes.input.send_all(line.encode() + b"\n")

    async def wait_heard(count: int) -> Sequence[str]:
        while len(heard := replies()) < count:
            await pipes.read_line()
        return heard

    def replies() -> list[str]:
        events = map(json.loads, pipes.lines)
        return [event["text"] for event in events if event["event"] == "reply"]

    try:
        yield ChannelBench(
            channel=JsonlChannel(pipes.stdin, pipes.stdout),
            say=say,
            wait_heard=wait_heard,
            end_input=pipes.input.aclose,
        )
    finally:
        await pipes.aclose()


@asynccontextmanager
async def console_bench() -> AsyncGenerator[ChannelBench]:
    pipes = Pipes()
    notes = os.open(os.devnull, os.O_WRONLY)

    async def say(session: str, id: str, text: str) -> None:
        await pipes.input.send_all(text.encode() + b"\n")

    async def wait_heard(count: int) -> Sequence[str]:
        while len(pipes.lines) < count:
            await pipes.read_line()
        return [line.decode() for line in pipes.lines]

    try:
        yield ChannelBench(
            channel=ConsoleChannel(
                "ada", read_fd=pipes.stdin, write_fd=pipes.stdout, notes_fd=notes
            ),
            say=say,
            wait_heard=wait_heard,
            end_input=pipes.input.aclose,
        )
    finally:
        await pipes.aclose()
        os.close(notes)


# ----- check_channel: the example


def load_example(name: str) -> Any:
    """A file of examples/, as a module."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def example_bench() -> AsyncGenerator[ChannelBench]:
    example = load_example("custom_channel")
    platform = example.Platform()

    async def say(session: str, id: str, text: str) -> None:
        platform.say(session, text)
        await trio.lowlevel.checkpoint()

    async def wait_heard(count: int) -> Sequence[str]:
        await platform.wait_shown(count)
        return list(platform.shown.values())

    async with trio.open_nursery() as nursery:
        port = await platform.start(nursery)
        yield ChannelBench(channel=example.LineChannel(port), say=say, wait_heard=wait_heard)
        nursery.cancel_scope.cancel()


BENCHES = {
    "memory": memory_bench,
    "jsonl": jsonl_bench,
    "console": console_bench,
    "the example": example_bench,
}
ONE_SESSION_ONLY = {("console", "check_sessions_are_kept_apart")}


@pytest.mark.parametrize("bench", BENCHES)
@pytest.mark.parametrize("check", CHANNEL_CHECKS, ids=name_of)
async def test_our_channels_keep_the_contract(check: ChannelCheck, bench: str) -> None:
    if (bench, name_of(check)) not in ONE_SESSION_ONLY:
        await check(cast("MakeBench", BENCHES[bench]))


class Unpunctual(MemoryChannel):
    """Breaks one rule: it never says that it is connected."""

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        await super().serve(intake, task_status=trio.TASK_STATUS_IGNORED)


class Shuffling(MemoryChannel):
    """Breaks another one: what is sent second arrives first."""

    async def send(self, delivery: Delivery) -> None:
        await super().send(delivery)
        if len(self.sent) == 2:
            self.sent.reverse()


@pytest.mark.parametrize(
    ("channel", "words"),
    [(Unpunctual(), "task_status.started"), (Shuffling(), "texts arrive in order")],
)
async def test_check_channel_catches_a_channel_that_breaks_a_rule(
    channel: MemoryChannel, words: str, autojump_clock: MockClock
) -> None:
    @asynccontextmanager
    async def bench() -> AsyncGenerator[ChannelBench]:
        async def wait_heard(count: int) -> Sequence[str]:
            return [delivery.text for delivery in await channel.wait_sent(count)]

        channel.sent.clear()
        say = partial(say_in_the_background, channel)
        yield ChannelBench(channel=channel, say=say, wait_heard=wait_heard)

    with pytest.raises(AssertionError, match=words):
        await check_channel(bench)


async def test_a_memory_intake_takes_refuses_and_fails() -> None:
    intake = MemoryIntake()
    message = Message(session="a", id="m1", text="hi", channel="memory")
    (receipt,) = await intake.accept(message, cursor="1")
    assert receipt.accepted
    intake.refusal = "full"
    (receipt,) = await intake.accept(message)
    assert (receipt.accepted, receipt.reason) == (False, "full")
    assert await intake.cursor() == "1"
    assert await intake.history("a", 10) == ()
    intake.refused_input("line 1", "no JSON")
    assert intake.bad_input == [("line 1", "no JSON")]
    assert len(await intake.wait_asked(2)) == 2


# ----- kill my agent anywhere


def test_crash_points_are_written_and_read() -> None:
    assert str(CrashPoint(7, "after")) == "7 after"
    assert CrashPoint.parse(" 7 after") == CrashPoint(7, "after")
    points = every_crash_point()
    assert [str(next(points)) for _ in range(3)] == ["1 before", "1 after", "2 before"]
    for bad in ("", "7", "after", "-1 after", "7 during"):
        with pytest.raises(ValueError, match="write it like '7 after'"):
            CrashPoint.parse(bad)


async def charging_scenario(life: Life, agent: Callable[[Turn], Awaitable[str]]) -> None:
    async with life.open_gateway(agent) as gateway:
        await gateway.ask(Message(session="ada", id="m1", text="a book"))


async def wrong(life: Life) -> None:
    """As in the documentation of the campaign: charges, and then forgets that it did."""

    async def agent(turn: Turn) -> str:
        life.world.note(f"charged for {turn.text}")
        return "Charged."

    await charging_scenario(life, agent)


async def right(life: Life) -> None:
    """The same with a step, and a bank that recognises a request by its key."""

    async def charge(what: str, key: str) -> None:
        booking = f"{key}: {what}"
        if booking not in life.world.notes:
            life.world.note(booking)

    async def agent(turn: Turn) -> str:
        await turn.step(charge, turn.text, turn.idempotency_key("charge"))
        return "Charged."

    await charging_scenario(life, agent)


def charged_once(world: World) -> None:
    assert len(world.notes) == 1, f"charged {len(world.notes)} times"


def test_an_agent_that_charges_twice_is_found_with_the_one_line_that_repeats_it() -> None:
    with pytest.raises(CrashFailure, match=r"\Apoint=3 before: charged 2 times") as caught:
        kill_my_agent_anywhere(wrong, charged_once)
    assert caught.value.point == "3 before"
    with pytest.raises(CrashFailure, match=r"\Apoint=3 before: charged 2 times"):
        kill_my_agent_anywhere(wrong, charged_once, only="3 before")
    kill_my_agent_anywhere(wrong, charged_once, only="2 after")


@pytest.mark.parametrize("virtual_time", [False, True])
def test_an_agent_that_charges_in_a_step_passes(virtual_time: bool) -> None:
    report = kill_my_agent_anywhere(right, charged_once, virtual_time=virtual_time)
    assert report.points == report.deaths == 2 * report.commits > 8
    assert report.lives == 2 * report.deaths + 2


def test_a_case_with_several_deaths_is_repeated_by_its_points() -> None:
    report = kill_my_agent_anywhere(right, charged_once, only="3 before, 1 after", deaths=2)
    assert (report.deaths, report.lives) == (2, 3)
    with pytest.raises(ValueError, match="99 before is not reached"):
        kill_my_agent_anywhere(right, charged_once, only="99 before")


def test_a_scenario_that_fails_by_itself_is_no_fault_of_a_death() -> None:
    async def broken(life: Life) -> None:
        raise RuntimeError("a bug of the scenario")

    with pytest.raises(CrashFailure, match=r"point=none: life 1 failed[^$]*a bug of the scenario"):
        kill_my_agent_anywhere(broken, charged_once)


def test_the_world_can_be_looked_at_between_death_and_recovery() -> None:
    seen: list[bool] = []
    kill_my_agent_anywhere(
        right,
        charged_once,
        after_death=lambda world: seen.append(world.store.exists()),
        only="1 after",
    )
    assert seen == [True]


def test_a_recovery_of_its_own_runs_after_a_death(tmp_path: Path) -> None:
    async def recover(life: Life) -> None:
        assert life.number == 2
        async with life.open_gateway(lambda turn: "late") as gateway:
            await gateway.wait_idle()

    kill_my_agent_anywhere(right, lambda world: None, recover=recover, only="2 after")


async def test_a_campaign_refuses_to_fork_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="call it from a plain"):
        kill_my_agent_anywhere(right, charged_once)


def test_a_life_that_hangs_is_ended(tmp_path: Path) -> None:
    async def hang(life: Life) -> None:
        await trio.sleep_forever()

    with pytest.raises(LifeFailed, match=r"life 1 was not over after 0\.2 s"):
        live(hang, World(tmp_path), timeout=0.2)


def test_a_life_can_end_itself(tmp_path: Path) -> None:
    async def suicidal(life: Life) -> None:
        life.world.note("so long")
        die()

    world = World(tmp_path)
    assert live(suicidal, world)
    assert world.notes == ("so long",)


def test_a_tap_counts_and_can_raise_instead_of_killing() -> None:
    def fail() -> None:
        raise apsw.IOError("EIO")

    tap = CrashPoints("2 before", death=fail)
    tap("before")
    tap("after")
    with pytest.raises(apsw.IOError):
        tap("before")
    assert tap.commits == 2


# ----- the worlds and clocks


async def test_what_a_platform_got_survives_in_the_world(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.arrived() == ()
    channel = world.platform(idempotent=False)
    opener = GatewayOpener(store=world.store, channels=[channel])
    async with opener(lambda turn: f"re: {turn.text}"):
        await channel.receive("ada", "m1", "hello")
        await channel.wait_sent(1)
    (arrived,) = World(tmp_path).arrived()
    assert (arrived.session, arrived.text, arrived.final) == ("ada", "re: hello", True)
    assert world.shown() == (arrived,)


async def test_virtual_clocks_follow_trio_and_jump_on_command(autojump_clock: MockClock) -> None:
    clock = VirtualClock()
    before = clock.now()
    await trio.sleep(3600)
    after = clock.now()
    assert after.wall - before.wall == after.up - before.up == 3600 * 1_000_000
    clock.jump(timedelta(days=-1))
    assert clock.now().wall < before.wall
    assert clock.now().up == after.up


# ----- the invariants


async def make_store(path: Path) -> None:
    """Two settled turns, one open one, and a message that waits behind it."""

    async def agent(turn: Turn) -> str:
        if turn.text == "hang":
            await trio.sleep_forever()
        await turn.say("hm")
        return "done"

    async with GatewayOpener(store=path)(agent, settings=Settings(grace=0.0)) as gateway:
        for id in ("m1", "m2"):
            await gateway.ask(Message(session="ada", id=id, text="hi"))
        await gateway.accept(Message(session="ada", id="m3", text="hang"))
        await gateway.accept(Message(session="ada", id="m4", text="after"))


BREAKS = {
    "UPDATE message SET state = 'queued', ended_at = NULL WHERE id = 'm1'": "without an answer",
    "UPDATE message SET state = 'lost' WHERE id = 'm4'": "five ends",
    "UPDATE message SET state = 'running' WHERE id = 'm4'": "belongs to an open turn",
    "UPDATE message SET state = 'failed' WHERE id = 'm1'": "ends as its turn does",
    "UPDATE message SET ended_at = NULL WHERE id = 'm1'": "time of its end",
    "UPDATE turn SET state = 'COMPLETED', reason = NULL WHERE state = 'RESUME_PENDING'": "settled",
    "UPDATE turn SET state = 'RUNNING' WHERE state = 'RESUME_PENDING'": "I5",
    "UPDATE turn SET attempt = 3 WHERE state = 'RESUME_PENDING'": "I1",
    "UPDATE turn SET crashes = 1 WHERE state = 'RESUME_PENDING'": "I2",
    "UPDATE turn SET epoch = 99": "an epoch",
    "UPDATE delivery SET kind = 'apology' WHERE final": "settles with an answer",
    "UPDATE delivery SET turn = (SELECT max(id) FROM turn) WHERE final": "final reply",
    "UPDATE delivery SET parts = 2": "all its parts",
    "UPDATE delivery SET state = 'pending', delivered_at = NULL WHERE id = 1": "arrives in order",
    "UPDATE delivery SET state = 'gone'": "known state",
    "INSERT INTO step VALUES (99, 's', 'done', 'safe', NULL, 1, 1, 1)": "has a result",
}


@pytest.mark.parametrize(("change", "words"), BREAKS.items())
async def test_the_invariants_notice_what_is_broken(
    change: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "gateway.db"
    await make_store(path)
    assert violations(path) == ()
    with pytest.raises(AssertionError, match=r"m4.*queued"):
        check_invariants(path, settled=True)
    db = apsw.Connection(str(path))
    db.execute("PRAGMA ignore_check_constraints = ON")
    db.execute(change)
    db.close()
    with pytest.raises(AssertionError, match=words):
        check_invariants(path)


@pytest.mark.parametrize("back", [0, 3600])
async def test_a_retry_that_is_stopped_breaks_no_invariant_whatever_the_wall_clock_says(
    back: int,
    open_test_gateway: GatewayOpener,
    memory_channel: MemoryChannel,
    gateway_store: Path,
    virtual_clock: VirtualClock,
    autojump_clock: MockClock,
) -> None:
    async def agent(turn: Turn) -> str:
        raise ValueError(turn.text)

    async with open_test_gateway(agent) as gateway:
        await memory_channel.receive("ada", "m1", "hello")
        await gateway.wait_idle()
        virtual_clock.jump(timedelta(seconds=-back))
        again = memory_channel.message("ada", "m2", "/retry")
        await memory_channel.receive_all(again, memory_channel.message("ada", "m3", "/stop"))
    check_invariants(gateway_store, settled=True)


# ----- the plugin


async def test_the_fixtures_boot_several_times_on_one_store(
    open_test_gateway: GatewayOpener,
    memory_channel: MemoryChannel,
    gateway_store: Path,
    virtual_clock: VirtualClock,
    autojump_clock: MockClock,
) -> None:
    async def agent(turn: Turn) -> str:
        await trio.sleep(3600)
        return f"re: {turn.text} ({turn.attempt})"

    async with open_test_gateway(agent, settings=Settings(grace=1.0)):
        await memory_channel.receive("ada", "m1", "hello")
    assert memory_channel.texts() == []
    async with open_test_gateway(agent) as gateway:
        await gateway.wait_idle()
        assert gateway.epoch == 2
    assert memory_channel.texts() == ["re: hello (2)"]
    assert open_test_gateway.store == gateway_store
    assert open_test_gateway.clock is virtual_clock


PLAIN_TEST = """
def test_plain(gateway_store, memory_channel, virtual_clock, open_test_gateway):
    assert not gateway_store.exists()
"""


def test_the_plugin_is_found_and_needs_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(PLAIN_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:trio"]
    run = subprocess.run(
        [*command, "test_plain.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_turn_state_has_a_rule_in_the_invariants() -> None:
    text = Path(__file__).parent.parent.joinpath("trio_gateway/testing/invariants.sql").read_text()
    for state in TurnState:
        assert f"'{state}'" in text
