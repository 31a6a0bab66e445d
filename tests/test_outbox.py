"""The outbox: every text by the same way, in order, until it arrives or a person has to look
(c39 to c45, promise 7)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
import trio
from helpers import Machine, Script, msg, settled_well
from trio.testing import MockClock

from trio_gateway import (
    ChannelEnded,
    Delivery,
    DeliveryRules,
    DrainReport,
    Event,
    Limits,
    Message,
    ReplyKind,
    RetryLater,
    Settings,
    Turn,
    TurnState,
    Undeliverable,
)
from trio_gateway._events import (
    DeadLettered,
    Delivered,
    DeliveryDelayed,
    GatewayStarted,
    ReplyCommitted,
    StoreTrouble,
)
from trio_gateway.store import (
    Arrival,
    DeadLetter,
    NewReply,
    Settlement,
    edit_store,
    open_store,
    read_store,
)
from trio_gateway.testing import MemoryChannel, check_invariants


class Platform(MemoryChannel):
    """A platform that can also fail after it took the text: then the sender cannot know."""

    after_send: Callable[[Delivery], Awaitable[None]] | None = None

    async def send(self, delivery: Delivery) -> None:
        """Take the text, then perhaps fail."""
        await super().send(delivery)
        if self.after_send is not None:
            await self.after_send(delivery)

    @property
    def got(self) -> list[tuple[str, bool]]:
        """Text and repeat mark of all that arrived."""
        return [(d.text, d.repeat) for d in self.sent]

    def disconnect(self) -> None:
        """Lose the connection until `connect` is called."""
        self._may_connect.value = False
        self.break_down(ConnectionError("gone"))


def to(session: str, id: str, text: str | None = None) -> Message:
    """A message over the platform; its text is its id, so that the reply names it."""
    return msg(session, id, id if text is None else text, channel="memory")


def echo() -> Script:
    """An agent that says its text back at once."""
    return Script(open=True, answer="{text}")


def tries_hard(**rules: float) -> Settings:
    """Settings with these delivery rules."""
    tries = int(rules.pop("max_tries", 12))
    return Settings(delivery=DeliveryRules(max_tries=tries, **rules))


def state_of(machine: Machine, text: str) -> tuple[str, int, str | None]:
    """How the delivery of a text stands: state, tries, error."""
    (row,) = machine.rows("SELECT state, tries, error FROM delivery WHERE text = ?", text)
    return str(row[0]), int(row[1]), row[2]


def dead_letters(machine: Machine) -> tuple[DeadLetter, ...]:
    """What a person sees."""
    with closing(read_store(machine.store)) as reader:
        return reader.dead_letters()


# ----- c39: one way for all of them


async def test_c39_every_text_goes_the_same_way(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Answers, says, apologies, commands and notices: whatever the platform is handed is in the
    outbox on disk, under its key; and all that is in the outbox is handed over, once."""
    channel = Platform(notices=True)

    async def on_disk(delivery: Delivery) -> None:
        (row,) = machine.rows("SELECT text, state FROM delivery WHERE key = ?", delivery.key)
        assert row == (delivery.text, "pending")
        await trio.lowlevel.checkpoint()

    async def agent(turn: Turn) -> str | None:
        if turn.text == "fail":
            raise ValueError("secret")
        if turn.text == "long" and turn.resumed is None:
            await trio.sleep_forever()
        await turn.say(f"on {turn.text}")
        return f"re: {turn.text}"

    channel.before_send = on_disk
    async with machine.boot(agent, channel, settings=Settings(grace=1.0)) as gateway:
        texts = ["hello", "fail", "/help", "long"]
        await gateway.accept([to(f"s{n}", f"m{n}", text) for n, text in enumerate(texts)])
        await channel.wait_sent(4)
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert gateway.failure is None
    assert {delivery.kind for delivery in channel.sent} == set(ReplyKind)
    stored = machine.rows("SELECT key FROM delivery WHERE state = 'delivered'")
    assert Counter(d.key for d in channel.sent) == Counter(key for (key,) in stored)
    check_invariants(machine.store, settled=True)


@pytest.mark.parametrize("what", ["say", "answer", "command"])
async def test_c39_nothing_leaves_before_its_commit(
    machine: Machine, autojump_clock: MockClock, what: str
) -> None:
    """The disk is full for a minute: so long the platform hears nothing, then all of it, once."""
    channel = Platform()
    agent = Script()

    async def says(turn: Turn) -> str | None:
        await agent(turn)
        if what == "say":
            await turn.say("told")
            return None
        return "told"

    def fail(moment: str) -> None:
        if moment == "before" and trio.current_time() < until:
            raise apsw.FullError("full")

    async with machine.boot(says, channel) as gateway:
        await channel.wait_ready()
        if what != "command":
            await gateway.accept(to("a", "m1"))
            await agent.wait_begun(1)
        until = trio.current_time() + 60
        machine.on_commit = fail
        agent.release()
        if what == "command":
            with pytest.raises(Exception, match="full"):
                await gateway.accept(to("a", "m1", "/help"))
        await trio.sleep(59)
        assert channel.sent == []
        await trio.sleep(60)
        if what == "command":
            await gateway.accept(to("a", "m1", "/help"))
        await gateway.wait_idle()
    assert len(channel.sent) == 1


