"""How a gateway ends: turns that do not, channels and code that fall over, and nothing left behind
(c46 to c49 as far as they need no process of their own, c51)."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest
import trio
from helpers import PATIENCE, Log, Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    AsyncAgent,
    Delivery,
    DrainReport,
    Event,
    Gateway,
    GatewayState,
    GatewayStopping,
    ResumeReason,
    Settings,
    StoreInUse,
    Turn,
    open_gateway,
)
from trio_gateway._events import (
    ChannelFailed,
    GatewayStarted,
    MessageAccepted,
    ReplyCommitted,
    TurnBegun,
    TurnInterrupted,
    TurnSettled,
    TurnsMarked,
    TurnUnresponsive,
)
from trio_gateway._tasktree import task_tree
from trio_gateway.testing import MemoryChannel

# ----- agents that do not end


async def test_c46_an_agent_behind_a_shield(machine: Machine, autojump_clock: MockClock) -> None:
    """It does not hear its cancellation: the others settle, the stop stays within its budget, the
    host is told whom it leaves behind, and the turn resumes at the next boot."""
    let_go = trio.Event()
    left: list[tuple[float, DrainReport]] = []

    async def agent(turn: Turn) -> str:
        if turn.resumed is not None:
            return "resumed"
        with trio.CancelScope(shield=True):
            if turn.session.name == "deaf":
                await let_go.wait()
        return "too late"

    def leave(report: DrainReport) -> None:
        left.append((trio.current_time(), report))
        let_go.set()

    async with machine.boot(agent, settings=Settings(grace=4.0, budget=10.0)) as gateway:
        gateway.on_unresponsive = leave
        await gateway.accept([msg("deaf", "m1"), msg("quick", "m2")])
        began = trio.current_time()
        gateway.request_stop()
    ((when, report),) = left
    assert when - began <= 10.0
    assert len(report.unresponsive) == 1
    assert [e.session.name for e in machine.log.of(TurnUnresponsive)] == ["deaf"]
    assert machine.markers() == {"deaf": ("RESUME_PENDING", "shutdown")}
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said("deaf") == ["resumed"]


async def test_c46_the_late_end_of_a_deaf_agent_changes_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Without a host that leaves, the block waits for it, as Trio does. Its answer comes after the
    gateway stopped waiting; it settles its own turn, once, or not at all."""
    finish = trio.Event()

    async def agent(turn: Turn) -> str:
        with trio.CancelScope(shield=True):
            await finish.wait()
        return f"attempt {turn.attempt}"

    async def finish_late(gateway: Gateway) -> None:
        await gateway.state.wait_value(GatewayState.DRAINING)
        await trio.sleep(60)
        finish.set()

    async with (
        trio.open_nursery() as nursery,
        machine.boot(agent, settings=Settings(grace=1.0)) as gateway,
    ):
        await gateway.accept(msg("deaf", "m1"))
        nursery.start_soon(finish_late, gateway)
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert len(machine.said("deaf")) == 1
    assert machine.fate("m1") == "answered"


async def test_c46_an_agent_that_swallows_its_cancellation(tmp_path: Path) -> None:
    """In real time: it catches `Cancelled` again and again, and keeps nobody from leaving."""
    let_go = False

    async def agent(turn: Turn) -> str:
        while not let_go:
            try:
                await trio.sleep(60)
            except trio.Cancelled:
                continue
        return "at last"

    def leave(report: DrainReport) -> None:
        nonlocal let_go
        let_go = True

    log = Log()
    settings = Settings(grace=0.2, budget=1.0)
    with trio.fail_after(PATIENCE):
        async with open_gateway(
            agent, store=tmp_path / "gateway.db", settings=settings, listen=log
        ) as gateway:
            gateway.on_unresponsive = leave
            await gateway.accept(msg("a", "m1"))
            await log.wait_for(TurnBegun)
            began = trio.current_time()
            gateway.request_stop()
        assert trio.current_time() - began < 1.0 + 1.0  # the budget, and a busy machine
    assert gateway.report is not None
    assert len(gateway.report.unresponsive) == 1


