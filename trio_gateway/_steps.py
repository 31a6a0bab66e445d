"""Remembered steps: what finished is not done again; what was cut may be in doubt.

    effect       before it runs   after it ran   cut in the middle, then resumed
    safe         -                result kept    done again: it changes nothing outside
    idempotent   -                result kept    done again: the outside recognises the key
    unsafe       "begun" kept     result kept    StepInDoubt

The first time and in every resumed attempt, a step returns the same thing: the result as it reads
back from the store.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import StrEnum
from functools import partial
from typing import Any, Final, TypeVar, cast

import attrs
import cattrs
import orjson
import trio
from cattrs.preconf.orjson import make_converter

from ._errors import (
    AgentMisuse,
    StepInDoubt,
    StepNotStorable,
    lone_cause,
    shown,
    unless_for_want_of_memory,
)
from ._policy import lone_surrogate, step_name

T = TypeVar("T")

_THREADS: Final = trio.CapacityLimiter(math.inf)

_converter: Final = make_converter()
# What is annotated `-> None` reads back as None; cattrs does not know that by itself.
_converter.register_structure_hook(type(None), lambda _value, _type: None)


class Effect(StrEnum):
    """What happens outside when a step runs twice."""

    SAFE = "safe"
    IDEMPOTENT = "idempotent"
    UNSAFE = "unsafe"

    @classmethod
    def of(cls, text: str) -> Effect:
        """The effect called `text`. Raises `AgentMisuse`."""
        try:
            return cls(text)
        except ValueError:
            raise AgentMisuse(
                f"effect={shown(text)}: expected 'safe', 'idempotent' or 'unsafe'"
            ) from None


def default_name(fn: Callable[..., object]) -> str:
    """What a step is called after its function, the same in every process."""
    while isinstance(fn, partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return name.replace(".<locals>", "")


def return_type(fn: Callable[..., object]) -> Any:
    """What `fn` says that it returns; `Any` if it does not say."""
    while isinstance(fn, partial):
        fn = fn.func
    if inspect.isclass(fn):
        return fn
    target = fn if inspect.isroutine(fn) else type(fn).__call__
    try:
        return typing.get_type_hints(target).get("return", Any)
    except (NameError, TypeError, AttributeError):
        return Any  # an annotation that cannot be evaluated here says nothing


def dump(what: str, value: object) -> str:
    """`value` as JSON. Raises `StepNotStorable`, naming `what`."""
    try:
        return _converter.dumps(value).decode()
    except (TypeError, ValueError, RecursionError, cattrs.BaseValidationError) as error:
        raise StepNotStorable(
            f"{what} is {type(value).__name__!r} and cannot be stored ({lone_cause(error)}):"
            " return JSON values, attrs classes, or None"
        ) from error


def load(what: str, text: str, kind: Any) -> Any:
    """A value from JSON, as `kind`. Raises `StepNotStorable`, naming `what`."""
    try:
        value = orjson.loads(text)
    except ValueError as error:
        unless_for_want_of_memory(error)
        raise StepNotStorable(
            f"{what} is damaged in the store and cannot be read back ({error}): catch this error to"
            " go on without it"
        ) from error
    try:
        return _converter.structure(value, kind)
    except (TypeError, ValueError, KeyError, AttributeError, cattrs.BaseValidationError,
            cattrs.StructureHandlerNotFoundError) as error:  # fmt: skip
        unless_for_want_of_memory(error)
        raise StepNotStorable(
            f"{what} does not read back as {getattr(kind, '__name__', kind)!r}"
            f" ({lone_cause(error)}): annotate the function with what it returns"
        ) from error


class Memory(typing.Protocol):
    """Where steps are kept, for one attempt of one turn. Each returns False when it is over."""

    async def begin_step(self, name: str, effect: str) -> None:
        """Keep that an unsafe step is about to run."""
        ...

    async def remember(self, name: str, effect: str, result: str, began_at: int) -> None:
        """Keep a step's result."""
        ...

    def now(self) -> int:
        """Microseconds since 1970."""
        ...


@attrs.define(eq=False)
class Steps:
    """The steps of one attempt. `known` maps names to results (None: begun, not finished)."""

    memory: Memory
    known: dict[str, str | None]
    _uses: Counter[str] = attrs.field(factory=Counter[str], init=False)
    _taken: set[str] = attrs.field(factory=set[str], init=False)
    under_way: list[str] = attrs.field(factory=list[str], init=False)
    """Names of the steps whose functions run just now, the newest last."""

    def next_name(self, base: str) -> str:
        """The name of the next step called `base`: in a loop, the n-th time is the n-th step. Never
        one that is taken, also if somebody calls a step what the second of another is called."""
        while True:
            self._uses[base] += 1
            name = step_name(base, self._uses[base])
            if name not in self._taken:
                self._taken.add(name)
                return name

    async def do(
        self, fn: Callable[..., Any], args: tuple[Any, ...], name: str | None, effect: Effect
    ) -> Any:
        """Run `fn(*args)`, or return what it returned before."""
        name = self.next_name(default_name(fn) if name is None else _storable_name(name))
        what = f"the result of step {name!r}"
        kind = return_type(fn)
        if name in self.known:
            done = self.known[name]
            if done is not None:
                await trio.lowlevel.checkpoint()
                return load(what, done, kind)
            if effect is Effect.UNSAFE:
                raise StepInDoubt(name)
        began_at = self.memory.now()
        if effect is Effect.UNSAFE:
            await self.memory.begin_step(name, effect)
        stored = dump(what, await self._under_way(name, fn, args))
        result = load(what, stored, kind)
        await self.memory.remember(name, effect, stored, began_at)
        self.known[name] = stored
        return result

    async def _under_way(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.under_way.append(name)
        try:
            return await call(fn, *args)
        finally:
            self.under_way.remove(name)


def _storable_name(name: object) -> str:
    """A name that can be kept; else what was done under it could not be remembered."""
    if not isinstance(name, str) or not name or lone_surrogate(name) is not None:
        raise AgentMisuse(
            f"step: name={shown(name)}: expected a text, or None for the function's name"
        )
    return name


async def call(fn: Callable[..., Any], *args: Any) -> Any:
    """Call a function of either colour; a plain one in a thread, which a cancellation abandons."""
    if is_async(fn):
        return await cast("Awaitable[Any]", fn(*args))

    def work() -> list[Any]:
        return [fn(*args)]  # in a list, because Trio refuses to hand out something to await

    # Whoever calls has a slot already. Trio's own limit would let 40 plain agents, each of which
    # waits for a step in a thread, wait for ever.
    (result,) = await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=_THREADS)
    return await result if inspect.isawaitable(result) else result


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling `fn` gives something to await."""
    while isinstance(fn, partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004 - asked about the method, not whether it is there
    )
