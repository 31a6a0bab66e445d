"""An assistant that remembers its steps: kill it anywhere, and it goes on where it was.

Try:

    trio-gateway run examples/assistant.py:agent

and ask for "tea, bread, honey". While it works, kill it from another terminal (`kill -9`), start
it again, and watch: it goes on with the same order, orders nothing twice (`shop.log`, in the
folder that you are in, is the shop's own book), and does not say again what it has said. Or stop
it with Ctrl-C while it writes its letter: it sees that the gateway drains, and keeps it short.

The model is a few lines of ordinary code, so that no network is needed; ASSISTANT_PACE is how many
seconds it thinks each time (1 by default).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import attrs
import trio

from trio_gateway import StepInDoubt, Turn

PACE = float(os.environ.get("ASSISTANT_PACE", "1"))
SHOP = Path("shop.log")


@attrs.frozen
class Plan:
    """What the model makes of a message."""

    items: tuple[str, ...]
    greeting: str


async def think(text: str) -> Plan:
    """Ask the model for a plan. It answers the same question in the same way, but it takes time."""
    await trio.sleep(PACE)
    items = tuple(item.strip() for item in text.split(",") if item.strip())
    return Plan(items, f"I will order {len(items)} things: {', '.join(items)}.")


def order(key: str, item: str) -> str:
    """Order one thing. The shop recognises no repeats: whoever orders twice, pays twice."""
    with SHOP.open("a") as book:
        book.write(f"{key} {item}\n")
    time.sleep(PACE)  # the shop takes its time to say that it has the order
    return f"{item}: ordered"


def is_ordered(key: str) -> bool:
    """Look into the shop's book whether an order has arrived."""
    return SHOP.exists() and any(line.startswith(f"{key} ") for line in SHOP.open())


async def order_once(turn: Turn, number: int, item: str) -> str:
    """Order one thing, and only once, also if the process dies while it is being ordered."""
    key = turn.idempotency_key(f"order-{number}")
    tries = 0
    while True:
        tries += 1
        name = f"order {item} ({number}, try {tries})"
        try:
            return await turn.step(order, key, item, name=name, effect="unsafe")
        except StepInDoubt:
            # An earlier attempt was cut in the middle of this try. Only the shop knows.
            if await trio.to_thread.run_sync(is_ordered, key):
                return f"{item}: ordered just before I was interrupted"


async def write_letter(turn: Turn, results: list[str]) -> str:
    """Write a line for each thing. Each line is kept; a resumed turn goes on after the last one."""
    lines: list[str] = turn.checkpointed or ["Dear customer,"]
    for result in results[len(lines) - 1 :]:
        if turn.draining.value:
            rest = results[len(lines) - 1 :]
            return "\n".join([*lines, *rest, "In haste, your assistant"])
        turn.progress(f"writing about {result}")
        await trio.sleep(PACE)
        lines.append(f"I am glad to tell you about your order of {result}.")
        await turn.checkpoint(lines)
    return "\n".join([*lines, "Yours, the assistant"])


async def agent(turn: Turn) -> str:
    """Plan, order, write."""
    plan = await turn.step(think, turn.text)
    if not plan.items:
        return "Tell me what to order, with commas between."
    await turn.say(plan.greeting)
    results = [await order_once(turn, n, item) for n, item in enumerate(plan.items, 1)]
    return await write_letter(turn, results)
