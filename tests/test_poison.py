"""Turns that kill the process, or never get anywhere: put aside, alone (c26 to c31, promise 9)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import apsw
import pytest
import trio
from helpers import PATIENCE, Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import Limits, ResumeReason, ResumeRules, Settings, StoreFull, Turn, TurnState
from trio_gateway._events import (
    GatewayStarted,
    StopRequested,
    TurnBegun,
    TurnResumed,
    TurnSettled,
)
from trio_gateway._policy import SORRY_QUARANTINED
from trio_gateway.store import edit_store, read_store
from trio_gateway.testing import MemoryChannel

QUICK = Settings(grace=1.0, budget=10.0)

# ----- c26, with real processes

HOST = """
import os, sys
import trio
from trio_gateway import Message, Settings, open_gateway

async def agent(turn):
    name = turn.session.name
    if name.startswith("killer"):
        await trio.sleep(0.1)
        os.abort()
    await trio.sleep(0.7)
    return f"attempt {turn.attempt} of {name}"

async def main():
    async with open_gateway(agent, store=sys.argv[1], settings=Settings(grace=5.0)) as gateway:
        await gateway.accept([Message(session=s, id=s, text="hi") for s in sys.argv[2:]])
        with trio.move_on_after(20):
            await gateway.wait_idle()

trio.run(main)
"""


def test_c26_who_kills_the_process_is_quarantined_and_the_innocent_complete(
    tmp_path: Path,
) -> None:
    """os.abort in every attempt, beside two innocents that take longer than it takes to die: after
    three crashes it is put aside, and the innocents have completed. Every boot serves new ones."""
    store = tmp_path / "gateway.db"
    codes: list[int] = []
    for boot in range(6):
        sessions = ["killer", "innocent1", "innocent2", f"fresh{boot}"]
        ended = subprocess.run(
            [sys.executable, "-c", HOST, str(store), *sessions],
            capture_output=True,
            timeout=PATIENCE * 2,
            check=False,
        )
        codes.append(ended.returncode)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGABRT, ended.stderr.decode()
    with closing(read_store(store)) as reader:
        assert reader.counts().quarantined == 1
        assert reader.open_turns() == ()
        (aside,) = reader.quarantine()
        fates = {
            m.id: m.state for row in reader.sessions(100) for m in reader.messages(row.session, 9)
        }
    assert codes[-1] == 0
    assert len(codes) <= 4
    assert aside.session.name == "killer"
    assert aside.crashes == 3
    assert fates.pop("killer") == "quarantined"
    assert set(fates.values()) == {"answered"}
    assert {"innocent1", "innocent2"} <= fates.keys()


# ----- the same on virtual time, where every death can be placed


async def crash_while(
    machine: Machine, agent: Script, begun: int, settings: Settings | None = None
) -> None:
    """A life that ends when so many more attempts have begun."""
    before = len(agent.turns)
    async with machine.boot(agent, settings=settings or QUICK) as gateway:
        await agent.wait_begun(before + begun)
        await trio.sleep(1)
        machine.crash()
        gateway.request_stop(now=True)


async def test_c26_suspects_run_alone(machine: Machine, autojump_clock: MockClock) -> None:
    """Two crashes with three open: from then on one at a time, so that the third convicts the right
    one; and the next in line, not those that had not begun again."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2"), msg("c", "m3")])
        await agent.wait_begun(3)
        machine.crash()
        gateway.request_stop(now=True)
    await crash_while(machine, agent, 3)
    assert {row.crashes for row in machine.open_turns()} == {1}
    # The second crash made all three suspects: one begins, alone, and dies.
    await crash_while(machine, agent, 1)
    first = agent.turns[-1].session.name
    async with machine.boot(agent, settings=QUICK) as gateway:
        await agent.wait_begun(8)
        second = agent.turns[-1].session.name
        assert second != first
        assert machine.fate(agent.turn_of(first).message.id) == "quarantined"
        await trio.sleep(600)
        assert len(gateway.turns()) == 1
        # A fresh turn runs beside a suspect: it is not accused.
        await gateway.accept(msg("fresh", "m4"))
        await agent.wait_begun(9)
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    (third,) = {"a", "b", "c"} - {first, second}
    assert [t.session.name for t in agent.turns[7:] if t.resumed] == [second, third]
    assert all(e.alone == (e.attempt >= 3) for e in machine.log.of(TurnResumed))
    assert [machine.fate(m) for m in ("m1", "m2", "m3", "m4")].count("answered") == 3


