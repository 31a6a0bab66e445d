"""What every store must do: the contract of `trio_gateway.store`, as a suite.

    @pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
    async def test_my_store_keeps_the_contract(check):
        await check(open_my_store)

or all of it at once: `await check_store(open_my_store)`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC
from typing import Final, TypeAlias

import attrs
import trio

from .. import (
    Cursor,
    Delivery,
    Marker,
    Message,
    ReceiptStatus,
    ReplyKind,
    ResumeReason,
    SessionKey,
    TurnState,
)
from ..store import (
    Admitted,
    Arrival,
    Begin,
    NewReply,
    OpenTurn,
    Recovered,
    Settlement,
    Store,
)
from ._rules import Check, plainly, rule

OpenStore: TypeAlias = Callable[[str], AbstractAsyncContextManager[Store]]
"""Opens the store of that name: a new one, or what an earlier block has left there. Leaving the
block closes it without any farewell, so that the next one finds what a crash would have left."""

FOREVER: Final = 1 << 62
"""Later than any moment, in microseconds since 1970."""


async def check_store(open_store: OpenStore) -> None:
    """Hold a store to the contract. Raises `AssertionError`, with the rule that it breaks.

    Every check opens stores of its own, by names that begin with the check's.
    """
    for check in STORE_CHECKS:
        await check(open_store)


# ----- small tools


@asynccontextmanager
async def _boot(open_store: OpenStore, name: str) -> AsyncGenerator[tuple[Store, Recovered]]:
    async with open_store(name) as store:
        yield store, await store.recover()


def _message(session: str, id: str) -> Message:
    return Message(session=session, id=id, text=f"text of {id}", sender="somebody", channel="chat")


def _arrival(session: str, id: str, *, begin: bool = False, interrupt: bool = False) -> Arrival:
    message = _message(session, id)
    return Arrival(message, message.key, begin=begin, interrupt=interrupt)


async def _accept(store: Store, session: str, id: str) -> Admitted:
    (admitted,) = await store.accept([_arrival(session, id)])
    return admitted


async def _begin(store: Store, session: str, id: str) -> OpenTurn:
    """A message that begins its turn as it is accepted."""
    (admitted,) = await store.accept([_arrival(session, id, begin=True)])
    rule(admitted.turn is not None, "an arrival that may begin a turn begins one", admitted)
    assert admitted.turn is not None
    return admitted.turn


def _next(turn: OpenTurn) -> Begin:
    return Begin(turn.session, turn.session_id, False)


def _reply(text: str, *about: str, n: int = 0, final: bool = True) -> NewReply:
    kind = ReplyKind.ANSWER if final else ReplyKind.SAY
    return NewReply(n, kind, (text,), final, about)


def _end(
    turn: OpenTurn,
    state: TurnState = TurnState.COMPLETED,
    *,
    attempt: int | None = None,
    begin_next: bool = False,
    parts: tuple[str, ...] = ("done",),
) -> Settlement:
    kind = ReplyKind.ANSWER if state is TurnState.COMPLETED else ReplyKind.APOLOGY
    about = tuple(message.id for message in turn.messages)
    return Settlement(
        turn.id,
        attempt or turn.attempt,
        turn.session,
        turn.session_id,
        state,
        NewReply(0, kind, parts, True, about),
        None if state is TurnState.COMPLETED else "why",
        _next(turn) if begin_next else None,
    )


async def _state_of(store: Store, id: str) -> str | None:
    return (await store.replies_to("chat", id))[0]


async def _open_ids(store: Store) -> list[int]:
    return [row.turn for row in await store.open_turns()]


def _texts(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.text for delivery in deliveries]


# ----- who it is


async def check_identity(open_store: OpenStore) -> None:
    """A store has an id, which stays; another store has another."""
    async with open_store("identity a") as store:
        first = store.store_id
    async with open_store("identity a") as store:
        rule(store.store_id == first, "a store keeps its id", store.store_id)
    async with open_store("identity b") as store:
        rule(store.store_id != first, "two stores have two ids", store.store_id)


async def check_epochs(open_store: OpenStore) -> None:
    """Every boot is an epoch of its own, and learns how the last one ended."""
    async with _boot(open_store, "epochs") as (store, one):
        rule(one.previous_stop == "first", "the first epoch has none before it", one.previous_stop)
        await store.touch()
    async with _boot(open_store, "epochs") as (store, two):
        rule(two.epoch > one.epoch, "epochs count up", (one.epoch, two.epoch))
        rule(two.previous_stop is None, "an epoch that died has no ending", two.previous_stop)
        await store.end_epoch("shutdown")
    async with _boot(open_store, "epochs") as (_, three):
        rule(three.previous_stop == "shutdown", "an ending is kept", three.previous_stop)


# ----- the inbox


async def check_accept_inserts_if_absent(open_store: OpenStore) -> None:
    """A second arrival of an id is recognised: in a batch, later, and after a crash (promise 1)."""
    async with _boot(open_store, "accept") as (store, _):
        batch = [_arrival("a", "m1"), _arrival("a", "m2"), _arrival("a", "m1")]
        receipts = [admitted.receipt for admitted in await store.accept(batch)]
        accepted, duplicate = ReceiptStatus.ACCEPTED, ReceiptStatus.DUPLICATE
        statuses = [receipt.status for receipt in receipts]
        rule(statuses == [accepted, accepted, duplicate], "one id, one message", statuses)
        rule([r.id for r in receipts] == ["m1", "m2", "m1"], "receipts are in order", receipts)
    async with _boot(open_store, "accept") as (store, recovered):
        again = await _accept(store, "a", "m1")
        rule(again.receipt.status is duplicate, "ids are known after a crash", again)
        other = await store.accept([Arrival(m := Message(session="a", id="m1", text=""), m.key)])
        rule(other[0].receipt.status is accepted, "ids are a channel's own", other)
        waiting = [(w.session, w.queued) for w in recovered.waiting]
        rule(waiting == [(SessionKey("chat", "a"), 2)], "mail waits across boots", waiting)
        rule(recovered.open_messages == 2, "open messages are counted", recovered.open_messages)


async def check_a_duplicate_begins_nothing(open_store: OpenStore) -> None:
    """An id that is known begins no turn, whatever became of its message."""
    async with _boot(open_store, "duplicate") as (store, _):
        turn = await _begin(store, "a", "m1")
        await store.settle(_end(turn))
        (again,) = await store.accept([_arrival("a", "m1", begin=True)])
        rule(again.turn is None, "a duplicate begins no turn", again)
        rule(await _open_ids(store) == [], "a duplicate begins no turn", await _open_ids(store))


async def check_cursor_moves_with_its_messages(open_store: OpenStore) -> None:
    """A cursor is a channel's own, and is committed with the messages that it covers."""
    async with _boot(open_store, "cursor") as (store, _):
        rule(await store.cursor("chat") is None, "a new channel has no cursor")
        await store.accept([_arrival("a", "m1")], Cursor(channel="chat", value="1"))
        await store.accept([], Cursor(channel="chat", value="2"))
        await store.accept([_arrival("a", "m2")])
    async with _boot(open_store, "cursor") as (store, _):
        rule(await store.cursor("chat") == "2", "a cursor is kept", await store.cursor("chat"))
        rule(await store.cursor("other") is None, "a cursor is its channel's own")