async def test_c46_an_agent_stuck_in_a_thread(tmp_path: Path) -> None:
    """A plain agent that hangs in a system call is left behind; its turn resumes at the boot."""
    release = threading.Event()
    hang = True

    def agent(turn: Turn) -> str:
        if hang:
            release.wait(PATIENCE)
        return f"attempt {turn.attempt}"

    log = Log()
    store = tmp_path / "gateway.db"
    try:
        with trio.fail_after(PATIENCE):
            async with open_gateway(
                agent, store=store, settings=Settings(grace=0.1), listen=log
            ) as gateway:
                await gateway.accept(msg("a", "m1"))
                await log.wait_for(TurnBegun)
            assert gateway.report is not None
            assert (len(gateway.report.interrupted), gateway.report.unresponsive) == (1, ())
            hang = False
            async with open_gateway(agent, store=store) as gateway:
                (reply,) = await gateway.ask(msg("a", "m1"))
            assert reply.text == "attempt 2"
    finally:
        release.set()


# ----- stops that come at odd moments


async def test_c47_cancelled_while_it_boots(machine: Machine, autojump_clock: MockClock) -> None:
    """A block whose scope is cancelled before the gateway boots ends, with nothing held."""
    agent = Script(open=True)
    for _ in range(2):
        with trio.move_on_after(3600) as watch:
            with trio.CancelScope() as scope:
                scope.cancel()
                async with machine.boot(agent):
                    await trio.sleep_forever()
            assert scope.cancelled_caught
        assert not watch.cancelled_caught
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1"))
        settled_well(gateway)


async def test_c47_cancelled_while_recovery_runs(tmp_path: Path) -> None:
    """The same with the store on its thread, at moments all over the boot."""
    agent = Script(open=True)
    store = tmp_path / "gateway.db"
    with trio.fail_after(PATIENCE):
        for n in range(12):
            with trio.move_on_after(n / 1000):
                async with open_gateway(agent, store=store):
                    await trio.sleep_forever()
        async with open_gateway(agent, store=store) as gateway:
            await gateway.ask(msg("a", "m1"))


