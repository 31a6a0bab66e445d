"""Rows that cannot be read: row c54 and promise 14."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import attrs
import orjson
import pytest
import trio
from helpers import Log, Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    AsyncAgent,
    Busy,
    Gateway,
    InvalidInput,
    Message,
    ReceiptStatus,
    ReplyKind,
    SessionKey,
    Settings,
    StepNotStorable,
    StoreCorrupt,
    StoreSchemaError,
    Turn,
    TurnState,
)
from trio_gateway._cli import main
from trio_gateway._errors import unless_for_want_of_memory
from trio_gateway._events import GatewayFailed, MessageUnreadable, TurnSettled
from trio_gateway._policy import SORRY, SORRY_UNREADABLE
from trio_gateway._steps import load
from trio_gateway._views import short
from trio_gateway.store import read_store
from trio_gateway.store._codec import load_ids, load_message
from trio_gateway.store._database import open_database, select, translate
from trio_gateway.store._reads import _message_row
from trio_gateway.testing import MemoryChannel, check_invariants

QUICK = Settings(grace=1.0, budget=10.0)

BROKEN = b'{"text": "torn \xff", "sender": null}'
"""What a bit that fell over leaves of a text: no UTF-8 any more."""

BAD_BODIES = [
    "", " ", "not json", "{", '{"text": "cut', "null", "7", "[]", '"text"', "{}",
    '{"sender": "u1"}', '{"text": null}', '{"text": 5}', '{"text": ["hi"]}',
    '{"text": "hi", "sender": 5}', '{"text": "\\ud800"}', "[" * 2000, "\0", None, BROKEN,
    b"\xff\xfe",
]  # fmt: skip


def briefly(value: object) -> str:
    """How a case is called."""
    return repr(value)[:30]


def damage(
    machine: Machine, table: str, column: str, where: str, value: str | bytes | None
) -> None:
    """Something writes rubbish into one field of the store. Bytes become a text that is none."""
    given = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
    statement = f"UPDATE {table} SET {column} = {given} WHERE {where}"
    with closing(open_database(machine.store, write=True)) as db:
        db.execute(statement, (value,))
        assert db.changes() == 1


def damage_body(machine: Machine, message_id: str, value: str | bytes | None = "not json") -> None:
    damage(machine, "message", "body", f"id = '{message_id}'", value)


async def life(machine: Machine, agent: AsyncAgent, *messages: Message, **options: Any) -> None:
    """A life in which these arrive, and at whose end turns that wait for the test are cut."""
    async with machine.boot(agent, settings=options.pop("settings", QUICK), **options) as gateway:
        await gateway.accept(list(messages))
        await trio.testing.wait_all_tasks_blocked()


def unreadable(log: Log) -> list[str]:
    return [event.message_id for event in log.of(MessageUnreadable)]


async def whole_again(machine: Machine, gateway: Gateway) -> None:
    """Whatever was unreadable, the gateway has nothing open, and serves every session."""
    await gateway.wait_idle()
    settled_well(gateway)
    assert machine.log.of(GatewayFailed) == []
    check_invariants(machine.store, settled=True)


# ----- a message that waits


@pytest.mark.parametrize("body", BAD_BODIES, ids=briefly)
async def test_c54_p14_a_waiting_message_that_cannot_be_read_ends_alone(
    machine: Machine, autojump_clock: MockClock, body: str | bytes | None
) -> None:
    """It fails, visibly; its sender is told; who came before, after and beside it is answered."""
    agent = Script()
    await life(
        machine,
        agent,
        msg("a", "m1", "1"),
        msg("a", "m2", "2"),
        msg("a", "m3", "3"),
        msg("b", "n1"),
    )
    damage_body(machine, "m2", body)
    agent.release()
    async with machine.boot(agent) as gateway:
        await whole_again(machine, gateway)
        (told,) = await gateway.ask(msg("a", "m2", "2"))
    assert machine.said("a") == ["re: 1", SORRY_UNREADABLE, "re: 3"]
    assert machine.said("b") == ["re: hi"]
    assert [machine.fate(f"m{n}") for n in (1, 2, 3)] == ["answered", "failed", "answered"]
    assert unreadable(machine.log) == ["m2"]
    assert (told.text, told.kind, told.final) == (SORRY_UNREADABLE, ReplyKind.APOLOGY, True)
    assert told.in_reply_to == ("m2",)
    async with machine.boot(agent) as gateway:
        await whole_again(machine, gateway)
    assert unreadable(machine.log) == ["m2"]


async def test_c54_on_a_channel_the_sender_is_told(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """In the order of the conversation, once."""
    agent = Script()
    channel = MemoryChannel("chat")
    async with machine.boot(agent, channel, settings=QUICK):
        await channel.wait_ready()
        await channel.receive_all(*(channel.message("a", f"m{n}", str(n)) for n in range(3)))
        await agent.wait_begun(1)
    damage_body(machine, "m1")
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await whole_again(machine, gateway)
        assert (await channel.receive("a", "m1", "1")).status is ReceiptStatus.DUPLICATE
    assert channel.texts() == ["re: 0", SORRY_UNREADABLE, "re: 2"]
    assert channel.sent[1].in_reply_to == ("m1",)
    assert channel.sent[1].final


async def test_c54_whoever_waits_for_it_hears_of_it(
    machine: Machine, autojump_clock: MockClock
) -> None:
    agent = Script()
    await life(machine, agent, msg("a", "m1"), msg("a", "m2"))
    damage_body(machine, "m2")
    async with machine.boot(agent) as gateway, trio.open_nursery() as nursery:
        heard: list[str] = []

        async def ask() -> None:
            heard.extend(reply.text for reply in await gateway.ask(msg("a", "m2")))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert heard == []
        agent.release()
    assert heard == [SORRY_UNREADABLE]


@pytest.mark.parametrize("busy", [Busy.QUEUE, Busy.COLLECT])
async def test_c54_a_session_of_nothing_but_rubbish_goes_on(
    machine: Machine, autojump_clock: MockClock, busy: Busy
) -> None:
    """All that waits is unreadable: all of it ends, and the next message is answered."""
    settings = attrs.evolve(QUICK, busy=busy)
    agent = Script()
    await life(machine, agent, *(msg("a", f"m{n}") for n in range(4)), settings=settings)
    for n in range(1, 4):
        damage_body(machine, f"m{n}")
    agent.release()
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
        await gateway.accept(msg("a", "m4", "new"))
        await whole_again(machine, gateway)
    assert machine.said("a") == ["re: hi", *[SORRY_UNREADABLE] * 3, "re: new"]
    assert unreadable(machine.log) == ["m1", "m2", "m3"]


async def test_c54_what_is_collected_leaves_it_out(
    machine: Machine, autojump_clock: MockClock
) -> None:
    settings = attrs.evolve(QUICK, busy=Busy.COLLECT)
    agent = Script()
    await life(machine, agent, *(msg("a", f"m{n}", str(n)) for n in range(5)), settings=settings)
    damage_body(machine, "m2")
    agent.release()
    async with machine.boot(agent, settings=settings) as gateway:
        await whole_again(machine, gateway)
    assert machine.said("a") == ["re: 0", SORRY_UNREADABLE, "re: 1\n3\n4"]
    assert [machine.fate(f"m{n}") for n in range(5)] == [
        "answered", "answered", "failed", "answered", "answered",
    ]  # fmt: skip


async def test_c54_a_turn_that_takes_its_mail_passes_over_it(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The running agent takes what waits; what cannot be read ends, and keeps nobody busy."""
    settings = attrs.evolve(QUICK, busy=Busy.STEER)
    channel = MemoryChannel("chat")
    taken: list[str] = []

    async def agent(turn: Turn) -> str:
        if turn.resumed is None:
            await trio.sleep_forever()
        async for message in turn.arrivals():
            taken.append(message.text)
            if message.text == "enough":
                break
        return "done"

    async with machine.boot(agent, channel, settings=settings):
        await channel.wait_ready()
        await channel.receive_all(*(channel.message("a", f"m{n}", str(n)) for n in range(4)))
    for n in (1, 3):
        damage_body(machine, f"m{n}")
    async with machine.boot(agent, channel, settings=settings) as gateway:
        with trio.fail_after(60):
            await channel.wait_sent(2)
            await trio.sleep(1)
            assert taken == ["2"]
            assert gateway.statistics()["messages_open"] == 2
            await channel.receive("a", "m4", "enough")
            await whole_again(machine, gateway)
    assert channel.texts() == [SORRY_UNREADABLE, SORRY_UNREADABLE, "done"]
    assert unreadable(machine.log) == ["m1", "m3"]
    assert [machine.fate(f"m{n}") for n in range(5)] == [
        "answered", "failed", "answered", "failed", "answered",
    ]  # fmt: skip


