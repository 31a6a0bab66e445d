"""Every commit crashed: each scenario is run, dying before and after every write transaction, then
booted, then checked. Nothing lost, nothing doubled, exactly the interrupted resumed.

Each life is a process of its own that is really killed; see `trio_gateway.testing`.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.lowlevel
from worlds import (
    Act,
    all_ended,
    answered_once,
    boot,
    boots,
    exactly_the_interrupted_resumed,
    noted,
    shown_to,
    sound_at_death,
)

from trio_gateway import (
    Busy,
    Event,
    Limits,
    ReceiptStatus,
    ResumeRules,
    Settings,
    StepInDoubt,
    Turn,
)
from trio_gateway._events import StopRequested, TurnSettled
from trio_gateway.store import (
    Ledger,
    Settled,
    Settlement,
    SqliteStore,
    edit_store,
    read_store,
)
from trio_gateway.testing import (
    CrashFailure,
    CrashReport,
    Life,
    Scenario,
    World,
    die,
    kill_my_agent_anywhere,
    live,
)

QUICK = Settings(grace=1.0, budget=10.0)


def kill_anywhere(
    scenario: Scenario, check: Callable[[World], None], *, deaths: int = 1, virtual: bool = True
) -> CrashReport:
    """A campaign over `scenario`; a store that is not sound at a death fails it, too."""
    return kill_my_agent_anywhere(
        scenario, check, after_death=sound_at_death, deaths=deaths, virtual_time=virtual
    )


async def echo(life: Life, turn: Turn) -> str:
    return f"re: {turn.text}"


# ----- the plain life of a message


async def plain(life: Life) -> None:
    channel = life.world.platform()
    async with boot(life, echo, channels=[channel]) as gateway:
        await channel.receive("ada", "m1", "hello")
        await gateway.wait_idle()


def check_plain(world: World) -> None:
    all_ended(world)
    answered_once(world, "m1")
    exactly_the_interrupted_resumed(world)
    assert shown_to(world, "ada") == ["re: hello"]


def test_p01_p05_p06_a_turn_is_killed_anywhere() -> None:
    report = kill_anywhere(plain, check_plain)
    # recover; accept and begin; settle; delivered; mark nothing; the end of the epoch
    assert report.commits == 6
    assert report.deaths == 12


def test_p05_p06_a_turn_is_killed_anywhere_and_its_recovery_too() -> None:
    report = kill_anywhere(plain, check_plain, deaths=2)
    assert report.deaths > 80


async def crowded(life: Life) -> None:
    channel = life.world.platform()

    async def talk(session: str) -> None:
        await channel.receive(session, f"{session}1", "one")
        await channel.receive_all(
            channel.message(session, f"{session}2", "two"),
            channel.message(session, f"{session}3", "three"),
        )

    settings = Settings(limits=Limits(turns=2))
    async with boot(life, echo, channels=[channel], settings=settings) as gateway:
        async with trio.open_nursery() as nursery:
            for session in ("a", "b", "c"):
                nursery.start_soon(talk, session)
        await gateway.wait_idle()


def check_crowded(world: World) -> None:
    all_ended(world)
    answered_once(world, *(f"{session}{n}" for session in "abc" for n in (1, 2, 3)))
    exactly_the_interrupted_resumed(world)
    for session in "abc":
        assert shown_to(world, session) == ["re: one", "re: two", "re: three"]


def test_p01_p02_p05_p06_sessions_that_wait_for_slots_are_killed_anywhere() -> None:
    kill_anywhere(crowded, check_crowded)


def test_p06_group_commit_on_the_real_thread_is_killed_anywhere() -> None:
    kill_anywhere(crowded, check_crowded, virtual=False)


# ----- what a turn does on its way


async def remembering(life: Life, turn: Turn) -> str:
    note = life.world.note

    async def do(what: str, result: str) -> str:
        await trio.lowlevel.checkpoint()
        note(f"did {what}")
        await trio.lowlevel.checkpoint()
        return result

    async def look() -> str:
        return await do("look", "seen")

    async def charge(key: str) -> str:
        return await do(f"charge {key}", "paid")

    async def shoot() -> str:
        return await do("shoot", "shot")

    if turn.resumed and "kept" in life.world.notes:
        assert turn.checkpointed == {"seen": "seen"}
    seen = await turn.step(look, effect="safe")
    note("has look")
    await turn.say("On it.")
    await turn.checkpoint({"seen": seen})
    note("kept")
    paid = await turn.step(charge, turn.idempotency_key("charge"))
    note("has charge")
    try:
        shot = await turn.step(shoot, effect="unsafe")
        note("has shoot")
    except StepInDoubt:
        shot = "in doubt"
    return f"{seen}, {paid}, {shot}"


async def errand(life: Life) -> None:
    channel = life.world.platform()
    async with boot(life, remembering, channels=[channel]) as gateway:
        await channel.receive("ada", "m1", "go")
        await gateway.wait_idle()


def check_errand(world: World) -> None:
    all_ended(world)
    answered_once(world, "m1")
    exactly_the_interrupted_resumed(world)
    said, answer = shown_to(world, "ada")
    assert said == "On it."
    assert answer in ("seen, paid, shot", "seen, paid, in doubt")
    done = noted(world, "did")
    assert len({deed for deed in done if deed.startswith("charge")}) == 1
    assert "shoot" in done or answer.endswith("in doubt")
    check_steps(world)


def check_steps(world: World) -> None:
    """Promise 8, of one turn that is `remembering`."""
    assert noted(world, "did").count("shoot") <= 1
    for deed in ("look", "charge", "shoot"):
        assert_not_done_after_had(world, deed)


def assert_not_done_after_had(world: World, deed: str) -> None:
    """Once the agent had a step's result, no later attempt runs it (promise 8)."""
    notes = world.notes
    if f"has {deed}" in notes:
        after = notes[notes.index(f"has {deed}") :]
        assert not [note for note in after if note.startswith(f"did {deed}")]


