"""Boots: exactly the interrupted resume, once, told why, and nobody else waits (c17 to c25)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, timedelta

import apsw
import pytest
import trio
from helpers import Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    Delivery,
    Limits,
    Message,
    ReceiptStatus,
    ReplyKind,
    ResumeReason,
    ResumeRules,
    Settings,
    TurnState,
)
from trio_gateway._clock import SystemClock
from trio_gateway._events import (
    ChannelFailed,
    GatewayStarted,
    StoreTrouble,
    TurnResumed,
    TurnSettled,
)
from trio_gateway._policy import RESUMED_NOTICE, SORRY_EXPIRED, STOPPING_NOTICE
from trio_gateway.store import edit_store
from trio_gateway.testing import MemoryChannel

QUICK = Settings(grace=1.0, budget=10.0)


def with_rules(rules: ResumeRules, *, limits: Limits | None = None) -> Settings:
    """A quick stop, and these rules at the boot."""
    return Settings(grace=1.0, budget=10.0, resume=rules, limits=limits or Limits())


async def interrupt(
    machine: Machine,
    agent: Script,
    *messages: tuple[str, str],
    channels: tuple[MemoryChannel, ...] = (),
    crash: bool = False,
) -> None:
    """A life in which messages (channel or session, id) begin turns that do not end in it."""
    before = len(agent.turns)
    by_name = {channel.name: channel for channel in channels}
    async with machine.boot(agent, *channels, settings=QUICK) as gateway:
        for where, message_id in messages:
            channel, _, session = where.rpartition(":")
            if channel:
                await by_name[channel].receive(session, message_id, f"text of {message_id}")
            else:
                await gateway.accept(msg(where, message_id, f"text of {message_id}"))
        await agent.wait_begun(before + len(messages))
        if crash:
            machine.crash()


# ----- exactly once


@pytest.mark.parametrize("crash", [False, True])
async def test_c17_a_resumed_turn_runs_once_when_its_channel_connects_late(
    machine: Machine, autojump_clock: MockClock, crash: bool
) -> None:
    """Not before it is connected, and then once; and not a second time when it reconnects while it
    runs, nor when it reconnects afterwards."""
    agent = Script()
    await interrupt(
        machine, agent, ("chat:a", "m1"), channels=(MemoryChannel("chat"),), crash=crash
    )
    channel = MemoryChannel("chat", connected=False)
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await trio.sleep(600)
        assert len(agent.turns) == 1
        channel.connect()
        await agent.wait_begun(2)
        for n in range(3):
            channel.break_down(OSError("the line"))
            await machine.log.wait_for(ChannelFailed, n + 1)
            await channel.wait_ready()
            await trio.sleep(5)
        assert len(agent.turns) == 2
        agent.release()
        await gateway.wait_idle()
        channel.break_down(OSError("the line"))
        await trio.sleep(60)
        settled_well(gateway)
    assert agent.begun == [("a", 1, "text of m1"), ("a", 2, "text of m1")]
    assert channel.texts() == ["re: text of m1"]


async def test_c17_a_channel_that_flaps_before_the_turn_begins(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It connects and breaks again and again while its turns wait for the one place: each runs
    once, none is forgotten."""
    agent = Script()
    sessions = [f"s{n}" for n in range(6)]
    await interrupt(
        machine, agent, *((f"chat:{s}", s) for s in sessions), channels=(MemoryChannel("chat"),)
    )
    channel = MemoryChannel("chat")
    settings = with_rules(ResumeRules(concurrency=1))
    async with machine.boot(agent, channel, settings=settings) as gateway:
        for n in range(6):
            await agent.wait_begun(7 + n)
            channel.break_down(OSError("the line"))
            await machine.log.wait_for(ChannelFailed, n + 1)
            agent.release(agent.turns[-1].session.name)
            await trio.sleep(0.1)
            assert len(agent.turns) == 7 + n
        await gateway.wait_idle()
        settled_well(gateway)
    assert sorted(agent.begun[6:]) == [(s, 2, f"text of {s}") for s in sessions]
    assert len(channel.sent) == 6


