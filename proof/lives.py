"""Deterministic lives: 20,000 seeds, each a handful of lives of one gateway on one store, with an
agent that does everything an agent can do, checked against an independent model after every commit.

The machinery is public, `trio_gateway.testing.lives`; this is the agent, and what is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import trio

from trio_gateway import AgentMisuse, StepInDoubt, Turn
from trio_gateway.testing import Story
from trio_gateway.testing._lives import Outcome, Plan, explore
from trio_gateway.testing._seeded import Trouble

from ._report import Campaign, Job

CAMPAIGN: Final = Campaign(
    name="lives",
    injects="seeded lives on virtual time: schedules, arrivals, stops, second stops, deaths before"
    " and after commits and at any step, disks and platforms that fail, repeated boots",
    short="seeded lives",
    promises=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14),
    counted="seeds",
    must_see=(
        "a life came to rest after trouble",
        "a mixed drain",
        "a marking failed",
        "a reply came again",
        "a suspect ran",
        "a turn asked for a restart",
        "accepted while draining",
        "died while it stopped",
        "died with open turns",
        "left turns behind that did not end",
        "recognised a message sent again",
        "refused bad input",
        "resumed after a crash",
        "resumed after a restart",
        "resumed after a shutdown",
        "stopped by its user",
    ),
)

ran: Counter[tuple[int, str]] = Counter()
"""How often the function of each step of each turn was called, over all lives of a seed."""

done: set[tuple[int, str]] = set()
"""Steps that have returned to the agent: those are on disk."""

wrong: list[str] = []
"""What the agent itself has found."""


async def agent(turn: Turn) -> str | None:
    """Do what the last message says."""
    await trio.sleep(0.3)
    return await KINDS[turn.message.text](turn)


async def _step(turn: Turn, name: str, effect: str, seconds: float) -> None:
    key = (turn.id, name)

    async def work() -> str:
        ran[key] += 1
        if key in done:
            wrong.append(f"promise 8: step {name!r} of turn {turn.id} was done, and is done again")
        if effect == "unsafe" and ran[key] > 1:
            wrong.append(f"promise 8: unsafe step {name!r} of turn {turn.id} was repeated silently")
        await trio.sleep(seconds)
        return f"{name} of {turn.id}"

    result = await turn.step(work, name=name, effect=effect)
    if result != f"{name} of {turn.id}" and not _is_retried(turn):
        wrong.append(f"promise 8: step {name!r} of turn {turn.id} remembers {result!r}")
    done.add(key)


def _is_retried(turn: Turn) -> bool:
    """A turn that is tried again by /retry goes on from what another one remembered."""
    return (turn.id, "plan") not in ran


async def _plain(turn: Turn) -> str:
    return f"re: {turn.text}"


async def _slow(turn: Turn) -> str:
    await trio.sleep(1.5)
    return "a long answer, which takes more than one part to be said on this platform"


async def _says(turn: Turn) -> str:
    await turn.say("on it")
    await trio.sleep(0.4)
    await turn.say(f"still on it, attempt {turn.attempt}")
    return "done"


async def _steps(turn: Turn) -> str:
    await _step(turn, "plan", "safe", 0.2)
    try:
        await _step(turn, "charge", "unsafe", 0.3)
    except StepInDoubt:
        await turn.say("in doubt")
    await _step(turn, "note", "idempotent", 0.2)
    return "done"


async def _checkpoints(turn: Turn) -> str:
    so_far: int = turn.checkpointed or 0
    while so_far < 4:
        await trio.sleep(0.4)
        so_far += 1
        await turn.checkpoint(so_far)
    return f"counted to {so_far}"


async def _heeds_the_drain(turn: Turn) -> str:
    with trio.move_on_after(3):
        await turn.draining.wait_value(True)
    return "hurried"


async def _fails(turn: Turn) -> str:
    raise ValueError("the agent's own")


async def _restart(turn: Turn) -> str:
    turn.request_restart()
    await trio.sleep(0.1)
    return "restarted"


async def _never_ends(turn: Turn) -> str:
    if turn.attempt < 3:
        await trio.sleep(100)
    return "ended"


async def _swallows(turn: Turn) -> str:
    """Does not end when it is cancelled."""
    with trio.CancelScope(shield=True):
        await trio.sleep(12 if turn.attempt == 1 else 0.1)
    return "at last"


async def _takes(turn: Turn) -> str:
    try:
        with trio.move_on_after(1):
            async for message in turn.arrivals():
                await turn.say(f"and {message.text}")
    except AgentMisuse:
        await trio.sleep(0.5)
    return f"{len(turn.messages)} in all"


async def _nothing(turn: Turn) -> None:
    return None


async def _silent_failure(turn: Turn) -> str:
    with trio.CancelScope() as own:
        own.cancel()
        await trio.sleep(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0.2)
    return "fine"


KINDS: Final[dict[str, Callable[[Turn], Awaitable[str | None]]]] = {
    "plain": _plain,
    "plain, too": _plain,
    "slow": _slow,
    "says": _says,
    "steps": _steps,
    "steps, too": _steps,
    "checkpoints": _checkpoints,
    "heeds the drain": _heeds_the_drain,
    "fails": _fails,
    "restart": _restart,
    "never ends": _never_ends,
    "swallows": _swallows,
    "takes": _takes,
    "nothing": _nothing,
    "silent failure": _silent_failure,
}


def check(story: Story) -> None:
    """What the agent has found; and no end that nothing leads to."""
    assert not wrong, wrong[0]
    ends = {message.end for message in story.messages}
    assert ends <= {"answered", "failed", "stopped", "quarantined", "expired"}, ends


def forget() -> None:
    """The next seed has a world of its own."""
    ran.clear()
    done.clear()
    wrong.clear()


PLAN: Final = Plan(agent, check, tuple(KINDS), None, Trouble(), forget)


def run(job: Job) -> None:
    """Live all seeds."""
    for outcome in explore(PLAN, _seeds(job), job.jobs):
        note(job, outcome)


def note(job: Job, outcome: Outcome) -> None:
    """Add one seed to the report."""
    job.report.count(**outcome.figures)
    job.report.saw(*outcome.seen)
    if outcome.broken:
        trace = "\n".join(outcome.trace[-40:])
        job.report.fail(str(outcome.seed), "\n".join(outcome.broken[:5]) + f"\n\n{trace}")


def _seeds(job: Job) -> Iterable[int]:
    if job.only is not None:
        return [int(job.only)]
    first = job.seed * 10_000_000
    return range(first, first + job.amount(400, 20_000, 200_000))
