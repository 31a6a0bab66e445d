"""The one way up. A clean stop, `kill -9` and a power cut all meet this file.

    read      what is open: one transaction, which also charges crashes to who was running
    decide    a verdict for each interrupted turn (`_policy.judge`, pure)
    commit    those that end: quarantined or expired, one transaction, their senders told
    act       the others resume, by the ordinary path: in line for a slot like everybody

Nobody else waits for any of this: a session without an interrupted turn is served at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

import attrs
import trio

from ._errors import StoreError, shown
from ._events import StoreTrouble
from ._markers import TurnState
from ._messages import Delivery, Message, SessionKey
from ._policy import (
    SORRY_EXPIRED,
    SORRY_QUARANTINED,
    SORRY_UNREADABLE,
    Judgement,
    ResumeRules,
    Verdict,
    judge,
)
from ._strangers import theirs
from .store import BadRow, PendingTurn, Recovered, Settlement, Store

Judged = tuple[PendingTurn, Judgement]

ASK_AGAIN: Final = 1.0
"""Seconds after which a store that could not be read is read again."""

_ENDS = {
    Verdict.QUARANTINE: (TurnState.QUARANTINED, SORRY_QUARANTINED),
    Verdict.EXPIRE: (TurnState.EXPIRED, SORRY_EXPIRED),
}


class House(Protocol):
    """What recovery needs of the gateway around it."""

    def knows_channel(self, channel: str) -> bool:
        """Whether this gateway serves the sessions of that channel."""
        ...

    def connected(self, channel: str) -> bool:
        """Whether the channel is connected."""
        ...

    async def wait_connected(self, channel: str) -> None:
        """Wait until the channel is connected."""
        ...

    def pulled_channels(self) -> frozenset[str]:
        """The channels whose sessions have a journal."""
        ...

    def place(self, recovered: Recovered) -> None:
        """Put what is open where the running gateway keeps it: sessions, line, outbox."""
        ...

    def end_of(self, pending: PendingTurn, state: TurnState, why: str, apology: str) -> Settlement:
        """How a turn ends that is not resumed."""
        ...

    async def end(self, ends: Sequence[tuple[PendingTurn, Settlement]]) -> None:
        """Write those ends, tell who should know, and let their sessions go on."""
        ...

    async def resume(self, pending: PendingTurn) -> None:
        """Put the turn in line; return when its next attempt has ended."""
        ...

    def send(self, deliveries: Sequence[Delivery]) -> None:
        """Hand committed notices to the outbox."""
        ...

    def say(self, event: StoreTrouble) -> None:
        """Tell an event."""
        ...

    def wants_notice(self, channel: str) -> bool:
        """Whether people on that channel are told that their turn goes on."""
        ...


@attrs.frozen
class Recovery:
    """What a boot found and decided; `resume_all` carries it out."""

    recovered: Recovered
    resuming: tuple[Judged, ...]
    ended: tuple[Judged, ...]

    def count(self, verdict: Verdict) -> int:
        """How many turns got that verdict."""
        return sum(judgement.verdict is verdict for _, judgement in (*self.resuming, *self.ended))


async def recover(store: Store, house: House, rules: ResumeRules) -> Recovery:
    """Read what is open, judge it, and end what does not resume."""
    recovered = await store.recover(house.pulled_channels())
    if recovered.lost:
        told = f"{recovered.lost} rows make no sense and were ended; see trio-gateway doctor"
        house.say(StoreTrouble(operation="boot", error=told))
    house.place(recovered)
    judged = [
        (pending, judge(pending.marker, pending.interrupted_for, rules))
        for pending in recovered.turns
        if house.knows_channel(pending.session.channel)
    ]
    ended = tuple((p, j) for p, j in judged if j.verdict in _ENDS)
    await house.end([(p, house.end_of(p, *_end(j))) for p, j in ended])
    resuming = tuple((p, j) for p, j in judged if j.verdict not in _ENDS)
    return Recovery(recovered, resuming, ended)


def _end(judgement: Judgement) -> tuple[TurnState, str, str]:
    state, apology = _ENDS[judgement.verdict]
    return state, judgement.why, apology


async def resume_all(
    recovery: Recovery,
    store: Store,
    house: House,
    rules: ResumeRules,
    authorize: Callable[[Message], Awaitable[bool]] | None,
    resumed_notice: str,
) -> None:
    """Resume what is to be resumed; return when all of it has ended. Cancelled by a stop: what was
    not resumed by then keeps its marker."""
    await _tell(recovery, store, house, resumed_notice)
    at_once = trio.CapacityLimiter(rules.concurrency)
    # Suspects run one at a time, so that the next crash convicts the right one.
    alone = trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery:
        for pending, judgement in recovery.resuming:
            suspect = judgement.verdict is Verdict.RESUME_ALONE
            limiter = alone if suspect else at_once
            nursery.start_soon(_resume_one, pending, limiter, store, house, authorize)


async def _tell(recovery: Recovery, store: Store, house: House, text: str) -> None:
    """One notice per session at the most: a session has one open turn. Best effort."""
    who: list[tuple[SessionKey, int]] = [
        (pending.session, pending.session_id)
        for pending, _ in recovery.resuming
        if house.wants_notice(pending.session.channel)
    ]
    if not who:
        return
    try:
        house.send(await store.notify(who, "resumed", text))
    except StoreError as error:
        house.say(StoreTrouble(operation="notice", error=str(error)))


async def _resume_one(
    pending: PendingTurn,
    limiter: trio.CapacityLimiter,
    store: Store,
    house: House,
    authorize: Callable[[Message], Awaitable[bool]] | None,
) -> None:
    channel = pending.session.channel
    async with _place(limiter, channel, house):
        refusal = None
        if authorize is not None:
            refusal = await _still_allowed(pending, store, house, authorize)
        if refusal is None:
            await house.resume(pending)
        else:
            await house.end([(pending, house.end_of(pending, *refusal))])


@asynccontextmanager
async def _place(
    limiter: trio.CapacityLimiter, channel: str, house: House
) -> AsyncGenerator[None, None]:
    """Hold one of the places of those that resume, with the channel connected: a channel that is
    gone again by the time keeps nobody else waiting."""
    while True:
        await house.wait_connected(channel)
        async with limiter:
            if house.connected(channel):
                yield
                return


async def _still_allowed(
    pending: PendingTurn,
    store: Store,
    house: House,
    authorize: Callable[[Message], Awaitable[bool]],
) -> tuple[TurnState, str, str] | None:
    """Ask again: None, or how the turn ends. Put aside, not thrown away: a hook can be wrong, and
    whoever looks into the quarantine can retry it."""
    try:
        for message in await _messages_of(pending, store, house):
            if not await authorize(message):
                return (
                    TurnState.QUARANTINED,
                    "its sender is not allowed any more",
                    SORRY_QUARANTINED,
                )
    except BadRow as bad:
        return TurnState.FAILED, str(bad), SORRY_UNREADABLE
    except BaseException as error:  # noqa: ASYNC103 - it raises what is not the hook's
        fault = shown(theirs(error))
        return TurnState.QUARANTINED, f"authorisation failed: {fault}", SORRY_QUARANTINED  # noqa: ASYNC104
    return None


async def _messages_of(pending: PendingTurn, store: Store, house: House) -> tuple[Message, ...]:
    """What is to be asked about. A disk that is busy for a moment is nobody's fault, and must not
    put a turn aside."""
    while True:
        try:
            return await store.messages_of(pending)
        except StoreError as error:
            if not error.retryable:
                raise
            house.say(StoreTrouble(operation="authorise", error=str(error)))
            await trio.sleep(ASK_AGAIN)
