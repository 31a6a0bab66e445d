"""An agent that says what it hears: the smallest there is.

Try:

    echo hello | trio-gateway run examples/echo.py:agent     answers once, and ends
    trio-gateway run examples/echo.py:agent                  talks with you; Ctrl-C leaves
    trio-gateway sessions list                               what the store remembers of it
"""

from __future__ import annotations

from trio_gateway import Turn


async def agent(turn: Turn) -> str:
    """Answer with the text of the message."""
    return turn.text
