"""The promises as a whole: random lives with deaths, faults and stops, and what must be true of the
store and of the world afterwards (p01 to p14)."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import attrs
import hypothesis
import pytest
import trio
from helpers import PATIENCE, Log, Machine, Script, msg, settled_well
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from trio.testing import MockClock

from trio_gateway import (
    Busy,
    Delivery,
    DeliveryRules,
    Gateway,
    Limits,
    Message,
    ReceiptStatus,
    ResumeReason,
    ResumeRules,
    RetryLater,
    Settings,
    StoreError,
    Turn,
    TurnState,
    Undeliverable,
    open_gateway,
)
from trio_gateway._events import TextsForgotten, TurnSettled
from trio_gateway._markers import ENDS
from trio_gateway.store import read_store
from trio_gateway.testing import MemoryChannel, check_invariants

# ----- random lives


@attrs.define
class Chaos:
    """A world in which things go wrong, by dice."""

    machine: Machine
    dice: random.Random
    busy: Busy
    idempotent: bool
    retries: bool
    disk: float = 0.03
    """How often a commit fails."""
    pace: float = 1.0
    """Seconds that what is thrown as a second takes."""
    calm: bool = False
    accepted: dict[str, Message] = attrs.field(factory=dict[str, Message])
    """What a receipt said is kept, in the order of the receipts."""
    effects: Counter[str] = attrs.field(factory=Counter[str])
    arrived: list[Delivery] = attrs.field(factory=list[Delivery])
    in_session: Counter[str] = attrs.field(factory=Counter[str])
    attempts: Counter[tuple[int, int]] = attrs.field(factory=Counter[tuple[int, int]])
    sent: int = 0

    async def some(self, seconds: float) -> None:
        """Let some time pass, at the most so many seconds."""
        await trio.sleep(self.dice.random() * seconds * self.pace)

    def chance(self, of: float) -> bool:
        """Whether something happens that happens so often, while things go wrong."""
        return not self.calm and self.dice.random() < of

    async def agent(self, turn: Turn) -> str:
        """Works in steps, says things, fails at times, takes its time."""
        session = turn.session.name
        self.attempts[turn.id, turn.attempt] += 1
        self.in_session[session] += 1
        assert self.in_session[session] == 1, f"two turns of {session} at once"
        try:
            await self.some(1)
            await turn.step(self._effect, f"{turn.id}", name="effect", effect="unsafe")
            if self.chance(0.3):
                await turn.say(f"working on {turn.text}")
            await self.some(2)
            if self.chance(0.1):
                raise ValueError("the agent's own")
            return f"re: {','.join(message.id for message in turn.messages)}"
        finally:
            self.in_session[session] -= 1

    async def _effect(self, turn: str) -> str:
        self.effects[turn] += 1
        await self.some(0.1)
        return "done"

    async def send(self, delivery: Delivery) -> None:
        """The platform: slow, forgetful, moody."""
        await self.some(0.25)
        if self.chance(0.1):
            raise OSError("the line")
        if self.chance(0.05):
            raise RetryLater(self.dice.random() * 3 * self.pace)
        if self.chance(0.02):
            raise Undeliverable("blocked")
        self.arrived.append(delivery)
        if self.chance(0.05):
            raise OSError("the line, after it arrived")

    def commit(self, moment: str) -> None:
        """The disk: full at times, in doubt at times."""
        if self.chance(self.disk):
            raise self.dice.choice([apsw.FullError("full"), apsw.IOError("broken")])

    async def people(self, channel: MemoryChannel) -> None:
        """Write, write again what was not acknowledged, say /stop and /retry."""
        unsure: list[Message] = []
        while True:
            await self.some(0.35)
            if unsure and self.chance(0.5):
                message = unsure.pop()
            else:
                self.sent += 1
                text = self.dice.choices(
                    ["hello", "/stop", "/status", "/new", "/retry"], [30, 2, 1, 1, self.retries]
                )[0]
                message = channel.message(f"s{self.dice.randrange(6)}", f"m{self.sent}", text)
            try:
                (receipt,) = await channel.receive_all(message)
            except (StoreError, RuntimeError):
                unsure.append(message)
                continue
            if receipt.accepted:
                self.accepted.setdefault(message.id, message)

    async def trouble(self, gateway: Gateway, channel: MemoryChannel) -> None:
        """The line breaks now and then."""
        while True:
            await self.some(4)
            if self.chance(0.5):
                channel.break_down(OSError("the line"))


async def one_life(chaos: Chaos, settings: Settings) -> None:
    """A life that ends in a stop, or in a death at any moment of it, the stop included."""
    machine = chaos.machine
    channel = MemoryChannel(idempotent=chaos.idempotent)
    channel.before_send = chaos.send
    chaos.in_session.clear()
    dies_after = chaos.dice.choice([None, chaos.dice.random() * 8, chaos.dice.random() * 8])

    async def die(after: float) -> None:
        await trio.sleep(after)
        machine.crash()
        check_invariants(machine.store)
        chaos.calm = True  # nobody will see what it does from here on
        seen.extend(chaos.arrived)
        known.update(chaos.accepted)
        gateway.request_stop(now=True)

    seen: list[Delivery] = []
    known: dict[str, Message] = {}
    async with trio.open_nursery() as nursery:
        async with machine.boot(chaos.agent, channel, settings=settings) as gateway:
            machine.on_commit = chaos.commit
            nursery.start_soon(chaos.people, channel)
            nursery.start_soon(chaos.trouble, gateway, channel)
            if dies_after is not None:
                nursery.start_soon(die, dies_after)
            with trio.move_on_after(6):
                await gateway.wait_stop_requested()
            gateway.request_stop(chaos.dice.choice([ResumeReason.RESTART, ResumeReason.SHUTDOWN]))
        nursery.cancel_scope.cancel()
    machine.on_commit = None
    if chaos.calm:  # it died
        chaos.calm = False
        chaos.arrived, chaos.accepted = seen, known


async def last_life(chaos: Chaos, settings: Settings) -> None:
    """Nothing goes wrong any more: everything comes to its end."""
    chaos.calm = True
    chaos.in_session.clear()
    channel = MemoryChannel(idempotent=chaos.idempotent)
    channel.before_send = chaos.send
    async with chaos.machine.boot(chaos.agent, channel, settings=settings) as gateway:
        with trio.fail_after(10_000):
            await gateway.wait_idle()
        settled_well(gateway)


@pytest.mark.parametrize("busy", [Busy.QUEUE, Busy.COLLECT, Busy.INTERRUPT])
@pytest.mark.parametrize("idempotent", [True, False])
@pytest.mark.parametrize("seed", range(3))
async def test_p01_p02_p05_p06_p07_p08_random_lives(
    machine: Machine, autojump_clock: MockClock, busy: Busy, idempotent: bool, seed: int
) -> None:
    """Seven lives with full disks, broken lines, errors, stops and deaths, then one without."""
    dice = random.Random(f"{busy}{idempotent}{seed}")
    chaos = Chaos(machine, dice, busy, idempotent, retries=seed % 2 == 1)
    settings = Settings(
        busy=busy,
        grace=1.5,
        budget=8.0,
        limits=Limits(turns=4),
        resume=ResumeRules(concurrency=2, max_crashes=100, max_interruptions=100),
    )
    for _ in range(7):
        await one_life(chaos, settings)
    await last_life(chaos, settings)
    check_invariants(machine.store, settled=True)
    nothing_lost(chaos)
    nothing_doubled(chaos)
    if not chaos.retries:
        in_order(chaos)


def nothing_lost(chaos: Chaos) -> None:
    """Promises 1 and 7: what was accepted has an end, what was committed arrived or is a dead
    letter that a person can see."""
    fates = dict(chaos.machine.rows("SELECT id, state FROM message"))
    lost = chaos.accepted.keys() - fates.keys()
    assert not lost
    assert set(fates.values()) <= {"answered", "failed", "stopped"}
    keys = {d.key for d in chaos.arrived}
    for key, state in chaos.machine.rows("SELECT key, state FROM delivery WHERE kind != 'notice'"):
        assert state in ("delivered", "dead"), key
        assert (key in keys) or state == "dead", f"{key} is {state} and never arrived"


def nothing_doubled(chaos: Chaos) -> None:
    """Promises 6, 7 and 8: one final reply for each message; a key stands for one text; where the
    platform forgets keys, a repeat says so; an unsafe effect happens once in a turn."""
    texts: dict[str, str] = {}
    for delivery in chaos.arrived:
        repeat = delivery.key in texts
        assert texts.setdefault(delivery.key, delivery.text) == delivery.text
        if not chaos.idempotent and repeat:
            assert delivery.repeat, f"{delivery.key} came again without a word"
    final = Counter(
        id for d in {d.key: d for d in chaos.arrived}.values() if d.final and d.kind == "answer"
        for id in d.in_reply_to
    )  # fmt: skip
    assert set(final.values()) <= {1}
    assert set(chaos.effects.values()) <= {1}
    assert set(chaos.attempts.values()) <= {1}


def in_order(chaos: Chaos) -> None:
    """Promise 2: answers of a session come in the order in which its messages were accepted."""
    order = {id: seq for seq, id in chaos.machine.rows("SELECT seq, id FROM message")}
    first_arrival = {d.key: d for d in reversed(chaos.arrived)}
    for session in {d.session for d in chaos.arrived}:
        answered = [
            order[id]
            for d in sorted(first_arrival.values(), key=chaos.arrived.index)
            if d.session == session and d.kind == "answer"
            for id in d.in_reply_to
        ]
        assert answered == sorted(answered), session


async def test_p02_p06_random_life_over_the_thread(tmp_path: Path) -> None:
    """In real time, with commits that come back together and in any order: every count is right
    afterwards, also where commits fail."""
    chaos = Chaos(Machine(tmp_path), random.Random(3), Busy.QUEUE, True, True, 0.005, pace=0.03)
    channel = MemoryChannel()
    channel.before_send = chaos.send
    log = Log()
    options = Settings(limits=Limits(turns=5), delivery=DeliveryRules(first_delay=0.01))
    with trio.fail_after(PATIENCE * 2):
        async with open_gateway(
            chaos.agent,
            store=chaos.machine.store,
            channels=[channel],
            settings=options,
            tap=chaos.commit,
            listen=log,
        ) as gateway:
            with trio.move_on_after(2.0):
                async with trio.open_nursery() as nursery:
                    for _ in range(4):
                        nursery.start_soon(chaos.people, channel)
            chaos.calm = True
            await gateway.wait_idle()
            statistics = gateway.statistics()
    assert statistics.pop("slots_free") == 5
    assert set(statistics.values()) == {0}
    assert len(log.of(TurnSettled)) > 50
    check_invariants(chaos.machine.store, settled=True)
    nothing_lost(chaos)
    nothing_doubled(chaos)


# ----- one by one


async def test_p01_ids_are_remembered_longer_than_texts(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """After 90 days the texts of what has ended are gone, and the id is still recognised; after 400
    days that, too. What is open stays, however old."""
    agent = Script()
    agent.release("a")
    async with machine.boot(agent) as gateway:
        await gateway.ask(msg("a", "m1", "a secret"))
        await gateway.accept(msg("open", "m2", "still open"))
        machine.clock.jump(timedelta(days=91))
        await machine.log.wait_for(TextsForgotten)
        assert machine.rows("SELECT body FROM message WHERE id = 'm1'") == [(None,)]
        assert b"a secret" not in b"".join(
            str(row).encode() for row in machine.rows("SELECT text FROM delivery")
        )
        again = await gateway.accept(msg("a", "m1", "a secret"))
        assert again.status is ReceiptStatus.DUPLICATE
        machine.clock.jump(timedelta(days=310))
        await machine.log.wait_for(TextsForgotten, 2)
        again = await gateway.accept(msg("a", "m1", "as new"))
        assert again.status is ReceiptStatus.ACCEPTED
        assert machine.fate("m2") == "running"
        agent.release()
        await gateway.wait_idle()
        settled_well(gateway)
    assert machine.fate("m2") == "answered"


async def test_p01_every_end_can_be_seen(machine: Machine, autojump_clock: MockClock) -> None:
    """A person can see which end a message has, and why."""
    stuck = Script()

    async def agent(turn: Turn) -> str:
        if turn.text == "failed":
            raise ValueError("the reason")
        if turn.text in ("stopped", "expired", "quarantined"):
            return await stuck(turn)
        return "fine"

    ends = ("answered", "failed", "stopped", "expired", "quarantined")
    rules = ResumeRules(max_interruptions=2)
    settings = Settings(grace=0.5, budget=10.0, resume=rules)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept([msg(end, end, end) for end in ends[:3]])
        await gateway.accept(msg("quarantined", "quarantined", "quarantined"))
        await stuck.wait_begun(2)
        await gateway.accept(msg("stopped", "c1", "/stop"))
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("expired", "expired", "expired"))
        await stuck.wait_begun(4)
    await trio.sleep(3700)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.wait_idle()
    with closing(read_store(machine.store)) as reader:
        stories = {end: reader.explain(end)[0] for end in ends}
    assert {end: story.message.state for end, story in stories.items()} == {
        end: end for end in ends
    }
    assert all(story.message.ended_at is not None for story in stories.values())
    whys = {end: story.entries[-1].detail for end, story in stories.items()}
    assert "the reason" in whys["failed"]
    assert "resume.within" in whys["expired"]
    assert "2 stops" in whys["quarantined"]
    assert all(entry.at <= story.entries[-1].at for story in stories.values()
               for entry in story.entries)  # fmt: skip


async def test_p04_a_hook_that_hangs_does_not_delay_the_marks(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Authorisation hangs, a channel hangs in sending, an agent hangs: marked at once."""
    agent = Script()
    channel = MemoryChannel(notices=True)

    async def hang(message: Message) -> bool:
        if message.id == "hangs":
            await trio.sleep_forever()
        return True

    async def hang_too(delivery: Delivery) -> None:
        await trio.sleep_forever()

    channel.before_send = hang_too
    settings = Settings(grace=2.0, budget=10.0)
    async with trio.open_nursery() as nursery:
        async with machine.boot(agent, channel, authorize=hang, settings=settings) as gateway:
            await channel.receive("a", "m1", "hi")
            await channel.receive("b", "c1", "/help")
            nursery.start_soon(gateway.accept, msg("c", "hangs"))
            await agent.wait_begun(1)
            await trio.sleep(1)
            began = trio.current_time()
            gateway.request_stop()
            await gateway.draining.wait_value(True)
            assert trio.current_time() == began
            assert machine.markers() == {"a": ("RESUME_PENDING", "shutdown")}
        assert trio.current_time() - began <= 10.0
        nursery.cancel_scope.cancel()


