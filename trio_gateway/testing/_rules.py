"""What the suites for stores and channels have in common."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

Made = TypeVar("Made")
Check = Callable[[Made], Awaitable[None]]


def rule(holds: bool, sentence: str, found: object = None) -> None:
    """Raise `AssertionError` unless the rule holds."""
    if not holds:
        raise AssertionError(sentence if found is None else f"{sentence}; found: {found!r}")


def plainly(check: Check[Made]) -> Check[Made]:
    """The same check, but a broken rule is raised by itself, not inside the groups of nurseries."""

    @functools.wraps(check)
    async def run(make: Made) -> None:
        try:
            await check(make)
        except BaseExceptionGroup as group:
            broken = _first_assertion(group)
            raise broken from broken.__cause__

    return run


def _first_assertion(group: BaseExceptionGroup[BaseException]) -> BaseException:
    assertions = group.subgroup(AssertionError)
    if assertions is None:
        return group
    error: BaseException = assertions
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
