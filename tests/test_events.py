"""The one stream of events."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import apsw
import attrs
import pytest
import trio
from helpers import Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    Busy,
    Delivery,
    DeliveryRules,
    DrainReport,
    Event,
    Gateway,
    Limits,
    ResumeRules,
    SessionKey,
    Settings,
    Turn,
    TurnState,
    Undeliverable,
    _events,
)
from trio_gateway._config import LogLevel
from trio_gateway._events import (
    ChannelConnected,
    DeadLettered,
    Delivered,
    DeliveryDelayed,
    EventsDropped,
    GatewayFailed,
    GatewayStarted,
    InputRefused,
    MessageAccepted,
    MessageRefused,
    MessageUnreadable,
    ProgressShown,
    ReplyCommitted,
    SettleDelayed,
    StepRemembered,
    StopRequested,
    StoreTrouble,
    TextsForgotten,
    TurnBegun,
    TurnInterrupted,
    TurnResumed,
    TurnSettled,
    TurnsMarked,
)
from trio_gateway._logs import event_fields, event_level
from trio_gateway._stream import BUFFER, EventStream
from trio_gateway.store import edit_store
from trio_gateway.testing import MemoryChannel

QUICK = Settings(grace=1.0, budget=10.0)


def kinds(machine: Machine) -> list[str]:
    return [type(event).__name__ for event in machine.log.events]


def every_kind() -> list[type[Event]]:
    found: list[type[Event]] = [Event]
    for kind in found:
        found += kind.__subclasses__()
    return found


# ----- what an event is


@pytest.mark.parametrize("kind", every_kind())
def test_every_event_says_what_it_means_and_how_loudly(kind: type[Event]) -> None:
    """A docstring of its own, a level that logging knows, and a place in the one file of events."""
    assert kind.__dict__.get("__doc__")
    assert kind.level in set(LogLevel)
    assert getattr(_events, kind.__name__) is kind


@pytest.mark.parametrize("kind", every_kind())
def test_events_cannot_be_changed_and_are_told_by_name(kind: type[Event]) -> None:
    """Whoever hears one first cannot spoil it for the next."""
    assert all(field.kw_only for field in attrs.fields(kind))
    event = kind(**{field.name: None for field in attrs.fields(kind)})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.anything = 1  # type: ignore[attr-defined]


# ----- order


async def test_listen_hears_a_whole_life_from_the_start_to_the_report(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """In the order in which it happened; the first and the last word included."""
    channel = MemoryChannel("chat")

    async def look(text: str) -> str:
        return text

    async def agent(turn: Turn) -> str:
        turn.progress("looking")
        await turn.step(look, "x")
        await turn.say("a moment")
        return "done"

    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        await gateway.wait_idle()
    found = kinds(machine)
    # When a reply arrives is the platform's affair; all else has its place.
    assert found.count("Delivered") == 2
    assert [name for name in found if name != "Delivered"] == [
        "GatewayStarted",
        "ChannelConnected",
        "MessageAccepted",
        "TurnBegun",
        "ProgressShown",
        "StepRemembered",
        "ReplyCommitted",
        "TurnSettled",
        "ReplyCommitted",
        "StopRequested",
        "DrainReport",
    ]
    assert found[-1] == "DrainReport"
    assert machine.log.events[-1] is gateway.report


async def test_a_life_after_an_interruption_is_told_from_its_own_start(
    machine: Machine, autojump_clock: MockClock
) -> None:
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
    machine.log.events.clear()
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    found = kinds(machine)
    assert found[0] == "GatewayStarted"
    assert sorted(found[1:3]) == ["TurnResumed"] * 2
    assert found[-2:] == ["StopRequested", "DrainReport"]
    (started,) = machine.log.of(GatewayStarted)
    assert (started.resuming, started.previous_stop) == (2, "shutdown")


async def test_the_start_is_told_before_any_turn_and_after_what_ends_at_boot(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What expires is over when the gateway says that it has started, and counted there."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg("a", "m1"), msg("a", "m2")])
        await agent.wait_begun(1)
    await trio.sleep(7200)
    machine.log.events.clear()
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    found = kinds(machine)
    assert found.index("TurnSettled") < found.index("GatewayStarted") < found.index("TurnBegun")
    (started,) = machine.log.of(GatewayStarted)
    assert (started.expired, started.resuming, started.waiting) == (1, 0, 1)
    assert machine.log.of(TurnSettled)[0].state is TurnState.EXPIRED


async def test_a_stop_is_told_in_its_order(machine: Machine, autojump_clock: MockClock) -> None:
    """Asked for, marked, drained, interrupted, reported."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(2)
        machine.log.events.clear()
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        await gateway.accept(msg("c", "m3"))
        agent.release("a")
    assert kinds(machine) == [
        "StopRequested",
        "TurnsMarked",
        "MessageAccepted",
        "TurnSettled",
        "ReplyCommitted",
        "TurnInterrupted",
        "DrainReport",
    ]


