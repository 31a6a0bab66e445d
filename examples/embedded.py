"""A gateway inside your own Trio program.

Try:

    python examples/embedded.py

The program has a heart of its own (a clock that ticks) and hosts an agent beside it. It hands in
messages with `accept`, which returns when a message is on disk, and with `ask`, which waits for the
answer. Then it leaves the block while one turn is still at work: leaving drains, the turn settles,
and the report says so. A second gateway on the same store asks for that turn's answer: it comes
from the store, and the agent is not called again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio

from trio_gateway import DrainReport, Message, Settings, Turn, open_gateway

SETTINGS = Settings(grace=5.0, budget=10.0)


async def agent(turn: Turn) -> str:
    """Take a moment for each word, as a model would."""
    words = turn.text.split()
    for _ in words:
        await trio.sleep(0.1)
    return f"{len(words)} words, the longest is {max(words, key=len)!r}"


async def tick() -> None:
    """What else the program does, without an end."""
    while True:
        await trio.sleep(0.4)
        print("tick")


async def serve(store: Path) -> DrainReport | None:
    """One life of the gateway, which ends while a turn is open."""
    async with open_gateway(agent, store=store, settings=SETTINGS) as gateway:
        receipt = await gateway.accept(Message(session="ada", id="m1", text="hello there"))
        print(f"m1 is {receipt.status}")
        again = await gateway.accept(Message(session="ada", id="m1", text="hello there"))
        print(f"m1 is {again.status}")
        replies = await gateway.ask(Message(session="bob", id="m2", text="and now something else"))
        print(f"m2: {replies[-1].text}")
        await gateway.accept(Message(session="ada", id="m3", text="one two three four five"))
        print(f"leaving with {len(gateway.turns())} turn open")
    return gateway.report


async def look_up(store: Path) -> None:
    """Another life on the same store."""
    async with open_gateway(agent, store=store, settings=SETTINGS) as gateway:
        with trio.fail_after(1):
            replies = await gateway.ask(Message(session="ada", id="m3", text="it is known"))
        print(f"m3: {replies[-1].text}")


def tell(report: DrainReport) -> None:
    """What the stop did, in one line."""
    print(
        f"drained: {len(report.settled)} settled, {len(report.interrupted)} interrupted,"
        f" timed out: {report.timed_out}"
    )


async def main() -> None:
    """The program."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "embedded.db")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            report = await serve(store)
            if report is not None:
                tell(report)
            await look_up(store)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
