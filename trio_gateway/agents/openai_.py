"""`OpenAIAgent`: a model at any OpenAI-compatible server, with tools, as an agent.

    agent = OpenAIAgent(model="gpt-5-mini", system="You are brief.", tools=[weather])

A turn is a conversation with the model, until it answers without asking for a tool:

    model 1 ---> tool 1 weather ---> model 2 ---> the reply
      step            step              step

Each of them is a step: remembered when it has finished, and not done again. So a turn that was
interrupted continues after the last one. What was cut in the middle is a model call, which is made
again (it changes nothing outside, and costs once more), or a tool, which is repeated if its effect
class says that it may be; else the model is told that nobody knows, and nobody calls it again.

When the gateway drains, what is under way may finish, and nothing new begins: neither a model call
nor a tool. The turn leaves, and goes on after the next boot.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from .._agents import AsyncAgent
from .._errors import AgentNotUsable, shown
from ._talk import Call, ModelFailed, Said, opening
from ._tool import Tool

if TYPE_CHECKING:
    from .._turns import Turn
    from ._model import Asking, Model
    from ._tools import Offer

NO_KEY: Final = "none"
"""What is sent for a key to a server of one's own when there is none: the SDK must send one."""

CLOSING: Final = 1.0
"""Seconds that closing its connections may take."""

CUT: Final = "(The answer was cut here: it was too long.)"
"""What is said after an answer that has reached `max_tokens`."""