async def check_interrupt_stops_and_requeues(open_store: OpenStore) -> None:
    """An arrival that interrupts ends the open turn; its messages wait again, and the next turn
    gets them with the newer one, also after a crash."""
    async with _boot(open_store, "interrupt") as (store, _):
        turn = await _begin(store, "a", "m1")
        (admitted,) = await store.accept([_arrival("a", "m2", interrupt=True)])
        rule(admitted.stopped == turn.id, "the open turn is stopped", admitted)
        rule(admitted.queued == 2, "both messages wait", admitted.queued)
        late = await store.settle(_end(turn))
        rule(not late.applied, "a turn that was replaced cannot settle", late)
    async with _boot(open_store, "interrupt") as (store, _):
        begun = (await store.begin(_next(turn))).turn
        ids = [] if begun is None else [message.id for message in begun.messages]
        rule(ids == ["m1", "m2"], "the next turn gets both", ids)


# ----- turns


async def check_begin(open_store: OpenStore) -> None:
    """A begin takes what waits longest, or all of it, and finds nothing where nothing waits."""
    async with _boot(open_store, "begin") as (store, _):
        first = await _begin(store, "a", "m1")
        rule(first.messages == (_message("a", "m1"),), "messages come back intact", first.messages)
        rule((first.attempt, first.resumed) == (1, None), "a turn begins with attempt 1", first)
        for id in ("m2", "m3", "m4"):
            await _accept(store, "a", id)
        await store.settle(_end(first))
        second = (await store.begin(_next(first))).turn
        assert second is not None
        rule([m.id for m in second.messages] == ["m2"], "what waits longest is next", second)
        rule(second.id > first.id, "turns count up", (first.id, second.id))
        await store.settle(_end(second))
        third = (await store.begin(Begin(first.session, first.session_id, True))).turn
        assert third is not None
        rule([m.id for m in third.messages] == ["m3", "m4"], "collect takes all", third)
        await store.settle(_end(third))
        empty = await store.begin(_next(first))
        rule(empty.turn is None, "no mail, no turn", empty)


