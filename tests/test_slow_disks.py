"""Stops and begins on a disk that hangs or is damaged: the writer's thread is real here, and so is
the time that it takes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import apsw
import pytest
import trio
from helpers import Log, Machine, Script, msg, rows
from trio.testing import MockClock

from trio_gateway import DrainReport, Limits, Settings, Turn, open_gateway
from trio_gateway._events import StoreTrouble
from trio_gateway.store import Begin, Begun
from trio_gateway.store._ledger import Ledger
from trio_gateway.testing import GatewayOpener, MemoryChannel


class HeldDisk:
    """A tap that holds a commit until `go`, and lets the two after it fail."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.held = threading.Event()
        self.commits: int | None = None

    def __call__(self, moment: str) -> None:
        if moment != "before" or self.commits is None:
            return
        self.commits += 1
        if self.commits == 1:
            self.held.set()
            assert self.go.wait(10)
        elif self.commits < 4:
            raise apsw.FullError("full (a test)")


async def test_p04_p09_what_the_stop_writes_begins_nothing_while_the_settle_is_still_in_line(
    tmp_path: Path,
) -> None:
    """A settle that would begin the next turn waits behind a disk that hangs, longer than the
    marking may take. Then it fails, and the account writes the end: it must not begin that turn."""
    disk, finish = HeldDisk(), trio.Event()

    async def agent(turn: Turn) -> str:
        await finish.wait()
        return "done"

    store = tmp_path / "gateway.db"
    with trio.fail_after(30):
        async with open_gateway(
            agent, store=store, tap=disk, settings=Settings(grace=0.2)
        ) as gateway:
            await gateway.accept(msg("a", "m1"))
            await gateway.accept(msg("a", "m2"))
            async with trio.open_nursery() as nursery:
                disk.commits = 0
                nursery.start_soon(gateway.accept, msg("b", "m3", "/help"))
                await trio.to_thread.run_sync(disk.held.wait)
                finish.set()
                await trio.testing.wait_all_tasks_blocked(0.02)  # the settle is handed in
                gateway.request_stop()
                await trio.sleep(gateway.plan.grace + gateway.plan.mark + 0.2)
                disk.go.set()
    assert rows(store, "SELECT id, state FROM turn") == [(1, "COMPLETED")]
    assert rows(store, "SELECT state FROM message WHERE id = 'm2'") == [("queued",)]


async def test_p11_a_stop_does_not_wait_for_its_notice(tmp_path: Path) -> None:
    """The marks are on disk, and then the disk hangs in the notice to the people."""
    channel, hangs, log = MemoryChannel(notices=True), threading.Event(), Log()
    commits: list[float] = []

    def disk(moment: str) -> None:
        if moment == "before" and hangs.is_set():
            commits.append(time.monotonic())
            if len(commits) == 2:
                time.sleep(3)

    async def agent(turn: Turn) -> None:
        await trio.sleep_forever()

    with trio.fail_after(30):
        async with open_gateway(
            agent, store=tmp_path / "gateway.db", channels=[channel], tap=disk,
            settings=Settings(grace=0.2, budget=1.5), listen=log,
        ) as gateway:  # fmt: skip
            await channel.receive("a", "m1", "hi")
            hangs.set()
            asked = time.monotonic()
            gateway.request_stop()
            await log.wait_for(DrainReport)
            took = time.monotonic() - asked
    assert took < 1.5, f"the report came after {took:.2f} s"
    assert len(commits) >= 2, "no notice was written"