class OpenAIAgent:
    """An agent that is a model: give an instance to `open_gateway`, or to `trio-gateway run`.

    `model`: the server's name for it. `system`: the message before all others. `base_url`: where
    the server is; None: OPENAI_BASE_URL, or OpenAI's own. `api_key`: None: OPENAI_API_KEY when the
    gateway starts; a server of one's own needs none. `tools`: functions, or what `tool` makes of
    them, which say what their effects are. `history`: lines of the conversation that the model is
    told at the most; `context`: characters of them, of `system` and of the turn's own text
    together, roughly four to a token; what is too much is left out from the oldest on.
    `max_tokens`: of one answer; None: the server's own limit. `max_calls`: model calls of one turn;
    in the last one the model may ask for no tool. `timeout`: seconds that the server may be silent.
    `tries`: how often one model call is tried; `patience`: seconds that it may take until the last
    try begins. `extra`: further fields of each request, `{"temperature": 0}`, say.

    It owns its connections: it is an async context manager that yields the agent, and can be
    entered again. Raises `AgentNotUsable` for an argument that has no meaning, if the extra
    `openai` is not installed, and on entering if there is no key. A turn whose model cannot be
    asked raises `ModelFailed`. Cancelled, it closes the connection that the answer comes over.
    """

    def __init__(
        self,
        *,
        model: str,
        system: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        history: int = 20,
        context: int = 24_000,
        max_tokens: int | None = 1024,
        max_calls: int = 8,
        timeout: float = 60.0,
        tries: int = 5,
        patience: float = 120.0,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _check_texts(model=model)
        _check_texts(optional=True, system=system, base_url=base_url, api_key=api_key)
        _check_counts(0, history=history)
        _check_counts(1, context=context, max_calls=max_calls, tries=tries)
        _check_counts(1, max_tokens=1 if max_tokens is None else max_tokens)
        _check_seconds(timeout=timeout, patience=patience)
        self._kit = kit = _load()
        self._system = system
        self._api_key = api_key
        self._history = history
        self._context = context
        self._max_calls = max_calls
        self._offers = kit.offers(tools)
        self._asking = kit.asking(
            model=model,
            base_url=base_url,
            max_tokens=max_tokens,
            timeout=float(timeout),
            tries=tries,
            patience=float(patience),
            extra=dict(extra),
        )
        self._model: Model | None = None
        self._entered = 0

    def __repr__(self) -> str:
        return f"OpenAIAgent(model={self._asking.model!r})"

    async def __aenter__(self) -> AsyncAgent:
        """Get ready to ask; the agent. Raises `AgentNotUsable` if there is no key."""
        if self._model is None:
            url = self._asking.base_url or os.environ.get("OPENAI_BASE_URL") or None
            self._model = self._kit.model(self._asking, url, _key(self._api_key, url))
        self._entered += 1
        return self._converse

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections, once nobody is inside any more."""
        self._entered -= 1
        if not self._entered and self._model is not None:
            model, self._model = self._model, None
            with trio.move_on_after(CLOSING, shield=True):
                await model.close()

    # ----- one turn

    async def _converse(self, turn: Turn) -> str:
        """Talk with the model until it answers; return the answer. Raises `ModelFailed`."""
        past = await turn.history(self._history) if self._history else ()
        talk = opening(self._system, past, turn.text, self._context)
        tools_used = 0
        for number in range(1, self._max_calls + 1):
            said = await self._think(turn, talk, number)
            if not said.calls:
                return _reply(said)
            talk.append(said.as_message())
            for call in said.calls:
                tools_used += 1
                result = await self._use(turn, call, f"tool {tools_used} {call.name}")
                talk.append({"role": "tool", "tool_call_id": call.id, "content": result})
        raise ModelFailed(
            f"the model still asks for tools in the last of its {self._max_calls} calls: allow more"
            " by `max_calls`, or look at what the tools tell it"
        )

    async def _think(self, turn: Turn, talk: list[dict[str, Any]], number: int) -> Said:
        """One model call. Its step is `safe`: what was cut is asked again. What the model says
        before it asks for tools is said."""
        model = self._model
        if model is None:
            raise ModelFailed("the agent was closed while a turn ran")

        async def ask() -> Said:
            said = await model.ask(turn, talk, self._offered(number))
            if said.calls and said.text.strip():
                await turn.say(said.text)  # in the step: a turn that resumes has said it
            return said

        return await turn.step(ask, name=f"model {number}", effect="safe")

    def _offered(self, number: int) -> dict[str, Any]:
        """The fields of a request that are about tools."""
        if not self._offers:
            return {}
        choice = "none" if number == self._max_calls else "auto"
        schemas = [offer.schema for offer in self._offers.values()]
        return {"tools": schemas, "tool_choice": choice}

    async def _use(self, turn: Turn, call: Call, step: str) -> str:
        """One tool call: what the model is told of it."""
        offer = self._offers.get(call.name)
        if offer is None:
            known = ", ".join(self._offers) or "none"
            return f"Error: there is no tool {shown(call.name)}. There are: {known}."
        if turn.draining.value:
            await turn.leave()
        turn.progress(f"using {call.name}")
        return await offer.use(turn, step, call.arguments)


def _reply(said: Said) -> str:
    return f"{said.text}\n\n{CUT}" if said.finish == "length" else said.text


# ----- what it is made of


@attrs.frozen
class _Kit:
    """What needs the packages of the extra `openai`."""

    offers: Callable[[Sequence[Tool | Callable[..., Any]]], Mapping[str, Offer]]
    asking: type[Asking]
    model: type[Model]


def _load() -> _Kit:
    try:
        from . import _model, _tools
    except ImportError as error:
        raise AgentNotUsable(
            f"OpenAIAgent needs packages that are not installed ({error}):"
            ' pip install "trio-gateway[openai]"'
        ) from None
    return _Kit(_tools.offers, _model.Asking, _model.Model)


def _key(given: str | None, url: str | None) -> str:
    key = given or os.environ.get("OPENAI_API_KEY")
    if key:
        return key
    if url is None:
        raise AgentNotUsable(
            "OpenAIAgent has no key: set OPENAI_API_KEY, give api_key=, or, for a server of your"
            " own, base_url="
        )
    return NO_KEY


def _check_texts(*, optional: bool = False, **given: object) -> None:
    for name, value in given.items():
        if value is None and optional:
            continue
        if not isinstance(value, str) or not value:
            # A value that is no text may be a key all the same.
            raise AgentNotUsable(f"{name}: expected a text, got {type(value).__name__}, or nothing")
        if name == "base_url" and not value.startswith(("http://", "https://")):
            raise AgentNotUsable("base_url: expected one that begins with http:// or https://")


def _check_counts(least: int, **given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AgentNotUsable(f"{name}={shown(value)}: expected a number, at least {least}")


def _check_seconds(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise AgentNotUsable(f"{name}={shown(value)}: expected seconds, more than 0")
