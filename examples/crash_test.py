"""A crash test of an agent: kill it anywhere, and see whether the world is still in order.

Try:

    python examples/crash_test.py
    pytest examples/crash_test.py

A customer buys a book, and an agent charges the card. The scenario is run again and again: each
time its process dies (SIGKILL) before or after another one of its commits, is started again on the
same store, and then the bank's book is checked. The careless agent charges twice if it dies at the
wrong moment. The careful one does it in a step, under a key that is the same in every attempt.
"""

from __future__ import annotations

from functools import partial
from uuid import uuid4

from trio_gateway import Agent, Message, Turn
from trio_gateway.testing import CrashFailure, Life, World, kill_my_agent_anywhere

BOOK = Message(session="ada", id="m1", text="a book")


def charge(world: World, key: str, item: str) -> str:
    """The bank. It books a request once for each key; no crash takes a booking back."""
    booking = f"{key} {item}"
    if booking not in world.notes:
        world.note(booking)
    return f"You have been charged for {item}."


async def careless(world: World, turn: Turn) -> str:
    """Charge, under a key that was made up on the way."""
    return charge(world, uuid4().hex, turn.text)


async def careful(world: World, turn: Turn) -> str:
    """Charge in a step: not done again once it is done, and under the same key if it was cut."""
    return await turn.step(charge, world, turn.idempotency_key("charge"), turn.text)


async def buy(agent: Agent, life: Life) -> None:
    """One life of the process. The customer's message comes again in each, as it would."""
    async with life.open_gateway(agent) as gateway:
        await gateway.ask(BOOK)


async def careless_scenario(life: Life) -> None:
    """Buy a book from the careless agent."""
    await buy(partial(careless, life.world), life)


async def careful_scenario(life: Life) -> None:
    """Buy a book from the careful one."""
    await buy(partial(careful, life.world), life)


def charged_once(world: World) -> None:
    """What must be so in the end, wherever the process died."""
    assert len(world.notes) == 1, f"charged {len(world.notes)} times"


def test_the_careless_agent_is_found_out() -> None:
    """It charges twice if it dies between the charge and the end of its turn."""
    try:
        kill_my_agent_anywhere(careless_scenario, charged_once)
    except CrashFailure as failure:
        print(f"careless: {failure}")
    else:
        raise AssertionError("nobody noticed")


def test_the_careful_agent_charges_once() -> None:
    """Wherever it dies. (With `deaths=2` it dies anywhere while it recovers, too.)"""
    report = kill_my_agent_anywhere(careful_scenario, charged_once)
    print(f"careful: died {report.deaths} times, in {report.lives} lives; charged once each time")


if __name__ == "__main__":
    test_the_careless_agent_is_found_out()
    test_the_careful_agent_charges_once()