async def test_c47_asked_to_stop_by_the_first_event(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A stop that comes between recovery and service: nothing begins, nothing is lost."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
        await gateway.accept([msg("a", "m1"), msg("a", "m2")])
        await agent.wait_begun(1)

    opened: list[Gateway] = []

    @asynccontextmanager
    async def asks_to_stop() -> AsyncGenerator[AsyncAgent, None]:
        # The agent's own block is entered just before recovery.
        opened[0].request_stop(ResumeReason.RESTART)
        yield agent

    real = Gateway.__init__
    stopper = Machine(machine.store.parent)
    stopper.clock = machine.clock

    def note(self: Gateway, *args: object, **more: object) -> None:
        real(self, *args, **more)  # type: ignore[arg-type]
        opened.append(self)

    Gateway.__init__ = note  # type: ignore[method-assign]
    try:
        async with stopper.boot(asks_to_stop) as gateway:
            await gateway.wait_stop_requested()
    finally:
        Gateway.__init__ = real  # type: ignore[method-assign]
    assert len(agent.turns) == 1
    assert machine.markers() == {"a": ("RESUME_PENDING", "shutdown")}
    assert machine.fate("m2") == "queued"


async def test_c47_the_block_is_cancelled(machine: Machine, autojump_clock: MockClock) -> None:
    """Cancelled from outside: marked, then cancelled, without a window."""
    agent = Script()
    began = trio.current_time()
    with trio.move_on_after(5) as scope:
        async with machine.boot(agent) as gateway:
            await gateway.accept([msg("a", "m1"), msg("b", "m2")])
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() - began == pytest.approx(5.0)
    assert set(machine.markers().values()) == {("RESUME_PENDING", "shutdown")}
    kinds = [type(event) for event in machine.log.events]
    assert kinds.index(TurnsMarked) < kinds.index(TurnInterrupted)


async def test_p11_the_hosts_own_error_drains_first_and_then_passes(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What the body raises comes out as it is, after the open turns have settled."""
    agent = Script()

    async def host() -> None:
        async with machine.boot(agent) as gateway:
            await gateway.accept(msg("a", "m1"))
            await agent.wait_begun(1)
            agent.release()
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await host()
    assert machine.fate("m1") == "answered"


async def test_p11_now_ends_the_window(machine: Machine, autojump_clock: MockClock) -> None:
    """`request_stop(now=True)` in mid-drain: what is open is cancelled at once."""
    agent = Script()
    async with machine.boot(agent) as gateway:
        await gateway.accept(msg("a", "m1"))
        gateway.request_stop()
        await trio.sleep(2)
        began = trio.current_time()
        gateway.request_stop(now=True)
    assert trio.current_time() == began
    assert machine.markers() == {"a": ("RESUME_PENDING", "shutdown")}


# ----- channels that fall over


async def test_c48_a_channel_that_falls_over_is_served_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """With backoff, as often as it takes; the other channel notices nothing."""
    agent = Script(open=True)
    bad, good = MemoryChannel("bad"), MemoryChannel("good")
    async with machine.boot(agent, bad, good) as gateway:
        for n in range(6):
            await bad.wait_ready()
            bad.break_down(ExceptionGroup("both", [OSError("gone"), ValueError(n)]))
            await machine.log.wait_for(ChannelFailed, n + 1)
            receipt = await good.receive("g", f"g{n}", "hi")
            assert receipt.accepted
        await bad.receive("b", "b1", "still there?")
        await gateway.wait_idle()
        settled_well(gateway)
    assert (bad.serving, good.serving) == (7, 1)
    assert len(good.sent) == 6
    assert bad.texts() == ["re: still there?"]
    waits = [event.retry_in for event in machine.log.of(ChannelFailed)]
    assert all(2 ** (n - 1) <= wait <= 2**n for n, wait in enumerate(waits))
    assert gateway.failure is None


async def test_c48_a_channel_that_cannot_show_progress_harms_nobody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """`progress` raises: said, and the turn goes on."""

    class Clumsy(MemoryChannel):
        def progress(self, session: str, text: str) -> None:
            raise OSError("no terminal")

    async def agent(turn: Turn) -> str:
        turn.progress("working")
        return "done"

    channel = Clumsy("clumsy")
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        await gateway.wait_idle()
    assert channel.texts() == ["done"]
    assert machine.log.of(ChannelFailed)


# ----- our own code falls over


@pytest.mark.parametrize(
    "kind", [GatewayStarted, MessageAccepted, TurnBegun, ReplyCommitted, TurnSettled]
)
async def test_c49_a_listener_that_falls_over_marks_first(
    machine: Machine, autojump_clock: MockClock, kind: type[Event]
) -> None:
    """Whatever it hears when it fails: the open turns are marked, the others settle, the block
    raises its error. It is not called again."""
    agent = Script()
    heard: list[Event] = []

    def fall_over(event: Event) -> None:
        if isinstance(event, kind):
            heard.append(event)
            raise ZeroDivisionError("a bug")

    async def host() -> None:
        async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
            await gateway.accept([msg("stuck", "m1"), msg("quick", "m2")])
            agent.release("quick")
            await trio.sleep_forever()

    machine.log.hooks.append(fall_over)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await host()
    assert len(heard) == 1
    assert ("RUNNING", None) not in machine.markers().values()
    machine.log.hooks.clear()
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    reasons = [turn.resumed.reason for turn in agent.turns if turn.resumed]
    assert reasons == [ResumeReason.SHUTDOWN] * len(reasons)
    stored = machine.rows("SELECT id, state FROM message")
    assert {state for _, state in stored} <= {"answered"}


@pytest.mark.parametrize("commit", range(1, 8))
async def test_c49_a_bug_in_a_write_marks_first(
    machine: Machine, autojump_clock: MockClock, commit: int
) -> None:
    """The n-th commit from some moment on raises what no store should: wherever it hits, the open
    turn is marked, the stop is orderly, and nothing is lost."""
    agent = Script()
    channel = MemoryChannel()
    counted = 0

    def fail(moment: str) -> None:
        nonlocal counted
        counted += moment == "before"
        if counted == commit and moment == "before":
            raise ZeroDivisionError("a bug")

    settings = Settings(grace=1.0)
    errors: list[BaseException] = []
    try:
        async with machine.boot(agent, channel, settings=settings) as gateway:
            await channel.receive("stuck", "m0", "hi")
            await agent.wait_begun(1)
            machine.on_commit = fail
            agent.release("a", "b")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive_quietly, channel, "a", "m1", errors)
                nursery.start_soon(receive_quietly, channel, "b", "m2", errors)
            await channel.wait_sent(2 - len(errors))
            await trio.sleep(1)
            machine.on_commit = None
    except ZeroDivisionError as error:
        errors.append(error)
    machine.on_commit = None
    assert len(errors) <= 1
    assert machine.markers()["stuck"] == ("RESUME_PENDING", "shutdown")
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        await channel.receive("b", "m2", "hi")
        await gateway.wait_idle()
        settled_well(gateway)
    assert [machine.fate(m) for m in ("m0", "m1", "m2")] == ["answered"] * 3
    assert sorted({d.key for d in channel.sent}) == sorted(
        key for (key,) in machine.rows("SELECT key FROM delivery")
    )
    assert len(machine.said()) == 3


async def receive_quietly(
    channel: MemoryChannel, session: str, message_id: str, errors: list[BaseException]
) -> None:
    """Hand a message in; whoever does gets what the store raised."""
    try:
        await channel.receive(session, message_id, "hi")
    except ZeroDivisionError as error:
        errors.append(error)


async def test_c49_what_an_agent_owns_falls_over(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The agent's own block fails in the background, which cancels everything inside it: the open
    turns are marked all the same, not left as if the process had died."""
    script = Script()

    @asynccontextmanager
    async def agent() -> AsyncGenerator[AsyncAgent, None]:
        async def fall_over() -> None:
            await trio.sleep(5)
            raise LookupError("the agent's client broke")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fall_over)
            yield script
            nursery.cancel_scope.cancel()

    async def host() -> None:
        async with machine.boot(agent) as gateway:
            await gateway.accept([msg("a", "m1"), msg("b", "m2")])
            await trio.sleep_forever()

    with pytest.raises(LookupError, match="broke"):
        await host()
    assert set(machine.markers().values()) == {("RESUME_PENDING", "shutdown")}
    script.release()
    async with machine.boot(script) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)