async def check_settle_is_one_change(open_store: OpenStore) -> None:
    """A settle ends turn and messages, commits the reply, and begins the next turn (promise 6)."""
    async with _boot(open_store, "settle") as (store, _):
        turn = await _begin(store, "a", "m1")
        await _accept(store, "a", "m2")
        settled = await store.settle(_end(turn, begin_next=True, parts=("one ", "two")))
        rule(settled.applied, "an open turn settles", settled)
        rule(_texts(settled.deliveries) == ["one ", "two"], "the reply is handed out", settled)
        finals = [delivery.final for delivery in settled.deliveries]
        rule(finals == [False, True], "the last part is final", finals)
        assert settled.next is not None
        assert settled.next.turn is not None
        following = settled.next.turn
        rule([m.id for m in following.messages] == ["m2"], "the next turn begins", following)
        rule(await _open_ids(store) == [following.id], "one is open", await _open_ids(store))
        state, replies = await store.replies_to("chat", "m1")
        rule(state == "answered", "the message has ended", state)
        rule([reply.text for reply in replies] == ["one two"], "parts are one reply", replies)
    async with _boot(open_store, "settle") as (_, recovered):
        rule([t.id for t in recovered.turns] == [following.id], "what settled is over", recovered)
        keys = [delivery.key for delivery in recovered.deliveries]
        rule(keys == [d.key for d in settled.deliveries], "replies keep their keys", keys)


async def check_settle_asked_twice(open_store: OpenStore) -> None:
    """Whoever does not know whether a settle was written asks again, and learns the same."""
    async with _boot(open_store, "twice") as (store, _):
        turn = await _begin(store, "a", "m1")
        end = _end(turn, parts=("one", "two"))
        first, second = await store.settle(end), await store.settle(end)
        rule(second.applied, "the same end applies again", second)
        rule(second.deliveries == first.deliveries, "with the same replies", second.deliveries)
        failed = await store.settle(_end(turn, TurnState.FAILED))
        rule(not failed.applied, "another end does not apply", failed)
        rule(await _state_of(store, "m1") == "answered", "an end has no way out")
    async with _boot(open_store, "twice") as (_, recovered):
        rule(len(recovered.deliveries) == 2, "nothing was doubled", recovered.deliveries)


async def check_each_end(open_store: OpenStore) -> None:
    """A message ends as its turn does."""
    async with _boot(open_store, "ends") as (store, _):
        for state, end in ((TurnState.COMPLETED, "answered"), (TurnState.FAILED, "failed")):
            turn = await _begin(store, "a", end)
            await store.settle(_end(turn, state))
            rule(await _state_of(store, end) == end, "a message ends with its turn", state)


async def check_clear_resume_pending(open_store: OpenStore) -> None:
    """The second line of a stop: ends of completed children that were not written yet."""
    async with _boot(open_store, "clear") as (store, _):
        done, settled = await _begin(store, "a", "m1"), await _begin(store, "b", "m2")
        await store.mark_resume_pending(ResumeReason.SHUTDOWN)
        await store.settle(_end(settled))
        results = await store.clear_resume_pending([_end(done), _end(settled)])
        rule([r.applied for r in results] == [True, True], "both are over", results)
    async with _boot(open_store, "clear") as (_, recovered):
        rule(recovered.turns == (), "nothing resumes that completed", recovered.turns)
        rule(len(recovered.deliveries) == 2, "nothing is doubled", recovered.deliveries)


