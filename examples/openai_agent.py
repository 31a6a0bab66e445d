"""A model that can buy things: it is asked, it uses tools, and it orders nothing twice.

Needs the extra, `pip install -e ".[openai]"`, and a key in OPENAI_API_KEY. Try:

    trio-gateway run examples/openai_agent.py:agent

and ask whether there is honey, and for two jars of it. For a server of your own set OPENAI_BASE_URL
(docs/openai-agent.md shows one with a small model, which is too small for tools), and OPENAI_MODEL
for another model.

The shop takes SHOP_PACE seconds for an order (3 by default). Kill the gateway meanwhile, from
another terminal (`kill -9`), and start it again: the model is told that nobody knows whether the
order has arrived, and tells you; what it had asked and looked up before is not done again. What was
ordered is in `shop.log`, the shop's own book, in the folder that you are in.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from trio_gateway.agents import OpenAIAgent, tool

SHOP = Path("shop.log")
STOCK = {"tea": 3, "bread": 0, "honey": 7}


@tool(effect="safe")
def in_stock(item: str) -> int:
    """How many of an item the shop has."""
    return STOCK.get(item.lower(), 0)


@tool(effect="unsafe")
def order(item: str, count: Annotated[int, Field(ge=1, le=10)] = 1) -> str:
    """Order an item. It costs money."""
    with SHOP.open("a") as book:
        book.write(f"{count} {item}\n")
    time.sleep(float(os.environ.get("SHOP_PACE", "3")))  # the shop takes its time to confirm
    return f"ordered: {count} {item}"


agent = OpenAIAgent(
    model=os.environ.get("OPENAI_MODEL", "gpt-5-mini"),
    system="You sell tea, bread and honey. Look up what is in stock before you order. Be brief.",
    tools=[in_stock, order],
)
