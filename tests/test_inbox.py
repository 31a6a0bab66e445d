"""The inbox: kept, recognised, refused with a reason, never skipped (c32 to c38)."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest
import trio
from helpers import PATIENCE, Log, Machine, Script, msg, settled_well
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from trio_gateway import (
    Channel,
    ConfigError,
    Cursor,
    Delivery,
    Intake,
    Limits,
    Message,
    Receipt,
    ReceiptStatus,
    Refused,
    SessionKey,
    Settings,
    StoreFull,
    Turn,
    open_gateway,
)
from trio_gateway._events import (
    InputRefused,
    MessageAccepted,
    MessageRefused,
    TurnBegun,
)
from trio_gateway.testing import MemoryChannel

QUICK = Settings(grace=2.0, budget=10.0)


def statuses(receipts: tuple[Receipt, ...]) -> list[str]:
    """What became of each, in one word."""
    return [str(receipt.status) for receipt in receipts]


# ----- accepted is kept


async def test_p01_accepted_means_on_disk(machine: Machine, autojump_clock: MockClock) -> None:
    """When `accept` returns, another process reads the message; killed at that instant, it is
    answered after the boot."""
    agent = Script()
    async with machine.boot(agent, settings=QUICK) as gateway:
        for n in range(5):
            receipt = await gateway.accept(msg("a", f"m{n}", str(n)))
            assert receipt.accepted
            assert machine.fate(f"m{n}") in ("running", "queued")
        machine.crash()
        gateway.request_stop(now=True)
    agent.release()
    async with machine.boot(agent) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.said() == [f"re: {n}" for n in range(5)]


async def test_p01_what_could_not_be_written_was_not_accepted(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A full disk: a clear error, nothing stored, nothing counted, no slot taken; the same message
    is accepted when there is room."""
    agent = Script(open=True)

    def fail(moment: str) -> None:
        raise apsw.FullError("full")

    async with machine.boot(agent) as gateway:
        machine.on_commit = fail
        for _ in range(3):
            with pytest.raises(StoreFull, match="make room"):
                await gateway.accept([msg("a", "m1"), msg("b", "m2")])
        settled_well(gateway)
        machine.on_commit = None
        assert machine.rows("SELECT count(*) FROM message") == [(0,)]
        await gateway.ask(msg("a", "m1"))