# ----- marking, crashing, resuming


async def check_marking(open_store: OpenStore) -> None:
    """A mark marks every running turn of this epoch, once (promise 4), and charges nothing."""
    async with _boot(open_store, "mark") as (store, _):
        rule(await store.mark_resume_pending(ResumeReason.RESTART) == 0, "nothing to mark")
        first, second = await _begin(store, "a", "m1"), await _begin(store, "b", "m2")
        over = await _begin(store, "c", "m3")
        await store.settle(_end(over))
        count = await store.mark_resume_pending(ResumeReason.RESTART)
        rule(count == 2, "every running turn is marked, and no other", count)
        again = await store.mark_resume_pending(ResumeReason.SHUTDOWN)
        rule(again == 0, "a second mark changes nothing", again)
        settled = await store.settle(_end(second))
        rule(settled.applied, "a marked turn may still settle", settled)
    async with _boot(open_store, "mark") as (_, recovered):
        (pending,) = recovered.turns
        marker = pending.marker
        rule(pending.id == first.id, "exactly the interrupted is left (promise 5)", pending)
        rule(marker.reason is ResumeReason.RESTART, "the first reason counts", marker)
        charged = (marker.crashes, marker.interruptions)
        rule(charged == (0, 1), "a planned stop charges nothing (promise 9)", charged)


async def check_crash_is_charged(open_store: OpenStore) -> None:
    """What a dead epoch left RUNNING crashed, and is charged before it resumes, at every crash."""
    async with _boot(open_store, "crash") as (store, _):
        turn = await _begin(store, "a", "m1")
        await _accept(store, "idle", "m2")
    for crashes in (1, 2):
        async with _boot(open_store, "crash") as (store, recovered):
            (pending,) = recovered.turns
            rule(pending.marker.reason is ResumeReason.CRASH, "it crashed", pending.marker)
            rule(pending.marker.crashes == crashes, "each crash is counted", pending.marker)
            rule(pending.message_ids == ("m1",), "its messages are known", pending.message_ids)
            resumed = await store.resume(pending)
            assert resumed is not None
            rule(resumed.attempt == crashes + 1, "a resume is a new attempt", resumed)
            assert resumed.resumed is not None
            rule(resumed.resumed.attempt == crashes, "it knows the attempt before", resumed)
            rule(resumed.resumed.at.tzinfo is UTC, "times are aware UTC", resumed.resumed.at)
            rule(resumed.messages == turn.messages, "it has its original messages", resumed)


async def check_unresumed_keeps_its_marker(open_store: OpenStore) -> None:
    """A boot that does not come to a turn charges it nothing more."""
    async with _boot(open_store, "unresumed") as (store, _):
        await _begin(store, "a", "m1")
        await store.mark_resume_pending(ResumeReason.SHUTDOWN)
    markers: list[Marker] = []
    for _ in range(3):
        async with _boot(open_store, "unresumed") as (_, recovered):
            markers.append(recovered.turns[0].marker)
    rule(markers[0] == markers[1] == markers[2], "waiting is no crime", markers)


async def check_late_attempt_changes_nothing(open_store: OpenStore) -> None:
    """Whatever an attempt that is over does, it finds that it is over (compare-and-set)."""
    async with _boot(open_store, "late") as (store, _):
        old = await _begin(store, "a", "m1")
    async with _boot(open_store, "late") as (store, recovered):
        (pending,) = recovered.turns
        before = await store.settle(_end(old))
        rule(not before.applied, "nobody settles a turn that waits to resume", before)
        new = await store.resume(pending)
        assert new is not None
        rule(await store.resume(pending) is None, "nobody resumes an attempt twice")
        rule(not (await store.settle(_end(old))).applied, "the old attempt cannot settle")
        rule(not await store.begin_step(old.id, 1, "s", "unsafe"), "nor begin a step")
        rule(not await store.remember(old.id, 1, "s", "safe", "1", 1), "nor remember one")
        rule(not await store.checkpoint(old.id, 1, "1"), "nor keep a checkpoint")
        said = await store.say(old.id, 1, old.session, old.session_id, _reply("hi", n=1))
        rule(said is None, "nor say anything", said)
        taken = await store.take(old.id, 1, _next(old))
        rule(taken.message is None, "nor take mail", taken)
        rule(await _open_ids(store) == [new.id], "the new one is untouched")
        rule((await store.settle(_end(new))).applied, "and settles")


