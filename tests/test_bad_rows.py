"""Rows that cannot be read: row c54 and promise 14."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import attrs
import pytest
import trio
from helpers import Log, Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    AsyncAgent,
    Busy,
    Gateway,
    Message,
    ReceiptStatus,
    ReplyKind,
    SessionKey,
    Settings,
    StepNotStorable,
    Turn,
    TurnState,
)
from trio_gateway._events import GatewayFailed, MessageUnreadable, TurnSettled
from trio_gateway._policy import SORRY, SORRY_UNREADABLE
from trio_gateway.store import read_store
from trio_gateway.store._database import open_database
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


async def test_c54_the_store_is_damaged_as_these_tests_say(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A text that is none can be in a column of texts."""
    await life(machine, Script(), msg("a", "m1"))
    damage_body(machine, "m1", BROKEN)
    with pytest.raises(UnicodeDecodeError):
        machine.rows("SELECT body FROM message")