async def test_p01_a_commit_that_reports_an_error_and_stands_is_accepted(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """SQLite says that it stands, whatever COMMIT returned: accepted, and the turn runs."""
    agent = Script(open=True)

    def fail(moment: str) -> None:
        if moment == "after":
            machine.on_commit = None
            raise apsw.IOError("perhaps")

    async with machine.boot(agent) as gateway:
        machine.on_commit = fail
        await gateway.ask(msg("a", "m1"))
        assert (await gateway.accept(msg("a", "m1"))).status is ReceiptStatus.DUPLICATE
        settled_well(gateway)
    assert machine.fate("m1") == "answered"
    assert machine.said() == ["re: hi"]


# ----- while it drains


async def test_c32_what_arrives_during_the_drain_is_answered_after_the_boot(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Accepted over a channel and by the host, for busy and idle sessions, as long as it drains;
    none of it begins, all of it is answered, in order."""
    agent = Script()
    channel = MemoryChannel()
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await channel.receive("busy", "m0", "0")
        await agent.wait_begun(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        await trio.sleep(1)
        for n, session in enumerate(("busy", "idle", "busy", "idle"), 1):
            receipt = await channel.receive(session, f"m{n}", str(n))
            assert receipt.status is ReceiptStatus.ACCEPTED
        assert (await gateway.accept(msg("local", "m5"))).accepted
    assert len(agent.turns) == 1
    assert [machine.fate(f"m{n}") for n in range(1, 6)] == ["queued"] * 5
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts("busy") == ["re: 0", "re: 1", "re: 3"]
    assert channel.texts("idle") == ["re: 2", "re: 4"]
    assert machine.fate("m5") == "answered"


async def test_c32_after_the_drain_it_is_refused_for_a_moment(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """While the last replies leave, the inbox is closed: refused, retryable, nothing stored."""
    agent = Script()
    channel = MemoryChannel()

    async def slow(delivery: Delivery) -> None:
        await trio.sleep(1.5)

    channel.before_send = slow
    receipts: list[Receipt] = []
    async with trio.open_nursery() as nursery, machine.boot(agent, channel) as gateway:
        await channel.receive("a", "m1", "hi")
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        agent.release()

        async def late() -> None:
            await trio.sleep(1)
            receipts.append(await channel.receive("b", "m2", "hi"))

        nursery.start_soon(late)
    (receipt,) = receipts
    assert (receipt.status, receipt.retryable) == (ReceiptStatus.REFUSED, True)
    assert "closing" in (receipt.reason or "")
    assert machine.rows("SELECT id FROM message") == [("m1",)]
    assert channel.texts() == ["re: hi"]


# ----- recognised


async def test_c33_the_same_id_twice(machine: Machine, autojump_clock: MockClock) -> None:
    """In one batch, again while it runs, after its answer, over boots and kills: one answer, and
    the receipt says so; also with another text, also for another session of the channel."""
    agent = Script()
    channel = MemoryChannel()
    async with machine.boot(agent, channel, settings=QUICK) as gateway:
        await channel.wait_ready()
        first = channel.message("a", "m1", "hi")
        receipts = await channel.receive_all(first, channel.message("b", "m2", "hi"), first, first)
        assert statuses(receipts) == ["accepted", "accepted", "duplicate", "duplicate"]
        assert all(receipt.accepted for receipt in receipts)
        assert (await channel.receive("a", "m1", "hi")).status is ReceiptStatus.DUPLICATE
        assert (await channel.receive("a", "m1", "edited")).status is ReceiptStatus.DUPLICATE
        assert (await channel.receive("c", "m1", "moved")).status is ReceiptStatus.DUPLICATE
        machine.crash()
        gateway.request_stop(now=True)
    for n in range(3):
        async with machine.boot(agent, channel, settings=QUICK) as gateway:
            assert (await channel.receive("a", "m1", "hi")).status is ReceiptStatus.DUPLICATE
            if n == 1:
                agent.release()
                await gateway.wait_idle()
                settled_well(gateway)
            machine.crash()
            gateway.request_stop(now=True)
    assert channel.texts("a") == ["re: hi"]
    assert channel.texts("c") == []
    assert {event.duplicate for event in machine.log.of(MessageAccepted)} == {True, False}


async def test_c33_duplicates_that_race(tmp_path: Path) -> None:
    """Fifty tasks hand in the same message at once, over the store's thread: one turn, and all but
    one are told that it is a duplicate."""
    agent = Script(open=True)
    log = Log()
    got: list[Receipt] = []

    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=tmp_path / "gateway.db", listen=log) as gateway:

            async def hand_in() -> None:
                got.append(await gateway.accept(msg("a", "m1")))

            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(hand_in)
            await gateway.wait_idle()
            settled_well(gateway)
    assert statuses(tuple(got)).count("accepted") == 1
    assert len(log.of(TurnBegun)) == 1


async def test_c33_ask_again_is_answered_from_the_store(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """`ask` for a message that was answered before returns the same replies, also after a boot."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        first = await gateway.ask(msg("a", "m1"))
        assert await gateway.ask(msg("a", "m1")) == first
    async with machine.boot(agent) as gateway:
        assert await gateway.ask(msg("a", "m1")) == first
    assert len(agent.turns) == 1


# ----- the cursor


class Polling(Channel):
    """Polls a platform that gives out what is behind the cursor, and forgets nothing."""

    name = "poll"
    idempotent = True

    def __init__(self, updates: list[tuple[str, str]], batch: int) -> None:
        self.updates = updates
        self.batch = batch
        self.sent: list[Delivery] = []
        self.handed_in: list[str] = []

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        while True:
            at = int(await intake.cursor() or 0)
            batch = self.updates[at : at + self.batch]
            if not batch:
                return
            messages = [
                Message(session=session, id=id, text=id, channel=self.name) for session, id in batch
            ]
            self.handed_in += [id for _, id in batch]
            await intake.accept(*messages, cursor=str(at + len(batch)))

    async def send(self, delivery: Delivery) -> None:
        self.sent.append(delivery)


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_c34_killed_between_any_two_writes(
    machine: Machine, autojump_clock: MockClock, moment: str
) -> None:
    """The cursor and its messages are one transaction: whichever commit it dies at, no message is
    skipped, none is answered twice, and none is even handed in after it was kept."""
    updates = [("ab"[n % 2], f"m{n}") for n in range(8)]
    for point in range(1, 40):
        store = machine.store.with_name(f"{moment}{point}.db")
        one = Machine(store.parent)
        one.store, one.clock = store, machine.clock
        count = 0

        def die(at: str, one: Machine = one, point: int = point) -> None:
            nonlocal count
            count += at == moment
            if count == point and at == moment:
                one.crash()
                one.on_commit = lambda _: None

        agent = Script(open=True)
        channel = Polling(updates, 3)
        one.on_commit = die
        async with one.boot(agent, channel, settings=QUICK) as gateway:
            await gateway.wait_input_ended()
            await gateway.wait_idle()
        if one.store == store:
            break
        kept = {id for (id,) in one.rows("SELECT id FROM message")} if point > 1 else set[str]()
        again = Polling(updates, 3)
        async with one.boot(Script(open=True), again) as gateway:
            await gateway.wait_input_ended()
            await gateway.wait_idle()
            settled_well(gateway)
        assert one.rows("SELECT id, state FROM message ORDER BY seq") == [
            (id, "answered") for _, id in updates
        ]
        assert not kept & set(again.handed_in)
        for session in "ab":
            texts = one.said(session)
            assert texts == [f"re: {id}" for s, id in updates if s == session]
    else:
        pytest.fail("there was no end of commits")
    assert point > 15


async def test_c34_the_cursor_moves_although_all_are_refused_or_known(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """An empty batch, a batch of duplicates, a batch of refusals: the place is kept."""
    agent = Script(open=True)
    channel = MemoryChannel()
    async with machine.boot(agent, channel) as gateway:
        await channel.wait_ready()
        assert await channel.cursor() is None
        await channel.receive_all(channel.message("a", "m1", "hi"), cursor="1")
        await channel.receive_all(channel.message("a", "m1", "hi"), cursor="2")
        assert await channel.cursor() == "2"
        refused = await channel.receive_all(channel.message("a", "", "hi"), cursor="3")
        assert statuses(refused) == ["refused"]
        assert await channel.cursor() == "3"
        assert await channel.receive_all(cursor="4") == ()
        await gateway.accept([], cursor=Cursor(channel="other", value="9"))
    async with machine.boot(agent, channel):
        assert await channel.cursor() == "4"


async def test_c34_a_full_inbox_does_not_move_the_cursor_past_what_it_refused(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """What is refused for lack of room must come again: the receipts say so, and who hands in a
    cursor with such messages is told that the cursor did not move."""
    agent = Script()
    channel = MemoryChannel()
    limits = Limits(open_per_session=1)
    async with machine.boot(agent, channel, settings=Settings(limits=limits)) as gateway:
        await channel.wait_ready()
        receipts = await channel.receive_all(
            channel.message("a", "m1", "hi"), channel.message("a", "m2", "hi"), cursor="2"
        )
        assert statuses(receipts) == ["accepted", "refused"]
        assert receipts[1].retryable
        agent.release()
        await gateway.wait_idle()


# ----- refused


async def test_c35_a_full_session_refuses_with_a_reason(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """For the sender to read; what was accepted is untouched; room comes back."""
    agent = Script()
    limits = Limits(open_per_session=3)
    async with machine.boot(agent, settings=Settings(limits=limits)) as gateway:
        receipts = await gateway.accept([msg("a", f"m{n}") for n in range(5)])
        assert statuses(receipts) == ["accepted"] * 3 + ["refused"] * 2
        assert receipts[3].reason == "this session already has 3 messages waiting; try again later"
        assert receipts[3].retryable
        assert (await gateway.accept(msg("b", "b1"))).accepted
        again = await gateway.accept(msg("a", "m0"))
        assert again.status is ReceiptStatus.DUPLICATE
        with pytest.raises(Refused, match="'m3' was refused: this session already has 3"):
            await gateway.ask(msg("a", "m3"))
        agent.release()
        await gateway.wait_idle()
        assert (await gateway.accept(msg("a", "m3"))).accepted
        await gateway.wait_idle()
        settled_well(gateway)
    assert [machine.fate(f"m{n}") for n in range(4)] == ["answered"] * 4
    assert len(machine.log.of(MessageRefused)) == 3


async def test_c35_a_full_inbox_refuses_everybody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Over all sessions and boots, also what waits for channels that are not there."""
    agent = Script()
    settings = Settings(grace=1.0, limits=Limits(open_messages=4))
    channel = MemoryChannel()
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await channel.receive("a", "m1", "hi")
        await channel.receive("a", "m2", "hi")
        await gateway.accept(msg("b", "m3"))
        await gateway.accept(msg("b", "m4"))
        refused = await channel.receive("c", "m5", "hi")
        assert refused.reason == "the inbox is full; try again later"
        assert refused.retryable
    async with machine.boot(agent, settings=settings) as gateway:
        assert not (await gateway.accept(msg("d", "m6"))).accepted
        agent.release("b")
        with trio.fail_after(60):
            await gateway.wait_idle()
        assert (await gateway.accept(msg("d", "m6"))).accepted
        agent.release()
        await gateway.wait_idle()
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.wait_idle()
        assert (await channel.receive("c", "m5", "hi")).accepted
        await gateway.wait_idle()
        settled_well(gateway)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (msg("", "m1"), "session: must not be empty"),
        (msg("a", ""), "id: must not be empty"),
        (msg("a" * 1025, "m1"), "session: 1025 characters, at most 1024 are taken"),
        (msg("a", "m" * 1025), "id: 1025 characters, at most 1024 are taken"),
        (msg("a", "m1", "x" * 1_048_577), "text: 1048577 bytes, at most 1048576 are taken"),
        (msg("a", "m1", "ü" * 524_289), "text: 1048578 bytes, at most 1048576 are taken"),
        (msg("a", "m1", "x\ud800y"), "text: not Unicode text (a lone surrogate at character 1)"),
        (msg("\udfff", "m1"), "session: not Unicode text (a lone surrogate at character 0)"),
        (msg("a", "m1", sender=""), "sender: must not be empty"),
        (msg("a", "m1", channel="Not A Name"), "channel 'Not A Name': expected small letters"),
        (msg("a", "m1", text=None), "text: expected a string, got NoneType"),  # type: ignore[arg-type]
        (msg(5, "m1"), "session: expected a string, got int"),  # type: ignore[arg-type]
        (msg("a", b"m1"), "id: expected a string, got bytes"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_p14_c38_a_malformed_message_is_refused_and_the_rest_is_not(
    machine: Machine, autojump_clock: MockClock, message: Message, reason: str
) -> None:
    """With what is wrong and where; not retryable; the others of its batch are accepted."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        batch = [msg("good", "g1"), message, msg("good", "g2")]
        receipts = await gateway.accept(batch)
        await gateway.wait_idle()
        settled_well(gateway)
    assert statuses(receipts) == ["accepted", "refused", "accepted"]
    assert (receipts[1].reason or "").startswith(reason)
    assert not receipts[1].retryable
    assert machine.rows("SELECT count(*) FROM message") == [(2,)]


async def test_p14_a_channel_hands_in_only_its_own(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A message of another channel: an error that names both; nothing is stored."""
    channel = MemoryChannel("one")
    async with machine.boot(Script(open=True), channel):
        await channel.wait_ready()
        with pytest.raises(ConfigError, match="'one' handed in a message of channel 'two'"):
            await channel.receive_all(msg("a", "m1", channel="two"))
    assert machine.rows("SELECT count(*) FROM message") == [(0,)]


async def test_p14_input_that_a_channel_cannot_read_is_told(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It goes to the events, from where logs are made."""

    class Noisy(MemoryChannel):
        async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
            intake.refused_input("line 3", "not JSON")
            await super().serve(intake, task_status=task_status)

    async with machine.boot(Script(), Noisy("noisy")):
        (event,) = await machine.log.wait_for(InputRefused)
    assert (event.channel, event.where, event.error) == ("noisy", "line 3", "not JSON")


async def test_a_cancelled_accept_is_all_or_nothing(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Cancelled at every step: accepted and answered, or not there; no count is wrong."""
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        for steps in range(8):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(gateway.accept, msg("a", f"m{steps}"))
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
        await gateway.wait_idle()
        settled_well(gateway)
    states = dict(machine.rows("SELECT id, state FROM message"))
    assert set(states.values()) <= {"answered"}
    assert 0 < len(states) < 8


# ----- odd keys and texts

ODD_KEYS = [
    "a:b",
    "a",
    "a/b",
    "../../etc/passwd",
    "..",
    ".",
    "a b",
    " a",
    "a ",
    "A",
    "😀",
    "e\u0301",
    "\u00e9",
    "x" * 1000,
    "x" * 1001,
    "a\0b",
    "a\0",
    "\0",
    "'; DROP TABLE message; --",
    "%s",
    "\n",
    "\u202e",
    "null",
    "-1",
    "[1]",
]


async def test_c37_odd_session_keys_never_meet(machine: Machine, autojump_clock: MockClock) -> None:
    """Distinct keys are distinct sessions, over a boot; no path is built from one."""
    agent = Script(open=True)
    before = sorted(path.name for path in machine.store.parent.iterdir())
    async with machine.boot(agent) as gateway:
        for n, key in enumerate(ODD_KEYS):
            assert (await gateway.accept(msg(key, f"{n}", f"for {n}"))).accepted
            # As an id, too: the same odd texts, all distinct.
            assert (await gateway.accept(msg("ids", f"id-{key}"))).accepted
        await gateway.wait_idle()
        settled_well(gateway)
    async with machine.boot(agent) as gateway:
        for n, key in enumerate(ODD_KEYS):
            lines = await gateway.history(SessionKey("local", key))
            assert [line.text for line in lines] == [f"for {n}", f"re: for {n}"]
            assert (await gateway.accept(msg(key, f"{n}"))).status is ReceiptStatus.DUPLICATE
    after = sorted(path.name for path in machine.store.parent.iterdir())
    assert {name for name in after if not name.startswith("gateway.db")} == set(before)


def test_c37_keys_are_written_and_read_back() -> None:
    """`channel:name` is unambiguous whatever the name contains."""
    keys = [SessionKey(channel, name) for channel in ("a", "a_b") for name in ODD_KEYS]
    assert [SessionKey.parse(str(key)) for key in keys] == keys
    assert len({str(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("wrong", ["", "a", ":b", "A:b", "a b:c", "a:", "1a:b"])
def test_p14_what_is_no_session_key_is_named(wrong: str) -> None:
    """With how to write one."""
    with pytest.raises(ValueError, match="is not a session key; write it as channel:name"):
        SessionKey.parse(wrong)


@pytest.mark.parametrize(
    "text",
    ["", "\0", "a\0b", "\r\n", "😀" * 1000, "x" * 1_048_576, "\u202e\ufeff", '"}', "\\ud800"],
    ids=lambda text: repr(text[:8]),
)
async def test_c38_odd_texts_come_back_intact(
    machine: Machine, autojump_clock: MockClock, text: str
) -> None:
    """To the agent, from the agent, over a boot."""
    seen: list[tuple[str, str | None]] = []

    async def agent(turn: Turn) -> str:
        seen.append((turn.text, turn.message.sender))
        if turn.resumed is None:
            await trio.sleep_forever()
        return turn.text

    async with machine.boot(agent, settings=QUICK) as gateway:
        await gateway.accept(msg("a", "m1", text, sender="s\0: ü"))
        await trio.sleep(1)
    async with machine.boot(agent) as gateway:
        replies = await gateway.ask(msg("a", "m1", text))
    assert seen == [(text, "s\0: ü")] * 2
    assert [reply.text for reply in replies] == ([text] if text else [])


async def test_c38_ten_megabytes_are_refused_or_kept(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """By the default limit refused; where the limit allows it, returned intact."""
    huge = "0123456789" * 1_000_000
    agent = Script(open=True)
    async with machine.boot(agent) as gateway:
        receipt = await gateway.accept(msg("a", "m1", huge))
        assert receipt.reason == "text: 10000000 bytes, at most 1048576 are taken"
    limits = Limits(message_bytes=20_000_000)
    async with machine.boot(agent, settings=Settings(limits=limits)) as gateway:
        (reply,) = await gateway.ask(msg("a", "m1", huge))
        assert reply.text == f"re: {huge}"


anything = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=40)


@given(batch=st.lists(st.tuples(anything, anything, anything, st.none() | anything), max_size=6))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_c38_any_text_survives_or_is_refused(
    machine: Machine, autojump_clock: MockClock, batch: list[tuple[str, str, str, str | None]]
) -> None:
    """Whatever Python can hold in a str: accepted and intact, or refused; never a broken store."""
    seen: dict[str, tuple[str, str, str | None]] = {}

    async def agent(turn: Turn) -> str:
        for one in turn.messages:
            seen[one.id] = (one.session, one.text, one.sender)
        return turn.text

    expected: dict[str, tuple[str, str, str | None]] = {}
    fresh = Machine(machine.store.parent)
    fresh.store = machine.store.with_name(f"{len(list(machine.store.parent.iterdir()))}.db")
    async with fresh.boot(agent, settings=Settings(commands=False)) as gateway:
        for session, id, text, sender in batch:
            receipt = await gateway.accept(msg(session, id, text, sender=sender))
            if receipt.status is ReceiptStatus.ACCEPTED:
                expected[id] = (session, text, sender)
            else:
                assert receipt.reason or receipt.status is ReceiptStatus.DUPLICATE
        await gateway.wait_idle()
    assert seen == expected
    assert fresh.rows("PRAGMA quick_check") == [("ok",)]