def grouped(error: BaseException) -> BaseException:
    """As it comes out of a nursery."""
    return BaseExceptionGroup("from a nursery", [error])


@pytest.mark.parametrize("error", [SystemExit(3), grouped(SystemExit(3)), grouped(ValueError("x"))])
async def test_c49_an_agent_cannot_end_the_host(
    machine: Machine, autojump_clock: MockClock, error: BaseException
) -> None:
    """`sys.exit()` in an agent, bare or out of a nursery, ends its turn FAILED and nothing else."""

    async def agent(turn: Turn) -> str:
        if turn.text == "go":
            raise error
        return "fine"

    async with machine.boot(agent) as gateway:
        (apology,) = await gateway.ask(msg("a", "m1", "go"))
        assert apology.text.startswith("Sorry")
        (answer,) = await gateway.ask(msg("a", "m2", "hi"))
        assert answer.text == "fine"
        settled_well(gateway)
    assert gateway.failure is None


async def test_c49_ctrl_c_in_the_middle_of_an_agent_marks_first(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Python raises KeyboardInterrupt wherever it happens to be: in an agent it is not the agent's
    failure. The gateway stops in order, and the interrupt reaches the host."""
    agent_ = Script()

    async def agent(turn: Turn) -> str:
        if turn.session.name == "unlucky":
            raise KeyboardInterrupt
        return await agent_(turn)

    async def host() -> None:
        async with machine.boot(agent, settings=Settings(grace=1.0)) as gateway:
            await gateway.accept(msg("other", "m1"))
            await agent_.wait_begun(1)
            await gateway.accept(msg("unlucky", "m2"))
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await host()
    assert machine.markers() == dict.fromkeys(("other", "unlucky"), ("RESUME_PENDING", "shutdown"))


async def test_c49_the_error_of_a_boot_comes_out_as_it_is(tmp_path: Path) -> None:
    """No group, no deadlock: what keeps a gateway from booting is what `open_gateway` raises."""
    store = tmp_path / "gateway.db"

    @asynccontextmanager
    async def broken() -> AsyncGenerator[AsyncAgent, None]:
        raise LookupError("no key")
        yield Script()

    with trio.fail_after(PATIENCE):
        async with open_gateway(Script(), store=store):
            with pytest.raises(StoreInUse):
                async with open_gateway(Script(), store=store):
                    pytest.fail("two gateways on one store")
        with pytest.raises(LookupError, match="no key"):
            async with open_gateway(broken, store=store):
                pytest.fail("an agent that cannot be made")
        async with open_gateway(Script(open=True), store=store) as gateway:
            await gateway.ask(msg("a", "m1"))


# ----- nothing is left


async def test_c51_what_a_turn_started_ends_with_it(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Progress is taken back and subtasks are over, whichever way the turn ends."""
    channel = MemoryChannel()
    ticking: set[str] = set()

    async def tick(turn: Turn) -> None:
        ticking.add(turn.session.name)
        try:
            while True:
                turn.progress("typing")
                await trio.sleep(1)
        finally:
            ticking.discard(turn.session.name)

    async def agent(turn: Turn) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick, turn)
            await trio.sleep(3)
            if turn.session.name == "fails":
                raise ValueError("x")
            if turn.session.name != "ends":
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        return "done"

    sessions = ("ends", "fails", "stopped", "slow", "cut")
    settings = Settings(grace=2.0, time_limit=60.0)
    async with machine.boot(agent, channel, settings=settings):
        for name in sessions[:4]:
            await channel.receive(name, name, "hi")
        await trio.sleep(10)
        await channel.receive("stopped", "c1", "/stop")
        await trio.sleep(60)
        assert ticking == set()
        await channel.receive("cut", "cut", "hi")
        await trio.sleep(2)
        assert ticking == {"cut"}
    assert ticking == set()
    for name in sessions:
        shown = [text for session, text in channel.shown if session == name]
        assert len(shown) > 2
        assert shown[0] == "typing"
        assert (shown[-1], shown.count("")) == ("", 1)


