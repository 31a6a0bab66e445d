"""The inbox: rows c32 to c38, what is promised of it (1, 2, 12), who may talk, and its receipts."""

from __future__ import annotations

import itertools
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import apsw
import attrs
import pytest
import trio
from conftest import MEMORY
from helpers import PATIENCE, Machine, Script, msg, settled_well
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from trio_gateway import (
    Busy,
    Cursor,
    Delivery,
    DeliveryRules,
    DrainReport,
    Gateway,
    InvalidInput,
    Limits,
    Message,
    Receipt,
    ReceiptStatus,
    ResumeRules,
    SessionKey,
    Settings,
    StoreFull,
    Turn,
    open_gateway,
)
from trio_gateway._events import MessageAccepted, MessageRefused, StoreTrouble, TurnBegun
from trio_gateway.store import read_store
from trio_gateway.testing import MemoryChannel, check_invariants

ACCEPTED, DUPLICATE, REFUSED = (
    ReceiptStatus.ACCEPTED,
    ReceiptStatus.DUPLICATE,
    ReceiptStatus.REFUSED,
)
QUICK = Settings(grace=1.0, budget=10.0)


def statuses(receipts: tuple[Receipt, ...]) -> list[ReceiptStatus]:
    return [receipt.status for receipt in receipts]


def messages_on(machine: Machine) -> list[str]:
    """The ids of the messages that are on disk, in the order of acceptance."""
    return [str(row[0]) for row in machine.rows("SELECT id FROM message ORDER BY seq")]


def finals(machine: Machine) -> Counter[str]:
    """How many final replies each message has, by what they say to be about."""
    found = machine.rows("SELECT about.value FROM delivery, json_each(about) about WHERE final")
    return Counter(str(row[0]) for row in found)


# ----- receipts


