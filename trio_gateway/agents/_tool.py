"""`tool`: what a function does outside when it is called twice, said where the function is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from .._errors import AgentNotUsable, shown
from .._steps import Effect


def _as_effect(value: str) -> Effect:
    try:
        return Effect(value)
    except ValueError:
        raise AgentNotUsable(
            f"effect={shown(value)}: expected 'safe', 'idempotent' or 'unsafe'"
        ) from None


@attrs.frozen(kw_only=True)
class Tool:
    """A function that a model may call. Called itself, it is that function.

    `fn` is an async function, or a plain one, which runs in a thread. Its parameters are annotated
    and given by name: what the model is told of them is derived from that, and what it gives is
    checked against it. Two kinds of parameters are not the model's: one annotated `Turn` gets the
    turn, and one called `idempotency_key` a key for the outside world, which is the same in every
    attempt of this turn and different for every other call.

    `effect` is what happens outside when a call is repeated that was cut in the middle, as for
    `Turn.step`; of a function for which nothing is said, the worst is assumed: `unsafe`. `name`
    and `description` are the function's name and docstring, unless given.
    """

    fn: Callable[..., Any]
    effect: Effect = attrs.field(default=Effect.UNSAFE, converter=_as_effect)
    name: str | None = None
    description: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, as if it were not a tool."""
        return self.fn(*args, **kwargs)


def tool(
    *, effect: str, name: str | None = None, description: str | None = None
) -> Callable[[Callable[..., Any]], Tool]:
    """Make a `Tool` of a function: `@tool(effect="safe")`.

    `effect`: `"safe"`, calling it changes nothing outside; `"idempotent"`, the outside recognises a
    repeat (take an `idempotency_key`); `"unsafe"`, it must not be repeated, and the model is told
    when nobody knows whether it has happened. Raises `AgentNotUsable` for anything else.
    """
    said = _as_effect(effect)

    def decorate(fn: Callable[..., Any]) -> Tool:
        return Tool(fn=fn, effect=said, name=name, description=description)

    return decorate
