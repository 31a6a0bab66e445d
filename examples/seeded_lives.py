"""Seeded lives of an agent: find the first seed in which it charges a card twice.

Try:

    python examples/seeded_lives.py
    pytest examples/seeded_lives.py

A seed is a handful of lives of one gateway: people write, and write again; platforms and disks
fail; somebody stops the gateway; it dies, at any commit or step, and is started again. All of it
is decided by the seed, so a seed that fails fails again.

The careless agent asks the bank on its way. If it dies after that and before its turn has settled,
it asks again. The careful one asks in a step, which is not done again once it is done, and under a
key that is the same in every attempt, so that the bank recognises a step that was cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from uuid import uuid4

import trio

from trio_gateway import Turn
from trio_gateway.testing import LivesFailure, Story, lives

bank: dict[str, int] = {}
"""The world outside: which turn was charged under each key. No death takes it back."""


async def charge(key: str, turn: int) -> str:
    """The bank's side. It books a request once for each key, and takes its time."""
    bank.setdefault(key, turn)
    await trio.sleep(0.2)
    return "You have been charged."


async def careless(turn: Turn) -> str:
    """Charge, under a key that was made up on the way."""
    return await charge(uuid4().hex, turn.id)


async def careful(turn: Turn) -> str:
    """Charge in a step, under a key that is the same in every attempt."""
    return await turn.step(charge, turn.idempotency_key("charge"), turn.id)


def charged_once(story: Story) -> None:
    """What must be so after each seed, whatever happened in it."""
    twice = [turn for turn, count in Counter(bank.values()).items() if count > 1]
    assert not twice, f"turns {twice} were charged twice"
    assert bank or not story.ended("answered"), "answered, and never charged"


def test_the_careless_agent_is_found_out() -> None:
    """And the seed that shows it shows it again."""
    found = first_failure(range(300))
    assert found is not None, "nobody noticed"
    print(f"careless: seed {found.seed}: {found.what}")
    assert first_failure([found.seed]) is not None, "it did not happen again"


def first_failure(seeds: Iterable[int]) -> LivesFailure | None:
    """What goes wrong first with the careless agent."""
    try:
        lives(careless, seeds, check=charged_once)
    except LivesFailure as failure:
        return failure
    return None


def test_the_careful_agent_charges_once() -> None:
    """In every seed."""
    report = lives(careful, seeds=60, check=charged_once)
    died = report.figures["deaths"]
    print(f"careful: 60 seeds, died {died} times; each turn was charged once")


if __name__ == "__main__":
    test_the_careless_agent_is_found_out()
    test_the_careful_agent_charges_once()