async def check_end_pending(open_store: OpenStore) -> None:
    """A boot can end what it does not resume: once, and not what was resumed meanwhile."""
    async with _boot(open_store, "pending") as (store, _):
        for session in ("a", "b", "c"):
            await _begin(store, session, session)
    async with _boot(open_store, "pending") as (store, recovered):
        quarantined, expired, resumed = recovered.turns
        await store.resume(resumed)
        turns = {p.id: OpenTurn(p.id, p.session, p.session_id, 1, ()) for p in recovered.turns}
        ends = [
            _end(turns[quarantined.id], TurnState.QUARANTINED),
            _end(turns[expired.id], TurnState.EXPIRED),
            _end(turns[resumed.id], TurnState.EXPIRED),
        ]
        applied = [settled.applied for settled in await store.end_pending(ends)]
        rule(applied == [True, True, False], "what waits to resume can be ended", applied)
        again = [settled.applied for settled in await store.end_pending(ends[:2])]
        rule(again == [False, False], "once", again)
        states = [await _state_of(store, id) for id in ("a", "b", "c")]
        rule(states == ["quarantined", "expired", "running"], "with their messages", states)
        rule(await _open_ids(store) == [resumed.id], "the resumed one goes on")


async def check_stopped_is_stopped(open_store: OpenStore) -> None:
    """A turn that the user stopped never comes back, whatever happens next (promise 10)."""
    async with _boot(open_store, "stopped") as (store, _):
        running, marked = await _begin(store, "a", "m1"), await _begin(store, "b", "m2")
        none = await store.stop_by_key(SessionKey("chat", "nobody"))
        rule(none == (None, ()), "an unknown session has nothing to stop", none)
        stopped = await store.stop_by_key(running.session)
        rule(stopped == (running.id, ("m1",)), "the open turn is stopped", stopped)
        await store.mark_resume_pending(ResumeReason.SHUTDOWN)
        await store.stop_by_key(marked.session)
        rule(not (await store.settle(_end(running))).applied, "a late end changes nothing")
        rule(await _state_of(store, "m1") == "stopped", "its message is stopped")
    async with _boot(open_store, "stopped") as (_, recovered):
        rule(recovered.turns == (), "it does not come back", recovered.turns)


# ----- what a turn does on its way


async def check_steps(open_store: OpenStore) -> None:
    """A step's result is there for every later attempt; an unsafe one leaves a trace before it
    runs (promise 8)."""
    async with _boot(open_store, "steps") as (store, _):
        turn = await _begin(store, "a", "m1")
        rule(await store.remember(turn.id, 1, "think", "safe", '"x"', 1), "a step is kept")
        rule(await store.begin_step(turn.id, 1, "charge", "unsafe"), "so is its begin")
        await store.begin_step(turn.id, 1, "mail", "unsafe")
        await store.remember(turn.id, 1, "mail", "unsafe", '"sent"', 1)
    async with _boot(open_store, "steps") as (store, recovered):
        resumed = await store.resume(recovered.turns[0])
        assert resumed is not None
        steps = {s.name: (s.done, s.result) for s in (resumed.steps or {}).values()}
        expected = {"think": (True, '"x"'), "charge": (False, None), "mail": (True, '"sent"')}
        rule(steps == expected, "steps come back", steps)