async def test_p07_in_order_per_session_whatever_fails(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Every third sending fails, some are asked to wait, some die for good: what arrives in a
    session arrives in the order in which it was said."""
    count = 0
    channel = MemoryChannel()

    async def moody(delivery: Delivery) -> None:
        nonlocal count
        count += 1
        await trio.sleep(0.01)
        if count % 3 == 0:
            raise OSError("the line")
        if count % 7 == 0:
            raise RetryLater(2.0)
        if count % 41 == 0:
            raise Undeliverable("blocked")

    async def agent(turn: Turn) -> None:
        for n in range(5):
            await turn.say(f"{turn.text}.{n}")

    channel.before_send = moody
    async with machine.boot(agent, channel) as gateway:
        for n in range(10):
            for session in "abc":
                await channel.receive(session, f"{session}{n}", str(n))
        await gateway.wait_idle()
        settled_well(gateway)
    for session in "abc":
        texts = channel.texts(session)
        assert texts == sorted(texts, key=lambda text: [*map(int, text.split("."))])
    dead = machine.rows("SELECT count(*) FROM delivery WHERE state = 'dead'")[0][0]
    assert len(channel.sent) + dead == 150
    assert dead > 0


async def test_p10_stopped_is_stopped_whatever_happens_next(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A turn that was resumed, stopped, and whose process then dies, stops and boots again."""
    agent = Script()
    settings = Settings(grace=0.5, budget=10.0)
    async with machine.boot(agent, settings=settings) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
    async with machine.boot(agent, settings=settings) as gateway:
        await agent.wait_begun(2)
        await gateway.accept(msg("a", "c1", "/stop"))
        machine.crash()
        gateway.request_stop(now=True)
    for _ in range(3):
        async with machine.boot(agent, settings=settings) as gateway:
            await trio.sleep(60)
            machine.crash()
            gateway.request_stop(now=True)
    assert len(agent.turns) == 2
    assert machine.fate("m1") == "stopped"
    assert machine.rows("SELECT state FROM turn") == [("STOPPED",)]


async def test_p12_who_sends_in_the_drain_is_told_after_the_commit(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A receipt in the drain is worth as much as any other: no commit, no receipt."""
    agent = Script()
    async with machine.boot(agent, settings=Settings(grace=5.0)) as gateway:
        await gateway.accept(msg("a", "m1"))
        await agent.wait_begun(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)

        def fail(moment: str) -> None:
            raise apsw.FullError("full")

        machine.on_commit = fail
        with pytest.raises(StoreError):
            await gateway.accept(msg("b", "m2"))
        machine.on_commit = None
        assert (await gateway.accept(msg("b", "m3"))).accepted
        machine.crash()
        gateway.request_stop(now=True)
    assert machine.rows("SELECT id, state FROM message WHERE id != 'm1'") == [("m3", "queued")]


async def test_p14_trouble_of_one_session_is_no_trouble_of_another(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """One agent fails, one hangs, one returns nonsense, one platform is gone: the good one gets its
    answers in no time."""
    bad, good = MemoryChannel("bad"), MemoryChannel("good")

    async def gone(delivery: Delivery) -> None:
        raise ConnectionError("gone")

    bad.before_send = gone

    async def agent(turn: Turn) -> Any:
        if turn.text == "fail":
            raise ValueError("x")
        if turn.text == "hang":
            await trio.sleep_forever()
        return 42 if turn.text == "nonsense" else "good"

    async with machine.boot(agent, bad, good, settings=Settings(grace=1.0)):
        began = trio.current_time()
        for n, text in enumerate(["fail", "hang", "nonsense"] * 5):
            await bad.receive(f"s{n}", f"m{n}", text)
            await good.receive("s", f"m{n}", "hi")
        await good.wait_sent(15)
        assert trio.current_time() == began
    assert good.texts() == ["good"] * 15


anything = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=40)


@given(batch=st.lists(st.tuples(anything, anything, anything, st.none() | anything), max_size=6))
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_p14_c38_any_text_survives_or_is_refused(
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


def test_the_ends_are_the_ends() -> None:
    """Five ends of a turn, and no way out of them."""
    assert {
        TurnState.COMPLETED,
        TurnState.FAILED,
        TurnState.STOPPED,
        TurnState.QUARANTINED,
        TurnState.EXPIRED,
    } == ENDS