async def test_c51_after_a_stop_the_task_tree_is_empty(tmp_path: Path) -> None:
    """Not a task of the gateway's is left, nor a thread of its store."""
    before = task_tree()
    threads = {thread.name for thread in threading.enumerate()}
    channels = [MemoryChannel("one"), MemoryChannel("two", connected=False)]
    log = Log()
    async with open_gateway(
        Script(),
        store=tmp_path / "gateway.db",
        channels=channels,
        settings=Settings(grace=0.05),
        listen=log,
    ) as gateway:
        await channels[0].receive("a", "m1", "hi")
        await gateway.accept(msg("b", "m2"))
        await log.wait_for(TurnBegun, 2)
        assert task_tree() != before
        gateway.request_stop()
    assert task_tree() == before
    assert gateway.state.value is GatewayState.STOPPED
    left = {thread.name for thread in threading.enumerate()} - threads
    assert not [name for name in left if "store" in name]


async def test_c51_who_waits_is_told(machine: Machine, autojump_clock: MockClock) -> None:
    """`ask` and `wait_idle` end with the gateway; the message is kept."""
    agent = Script()
    told: list[str] = []

    async def ask(gateway: Gateway, message_id: str) -> None:
        try:
            await gateway.ask(msg("a", message_id))
        except GatewayStopping:
            told.append(message_id)

    async with (
        trio.open_nursery() as nursery,
        machine.boot(agent, settings=Settings(grace=1.0)) as gateway,
    ):
        nursery.start_soon(ask, gateway, "m1")
        nursery.start_soon(ask, gateway, "m2")
        nursery.start_soon(gateway.wait_idle)
        await agent.wait_begun(1)
    assert sorted(told) == ["m1", "m2"]
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert [machine.fate(m) for m in ("m1", "m2")] == ["answered", "answered"]


async def test_p11_a_disk_that_stays_full_keeps_nobody_from_leaving(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Nothing can be written any more, not even that a reply has arrived: the stop takes no longer
    than its budget."""
    agent = Script()
    channel = MemoryChannel()

    def fail(moment: str) -> None:
        raise apsw.FullError("full")

    async def then_full(delivery: Delivery) -> None:
        await trio.sleep(1)
        machine.on_commit = fail
        if delivery.session.name == "b":
            await trio.sleep(1)  # arrives when the arrival of the other cannot be written

    channel.before_send = then_full
    with trio.fail_after(3600):
        async with machine.boot(agent, channel, settings=Settings(grace=3.0, budget=10.0)):
            await channel.receive("stuck", "m1", "hi")
            agent.release("a", "b")
            await channel.receive("a", "m2", "hi")
            await channel.receive("b", "m3", "hi")
            await channel.wait_sent(2)
            began = trio.current_time()
    assert trio.current_time() - began <= 10.0
    machine.on_commit = channel.before_send = None
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
    assert [machine.fate(m) for m in ("m1", "m2", "m3")] == ["answered"] * 3
    assert len({d.key for d in channel.sent}) == 3