def test_p05_p08_says_steps_and_checkpoints_are_killed_anywhere() -> None:
    kill_anywhere(errand, check_errand)


async def failing(life: Life, turn: Turn) -> str:
    await turn.say("Let me see.")
    raise RuntimeError("the agent's own bug, with a secret in it")


async def fails(life: Life) -> None:
    channel = life.world.platform()
    async with boot(life, failing, channels=[channel]) as gateway:
        await channel.receive("ada", "m1", "go")
        await gateway.wait_idle()


def test_p06_a_turn_that_fails_is_killed_anywhere() -> None:
    def check(world: World) -> None:
        all_ended(world, m1="failed")
        answered_once(world, "m1")
        exactly_the_interrupted_resumed(world)
        assert not any("secret" in text for text in shown_to(world, "ada"))

    kill_anywhere(fails, check)


# ----- stopping


async def short_or_long(life: Life, turn: Turn) -> str:
    if turn.resumed is None:
        await trio.sleep(0.5 if turn.text == "short" else 1000)
    return f"re: {turn.text}"


async def mixed_stop(life: Life) -> None:
    """A settles within the window, B does not; then the next boot."""
    channel = life.world.platform()
    async with boot(life, short_or_long, channels=[channel], settings=QUICK) as gateway:
        await channel.receive("a", "m1", "short")
        await channel.receive("b", "m2", "long")
    async with boot(life, short_or_long, channels=[channel], settings=QUICK) as gateway:
        await gateway.wait_idle()


def check_mixed_stop(world: World) -> None:
    all_ended(world)
    answered_once(world, "m1", "m2")
    exactly_the_interrupted_resumed(world)


def test_p04_p05_c02_c03_a_mixed_stop_is_killed_anywhere() -> None:
    kill_anywhere(mixed_stop, check_mixed_stop)


@pytest.mark.parametrize("virtual", [True, False], ids=["in the loop", "on the thread"])
def test_p05_c03_killed_in_the_drain_after_one_turn_settled(tmp_path: Path, virtual: bool) -> None:
    world = World(tmp_path)

    def die_when_one_has_settled(event: Event) -> None:
        if isinstance(event, TurnSettled):
            die()

    async def first(life: Life) -> None:
        channel = life.world.platform()
        options = {"channels": [channel], "settings": QUICK, "listen": die_when_one_has_settled}
        async with boot(life, short_or_long, **options) as gateway:
            await channel.receive("a", "m1", "short")
            await channel.receive("b", "m2", "long")
            gateway.request_stop()

    async def second(life: Life) -> None:
        channel = life.world.platform()
        async with boot(life, short_or_long, channels=[channel]) as gateway:
            await gateway.wait_idle()

    assert live(first, world, virtual_time=virtual)
    sound_at_death(world)
    assert not live(second, world, number=2, virtual_time=virtual)
    check_mixed_stop(world)
    # Only B resumed, and kindly: it had been marked, not found RUNNING.
    assert [list(found.resumed.values()) for found in boots(world)] == [[], ["shutdown"]]