# ----- a message of a turn that was running


@pytest.mark.parametrize("body", BAD_BODIES, ids=briefly)
@pytest.mark.parametrize("asks", [False, True])
async def test_c54_p14_a_running_message_that_cannot_be_read_ends_its_turn(
    machine: Machine, autojump_clock: MockClock, body: str | bytes | None, asks: bool
) -> None:
    """Found at boot, also by the authorisation that is asked again: the turn fails, its session and
    the others go on."""

    async def authorize(message: Message) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    agent = Script()
    await life(machine, agent, msg("a", "m1", "1"), msg("a", "m2", "2"), msg("b", "n1"))
    damage_body(machine, "m1", body)
    agent.release()
    async with machine.boot(agent, authorize=authorize if asks else None) as gateway:
        await whole_again(machine, gateway)
    assert [machine.fate(m) for m in ("m1", "m2", "n1")] == ["failed", "answered", "answered"]
    assert machine.said("a") == [SORRY_UNREADABLE, "re: 2"]
    ends = [event for event in machine.log.of(TurnSettled) if event.state is TurnState.FAILED]
    assert [event.session.name for event in ends] == ["a"]
    assert "m1" not in [text for _, _, text in agent.begun]
    assert ends[0].error


@pytest.mark.parametrize("asks", [False, True])
async def test_c54_of_a_turn_of_many_the_readable_go_on(
    machine: Machine, autojump_clock: MockClock, asks: bool
) -> None:
    """A turn of three messages, one of which cannot be read: that one ends, its turn resumes with
    the others. And is interrupted and resumed once more, to see that the counts hold."""

    async def authorize(message: Message) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    settings = attrs.evolve(QUICK, busy=Busy.COLLECT)
    hook = authorize if asks else None
    channel = MemoryChannel("chat")
    begun: list[str] = []
    gate = trio.Event()

    async def agent(turn: Turn) -> str:
        begun.append(turn.text)
        if turn.text != "go":
            await gate.wait()
        return f"re: {turn.text}"

    async with machine.boot(agent, channel, settings=settings):
        await channel.wait_ready()
        batch = [channel.message("a", f"m{n}", str(n)) for n in range(4)]
        await channel.receive_all(channel.message("a", "first", "go"), *batch)
        await trio.testing.wait_all_tasks_blocked()
    damage_body(machine, "m1")
    damage_body(machine, "m2", BROKEN)
    for _ in range(2):
        async with machine.boot(agent, channel, settings=settings, authorize=hook) as gateway:
            await channel.receive("a", "later", "later")
            await trio.sleep(0.5)
            assert gateway.statistics()["messages_open"] == 3
    gate.set()
    async with machine.boot(agent, channel, settings=settings, authorize=hook) as gateway:
        await whole_again(machine, gateway)
    assert begun == ["go", "0\n1\n2\n3", "0\n3", "0\n3", "0\n3", "later"]
    assert channel.texts() == [
        "re: go",
        SORRY_UNREADABLE,
        SORRY_UNREADABLE,
        "re: 0\n3",
        "re: later",
    ]
    assert unreadable(machine.log) == ["m1", "m2"]
    assert channel.sent[-2].in_reply_to == ("m0", "m3")
    assert [machine.fate(f"m{n}") for n in range(4)] == [
        "answered", "failed", "failed", "answered",
    ]  # fmt: skip


