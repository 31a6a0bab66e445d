"""The agent of `trio-gateway demo`: answers briefly, at length, or gets stuck."""

from __future__ import annotations

from typing import Final

import trio

from ._turns import Turn

PART_SECONDS: Final = 0.5
STUCK_SECONDS: Final = 60.0
"""Longer than anybody watches, and yet not for ever."""

PARTS: Final = {"short": 3, "long": 8}


async def agent(turn: Turn) -> str:
    """Work through the parts of an answer; each is a step, and is not done twice."""
    turn.progress("working")
    if turn.text == "stuck":
        return await _stuck(turn)
    parts = PARTS[turn.text]
    for part in range(1, parts + 1):
        await turn.step(_work, part, name=f"part {part}")
    return f"all {parts} parts are done"


async def _work(part: int) -> int:
    await trio.sleep(PART_SECONDS)
    return part


async def _stuck(turn: Turn) -> str:
    """Hang, as a turn does whose network does not answer; another attempt has better luck."""
    if turn.resumed is None:
        await trio.sleep(STUCK_SECONDS)
    return f"I was stuck, and attempt {turn.attempt} was not"