async def test_p07_what_is_committed_at_one_moment_leaves_in_that_order(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A turn speaks, and its user says something to the gateway, at the same time: whoever was
    written first is heard first. Nobody is to read "Stopped." and then what was said before."""
    gate = trio.Event()

    async def agent(turn: Turn) -> str:
        await gate.wait()
        await turn.say("said")
        return "answered"

    sessions = [f"s{n}" for n in range(100)]
    channel = Platform()
    async with machine.boot(agent, channel) as gateway:
        await gateway.accept([to(name, f"m-{name}") for name in sessions])
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
        async with trio.open_nursery() as nursery:
            for name in sessions:
                nursery.start_soon(gateway.accept, to(name, f"s-{name}", "/status"))
        await gateway.wait_idle()
    committed: dict[str, list[str]] = {name: [] for name in sessions}
    for name, key in machine.rows(
        "SELECT session.name, key FROM delivery JOIN session ON session.id = delivery.session"
        " ORDER BY delivery.id"
    ):
        committed[name].append(key)
    heard: dict[str, list[str]] = {name: [] for name in sessions}
    for delivery in channel.sent:
        heard[delivery.session.name].append(delivery.key)
    assert heard == committed


# ----- c40: parts


PARTS = [letter * 10 for letter in "abcd"]


async def in_parts(turn: Turn) -> str:
    """An agent whose answer is cut in four, ten characters each."""
    await trio.lowlevel.checkpoint()
    return "".join(PARTS)


@pytest.mark.parametrize("idempotent", [True, False])
async def test_c40_parts_resume_at_the_one_that_is_missing(
    machine: Machine, autojump_clock: MockClock, idempotent: bool
) -> None:
    """Two of four have arrived, then the process dies: the boot sends the other two."""
    channel = Platform(text_limit=10, idempotent=idempotent)

    async def third_waits(delivery: Delivery) -> None:
        if delivery.part == 3:
            raise RetryLater(1000)
        await trio.lowlevel.checkpoint()

    channel.before_send = third_waits
    async with machine.boot(in_parts, channel) as gateway:
        await gateway.accept(to("a", "m1"))
        await machine.log.wait_for(DeliveryDelayed)
        await machine.log.wait_for(Delivered, 2)
        machine.crash()
        gateway.request_stop(now=True)
    assert [d.part for d in channel.sent] == [1, 2]
    channel = Platform(text_limit=10, idempotent=idempotent)
    async with machine.boot(in_parts, channel) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert [(d.part, d.parts, d.final, d.repeat) for d in channel.sent] == [
        (3, 4, False, False),
        (4, 4, True, False),
    ]
    assert channel.texts() == PARTS[2:]


async def test_c40_a_part_that_fails_is_sent_again_and_no_other(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Retried in the same life: every part once, in order."""
    channel = Platform(text_limit=10)
    failures = iter([True, True])

    async def second_fails(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        if delivery.part == 2 and next(failures, False):
            raise ConnectionError("lost")

    channel.before_send = second_fails
    async with machine.boot(in_parts, channel) as gateway:
        await gateway.accept(to("a", "m1"))
        await gateway.wait_idle()
    assert [d.part for d in channel.sent] == [1, 2, 3, 4]
    assert channel.texts() == PARTS
    assert [d.final for d in channel.sent] == [False, False, False, True]
    assert len({d.key for d in channel.sent}) == 4


async def test_c40_a_settle_that_is_asked_twice_names_every_part(tmp_path: Path) -> None:
    """A commit whose outcome was unknown is asked again: all parts go out, not the last alone."""
    arrival = Arrival(to("a", "m1"), to("a", "m1").key, begin=True)
    async with open_store(tmp_path / "gateway.db", inline=True) as store:
        await store.recover()
        (admitted,) = await store.accept([arrival])
        assert admitted.turn is not None
        turn = admitted.turn
        await store.say(turn.id, 1, turn.session, turn.session_id, _reply(1, ReplyKind.SAY, "said"))
        answer = _reply(0, ReplyKind.ANSWER, "one", "two", "three")
        end = Settlement(
            turn.id, 1, turn.session, turn.session_id, TurnState.COMPLETED, answer, None
        )
        first, second = await store.settle(end), await store.settle(end)
    assert [d.text for d in first.deliveries] == ["one", "two", "three"]
    assert second.deliveries == first.deliveries


def _reply(n: int, kind: ReplyKind, *parts: str) -> NewReply:
    return NewReply(n, kind, parts, kind is ReplyKind.ANSWER, ("m1",))


# ----- c41: retry after


async def test_c41_retry_after_delays_that_destination_alone(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Asked to wait 30 s, five times: none is a failed try, of which one is allowed. The others are
    served at once; the one that waits loses nothing, and nothing of its order."""
    channel = Platform()
    asked: list[float] = []
    when: dict[str, float] = {}

    async def limited(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        if delivery.text == "slow 1":
            asked.append(trio.current_time())
            if len(asked) <= 5:
                raise RetryLater(30)
            if len(asked) == 6:
                raise ConnectionError("the one failure that is allowed")
        when[delivery.text] = trio.current_time()

    channel.before_send = limited
    async with machine.boot(echo(), channel, settings=tries_hard(max_tries=2)) as gateway:
        await channel.wait_ready()
        began = trio.current_time()
        names = ["slow 1", "slow 2", "b", "c"]
        await gateway.accept([to(name.split()[0], name) for name in names])
        await gateway.wait_idle()
        settled_well(gateway)
    assert (when["b"], when["c"]) == (began, began)
    assert [round(later - earlier, 3) for earlier, later in pairwise(asked[:6])] == [30.0] * 5
    assert when["slow 2"] >= when["slow 1"] == asked[-1]
    assert channel.texts("slow") == ["slow 1", "slow 2"]
    assert dead_letters(machine) == ()


async def test_c41_retry_after_is_kept_over_a_boot(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Ten seconds into the wait the process dies: the rest is waited for by the next one."""
    channel = Platform()
    limits = iter([RetryLater(30)])
    when: list[float] = []

    async def limited(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        for limit in limits:
            raise limit
        when.append(trio.current_time())

    channel.before_send = limited
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept(to("a", "m1"))
        (delayed,) = await machine.log.wait_for(DeliveryDelayed)
        asked = trio.current_time()
        await trio.sleep(10)
        machine.crash()
        gateway.request_stop(now=True)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept(to("b", "m2"))
        await gateway.wait_idle()
    assert delayed.retry_in == 30.0
    assert channel.texts() == ["m2", "m1"]
    assert when[-1] - asked == pytest.approx(30.0, abs=0.01)


@pytest.mark.parametrize("after", [0.0, -1.0, float("nan"), float("inf"), 1e300])
async def test_c41_nonsense_from_a_platform_costs_one_delay(
    machine: Machine, autojump_clock: MockClock, after: float
) -> None:
    """A platform that says to come back never, or yesterday, harms nobody else, and is asked again:
    within a day, and not in a tight loop."""
    channel = Platform()
    tries: list[float] = []

    async def limited(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        if delivery.session.name == "a":
            tries.append(trio.current_time())
            if len(tries) < 3:
                raise RetryLater(after)

    channel.before_send = limited
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept([to("a", "m1"), to("b", "m2")])
        await gateway.wait_idle()
        assert gateway.failure is None
    assert sorted(channel.texts()) == ["m1", "m2"]
    assert all(0 < later - earlier <= 86_400 for earlier, later in pairwise(tries))


@pytest.mark.parametrize("error", [RetryLater(30), Undeliverable("blocked"), ChannelEnded("gone")])
async def test_c41_what_a_platform_says_counts_also_out_of_a_nursery(
    machine: Machine, autojump_clock: MockClock, error: Exception
) -> None:
    """A channel that sends from inside a nursery raises groups: they mean what is in them."""
    channel = Platform()
    errors = iter([error])

    async def grouped(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        for one in errors:
            raise ExceptionGroup("of a nursery", [one])

    channel.before_send = grouped
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept(to("a", "m1"))
        if isinstance(error, ChannelEnded):
            with trio.fail_after(1):
                await gateway.wait_stop_requested()
        else:
            await gateway.wait_idle()
    delays = [event.retry_in for event in machine.log.of(DeliveryDelayed)]
    assert delays == ([30.0] if isinstance(error, RetryLater) else [])
    assert len(dead_letters(machine)) == isinstance(error, Undeliverable)


# ----- c42: order


@pytest.mark.parametrize("seed", range(5))
async def test_c42_p07_order_per_session_survives_retries(
    machine: Machine, autojump_clock: MockClock, seed: int
) -> None:
    """A platform that fails, stalls and asks to wait as it likes: each session's texts arrive in
    the order in which they were committed, each once, and never two of a session at once."""
    dice = random.Random(seed)
    channel = Platform()
    busy: Counter[str] = Counter()

    async def moody(delivery: Delivery) -> None:
        name = delivery.session.name
        busy[name] += 1
        assert busy[name] == 1
        try:
            await trio.sleep(dice.random())
            mood = dice.random()
            if mood < 0.2:
                raise ConnectionError("lost")
            if mood < 0.4:
                raise RetryLater(dice.random() * 20)
            if mood < 0.5:
                await trio.sleep(100)
        finally:
            busy[name] -= 1

    channel.before_send = moody

    async def agent(turn: Turn) -> str:
        await turn.say(f"on {turn.text}")
        return f"re {turn.text}"

    settings = Settings(delivery=DeliveryRules(timeout=10.0, max_tries=1000))
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.accept([to(f"s{n % 5}", f"{n:02}") for n in range(40)])
        await gateway.wait_idle()
        settled_well(gateway)
    for session in range(5):
        numbers = [f"{n:02}" for n in range(40) if n % 5 == session]
        assert channel.texts(f"s{session}") == [
            f"{word} {n}" for n in numbers for word in ("on", "re")
        ]


# ----- c43: what may have arrived


@pytest.mark.parametrize("idempotent", [True, False])
async def test_c43_killed_between_send_and_delivered(
    machine: Machine, autojump_clock: MockClock, idempotent: bool
) -> None:
    """The platform has it, the store does not know: sent again under the same key, and marked where
    the platform cannot tell; what was not on the wire is not marked."""
    channel = Platform(idempotent=idempotent)

    def die_before_the_record(moment: str) -> None:
        if moment == "before" and channel.sent:
            machine.on_commit = None
            machine.crash()

    async with machine.boot(echo(), channel) as gateway:
        machine.on_commit = die_before_the_record
        await gateway.accept([to("a", "m1"), to("a", "m2")])
        await gateway.wait_idle()
    before = channel.sent[0]
    assert machine.rows("SELECT count(*) FROM delivery WHERE state = 'delivered'") == [(0,)]
    channel = Platform(idempotent=idempotent)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
    assert channel.got == [("m1", not idempotent), ("m2", False)]
    assert channel.sent[0].key == before.key
    channel = Platform(idempotent=idempotent)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
    assert channel.sent == []


@pytest.mark.parametrize("idempotent", [True, False])
async def test_c43_killed_before_it_was_on_the_wire(
    machine: Machine, autojump_clock: MockClock, idempotent: bool
) -> None:
    """Committed, the connection gone, then killed: sent once, and no repeat."""
    channel = Platform(idempotent=idempotent)
    agent = Script(answer="{text}")
    async with machine.boot(agent, channel) as gateway:
        await gateway.accept(to("a", "m1"))
        await agent.wait_begun(1)
        channel.disconnect()
        await trio.sleep(5)
        agent.release()
        await trio.sleep(5)
        assert machine.fate("m1") == "answered"
        machine.crash()
        gateway.request_stop(now=True)
    assert channel.sent == []
    channel.connect()
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
    assert channel.got == [("m1", False)]
    assert len(agent.turns) == 1


@pytest.mark.parametrize("idempotent", [True, False])
@pytest.mark.parametrize("how", ["error", "too long", "asked to wait"])
@pytest.mark.parametrize("then", ["tried again", "killed"])
async def test_c43_an_outcome_that_is_unknown_is_said_to_be(
    machine: Machine, autojump_clock: MockClock, idempotent: bool, how: str, then: str
) -> None:
    """An error or silence after the platform had it: a repeat, in this life and the next. One that
    asks to wait did not take it: no repeat. With idempotent send: never one."""
    channel = Platform(idempotent=idempotent)
    first: list[Delivery] = []

    async def unknown(delivery: Delivery) -> None:
        if first:
            return
        first.append(delivery)
        if how == "error":
            raise ConnectionError("lost")
        if how == "asked to wait":
            raise RetryLater(60)
        await trio.sleep_forever()

    channel.after_send = unknown
    async with machine.boot(echo(), channel, settings=tries_hard(timeout=5.0)) as gateway:
        await gateway.accept(to("a", "m1"))
        await machine.log.wait_for(DeliveryDelayed)
        if then == "killed":
            machine.crash()
            gateway.request_stop(now=True)
        else:
            await gateway.wait_idle()
    if then == "killed":
        channel.sent[1:] = []
        async with machine.boot(echo(), channel) as gateway:
            await gateway.wait_idle()
    marked = how != "asked to wait" and not idempotent
    assert channel.got == [("m1", False), ("m1", marked)]
    assert channel.sent[0].key == channel.sent[1].key


# ----- c44: undeliverable


async def test_c44_undeliverable_is_a_dead_letter_and_the_session_goes_on(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Blocked: not tried again, not at a boot either; a person sees it; the next text arrives."""
    channel = Platform()
    tried: list[str] = []

    async def blocked(delivery: Delivery) -> None:
        tried.append(delivery.text)
        await trio.lowlevel.checkpoint()
        if delivery.text == "m1":
            raise Undeliverable("blocked by the user")

    channel.before_send = blocked
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept([to("a", "m1"), to("a", "m2")])
        await gateway.wait_idle()
        settled_well(gateway)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
        assert machine.log.of(GatewayStarted)[-1].undelivered == 0
    assert tried == ["m1", "m2"]
    assert channel.texts() == ["m2"]
    (letter,) = dead_letters(machine)
    assert (letter.session.name, letter.text, letter.error, letter.tries) == (
        "a",
        "m1",
        "blocked by the user",
        1,
    )
    (event,) = machine.log.of(DeadLettered)
    assert event.delivery.key == letter.key
    assert machine.fate("m1") == "answered"


@pytest.mark.parametrize("idempotent", [True, False])
async def test_c44_a_dead_letter_is_retried_by_a_person(
    machine: Machine, autojump_clock: MockClock, idempotent: bool
) -> None:
    """Retried, then booted: sent under the key that it had, with all its tries anew, once."""
    channel = Platform(idempotent=idempotent)
    blocked = True

    async def may_block(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        if blocked:
            raise Undeliverable("blocked by the user")

    channel.before_send = may_block
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept([to("a", "m1"), to("b", "m2")])
        await gateway.wait_idle()
    first, second = sorted(dead_letters(machine), key=lambda letter: str(letter.text))
    assert edit_store(machine.store, lambda ledger: ledger.retry_dead(first.delivery))
    assert edit_store(machine.store, lambda ledger: ledger.drop_dead(second.delivery))
    assert not edit_store(machine.store, lambda ledger: ledger.retry_dead(second.delivery))
    assert dead_letters(machine) == ()
    blocked = False
    async with machine.boot(echo(), channel) as gateway:
        assert machine.log.of(GatewayStarted)[-1].undelivered == 1
        await gateway.wait_idle()
    assert [(d.key, d.text) for d in channel.sent] == [(first.key, first.text)]
    assert channel.sent[0].repeat or idempotent
    assert state_of(machine, "m1") == ("delivered", 1, None)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
    assert len(channel.sent) == 1


async def test_c44_a_dead_letter_that_dies_again_is_one_again(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Retried in vain: back where a person sees it, not lost."""
    channel = Platform()

    async def blocked(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        raise Undeliverable("blocked by the user")

    channel.before_send = blocked
    async with machine.boot(echo(), channel) as gateway:
        await gateway.accept(to("a", "m1"))
        await gateway.wait_idle()
    (letter,) = dead_letters(machine)
    edit_store(machine.store, lambda ledger: ledger.retry_dead(letter.delivery))
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
        settled_well(gateway)
    assert [again.key for again in dead_letters(machine)] == [letter.key]


# ----- trying again


async def test_c44_max_tries_then_a_dead_letter(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Exactly so many tries, and what went wrong last; the session goes on."""
    channel = Platform()
    tries: Counter[str] = Counter()

    async def broken(delivery: Delivery) -> None:
        tries[delivery.text] += 1
        await trio.lowlevel.checkpoint()
        if delivery.text == "m1":
            raise ConnectionError(f"number {tries['m1']}")

    channel.before_send = broken
    async with machine.boot(echo(), channel, settings=tries_hard(max_tries=4)) as gateway:
        await gateway.accept([to("a", "m1"), to("a", "m2")])
        await gateway.wait_idle()
        settled_well(gateway)
    assert tries == {"m1": 4, "m2": 1}
    (letter,) = dead_letters(machine)
    assert letter.tries == 4
    assert letter.error == "gave up after 4 tries: ConnectionError('number 4')"
    assert [event.delivery.tries for event in machine.log.of(DeliveryDelayed)] == [1, 2, 3]


async def test_c44_tries_are_counted_over_boots(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A process that is killed between tries does not begin to count anew."""
    channel = Platform()
    counted: list[int] = []

    async def broken(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        raise ConnectionError("down")

    channel.before_send = broken
    settings = tries_hard(max_tries=5)
    for _ in range(4):
        async with machine.boot(echo(), channel, settings=settings) as gateway:
            before = len(machine.log.of(DeliveryDelayed))
            await gateway.accept(to("a", "m1"))
            await machine.log.wait_for(DeliveryDelayed, before + 1)
            machine.crash()
            counted.append(state_of(machine, "m1")[1])
            gateway.request_stop(now=True)
        assert dead_letters(machine) == ()
    assert counted == [1, 2, 3, 4]
    async with machine.boot(echo(), channel, settings=settings) as gateway:
        await gateway.wait_idle()
    assert [letter.tries for letter in dead_letters(machine)] == [5]


async def test_c41_backoff_doubles_is_capped_and_has_jitter(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Destinations that failed together do not come back together; waits double up to the cap."""
    channel = Platform()
    times: dict[str, list[float]] = {}

    async def broken(delivery: Delivery) -> None:
        times.setdefault(delivery.text, []).append(trio.current_time())
        await trio.lowlevel.checkpoint()
        raise ConnectionError("down")

    channel.before_send = broken
    rules = tries_hard(max_tries=8, first_delay=2.0, max_delay=40.0)
    async with machine.boot(echo(), channel, settings=rules) as gateway:
        await gateway.accept([to(f"s{n}", f"m{n}") for n in range(20)])
        await gateway.wait_idle()
    full = [2.0, 4.0, 8.0, 16.0, 32.0, 40.0, 40.0]
    for tried in times.values():
        waits = [later - earlier for earlier, later in pairwise(tried)]
        assert len(waits) == len(full)
        for wait, most in zip(waits, full, strict=True):
            assert most / 2 <= wait <= most + 0.001
    assert len({round(tried[1] - tried[0], 6) for tried in times.values()}) > 10


async def test_p07_a_channel_that_takes_too_long(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """One text hangs: cut after the timeout and tried again; the others do not wait for it."""
    channel = Platform()
    began: list[float] = []
    when: dict[str, float] = {}

    async def hang(delivery: Delivery) -> None:
        if delivery.text == "m1":
            began.append(trio.current_time())
            if len(began) == 1:
                await trio.sleep_forever()
        when[delivery.text] = trio.current_time()

    channel.before_send = hang
    async with machine.boot(echo(), channel, settings=tries_hard(timeout=7.0)) as gateway:
        await gateway.accept([to("a", "m1"), to("b", "m2")])
        await gateway.wait_idle()
    assert when["m2"] == began[0]
    assert 7.5 <= began[1] - began[0] <= 8.001
    assert sorted(channel.texts()) == ["m1", "m2"]
    (delayed,) = machine.log.of(DeliveryDelayed)
    assert delayed.error == "the channel took too long"


# ----- notices


@pytest.mark.parametrize("how", ["hangs", "fails", "is refused", "is to wait", "has to go"])
async def test_p07_a_notice_is_tried_once_and_holds_up_little(
    machine: Machine, autojump_clock: MockClock, how: str
) -> None:
    """News of the gateway is best effort: dropped, no dead letter; the reply follows within 2 s."""
    channel = Platform(notices=True)
    errors: dict[str, Exception] = {
        "fails": ConnectionError("lost"),
        "is refused": Undeliverable("blocked"),
        "is to wait": RetryLater(1000),
        "has to go": ExceptionGroup("nursery", [RetryLater(1000)]),
    }
    notices: list[float] = []

    async def bad(delivery: Delivery) -> None:
        await trio.lowlevel.checkpoint()
        if delivery.kind is not ReplyKind.NOTICE:
            return
        notices.append(trio.current_time())
        if how == "hangs":
            await trio.sleep_forever()
        raise errors[how]

    channel.before_send = bad
    agent = Script(answer="{text}")
    settings = Settings(grace=20.0, budget=30.0)
    async with machine.boot(agent, channel, settings=settings) as gateway:
        await gateway.accept(to("a", "m1"))
        await agent.wait_begun(1)
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        agent.release()
        await channel.wait_sent(1)
        assert trio.current_time() - notices[0] <= 2.0
    assert channel.texts() == ["m1"]
    assert len(notices) == 1
    assert machine.rows("SELECT state FROM delivery WHERE kind = 'notice'") == [("dropped",)]
    assert dead_letters(machine) == ()


async def test_p07_a_notice_that_cannot_be_written_stops_nobody(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The disk is full when people are to be told that their turn goes on: it goes on."""
    channel = Platform(notices=True)
    agent = Script(answer="{text}")
    async with machine.boot(agent, channel) as gateway:
        await gateway.accept(to("a", "m1"))
        await agent.wait_begun(1)
        machine.crash()
        gateway.request_stop(now=True)

    def full_from_the_start(event: Event) -> None:
        if isinstance(event, GatewayStarted):
            machine.on_commit = fail

    def fail(moment: str) -> None:
        machine.on_commit = None
        raise apsw.FullError("full")

    machine.log.hooks.append(full_from_the_start)
    agent.release()
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
        assert gateway.stop_reason is None
    assert gateway.failure is None
    assert [d.text for d in channel.sent if d.kind is ReplyKind.ANSWER] == ["m1"]
    assert [event.operation for event in machine.log.of(StoreTrouble)] == ["notice"]


# ----- connections


async def test_p07_a_disconnected_channel_keeps_its_replies(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """An hour without a connection: no try is made, none is counted; then all of it, in order."""
    channel = Platform()
    other = MemoryChannel("other")
    agent = Script(answer="{text}")
    async with machine.boot(agent, channel, other, settings=tries_hard(max_tries=1)) as gateway:
        await gateway.accept([to("a", "m1"), to("a", "m2"), to("b", "m3")])
        await agent.wait_begun(2)
        channel.disconnect()
        await trio.sleep(1)
        agent.release()
        await gateway.accept(msg("x", "m4", "m4", channel="other"))
        await other.wait_sent(1)
        await trio.sleep(3600)
        assert channel.sent == []
        assert gateway.statistics()["undelivered"] == 2
        channel.connect()
        await gateway.wait_idle()
        settled_well(gateway)
    assert channel.texts("a") == ["m1", "m2"]
    assert channel.texts("b") == ["m3"]
    assert machine.log.of(DeliveryDelayed) == []


async def test_p07_a_connection_that_comes_and_goes(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """Lost ten times under load: every reply arrives once, in order, and no sender is lost."""
    channel = Platform()
    agent = echo()
    settings = Settings(limits=Limits(deliveries=3))
    async with machine.boot(agent, channel, settings=settings) as gateway:
        for n in range(10):
            await gateway.accept([to(f"s{k}", f"{n}-{k}") for k in range(10)])
            channel.break_down(ConnectionError("lost"))
            await trio.sleep(n / 3)
        await gateway.wait_idle()
        settled_well(gateway)
    for k in range(10):
        assert channel.texts(f"s{k}") == [f"{n}-{k}" for n in range(10)]
    assert channel.serving > 1


@pytest.mark.parametrize("most", [1, 7, 100])
async def test_p07_so_many_senders_and_no_more(
    machine: Machine, autojump_clock: MockClock, most: int
) -> None:
    """250 destinations, `limits.deliveries` at once, first come first served."""
    channel = Platform()
    now = peak = 0
    order: list[str] = []

    async def count(delivery: Delivery) -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        order.append(delivery.key)
        await trio.sleep(1)
        now -= 1

    channel.before_send = count
    limits = Limits(turns=1000, deliveries=most)
    async with machine.boot(echo(), channel, settings=Settings(limits=limits)) as gateway:
        await channel.wait_ready()
        began = trio.current_time()
        await gateway.accept([to(f"s{n}", f"m{n}") for n in range(250)])
        await gateway.wait_idle()
        took = trio.current_time() - began
    assert peak == most
    assert took == pytest.approx(-(-250 // most), abs=0.01)
    assert len(channel.sent) == 250
    if most == 1:
        assert order == [event.key for event in machine.log.of(ReplyCommitted)]


# ----- c45: the stop


@pytest.mark.parametrize("seconds", [1.0, 15.0])
@pytest.mark.parametrize("idempotent", [True, False])
async def test_c45_a_delivery_in_flight_counts_as_work(
    machine: Machine, autojump_clock: MockClock, seconds: float, idempotent: bool
) -> None:
    """No turn is open, one text is on its way: the stop waits for it, as for a turn, and no longer;
    it is recorded, and not sent again."""
    channel = Platform(idempotent=idempotent)
    on_the_way = trio.Event()

    async def slow(delivery: Delivery) -> None:
        on_the_way.set()
        await trio.sleep(seconds)

    channel.before_send = slow
    async with machine.boot(echo(), channel, settings=Settings(grace=20.0)) as gateway:
        await gateway.accept(to("a", "m1"))
        await on_the_way.wait()
        began = trio.current_time()
        gateway.request_stop()
    assert trio.current_time() - began == pytest.approx(seconds, abs=0.01)
    assert channel.got == [("m1", False)]
    assert state_of(machine, "m1") == ("delivered", 1, None)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
    assert len(channel.sent) == 1


async def test_c45_the_last_replies_of_a_drain_leave(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A turn that settles in the drain: what it says and its answer go out before the end."""
    channel = Platform()

    async def slow(delivery: Delivery) -> None:
        await trio.sleep(4)

    async def agent(turn: Turn) -> str:
        await turn.draining.wait_value(True)
        await turn.say("one")
        return "two"

    channel.before_send = slow
    async with machine.boot(agent, channel, settings=Settings(grace=20.0)) as gateway:
        await gateway.accept(to("a", "m1"))
        await trio.sleep(1)
    assert channel.texts() == ["one", "two"]
    assert gateway.report is not None
    assert not gateway.report.timed_out


async def test_c45_a_reply_whose_sending_has_not_begun_counts_too(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The last turn settles and its reply is just committed: the drain is not over, in whatever
    order Trio comes to the one and the other."""
    channel = Platform()

    async def slow(delivery: Delivery) -> None:
        await trio.sleep(5)

    async def agent(turn: Turn) -> str:
        await turn.draining.wait_value(True)
        return turn.text

    channel.before_send = slow
    for n in range(10):
        async with machine.boot(agent, channel, settings=Settings(grace=20.0)) as gateway:
            await channel.wait_ready()
            await gateway.accept(to("a", f"m{n}"))
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.01)
    assert channel.texts() == [f"m{n}" for n in range(10)]


async def test_c45_who_waits_for_a_sender_counts_too(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """One sender, three destinations: the stop waits for all three, one after the other."""
    channel = Platform()

    async def slow(delivery: Delivery) -> None:
        await trio.sleep(5)

    channel.before_send = slow
    settings = Settings(grace=20.0, limits=Limits(deliveries=1))
    async with machine.boot(echo(), channel, settings=settings) as gateway:
        await channel.wait_ready()
        await gateway.accept([to(f"s{n}", f"m{n}") for n in range(3)])
        await machine.log.wait_for(ReplyCommitted, 3)
        began = trio.current_time()
    assert trio.current_time() - began == pytest.approx(15.0, abs=0.01)
    assert sorted(channel.texts()) == ["m0", "m1", "m2"]


@pytest.mark.parametrize("how", ["hangs", "waits", "disconnected"])
async def test_c45_what_cannot_leave_does_not_hold_the_stop(
    machine: Machine, autojump_clock: MockClock, how: str
) -> None:
    """A send that hangs costs the windows and no more; a text that waits for its next try, or for a
    connection, is not in flight and costs a flush. All of them leave at the next boot."""
    channel = Platform()
    agent = Script(answer="{text}")
    failed = trio.Event()

    async def stuck(delivery: Delivery) -> None:
        failed.set()
        if how == "waits":
            raise RetryLater(600)
        await trio.sleep_forever()

    channel.before_send = stuck
    async with machine.boot(agent, channel, settings=Settings(grace=20.0, budget=30.0)) as gateway:
        await gateway.accept(to("a", "m1"))
        await agent.wait_begun(1)
        if how == "disconnected":
            channel.disconnect()
            await trio.sleep(1)
            failed.set()
        agent.release()
        await failed.wait()
        await trio.sleep(1)
        began = trio.current_time()
        plan = gateway.plan
    took = trio.current_time() - began
    assert took <= (plan.grace if how == "hangs" else 0) + plan.flush + 0.01
    assert gateway.report is not None
    assert gateway.report.undelivered == 1
    channel.before_send = None
    channel.connect()
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
    assert channel.texts() == ["m1"]


async def test_c45_a_hurried_stop_does_not_wait_for_a_delivery(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The second Ctrl-C ends the window for deliveries, too."""
    channel = Platform()

    async def slow(delivery: Delivery) -> None:
        await trio.sleep(15)

    channel.before_send = slow
    async with machine.boot(echo(), channel, settings=Settings(grace=20.0)) as gateway:
        await gateway.accept(to("a", "m1"))
        await trio.sleep(1)
        began = trio.current_time()
        gateway.request_stop(now=True)
        plan = gateway.plan
    assert trio.current_time() - began <= plan.flush + 0.01


async def test_c45_delivered_is_recorded_when_the_gateway_is_leaving(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """It arrives when the stop has given up waiting: recorded all the same, not sent again."""
    channel = Platform(idempotent=False)

    async def deaf(delivery: Delivery) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(100)

    channel.before_send = deaf
    async with machine.boot(echo(), channel, settings=Settings(grace=5.0)) as gateway:
        await gateway.accept([to("a", "m1"), to("a", "m2")])
        await trio.sleep(1)
    assert channel.got == [("m1", False)]
    assert state_of(machine, "m1") == ("delivered", 1, None)
    channel = Platform(idempotent=False)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
    assert [text for text, _ in channel.got] == ["m2"]


async def test_c45_an_arrival_that_could_not_be_written_is_tried_on_the_way_out(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """The disk was full when it arrived and is not any more: recorded before the store closes."""
    channel = Platform(idempotent=False)
    full = True

    def fail(moment: str) -> None:
        if full and channel.sent and moment == "before":
            raise apsw.FullError("full")

    machine.on_commit = fail
    async with machine.boot(echo(), channel, settings=Settings(grace=1.0, budget=5.0)) as gateway:
        await gateway.accept(to("a", "m1"))
        # Until the next try is further away than the whole stop may take.
        await machine.log.wait_for(StoreTrouble, 6)
        full = False
    assert state_of(machine, "m1") == ("delivered", 1, None)
    async with machine.boot(echo(), channel) as gateway:
        await gateway.wait_idle()
    assert channel.got == [("m1", False)]


async def test_c45_a_delivery_that_outlives_the_store_is_no_failure(
    machine: Machine, autojump_clock: MockClock
) -> None:
    """A deaf turn and a deaf channel: the store is closed without them. What arrives after that is
    for the next boot, and no failure of the gateway."""
    channel = Platform(idempotent=False)
    let_go = trio.Event()

    async def deaf(delivery: Delivery) -> None:
        with trio.CancelScope(shield=True):
            await let_go.wait()

    async def agent(turn: Turn) -> str:
        if turn.session.name == "a" or turn.resumed:
            return turn.text
        with trio.CancelScope(shield=True):
            await let_go.wait()
        return "too late"

    def leave(report: DrainReport) -> None:
        let_go.set()

    channel.before_send = deaf
    async with machine.boot(agent, channel, settings=Settings(grace=1.0, budget=5.0)) as gateway:
        gateway.on_unresponsive = leave
        await gateway.accept([to("a", "m1"), to("b", "m2")])
        await trio.sleep(1)
    assert gateway.failure is None
    channel = Platform(idempotent=False)
    async with machine.boot(agent, channel) as gateway:
        await gateway.wait_idle()
    assert sorted(channel.got) == [("m1", True), ("m2", False)]


# ----- promise 7, all of it


@pytest.mark.parametrize("idempotent", [True, False])
@pytest.mark.parametrize("seed", range(4))
async def test_p07_every_reply_arrives_or_is_a_dead_letter(
    machine: Machine, autojump_clock: MockClock, seed: int, idempotent: bool
) -> None:
    """A moody platform and a process that is killed six times at any commit: every committed reply
    arrives, in order, or is a dead letter; once where keys are honoured; elsewhere a second one
    says that it may be."""
    dice = random.Random(seed)
    channel = Platform(idempotent=idempotent)
    arrived: list[Delivery] = []

    async def moody(delivery: Delivery) -> None:
        await trio.sleep(dice.random())
        mood = dice.random()
        if mood < 0.1:
            raise RetryLater(dice.random() * 5)
        if mood < 0.2:
            raise ConnectionError("before")
        if "u" in delivery.text:
            raise Undeliverable("blocked")

    async def perhaps(delivery: Delivery) -> None:
        arrived.append(delivery)
        if dice.random() < 0.1:
            raise ConnectionError("after")
        await trio.lowlevel.checkpoint()

    channel.before_send, channel.after_send = moody, perhaps
    texts = [f"{n:02}{'u' if n % 7 == 3 else ''}" for n in range(24)]
    for life in range(7):
        async with machine.boot(echo(), channel, settings=Settings(grace=0.0)) as gateway:
            await gateway.accept([to(f"s{n % 4}", f"m{n}", text) for n, text in enumerate(texts)])
            if life == 6:
                await gateway.wait_idle()
                settled_well(gateway)
                break
            await trio.sleep(dice.random() * 2)
            counted = len(arrived)
            machine.crash()
            # What the dead process would not have sent, nobody has seen.
            channel.before_send = channel.after_send = None
            gateway.request_stop(now=True)
        del arrived[counted:]
        channel.before_send, channel.after_send = moody, perhaps
    check_invariants(machine.store, settled=True)
    assert sorted(str(letter.text) for letter in dead_letters(machine)) == [
        t for t in texts if "u" in t
    ]
    seen: dict[str, Delivery] = {}
    for delivery in arrived:
        again = delivery.key in seen
        assert not again or delivery.text == seen[delivery.key].text
        assert not again or delivery.repeat != idempotent
        assert not delivery.repeat or not idempotent
        seen.setdefault(delivery.key, delivery)
    for n in range(4):
        first_seen = [d.text for d in seen.values() if d.session.name == f"s{n}"]
        assert first_seen == [t for t in texts[n::4] if "u" not in t]