async def test_c54_what_waits_behind_such_a_turn_is_not_forgotten(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What its turn had taken and what waits are counted apart."""
    settings = attrs.evolve(QUICK, busy=Busy.COLLECT)
    agent = Script()
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg("a", f"m{n}", str(n)) for n in range(4)])
        await agent.wait_begun(1)
        await gateway.stop_turn(SessionKey("local", "a"))
        await agent.wait_begun(2)
        await gateway.accept(msg("a", "m4", "4"))
    for n in (1, 2):
        damage_body(machine, f"m{n}")
    agent.release()
    async with machine.boot(agent, settings=settings) as gateway:
        with trio.fail_after(60):
            await whole_again(machine, gateway)
    assert [text for _, _, text in agent.begun] == ["0", "1\n2\n3", "3", "4"]
    assert machine.said("a") == [SORRY_UNREADABLE, SORRY_UNREADABLE, "re: 3", "re: 4"]


# ----- what a turn remembers


BAD_VALUES = ["", "{", "not json", "[" * 2000, b'"\xff"']


@pytest.mark.parametrize("value", BAD_VALUES, ids=briefly)
async def test_c54_p14_a_checkpoint_that_cannot_be_read_is_an_error_where_it_is_read(
    machine: Machine, autojump_clock: MockClock, value: str | bytes
) -> None:
    """An agent that looks at it learns that it is damaged; one that does not, notices nothing."""
    looks: list[str] = []

    async def agent(turn: Turn) -> str:
        if turn.resumed is None:
            await turn.checkpoint({"n": 1})
            await trio.sleep_forever()
        if turn.session.name == "blind":
            return "went on"
        try:
            return f"found {turn.checkpointed}"
        except StepNotStorable as error:
            looks.append(str(error))
            if turn.session.name == "careful":
                return "began anew"
            raise

    names = ("blind", "careful", "careless", "fine")
    await life(machine, agent, *(msg(name, name) for name in names))
    for name in names[:3]:
        where = f"session = (SELECT id FROM session WHERE name = '{name}')"
        damage(machine, "turn", "checkpoint", where, value)
    async with machine.boot(agent) as gateway:
        await whole_again(machine, gateway)
    said = [machine.said(name) for name in names]
    assert said == [["went on"], ["began anew"], [SORRY], ["found {'n': 1}"]]
    assert [machine.fate(name) for name in names] == ["answered"] * 2 + ["failed", "answered"]
    assert len(looks) == 2
    assert all("checkpoint" in look and "damaged" in look for look in looks)


@pytest.mark.parametrize("value", BAD_VALUES, ids=briefly)
async def test_c54_p14_a_result_that_cannot_be_read_fails_its_turn_and_runs_nothing_again(
    machine: Machine, autojump_clock: MockClock, value: str | bytes
) -> None:
    """The step happened: to run it again would be worse than to fail."""
    runs: list[str] = []

    async def charge(session: str) -> str:
        runs.append(session)
        return "paid"

    async def agent(turn: Turn) -> str:
        paid = await turn.step(charge, turn.session.name, name="charge", effect="unsafe")
        if turn.resumed is None:
            await trio.sleep_forever()
        return paid

    await life(machine, agent, msg("bad", "m1"), msg("good", "m2"), msg("bad", "m3"))
    where = "turn = (SELECT turn FROM message WHERE id = 'm1')"
    damage(machine, "step", "result", where, value)
    async with machine.boot(agent) as gateway:
        await trio.sleep(1)
        gateway.request_stop()
    async with machine.boot(agent) as gateway:
        await whole_again(machine, gateway)
    assert [machine.fate(m) for m in ("m1", "m2", "m3")] == ["failed", "answered", "answered"]
    assert sorted(runs) == ["bad", "bad", "good"]
    (end,) = [event for event in machine.log.of(TurnSettled) if event.state is TurnState.FAILED]
    assert "'charge'" in str(end.error)
    assert "damaged" in str(end.error)


# ----- replies


@pytest.mark.parametrize(
    "about", ["", "{", "null", "7", '{"a": 1}', "[5]", "[[", b"\xff"], ids=repr
)
async def test_c54_p14_a_reply_whose_about_cannot_be_read_is_delivered(
    machine: Machine, autojump_clock: MockClock, about: str | bytes
) -> None:
    """What it answers is lost; what it says is not. Nor is anybody else's reply."""
    channel = MemoryChannel("chat")
    stuck = trio.Event()

    async def never(delivery: object) -> None:
        stuck.set()
        await trio.sleep_forever()

    channel.before_send = never
    agent = Script(open=True)
    async with machine.boot(agent, channel, settings=QUICK):
        await channel.wait_ready()
        await channel.receive_all(channel.message("a", "m1", "1"), channel.message("b", "m2", "2"))
        await stuck.wait()
    damage(machine, "delivery", "about", "text = 're: 1'", about)
    channel.before_send = None
    async with machine.boot(agent, channel) as gateway:
        await whole_again(machine, gateway)
        (reply,) = await gateway.ask(channel.message("a", "m1", "1"))
    assert sorted(channel.texts()) == ["re: 1", "re: 2"]
    found = {delivery.text: delivery.in_reply_to for delivery in channel.sent}
    assert found["re: 2"] == ("m2",)
    assert all(isinstance(one, str) for one in found["re: 1"])
    assert reply.text == "re: 1"


async def test_c54_p14_a_reply_whose_text_is_torn_is_delivered_as_far_as_it_goes(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A byte of it is no text any more: a mark stands for it, and the boot goes on. So does the
    conversation, which reads its past with every turn."""
    channel = MemoryChannel("chat")

    async def never(delivery: object) -> None:
        await trio.sleep_forever()

    async def agent(turn: Turn) -> str:
        past = await turn.history()
        return f"{len(past)} lines before {turn.text}"

    channel.before_send = never
    async with machine.boot(agent, channel, settings=QUICK):
        await channel.wait_ready()
        await channel.receive("a", "m1", "1")
        await trio.testing.wait_all_tasks_blocked()
    damage(machine, "delivery", "text", "1", b"torn \xff.")
    channel.before_send = None
    async with machine.boot(agent, channel) as gateway:
        await whole_again(machine, gateway)
        await channel.receive("a", "m2", "2")
        await whole_again(machine, gateway)
        (reply,) = await gateway.ask(channel.message("a", "m1", "1"))
    assert channel.texts() == ["torn \ufffd.", "2 lines before 2"]
    assert reply.text == "torn \ufffd."


# ----- who looks at it


@pytest.mark.parametrize("body", ["not json", BROKEN, None], ids=repr)
async def test_c54_the_past_and_every_listing_pass_over_it(
    machine: Machine, autojump_clock: MockClock, body: str | bytes | None
) -> None:
    """An answered message whose row is damaged later: history goes on without it, and a person who
    looks sees that it cannot be read."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        for n in range(3):
            await gateway.ask(msg("a", f"m{n}", str(n)))
    damage_body(machine, "m1", body)
    async with machine.boot(agent) as gateway:
        past = await gateway.history(SessionKey("local", "a"))
        assert [line.text for line in past if line.role == "user"][-1] == "2"
        assert "1" not in [line.text for line in past]
        await whole_again(machine, gateway)
    with closing(read_store(machine.store)) as reader:
        rows = reader.messages(SessionKey("local", "a"), 10)
        assert [row.text for row in rows] == ["0", None, "2"]
        (timeline,) = reader.explain("m1")
        assert timeline.message.text is None
        assert timeline.message.state == "answered"
        assert len(timeline.entries) >= 3


async def test_c54_a_person_sees_why_a_message_failed(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The listing names the reason; the timeline shows the apology."""
    agent = Script()
    await life(machine, agent, msg("a", "m1"), msg("a", "m2"))
    damage_body(machine, "m2", BROKEN)
    agent.release()
    async with machine.boot(agent) as gateway:
        await whole_again(machine, gateway)
    with closing(read_store(machine.store)) as reader:
        (timeline,) = reader.explain("m2")
    assert timeline.message.state == "failed"
    assert "body is not readable" in str(timeline.message.error)
    assert [entry.what for entry in timeline.entries] == [
        "accepted", "apology committed", "apology delivered", "failed",
    ]  # fmt: skip


async def test_c54_a_retry_of_what_cannot_be_read_is_answered_too(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Nobody is left waiting by "Trying again."."""
    agent = Script()
    await life(machine, agent, msg("a", "m1"), msg("a", "m2"))
    damage_body(machine, "m2")
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        await trio.sleep(1)
        await gateway.accept(msg("a", "c1", "/retry"))
        await whole_again(machine, gateway)
    assert machine.fate("m2") == "failed"
    assert machine.said("a") == [
        "re: hi", SORRY_UNREADABLE, "Trying again.", SORRY_UNREADABLE,
    ]  # fmt: skip


# ----- rows that say what no gateway ever wrote


BIG = 2**63 - 1
NO_TEXT = "CAST(x'ff61' AS TEXT)"

INSANE = [
    f"UPDATE session SET name = {NO_TEXT} WHERE name = 'bad'",
    f"UPDATE session SET conversation = {BIG} WHERE name = 'bad'",
    "DELETE FROM session WHERE name = 'bad'",
    f"UPDATE message SET id = {NO_TEXT} WHERE id = 'm1'",
    f"UPDATE message SET id = {NO_TEXT} WHERE id = 'm2'",
    "UPDATE message SET session = (SELECT id FROM session WHERE name = 'good') WHERE id = 'm1'",
    "UPDATE message SET session = 77 WHERE id = 'm2'",
    "DELETE FROM message WHERE id = 'm1'",
    f"UPDATE message SET seq = {BIG} WHERE id = 'm2'",
    "UPDATE turn SET state = 'nonsense' WHERE id = 1",
    f"UPDATE turn SET state = {NO_TEXT} WHERE id = 1",
    "UPDATE turn SET reason = NULL WHERE id = 1",
    f"UPDATE turn SET reason = {NO_TEXT} WHERE id = 1",
    "UPDATE turn SET reason = 'nonsense' WHERE id = 1",
    "UPDATE turn SET marked_at = NULL, marked_up = NULL WHERE id = 1",
    f"UPDATE turn SET attempt = {BIG} WHERE id = 1",
    f"UPDATE turn SET crashes = {BIG}, state = 'RUNNING' WHERE id = 1",
    f"UPDATE turn SET interruptions = {-BIG} WHERE id = 1",
    "UPDATE turn SET epoch = 77 WHERE id = 1",
    "UPDATE turn SET epoch = 2, state = 'RUNNING' WHERE id = 1",
    f"UPDATE turn SET id = {BIG} WHERE id = 1",
    "UPDATE turn SET session = 77 WHERE id = 1",
    "DELETE FROM epoch",
    f"UPDATE epoch SET machine = {NO_TEXT}, ending = {NO_TEXT}",
    "INSERT INTO attempt SELECT id, attempt, 1, 1, 1, 'x' FROM turn WHERE id = 1",
    f"UPDATE step SET state = {NO_TEXT}, effect = {NO_TEXT}",
    f"UPDATE delivery SET kind = {NO_TEXT} WHERE text = 'on it'",
    "UPDATE delivery SET kind = 'nonsense' WHERE text = 'on it'",
    f"UPDATE delivery SET key = {NO_TEXT} WHERE text = 'on it'",
    f"UPDATE delivery SET tries = {BIG} WHERE text = 'on it'",
    f"UPDATE delivery SET not_before = {-BIG - 1} WHERE text = 'on it'",
    "UPDATE delivery SET session = 77 WHERE text = 'on it'",
]


def do(machine: Machine, statement: str) -> None:
    """Something changes the database by hand."""
    with closing(open_database(machine.store, write=True)) as db:
        list(db.execute(statement))
        assert db.changes() or not statement.startswith(("UPDATE", "DELETE", "INSERT"))


async def interrupted(machine: Machine) -> None:
    """Two sessions of a channel: each has a turn that was cut, with a step and something said that
    has not arrived, and a message that waits behind it."""
    channel = MemoryChannel("chat")

    async def never(delivery: object) -> None:
        await trio.sleep_forever()

    async def agent(turn: Turn) -> str:
        await turn.step(nothing)
        await turn.say("on it" if turn.session.name == "bad" else "at it")
        await trio.sleep_forever()
        raise AssertionError

    channel.before_send = never
    async with machine.boot(agent, channel, settings=QUICK):
        await channel.wait_ready()
        for name, first, second in (("bad", "m1", "m2"), ("good", "n1", "n2")):
            await channel.receive(name, first, "1")
            await channel.receive(name, second, "2")
        await trio.sleep(1)


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("statement", INSANE)
async def test_p14_an_insane_row_costs_its_own_message_at_the_most(
    machine: Machine, autojump_clock: MockClock, statement: str
) -> None:
    """The other session notices nothing; the damaged one goes on; and whoever looks can see it."""
    await interrupted(machine)
    do(machine, statement)
    channel = MemoryChannel("chat")

    async def agent(turn: Turn) -> str:
        await turn.step(nothing)
        await turn.history()
        return f"re: {turn.text}"

    async with machine.boot(agent, channel) as gateway:
        for name in ("bad", "good", "new"):
            await channel.receive(name, f"later-{name}", "later")
        with trio.move_on_after(3600):
            await gateway.wait_idle()
    assert machine.log.of(GatewayFailed) == []
    assert channel.texts("good") == ["at it", "re: 1", "re: 2", "re: later"]
    assert channel.texts("new") == ["re: later"]
    assert machine.fate("later-bad") == "answered"
    assert machine.rows("SELECT id FROM turn WHERE settled_at IS NULL") == []
    for words in (("sessions", "list"), ("quarantine", "list"), ("dead-letters", "list")):
        assert main([*words, "--store", str(machine.store)]) == 0
    assert main(["explain", "later-bad", "--store", str(machine.store)]) == 0


async def test_p14_a_message_that_no_start_will_come_to_is_named_by_the_doctor(
    machine: Machine, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    await interrupted(machine)
    do(machine, "UPDATE message SET turn = NULL WHERE id = 'm1'")
    do(machine, "UPDATE message SET state = 'nonsense' WHERE id = 'n2'")
    async with machine.boot(Script(open=True), MemoryChannel("chat")):
        await trio.sleep(10)
    assert main(["doctor", "--store", str(machine.store)]) == 1
    assert "no start will answer m1, n2" in capsys.readouterr().out


async def test_p14_a_step_whose_name_cannot_be_read_is_not_done_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Nobody can tell which one it was: the turn ends instead, also when it is tried again."""
    await interrupted(machine)
    do(machine, f"UPDATE step SET name = {NO_TEXT} WHERE turn = 1")
    channel = MemoryChannel("chat")
    agent = Script(open=True)
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        await channel.receive("bad", "again", "/retry")
        await gateway.wait_idle()
    assert machine.fate("m1") == "failed"
    assert channel.texts("bad")[1:] == [
        SORRY_UNREADABLE, "re: 2", "There is nothing to try again.",
    ]  # fmt: skip
    async with machine.boot(agent, channel) as gateway:
        do(machine, "UPDATE message SET state = 'queued', ended_at = NULL WHERE id = 'm1'")
    async with machine.boot(agent, channel) as gateway:
        await whole_again(machine, gateway)
    assert channel.texts("bad")[-1] == SORRY_UNREADABLE
    assert ("bad", "1") not in [(name, text) for name, _, text in agent.begun]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM store", "does not say which store it is"),
        ("UPDATE store SET id = ''", "does not say which store it is"),
        (f"UPDATE store SET id = {NO_TEXT}", "not readable"),
        ("PRAGMA user_version = -1", "schema version -1"),
        ("PRAGMA user_version = 0", "schema version 0"),
        ("DROP INDEX turn_open", "lacks turn_open"),
        ("DROP TABLE step", "lacks step"),
        ("ALTER TABLE turn RENAME COLUMN reason TO why", "turn lacks reason"),
        ("CREATE TRIGGER t AFTER UPDATE ON turn BEGIN DELETE FROM message; END", "trigger, t"),
    ],
)
async def test_p14_a_store_that_is_nobody_s_is_refused_and_left_as_it_is(
    machine: Machine, autojump_clock: MockClock, statement: str, said: str
) -> None:
    await interrupted(machine)
    do(machine, statement)
    before = machine.store.read_bytes()
    with pytest.raises((StoreCorrupt, StoreSchemaError), match=said) as caught:
        async with machine.boot(Script(open=True), MemoryChannel("chat")):
            pass
    assert str(machine.store) in str(caught.value)
    assert str(caught.value).count(str(machine.store)) == 1
    assert machine.store.read_bytes() == before


@pytest.mark.parametrize("sound", [True, False])
async def test_p14_a_copy_in_another_journal_mode_is_looked_through_before_it_is_changed(
    machine: Machine, autojump_clock: MockClock, sound: bool
) -> None:
    """A backup need not be a WAL database. A damaged one is refused before it becomes one."""
    async with machine.boot(Script(open=True)) as gateway:
        await gateway.accept([msg("a", f"m{n}", "x" * 900) for n in range(40)])
        await gateway.wait_idle()
    copy = machine.store.with_name("copy.db")
    with closing(open_database(machine.store, write=True)) as db:
        db.execute("VACUUM INTO ?", (str(copy),))
    machine.store = copy
    data = bytearray(copy.read_bytes())
    assert data[18:20] == b"\x01\x01", "a copy is in the oldest mode"
    if sound:
        async with machine.boot(Script(open=True)) as gateway:
            await gateway.ask(msg("a", "next"))
        return
    data[4096 * 10 : 4096 * 10 + 8] = bytes(8)
    copy.write_bytes(data)
    with pytest.raises(StoreCorrupt, match=r"copy\.db is damaged"):
        async with machine.boot(Script(open=True)):
            pass
    assert copy.read_bytes() == data


async def test_p14_a_turn_that_retries_itself_can_be_explained(
    machine: Machine, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        await gateway.ask(msg("a", "m1"))
    do(machine, "UPDATE turn SET retry_of = id, begun_at = 9223372036854775807, attempt_at = -9e15")
    assert main(["explain", "m1", "--store", str(machine.store)]) == 0
    assert "turn COMPLETED" in capsys.readouterr().out


async def test_p14_what_stands_in_a_row_does_not_command_the_terminal(
    machine: Machine, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        await gateway.ask(msg("a", "m1"))
    for table, column in (("message", "state"), ("delivery", "kind"), ("delivery", "state")):
        do(machine, f"UPDATE {table} SET {column} = char(27) || '[2J'")
    for words in (("sessions", "show", "local:a"), ("explain", "m1")):
        assert main([*words, "--store", str(machine.store)]) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_a_query_reads_what_is_no_text_as_an_escape_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.db").touch()
    with closing(open_database(tmp_path / "x.db", write=True)) as db:
        db.execute("CREATE TABLE t (a TEXT, b INTEGER, c BLOB) STRICT")
        for n, text in enumerate((b"one", b"t\xff\xfewo", b"three")):
            db.execute("INSERT INTO t VALUES (CAST(? AS TEXT), ?, x'ff')", (text, n))
        found = select(db, "SELECT a, b, c FROM t WHERE b < ? ORDER BY b DESC", (9,))
    assert found == [("three", 2, b"\xff"), ("t\\xff\\xfewo", 1, b"\xff"), ("one", 0, b"\xff")]


def test_what_comes_of_a_senseless_row_is_an_error_of_ours() -> None:
    for error in (TypeError("x"), ValueError("x"), OverflowError("x")):
        assert isinstance(translate(error), StoreCorrupt)
    mine = InvalidInput("x")
    assert translate(mine) is mine


@attrs.frozen
class Plan:
    """What a step may return."""

    words: str


def test_p14_a_want_of_memory_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What seems to be damaged is given up for good; this is not."""
    key = SessionKey("jsonl", "a")
    reads: list[Callable[[], object]] = [
        lambda: load_message(key, "m1", b'{"text": "hi"}'),
        lambda: load_ids(b'["m1"]'),
        lambda: load("the plan", '{"words": "go"}', Plan),
    ]

    def no_buffer(_: object) -> NoReturn:
        raise orjson.JSONDecodeError("Not enough memory to allocate buffer for parsing", "", 0)

    for read in reads:
        assert read()
    with monkeypatch.context() as patch:
        patch.setattr(orjson, "loads", no_buffer)
        patch.setattr("cattrs.preconf.orjson.loads", no_buffer)
        for read in reads:
            with pytest.raises(MemoryError):
                read()
    with pytest.raises(MemoryError):
        unless_for_want_of_memory(ExceptionGroup("while reading", [ValueError(), MemoryError()]))
    unless_for_want_of_memory(ValueError("Not enough memory, says a text"))


async def test_c54_the_store_is_damaged_as_these_tests_say(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A text that is none can be in a column of texts."""
    await life(machine, Script(), msg("a", "m1"))
    damage_body(machine, "m1", BROKEN)
    with pytest.raises(UnicodeDecodeError):
        machine.rows("SELECT body FROM message")


def test_p14_why_it_ended_is_shown_as_a_text_whatever_a_damaged_page_says() -> None:
    """A page that is another's: a number, in a column of texts."""
    body = b'{"text": "hi", "sender": null}'
    for found in (7, 7.5, b"\xff", "no room"):
        row = _message_row(SessionKey("chat", "ada"), "m1", "failed", body, 0, 0, found, None)  # type: ignore[arg-type]
        assert row.error == str(found)
        assert short(row.error)
