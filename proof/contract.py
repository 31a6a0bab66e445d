"""The store's contract: what every store must do, held against our own.

The suite is public (`check_store`), and small: each check asks one rule, many of them things that
no orderly gateway does, such as settling with an attempt that is over. One gateway on its own store
hardly comes to them; a second one on the same store would, and so would an agent in a thread that
does not end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

import trio

from trio_gateway.store import open_store
from trio_gateway.testing import STORE_CHECKS, OpenStore

from ._report import Campaign, Job

CAMPAIGN: Final = Campaign(
    name="contract",
    injects="what no orderly gateway asks of a store: ends of attempts that are over, verbs asked"
    " twice, changes by somebody else",
    short="breaches of the store's contract",
    promises=(1, 2, 5, 6, 8, 9, 10),
    counted="checks",
)

PATIENCE: Final = 60.0
"""Seconds that one check may take."""


def run(job: Job) -> None:
    """Every check, with the writer's thread and without."""
    for name, check in _checks():
        if job.only in (None, name):
            try:
                trio.run(_in_time, check)
            except Exception as error:
                job.report.fail(name, f"{type(error).__name__}: {error}")
            job.report.count(checks=1)


def _checks() -> list[tuple[str, Callable[[], Awaitable[None]]]]:
    return [
        (_name(check, inline), partial(_on_a_store, check, inline))
        for inline in (True, False)
        for check in STORE_CHECKS
    ]


def _name(check: object, inline: bool) -> str:
    return f"{getattr(check, '__name__', check)} {'in the loop' if inline else 'on a thread'}"


async def _in_time(check: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(PATIENCE):
        await check()


async def _on_a_store(check: Callable[[OpenStore], Awaitable[None]], inline: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="proof-") as folder:
        await check(lambda name: open_store(Path(folder) / name, inline=inline))
