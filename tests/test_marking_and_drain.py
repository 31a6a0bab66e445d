"""Stops: markers first, then a window, then the account (c01 to c16)."""

from __future__ import annotations

from datetime import UTC, timedelta

import apsw
import pytest
import trio
from helpers import Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    Delivery,
    DrainReport,
    Event,
    Gateway,
    Limits,
    Message,
    ReplyKind,
    ResumeReason,
    Settings,
    Turn,
    TurnState,
)
from trio_gateway._clock import as_datetime
from trio_gateway._events import (
    MarkingFailed,
    SettleDelayed,
    StopRequested,
    StoreTrouble,
    TurnInterrupted,
    TurnResumed,
    TurnSettled,
    TurnsMarked,
)
from trio_gateway._policy import plan_stop
from trio_gateway.testing import MemoryChannel


def report_of(gateway: Gateway) -> DrainReport:
    """The report of a gateway that has stopped."""
    assert gateway.report is not None
    return gateway.report


async def test_c01_one_transaction_marks_all_before_anything_else(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """1,000 open turns: one commit, durable before a notice, a send or a cancellation."""
    many = 1000
    channel = MemoryChannel("chat", notices=True)
    seen: dict[str, int] = {}

    def look(when: str) -> None:
        if when not in seen:
            states = [state for state, _ in machine.markers().values()]
            seen[when] = states.count("RESUME_PENDING")

    async def agent(turn: Turn) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            look("cancelled")
            raise

    async def before_send(delivery: object) -> None:
        look("send")
        await trio.lowlevel.checkpoint()

    channel.before_send = before_send
    settings = Settings(limits=Limits(turns=many), grace=5.0, budget=20.0)
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await channel.wait_ready()
        await channel.receive_all(*(channel.message(f"s{n}", f"m{n}", "hi") for n in range(many)))
        await trio.testing.wait_all_tasks_blocked()
        before = machine.commits

        def count(event: Event) -> None:
            if isinstance(event, TurnsMarked):
                seen["commits to the mark"] = machine.commits - before

        machine.log.hooks.append(count)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        look("draining")
    assert seen == {"commits to the mark": 1, "draining": many, "send": many, "cancelled": many}
    assert report_of(gateway).marked == many
    assert len(machine.markers()) == many


async def test_c01_a_thread_of_commits_does_not_change_it(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Turns that are busy writing when the stop comes are marked with the others."""

    async def agent(turn: Turn) -> str:
        while True:
            await turn.checkpoint("on the way")
            await trio.sleep(0.1)

    async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
        await gateway.accept([msg(f"s{n}", f"m{n}") for n in range(20)])
        await trio.sleep(1)
        gateway.request_stop()
    assert report_of(gateway).marked == 20
    assert set(machine.markers().values()) == {("RESUME_PENDING", "shutdown")}


async def test_c02_mixed_timeout(machine: Machine, autojump_clock: MockClock) -> None:
    """A settles in the window, B does not: only B is marked afterwards, only B resumes."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=10.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
        a, b = agent.turn_of("a"), agent.turn_of("b")
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        assert machine.markers() == dict.fromkeys("ab", ("RESUME_PENDING", "shutdown"))
        agent.release("a")
    assert machine.markers() == {"b": ("RESUME_PENDING", "shutdown")}
    report = report_of(gateway)
    assert (report.settled, report.interrupted) == ((a.id,), (b.id,))
    assert report.timed_out
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert sorted(agent.begun) == [("a", 1, "hi"), ("b", 1, "hi"), ("b", 2, "hi")]
    assert machine.said() == ["re: hi", "re: hi"]


async def test_c03_mixed_kill(machine: Machine, autojump_clock: MockClock) -> None:
    """A settles in the window, then SIGKILL while B still runs: only B resumes."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=10.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        agent.release("a")
        await machine.log.wait_for(TurnSettled)
        machine.crash()
        gateway.request_stop(now=True)
    assert machine.markers() == {"b": ("RESUME_PENDING", "shutdown")}
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert sorted(agent.begun) == [("a", 1, "hi"), ("b", 1, "hi"), ("b", 2, "hi")]
    (resumed,) = machine.log.of(TurnResumed)
    assert resumed.reason is ResumeReason.SHUTDOWN
    assert machine.said() == ["re: hi", "re: hi"]


async def test_c04_failed_in_the_drain_is_failed_interrupted_is_not(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """An error that an agent raises by itself is an end; one raised over a cancellation is not."""

    async def agent(turn: Turn) -> str:
        if turn.resumed is not None:
            return "at last"
        await turn.draining.wait_value(True)
        if turn.session.name == "fails":
            raise ValueError("secret")
        try:
            await trio.sleep_forever()
        finally:
            if turn.session.name == "angry":
                raise ValueError("over the cancellation")

    async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
        await gateway.accept([msg(name, name) for name in ("fails", "cut", "angry")])
    assert set(machine.markers()) == {"cut", "angry"}
    assert machine.fate("fails") == "failed"
    (apology,) = machine.said("fails")
    assert apology.startswith("Sorry")
    assert "secret" not in apology
    assert len(machine.log.of(TurnInterrupted)) == 2
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert [machine.fate(name) for name in ("fails", "cut", "angry")] == [
        "failed",
        "answered",
        "answered",
    ]
    assert machine.said("fails") == [apology]


async def test_c05_a_turn_that_is_just_beginning(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The stop at every step of the way from accept to the agent's first line: never lost, never
    run twice, and no agent is called for a turn that is not on disk."""
    for steps in range(12):
        agent = Script(open=True)
        session, message_id = f"s{steps}", f"m{steps}"
        async with (
            machine.boot(agent, settings=Settings(grace=5.0)) as gateway,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(gateway.accept, msg(session, message_id))
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            gateway.request_stop()
        async with machine.boot(agent) as gateway:
            await gateway.wait_idle()
            settled_well(gateway)
        assert machine.fate(message_id) == "answered"
        assert len(agent.ended) == 1
        assert machine.said(session) == ["re: hi"]


async def test_c05_a_batch_that_waits_at_the_inbox_begins_nothing_after_the_mark(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The stop comes while the inbox looks at a batch: what it accepts afterwards waits."""
    agent = Script()
    answer = trio.Event()

    async def authorize(message: Message) -> bool:
        if message.session != "open":
            await answer.wait()
        return True

    settings = Settings(grace=2.0)
    async with machine.boot(agent, authorize=authorize, settings=settings) as gateway:
        await gateway.accept(msg("open", "m0"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.accept, [msg("a", "m1"), msg("b", "m2")])
            await agent.wait_begun(1)
            gateway.request_stop()
            await gateway.draining.wait_value(True)
            answer.set()
    assert agent.begun == [("open", 1, "hi")]
    assert machine.markers() == {"open": ("RESUME_PENDING", "shutdown")}
    assert [machine.fate(m) for m in ("m1", "m2")] == ["queued", "queued"]


async def test_c05_a_refusal_in_a_batch_opens_no_gap(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A refusal is looked up in the store; a stop during that look-up begins no turn after it."""
    agent = Script(open=True)
    settings = Settings(limits=Limits(open_per_session=1))
    for steps in range(8):
        first, second, third = (f"{steps}-{n}" for n in range(3))
        async with (
            machine.boot(agent, settings=settings) as gateway,
            trio.open_nursery() as nursery,
        ):
            batch = [msg(f"a{steps}", first), msg(f"a{steps}", second), msg("b", third)]
            nursery.start_soon(gateway.accept, batch)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            gateway.request_stop()
        assert [state for state, _ in machine.markers().values() if state == "RUNNING"] == []
        async with machine.boot(agent, settings=settings) as gateway:
            await gateway.wait_idle()
            settled_well(gateway)
        assert [machine.fate(m) for m in (first, third)] == ["answered", "answered"]
    assert len(agent.ended) == 16


@pytest.mark.parametrize("when", ["before", "during"])
async def test_c06_stopped_by_the_user_is_not_resumed(
    machine: Machine, autojump_clock: MockClock, when: str
) -> None:
    """/stop before the drain and in it: gone for good, also for an agent that does not listen."""
    deaf_ended = trio.Event()

    async def agent(turn: Turn) -> str:
        with trio.CancelScope(shield=turn.session.name == "deaf"):
            try:
                await trio.sleep(4)
            finally:
                deaf_ended.set()
        return "too late"

    async with machine.boot(agent, settings=Settings(grace=8.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("deaf", "m2")])
        await trio.sleep(1)
        if when == "during":
            gateway.request_stop()
            await gateway.draining.wait_value(True)
        await gateway.accept([msg("a", "c1", "/stop"), msg("deaf", "c2", "/stop")])
        if when == "before":
            gateway.request_stop()
    assert deaf_ended.is_set()
    assert machine.markers() == {}
    for _ in range(2):
        async with machine.boot(agent) as gateway:
            await gateway.wait_idle()
    assert machine.log.of(TurnResumed) == []
    assert [machine.fate(m) for m in ("m1", "m2")] == ["stopped", "stopped"]
    assert machine.said() == ["Stopped.", "Stopped."]


async def test_c06_stopped_then_killed(machine: Machine, autojump_clock: MockClock) -> None:
    """Killed right after /stop was accepted, before its child has noticed: still stopped."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        machine.on_commit = lambda moment: machine.crash() if moment == "after" else None
        await gateway.accept(msg("a", "c1", "/stop"))
        machine.on_commit = None
        gateway.request_stop(now=True)
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert len(agent.turns) == 1
    assert machine.fate("m1") == "stopped"


async def test_c07_an_idle_session_is_never_resumed(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Active a moment ago is idle all the same, after a stop and after a crash."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1"))
        machine.crash()
        await gateway.ask(msg("a", "m2"))
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        await gateway.ask(msg("a", "m3"))
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        await trio.sleep(60)
    assert [turn.resumed for turn in agent.turns] == [None, None, None]
    assert machine.log.of(TurnResumed) == []


async def test_c08_the_age_of_a_turn_is_no_criterion(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Ten hours old, interrupted a minute ago: resumed."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
        await gateway.accept(msg("old", "m1"))
        await agent.wait_begun(1)
        await trio.sleep(36_000)
    await trio.sleep(60)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert agent.begun == [("old", 1, "hi"), ("old", 2, "hi")]


async def test_c08_ten_hours_then_killed(machine: Machine, autojump_clock: MockClock) -> None:
    """The same without a stop: what counts is when the process was last alive."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("old", "m1"))
        await agent.wait_begun(1)
        await trio.sleep(36_000)
        machine.crash()
        gateway.request_stop(now=True)
    await trio.sleep(60)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert agent.begun[-1] == ("old", 2, "hi")


async def test_c08_an_idle_gateway_that_is_killed_in_its_first_turn(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Hours without a turn, then one, then a kill: interrupted now, not hours ago."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await trio.sleep(36_000)
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        await trio.sleep(1)
        machine.crash()
        gateway.request_stop(now=True)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert agent.begun == [("a", 1, "hi"), ("a", 2, "hi")]
    assert machine.fate("m1") == "answered"


async def test_c09_a_second_stop_changes_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Asked three times: the first reason counts, and one commit marks."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=3.0)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        gateway.request_stop(ResumeReason.RESTART)
        gateway.request_stop(ResumeReason.SHUTDOWN)
        await gateway.draining.wait_value(True)
        before = machine.commits
        gateway.request_stop(ResumeReason.SHUTDOWN)
        await trio.sleep(1)
        assert machine.commits == before
    assert len(machine.log.of(StopRequested)) == len(machine.log.of(TurnsMarked)) == 1
    assert machine.markers() == {"a": ("RESUME_PENDING", "restart")}


async def test_c09_marking_twice_writes_nothing_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The marking is a predicate: run again, it finds nothing RUNNING and keeps reason and time."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=3.0)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        assert await gateway._store.mark_resume_pending(ResumeReason.RESTART) == 1
        marked = machine.rows("SELECT * FROM turn")
        await trio.sleep(1)
        assert await gateway._store.mark_resume_pending(ResumeReason.SHUTDOWN) == 0
        assert machine.rows("SELECT * FROM turn") == marked


@pytest.mark.parametrize("error", [apsw.FullError("full"), apsw.IOError("broken")])
async def test_c10_marking_fails_once(
    machine: Machine, autojump_clock: MockClock, error: Exception
) -> None:
    """Said, not remembered as done, tried again; the drain goes on meanwhile."""
    agent = Script()

    def fail(moment: str) -> None:
        machine.on_commit = None
        raise error

    async with machine.boot(agent, settings=Settings(grace=5.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
        machine.on_commit = fail
        gateway.request_stop()
        await machine.log.wait_for(MarkingFailed)
        assert set(machine.markers().values()) == {("RUNNING", None)}
        agent.release("a")
    assert machine.fate("m1") == "answered"
    assert machine.markers() == {"b": ("RESUME_PENDING", "shutdown")}
    assert report_of(gateway).marked == 1


async def test_c10_marking_never_works_and_the_boot_resumes_all_the_same(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A disk that stays full: the drain ends, the rows say RUNNING, and that is enough."""
    agent = Script()

    def fail(moment: str) -> None:
        raise apsw.FullError("full")

    async with machine.boot(agent, settings=Settings(grace=2.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
        machine.on_commit = fail
    machine.on_commit = None
    assert set(machine.markers().values()) == {("RUNNING", None)}
    assert report_of(gateway).marked is None
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert {r.reason for r in machine.log.of(TurnResumed)} == {ResumeReason.CRASH}
    assert [machine.fate(m) for m in ("m1", "m2")] == ["answered", "answered"]


async def test_c10_a_mark_whose_commit_failed_but_is_durable(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The commit returned an error and took effect all the same: the boot reads what is there."""
    agent = Script()

    def fail(moment: str) -> None:
        if moment == "after":
            machine.on_commit = None
            raise apsw.IOError("perhaps")

    async with machine.boot(agent, settings=Settings(grace=2.0)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        machine.on_commit = fail
        gateway.request_stop(ResumeReason.RESTART)
    assert machine.markers() == {"a": ("RESUME_PENDING", "restart")}
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert len(agent.turns) == 2
    assert agent.turns[1].resumed is not None
    assert agent.turns[1].resumed.reason is ResumeReason.RESTART


async def test_c11_a_stop_with_nothing_open_is_immediate(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """No time passes, no marker is written, nothing is said about marking."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1"))
        turns = machine.rows("SELECT * FROM turn")
        began = trio.current_time()
        gateway.request_stop()
    assert trio.current_time() == began
    assert machine.rows("SELECT * FROM turn") == turns
    assert machine.log.of(TurnsMarked) == []
    assert report_of(gateway).marked == 0
    assert not report_of(gateway).timed_out


async def test_c12_the_drain_ends_with_its_last_turn(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """71 turns, the slowest takes 7 s: the drain takes 7 s and no time more."""

    async def agent(turn: Turn) -> str:
        await turn.draining.wait_value(True)
        await trio.sleep(int(turn.text) / 10)
        return "done"

    async with machine.boot(agent, settings=Settings(grace=20.0)) as gateway:
        await gateway.accept([msg(f"s{n}", f"m{n}", str(n)) for n in range(71)])
        began = trio.current_time()
        gateway.request_stop()
    assert trio.current_time() - began == pytest.approx(7.0, abs=1e-6)
    report = report_of(gateway)
    assert report.phases["drain"] == pytest.approx(7.0, abs=1e-6)
    assert (len(report.settled), report.timed_out) == (71, False)


async def test_c12_settled_includes_the_commit(machine: Machine, autojump_clock: MockClock) -> None:
    """An agent that has returned is no settled turn while its commit fails: the drain waits for it,
    and its slot is not free."""
    agent = Script()
    failing = True

    def fail(moment: str) -> None:
        if failing and moment == "before":
            raise apsw.FullError("full")

    settings = Settings(grace=15.0, limits=Limits(turns=1))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        (turn,) = await agent.wait_begun(1)
        machine.on_commit = fail
        agent.release()
        await machine.log.wait_for(SettleDelayed, 2)
        assert len(agent.turns) == 1
        assert gateway.statistics()["slots_free"] == 0
        failing = False
        gateway.request_stop()
    assert report_of(gateway).settled == (turn.id,)
    assert not report_of(gateway).timed_out
    assert machine.markers() == {}
    assert machine.fate("m2") == "queued"


async def test_c12_an_end_that_could_not_be_written_is_written_by_the_account(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The disk is full until the window closes: the account writes the end, and the report says
    settled, because it is."""
    agent = Script()
    full_until = 0.0

    def fail(moment: str) -> None:
        if moment == "before" and trio.current_time() < full_until:
            raise apsw.FullError("full")

    async with machine.boot(agent, settings=Settings(grace=4.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
        a, b = agent.turn_of("a"), agent.turn_of("b")
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        # Until just before the window closes: the account comes before the child's next try.
        full_until = trio.current_time() + 3.9999
        machine.on_commit = fail
        agent.release("a")
    report = report_of(gateway)
    assert len(machine.log.of(SettleDelayed)) >= 2
    assert report.settled == (a.id,)
    assert report.interrupted == (b.id,)
    assert machine.fate("m1") == "answered"
    assert machine.markers() == {"b": ("RESUME_PENDING", "shutdown")}
    assert [event.state for event in machine.log.of(TurnSettled)] == [TurnState.COMPLETED]
    assert [event.turn for event in machine.log.of(TurnInterrupted)] == [b.id]


@pytest.mark.parametrize("grace", [0.0, 3.0, 12.5])
async def test_c13_a_turn_that_never_ends_costs_exactly_the_window(
    machine: Machine, autojump_clock: MockClock, grace: float
) -> None:
    """To the microsecond; and the other nine settle as if it were not there."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=grace, budget=30.0)) as gateway:
        await gateway.accept([msg(f"s{n}", f"m{n}") for n in range(10)])
        await agent.wait_begun(10)
        began = trio.current_time()
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        agent.release(*(f"s{n}" for n in range(9)))
    assert trio.current_time() - began == pytest.approx(grace, abs=1e-6)
    report = report_of(gateway)
    assert report.timed_out
    if grace:
        assert (len(report.settled), len(report.interrupted)) == (9, 1)


async def test_c14_a_notice_that_hangs_delays_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Sending a notice takes a minute: marked at once, drained at once, answered all the same."""
    agent = Script()
    channel = MemoryChannel("chat", notices=True)
    notices: list[float] = []

    async def hang(delivery: Delivery) -> None:
        if delivery.kind is ReplyKind.NOTICE:
            notices.append(trio.current_time())
            await trio.sleep(60)

    channel.before_send = hang
    async with machine.boot(agent, channel, settings=Settings(grace=20.0, budget=30.0)) as gateway:
        await channel.receive("a", "m1", "hi")
        await agent.wait_begun(1)
        began = trio.current_time()
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        assert trio.current_time() == began
        assert machine.markers() == {"a": ("RESUME_PENDING", "shutdown")}
        await trio.sleep(1)
        assert notices == [began]
        agent.release()
    assert report_of(gateway).phases["drain"] == pytest.approx(1.0)
    assert trio.current_time() - began < 30.0
    assert channel.texts() == ["re: hi"]


async def test_c14_notices_that_hang_do_not_lengthen_the_budget(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Twenty sessions whose notices hang, and turns that never end: the plan's time and no more."""

    async def agent(turn: Turn) -> str:
        await trio.sleep_forever()
        return "never"

    async def hang(delivery: object) -> None:
        await trio.sleep(60)

    channel = MemoryChannel("chat", notices=True)
    channel.before_send = hang
    async with machine.boot(agent, channel, settings=Settings(grace=5.0, budget=10.0)) as gateway:
        await channel.wait_ready()
        await channel.receive_all(*(channel.message(f"s{n}", f"m{n}", "hi") for n in range(20)))
        began = trio.current_time()
        gateway.request_stop()
    assert trio.current_time() - began <= 10.0
    assert report_of(gateway).marked == 20


def test_c15_the_default_window_is_derived_from_one_budget() -> None:
    """Not zero, and never more than what the budget leaves."""
    plan = plan_stop()
    assert (plan.grace, plan.budget) == (20.0, 30.0)
    for grace, budget in [(None, None), (None, 5.0), (None, 90.0), (60.0, None), (60.0, 30.0)]:
        plan = plan_stop(grace, budget)
        parts = plan.mark + plan.grace + plan.unwind + plan.flush + plan.spare
        assert 0 < plan.grace < plan.budget
        assert parts <= plan.budget + 1e-9
        assert plan.clamped == ((grace, budget) == (60.0, 30.0))


async def test_c15_a_gateway_without_settings_waits_twenty_seconds(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The default, as it is lived."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(20.0, abs=1e-6)


@pytest.mark.parametrize("reason", list(ResumeReason))
async def test_c16_the_reason_is_kept(
    machine: Machine, autojump_clock: MockClock, reason: ResumeReason
) -> None:
    """restart or shutdown at a stop, crash otherwise; and when, as aware UTC."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
        await trio.sleep(100)
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        await trio.sleep(3)
        if reason is ResumeReason.CRASH:
            machine.crash()
        interrupted = as_datetime(machine.clock.now().wall)
        gateway.request_stop(ResumeReason.RESTART if reason is ResumeReason.RESTART else
                             ResumeReason.SHUTDOWN)  # fmt: skip
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    resumed = agent.turns[1].resumed
    assert resumed is not None
    assert (resumed.reason, resumed.attempt) == (reason, 1)
    assert resumed.at.tzinfo is UTC
    # A crash is dated by the last sign of life.
    assert timedelta(0) <= interrupted - resumed.at <= timedelta(seconds=30)
    if reason is not ResumeReason.CRASH:
        assert resumed.at == interrupted
    assert machine.log.of(TurnResumed)[0].interrupted_at == resumed.at


# ----- found by seeded lives


async def test_p04_p09_a_settle_that_failed_begins_nothing_when_the_stop_writes_it(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A turn's end could not be written, and with it the begin of its session's next turn. The stop
    writes that end; were the begin still in it, a turn would begin after the marking, unmarked, and
    be charged with a crash that never was."""
    agent = Script()
    channel = MemoryChannel()
    settings = Settings(grace=0.2, budget=10.0)
    async with machine.boot(agent, channel, settings=settings):
        await channel.receive("a", "m1", "first")
        await channel.receive("a", "m2", "second")
        await agent.wait_begun(1)
        machine.on_commit = no_room
        agent.release("a")
        await machine.log.wait_for(SettleDelayed)
        machine.on_commit = None
    assert machine.fate("m1") == "answered"
    assert machine.fate("m2") == "queued"
    assert machine.markers() == {}


def no_room(moment: str) -> None:
    """A disk that is full."""
    if moment == "before":
        raise apsw.FullError("full (a test)")


async def test_p05_who_answers_its_cancellation_with_its_reply_is_reported_settled(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async def agent(turn: Turn) -> str:
        with trio.CancelScope() as own:
            own.shield = True
            await trio.sleep(1)
        return "at last"

    settings = Settings(grace=0.5, budget=20.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1"))
    report = report_of(gateway)
    assert (report.settled, report.interrupted, report.timed_out) == ((1,), (), True)
    assert machine.markers() == {}


async def test_p10_a_stopped_turn_that_does_not_end_is_not_reported_to_resume(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async def agent(turn: Turn) -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(30)
        return "at last"

    settings = Settings(grace=0.5, budget=5.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1"))
        assert await gateway.stop_turn(msg("a", "m1").key)
    assert report_of(gateway).unresponsive == report_of(gateway).interrupted == ()
    assert machine.fate("m1") == "stopped"


async def test_p10_a_turn_that_is_stopped_after_its_window_is_not_reported_to_resume(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Its child has ended with the window; another turn's has not, and while that is waited for,
    the first one's user says /stop."""

    async def agent(turn: Turn) -> str:
        with trio.CancelScope(shield=turn.session.name == "stubborn"):
            await trio.sleep(100)
        return "at last"

    settings = Settings(grace=0.5, budget=10.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", "m1"), msg("stubborn", "m2")])
        gateway.request_stop()
        await machine.log.wait_for(TurnInterrupted)
        assert await gateway.stop_turn(msg("a", "m1").key)
    assert (report_of(gateway).settled, report_of(gateway).unresponsive) == ((1,), (2,))
    assert report_of(gateway).interrupted == ()


async def test_p11_a_stop_does_not_wait_for_a_begin_that_cannot_be_written(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It waits for its next try, seconds away; the stop has nothing to wait for."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(limits=Limits(turns=1))) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await gateway.stop_turn(msg("a", "m1").key)
        machine.on_commit = no_room
        await machine.log.wait_for(StoreTrouble, 3)
        machine.on_commit = None
        began = trio.current_time()
        gateway.request_stop()
    assert trio.current_time() - began < 0.5
    assert machine.fate("m2") == "queued"