async def test_c27_the_count_is_charged_before_the_agent_is_called(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Killed in the boot, right after the charge: it counts, and is not counted twice for it."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        machine.crash()
        gateway.request_stop(now=True)
    seen: list[tuple[int, int]] = []

    def die_in_the_boot(moment: str) -> None:
        if moment == "after":
            machine.on_commit = None
            machine.crash()
            (row,) = machine.open_turns()
            seen.append((row.crashes, len(agent.turns)))

    for _ in range(3):
        machine.on_commit = die_in_the_boot
        async with machine.boot(agent, settings=QUICK) as gateway:
            gateway.request_stop(now=True)
    assert seen == [(1, 1)] * 3
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "answered"


async def test_c27_the_count_survives_boots_and_planned_stops(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A crash, stops in between, a crash, stops, a crash: three; whatever it checkpoints."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
    for _ in range(3):
        await crash_while(machine, agent, 1)
        for _ in range(2):
            async with machine.boot(agent, settings=QUICK) as gateway:
                await trio.sleep(1)
                if gateway.turns():
                    await agent.turns[-1].checkpoint(len(agent.turns))
    assert machine.fate("m1") == "quarantined"
    assert machine.said() == [SORRY_QUARANTINED]
    (end,) = machine.log.of(TurnSettled)
    assert (end.state, end.error) == (
        TurnState.QUARANTINED,
        "was running at 3 crashes of the process",
    )


async def test_p09_a_planned_stop_is_nobodys_failure(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Nine of them charge no crash."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
    for n in range(8):
        async with machine.boot(agent, settings=QUICK):
            await agent.wait_begun(2 + n)
    (row,) = machine.open_turns()
    assert (row.crashes, row.interruptions) == (0, 9)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "answered"


@pytest.mark.parametrize("progress", ["step", "checkpoint"])
async def test_c28_a_hundred_planned_restarts(
    machine: Machine, autojump_clock: MockClock, progress: str
) -> None:
    """A turn that gets a little further each time is never put aside, and ends."""

    async def think(n: int) -> int:
        return n

    async def agent(turn: Turn) -> str:
        reached = 0
        if progress == "checkpoint":
            reached = int(turn.checkpointed or 0) + 1
            await turn.checkpoint(reached)
        else:
            for reached in range(1, turn.attempt + 1):
                await turn.step(think, reached)
        if reached <= 100:
            await trio.sleep_forever()
        return f"{reached} at last"

    settings = Settings(grace=0.01, budget=10.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(1)
        gateway.request_stop(ResumeReason.RESTART)
    for _ in range(99):
        async with machine.boot(agent, settings=settings) as gateway:
            await trio.sleep(1)
            gateway.request_stop(ResumeReason.RESTART)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == ["101 at last"]
    assert {event.reason for event in machine.log.of(TurnResumed)} == {ResumeReason.RESTART}


async def test_c28_without_progress_it_is_put_aside(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Ten planned stops that found it where it was: quarantined, with the grounds."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
    for n in range(9):
        async with machine.boot(agent, settings=QUICK):
            await agent.wait_begun(2 + n)
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.wait_idle()
    assert len(agent.turns) == 10
    assert machine.fate("m1") == "quarantined"
    (end,) = machine.log.of(TurnSettled)
    assert end.error == "was interrupted by 10 stops without a new step or checkpoint"


async def test_c29_quarantine_holds_one_turn(machine: Machine, autojump_clock: MockClock) -> None:
    """The session's next message is answered, at the same boot; the sender is told; other sessions
    never notice."""
    agent = Script()
    settings = Settings(grace=1.0, resume=ResumeRules(max_crashes=1), limits=Limits(turns=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", "m1"), msg("a", "m2"), msg("b", "m3")])
        await agent.wait_begun(1)
        machine.crash()
        gateway.request_stop(now=True)
    agent.release()
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
        await gateway.ask(msg("a", "m4"))
        await gateway.wait_idle()
        assert gateway.statistics()["slots_free"] == 1
        assert gateway.statistics()["sessions_open"] == 0
    assert machine.said("a") == [SORRY_QUARANTINED, "re: hi", "re: hi"]
    assert [machine.fate(f"m{n}") for n in range(1, 5)] == ["quarantined", *["answered"] * 3]
    assert machine.log.of(GatewayStarted)[-1].quarantined == 1


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "trio_gateway", *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )


async def quarantine_one(machine: Machine, agent: Script) -> int:
    """A message that is in quarantine; its turn."""
    settings = Settings(grace=1.0, resume=ResumeRules(max_crashes=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1", "poison"))
        await agent.wait_begun(1)
        machine.crash()
        gateway.request_stop(now=True)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
    with closing(read_store(machine.store)) as reader:
        (row,) = reader.quarantine()
    return row.turn


async def test_c30_quarantine_from_the_command_line(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Listed, shown, retried; then it is answered, with a clean record."""
    agent = Script()
    turn = await quarantine_one(machine, agent)
    store = ("--store", str(machine.store))
    listed = json.loads(command("quarantine", "list", "--json", *store).stdout)
    assert [row["turn"] for row in listed] == [turn]
    shown = command("quarantine", "show", str(turn), *store)
    assert shown.returncode == 0
    assert "poison" in shown.stdout
    retried = command("quarantine", "retry", str(turn), *store)
    assert (retried.returncode, retried.stderr) == (0, "")
    with closing(read_store(machine.store)) as reader:
        assert reader.quarantine() == ()
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "answered"
    assert agent.turns[-1].attempt == 1


async def test_c30_a_quarantined_message_can_be_dropped(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """And ends for good, visibly."""
    agent = Script()
    turn = await quarantine_one(machine, agent)
    assert command("quarantine", "drop", str(turn), "--store", str(machine.store)).returncode == 0
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "failed"
    assert len(agent.turns) == 1


async def test_c30_retried_in_order_before_what_came_later(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A retried message keeps its place: before what was accepted after it and still waits."""
    agent = Script()
    turn = await quarantine_one(machine, agent)
    async with machine.boot(agent, settings=QUICK) as gateway:
        gateway.request_stop()
        await gateway.accept(msg("a", "m2", "later"))
    ids = edit_store(machine.store, lambda ledger: ledger.retry_quarantined(turn))
    assert ids == ("m1",)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m3", "last"))
        await gateway.wait_idle()
    texts = [text for _, _, text in agent.begun[1:]]
    assert texts == sorted(texts, key=["poison", "later", "last"].index)


async def test_p09_a_crash_counts_only_against_what_was_running(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What waited, what settled, and what a stop had marked before the kill is not charged."""
    agent = Script()
    settings = Settings(grace=5.0, limits=Limits(turns=2))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2"), msg("c", "m3")])
        await agent.wait_begun(2)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        machine.crash()
        gateway.request_stop(now=True)
    agent.release()
    async with machine.boot(agent, settings=settings) as gateway:
        assert machine.rows("SELECT max(crashes) FROM turn") == [(0,)]
        await gateway.wait_idle()
    assert machine.rows("SELECT max(crashes) FROM turn") == [(0,)]


async def test_p09_a_boot_that_cannot_write_charges_nobody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A disk that is full at every boot: no gateway, an error that says so, no count; then one."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        machine.crash()
        gateway.request_stop(now=True)

    def full(moment: str) -> None:
        raise apsw.FullError("full")

    for _ in range(5):
        machine.on_commit = full
        with pytest.raises(StoreFull, match="make room"):
            async with machine.boot(agent):
                pytest.fail("booted on a full disk")
    machine.on_commit = None
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.rows("SELECT crashes FROM turn") == [(1,)]
    assert machine.fate("m1") == "answered"


# ----- what is charged, and when


async def test_c27_the_charge_is_on_disk_when_the_agent_is_called(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What the agent itself would read of its own record, in the first line of each attempt; and a
    retry by a person begins with a clean one."""
    seen: list[int] = []

    async def agent(turn: Turn) -> str:
        seen.extend(machine.rows("SELECT crashes FROM turn WHERE id = ?", turn.id)[0])
        if not retried:
            await trio.sleep_forever()
        return "at last"

    retried = False
    for _ in range(3):
        async with machine.boot(agent, settings=QUICK) as gateway:
            await gateway.accept(msg("a", "m1"))
            await trio.sleep(1)
            machine.crash()
            gateway.request_stop(now=True)
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert seen == [0, 1, 2]
    with closing(read_store(machine.store)) as reader:
        (row,) = reader.quarantine()
    assert row.crashes == row.attempts == 3
    edit_store(machine.store, lambda ledger: ledger.retry_quarantined(row.turn))
    retried = True
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert seen == [0, 1, 2, 0]
    assert machine.fate("m1") == "answered"


async def test_p09_suspects_one_at_a_time_and_everybody_else_beside(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Five suspects and three that crashed once: never two suspects at once, at a planned stop in
    the middle neither; the others need not wait for them, and nor do new messages."""
    running: set[str] = set()
    peaks: list[int] = []
    beside: set[str] = set()

    async def agent(turn: Turn) -> str:
        name = turn.session.name
        running.add(name)
        if not dying:
            suspects = {one for one in running if one.startswith("suspect")}
            peaks.append(len(suspects))
            if suspects:
                beside.update(running - suspects)
        try:
            await trio.sleep(10)
        finally:
            running.discard(name)
        return name

    async def die(*names: str) -> None:
        async with machine.boot(agent, settings=QUICK) as gateway:
            await gateway.accept([msg(name, name) for name in names])
            await trio.sleep(1)
            machine.crash()
            gateway.request_stop(now=True)

    dying = True
    await die(*(f"suspect{n}" for n in range(5)))
    await die(*(f"once{n}" for n in range(3)))
    dying = False
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("fresh", "fresh"))
        # In the middle of the second suspect.
        await trio.sleep(15)
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert max(peaks) == 1
    assert beside == {"once0", "once1", "once2", "fresh"}
    assert sorted(machine.said()) == sorted(
        [*(f"suspect{n}" for n in range(5)), *(f"once{n}" for n in range(3)), "fresh"]
    )
    alone = [e for e in machine.log.of(TurnResumed) if e.alone]
    assert {event.session.name for event in alone} == {f"suspect{n}" for n in range(5)}


async def make_suspects(machine: Machine, agent: Script, *names: str) -> None:
    """Turns that have been running at two crashes, in this order; "x:y" is in the channel x."""
    messages = [msg(name, name, channel=name.partition(":")[0]) for name in names]
    for life in range(2):
        chats = [MemoryChannel(name) for name in sorted({m.channel for m in messages})]
        async with machine.boot(agent, *chats, settings=QUICK) as gateway:
            for chat in chats:
                await chat.wait_ready()
            for message in messages:
                await gateway.accept(message)
            await agent.wait_begun(len(names) * (life + 1))
            machine.crash()
            gateway.request_stop(now=True)
    assert {row.crashes for row in machine.open_turns()} == {1}


async def test_p09_a_suspect_whose_channel_is_away_keeps_nobody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Suspects that wait for their channel, before and behind one that need not: it does not wait
    for them, and nor does its session."""
    agent = Script()
    # Trio starts tasks that are ready in this order or the reverse: one that is away is first.
    await make_suspects(machine, agent, "away:1", "here:1", "away:2")
    agent.release()
    away, here = MemoryChannel("away", connected=False), MemoryChannel("here")
    async with machine.boot(agent, away, here) as gateway:
        await here.wait_sent(1)
        await gateway.accept(msg("here:1", "m2", "next", channel="here"))
        await here.wait_sent(2)
        assert machine.fate("away:1") == machine.fate("away:2") == "running"
        away.connect()
        await gateway.wait_idle()
        settled_well(gateway)
    assert here.texts() == ["re: hi", "re: next"]
    assert sorted(d.session.name for d in away.sent) == ["away:1", "away:2"]


async def test_p09_a_suspect_whose_channel_goes_away_in_line_keeps_nobody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Its channel was there when it got in line, and is gone when its turn comes: the next one."""
    agent = Script()
    names = ("here", "away", "later")
    await make_suspects(machine, agent, *(f"{name}:1" for name in names))
    here, away, later = (MemoryChannel(name, connected=False) for name in names)
    begun = len(agent.turns)
    async with machine.boot(agent, here, away, later) as gateway:
        for channel in (here, away, later):
            channel.connect()
            await channel.wait_ready()
            await trio.sleep(1)
        away._may_connect.value = False
        away.break_down(ConnectionError("gone"))
        await trio.sleep(1)
        assert [turn.session.channel for turn in agent.turns[begun:]] == ["here"]
        agent.release()
        await later.wait_sent(1)
        assert machine.fate("away:1") == "running"
        away.connect()
        await gateway.wait_idle()
        settled_well(gateway)
    assert away.texts() == ["re: hi"]


@pytest.mark.parametrize("does", ["nothing", "says", "a step", "the same step"])
async def test_c28_what_counts_as_progress(
    machine: Machine, autojump_clock: MockClock, does: str
) -> None:
    """Three stops at the most: a new step clears the count. Talking does not, nor a step that was
    done before: whoever comes back only to say so gets nowhere."""

    async def think() -> int:
        return 1

    async def agent(turn: Turn) -> str:
        if does == "says":
            await turn.say(f"attempt {turn.attempt}")
        if does == "the same step" or (does == "a step" and turn.attempt == 3):
            await turn.step(think)
        await trio.sleep_forever()

    rules = ResumeRules(max_interruptions=3)
    settings = Settings(grace=0.01, budget=10.0, resume=rules)
    lives = 0
    for lives in range(1, 20):
        async with machine.boot(agent, settings=settings) as gateway:
            if lives == 1:
                await gateway.accept(msg("a", "m1"))
            await trio.sleep(1)
        if machine.fate("m1") == "quarantined":
            break
    # The life that puts it aside comes after the last that interrupted it.
    assert lives - 1 == {"nothing": 3, "says": 3, "a step": 5, "the same step": 3}[does]
    (row,) = machine.rows("SELECT crashes, interruptions FROM turn")
    assert row == (0, 3)


async def test_c28_who_waits_in_line_is_not_charged(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """One resumes at a time, and it never ends: stops charge it, and nobody behind it."""
    agent = Script()
    settings = Settings(grace=0.01, budget=10.0, resume=ResumeRules(concurrency=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg(name, name) for name in "abc"])
        await agent.wait_begun(3)
    for life in range(5):
        async with machine.boot(agent, settings=settings) as gateway:
            await agent.wait_begun(4 + life)
            await trio.sleep(1)
    counts = [interruptions for (interruptions,) in machine.rows("SELECT interruptions FROM turn")]
    # Every stop charged the one that ran, whichever was first in line, and no other.
    assert sum(counts) == 3 + 5
    assert len(agent.turns) == 3 + 5


async def test_c30_a_running_gateway_is_read_and_not_written(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """While a gateway has the store, quarantine is listed, and a retry refused, naming who."""
    agent = Script()
    turn = await quarantine_one(machine, agent)
    store = ("--store", str(machine.store))
    async with machine.boot(agent):
        listed = json.loads(command("quarantine", "list", "--json", *store).stdout)
        refused = command("quarantine", "retry", str(turn), *store)
    assert [row["turn"] for row in listed] == [turn]
    assert refused.returncode == 1
    assert f"in use by process {os.getpid()}" in refused.stderr
    assert machine.fate("m1") == "quarantined"


# ----- c31: a turn that asks for a restart


@pytest.mark.parametrize("killed", [False, True])
async def test_c31_p13_who_asks_for_a_restart_settles_first_and_does_not_ask_again(
    machine: Machine, autojump_clock: MockClock, killed: bool
) -> None:
    """When the stop is requested the turn that asked is answered on disk; killed in that moment,
    too, no boot asks again. The one beside it is marked, charged no crash, and goes on."""
    agent = Script()
    fates: list[str] = []

    async def asks(turn: Turn) -> str:
        if turn.session.name == "asks":
            turn.request_restart()
            await trio.sleep(3)
            return "restarting"
        return await agent(turn)

    def at_the_stop(event: object) -> None:
        if isinstance(event, StopRequested):
            fates.append(machine.fate("m1"))
            if killed:
                machine.crash()

    machine.log.hooks.append(at_the_stop)
    settings = Settings(grace=5.0, budget=20.0)
    async with machine.boot(asks, settings=settings) as gateway:
        began = trio.current_time()
        await gateway.accept([msg("asks", "m1"), msg("beside", "m2")])
        await gateway.wait_stop_requested()
        assert trio.current_time() - began == pytest.approx(3.0)
        assert gateway.stop_reason is ResumeReason.RESTART
    machine.log.hooks.clear()
    assert fates == ["answered"]
    expected = ("RUNNING", None) if killed else ("RESUME_PENDING", "restart")
    assert machine.markers() == {"beside": expected}
    agent.release()
    for _ in range(3):
        async with machine.boot(asks) as gateway:
            await gateway.wait_idle()
            await trio.sleep(600)
            assert gateway.stop_reason is None
    assert machine.said() == ["restarting", "re: hi"]
    begun = [event.session.name for event in machine.log.of(TurnBegun)]
    assert sorted(begun) == ["asks", "beside", "beside"]
    assert machine.rows("SELECT max(crashes) FROM turn") == [(int(killed),)]


@pytest.mark.parametrize("settles", [False, True])
async def test_p13_a_full_disk_does_not_make_a_turn_ask_for_a_restart_at_every_boot(
    machine: Machine, autojump_clock: MockClock, settles: bool
) -> None:
    """That it has asked is on disk before the gateway restarts for it; or it has settled."""
    began: list[int] = []

    async def asks(turn: Turn) -> str:
        began.append(turn.attempt)
        turn.request_restart()
        await trio.sleep(0 if settles else 600)
        return "restarted"

    def full(moment: str) -> None:
        if moment == "before":
            machine.on_commit = None
            raise apsw.FullError("full (a test)")

    settings = Settings(grace=0.0, budget=20.0)
    async with machine.boot(asks, settings=settings) as gateway:
        await gateway.accept(msg("asks", "m1"))
        machine.on_commit = full
        await gateway.wait_stop_requested()
        assert gateway.stop_reason is ResumeReason.RESTART
    async with machine.boot(asks, settings=settings) as gateway:
        await gateway.wait_idle()
        assert gateway.stop_reason is None
    assert machine.fate("m1") == "answered"
    assert began == ([1] if settles else [1, 2])
