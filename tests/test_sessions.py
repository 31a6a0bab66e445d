"""Sessions: order, busy policies, limits, chat commands, history (promise 2, c36)."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
import pytest
import trio
from helpers import PATIENCE, Log, Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    AgentMisuse,
    Busy,
    ConfigError,
    Gateway,
    HistoryItem,
    Limits,
    Message,
    ReceiptStatus,
    Refused,
    ReplyKind,
    ResumeRules,
    SessionKey,
    Settings,
    Turn,
    TurnState,
    open_gateway,
)
from trio_gateway._events import (
    GatewayStarted,
    MessageUnreadable,
    SettleDelayed,
    TurnBegun,
    TurnSettled,
)
from trio_gateway._policy import REPLACED
from trio_gateway._sessions import Sessions
from trio_gateway.store import Begin, Begun, SqliteStore, edit_store
from trio_gateway.testing import MemoryChannel, check_invariants

# ----- order and slots


async def test_p02_c36_order_per_session_under_load(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """30 sessions, 20 messages each, in random order of arrival, with turns of random length, and
    two stops in the middle: each session is answered in the order of acceptance, one at a time."""
    dice = random.Random(7)
    open_in: dict[str, int] = {}
    answered: dict[str, list[str]] = {}

    async def agent(turn: Turn) -> str:
        session = turn.session.name
        open_in[session] = open_in.get(session, 0) + 1
        assert open_in[session] == 1
        try:
            await trio.sleep(dice.random())
        finally:
            open_in[session] -= 1
        answered.setdefault(session, []).append(turn.text)
        return turn.text

    messages = [msg(f"s{s}", f"{s}-{n}", str(n)) for n in range(20) for s in range(30)]
    settings = Settings(limits=Limits(turns=7), grace=0.3, budget=5.0)
    for third in (messages[:200], messages[200:400], messages[400:]):
        async with machine.boot(agent, settings=settings) as gateway:
            for message in third:
                assert (await gateway.accept(message)).accepted
                await trio.sleep(dice.random() / 50)
            if third[-1] is messages[-1]:
                await gateway.wait_idle()
                settled_well(gateway)
    for session in range(30):
        assert machine.said(f"s{session}") == [str(n) for n in range(20)]
        assert answered[f"s{session}"] == [str(n) for n in range(20)]


async def test_p02_first_come_first_served(machine: Machine, autojump_clock: MockClock) -> None:
    """With one slot, turns begin in the order in which sessions got mail, and a busy session does
    not keep the slot from those who wait longer."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(limits=Limits(turns=1))) as gateway:
        for n, session in enumerate("abacba"):
            await gateway.accept(msg(session, f"m{n}", str(n)))
        for session in "abc":
            agent.release(session)
        await gateway.wait_idle()
        settled_well(gateway)
    assert [session for session, _, _ in agent.begun] == list("abcaba")