async def test_c17_resumed_once_although_the_commit_of_the_resume_fails(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Failed and not durable, failed and durable all the same: one attempt each."""
    for moment, session in (("before", "b"), ("after", "c")):
        agent = Script()
        await interrupt(machine, agent, (session, session))
        agent.release()
        failures = 0

        def fail(at: str, wanted: str = moment) -> None:
            nonlocal failures
            if at == wanted and failures < 2:
                failures += 1
                raise apsw.IOError("perhaps")

        @machine.log.hooks.append
        def arm(event: object, fail: Callable[[str], None] = fail) -> None:
            if isinstance(event, GatewayStarted):
                machine.on_commit = fail

        async with machine.boot(agent) as gateway:
            await gateway.wait_idle()
            settled_well(gateway)
        machine.log.hooks.clear()
        machine.on_commit = None
        assert failures == 2
        assert len(agent.ended) == 1
        assert machine.said(session) == [f"re: text of {session}"]
    assert machine.log.of(StoreTrouble)


# ----- told why, and goes on


@pytest.mark.parametrize("crash", [False, True])
async def test_c18_the_agent_is_told_and_continues(
    machine: Machine, autojump_clock: MockClock, crash: bool
) -> None:
    """Reason, when, which attempt; its original messages; and its answer arrives, in the same turn,
    after attempt upon attempt."""
    agent = Script(answer="{attempt}: {text}")
    await interrupt(machine, agent, ("a", "m1"), crash=crash)
    for n in (2, 3):
        async with machine.boot(agent, settings=QUICK):
            await agent.wait_begun(n)
            await trio.sleep(1)
    agent.release()
    async with machine.boot(agent) as gateway:
        (reply,) = await gateway.ask(msg("a", "m1"))
    first, second, third, fourth = agent.turns
    assert first.resumed is None
    assert {turn.id for turn in agent.turns} == {first.id}
    for turn, attempt in ((second, 2), (third, 3), (fourth, 4)):
        assert turn.messages == first.messages
        assert turn.attempt == attempt
        assert turn.resumed is not None
        assert turn.resumed.attempt == attempt - 1
        assert turn.resumed.at.tzinfo is UTC
    assert second.resumed is not None
    assert second.resumed.reason is (ResumeReason.CRASH if crash else ResumeReason.SHUTDOWN)
    assert third.resumed is not None
    assert third.resumed.reason is ResumeReason.SHUTDOWN
    assert third.resumed.at > second.resumed.at
    assert (reply.text, reply.attempt, reply.final) == ("4: text of m1", 4, True)
    assert machine.said() == ["4: text of m1"]


# ----- nobody else waits


async def test_c19_others_are_served_at_once(machine: Machine, autojump_clock: MockClock) -> None:
    """Resumed turns that take for ever: new messages of their sessions wait behind them, in order;
    every other session is served in no time, also those that waited over the stop."""
    agent = Script()
    slow = [f"slow{n}" for n in range(30)]
    await interrupt(machine, agent, *((s, s) for s in slow))
    async with machine.boot(agent, settings=QUICK) as gateway:
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        await gateway.accept(msg("waited", "w1"))
    agent.release("waited", "fresh")
    began = trio.current_time()
    settings = with_rules(ResumeRules(concurrency=20))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("slow0", "x1", "behind"), msg("slow0", "x2", "behind it")])
        (reply,) = await gateway.ask(msg("fresh", "f1"))
        assert reply.text == "re: hi"
        (reply,) = await gateway.ask(msg("waited", "w1"))
        assert reply.text == "re: hi"
        assert trio.current_time() == began
        running = [turn.session.name for turn in agent.turns[30:] if turn.resumed]
        assert len(running) == 20
        await trio.sleep(100)
        assert machine.fate("x1") == "queued"
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said("slow0") == ["re: text of slow0", "re: behind", "re: behind it"]


async def test_c19_no_more_than_the_limit_resume_at_once(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """`resume.concurrency` at a time, the next when one has settled; the rest waits in line."""
    agent = Script()
    sessions = [f"s{n}" for n in range(9)]
    await interrupt(machine, agent, *((s, s) for s in sessions))
    async with machine.boot(agent, settings=with_rules(ResumeRules(concurrency=4))) as gateway:
        await trio.sleep(60)
        assert len(agent.turns) == 9 + 4
        agent.release(agent.turns[-1].session.name)
        await agent.wait_begun(9 + 5)
        await trio.sleep(60)
        assert len(agent.turns) == 9 + 5
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)


async def test_c19_resumed_turns_take_slots_like_everybody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Fewer slots than turns that resume: all get their turn, nobody gets two."""
    agent = Script()
    sessions = [f"s{n}" for n in range(9)]
    await interrupt(machine, agent, *((s, s) for s in sessions))
    most = 0
    settings = with_rules(ResumeRules(), limits=Limits(turns=2))
    async with machine.boot(agent, settings=settings) as gateway:
        for _ in range(9):
            await trio.testing.wait_all_tasks_blocked()
            most = max(most, len(gateway.turns()))
            agent.release(gateway.turns()[0].session.name)
        await gateway.wait_idle()
        assert gateway.statistics()["slots_free"] == 2
    assert most == 2
    assert sorted(agent.begun[9:]) == [(s, 2, f"text of {s}") for s in sessions]


async def test_c20_a_channels_connect_resumes_only_that_channels_sessions(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Three channels that connect one by one, out of order."""
    agent = Script()
    names = ("one", "two", "three")
    channels = tuple(MemoryChannel(name) for name in names)
    await interrupt(machine, agent, *((f"{n}:a", f"m-{n}") for n in names), channels=channels)
    agent.release()
    late = {name: MemoryChannel(name, connected=False) for name in names}
    async with machine.boot(agent, *late.values(), settings=QUICK) as gateway:
        for n, name in enumerate(("three", "one", "two")):
            await trio.sleep(100)
            assert len(agent.turns) == 3 + n
            late[name].connect()
            await late[name].wait_sent(1)
            assert agent.turns[-1].session.channel == name
        await gateway.wait_idle()
        settled_well(gateway)
    assert [len(channel.sent) for channel in late.values()] == [1, 1, 1]


async def test_c20_a_channel_that_is_not_there_keeps_nobody_waiting(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Many turns of a channel that does not connect, few places: the other channel's resume."""
    agent = Script()
    channels = MemoryChannel("away"), MemoryChannel("here")
    turns = [(f"away:a{n}", f"a{n}") for n in range(10)] + [("here:h", "h")]
    await interrupt(machine, agent, *turns, channels=channels)
    agent.release()
    away, here = MemoryChannel("away", connected=False), MemoryChannel("here")
    settings = with_rules(ResumeRules(concurrency=2))
    async with machine.boot(agent, away, here, settings=settings) as gateway:
        await here.wait_sent(1)
        away.connect()
        await away.wait_sent(10)
        await gateway.wait_idle()
        settled_well(gateway)


async def test_c20_a_channel_of_another_time_keeps_its_turns_for_later(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A gateway without the channel leaves its turns alone; one with it resumes them."""
    agent = Script()
    await interrupt(machine, agent, ("chat:a", "m1"), channels=(MemoryChannel("chat"),))
    agent.release()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.ask(msg("b", "m2"))
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.markers() == {"a": ("RESUME_PENDING", "shutdown")}
    channel = MemoryChannel("chat")
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts() == ["re: text of m1"]


# ----- still allowed


@pytest.mark.parametrize("answer", ["no", "raises"])
async def test_c21_who_is_not_allowed_any_more_is_not_resumed(
    machine: Machine, autojump_clock: MockClock, answer: str
) -> None:
    """Asked again at the boot: not resumed, put aside where a person sees it and why, the sender
    told; the others resume; and the session goes on when it is allowed again."""
    agent = Script()
    banned = {"u1"}
    asked: list[str] = []

    async def authorize(message: Message) -> bool:
        asked.append(message.id)
        if message.sender in banned and answer == "raises":
            raise LookupError("the directory is down")
        return message.sender not in banned

    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg("a", "m1", sender="u1"), msg("b", "m2", sender="u2")])
        await agent.wait_begun(2)
    agent.release()
    async with machine.boot(agent, authorize=authorize) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
        banned.clear()
        await gateway.ask(msg("a", "m3", sender="u1"))
    assert sorted(asked[:2]) == ["m1", "m2"]
    assert [machine.fate(m) for m in ("m1", "m2", "m3")] == ["quarantined", "answered", "answered"]
    ended = [e for e in machine.log.of(TurnSettled) if e.state is TurnState.QUARANTINED]
    why = "not allowed" if answer == "no" else "the directory is down"
    assert why in (ended[0].error or "")
    assert "directory" not in machine.said("a")[0]
    assert len(machine.log.of(TurnResumed)) == 1


async def test_c21_authorisation_is_asked_for_every_message(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """At the inbox: no and an exception both refuse, with nothing stored; also for commands."""

    async def authorize(message: Message) -> bool:
        if message.sender is None:
            raise LookupError("who?")
        return message.sender == "friend"

    agent = Script(open=True)
    async with machine.boot(agent, authorize=authorize) as gateway:
        receipts = await gateway.accept(
            [
                msg("a", "m1", sender="friend"),
                msg("a", "m2", sender="foe"),
                msg("a", "m3"),
                msg("a", "c1", "/status", sender="foe"),
            ]
        )
        await gateway.wait_idle()
    assert [receipt.accepted for receipt in receipts] == [True, False, False, False]
    assert receipts[1].reason == "not allowed"
    assert not receipts[1].retryable
    assert machine.rows("SELECT id FROM message") == [("m1",)]


# ----- stale


async def test_c22_what_was_interrupted_too_long_ago_expires(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Not run; EXPIRED; the sender told once, over several boots; the session goes on."""
    agent = Script()
    channel = MemoryChannel()
    await interrupt(machine, agent, ("memory:a", "m1"), channels=(channel,))
    await trio.sleep(3601)
    for _ in range(3):
        async with machine.boot(agent, channel) as gateway:
            await gateway.wait_idle()
            settled_well(gateway)
    assert len(agent.turns) == 1
    assert machine.fate("m1") == "expired"
    assert channel.texts() == [SORRY_EXPIRED]
    (end,) = machine.log.of(TurnSettled)
    assert end.state is TurnState.EXPIRED
    assert "1:00:0" in (end.error or "")
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m2", "and now?")
        await gateway.wait_idle()
    assert channel.texts()[-1] == "re: and now?"


async def test_c22_just_in_time_resumes(machine: Machine, autojump_clock: MockClock) -> None:
    """A moment before the limit."""
    agent = Script()
    await interrupt(machine, agent, ("a", "m1"))
    await trio.sleep(3590)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "answered"


async def test_c22_none_disables_the_limit(machine: Machine, autojump_clock: MockClock) -> None:
    """Ten years later."""
    agent = Script()
    await interrupt(machine, agent, ("a", "m1"))
    await trio.sleep(10 * 365 * 86_400)
    agent.release()
    async with machine.boot(agent, settings=with_rules(ResumeRules(within=None))) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "answered"


async def test_c22_zero_means_at_once_or_never(machine: Machine, autojump_clock: MockClock) -> None:
    """A window of nothing is a window, not a switch: what it catches ends visibly."""
    agent = Script()
    await interrupt(machine, agent, ("a", "m1"))
    await trio.sleep(1)
    agent.release()
    rules = ResumeRules(within=timedelta(0))
    async with machine.boot(agent, settings=with_rules(rules)) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "expired"
    assert machine.said() == [SORRY_EXPIRED]


# ----- replies that were committed


async def test_c23_a_committed_reply_is_delivered_not_generated_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Killed at the instant of the settle, and again in the middle of sending: the agent is called
    once, the text arrives, under one key."""
    agent = Script(open=True)
    channel = MemoryChannel()

    async def never(delivery: Delivery) -> None:
        await trio.sleep_forever()

    channel.before_send = never
    machine.log.hooks.append(lambda e: machine.crash() if isinstance(e, TurnSettled) else None)
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await channel.receive("a", "m1", "hi")
        await machine.log.wait_for(TurnSettled)
    machine.log.hooks.clear()
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await trio.sleep(1)
        machine.crash()
        gateway.request_stop(now=True)
    assert channel.sent == []
    channel.before_send = None
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert len(agent.turns) == 1
    assert channel.texts() == ["re: hi"]
    assert machine.log.of(GatewayStarted)[-1].undelivered == 1


# ----- clocks that jump


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("years", [-10, 10])
async def test_c24_a_clock_that_jumps_loses_nothing(
    machine: Machine, autojump_clock: MockClock, years: int, crash: bool
) -> None:
    """Between stop and boot, on one machine: turns resume, what waits is answered, replies arrive,
    ids are recognised, order holds. And back again."""
    agent = Script()
    channel = MemoryChannel()
    await interrupt(machine, agent, ("memory:a", "m1"), channels=(channel,), crash=crash)
    machine.clock.jump(timedelta(days=365 * years))

    async def fail(delivery: Delivery) -> None:
        raise OSError("the line")

    channel.before_send = fail
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await agent.wait_begun(2)
        agent.release("a")
        await channel.receive("a", "m2", "second")
        await channel.receive("b", "m3", "third")
        await agent.wait_begun(4)
        await trio.sleep(5)
    machine.clock.jump(timedelta(days=-365 * years))
    channel.before_send = None
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        again = await channel.receive("a", "m1", "again")
        assert again.status is ReceiptStatus.DUPLICATE
        await gateway.wait_idle()
        settled_well(gateway)
    assert [machine.fate(m) for m in ("m1", "m2", "m3")] == ["answered"] * 3
    assert channel.texts("a") == ["re: text of m1", "re: second"]
    assert channel.texts("b") == ["re: third"]


async def test_c24_a_clock_that_jumps_while_a_turn_runs(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Years forwards and back during the attempt, then a kill: interrupted a moment ago."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        for n, years in enumerate((10, -20, 10)):
            machine.clock.jump(timedelta(days=365 * years))
            await gateway.accept(msg(f"s{n}", f"m{n}"))
            await trio.sleep(40)
        machine.crash()
        gateway.request_stop(now=True)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert [machine.fate(f"m{n}") for n in range(3)] == ["answered"] * 3


async def test_c24_a_reboot_with_the_clock_set_back(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Another boot of the machine, whose clock begins in the past: only the wall can be compared,
    and less than nothing counts as nothing."""
    agent = Script()
    await interrupt(machine, agent, ("a", "m1"))
    machine.clock.jump(timedelta(days=-3650))
    machine.clock.machine = "after the reboot"
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.fate("m1") == "answered"


def test_c24_a_container_that_counts_its_own_uptime_is_timed_by_the_machine() -> None:
    """A turn that was interrupted in one time namespace, and resumes in another."""
    start = ["unshare", "--time", "--boottime", "1000000", "--", sys.executable, "-c"]
    try:
        shown = subprocess.check_output([*start, "import time; print(time.clock_gettime(7))"])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no time namespace: {error}")
    if float(shown) < 1_000_000:
        pytest.skip("this kernel lets only children into a time namespace")
    now = "from trio_gateway._clock import SystemClock; print(SystemClock().now().up)"
    there = int(subprocess.check_output([*start, now]))
    here = SystemClock().now().up
    assert 0 <= here - there < 10_000_000


# ----- notices


async def test_c25_one_notice_per_chat_however_many_turns_resumed(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """And one at the stop; none where the channel wants none, none when they are switched off, none
    from an earlier life."""
    agent = Script()
    loud, quiet = MemoryChannel("loud", notices=True), MemoryChannel("quiet", notices=False)
    async with machine.boot(agent, loud, quiet, settings=QUICK):
        for channel in (loud, quiet):
            for n in range(5):
                await channel.receive("busy", f"{channel.name}{n}", str(n))
            await channel.receive("idle", f"{channel.name}-c", "/status")
        await agent.wait_begun(2)
        await trio.sleep(1)
    assert loud.texts("busy") == [STOPPING_NOTICE]
    for _ in range(2):
        async with machine.boot(agent, loud, quiet, settings=QUICK):
            await trio.sleep(30)
    assert loud.texts("busy") == [STOPPING_NOTICE, *([RESUMED_NOTICE, STOPPING_NOTICE] * 2)]
    agent.release()
    off = Settings(grace=1.0, notices=False)
    async with machine.boot(agent, loud, quiet, settings=off) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert len([d for d in loud.sent if d.kind is ReplyKind.NOTICE]) == 5
    assert not [d for d in quiet.sent if d.kind is ReplyKind.NOTICE]
    assert all(not d.final for d in loud.sent if d.kind is ReplyKind.NOTICE)
    assert [d.text for d in loud.sent if d.final and d.session.name == "busy"] == [
        f"re: {n}" for n in range(5)
    ]


async def test_c25_a_notice_never_outlives_its_epoch(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It could not be sent in its life, or was refused for good: no later life sends it, and nobody
    is asked to look at it."""
    agent = Script()
    channel = MemoryChannel(notices=True)

    async def no_notices(delivery: Delivery) -> None:
        if delivery.kind is ReplyKind.NOTICE:
            raise OSError("the line")

    channel.before_send = no_notices
    await interrupt(machine, agent, ("memory:a", "m1"), channels=(channel,))
    channel.before_send = None
    agent.release()
    async with machine.boot(agent, channel, settings=Settings(notices=False)) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts() == ["re: text of m1"]
    assert machine.rows("SELECT DISTINCT state FROM delivery WHERE kind = 'notice'") == [
        ("dropped",)
    ]


async def test_c25_a_notice_that_a_kill_cut_is_no_news_any_more(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Committed, being sent, and the process dies: the next life says nothing of it."""
    agent = Script()
    channel = MemoryChannel(notices=True)

    async def hang(delivery: Delivery) -> None:
        await trio.sleep(60)

    channel.before_send = hang
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await channel.receive("a", "m1", "hi")
        await agent.wait_begun(1)
        gateway.request_stop()
        await trio.sleep(0.5)
        machine.crash()
        gateway.request_stop(now=True)
    notices = "SELECT DISTINCT state FROM delivery WHERE kind = 'notice'"
    assert machine.rows(notices) == [("pending",)]
    channel.before_send = None
    agent.release()
    async with machine.boot(agent, channel, settings=Settings(notices=False)) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts() == ["re: hi"]
    assert machine.rows(notices) == [("dropped",)]


# ----- p05: no guess


async def test_p05_nothing_but_the_marker_decides(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Times in the store are nonsense: exactly the open turns resume all the same."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        agent.release("done")
        await gateway.accept([msg("done", "m0"), msg("open", "m1"), msg("stopped", "m2")])
        await agent.wait_begun(3)
        await gateway.accept(msg("stopped", "c1", "/stop"))
    edit_store(
        machine.store,
        lambda ledger: ledger._run("UPDATE turn SET begun_at = 4e18, attempt_at = -1"),
    )
    before = len(agent.turns)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert [turn.session.name for turn in agent.turns[before:]] == ["open"]