async def asking_to_restart(life: Life, turn: Turn) -> str:
    turn.request_restart()
    await trio.sleep(0.1)
    return "Restarting."


async def restart(life: Life) -> None:
    def hear(event: Event) -> None:
        if isinstance(event, StopRequested) and event.by.startswith("turn"):
            life.world.note("stopping")

    channel = life.world.platform()
    async with boot(life, asking_to_restart, channels=[channel], listen=hear) as gateway:
        await channel.receive("ada", "m1", "restart")
        await gateway.wait_idle()
        await trio.lowlevel.checkpoint()


def test_p13_c31_a_turn_that_asks_for_a_restart_is_killed_anywhere() -> None:
    def check(world: World) -> None:
        all_ended(world)
        answered_once(world, "m1")
        exactly_the_interrupted_resumed(world)
        assert world.notes.count("stopping") <= 1

    kill_anywhere(restart, check)


# ----- stopped by the user


async def hanging(life: Life, turn: Turn) -> str:
    await trio.sleep_forever()
    return "never said"


async def stopped(life: Life) -> None:
    channel = life.world.platform()
    async with boot(life, hanging, channels=[channel], settings=QUICK) as gateway:
        await channel.receive("ada", "m1", "never ends")
        await channel.receive("ada", "m2", "/stop")
        await gateway.wait_idle()


async def stopped_in_the_drain(life: Life) -> None:
    channel = life.world.platform()
    async with boot(life, hanging, channels=[channel], settings=QUICK) as gateway:
        await channel.receive("ada", "m1", "never ends")
        gateway.request_stop()
        await gateway.draining.wait_value(True)
        await channel.receive("ada", "m2", "/stop")
    async with boot(life, hanging, channels=[channel], settings=QUICK) as gateway:
        await gateway.wait_idle()


@pytest.mark.parametrize("scenario", [stopped, stopped_in_the_drain])
def test_p10_c06_a_stop_by_the_user_is_killed_anywhere(scenario: Scenario) -> None:
    def check(world: World) -> None:
        all_ended(world, m1="stopped")
        answered_once(world, "m2")
        exactly_the_interrupted_resumed(world, ended_instead=("STOPPED",))
        assert shown_to(world, "ada") == ["Stopped."]

    kill_anywhere(scenario, check)


# ----- messages that arrive during a turn


def busy(policy: Busy, act: Act) -> Scenario:
    """Three messages; the second and third arrive while the first one's turn runs."""

    async def scenario(life: Life) -> None:
        channel = life.world.platform()
        settings = Settings(busy=policy)
        async with boot(life, act, channels=[channel], settings=settings) as gateway:
            for number in (1, 2, 3):
                await channel.receive("ada", f"m{number}", str(number))
            await gateway.wait_idle()

    return scenario


async def slow(life: Life, turn: Turn) -> str:
    await trio.sleep(1)
    return f"re: {turn.text}"


async def until_replaced(life: Life, turn: Turn) -> str:
    if turn.message.id != "m3":
        await trio.sleep_forever()
    return f"re: {turn.text}"


async def steered(life: Life, turn: Turn) -> str:
    if len(turn.messages) < 3:
        async for _ in turn.arrivals():
            if len(turn.messages) == 3:
                break
    return f"re: {turn.text}"


@pytest.mark.parametrize(
    ("policy", "act"),
    [
        (Busy.QUEUE, slow),
        (Busy.COLLECT, slow),
        (Busy.INTERRUPT, until_replaced),
        (Busy.STEER, steered),
    ],
)
def test_p01_p02_p05_messages_during_a_turn_are_killed_anywhere(policy: Busy, act: Act) -> None:
    def check(world: World) -> None:
        all_ended(world)
        answered_once(world, "m1", "m2", "m3")
        # A newer message may come before the turn that it replaces has resumed.
        exactly_the_interrupted_resumed(world, ended_instead=("STOPPED",))
        said = "\n".join(text.removeprefix("re: ") for text in shown_to(world, "ada"))
        assert said.split() == ["1", "2", "3"]

    kill_anywhere(busy(policy, act), check)


async def polling(life: Life) -> None:
    """A platform that is polled: what comes next is what is after the cursor."""
    channel = life.world.platform()
    updates = [channel.message("ab"[n % 2], f"m{n}", str(n)) for n in range(5)]
    async with boot(life, echo, channels=[channel]) as gateway:
        while batch := updates[int(await channel.cursor() or "0") :][:2]:
            read = updates.index(batch[-1]) + 1
            for receipt in await channel.receive_all(*batch, cursor=str(read)):
                if receipt.status is not ReceiptStatus.ACCEPTED:
                    life.world.note(f"again {receipt.id}")
        await gateway.wait_idle()


