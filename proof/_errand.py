"""What the gateways do that are killed in mid-shutdown: a few conversations whose turns are at
different places when the stop comes. Some settle in the drain, some do not.

    plain      ends at once
    settles    ends when it sees that the gateway drains
    says       says something, and more in the drain, and ends there
    hangs      does not end by itself
    cut        looks at something (safe), then hangs in the middle of an unsafe step
    aims       has done its unsafe step when it hangs

What an agent saw and did is noted where no death takes it back. `began TURN ATTEMPT REASON` is
about an attempt, `waits ID` says that it now waits for the stop, `draining TURN` that it saw the
drain; `shot ID` is an unsafe effect, which may happen once at the most.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence

import trio

from trio_gateway import StepInDoubt, Turn

Note = Callable[[str], None]
Agent = Callable[[Turn], Awaitable[str]]

IN_DRAIN = ("settles", "says")
CUT_OFF = ("hangs", "cut", "aims")


def conversations(dice: random.Random, count: int) -> list[list[str]]:
    """The messages of so many sessions, by kind. In each case one settles in the drain and has mail
    behind it that must not begin then, one is cut off, and one has settled something before."""
    kinds = [*IN_DRAIN, *CUT_OFF]
    dice.shuffle(kinds)
    first = [dice.choice(IN_DRAIN), "cut"]
    first += [kind for kind in kinds if kind not in first][: count - len(first)]
    dice.shuffle(first)
    found = [[kind] for kind in first]
    next(session for session in found if session[0] in IN_DRAIN).append("plain")
    dice.choice(found).insert(0, "plain")
    return found


def sent(texts: Sequence[Sequence[str]], sessions: str = "abcdef") -> list[tuple[str, str, str]]:
    """Those messages as they are sent, the first of each session first: session, id, text."""
    found: list[tuple[str, str, str]] = []
    for position in range(max(map(len, texts))):
        for session, kinds in zip(sessions, texts, strict=False):
            if position < len(kinds):
                found.append((session, f"m{len(found)}", kinds[position]))
    return found


def agent_that(note: Note, jot: Note, waits: Callable[[Turn], bool]) -> Agent:
    """An agent for those messages.

    `note` notes an effect; `jot` what it is told: that an attempt begins, that the gateway drains.
    `waits` says whether a turn is to be open at the stop; if not, it ends like a plain one, having
    done what its kind does.
    """

    async def look(id: str) -> str:
        await trio.lowlevel.checkpoint()
        return f"seen {id}"

    async def shoot(id: str, hang: bool) -> str:
        note(f"shot {id}")
        if hang:
            await sleep_forever(id)
        return "hit"

    async def sleep_forever(id: str) -> None:
        jot(f"waits {id}")
        await trio.sleep_forever()

    async def in_drain(turn: Turn, kind: str) -> None:
        if kind == "says":
            await turn.say(f"on it: {turn.message.id}")
        if waits(turn):
            jot(f"waits {turn.message.id}")
            await turn.draining.wait_value(True)
            jot(f"draining {turn.id}")
            # Each settles in a transaction of its own.
            await trio.sleep(0.005 if kind == "says" else 0.001)
        if kind == "says":
            await turn.say(f"nearly: {turn.message.id}")

    async def cut_off(turn: Turn, kind: str) -> None:
        id, hang = turn.message.id, waits(turn)
        if kind != "hangs":
            assert await turn.step(look, id) == f"seen {id}"
            assert await turn.step(shoot, id, hang and kind == "cut", effect="unsafe") == "hit"
        if hang:
            await sleep_forever(id)

    async def agent(turn: Turn) -> str:
        reason = turn.resumed.reason if turn.resumed else "fresh"
        jot(f"began {turn.id} {turn.attempt} {reason}")
        kind = turn.text
        try:
            if kind in IN_DRAIN:
                await in_drain(turn, kind)
            elif kind in CUT_OFF:
                await cut_off(turn, kind)
        except StepInDoubt:
            return f"in doubt: {turn.message.id}"
        return f"re: {turn.message.id}"

    return agent


def said(id: str, kind: str) -> list[tuple[str, ...]]:
    """What people see in answer to a message: each text in turn, or what it may be instead."""
    answer = (f"re: {id}",)
    if kind == "says":
        return [(f"on it: {id}",), (f"nearly: {id}",), answer]
    if kind in ("cut", "aims"):
        return [(*answer, f"in doubt: {id}")]
    return [answer]
