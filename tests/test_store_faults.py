"""Disks that are full, fail, tear and die: typed errors, nothing lost, nothing doubled."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
import trio
from helpers import Log, Script, msg, rows
from trio.testing import MockClock
from worlds import (
    all_ended,
    answered_once,
    boot,
    exactly_the_interrupted_resumed,
    open_turns,
)

from proof._disk import Disk, Fault
from trio_gateway import (
    Event,
    Limits,
    ReceiptStatus,
    ResumeReason,
    Settings,
    StoreError,
    StoreFull,
    StoreInUse,
    StoreIOError,
    Turn,
    open_gateway,
)
from trio_gateway._events import GatewayFailed, SettleDelayed, StoreTrouble
from trio_gateway.store import _writer, open_store
from trio_gateway.testing import (
    CrashPoints,
    GatewayOpener,
    Life,
    MemoryChannel,
    World,
    check_invariants,
    die,
    live,
)
from trio_gateway.testing._world import SurvivingChannel


@pytest.fixture
def disk() -> Iterator[Disk]:
    with Disk() as disk:
        yield disk


# ----- one fault, told in words


@pytest.mark.parametrize(
    ("kind", "error", "words"), [("full", StoreFull, "make room"), ("eio", StoreIOError, "disk")]
)
async def test_p14_a_message_that_cannot_be_written_is_not_accepted_and_can_come_again(
    open_test_gateway: GatewayOpener,
    disk: Disk,
    autojump_clock: MockClock,
    kind: str,
    error: type[StoreError],
    words: str,
) -> None:
    log = Log()
    async with open_test_gateway(Script(open=True), listen=log) as gateway:
        first = await gateway.ask(msg("ada", "m1"))
        disk.fault = Fault(f"{kind} for ever")
        with pytest.raises(error, match=words) as caught:
            await gateway.accept(msg("ada", "m2"))
        assert caught.value.retryable
        (told,) = log.of(StoreTrouble)
        assert (told.operation, told.error) == ("accept", str(caught.value))
        assert gateway.statistics()["messages_open"] == 0
        disk.fault = None
        assert (await gateway.accept(msg("ada", "m2"))).status is ReceiptStatus.ACCEPTED
        await gateway.wait_idle()
        assert await gateway.ask(msg("ada", "m1")) == first


async def test_p06_a_settle_that_cannot_be_written_is_tried_again_and_keeps_its_slot(
    open_test_gateway: GatewayOpener,
    memory_channel: MemoryChannel,
    disk: Disk,
    autojump_clock: MockClock,
) -> None:
    begun: list[str] = []
    log = Log()

    async def agent(turn: Turn) -> str:
        begun.append(turn.message.id)
        if turn.message.id == "m1":
            disk.fault = Fault("full for ever")
        return "re: " + turn.text

    settings = Settings(limits=Limits(turns=1))
    async with open_test_gateway(agent, settings=settings, listen=log) as gateway:
        await memory_channel.receive("a", "m1", "one")
        await trio.sleep(0.001)
        # A second message would not get in; this one was accepted just before.
        assert len(await log.wait_for(SettleDelayed, 5)) == 5
        assert begun == ["m1"]
        assert memory_channel.texts() == []
        assert gateway.statistics()["slots_free"] == 0
        disk.fault = None
        await memory_channel.receive("b", "m2", "two")
        await gateway.wait_idle()
    assert begun == ["m1", "m2"]
    assert memory_channel.texts() == ["re: one", "re: two"]


async def test_p08_a_step_waits_for_a_full_disk_and_is_not_run_twice(
    open_test_gateway: GatewayOpener, disk: Disk, autojump_clock: MockClock
) -> None:
    ran: list[str] = []
    log = Log()

    async def charge() -> str:
        ran.append("charged")
        disk.fault = Fault("full for ever")
        return "receipt"

    async def agent(turn: Turn) -> str:
        result = await turn.step(charge)
        await turn.say("charged")
        return result

    async def make_room() -> None:
        await log.wait_for(StoreTrouble, 3)
        disk.fault = None

    async with open_test_gateway(agent, listen=log) as gateway, trio.open_nursery() as nursery:
        nursery.start_soon(make_room)
        replies = await gateway.ask(msg("ada", "m1"))
    assert [reply.text for reply in replies] == ["charged", "receipt"]
    assert ran == ["charged"]


async def test_p07_an_arrival_that_cannot_be_recorded_is_not_sent_again(
    open_test_gateway: GatewayOpener,
    memory_channel: MemoryChannel,
    disk: Disk,
    autojump_clock: MockClock,
) -> None:
    log = Log()

    async def fill_the_disk(_: object) -> None:
        disk.fault = Fault("full for ever")

    async def make_room() -> None:
        await log.wait_for(StoreTrouble, 3)
        disk.fault = None

    memory_channel.before_send = fill_the_disk
    async with (
        open_test_gateway(Script(open=True), listen=log) as gateway,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(make_room)
        await memory_channel.receive("ada", "m1", "hello")
        await gateway.wait_idle()
    async with open_test_gateway(Script(open=True)) as gateway:
        await gateway.wait_idle()
    assert len(memory_channel.sent) == 1


async def test_p11_a_stop_is_bounded_on_a_disk_that_stays_full(
    open_test_gateway: GatewayOpener, disk: Disk, autojump_clock: MockClock
) -> None:
    agent = Script()
    log = Log()
    settings = Settings(grace=5.0, budget=10.0)
    async with open_test_gateway(agent, settings=settings, listen=log) as gateway:
        await gateway.accept(msg("done", "m1"))
        await gateway.accept(msg("not done", "m2"))
        await agent.wait_begun(2)
        disk.fault = Fault("full for ever")
        agent.release("done")
        began = trio.current_time()
    assert trio.current_time() - began <= 10.0
    disk.fault = None
    assert not log.of(GatewayFailed)
    # Neither end nor mark was written: both resume, as after a crash.
    again = Script(open=True)
    async with open_test_gateway(again) as gateway:
        await gateway.wait_idle()
    reasons = {turn.message.id: turn.resumed and turn.resumed.reason for turn in again.turns}
    assert reasons == {"m1": ResumeReason.CRASH, "m2": ResumeReason.CRASH}
    check_invariants(open_test_gateway.store, settled=True)


async def test_a_checkpoint_of_the_wal_that_fails_harms_nobody(
    open_test_gateway: GatewayOpener,
    disk: Disk,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_writer, "CHECKPOINT_PAGES", 1)
    database = str(open_test_gateway.store)
    failing = Fault("eio for ever", only=lambda operation, file: file == database)
    async with open_test_gateway(Script(open=True)) as gateway:
        disk.fault = failing
        for number in range(5):
            await gateway.ask(msg("ada", f"m{number}"))
        assert failing.reached
        disk.fault = None
        await gateway.ask(msg("ada", "m5"))
    assert rows(open_test_gateway.store, "SELECT count(*) FROM message") == [(6,)]


@pytest.mark.parametrize("where", ["_gather", "commit", "checkpoint_if_due"])
def test_p11_a_writer_that_dies_ends_the_run_and_keeps_nobody_waiting(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """No memory for the thread that writes: everybody would wait for it for ever."""
    of = _writer.ThreadWriter if where == "_gather" else _writer._Transactions
    real = getattr(of, where)
    dying = False

    def fall_over(self: object, *args: object) -> object:
        if dying:
            raise MemoryError
        return real(self, *args)

    monkeypatch.setattr(of, where, fall_over)
    path = memory_path / "gateway.db"
    told: list[StoreError] = []

    async def main() -> None:
        nonlocal dying
        async with open_gateway(Script(open=True), store=path) as gateway:
            await gateway.ask(msg("ada", "m1"))
            dying = True
            try:
                await gateway.accept(msg("ada", "m2"))
                await gateway.accept(msg("ada", "m3"))
            except StoreError as error:
                told.append(error)
            await trio.sleep(20)
            raise AssertionError("it goes on, and nobody writes")

    with pytest.raises(trio.TrioInternalError) as caught:
        trio.run(main)
    assert isinstance(cause := caught.value.__cause__, BaseExceptionGroup)
    assert cause.subgroup(MemoryError)
    assert told or where != "commit"  # elsewhere, what was handed in is answered
    check_invariants(path)
    assert rows(path, "SELECT state FROM message WHERE id = 'm1'") == [("answered",)]


def test_p14_real_limits_of_the_kernel_are_told_and_survived(memory_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself refuses to write, until it is lifted."""

    async def scenario(life: Life) -> None:
        log = Log()
        async with life.open_gateway(Script(open=True), listen=log) as gateway:
            await gateway.ask(msg("ada", "m1"))
            wal = life.world.store.with_name("gateway.db-wal").stat().st_size
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (wal, hard))
            with pytest.raises(StoreIOError, match="disk"):
                await gateway.accept(msg("ada", "m2"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            await gateway.ask(msg("ada", "m2"))
        assert not log.of(GatewayFailed)

    world = World(memory_path)
    assert not live(scenario, world)
    check_invariants(world.store, settled=True)


async def test_p14_a_full_disk_has_no_room_for_the_number_of_who_holds_the_lock(
    memory_path: Path, disk: Disk
) -> None:
    disk.fault = Fault("full", only=lambda operation, file: "lock" in file and operation == "write")
    async with open_store(memory_path / "gateway.db"):
        assert disk.fault.reached
        with pytest.raises(StoreInUse, match="another process") as caught:
            async with open_store(memory_path / "gateway.db"):
                raise AssertionError("opened twice")
    assert caught.value.pid is None


async def test_p14_a_file_system_that_cannot_lock_is_named(memory_path: Path, disk: Disk) -> None:
    disk.fault = Fault("eio", only=lambda operation, file: "lock file" in file)
    with pytest.raises(StoreIOError, match=r"gateway\.db\.lock cannot be locked"):
        async with open_store(memory_path / "gateway.db"):
            raise AssertionError("opened")
    async with open_store(memory_path / "gateway.db"):
        pass  # it was let go


@pytest.mark.parametrize("kind", ["eio", "eio for ever"])
@pytest.mark.parametrize("at", range(1, 13))
async def test_p14_a_disk_that_fails_while_a_store_is_made_is_what_is_told(
    memory_path: Path, disk: Disk, at: int, kind: str
) -> None:
    """Each write, sync and deletion on the way to a new store; what the lock file says is not on
    it."""
    store = memory_path / "gateway.db"
    disk.fault = Fault(kind, at, only=lambda what, file: what in CHANGES and "lock" not in file)
    with pytest.raises(StoreIOError, match=r"gateway\.db: the disk failed") as caught:
        async with open_store(store) as opened:
            await opened.recover()
    assert "rollback" not in str(caught.value)
    disk.fault = None
    async with open_store(store) as opened:
        await opened.recover()
        assert store.with_name("gateway.db-wal").exists()
    check_invariants(store)


async def test_p14_a_step_that_cannot_be_written_at_once_is_told(
    open_test_gateway: GatewayOpener, disk: Disk, autojump_clock: MockClock
) -> None:
    log = Log()

    async def charge() -> str:
        disk.fault = Fault("full")
        return "receipt"

    async def agent(turn: Turn) -> str:
        return await turn.step(charge)

    async with open_test_gateway(agent, listen=log) as gateway:
        (reply,) = await gateway.ask(msg("ada", "m1"))
    assert reply.text == "receipt"
    (told,) = log.of(StoreTrouble)
    assert "make room" in told.error


# ----- a commit whose outcome is unknown


def test_p06_a_settle_whose_commit_failed_and_is_durable_all_the_same(memory_path: Path) -> None:
    """Syncing fails after the frames were written, then the process dies: the next life finds the
    turn settled. So what failed is not known to have failed."""

    async def first(life: Life) -> None:
        channel = life.world.platform()
        with Disk() as disk:

            async def act(life: Life, turn: Turn) -> str:
                disk.fault = Fault("eio for ever", only=lambda operation, _: operation == "sync")
                return "answer"

            def hear(event: Event) -> None:
                if isinstance(event, SettleDelayed):
                    die()

            async with boot(life, act, channels=[channel], listen=hear):
                await channel.receive("ada", "m1", "hello")
                await trio.sleep_forever()

    world = World(memory_path)
    assert live(first, world)
    assert open_turns(world) == {}
    assert world.arrived() == ()
    assert not live(calm, world, number=2)
    all_ended(world)
    answered_once(world, "m1", "m2", "m3")
    exactly_the_interrupted_resumed(world)


async def calm(life: Life) -> None:
    """A life in which nothing goes wrong any more."""
    channel = life.world.platform()
    async with boot(life, echo, channels=[channel]) as gateway:
        await send_all(channel)
        await gateway.wait_idle()


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_p06_an_error_around_any_one_commit_loses_and_doubles_nothing(
    memory_path: Path, autojump_clock: MockClock, moment: str
) -> None:
    """Before a commit: it failed. After: it stands, and an error is all that came back. In either
    case the same life gets over it."""
    commit = 0
    reached = True
    while reached:
        commit += 1
        world = World(memory_path / str(commit))
        world.folder.mkdir()
        tap = CrashPoints(f"{commit} {moment}", death=fail)
        opener = GatewayOpener(store=world.store, inline_store=True, tap=tap)
        await with_errors(Life(world=world, number=1, open_gateway=opener))
        reached = tap.commits >= commit
        all_ended(world)
        answered_once(world, "m1", "m2", "m3")
        exactly_the_interrupted_resumed(world)
    assert commit > 10


def fail() -> None:
    raise apsw.IOError("EIO (a test)")


# ----- lives on such a disk; `proof/disk.py` fails every operation of one


async def echo(life: Life, turn: Turn) -> str:
    async def look() -> str:
        return "seen"

    await turn.step(look)
    await turn.say("Let me see.")
    return f"re: {turn.text}"


async def send_all(channel: SurvivingChannel) -> None:
    """Three messages, each sent until it is accepted, as a platform does."""
    for session, id in (("a", "m1"), ("a", "m2"), ("b", "m3")):
        while True:
            try:
                await channel.receive(session, id, id)
                break
            except StoreError:
                await trio.sleep(1)


async def with_errors(life: Life) -> None:
    """A life on a disk that may fail: what fails once is got over, if it is not the boot itself."""
    channel = life.world.platform()
    booted = False
    while not booted:
        try:
            async with boot(life, echo, channels=[channel]) as gateway:
                booted = True
                await send_all(channel)
                await gateway.wait_idle()
        except StoreError:
            if booted:
                raise
            await trio.sleep(1)


CHANGES = ("write", "sync", "truncate", "delete")


@pytest.mark.parametrize("at", range(1, 13))
def test_a_store_whose_maker_died_while_making_it_is_made_by_the_next(
    at: int, memory_path: Path
) -> None:
    async def half_made(life: Life) -> None:
        with Disk() as disk:
            disk.fault = Fault("power", at, only=lambda operation, _: operation in CHANGES)
            with pytest.raises(StoreError):
                async with open_store(life.world.store):
                    raise AssertionError("opened")
            die()

    world = World(memory_path)
    assert live(half_made, world)
    assert not live(calm, world, number=2, virtual_time=True)
    all_ended(world)