async def test_receipts_are_in_the_order_of_the_messages(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Accepted, duplicate and refused side by side, each for the message at its place."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "known"))
        batch = [
            msg("a", "known"),
            msg("a", ""),
            msg("b", "new"),
            msg("c", "x\ud800"),
            msg("b", "2"),
        ]
        receipts = await gateway.accept(batch)
        await gateway.wait_idle()
        settled_well(gateway)
    assert statuses(receipts) == [DUPLICATE, REFUSED, ACCEPTED, REFUSED, ACCEPTED]
    assert [receipt.id for receipt in receipts] == [message.id for message in batch]
    assert [receipt.session for receipt in receipts] == [message.key for message in batch]
    assert [receipt.accepted for receipt in receipts] == [True, False, True, False, True]
    assert [bool(receipt.reason) for receipt in receipts] == [False, True, False, True, False]
    assert not any(receipt.retryable for receipt in receipts)
    assert messages_on(machine) == ["known", "new", "2"]


async def test_one_message_has_one_receipt_and_a_batch_a_tuple(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        assert (await gateway.accept(msg("a", "m1"))).status is ACCEPTED
        assert await gateway.accept([]) == ()
        receipts = await gateway.accept(msg("a", f"m{n}") for n in range(3))
        assert statuses(receipts) == [ACCEPTED, DUPLICATE, ACCEPTED]
        await gateway.wait_idle()
        settled_well(gateway)


async def test_p01_p12_a_receipt_is_given_after_the_commit(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Another process sees the message when the receipt is there, and not before the commit."""
    seen: list[tuple[str, list[str]]] = []
    machine.on_commit = lambda moment: seen.append((moment, messages_on(machine)))
    async with machine.boot(Script()) as gateway:
        seen.clear()
        await gateway.accept(msg("a", "m1"))
        assert seen == [("before", []), ("after", ["m1"])]
        assert messages_on(machine) == ["m1"]
        gateway.request_stop(now=True)


async def test_p01_p14_what_cannot_be_written_is_not_accepted_and_can_come_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A full disk: an error, nothing counted, nothing begun; the same message is new afterwards."""
    agent = Script(open=True)

    def fail(moment: str) -> None:
        if moment == "before":
            raise apsw.FullError("full")

    async with machine.boot(agent) as gateway:
        machine.on_commit = fail
        with pytest.raises(StoreFull, match="make room"):
            await gateway.accept(
                [msg("a", "m1"), msg("a", "m2"), msg("b", "m3"), msg("a", "/", "/stop")]
            )
        settled_well(gateway)
        machine.on_commit = None
        assert messages_on(machine) == []
        receipts = await gateway.accept([msg("a", "m1"), msg("a", "m2"), msg("b", "m3")])
        assert statuses(receipts) == [ACCEPTED] * 3
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said("a") == ["re: hi", "re: hi"]


async def test_p01_what_failed_keeps_nobody_from_its_slot(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """One slot, taken for a message whose commit then fails: the others get it."""
    agent = Script(open=True)
    async with machine.boot(agent, settings=Settings(limits=Limits(turns=1))) as gateway:
        for n in range(20):
            failing = n % 2 == 0

            def fail(moment: str, failing: bool = failing) -> None:
                if moment == "before" and failing:
                    machine.on_commit = None
                    raise apsw.FullError("full")

            machine.on_commit = fail
            with pytest.raises(StoreFull) if failing else nullcontext():
                await gateway.accept([msg(f"s{n % 3}", f"m{n}"), msg(f"s{n % 2}", f"n{n}")])
        await gateway.wait_idle()
        assert gateway.statistics() == {
            "turns_running": 0,
            "slots_free": 1,
            "sessions_open": 0,
            "messages_open": 0,
            "undelivered": 0,
        }
    assert len(agent.ended) == 20


# ----- cancellation


async def test_p01_accept_cancelled_before_the_commit_takes_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Cancelled when it is called, or while the hook thinks: nothing stored, counts zero."""

    async def think(message: Message) -> bool:
        await trio.sleep(10)
        return True

    for authorize, patience in [(None, 0.0), (think, 0.0), (think, 15.0)]:
        async with machine.boot(Script(open=True), authorize=authorize) as gateway:
            with trio.move_on_after(patience) as scope:
                await gateway.accept([msg("a", "m1"), msg("b", "m2")])
            assert scope.cancelled_caught
            settled_well(gateway)
    assert messages_on(machine) == []


def full_for(session: str) -> Settings:
    """One message of a session at a time."""
    return attrs.evolve(QUICK, limits=Limits(open_per_session=1))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (["m1"], [ACCEPTED]),
        (["m1", "m1"], [ACCEPTED, DUPLICATE]),
        (["m1", "m2"], [ACCEPTED, REFUSED]),
        (["m1", "", "m1"], [ACCEPTED, REFUSED, DUPLICATE]),
    ],
)
async def test_p01_accept_cancelled_after_the_commit_tells_what_became_of_it(
    machine: Machine, autojump_clock: MockClock, batch: list[str], expected: list[ReceiptStatus]
) -> None:
    """The commit stands, so whoever handed it in is told, whatever else is in the batch."""
    async with machine.boot(Script(open=True), settings=full_for("a")) as gateway:
        receipts: tuple[Receipt, ...] = ()
        with trio.CancelScope() as scope:
            machine.on_commit = lambda moment: scope.cancel() if moment == "after" else None
            receipts = await gateway.accept([msg("a", id) for id in batch])
        machine.on_commit = None
        assert scope.cancel_called
        assert not scope.cancelled_caught
        assert statuses(receipts) == expected
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == ["re: hi"]


async def test_p01_accept_cancelled_in_the_middle_of_its_commit(tmp_path: Path) -> None:
    """The same over the writer's thread, in real time: a commit that has begun is waited for."""
    commit_began, go_on = threading.Event(), threading.Event()
    go_on.set()

    def tap(moment: str) -> None:
        if moment == "before" and not go_on.is_set():
            commit_began.set()
            go_on.wait(PATIENCE)

    async def agent(turn: Turn) -> str:
        return turn.text

    async with open_gateway(agent, store=tmp_path / "gateway.db", tap=tap) as gateway:
        go_on.clear()
        received: list[Receipt] = []

        async def hand_in() -> None:
            received.append(await gateway.accept(msg("a", "m1")))

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hand_in)
                await trio.to_thread.run_sync(commit_began.wait)
                nursery.cancel_scope.cancel()
                go_on.set()
            assert [receipt.status for receipt in received] == [ACCEPTED]
            await gateway.wait_idle()
        settled_well(gateway)


# ----- c32, promise 12: the door stays open


async def test_c32_p12_what_arrives_in_the_drain_is_answered_after_the_boot(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """For a session with an open turn, for an idle one, for one never seen; with the cursor."""
    agent = Script()
    channel = MemoryChannel("chat")
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await channel.receive("idle", "m0", "before")
        agent.release("idle")
        await channel.wait_sent(1)
        await channel.receive("open", "m1", "before")
        await agent.wait_begun(2)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        receipts = await channel.receive_all(
            *(
                channel.message(name, f"{name}-1", "in the drain")
                for name in ("open", "idle", "new")
            ),
            channel.message("open", "m1", "before"),
            cursor="7",
        )
        assert statuses(receipts) == [ACCEPTED] * 3 + [DUPLICATE]
        assert messages_on(machine)[2:] == ["open-1", "idle-1", "new-1"]
    # Whatever began after the stop began in vain: nothing did.
    assert len(machine.log.of(TurnBegun)) == 2
    assert [machine.fate(f"{name}-1") for name in ("open", "idle", "new")] == ["queued"] * 3
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        assert await channel.cursor() == "7"
        settled_well(gateway)
    assert channel.texts("open") == ["re: before", "re: in the drain"]
    assert channel.texts("idle") == ["re: before", "re: in the drain"]
    assert channel.texts("new") == ["re: in the drain"]


async def test_c32_p12_one_that_nobody_can_write_in_the_drain_is_not_acknowledged(
    machine: Machine, autojump_clock: MockClock
) -> None:
    agent = Script()

    def fail(moment: str) -> None:
        raise apsw.FullError("full")

    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        machine.on_commit = fail
        with pytest.raises(StoreFull):
            await gateway.accept(msg("a", "m2"))
        machine.on_commit = None
        assert (await gateway.accept(msg("a", "m2"))).status is ACCEPTED
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
    assert machine.said() == ["re: hi", "re: hi"]


async def at_the_close(
    machine: Machine, channel: MemoryChannel, hand_in: Callable[[], Awaitable[None]]
) -> None:
    """Call `hand_in` while a gateway flushes its last reply: turns are over, the intake is closed,
    and the channel still there."""
    agent = Script()
    handed_in = trio.Event()

    async def slowly(delivery: Delivery) -> None:
        if machine.log.of(DrainReport) and not handed_in.is_set():
            handed_in.set()
            await hand_in()

    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await channel.receive_all(channel.message("a", "m1", "hi"), cursor="1")
        await agent.wait_begun(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)

        async def wait_for_the_report(delivery: Delivery) -> None:
            await machine.log.wait_for(DrainReport)
            await trio.testing.wait_all_tasks_blocked()
            await slowly(delivery)

        channel.before_send = wait_for_the_report
        agent.release()
    assert handed_in.is_set()
    channel.before_send = None


async def test_c32_c34_what_a_closing_gateway_refuses_is_not_covered_by_the_cursor(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """ "Send it again": so the platform has to be asked for it again."""
    channel = MemoryChannel("chat")
    receipts: list[Receipt] = []

    async def hand_in() -> None:
        batch = [channel.message("a", "m1", "hi"), channel.message("b", "m2", "late")]
        receipts.extend(await channel.receive_all(*batch, cursor="3"))

    await at_the_close(machine, channel, hand_in)
    assert [(receipt.status, receipt.retryable) for receipt in receipts] == [
        (DUPLICATE, False),
        (REFUSED, True),
    ]
    assert "send it again" in str(receipts[1].reason)
    async with machine.boot(Script(open=True), channel) as gateway:
        await channel.wait_ready()
        assert await channel.cursor() == "1"
        (again,) = await channel.receive_all(channel.message("b", "m2", "late"), cursor="3")
        assert again.status is ACCEPTED
        await gateway.wait_idle()
    assert channel.texts("b") == ["re: late"]


async def test_c32_p14_a_malformed_message_at_a_closing_gateway_is_malformed(
    machine: Machine, autojump_clock: MockClock
) -> None:
    channel = MemoryChannel("chat")
    receipts: list[Receipt] = []

    async def hand_in() -> None:
        receipts.append(await channel.receive("a", "m\ud800", "late"))

    await at_the_close(machine, channel, hand_in)
    assert [(receipt.status, receipt.retryable) for receipt in receipts] == [(REFUSED, False)]


async def test_c32_after_the_end_a_message_is_refused_for_now(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The gateway has left; whoever still holds it gets an answer, not a riddle."""
    async with machine.boot(Script(open=True)) as gateway:
        await gateway.ask(msg("a", "m1"))
    receipt = await gateway.accept(msg("a", "m2"))
    assert (receipt.status, receipt.retryable) == (REFUSED, True)
    assert "closing" in str(receipt.reason)


# ----- c33, promise 1: sent again is recognised


async def test_c33_p01_twice_in_one_batch_is_one_answer(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The first one counts, also if the second says something else; also far apart in the batch."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        batch = [
            msg("a", "m1", "one"),
            msg("a", "m1", "two"),
            msg("a", "m2"),
            msg("b", "m1", "three"),
        ]
        assert statuses(await gateway.accept(batch)) == [ACCEPTED, DUPLICATE, ACCEPTED, DUPLICATE]
        await gateway.wait_idle()
        settled_well(gateway)
    assert agent.begun == [("a", 1, "one"), ("a", 1, "hi")]
    assert finals(machine) == {"m1": 1, "m2": 1}


@pytest.mark.parametrize("busy", list(Busy))
async def test_c33_p01_sent_again_while_its_turn_runs(
    machine: Machine, autojump_clock: MockClock, busy: Busy
) -> None:
    """It changes nothing, under whichever policy: least of all does it stop its own turn."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(busy=busy)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        assert statuses(await gateway.accept([msg("a", "m1")] * 3)) == [DUPLICATE] * 3
        await trio.sleep(1)
        assert len(gateway.turns()) == 1
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    assert agent.begun == [("a", 1, "hi")]
    assert machine.said() == ["re: hi"]


async def test_c33_p01_channels_do_not_share_their_ids(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What is the same is channel and id together."""
    one, two = MemoryChannel("one"), MemoryChannel("two")
    async with machine.boot(Script(open=True), one, two) as gateway:
        for channel in (one, two):
            await channel.wait_ready()
            assert (await channel.receive("a", "m1", channel.name)).status is ACCEPTED
        assert (await gateway.accept(msg("a", "m1", "local"))).status is ACCEPTED
        await gateway.wait_idle()
    assert (one.texts(), two.texts()) == (["re: one"], ["re: two"])
    assert len(machine.rows("SELECT 1 FROM message WHERE id = 'm1'")) == 3


async def test_c33_p01_handed_in_by_many_at_once(tmp_path: Path) -> None:
    """Over the writer's thread, whose commits gather what comes at once: one is accepted."""
    answers: list[str] = []

    async def agent(turn: Turn) -> str:
        answers.append(turn.message.id)
        return turn.text

    async with open_gateway(agent, store=tmp_path / "gateway.db") as gateway:
        found: Counter[tuple[str, ReceiptStatus]] = Counter()

        async def hand_in(n: int) -> None:
            receipt = await gateway.accept(msg(f"s{n % 2}", f"m{n % 5}"))
            found[receipt.id, receipt.status] += 1

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for n in range(50):
                    nursery.start_soon(hand_in, n)
            await gateway.wait_idle()
        settled_well(gateway)
    assert found == {(f"m{n}", s): c for n in range(5) for s, c in [(ACCEPTED, 1), (DUPLICATE, 9)]}
    assert sorted(answers) == [f"m{n}" for n in range(5)]


async def ended(machine: Machine, end: str) -> None:
    """A life or two after which message m1 has reached that end."""
    agent = Script(open=end == "answered")

    async def fail(turn: Turn) -> str:
        raise ValueError("x")

    async with machine.boot(fail if end == "failed" else agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1"))
        await trio.sleep(1)
        if end == "stopped":
            await gateway.stop_turn(SessionKey("local", "a"))
        if end == "quarantined":
            machine.crash()
            gateway.request_stop(now=True)
    if end == "expired":
        await trio.sleep(7200)
    if end == "quarantined":
        condemn = Settings(resume=ResumeRules(max_crashes=1))
        async with machine.boot(agent, settings=condemn) as gateway:
            await gateway.wait_idle()


@pytest.mark.parametrize("end", ["answered", "failed", "stopped", "quarantined", "expired"])
async def test_c33_p01_sent_again_after_any_end_and_many_boots(
    machine: Machine, autojump_clock: MockClock, end: str
) -> None:
    """Whatever became of it, and whether the process stopped or died: recognised, not run again."""
    await ended(machine, end)
    again = Script(open=True)
    for n in range(4):
        async with machine.boot(again) as gateway:
            assert statuses(await gateway.accept([msg("a", "m1", "again")] * 2)) == [DUPLICATE] * 2
            await gateway.wait_idle()
            settled_well(gateway)
            if n % 2:
                machine.crash()
        assert machine.fate("m1") == end
    assert again.turns == []


async def test_c33_p01_ask_again_returns_what_was_said_before(
    machine: Machine, autojump_clock: MockClock
) -> None:
    agent = Script(open=True, answer="attempt at {text}")
    async with machine.boot(agent) as gateway:
        (first,) = await gateway.ask(msg("a", "m1", "one"))
        machine.crash()
    for _ in range(2):
        async with machine.boot(agent) as gateway:
            assert await gateway.ask(msg("a", "m1", "two")) == (first,)
    assert len(agent.turns) == 1


# ----- c34: the cursor and what it covers


@attrs.define
class Killed:
    """Kills a machine (see `Machine.crash`) at one moment of one of its commits."""

    machine: Machine
    at: tuple[int, str] | None
    commits: int = 0
    dead: trio.Event = attrs.field(factory=trio.Event)

    def __call__(self, moment: str) -> None:
        self.commits += moment == "before"
        if (self.commits, moment) == self.at and not self.dead.is_set():
            self.machine.crash()
            self.dead.set()


async def poll(machine: Machine, killed: Killed, seen: list[str]) -> None:
    """One life of a channel that polls its platform from the cursor on, two updates at a time."""
    channel = MemoryChannel("chat")
    updates = [channel.message("ab"[n % 2], f"m{n}", str(n)) for n in range(5)]
    machine.on_commit = killed
    async with machine.boot(Script(open=True), channel, settings=QUICK) as gateway:
        await channel.wait_ready()
        while not killed.dead.is_set():
            place = int(await channel.cursor() or "0")
            if place == len(updates):
                break
            batch = updates[place : place + 2]
            receipts = await channel.receive_all(*batch, cursor=str(place + len(batch)))
            if not killed.dead.is_set():
                seen += [f"{receipt.id} {receipt.status}" for receipt in receipts]
        if killed.dead.is_set():
            gateway.request_stop(now=True)
        else:
            await gateway.wait_idle()
            settled_well(gateway)
    machine.on_commit = None


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_c34_cursor_and_messages_are_one_transaction(
    machine: Machine, autojump_clock: MockClock, moment: str
) -> None:
    """Killed between any two writes, then booted: no message is skipped, none is answered twice,
    and none is even handed in twice, because the cursor moved in the very same commit."""
    deaths = 0
    for commit in itertools.count(1):
        where = machine.store.parent / f"{moment}{commit}"
        where.mkdir()
        world = Machine(where)
        seen: list[str] = []
        killed = Killed(world, (commit, moment))
        await poll(world, killed, seen)
        deaths += killed.dead.is_set()
        await poll(world, Killed(world, None), seen)
        assert messages_on(world) == [f"m{n}" for n in range(5)]
        assert {world.fate(f"m{n}") for n in range(5)} == {"answered"}
        assert finals(world) == dict.fromkeys([f"m{n}" for n in range(5)], 1)
        assert (world.said("a"), world.said("b")) == (
            ["re: 0", "re: 2", "re: 4"],
            ["re: 1", "re: 3"],
        )
        assert not [receipt for receipt in seen if not receipt.endswith("accepted")]
        check_invariants(world.store, settled=True)
        if not killed.dead.is_set():
            break
    assert deaths >= 8


async def test_c34_a_batch_that_fails_moves_no_cursor(
    machine: Machine, autojump_clock: MockClock
) -> None:
    channel = MemoryChannel("chat")

    def fail(moment: str) -> None:
        raise apsw.IOError("disk")

    async with machine.boot(Script(open=True), channel) as gateway:
        await channel.wait_ready()
        await channel.receive_all(channel.message("a", "m1", "hi"), cursor="1")
        machine.on_commit = lambda moment: fail(moment) if moment == "before" else None
        with pytest.raises(Exception, match="disk"):
            await channel.receive_all(channel.message("a", "m2", "hi"), cursor="2")
        machine.on_commit = None
        assert await channel.cursor() == "1"
        await channel.receive_all(cursor="9")
        assert await channel.cursor() == "9"
        await gateway.wait_idle()


async def test_c34_a_cursor_is_its_channels_own(
    machine: Machine, autojump_clock: MockClock
) -> None:
    one, two = MemoryChannel("one"), MemoryChannel("two")
    async with machine.boot(Script(open=True), one, two) as gateway:
        await one.receive_all(one.message("a", "m1", "hi"), cursor="from one")
        assert await two.cursor() is None
        await gateway.accept([], cursor=Cursor(channel="two", value="from the host"))
        assert (await one.cursor(), await two.cursor()) == ("from one", "from the host")


async def test_c34_p14_a_cursor_that_is_no_text_is_refused_before_anything_is_written(
    machine: Machine, autojump_clock: MockClock
) -> None:
    bad: Any
    async with machine.boot(Script(open=True)) as gateway:
        for bad in ("x\ud800", 7, None):
            with pytest.raises(InvalidInput, match="cursor"):
                await gateway.accept([msg("a", "m1")], cursor=Cursor(channel="chat", value=bad))
        settled_well(gateway)
        assert messages_on(machine) == []


# ----- c35: a full inbox


async def test_c35_a_full_session_refuses_and_keeps_what_it_has(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """With a reason for the sender; what was accepted is untouched, other sessions notice nothing,
    what is sent again is recognised; also after a boot."""
    agent = Script()
    settings = attrs.evolve(QUICK, limits=Limits(open_per_session=3))
    channel = MemoryChannel("chat")
    for _ in range(2):
        async with machine.boot(agent, channel, settings=settings) as gateway:
            await channel.wait_ready()
            batch = [channel.message("a", f"m{n}", str(n)) for n in range(5)]
            receipts = await channel.receive_all(*batch)
            assert [receipt.accepted for receipt in receipts] == [True] * 3 + [False] * 2
            refused = receipts[-1]
            assert refused.retryable
            assert refused.reason == "this session already has 3 messages waiting; try again later"
            assert (await channel.receive("b", "other", "hi")).accepted
            assert gateway.statistics()["messages_open"] == 4
            assert [machine.fate(f"m{n}") for n in (1, 2)] == ["queued"] * 2
    assert len(machine.log.of(MessageRefused)) == 4
    agent.release()
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.wait_idle()
        assert (await channel.receive("a", "m4", "4")).status is ACCEPTED
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts("a") == ["re: 0", "re: 1", "re: 2", "re: 4"]


async def test_c35_a_full_inbox_counts_everybody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Also messages that wait for a channel which this gateway does not have."""
    agent = Script()
    settings = attrs.evolve(QUICK, limits=Limits(open_messages=3))
    channel = MemoryChannel("chat")
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await channel.receive("a", "m1", "hi")
        await channel.receive("a", "m2", "hi")
        receipts = await gateway.accept([msg("b", "m3"), msg("c", "m4"), msg("b", "m3")])
        assert statuses(receipts) == [ACCEPTED, REFUSED, DUPLICATE]
        assert receipts[1].reason == "the inbox is full; try again later"
    agent.release()
    async with machine.boot(agent, settings=settings) as gateway:
        await trio.sleep(1)
        assert machine.fate("m3") == "answered"
        assert statuses(await gateway.accept([msg("d", "m5"), msg("d", "m6")])) == [
            ACCEPTED,
            REFUSED,
        ]
        await gateway.wait_idle()
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts() == ["re: hi"] * 2


async def test_c35_room_comes_back_whatever_a_message_comes_to(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Answered, failed, stopped or replaced, refused, a duplicate: the count is right each time,
    or the inbox would be full one day with nothing in it."""
    dice = random.Random(3)

    async def agent(turn: Turn) -> str:
        if turn.text == "fail":
            raise ValueError("x")
        await trio.sleep(dice.random() * 3)
        return turn.text

    limits = Limits(turns=3, open_per_session=3, open_messages=6)
    everything: set[ReceiptStatus] = set()
    for busy in Busy:
        where = machine.store.parent / busy
        where.mkdir()
        world = Machine(where)
        found: Counter[ReceiptStatus] = Counter()
        async with world.boot(agent, settings=Settings(limits=limits, busy=busy)) as gateway:
            for n in range(150):
                text = dice.choice(["go", "go", "go", "fail", "/stop", "/retry", "/new"])
                receipts = await gateway.accept(
                    [
                        msg(f"s{dice.randrange(4)}", f"m{dice.randrange(4 * n + 1)}", text)
                        for _ in "abc"
                    ]
                )
                found.update(statuses(receipts))
                await trio.sleep(dice.random())
            await gateway.wait_idle()
            assert gateway.statistics()["slots_free"] == 3
            assert gateway.statistics()["messages_open"] == 0
            assert gateway.statistics()["sessions_open"] == 0
            many = [msg("fresh", f"f{n}") for n in range(5)]
            assert statuses(await gateway.accept(many))[0] is ACCEPTED
            await gateway.wait_idle()
        everything |= set(found)
        check_invariants(world.store, settled=True)
    assert everything == set(ReceiptStatus)


# ----- c36, promise 2: order


@attrs.define
class Phone:
    """What people see on their screens: no crash takes it back."""

    dice: random.Random
    shown: dict[str, list[str]] = attrs.field(factory=dict[str, list[str]])
    keys: set[str] = attrs.field(factory=set[str])

    def channel(self, dead: trio.Event) -> MemoryChannel:
        """A channel to it that fails more often than not, and sends nothing once it is dead."""

        async def send(delivery: Delivery) -> None:
            if dead.is_set():
                await trio.sleep_forever()
            if self.dice.random() < 0.6:
                raise OSError("try again")
            if delivery.key not in self.keys:
                self.keys.add(delivery.key)
                self.shown.setdefault(delivery.session.name, []).append(delivery.text)

        channel = MemoryChannel("chat")
        channel.before_send = send
        return channel


async def hand_in_until_acknowledged(channel: MemoryChannel, message: Message) -> None:
    while True:
        try:
            await channel.receive_all(message)
        except StoreFull:
            await trio.sleep(0.1)
        else:
            return


async def test_c36_p02_order_survives_crashes_restarts_and_retries(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Ten lives that end as they happen to, a disk that fails now and then, a platform that takes a
    text only at the third try, and messages that are sent until they are acknowledged: each session
    sees its answers in the order of acceptance, once each."""
    dice = random.Random(11)
    phone = Phone(dice)
    messages = iter(range(240))

    async def agent(turn: Turn) -> str:
        await trio.sleep(dice.random() * 4)
        return turn.text

    def disk(moment: str) -> None:
        if moment == "before" and dice.random() < 0.1:
            raise apsw.FullError("full")

    for life in range(10):
        dead = trio.Event()
        channel = phone.channel(dead)
        settings = Settings(
            limits=Limits(turns=3),
            grace=dice.random() * 3,
            budget=10.0,
            delivery=DeliveryRules(max_tries=1000, max_delay=5.0),
            resume=ResumeRules(max_crashes=100, max_interruptions=100),
        )
        async with machine.boot(agent, channel, settings=settings) as gateway:
            machine.on_commit = disk
            await channel.wait_ready()
            for n in itertools.islice(messages, 24):
                message = channel.message(f"s{n % 6}", f"m{n}", str(n))
                await hand_in_until_acknowledged(channel, message)
                await trio.sleep(dice.random() / 4)
            await trio.sleep(dice.random() * 5)
            if life == 9:
                await gateway.wait_idle()
                settled_well_with(gateway, slots=3)
            machine.on_commit = None
            if life % 2:
                dead.set()
                machine.crash()
                gateway.request_stop(now=True)
    for session in range(6):
        assert phone.shown[f"s{session}"] == [str(n) for n in range(session, 240, 6)]
    assert machine.log.of(StoreTrouble)
    check_invariants(machine.store, settled=True)


def settled_well_with(gateway: Gateway, *, slots: int) -> None:
    """All counts are zero again, and all slots free."""
    statistics = gateway.statistics()
    assert statistics.pop("slots_free") == slots
    assert set(statistics.values()) == {0}


async def test_c36_p02_a_batch_of_one_session_is_answered_in_its_order(
    machine: Machine, autojump_clock: MockClock
) -> None:
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        await gateway.accept([msg("a", f"m{n}", str(n)) for n in range(50)])
        await gateway.accept([msg("a", f"n{n}", str(n)) for n in range(50, 90)])
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said("a") == [f"re: {n}" for n in range(90)]


# ----- c37: keys

ODD_KEYS = [
    "a", "a:b", ":", "::", "a:", ":a", "chat:a", "local:a", "/", "//", "../..", "../../etc/passwd",
    ".", "..", "a/b", "a\\b", "C:\\x", " ", "  ", " a", "a ", "a\t", "a\n", "\n", "a\r", "\0",
    "a\0", "a\0b", "A", "\u00e4", "a\u0308", "\u212b", "\u00e5", "\U0001f600",
    "\U0001f469\u200d\U0001f469", "\u200b", "\ufeff", "a\ufeff", "\u202ea", "%", "_", "a%", "*",
    "'", '"', "';DROP TABLE message;--", "?", "-1", "0", "NULL", "null", "None", "~", "$HOME",
    "gateway.db", "x" * 1000, "x" * 999 + "y", "\U0001f600" * 1000, "\U0010ffff",
]  # fmt: skip


async def files(folder: Path) -> list[trio.Path]:
    return list(await trio.Path(folder).iterdir())


async def serve_keys(where: Path, keys: list[str]) -> None:
    """Two boots of sessions with these names, whose messages have these names too: each session
    finds its own past, and nothing but it; nothing is written but the store."""
    machine = Machine(where)

    async def agent(turn: Turn) -> str:
        past = [line.text for line in await turn.history()]
        return f"{len(past)} {turn.session.name == turn.text} {past[:1] in ([], [turn.text])}"

    for boot in range(2):
        # A session may be called "/stop" as well; its message is to be one for the agent.
        async with machine.boot(agent, settings=Settings(commands=False)) as gateway:
            batch = [msg(name, f"{name}{boot}", name, sender=name) for name in keys]
            assert statuses(await gateway.accept(batch)) == [ACCEPTED] * len(keys)
            assert statuses(await gateway.accept(batch)) == [DUPLICATE] * len(keys)
            await gateway.wait_idle()
            settled_well(gateway)
            for name in keys:
                assert not await gateway.stop_turn(SessionKey("local", name))
    with closing(read_store(machine.store)) as reader:
        for name in keys:
            assert machine.said(name) == ["0 True True", "2 True True"]
            assert reader.find_session(f"local:{name}") == SessionKey("local", name)
            rows = reader.messages(SessionKey("local", name), 9)
            assert [row.id for row in rows] == [f"{name}0", f"{name}1"]
            assert {row.sender for row in rows} == {name}
    assert len(machine.rows("SELECT 1 FROM session")) == len(keys)
    assert all(path.name.startswith("gateway.db") for path in await files(where))


async def test_c37_odd_keys_never_meet(machine: Machine, autojump_clock: MockClock) -> None:
    await serve_keys(machine.store.parent, ODD_KEYS)


KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=1023)
ALIKE = st.text("a:/. \0\u0301A", min_size=1, max_size=4)


@given(keys=st.lists(KEYS | ALIKE | st.sampled_from(ODD_KEYS), min_size=2, max_size=8, unique=True))
@settings(max_examples=30, deadline=None)
def test_c37_no_two_keys_ever_meet(keys: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        trio.run(serve_keys, Path(folder), keys, clock=MockClock(autojump_threshold=0))


async def test_c37_a_key_that_is_too_long_is_refused(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        receipts = await gateway.accept([msg("x" * 1024, "m1"), msg("x" * 1025, "m2")])
        assert statuses(receipts) == [ACCEPTED, REFUSED]
        assert receipts[1].reason == "session: 1025 characters, at most 1024 are taken"
        await gateway.wait_idle()


async def test_c37_the_same_name_on_two_channels_is_two_sessions(
    machine: Machine, autojump_clock: MockClock
) -> None:
    channel = MemoryChannel("chat")
    agent = Script()
    async with machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "there")
        await gateway.accept(msg("a", "m2", "here"))
        await agent.wait_begun(2)
        assert await gateway.stop_turn(SessionKey("local", "a"))
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts() == ["re: there"]
    assert [machine.fate(m) for m in ("m1", "m2")] == ["answered", "stopped"]


# ----- c38: texts

ODD_TEXTS = [
    "", " ", "\0", "a\0b", "\0" * 100, "\ufeff", "\ufffe", "\uffff", "\U0010ffff", "\u2028",
    "\x1b[2J", "\r\n", "a\u0308", "\U0001f600", '"', "\\", "\\u0000", '{"text": 1}', "</script>",
    "\x7f\x80\x9f", "\ud7ff\ue000",
]  # fmt: skip


async def test_c38_odd_texts_are_returned_intact(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """To the agent, to its platform, and to whoever asks for the past; after a boot, too."""
    gate = Script()
    channel = MemoryChannel("chat")

    async def agent(turn: Turn) -> str:
        return f"{turn.text}|"

    async with machine.boot(gate, channel, settings=attrs.evolve(QUICK, limits=Limits(turns=1))):
        batch = [channel.message(f"s{n}", f"m{n}", text) for n, text in enumerate(ODD_TEXTS)]
        assert statuses(await channel.receive_all(*batch)) == [ACCEPTED] * len(ODD_TEXTS)
        await gate.wait_begun(1)
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        for n, text in enumerate(ODD_TEXTS):
            assert channel.texts(f"s{n}") == [f"{text}|"]
            past = await gateway.history(SessionKey("chat", f"s{n}"))
            assert [line.text for line in past] == [text, f"{text}|"]
    check_invariants(machine.store, settled=True)


@pytest.mark.parametrize("field", ["session", "id", "sender", "text"])
async def test_c38_p14_what_is_not_unicode_is_refused_alone(
    machine: Machine, autojump_clock: MockClock, field: str
) -> None:
    """Among good messages of the same batch; the store stays whole."""
    bad = attrs.evolve(msg("a", "bad"), **{field: "x\ud800y"})
    async with machine.boot(Script(open=True)) as gateway:
        receipts = await gateway.accept([msg("a", "m1"), bad, msg("a", "m2")])
        assert statuses(receipts) == [ACCEPTED, REFUSED, ACCEPTED]
        expected = f"{field}: not Unicode text (a lone surrogate at character 1)"
        assert receipts[1].reason == expected
        await gateway.wait_idle()
        settled_well(gateway)
    assert [event.reason for event in machine.log.of(MessageRefused)] == [expected]
    assert messages_on(machine) == ["m1", "m2"]
    check_invariants(machine.store, settled=True)


TEN_MEGABYTES = 10 * 1024 * 1024


async def test_c38_ten_megabytes_are_refused_by_default(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async with machine.boot(Script(open=True)) as gateway:
        receipts = await gateway.accept([msg("a", "m1", "x" * TEN_MEGABYTES), msg("a", "m2")])
        assert statuses(receipts) == [REFUSED, ACCEPTED]
        assert receipts[0].reason == "text: 10485760 bytes, at most 1048576 are taken"
        assert not receipts[0].retryable
        await gateway.wait_idle()
        settled_well(gateway)


async def test_c38_ten_megabytes_are_returned_intact_where_they_are_taken(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Kept over a boot, answered in full, in one piece and in parts."""
    line = "a line \U0001f600\0\n"
    text = line * (TEN_MEGABYTES // len(line.encode()))
    settings = attrs.evolve(QUICK, limits=Limits(message_bytes=TEN_MEGABYTES))
    gate = Script()
    async with machine.boot(gate, settings=settings) as gateway:
        assert (await gateway.accept(msg("a", "m1", text))).status is ACCEPTED
        await gate.wait_begun(1)
    gate.release()
    channel = MemoryChannel("chat", text_limit=4_000_000)
    async with machine.boot(gate, channel, settings=settings) as gateway:
        (reply,) = await gateway.ask(msg("a", "m1", text))
        assert reply.text == f"re: {text}"
        await channel.receive("a", "m2", text)
        await gateway.wait_idle()
        settled_well(gateway)
    assert len(channel.sent) == 3
    assert "".join(channel.texts()) == f"re: {text}"


# ----- who may talk


async def test_authorize_is_asked_for_every_message_that_is_whole(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """In order; a refused one is told so, is not stored, and keeps nobody else from being heard."""
    asked: list[str] = []
    agent = Script(open=True)

    async def authorize(message: Message) -> bool:
        asked.append(message.id)
        await trio.sleep(1)
        return message.sender == "ada"

    async with machine.boot(agent, authorize=authorize) as gateway:
        receipts = await gateway.accept(
            [
                msg("a", "m1", sender="ada"),
                msg("a", "m2", sender="eve"),
                msg("a", "", sender="ada"),
                msg("a", "m3"),
                msg("a", "m4", sender="ada"),
            ]
        )
        await gateway.wait_idle()
        settled_well(gateway)
    assert asked == ["m1", "m2", "m3", "m4"]
    assert statuses(receipts) == [ACCEPTED, REFUSED, REFUSED, REFUSED, ACCEPTED]
    assert (receipts[1].reason, receipts[1].retryable) == ("not allowed", False)
    assert messages_on(machine) == ["m1", "m4"]
    assert machine.said() == ["re: hi", "re: hi"]


async def test_authorize_guards_commands_too(machine: Machine, autojump_clock: MockClock) -> None:
    """A stranger's /stop stops nobody."""

    async def authorize(message: Message) -> bool:
        return message.sender == "ada"

    agent = Script()
    async with machine.boot(agent, authorize=authorize) as gateway:
        await gateway.accept(msg("a", "m1", sender="ada"))
        assert (await gateway.accept(msg("a", "c1", "/stop", sender="eve"))).status is REFUSED
        assert len(gateway.turns()) == 1
        assert (await gateway.accept(msg("a", "c2", "/stop", sender="ada"))).status is ACCEPTED
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.fate("m1") == "stopped"


async def test_authorize_that_fails_means_no_and_is_seen(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The sender learns nothing of the failure; whoever reads the log does, or a hook with a typo
    would lock everybody out without a trace."""

    async def authorize(message: Message) -> bool:
        if message.sender == "eve":
            raise ConnectionError("the directory is down")
        return True

    async with machine.boot(Script(open=True), authorize=authorize) as gateway:
        receipts = await gateway.accept([msg("a", "m1", sender="eve"), msg("a", "m2")])
        await gateway.wait_idle()
        settled_well(gateway)
    assert statuses(receipts) == [REFUSED, ACCEPTED]
    assert receipts[0].reason == "not allowed"
    (refused,) = machine.log.of(MessageRefused)
    assert "the directory is down" in refused.reason


async def test_authorize_that_takes_long_keeps_nobody_waiting(
    machine: Machine, autojump_clock: MockClock
) -> None:
    async def authorize(message: Message) -> bool:
        if message.sender == "slow":
            await trio.sleep(60)
        return True

    agent = Script(open=True)
    async with (
        machine.boot(agent, authorize=authorize) as gateway,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(gateway.accept, msg("a", "m1", "slow", sender="slow"))
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await gateway.ask(msg("a", "m2", "quick"))
        assert trio.current_time() == began
    assert agent.begun[0] == ("a", 1, "quick")


async def test_p12_the_hook_still_thinks_when_the_stop_comes(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What it lets in afterwards is accepted, begins nothing, and is answered after the boot."""

    async def authorize(message: Message) -> bool:
        await trio.sleep(0.5)
        return True

    agent = Script()
    async with (
        machine.boot(agent, authorize=authorize, settings=QUICK) as gateway,
        trio.open_nursery() as nursery,
    ):
        await gateway.accept(msg("a", "m1"))
        nursery.start_soon(gateway.accept, msg("b", "m2"))
        await trio.sleep(0.25)
        gateway.request_stop()
    assert machine.fate("m2") == "queued"
    assert agent.begun == [("a", 1, "hi")]
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.fate("m2") == "answered"
    assert [event.message_id for event in machine.log.of(MessageAccepted)] == ["m1", "m2"]