async def test_p14_a_session_that_cannot_begin_keeps_no_slot(
    open_test_gateway: GatewayOpener,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Something about one session is damaged. It is tried again; meanwhile the others have its
    slot, and once it is mended, it goes on by itself."""
    begin, mended = Ledger.begin, False

    def damaged(self: Ledger, request: Begin) -> Begun:
        if request.session.name == "bad" and not mended:
            raise apsw.CorruptError("a page (a test)")
        return begin(self, request)

    monkeypatch.setattr(Ledger, "begin", damaged)
    log = Log()

    async def agent(turn: Turn) -> str:
        await trio.sleep(1)
        return "done"

    settings = Settings(limits=Limits(turns=1))
    async with open_test_gateway(agent, settings=settings, listen=log) as gateway:
        await gateway.accept(msg("now", "m0"))
        await gateway.accept(msg("bad", "bad"))
        await trio.sleep(5)
        with trio.fail_after(5):
            await gateway.ask(msg("good", "good"))
        assert log.of(StoreTrouble)
        mended = True
        with trio.fail_after(30):
            await gateway.ask(msg("bad", "bad"))
        await gateway.wait_idle()
        assert gateway.statistics()["slots_free"] == 1


async def test_p10_a_session_that_is_stopped_while_it_is_set_aside_begins_anew(
    open_test_gateway: GatewayOpener, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits to be tried again; a /stop ends its mail, and it is forgotten. A new one by the same
    name is not mixed up with it when its time has come."""
    begin, mended = Ledger.begin, False

    def damaged(self: Ledger, request: Begin) -> Begun:
        if not mended:
            raise apsw.CorruptError("a page (a test)")
        return begin(self, request)

    monkeypatch.setattr(Ledger, "begin", damaged)
    script = Script()
    settings = Settings(limits=Limits(turns=2))
    async with open_test_gateway(script, settings=settings) as gateway:
        await gateway.accept([msg("one", "m0"), msg("two", "m0-2")])
        await gateway.accept(msg("a", "m1"))  # no slot is free for it
        script.release("one", "two")
        await trio.sleep(5)
        await gateway.accept(msg("a", "m2", "/stop"))
        await gateway.wait_idle()
        mended = True
        await gateway.accept(msg("a", "m3"))
        await trio.sleep(30)
        await gateway.accept(msg("a", "m4"))
        await trio.sleep(1)
        ran = [turn.message.id for turn in script.turns]
        assert (sorted(ran[:2]), ran[2:]) == (["m0", "m0-2"], ["m3"])  # the two begin together
        script.release()
        await gateway.wait_idle()
        assert [turn.message.id for turn in script.turns[3:]] == ["m4"]
        assert gateway.statistics()["sessions_open"] == 0
        assert gateway.statistics()["slots_free"] == 2


async def test_p10_a_turn_that_is_stopped_while_it_cannot_resume_lets_its_session_go_on(
    machine: Machine, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Ledger, pending: object) -> object:
        raise apsw.CorruptError("a page (a test)")

    async with machine.boot(Script()) as gateway:
        await gateway.accept([msg("cut", "m1"), msg("cut", "m2")])
        await trio.sleep(1)
        gateway.request_stop(now=True)
    monkeypatch.setattr(Ledger, "resume", damaged)
    async with machine.boot(Script(open=True)) as gateway:
        await trio.sleep(5)
        await gateway.accept(msg("cut", "m3", "/stop"))
        with trio.fail_after(1):
            assert (await gateway.ask(msg("cut", "m2")))[-1].final
        await trio.sleep(30)
        await gateway.wait_idle()
        assert gateway.statistics()["sessions_open"] == 0


async def test_p14_a_turn_that_cannot_resume_keeps_no_slot(
    machine: Machine, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a turn that was interrupted: it resumes once it can."""
    resume, mended = Ledger.resume, False

    def damaged(self: Ledger, pending: object) -> object:
        if not mended:
            raise apsw.CorruptError("a page (a test)")
        return resume(self, pending)  # type: ignore[arg-type]

    async def agent(turn: Turn) -> str:
        if turn.session.name == "cut" and turn.resumed is None:
            await trio.sleep_forever()
        return "done"

    settings = Settings(limits=Limits(turns=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("cut", "m1"))
        await trio.sleep(1)
        gateway.request_stop(now=True)
    monkeypatch.setattr(Ledger, "resume", damaged)
    async with machine.boot(agent, settings=settings) as gateway:
        await trio.sleep(5)
        with trio.fail_after(5):
            await gateway.ask(msg("good", "m2"))
        assert machine.markers()["cut"] == ("RESUME_PENDING", "shutdown")
        mended = True
        with trio.fail_after(30):
            await gateway.ask(msg("cut", "m1"))
        assert gateway.statistics()["slots_free"] == 1


async def test_p10_a_stop_in_a_session_of_a_channel_that_is_gone_upsets_no_count(
    tmp_path: Path,
) -> None:
    async def agent(turn: Turn) -> None:
        await trio.sleep_forever()

    channel, store = MemoryChannel(), tmp_path / "gateway.db"
    with trio.fail_after(30):
        async with open_gateway(agent, store=store, channels=[channel]) as gateway:
            await channel.receive("a", "m1", "hi")
            await channel.receive("b", "m2", "hi")
            gateway.request_stop(now=True)
        async with open_gateway(agent, store=store) as gateway:
            await gateway.accept(channel.message("a", "m3", "/stop"))
            assert await gateway.stop_turn(channel.message("b", "m4", "").key)
            await gateway.wait_idle()
            assert gateway.statistics()["messages_open"] == 0
            assert gateway.statistics()["sessions_open"] == 0
    assert rows(store, "SELECT state FROM turn") == [("STOPPED",), ("STOPPED",)]