async def check_checkpoints_and_progress(open_store: OpenStore) -> None:
    """The last checkpoint counts; progress forgives planned stops, and no crash."""
    async with _boot(open_store, "progress") as (store, _):
        await _begin(store, "a", "m1")
        await store.mark_resume_pending(ResumeReason.SHUTDOWN)
    async with _boot(open_store, "progress") as (store, recovered):
        resumed = await store.resume(recovered.turns[0])
        assert resumed is not None
        rule(resumed.checkpoint is None, "no checkpoint yet", resumed.checkpoint)
        await store.checkpoint(resumed.id, 2, "[1]")
        await store.checkpoint(resumed.id, 2, "[2]")
        await store.ask_restart(resumed.id)
    async with _boot(open_store, "progress") as (store, recovered):
        marker = recovered.turns[0].marker
        charged = (marker.crashes, marker.interruptions)
        rule(charged == (1, 0), "progress forgives what was planned alone", charged)
        resumed = await store.resume(recovered.turns[0])
        assert resumed is not None
        rule(resumed.checkpoint == "[2]", "the last checkpoint counts", resumed.checkpoint)
        rule(resumed.restart_asked, "a restart that was asked for is remembered", resumed)


async def check_saying_again(open_store: OpenStore) -> None:
    """The n-th thing said has one key; said again by a later attempt, it is not heard twice, but
    something else at its place is."""
    async with _boot(open_store, "say") as (store, _):
        turn = await _begin(store, "a", "m1")
        place = (turn.session, turn.session_id)
        first = await store.say(turn.id, 1, *place, _reply("on it", "m1", n=1, final=False))
        assert first is not None
        rule(_texts(first.deliveries) == ["on it"], "what is said is handed out", first)
        second = await store.say(turn.id, 1, *place, _reply("still", "m1", n=2, final=False))
        assert second is not None
        keys = {first.deliveries[0].key, second.deliveries[0].key}
        rule(len(keys) == 2, "two texts, two keys", keys)
    async with _boot(open_store, "say") as (store, recovered):
        await store.resume(recovered.turns[0])
        again = await store.say(turn.id, 2, *place, _reply("on it", "m1", n=1, final=False))
        assert again is not None
        rule(again.repeated and not again.deliveries, "the same is not heard twice", again)
        other = await store.say(turn.id, 2, *place, _reply("changed", "m1", n=2, final=False))
        assert other is not None
        rule(_texts(other.deliveries) == ["changed"], "something else is heard", other)
        rule(other.deliveries[0].key not in keys, "under a key of its own", other)


async def check_take(open_store: OpenStore) -> None:
    """A running turn can take mail; what it took is its own, also when it resumes."""
    async with _boot(open_store, "take") as (store, _):
        turn = await _begin(store, "a", "m1")
        none = await store.take(turn.id, 1, _next(turn))
        rule(none.message is None, "no mail, nothing taken", none)
        for id in ("m2", "m3"):
            await _accept(store, "a", id)
        taken = await store.take(turn.id, 1, _next(turn))
        rule(taken.message == _message("a", "m2"), "what waits longest is taken", taken)
    async with _boot(open_store, "take") as (store, recovered):
        (pending,) = recovered.turns
        rule(pending.message_ids == ("m1", "m2"), "the turn has both", pending.message_ids)
        ids = [message.id for message in await store.messages_of(pending)]
        rule(ids == ["m1", "m2"], "in the order of acceptance", ids)
        resumed = await store.resume(pending)
        assert resumed is not None
        await store.settle(_end(resumed))
        states = [await _state_of(store, id) for id in ("m1", "m2", "m3")]
        rule(states == ["answered", "answered", "queued"], "it answers what it took", states)


# ----- the outbox


async def check_outbox(open_store: OpenStore) -> None:
    """What has not arrived comes back at boot, in order; what was on the wire is in doubt."""
    async with _boot(open_store, "outbox") as (store, _):
        turn = await _begin(store, "a", "m1")
        made = (await store.settle(_end(turn, parts=tuple("abcdef")))).deliveries
        arrived, wire, later, dead, dropped, untouched = (delivery.id for delivery in made)
        await store.delivered([(arrived, 1)])
        await store.sending(wire)
        await store.delayed(later, 3, FOREVER, "busy", False)
        await store.dead(dead, 5, "gone")
        await store.drop(dropped, "late")
    async with _boot(open_store, "outbox") as (store, recovered):
        found = recovered.deliveries
        rule([d.id for d in found] == [wire, later, untouched], "the rest comes back", found)
        rule([d.repeat for d in found] == [True, False, False], "in doubt: on the wire", found)
        rule(found[1].tries == 3, "tries are kept", found[1])
        rule(found[1].not_before is not None, "so is when to come back", found[1])
        rule([d.key for d in found] == [made[1].key, made[2].key, made[5].key], "keys stay", found)
        await store.delivered([(delivery.id, 1) for delivery in found])
    async with _boot(open_store, "outbox") as (_, recovered):
        rule(recovered.deliveries == (), "what arrived is over", recovered.deliveries)