def check_polling(world: World) -> None:
    all_ended(world)
    answered_once(world, "m0", "m1", "m2", "m3", "m4")
    exactly_the_interrupted_resumed(world)
    # Not even handed in twice: the cursor moves in the transaction of its messages.
    assert not noted(world, "again")


def test_p01_c34_batches_with_a_cursor_are_killed_anywhere() -> None:
    kill_anywhere(polling, check_polling)


# ----- deliveries


async def wordy(life: Life, turn: Turn) -> str:
    await turn.say("first of all, this")
    return "one two three four"


def deliveries(*, idempotent: bool) -> Scenario:
    async def scenario(life: Life) -> None:
        channel = life.world.platform(idempotent=idempotent, text_limit=10)
        async with boot(life, wordy, channels=[channel]) as gateway:
            await channel.receive("ada", "m1", "go")
            await gateway.wait_idle()

    return scenario


def check_deliveries(world: World) -> None:
    all_ended(world)
    answered_once(world, "m1")
    exactly_the_interrupted_resumed(world)
    assert "".join(shown_to(world, "ada")) == "first of all, thisone two three four"


def check_forgetful_deliveries(world: World) -> None:
    """On a platform that knows no keys, only what was on the wire at the death is sent again."""
    all_ended(world)
    answered_once(world, "m1", forgetful=True)
    exactly_the_interrupted_resumed(world)
    said = shown_to(world, "ada")
    assert "".join(said) == "first of all, thisone two three four"
    assert len(world.arrived()) <= len(said) + 1


def test_p07_c23_c40_deliveries_in_parts_are_killed_anywhere() -> None:
    kill_anywhere(deliveries(idempotent=True), check_deliveries)


def test_p07_c40_c43_deliveries_to_a_forgetful_platform_are_killed_anywhere() -> None:
    kill_anywhere(deliveries(idempotent=False), check_forgetful_deliveries)


# ----- put aside, and taken up again


async def needs_a_person(life: Life, turn: Turn) -> str:
    if "a person looked" not in life.world.notes:
        await trio.sleep_forever()
    return "after all"


async def quarantined_and_retried(life: Life) -> None:
    """Stopped in its only way to make progress, quarantined at boot, retried by a person."""
    world, channel = life.world, life.world.platform()
    rules = ResumeRules(max_interruptions=1)
    settings = Settings(grace=0.1, budget=10.0, resume=rules)
    options = {"channels": [channel], "settings": settings}
    async with boot(life, needs_a_person, **options):
        await channel.receive("ada", "m1", "go")
    async with boot(life, needs_a_person, **options):
        await trio.lowlevel.checkpoint()
    async with boot(life, needs_a_person, **options):
        await trio.lowlevel.checkpoint()
    if found := read_store(world.store).quarantine():
        edit_store(world.store, lambda ledger: ledger.retry_quarantined(found[0].turn))
    world.note("a person looked")
    async with boot(life, needs_a_person, **options) as gateway:
        await gateway.wait_idle()


def test_p09_c30_quarantine_and_retry_are_killed_anywhere() -> None:
    def check(world: World) -> None:
        all_ended(world)
        exactly_the_interrupted_resumed(world, ended_instead=("QUARANTINED",))
        finals = [text for text in world.shown() if text.final]
        # One apology for each turn that was put aside (the retry itself may die and be put aside),
        # each under a key of its own; then one answer.
        assert [text.kind for text in finals][-1:] == ["answer"]
        assert [text.kind for text in finals].count("answer") == 1
        assert len({text.key for text in finals}) == len(finals)

    kill_anywhere(quarantined_and_retried, check)


async def fails_once(life: Life, turn: Turn) -> str:
    async def look() -> str:
        life.world.note("did look")
        return "seen"

    seen = await turn.step(look)
    life.world.note("has look")
    if turn.message.id == "m1" and "/retry was said" not in life.world.notes:
        raise RuntimeError("not yet")
    return seen


async def retried(life: Life) -> None:
    channel = life.world.platform()
    async with boot(life, fails_once, channels=[channel]) as gateway:
        await channel.receive("ada", "m1", "go")
        await gateway.wait_idle()
        life.world.note("/retry was said")
        await channel.receive("ada", "m2", "/retry")
        await gateway.wait_idle()