# ----- whoever subscribes


async def test_a_subscriber_reads_what_happens_from_then_on(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The same events, the same order, at its own pace."""
    async with machine.boot(Script(open=True)) as gateway:
        await gateway.ask(msg("a", "m1"))
        machine.log.events.clear()
        async with gateway.events() as events:
            await gateway.ask(msg("a", "m2"))
            await gateway.wait_idle()
            heard = [await anext(events) for _ in machine.log.events]
    assert heard == machine.log.events[: len(heard)]
    assert isinstance(heard[0], MessageAccepted)
    assert heard[0].message_id == "m2"


async def test_the_events_end_when_the_gateway_has_stopped(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Whoever reads them to the end gets to the end, with everything that was said before; also if
    it begins to read when all is over."""
    heard: list[Event] = []
    async with machine.boot(Script(open=True)) as gateway, gateway.events() as late:
        with trio.fail_after(60):
            async with gateway.events() as events:
                await gateway.accept(msg("a", "m1"))
                gateway.request_stop()
                async for event in events:
                    heard.append(event)
    assert [event async for event in late] == heard
    assert type(heard[-1]) is DrainReport
    async with gateway.events() as after:
        assert [event async for event in after] == []


async def read_all(gateway: Gateway, heard: list[Event]) -> None:
    async with gateway.events() as events:
        async for event in events:
            heard.append(event)


def raise_it(event: Event) -> None:
    raise ValueError("a listener's own")


async def test_the_events_end_when_the_gateway_fails(
    machine: Machine, autojump_clock: MockClock
) -> None:
    heard: list[Event] = []

    async def live() -> None:
        async with machine.boot(Script(open=True)) as gateway, trio.open_nursery() as nursery:
            nursery.start_soon(read_all, gateway, heard)
            await trio.testing.wait_all_tasks_blocked()
            with gateway.listen(raise_it):
                await gateway.accept(msg("a", "m1"))

    with trio.fail_after(60), pytest.raises(ValueError, match="a listener's own"):
        await live()
    assert GatewayFailed in {type(event) for event in heard}
    assert type(heard[-1]) is DrainReport


async def test_a_cancelled_reader_misses_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A wait that is cancelled takes no event away from the next one."""
    async with machine.boot(Script(open=True)) as gateway, gateway.events() as events:
        heard: list[Event] = []
        with trio.move_on_after(1):
            await anext(events)
        before = len(machine.log.events)
        await gateway.ask(msg("a", "m1"))
        await gateway.wait_idle()
        with trio.CancelScope() as scope:
            scope.cancel()
            heard.append(await anext(events))
        assert heard == []
        expected = machine.log.events[before:]
        assert [await anext(events) for _ in expected] == expected


async def test_several_readers_of_one_subscription_share_it(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Each event goes to one of them; none of them falls over the other."""
    heard: list[int] = []
    stream = EventStream(lambda error: None)

    async with stream.subscribe() as events, trio.open_nursery() as nursery:

        async def read() -> None:
            async for event in events:
                assert isinstance(event, EventsDropped)
                heard.append(event.count)

        for _ in range(3):
            nursery.start_soon(read)
        for n in range(20):
            stream.emit(EventsDropped(count=n))
            if n % 3 == 0:
                await trio.testing.wait_all_tasks_blocked()
        stream.close()
    assert sorted(heard) == list(range(20))


async def test_a_slow_subscriber_is_told_how_much_it_missed(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The oldest are dropped; the gateway waits for nobody, and other listeners miss nothing."""
    stream = EventStream(lambda error: None)
    everything: list[Event] = []

    def event(n: int) -> Event:
        return ChannelConnected(channel=str(n))

    async with stream.subscribe() as slow:
        with stream.listen(everything.append):
            for n in range(BUFFER + 25):
                stream.emit(event(n))
            assert await anext(slow) == EventsDropped(count=25)
            assert await anext(slow) == event(25)
            stream.emit(event(-1))
            stream.emit(event(-2))
            assert await anext(slow) == EventsDropped(count=1)
            rest = [await anext(slow) for _ in range(BUFFER)]
    assert rest == [event(n) for n in range(27, BUFFER + 25)] + [event(-1), event(-2)]
    assert len(everything) == BUFFER + 27


async def test_a_slow_subscriber_delays_no_turn(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Through the gateway: 3,000 turns, a reader that reads nothing until they are over."""
    many = 3000
    async with machine.boot(Script(open=True)) as gateway, gateway.events() as events:
        for start in range(0, many, 500):
            await gateway.accept([msg(f"s{n}", f"m{n}") for n in range(start, start + 500)])
        await gateway.wait_idle()
        settled_well(gateway)
        first = await anext(events)
        assert isinstance(first, EventsDropped)
        assert first.count == 4 * many - BUFFER
        assert not machine.log.of(EventsDropped)


# ----- listeners


async def test_a_listener_hears_while_its_block_lasts(
    machine: Machine, autojump_clock: MockClock
) -> None:
    heard: list[Event] = []
    async with machine.boot(Script(open=True)) as gateway:
        with gateway.listen(heard.append):
            await gateway.ask(msg("a", "m1"))
        count = len(heard)
        await gateway.ask(msg("a", "m2"))
    assert 0 < count == len(heard)


async def test_a_listener_that_raises_stops_the_gateway_in_order(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It is called no more; whoever said the event notices nothing; the turns are marked, and the
    failure comes out of the block."""
    agent = Script()
    calls: list[Event] = []

    def fail(event: Event) -> None:
        calls.append(event)
        raise_it(event)

    async def live() -> None:
        async with machine.boot(agent, settings=QUICK) as gateway:
            await gateway.accept(msg("a", "m1"))
            await agent.wait_begun(1)
            with gateway.listen(fail):
                assert (await gateway.accept(msg("b", "m2"))).accepted
            await gateway.wait_stop_requested()

    with pytest.raises(ValueError, match="a listener's own"):
        await live()
    assert len(calls) == 1
    assert "a listener's own" in machine.log.of(GatewayFailed)[0].error
    assert type(machine.log.events[-1]) is DrainReport
    assert machine.markers()["a"] == ("RESUME_PENDING", "shutdown")


# ----- said after the fact is on disk


Look = Callable[[Machine, Any], bool]


def state_of(machine: Machine, turn: int) -> str:
    ((state,),) = machine.rows("SELECT state FROM turn WHERE id = ?", turn)
    return str(state)


def delivery_row(machine: Machine, event: Any) -> tuple[Any, ...]:
    (row,) = machine.rows(
        "SELECT state, tries, not_before FROM delivery WHERE id = ?", event.delivery.id
    )
    return row


def message_state(machine: Machine, event: Any) -> list[tuple[Any, ...]]:
    return machine.rows("SELECT state FROM message WHERE id = ?", event.message_id)


ON_DISK: dict[type[Event], Look] = {
    GatewayStarted: lambda m, e: m.rows("SELECT max(id) FROM epoch") == [(e.epoch,)],
    MessageAccepted: lambda m, e: bool(message_state(m, e)),
    MessageUnreadable: lambda m, e: message_state(m, e) == [("failed",)],
    TurnBegun: lambda m, e: state_of(m, e.turn) == "RUNNING",
    TurnResumed: lambda m, e: state_of(m, e.turn) == "RUNNING",
    TurnSettled: lambda m, e: state_of(m, e.turn) == e.state,
    TurnInterrupted: lambda m, e: state_of(m, e.turn) == "RESUME_PENDING",
    TurnsMarked: lambda m, e: (
        m.rows("SELECT count(*) FROM turn WHERE state = 'RESUME_PENDING'") == [(e.count,)]
    ),
    SettleDelayed: lambda m, e: state_of(m, e.turn) in ("RUNNING", "RESUME_PENDING"),
    StepRemembered: lambda m, e: (
        m.rows("SELECT state FROM step WHERE turn = ? AND name = ?", e.turn, e.name) == [("done",)]
    ),
    ReplyCommitted: lambda m, e: bool(m.rows("SELECT 1 FROM delivery WHERE key = ?", e.key)),
    Delivered: lambda m, e: delivery_row(m, e)[0] == "delivered",
    DeliveryDelayed: lambda m, e: (
        delivery_row(m, e)[1] == e.delivery.tries and delivery_row(m, e)[2] is not None
    ),
    DeadLettered: lambda m, e: delivery_row(m, e)[0] == "dead",
    TextsForgotten: lambda m, e: m.rows("SELECT 1 FROM message WHERE body IS NULL") != [],
}
"""What another process must see on disk when it hears of this."""


SECRET = "what-nobody-may-read"


async def everything_happens(machine: Machine) -> None:
    """Lives in which every kind of event is said that tells of the store, and some more. Messages
    and replies have the secret in their texts."""

    async def think() -> str:
        return f"thought {SECRET}"

    async def agent(turn: Turn) -> str:
        turn.progress(f"at {SECRET}")
        await turn.step(think)
        await turn.say(f"say {SECRET}")
        if "fail" in turn.text:
            raise ValueError("no")
        if "long" in turn.text and turn.resumed is None:
            await trio.sleep_forever()
        return f"re {turn.text}"

    tries: dict[str, int] = {}

    async def send(delivery: Delivery) -> None:
        tries[delivery.key] = tries.get(delivery.key, 0) + 1
        if delivery.session.name == "blocked":
            raise Undeliverable("blocked")
        if delivery.session.name == "flaky" and tries[delivery.key] < 3:
            raise OSError("again")

    channel = MemoryChannel("chat", notices=True)
    channel.before_send = send
    settings = Settings(
        grace=1.0,
        budget=10.0,
        busy=Busy.INTERRUPT,
        limits=Limits(open_per_session=2),
        resume=ResumeRules(max_crashes=1),
        delivery=DeliveryRules(max_tries=5),
        keep=timedelta(days=1),
    )

    def disk(moment: str) -> None:
        fails = machine.log.of(ReplyCommitted) and not machine.log.of(SettleDelayed)
        if moment == "before" and fails:
            raise apsw.FullError("full")

    def text(what: str) -> str:
        return f"{what} {SECRET}"

    async with machine.boot(agent, channel, settings=settings) as gateway:
        await channel.wait_ready()
        machine.on_commit = disk
        await channel.receive("short", "m1", text("hi"))
        await trio.sleep(20)
        machine.on_commit = None
        for name in ("fail", "flaky", "blocked"):
            await channel.receive(name, name, text(name))
        await gateway.accept([msg("x", "x\ud800", text("bad")), msg("x", "y", SECRET * 100_000)])
        await channel.receive("stopped", "s1", text("long"))
        await trio.sleep(1)
        await gateway.stop_turn(SessionKey("chat", "stopped"))
        await trio.sleep(60)
        await channel.receive_all(
            *(channel.message("long", f"l{n}", text("long")) for n in range(2)),
            channel.message("bad", "b1", text("long")),
        )
        await trio.sleep(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        await channel.receive("waits", "w1", text("in the drain"))
    edit_store(
        machine.store,
        lambda ledger: ledger._run("UPDATE message SET body = ? WHERE id = 'w1'", (SECRET,)),
    )
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.wait_idle()
        await channel.receive("killed", "k1", text("long"))
        await trio.sleep(1)
        # What it says from its death on is said of a store that nobody will see.
        hooks, machine.log.hooks = machine.log.hooks, []
        machine.crash()
        gateway.request_stop(now=True)
    machine.log.hooks = hooks
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.wait_idle()
        await trio.sleep(3 * 86_400)


async def test_every_event_is_said_after_the_commit(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """At the moment in which it is heard, another process can read it from the disk."""
    looked: set[type[Event]] = set()
    early: list[Event] = []

    def look(event: Event) -> None:
        found = ON_DISK.get(type(event))
        if found is not None:
            looked.add(type(event))
            if not found(machine, event):
                early.append(event)

    machine.log.hooks.append(look)
    await everything_happens(machine)
    assert early == []
    assert looked == set(ON_DISK)


async def test_no_text_of_a_message_is_told_above_debug_level(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Nobody who keeps a log of what matters keeps what people said."""
    await everything_happens(machine)
    told = [(event, event_level(event)) for event in machine.log.events]
    loud = [event for event, level in told if level is not LogLevel.DEBUG]
    assert {DeadLettered, DeliveryDelayed, MessageUnreadable, MessageRefused} <= set(
        map(type, loud)
    )
    for event in loud:
        assert SECRET not in repr(event), type(event)
        assert SECRET not in repr(event_fields(event, texts=False))
    quiet = {type(event) for event, level in told if level is LogLevel.DEBUG}
    assert {MessageAccepted, ReplyCommitted, ProgressShown, Delivered} <= quiet
    assert any(SECRET in repr(event) for event in machine.log.of(MessageAccepted))


async def test_an_input_that_a_channel_cannot_read_is_told(
    machine: Machine, autojump_clock: MockClock
) -> None:
    channel = MemoryChannel("chat")
    async with machine.boot(Script(open=True), channel) as gateway:
        await channel.wait_ready()
        gateway._intake_of("chat").refused_input("line 3", "not JSON")
    assert machine.log.of(InputRefused) == [
        InputRefused(channel="chat", where="line 3", error="not JSON")
    ]


async def test_a_store_in_trouble_is_told(machine: Machine, autojump_clock: MockClock) -> None:
    """Naming what could not be done; and once it is done, nothing more."""
    failing = True

    def fail(moment: str) -> None:
        if moment == "before" and failing:
            raise apsw.FullError("full")

    agent = Script()
    async with machine.boot(agent, settings=Settings(limits=Limits(turns=1))) as gateway:
        await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        await agent.wait_begun(1)
        machine.on_commit = fail
        await trio.sleep(65)
        failing = False
        count = len(machine.log.of(StoreTrouble))
        agent.release()
        await gateway.wait_idle()
    troubles = machine.log.of(StoreTrouble)
    assert len(troubles) == count > 0
    assert {trouble.operation for trouble in troubles} == {"touch"}
    assert "make room" in troubles[0].error


async def test_a_stop_names_who_asked_first(machine: Machine, autojump_clock: MockClock) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        gateway.request_stop(by="somebody")
        gateway.request_stop(by="somebody else")
    assert [event.by for event in machine.log.of(StopRequested)] == ["somebody"]