async def check_notices(open_store: OpenStore) -> None:
    """One notice per session, kind and epoch; none outlives its epoch."""
    async with _boot(open_store, "notices") as (store, _):
        turn = await _begin(store, "a", "m1")
        who = [(turn.session, turn.session_id)]
        first, again = await store.notify(who, "x", "news"), await store.notify(who, "x", "news")
        rule((len(first), len(again)) == (1, 0), "one is enough", (first, again))
        rule(first[0].kind is ReplyKind.NOTICE, "it is called a notice", first)
    async with _boot(open_store, "notices") as (_, recovered):
        rule(recovered.deliveries == (), "yesterday's news is dropped", recovered.deliveries)


# ----- looking back


async def check_history(open_store: OpenStore) -> None:
    """A conversation's past, oldest first: before a turn, or before now."""
    async with _boot(open_store, "history") as (store, _):
        first = await _begin(store, "a", "m1")
        place = (first.session, first.session_id)
        await store.say(first.id, 1, *place, _reply("well, ", "m1", n=1, final=False))
        await store.settle(_end(first, parts=("one ", "two")))
        second = await _begin(store, "a", "m2")
        lines = await store.history(first.session, second.id, 10)
        told = [(line.role, line.text) for line in lines]
        expected = [("user", "text of m1"), ("agent", "well, "), ("agent", "one two")]
        rule(told == expected, "the past is what came before the turn", told)
        rule(len(await store.history(first.session, second.id, 1)) == 1, "a limit is a limit")
        now = await store.history(first.session, None, 10)
        rule(len(now) == 4, "before now is all of it", now)
        nobody = await store.history(SessionKey("chat", "nobody"), None, 10)
        rule(nobody == (), "an unknown session has no past", nobody)
        unseen = await store.replies_to("chat", "unseen")
        rule(unseen == (None, ()), "an unknown message has no fate", unseen)


async def check_forget(open_store: OpenStore) -> None:
    """Retention takes texts, then ids, of what has ended; never of what is open."""
    async with _boot(open_store, "forget") as (store, _):
        over, running = await _begin(store, "a", "m1"), await _begin(store, "b", "m2")
        settled = await store.settle(_end(over))
        await store.delivered([(delivery.id, 1) for delivery in settled.deliveries])
        await _accept(store, "b", "m3")
        nothing = await store.forget(0, 0, 0)
        rule((nothing.texts, nothing.messages) == (0, 0), "nothing is old enough", nothing)
        texts = await store.forget(0, FOREVER, 0)
        rule((texts.texts, texts.messages) == (1, 0), "the text goes first", texts)
        known = await _accept(store, "a", "m1")
        rule(known.receipt.status is ReceiptStatus.DUPLICATE, "the id is still known", known)
        ids = await store.forget(0, FOREVER, FOREVER)
        rule((ids.texts, ids.messages) == (0, 1), "then the id", ids)
        unknown = await _accept(store, "a", "m1")
        rule(unknown.receipt.status is ReceiptStatus.ACCEPTED, "which is new again", unknown)
    async with _boot(open_store, "forget") as (store, recovered):
        (pending,) = recovered.turns
        rule(pending.id == running.id, "what is open is kept", pending)
        rule(await store.messages_of(pending) == (_message("b", "m2"),), "with its text", pending)


