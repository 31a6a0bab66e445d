"""Scenarios that are killed: their boots, told to the checks of `proof/_worlds.py`, which are this
module's too.

A scenario boots its gateways by `boot`, which notes in the world, where no crash takes it back,
which turns the store has open just before; and the agent notes each attempt. So afterwards the two
can be compared: what resumed must be exactly what was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from proof._worlds import (
    all_ended,
    answered_once,
    boots,
    exactly_the_interrupted_resumed,
    is_made,
    noted,
    open_turns,
    rows,
    shown_to,
    sound_at_death,
)
from trio_gateway import Gateway, Turn
from trio_gateway.testing import Life

__all__ = [
    "Act",
    "all_ended",
    "answered_once",
    "boot",
    "boots",
    "exactly_the_interrupted_resumed",
    "is_made",
    "noted",
    "open_turns",
    "rows",
    "shown_to",
    "sound_at_death",
]

Act = Callable[[Life, Turn], Awaitable[str | None]]
"""What an agent does in a scenario."""


@asynccontextmanager
async def boot(life: Life, act: Act, **options: Any) -> AsyncGenerator[Gateway]:
    """Open a gateway with an agent that does `act`, noting what the store has open before, and
    each attempt."""

    async def agent(turn: Turn) -> str | None:
        reason = str(turn.resumed.reason) if turn.resumed else "fresh"
        life.world.note(f"began {turn.id} {turn.attempt} {reason}")
        return await act(life, turn)

    life.world.note(f"boot {json.dumps(open_turns(life.world))}")
    async with life.open_gateway(agent, **options) as gateway:
        yield gateway
