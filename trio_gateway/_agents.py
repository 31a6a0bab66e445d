"""What may be given as an agent, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from ._errors import AgentNotUsable
from ._steps import call, is_async

if TYPE_CHECKING:
    from ._turns import Turn

AsyncAgent: TypeAlias = Callable[["Turn"], Awaitable[str | None]]
PlainAgent: TypeAlias = Callable[["Turn"], str | None]
AgentManager: TypeAlias = AbstractAsyncContextManager[AsyncAgent, bool | None]
Agent: TypeAlias = AsyncAgent | PlainAgent | AgentManager | Callable[[], AgentManager]
"""An async function of a `Turn`; a plain one, which runs in a thread; or an async context manager
(or what makes one, without arguments) that yields such a function, to own an HTTP client, say."""


@asynccontextmanager
async def opened(agent: Agent) -> AsyncGenerator[AsyncAgent, None]:
    """The agent as an async function, for as long as the block lasts.

    Raises `AgentNotUsable` for anything that is no agent; lets what the agent's own context
    manager raises pass.
    """
    manager = _manager(agent)
    if manager is None:
        yield _async_function(agent)
        return
    async with manager as inner:
        yield _async_function(inner)


def _manager(agent: Any) -> AbstractAsyncContextManager[Any] | None:
    if not inspect.isclass(agent) and isinstance(agent, AbstractAsyncContextManager):
        return cast("AbstractAsyncContextManager[Any]", agent)
    if inspect.isasyncgenfunction(inspect.unwrap(agent)) and not inspect.isasyncgenfunction(agent):
        return cast("AbstractAsyncContextManager[Any]", agent())
    if inspect.isclass(agent) and hasattr(agent, "__aenter__") and hasattr(agent, "__aexit__"):
        return cast("AbstractAsyncContextManager[Any]", agent())
    return None


def _async_function(agent: Any) -> AsyncAgent:
    if not callable(agent):
        raise AgentNotUsable(
            f"{type(agent).__name__!r} object is no agent: give an async function of one argument"
            " (the turn), a plain one, or an async context manager that yields one"
        )
    if inspect.isasyncgenfunction(agent):
        raise AgentNotUsable(
            f"{getattr(agent, '__qualname__', agent)!r} is an async generator: decorate it with"
            " contextlib.asynccontextmanager if it is to own something, and return the reply"
        )
    _check_arguments(agent)
    if is_async(agent):
        return cast("AsyncAgent", agent)

    async def in_thread(turn: Turn) -> str | None:
        return cast("str | None", await call(agent, turn))

    return in_thread


def _check_arguments(agent: Callable[..., Any]) -> None:
    try:
        inspect.signature(agent).bind(None)
    except TypeError as error:
        name = getattr(agent, "__qualname__", repr(agent))
        raise AgentNotUsable(
            f"{name!r} cannot be called with one argument, the turn ({error})"
        ) from None
    except ValueError:
        return  # a builtin that does not say; calling it will tell