async def check_a_message_keeps_its_trace(open_store: OpenStore) -> None:
    """The trace of a message is kept with it, and that of a reply with the delivery: both are there
    after a crash. When each message was accepted is told with its turn."""
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    traced = attrs.evolve(_message("a", "m1"), traceparent=parent)
    async with _boot(open_store, "trace") as (store, _):
        (admitted,) = await store.accept([Arrival(traced, traced.key)])
        begun = await store.begin(Begin(traced.key, admitted.session_id, False))
        rule(begun.turn is not None, "what waits can begin", begun)
        assert begun.turn is not None
        rule(begun.turn.messages == (traced,), "a message waits with its trace", begun)
        at = begun.turn.accepted_at
        rule(len(at) == 1 and 0 < at[0] <= begun.turn.began_at, "it was accepted before", begun)
        reply = attrs.evolve(_reply("said", "m1", n=1, final=False), traceparent=parent)
        turn = begun.turn
        said = await store.say(turn.id, 1, turn.session, turn.session_id, reply)
        rule(said is not None and said.deliveries[0].traceparent == parent, "a reply, too", said)
    async with _boot(open_store, "trace") as (store, recovered):
        rule(recovered.deliveries[0].traceparent == parent, "also after a crash", recovered)
        resumed = await store.resume(recovered.turns[0])
        rule(resumed is not None and resumed.messages == (traced,), "and the message", resumed)
        rule(resumed is not None and resumed.accepted_at == at, "accepted when it was", resumed)


# ----- the rules of all verbs


async def check_order(open_store: OpenStore) -> None:
    """Changes take effect in the order in which the verbs were called."""
    called: list[str] = []

    async with _boot(open_store, "order") as (store, _):

        async def accept(id: str) -> None:
            called.append(id)
            await store.accept([_arrival("a", id)], Cursor(channel="chat", value=id))

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(accept, f"m{number}")
        rule(await store.cursor("chat") == called[-1], "the last call counts", called[-1])
        (admitted,) = await store.accept([_arrival("a", "last")])
        begun = (await store.begin(Begin(SessionKey("chat", "a"), admitted.session_id, True))).turn
        ids = [] if begun is None else [message.id for message in begun.messages]
        rule(ids == [*called, "last"], "mail is in the order of the calls", ids)


async def check_cancellation(open_store: OpenStore) -> None:
    """Whoever waits for a change learns its outcome, or had it never begun; and what has happened
    already is written for a cancelled caller, too."""
    async with _boot(open_store, "cancel") as (store, _):
        outcomes: list[Admitted] = []

        async def accept(id: str) -> None:
            outcomes.extend(await store.accept([_arrival("a", id)]))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(accept, f"m{number}")
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        known = sorted(admitted.receipt.id for admitted in outcomes)
        ids = [f"m{number}" for number in range(20)]
        there = sorted([id for id in ids if await _state_of(store, id) is not None])
        rule(known == there, "the outcome is known, or nothing was done", (known, there))
        turn = await _begin(store, "b", "settled")
        made: tuple[Delivery, ...] = ()
        with trio.CancelScope() as scope:
            scope.cancel()
            made = (await store.settle(_end(turn, parts=("hello",)))).deliveries
        rule(await _state_of(store, "settled") == "answered", "what has happened is written")
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.delivered([(delivery.id, 1) for delivery in made])
        cut = await _begin(store, "c", "cut")
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.remember(cut.id, 1, "charge", "unsafe", '"paid"', 1)
    async with _boot(open_store, "cancel") as (store, recovered):
        resumed = await store.resume(recovered.turns[0])
        steps = {} if resumed is None else resumed.steps or {}
        rule("charge" in steps and steps["charge"].done, "so is a step that has ended", steps)
        rule(recovered.deliveries == (), "so is what has arrived", recovered.deliveries)


STORE_CHECKS: Final[tuple[Check[OpenStore], ...]] = tuple(
    plainly(check)
    for check in (
        check_identity,
        check_epochs,
        check_accept_inserts_if_absent,
        check_a_duplicate_begins_nothing,
        check_cursor_moves_with_its_messages,
        check_interrupt_stops_and_requeues,
        check_begin,
        check_a_message_keeps_its_trace,
        check_settle_is_one_change,
        check_settle_asked_twice,
        check_each_end,
        check_clear_resume_pending,
        check_marking,
        check_crash_is_charged,
        check_unresumed_keeps_its_marker,
        check_late_attempt_changes_nothing,
        check_end_pending,
        check_stopped_is_stopped,
        check_steps,
        check_checkpoints_and_progress,
        check_saying_again,
        check_take,
        check_outbox,
        check_notices,
        check_history,
        check_forget,
        check_order,
        check_cancellation,
    )
)
"""Each check by itself, for a parametrised test."""