async def test_p02_slots_are_a_limit_and_come_back(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """However turns end (answered, failed, stopped, timed out, replaced), the slot comes back."""
    most = 0
    running = 0

    async def agent(turn: Turn) -> str | None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        try:
            if turn.text == "fail":
                raise ValueError("x")
            await trio.sleep(100 if turn.text == "long" else 1)
        finally:
            running -= 1
        return None if turn.text == "mute" else "ok"

    settings = Settings(limits=Limits(turns=3), time_limit=10.0, busy=Busy.INTERRUPT)
    texts = ["fail", "long", "mute", "short", "/stop", "long", "/status", "short", "/new", "/retry"]
    async with machine.boot(agent, settings=settings) as gateway:
        for n in range(120):
            await gateway.accept(msg(f"s{n % 11}", f"m{n}", texts[n % len(texts)]))
            if n % 7 == 0:
                await trio.sleep(0.5)
            if n % 13 == 0:
                await gateway.stop_turn(SessionKey("local", f"s{n % 5}"))
        await gateway.wait_idle()
        settled_well_with(gateway.statistics(), slots=3)
    assert most == 3
    assert running == 0


def settled_well_with(statistics: dict[str, int], *, slots: int) -> None:
    """All counts are zero again, and all slots free."""
    assert statistics.pop("slots_free") == slots
    assert set(statistics.values()) == {0}


async def test_p06_a_slot_is_not_free_while_its_commit_is_pending(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Two slots, one settle that fails for a while: the other slot serves everybody meanwhile, and
    nobody begins in the place of the one that has not settled."""
    agent = Script()
    failing = True

    async with machine.boot(agent, settings=Settings(limits=Limits(turns=2))) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2"), msg("c", "m3"), msg("d", "m4")])
        await agent.wait_begun(2)

        def fail(moment: str) -> None:
            if failing:
                raise apsw.FullError("full")

        machine.on_commit = fail
        agent.release("a")
        await machine.log.wait_for(SettleDelayed)
        await trio.sleep(5)
        assert gateway.statistics()["slots_free"] == 0
        assert len(agent.turns) == 2
        failing = False
        await agent.wait_begun(3)
        assert machine.fate("m1") == "answered"
        agent.release()
        await gateway.wait_idle()
        settled_well_with(gateway.statistics(), slots=2)


async def test_p02_an_idle_session_costs_no_memory(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """500 sessions were served: none is in memory, whether through the outbox or not."""
    agent = Script(open=True)
    channel = MemoryChannel()
    async with machine.boot(agent, channel) as gateway:
        await channel.wait_ready()
        await channel.receive_all(*(channel.message(f"c{n}", f"c{n}", "hi") for n in range(250)))
        await gateway.accept([msg(f"l{n}", f"l{n}") for n in range(250)])
        await gateway.wait_idle()
        settled_well(gateway)
    assert len(channel.sent) == 250


async def test_p02_begins_that_find_nothing_forget_no_mail(
    machine: Machine, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a begin did not find may have been committed just after it, also twice in a row."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=1.0, budget=10.0)) as gateway:
        await gateway.accept(msg("a", "m1"))
        gateway.request_stop()
        await gateway.accept(msg("b", "m2"))
    agent.release()
    real, too_early = SqliteStore.begin, [1, 2, 3]

    async def begin(store: SqliteStore, request: Begin) -> Begun:
        if too_early:
            too_early.pop()
            await trio.lowlevel.checkpoint()
            return Begun(None)
        return await real(store, request)

    monkeypatch.setattr(SqliteStore, "begin", begin)
    async with machine.boot(agent) as gateway:
        with trio.fail_after(60):
            await gateway.wait_idle()
    assert not too_early
    assert machine.fate("m2") == "answered"


def test_p02_the_count_of_waiting_mail_is_right_in_whatever_order_it_is_heard() -> None:
    """A turn may be heard to have taken a message before it is heard that it waits."""
    sessions = Sessions(10, lambda _: True, collect=False)
    session = sessions.get(SessionKey("jsonl", "a"))
    for change in (-1, +1, -3, +1, +2):
        sessions.queue(session, change)
    assert session.queued == 0


async def test_p02_turns_that_take_their_mail_are_not_overtaken(memory_path: Path) -> None:
    """Real threads, and people who write and stop faster than they are answered: for a second."""
    dice = random.Random(1)

    async def agent(turn: Turn) -> str:
        if turn.text == "takes":
            with trio.move_on_after(0.005):
                async for _ in turn.arrivals():
                    continue
        return turn.text

    async def talk(gateway: Gateway, session: str) -> None:
        for number in range(100):
            texts = dice.choices(["takes", "hello", "hello", "/stop"], k=dice.choice([1, 1, 2, 3]))
            batch = [msg(session, f"{session}-{number}-{n}", t) for n, t in enumerate(texts)]
            await gateway.accept(batch)
            await trio.sleep(dice.random() * 0.004)

    path = memory_path / "gateway.db"
    async with open_gateway(agent, store=path, settings=Settings(busy=Busy.STEER)) as gateway:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(talk, gateway, f"s{number}")
        with trio.fail_after(PATIENCE):
            await gateway.wait_idle()
        settled_well(gateway)
    check_invariants(path, settled=True)


# ----- busy policies


async def test_busy_queue_answers_one_by_one(machine: Machine, autojump_clock: MockClock) -> None:
    """The default: what arrives during a turn waits, and has a turn of its own."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept([msg("a", f"m{n}", str(n)) for n in range(3)])
        await agent.wait_begun(1)
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == ["re: 0", "re: 1", "re: 2"]


async def test_busy_collect_answers_together(machine: Machine, autojump_clock: MockClock) -> None:
    """All that waits goes into the next turn together; also what waited over a boot."""
    agent = Script()
    settings = Settings(busy=Busy.COLLECT, grace=1.0)
    async with machine.boot(agent, settings=settings) as gateway:
        for n in range(4):
            await gateway.accept(msg("a", f"m{n}", str(n)))
        await agent.wait_begun(1)
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
        (reply,) = await gateway.ask(msg("a", "m3"))
    assert reply.in_reply_to == ("m1", "m2", "m3")
    assert machine.said() == ["re: 0", "re: 1\n2\n3"]
    assert [m.id for m in agent.turns[1].messages] == ["m1", "m2", "m3"]
    assert agent.turns[1].message.id == "m3"
    assert [machine.fate(f"m{n}") for n in range(4)] == ["answered"] * 4


async def test_busy_interrupt_replaces_the_turn(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The turn is stopped, and told why; the next one gets both messages. Many times over."""
    reasons: list[str | None] = []

    async def agent(turn: Turn) -> str:
        try:
            await trio.sleep(10)
        except trio.Cancelled as cancelled:
            reasons.append(cancelled.reason)
            raise
        return turn.text

    async with machine.boot(agent, settings=Settings(busy=Busy.INTERRUPT)) as gateway:
        for n in range(4):
            await gateway.accept(msg("a", f"m{n}", str(n)))
            await trio.sleep(1)
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == ["0\n1\n2\n3"]
    assert reasons == [REPLACED] * 3
    states = [event.state for event in machine.log.of(TurnSettled)]
    assert states == [TurnState.STOPPED] * 3 + [TurnState.COMPLETED]


async def test_busy_interrupt_all_at_once(machine: Machine, autojump_clock: MockClock) -> None:
    """Ten messages of one session in one batch: the last turn has all of them, in order."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(busy=Busy.INTERRUPT)) as gateway:
        await gateway.accept([msg("a", f"m{n}", str(n)) for n in range(10)])
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    ids = [m.id for m in agent.turns[-1].messages]
    assert ids == [f"m{n}" for n in range(10)]
    assert [machine.fate(f"m{n}") for n in range(10)] == ["answered"] * 10
    assert len(machine.said()) == 1


async def test_busy_interrupt_of_a_turn_that_waits_to_resume(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A newer message arrives before the interrupted turn could resume: the next turn gets both."""
    agent = Script()
    settings = Settings(busy=Busy.INTERRUPT, grace=1.0)
    channel = MemoryChannel(connected=False)
    channel.connect()
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await channel.receive("a", "m1", "first")
        await agent.wait_begun(1)
    later = MemoryChannel(connected=False)
    agent.release()
    async with machine.boot(agent, later, settings=settings) as gateway:
        await gateway.accept(later.message("a", "m2", "second"))
        await trio.sleep(5)
        assert len(agent.turns) == 1
        later.connect()
        await gateway.wait_idle()
        settled_well(gateway)
    assert agent.begun[1:] == [("a", 1, "first\nsecond")]
    assert later.texts() == ["re: first\nsecond"]


async def test_busy_steer_takes_messages_into_the_turn(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The running agent can take what arrives; it is answered by this turn."""
    taken: list[str] = []

    async def agent(turn: Turn) -> str:
        async for message in turn.arrivals():
            taken.append(message.text)
            if message.text == "enough":
                break
        return turn.text

    async with machine.boot(agent, settings=Settings(busy=Busy.STEER)) as gateway:
        await gateway.accept(msg("a", "m1", "go"))
        await trio.sleep(1)
        await gateway.accept([msg("a", "m2", "left"), msg("a", "m3", "right")])
        await trio.sleep(1)
        await gateway.accept(msg("a", "m4", "enough"))
        (reply,) = await gateway.ask(msg("a", "m4", "enough"))
        assert reply.in_reply_to == ("m1", "m2", "m3", "m4")
        await gateway.wait_idle()
        settled_well(gateway)
    assert taken == ["left", "right", "enough"]
    assert reply.text == "go\nleft\nright\nenough"
    assert [machine.fate(f"m{n}") for n in range(1, 5)] == ["answered"] * 4


async def test_busy_steer_what_is_not_taken_waits(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """And what was taken stays with the turn, also when it resumes."""

    async def agent(turn: Turn) -> str:
        if turn.text == "go":
            async for _ in turn.arrivals():
                break
            await trio.sleep(20)
        return turn.text

    settings = Settings(busy=Busy.STEER, grace=1.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", f"m{n}", text) for n, text in enumerate(["go", "x", "y"])])
        await trio.sleep(5)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == ["go\nx", "y"]


async def test_busy_steer_two_listeners_of_one_turn_both_wake(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Two subtasks that wait for arrivals: each message reaches exactly one, and none is left
    sleeping while messages wait."""
    got: list[tuple[int, str]] = []

    async def listen(turn: Turn, n: int, nursery: trio.Nursery) -> None:
        async for message in turn.arrivals():
            got.append((n, message.text))
            if len(got) == 6:
                nursery.cancel_scope.cancel()
            await trio.sleep(1)

    async def agent(turn: Turn) -> str:
        async with trio.open_nursery() as nursery:
            for n in range(2):
                nursery.start_soon(listen, turn, n, nursery)
        return "done"

    async with machine.boot(agent, settings=Settings(busy=Busy.STEER)) as gateway:
        await gateway.accept(msg("a", "m0"))
        await trio.sleep(1)
        await gateway.accept([msg("a", f"x{n}", str(n)) for n in range(4)])
        await trio.sleep(10)
        await gateway.accept([msg("a", f"y{n}", str(n + 4)) for n in range(2)])
        with trio.fail_after(60):
            await gateway.wait_idle()
        settled_well(gateway)
    assert sorted(text for _, text in got) == list("012345")
    assert {n for n, _ in got} == {0, 1}


async def test_busy_steer_arrivals_end_with_the_drain(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """An agent that only listens is let go when the gateway drains, without a moment's delay."""

    async def agent(turn: Turn) -> str:
        async for _ in turn.arrivals():
            pytest.fail("nobody wrote")
        return "nobody wrote"

    async with machine.boot(agent, settings=Settings(busy=Busy.STEER)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(5)
        began = trio.current_time()
    assert trio.current_time() == began
    assert machine.said() == ["nobody wrote"]


async def test_busy_steer_needs_the_policy(machine: Machine, autojump_clock: MockClock) -> None:
    """With another policy, `arrivals` says what to set."""
    errors: list[str] = []

    async def agent(turn: Turn) -> None:
        try:
            turn.arrivals()
        except AgentMisuse as error:
            errors.append(str(error))

    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1"))
    assert errors == ['arrivals: needs busy = "steer", it is "queue"']


async def test_busy_reject_refuses_and_says_so(machine: Machine, autojump_clock: MockClock) -> None:
    """Refused while a turn is open; a repeat of what was accepted is a duplicate all the same."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(busy=Busy.REJECT)) as gateway:
        assert (await gateway.accept(msg("a", "m1"))).accepted
        refused = await gateway.accept(msg("a", "m2"))
        assert refused.status is ReceiptStatus.REFUSED
        assert "busy" in (refused.reason or "")
        assert refused.retryable
        again = await gateway.accept(msg("a", "m1"))
        assert again.status is ReceiptStatus.DUPLICATE
        assert (await gateway.accept(msg("b", "m3"))).accepted
        stop = await gateway.accept(msg("a", "c1", "/stop"))
        assert stop.accepted
        agent.release()
        await gateway.wait_idle()
        assert (await gateway.accept(msg("a", "m2"))).accepted
        await gateway.wait_idle()
        settled_well(gateway)
    assert [machine.fate(m) for m in ("m1", "m2", "m3")] == ["stopped", "answered", "answered"]


# ----- chat commands


async def test_command_stop_ends_the_turn_for_good(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The agent is told why, the message ends stopped, the next one is answered."""
    reasons: list[str | None] = []

    async def agent(turn: Turn) -> str:
        if turn.text == "long":
            try:
                await trio.sleep_forever()
            except trio.Cancelled as cancelled:
                reasons.append(cancelled.reason)
                raise
        return turn.text

    async with machine.boot(agent) as gateway:
        await gateway.accept([msg("a", "m1", "long"), msg("a", "m2", "next")])
        await trio.sleep(1)
        (said,) = await gateway.ask(msg("a", "c1", "/STOP \n"))
        assert (said.text, said.kind, said.in_reply_to) == ("Stopped.", ReplyKind.COMMAND, ("c1",))
        assert said.final
        await gateway.wait_idle()
        settled_well(gateway)
    assert reasons == ["stopped by the user"]
    assert machine.said() == ["Stopped.", "next"]
    assert [machine.fate(m) for m in ("m1", "m2")] == ["stopped", "answered"]


async def test_command_stop_ends_what_waits_for_a_slot(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """No turn is open yet: what waits ends. And a message that comes after it is served."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(limits=Limits(turns=1))) as gateway:
        await gateway.accept([msg("busy", "m0"), msg("a", "m1"), msg("a", "m2")])
        (said,) = await gateway.ask(msg("a", "c1", "/stop"))
        assert said.text == "Stopped."
        (said,) = await gateway.ask(msg("a", "c2", "/stop"))
        assert said.text == "There is nothing to stop."
        await gateway.accept(msg("a", "m3"))
        agent.release()
        await gateway.wait_idle()
        settled_well_with(gateway.statistics(), slots=1)
    assert [machine.fate(f"m{n}") for n in range(4)] == [
        "answered",
        "stopped",
        "stopped",
        "answered",
    ]


async def test_command_stop_races_the_begin(machine: Machine, autojump_clock: MockClock) -> None:
    """/stop at every step of the way between a free slot and the next begin: no message hangs, no
    count is wrong."""
    for steps in range(14):
        agent = Script(open=True)
        channel = MemoryChannel()
        names = f"busy{steps}", f"a{steps}"
        settings = Settings(limits=Limits(turns=1))
        async with machine.boot(agent, channel, settings=settings) as gateway:
            await channel.wait_ready()
            async with trio.open_nursery() as nursery:
                for n, name in enumerate((*names, names[1])):
                    await channel.receive(name, f"{steps}-{n}", "hi")
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(channel.receive, names[1], f"{steps}-stop", "/stop")
                nursery.start_soon(channel.receive, names[1], f"{steps}-x", "x")
            await channel.receive(names[1], f"{steps}-last", "last")
            with trio.fail_after(100):
                await gateway.wait_idle()
            settled_well_with(gateway.statistics(), slots=1)
            assert machine.fate(f"{steps}-last") == "answered"


async def test_command_stop_of_a_turn_that_waits_to_resume(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Stopped before its turn came round again: never resumed, and its session goes on at once,
    not behind the other turns that resume."""
    agent = Script()
    settings = Settings(grace=1.0, resume=ResumeRules(concurrency=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("slow", "m0"), msg("a", "m1")])
        await agent.wait_begun(2)
    async with machine.boot(agent, settings=settings) as gateway:
        await agent.wait_begun(3)
        resuming = agent.turns[2].session.name
        (waiting,) = {"slow", "a"} - {resuming}
        (said,) = await gateway.ask(msg(waiting, "c1", "/stop"))
        assert said.text == "Stopped."
        agent.release(waiting)
        with trio.fail_after(60):
            (reply,) = await gateway.ask(msg(waiting, "m2", "and now?"))
        assert reply.text == "re: and now?"
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    assert [t.session.name for t in agent.turns if t.resumed] == [resuming]


async def test_command_new_begins_a_conversation(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """History before /new is not handed to the agent."""
    seen: list[list[str]] = []

    async def agent(turn: Turn) -> str:
        seen.append([f"{item.role}: {item.text}" for item in await turn.history()])
        return f"re: {turn.text}"

    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1", "one"))
        await gateway.ask(msg("a", "m2", "two"))
        (said,) = await gateway.ask(msg("a", "c1", "/new"))
        assert said.text == "A new conversation."
        await gateway.ask(msg("a", "m3", "three"))
        await gateway.ask(msg("a", "m4", "four"))
        await gateway.ask(msg("b", "m5", "another's"))
    assert seen == [
        [],
        ["user: one", "agent: re: one"],
        [],
        ["user: three", "agent: re: three"],
        [],
    ]


async def test_command_retry_tries_the_last_unanswered_message_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A failed turn is tried again from what its steps remember; an answered one is not."""
    done: list[str] = []
    failing = True

    async def think() -> str:
        done.append("thought")
        return "42"

    async def agent(turn: Turn) -> str:
        thought = await turn.step(think)
        if failing and turn.text == "hard":
            raise ValueError("not yet")
        return thought

    async with machine.boot(agent) as gateway:
        (said,) = await gateway.ask(msg("a", "c0", "/retry"))
        assert said.text == "There is nothing to try again."
        (apology,) = await gateway.ask(msg("a", "m1", "hard"))
        assert apology.kind is ReplyKind.APOLOGY
        failing = False
        (said,) = await gateway.ask(msg("a", "c1", "/retry"))
        assert said.text == "Trying again."
        await gateway.wait_idle()
        assert machine.fate("m1") == "answered"
        (said,) = await gateway.ask(msg("a", "c2", "/retry"))
        assert said.text == "There is nothing to try again."
        settled_well(gateway)
    assert done == ["thought"]
    assert machine.said()[-2] == "42"


async def test_command_retry_of_what_was_stopped(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Stopped before it began, stopped while it ran: both can be tried again, and answered."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(limits=Limits(turns=1))) as gateway:
        await gateway.accept([msg("busy", "m0"), msg("a", "m1")])
        await gateway.ask(msg("a", "c1", "/stop"))
        await gateway.ask(msg("a", "c2", "/retry"))
        agent.release("busy")
        await agent.wait_begun(2)
        await gateway.ask(msg("a", "c3", "/stop"))
        await gateway.ask(msg("a", "c4", "/retry"))
        agent.release()
        await gateway.wait_idle()
        settled_well_with(gateway.statistics(), slots=1)
    assert machine.fate("m1") == "answered"


async def test_command_status_and_help(machine: Machine, autojump_clock: MockClock) -> None:
    """What is going on, in words; also over a channel, in the session's order."""
    agent = Script()
    channel = MemoryChannel()
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "c0", "/status")
        await channel.receive("a", "m1", "hi")
        await channel.receive("a", "m2", "hi")
        await channel.receive("a", "c1", "/status")
        await channel.receive("a", "c2", "/help")
        await channel.wait_sent(3)
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    idle, working, help_text = channel.texts()[:3]
    assert idle == "No answer is in progress. Messages waiting: 0."
    assert working == "Working on it (attempt 1). Messages waiting: 1."
    assert all(word in help_text for word in ("/stop", "/new", "/retry", "/status", "/help"))


async def test_commands_are_messages_when_they_are_off(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """One setting turns them off; and a command stands alone, or it is a message."""
    agent = Script(open=True)
    async with machine.boot(agent, settings=Settings(commands=False)) as gateway:
        (reply,) = await gateway.ask(msg("a", "m1", "/stop"))
        assert reply.text == "re: /stop"
    async with machine.boot(agent) as gateway:
        (reply,) = await gateway.ask(msg("a", "m2", "/stop it"))
        assert reply.text == "re: /stop it"
        (reply,) = await gateway.ask(msg("a", "m3", "/unknown"))
        assert reply.text == "re: /unknown"


async def test_a_command_that_is_sent_twice_is_obeyed_once(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The platform repeats /stop after the next turn began: that one is not stopped by it."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        first = await gateway.ask(msg("a", "c1", "/stop"))
        await gateway.accept(msg("a", "m2"))
        await agent.wait_begun(2)
        assert await gateway.ask(msg("a", "c1", "/stop")) == first
        agent.release()
        await gateway.wait_idle()
    assert [machine.fate(m) for m in ("m1", "m2")] == ["stopped", "answered"]


async def test_commands_pass_a_full_inbox(machine: Machine, autojump_clock: MockClock) -> None:
    """Nobody is kept from saying /stop."""
    agent = Script()
    limits = Limits(open_per_session=1, open_messages=1)
    async with machine.boot(agent, settings=Settings(limits=limits)) as gateway:
        await gateway.accept(msg("a", "m1"))
        assert not (await gateway.accept(msg("a", "m2"))).accepted
        assert (await gateway.accept(msg("a", "c1", "/stop"))).accepted
        await gateway.wait_idle()
        assert (await gateway.accept(msg("a", "m2"))).accepted
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)


# ----- history


async def test_history_is_what_was_said_before(machine: Machine, autojump_clock: MockClock) -> None:
    """Oldest first, with say()s and apologies, without commands and notices, within the limit."""
    seen: list[tuple[HistoryItem, ...]] = []

    async def agent(turn: Turn) -> str | None:
        seen.append(await turn.history(int(turn.text) if turn.text.isdigit() else 50))
        if turn.text == "fail":
            raise ValueError("x")
        if turn.text == "talk":
            await turn.say("first")
            await turn.say("sec\0ond")
        return None if turn.text == "mute" else f"re: {turn.text}"

    async with machine.boot(agent) as gateway:
        for n, text in enumerate(["talk", "/status", "mute", "fail", "0", "2", "last"]):
            await gateway.ask(msg("a", f"m{n}", text))
        lines = await gateway.history(SessionKey("local", "a"), 3)
    told = [f"{item.role}: {item.text}" for item in seen[-1]]
    assert told[:5] == [
        "user: talk",
        "agent: first",
        "agent: sec\0ond",
        "agent: re: talk",
        "user: mute",
    ]
    assert told[5] == "user: fail"
    assert told[6].startswith("agent: Sorry")
    assert told[7:] == ["user: 0", "agent: re: 0", "user: 2", "agent: re: 2"]
    assert seen[3] == ()
    assert [item.text for item in seen[4]] == ["0", "re: 0"]
    assert [item.text for item in lines] == ["re: 2", "last", "re: last"]
    assert all(item.at.utcoffset() is not None for item in seen[-1])
    assert seen[-1][0].message_id == "m0"


async def test_history_of_a_resumed_turn_is_the_same(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What was accepted meanwhile is the future, not the past."""
    seen: list[list[str]] = []
    settings = Settings(grace=1.0)

    async def agent(turn: Turn) -> str:
        seen.append([item.text for item in await turn.history()])
        if turn.text == "long" and turn.resumed is None:
            await turn.say("working")
            await trio.sleep_forever()
        return "done"

    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.ask(msg("a", "m1", "one"))
        await gateway.accept([msg("a", "m2", "long"), msg("a", "m3", "later")])
        await trio.sleep(1)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
    assert seen == [
        [],
        ["one", "done"],
        ["one", "done"],
        ["one", "done", "long", "working", "done"],
    ]


# ----- limits


async def test_stop_turn_by_the_host(machine: Machine, autojump_clock: MockClock) -> None:
    """Like /stop; False where there is nothing to stop, also for a session nobody knows."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        assert not await gateway.stop_turn(SessionKey("local", "nobody"))
        assert not await gateway.stop_turn(SessionKey("elsewhere", "a"))
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        assert [info.session.name for info in gateway.turns()] == ["a"]
        assert await gateway.stop_turn(SessionKey("local", "a"))
        assert not await gateway.stop_turn(SessionKey("local", "a"))
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.fate("m1") == "stopped"


async def test_turns_tells_who_runs(machine: Machine, autojump_clock: MockClock) -> None:
    """Id, session, attempt, and for how long."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        (turn,) = await agent.wait_begun(1)
        await trio.sleep(12)
        (info,) = gateway.turns()
        assert (info.id, info.session, info.attempt) == (turn.id, turn.session, 1)
        assert info.running_for == pytest.approx(12.0)
        agent.release()
        await gateway.wait_idle()
        assert gateway.turns() == ()


async def test_sessions_of_one_name_in_two_channels_are_two(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A session belongs to its channel; so do message ids."""
    agent = Script(open=True)
    one, two = MemoryChannel("one"), MemoryChannel("two")
    async with machine.boot(agent, one, two) as gateway:
        await one.receive("a", "m1", "from one")
        receipt = await two.receive("a", "m1", "from two")
        assert receipt.status is ReceiptStatus.ACCEPTED
        await gateway.accept(Message(session="a", id="m1", text="from here"))
        await gateway.wait_idle()
        settled_well(gateway)
    assert (one.texts(), two.texts()) == (["re: from one"], ["re: from two"])
    assert len(machine.log.of(TurnBegun)) == 3


async def test_p01_two_who_ask_for_one_message_both_hear(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Whoever else asks for the same message, and however that goes, each gets the answer."""
    agent = Script()
    heard: list[str] = []

    async def ask(gateway: Gateway, text: str) -> None:
        try:
            (reply,) = await gateway.ask(msg("a", "m1", text))
            heard.append(reply.text)
        except Refused:
            heard.append("refused")

    limits = Limits(message_bytes=10)
    async with machine.boot(agent, settings=Settings(limits=limits)) as gateway:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, gateway, "hi")
                await agent.wait_begun(1)
                await ask(gateway, "far too long to be accepted")
                nursery.start_soon(ask, gateway, "hi")
                with trio.move_on_after(1):
                    await ask(gateway, "hi")
                agent.release()
        assert not gateway._waiters
    assert heard == ["refused", "re: hi", "re: hi"]


@pytest.mark.parametrize("inline", [True, False])
async def test_p01_who_asks_for_the_last_answer_of_a_drain_gets_it(
    tmp_path: Path, inline: bool
) -> None:
    """Many who ask, all answered in the last moment: each reads its answer before the store
    closes."""
    heard: list[str] = []

    async def agent(turn: Turn) -> str:
        await turn.draining.wait_value(True)
        return f"re: {turn.message.id}"

    async def ask(gateway: Gateway, n: int) -> None:
        (reply,) = await gateway.ask(msg(f"s{n}", f"m{n}"))
        heard.append(reply.text)

    log = Log()
    with trio.fail_after(PATIENCE):
        async with (
            trio.open_nursery() as nursery,
            open_gateway(
                agent, store=tmp_path / "gateway.db", listen=log, inline_store=inline
            ) as gateway,
        ):
            for n in range(50):
                nursery.start_soon(ask, gateway, n)
            await log.wait_for(TurnBegun, 50)
    assert sorted(heard) == sorted(f"re: m{n}" for n in range(50))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("one", "one"), "two channels are called 'one': rename one"),
        (("local",), "is 'local', which is what the host's own sessions are called"),
        (("Bad Name",), "is 'Bad Name': use small letters, digits, _ and -"),
        (("",), "is '': use small letters"),
    ],
)
async def test_p14_channels_whose_names_do_not_do(
    machine: Machine, autojump_clock: MockClock, names: tuple[str, ...], says: str
) -> None:
    """Named, with what to do, before anything is opened."""
    channels = [MemoryChannel(name) for name in names]
    with pytest.raises(ConfigError, match=says):
        async with machine.boot(Script(), *channels):
            pytest.fail("it was served")
    assert not machine.store.exists()


async def spoil(machine: Machine, message_id: str) -> None:
    """Make a stored message unreadable, as a failing disk would."""
    body = '{"text": 42'
    edit_store(
        machine.store,
        lambda ledger: ledger._run("UPDATE message SET body = ? WHERE id = ?", (body, message_id)),
    )


async def test_c54_an_unreadable_message_ends_for_who_asks_and_who_waits(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """In a session of the host's own: it ends failed, its apology is what `ask` returns, nothing is
    left to deliver, and what is behind it is answered."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=0.5)) as gateway:
        gateway.request_stop()
        await gateway.accept([msg("a", "m1"), msg("a", "bad"), msg("a", "m2")])
    await spoil(machine, "bad")
    agent.release()
    async with machine.boot(agent) as gateway:
        (apology,) = await gateway.ask(msg("a", "bad"))
        assert apology.kind is ReplyKind.APOLOGY
        assert apology.in_reply_to == ("bad",)
        await gateway.wait_idle()
        settled_well(gateway)
    assert [machine.fate(m) for m in ("m1", "bad", "m2")] == ["answered", "failed", "answered"]
    assert machine.log.of(MessageUnreadable)[0].message_id == "bad"
    async with machine.boot(agent) as gateway:
        assert machine.log.of(GatewayStarted)[-1].undelivered == 0


async def test_c54_an_unreadable_message_that_an_agent_would_take(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """With the policy steer: skipped, ended, apologised for; the agent gets the next one."""
    channel = MemoryChannel()

    async def agent(turn: Turn) -> str:
        while await turn.take() is not None:
            await trio.lowlevel.checkpoint()
        return turn.text

    settings = Settings(busy=Busy.STEER, grace=0.5)
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await channel.wait_ready()
        gateway.request_stop()
        texts = ["one", "bad", "two", "bad too", "three"]
        await channel.receive_all(
            *(channel.message("a", f"m{n}", text) for n, text in enumerate(texts))
        )
    for bad in ("m1", "m3"):
        await spoil(machine, bad)
    async with machine.boot(agent, channel, settings=settings) as gateway:
        with trio.fail_after(60):
            await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts()[-1] == "one\ntwo\nthree"
    assert len(channel.sent) == 3
    assert [machine.fate(f"m{n}") for n in range(5)] == [
        "answered",
        "failed",
        "answered",
        "failed",
        "answered",
    ]


async def test_p06_a_begin_that_cannot_be_written_holds_up_no_settle(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The settle of one session carries the begin of the next: where that is what fails, the settle
    goes alone."""
    agent = Script()
    settings = Settings(limits=Limits(turns=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(1)
        ledger = gateway._store._ledger
        begin, failures = ledger.begin, 0

        def fail(request: Begin) -> Begun:
            nonlocal failures
            failures += 1
            if failures < 6:
                raise apsw.ConstraintError("a row that nobody expected")
            return begin(request)

        ledger.begin = fail  # type: ignore[method-assign]
        agent.release()
        await machine.log.wait_for(TurnSettled)
        assert machine.fate("m1") == "answered"
        assert 0 < failures < 6
        await gateway.wait_idle()
        settled_well_with(gateway.statistics(), slots=1)
    assert machine.fate("m2") == "answered"