def test_p08_a_retry_by_the_user_is_killed_anywhere() -> None:
    def check(world: World) -> None:
        all_ended(world)
        exactly_the_interrupted_resumed(world)
        assert_not_done_after_had(world, "look")
        assert shown_to(world, "ada")[-1] == "seen"

    kill_anywhere(retried, check)


async def expiring(life: Life) -> None:
    """Interrupted, and away for longer than `resume.within`."""
    channel = life.world.platform()
    settings = Settings(grace=0.1, budget=10.0, resume=ResumeRules(within=timedelta(hours=1)))
    async with boot(life, hanging, channels=[channel], settings=settings):
        await channel.receive("ada", "m1", "go")
    await trio.sleep(2 * 3600)
    async with boot(life, hanging, channels=[channel], settings=settings) as gateway:
        await gateway.wait_idle()


def test_c22_an_expiry_is_killed_anywhere() -> None:
    def check(world: World) -> None:
        all_ended(world, m1="expired")
        answered_once(world, "m1")  # the apology, once
        exactly_the_interrupted_resumed(world, ended_instead=("EXPIRED",))

    kill_anywhere(expiring, check)


# ----- the power of all this: known-bad gateways are caught


def patch(name: str, make: Callable[[Any], Any], owner: type = SqliteStore) -> Callable[[], None]:
    """Replace a method, in this process alone: that is, in one life."""

    def apply() -> None:
        setattr(owner, name, make(getattr(owner, name)))

    return apply


def reply_apart(settle: Any) -> Any:
    """The reply gets a transaction of its own, after the turn's."""

    async def apart(store: SqliteStore, end: Settlement) -> Settled:
        reply, end.reply = end.reply, None
        settled: Settled = await settle(store, end)
        if settled.applied and reply is not None:
            end.reply = reply
            key = f"{store.store_id}-{end.turn}-end"
            insert = partial(store._ledger._insert, attempt=end.attempt, turn=end.turn)
            settled.deliveries = await store._run(insert, end.session, end.session_id, reply, key)
        return settled

    return apart


def cursor_first(accept: Any) -> Any:
    """The cursor moves in a transaction before that of its messages."""

    async def apart(store: SqliteStore, arrivals: Any, cursor: Any = None) -> Any:
        await accept(store, [], cursor)
        return await accept(store, arrivals)

    return apart


def ids_of_this_life_only(accept_one: Any) -> Any:
    """Ids are recognised as long as the process lives."""

    def accept(ledger: Ledger, arrival: Any, now: int) -> Any:
        message = attrs.evolve(arrival.message, id=f"{arrival.message.id}@{ledger._epoch}")
        return accept_one(ledger, attrs.evolve(arrival, message=message), now)

    return accept


def nothing_recovered(recover: Any) -> Any:
    """A boot overlooks what was interrupted."""

    def overlook(ledger: Ledger) -> Any:
        return attrs.evolve(recover(ledger), turns=())

    return overlook


def says_yes(method: Any) -> Any:
    """Nothing is written, and nobody told."""

    async def yes(store: SqliteStore, *args: Any) -> bool:
        return True

    return yes


KNOWN_BAD: dict[str, tuple[Callable[[], None], Scenario, Callable[[World], None]]] = {
    "the reply is committed after its turn": (patch("settle", reply_apart), plain, check_plain),
    "the cursor is committed before its messages": (
        patch("accept", cursor_first),
        polling,
        check_polling,
    ),
    "ids are kept in memory": (
        patch("_accept_one", ids_of_this_life_only, Ledger),
        plain,
        check_plain,
    ),
    "interrupted turns are overlooked": (
        patch("recover", nothing_recovered, Ledger),
        plain,
        check_plain,
    ),
    "steps are not remembered": (patch("remember", says_yes), errand, check_errand),
    "arrivals are not recorded": (patch("delivered", says_yes), plain, check_plain),
    "sendings are not recorded": (
        patch("sending", says_yes),
        deliveries(idempotent=False),
        check_forgetful_deliveries,
    ),
}


@pytest.mark.parametrize("fault", KNOWN_BAD)
def test_a_gateway_that_is_known_to_be_bad_is_caught(fault: str) -> None:
    break_it, scenario, check = KNOWN_BAD[fault]

    async def broken(life: Life) -> None:
        break_it()
        await scenario(life)

    with pytest.raises(CrashFailure) as caught:
        kill_anywhere(broken, check)
    print(f"{fault}: {caught.value}")
