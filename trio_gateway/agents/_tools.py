"""Tools: functions that a model may call, and what it is told of them and of how they ended.

What a model asks for is input from outside: arguments are checked against the annotations of the
function, and what is wrong with a call is told to the model, in one line, as the call's result.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import attrs
import pydantic
from pydantic.json_schema import GenerateJsonSchema

from .._errors import (
    AgentNotUsable,
    GatewayStopping,
    StepInDoubt,
    StepNotStorable,
    StoreError,
    lone_cause,
    shown,
    unwrap,
)
from .._policy import unicode_text
from .._steps import call, default_name, dump
from .._turns import Turn
from ._tool import Tool

LONGEST_RESULT: Final = 16_000
"""Characters of a tool's result that the model is told; of a longer one, the beginning."""

IN_DOUBT: Final = (
    "The outcome of this call is unknown: it was cut in the middle, and may or may not have"
    " happened. It was not repeated. Do not call it again before you, or the user, know."
)
"""What the model is told of an unsafe call that an earlier attempt was cut in."""

KEY: Final = "idempotency_key"
"""The parameter that is filled with a key of this very call; the model does not see it."""

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class _Plain(GenerateJsonSchema):
    """A schema without titles, which say nothing that the names do not say, and cost tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@attrs.frozen
class Offer:
    """A tool as it is offered to the model: its schema, and how its arguments are read."""

    tool: Tool
    schema: Mapping[str, Any]
    arguments: type[pydantic.BaseModel]
    names: Mapping[str, str]
    """The fields of `arguments`, and the parameters that they are for."""
    turn_as: str | None
    key_as: str | None

    def read(self, text: str) -> dict[str, Any]:
        """The arguments in `text`, as the function takes them. Raises `ValueError`, in one line."""
        try:
            read = self.arguments.model_validate_json(text or "{}")
        except pydantic.ValidationError as error:
            raise ValueError(_wrong(error)) from None
        return {self.names[field]: getattr(read, field) for field in read.model_fields_set}

    async def use(self, turn: Turn, step: str, text: str) -> str:
        """Call it once over all attempts, and return what the model is told of it.

        Raises what is about the gateway and not about the tool; a cancellation reaches the tool.
        """
        try:
            arguments = self.read(text)
        except ValueError as error:
            return f"Error: {error}"
        if self.turn_as is not None:
            arguments[self.turn_as] = turn
        if self.key_as is not None:
            arguments[self.key_as] = turn.idempotency_key(step)
        bound = partial(self.tool.fn, **arguments)

        async def use() -> str:
            return await _told(bound)

        try:
            return await turn.step(use, name=step, effect=self.tool.effect)
        except StepInDoubt:
            return IN_DOUBT


async def _told(bound: Callable[..., Any]) -> str:
    """The result, or the error, as the text that is remembered."""
    try:
        return _short(_text(await call(bound)))
    except (GatewayStopping, StoreError):
        raise
    except Exception as error:
        kind = type(unwrap(error)).__name__
        return _short(unicode_text(f"Error: {kind}: {lone_cause(error)}"))


def _text(value: object) -> str:
    if isinstance(value, str):
        return unicode_text(value)
    try:
        return dump("the result", value)
    except StepNotStorable:
        return shown(value)  # it has happened, and the model is to know that


def _short(text: str) -> str:
    if len(text) <= LONGEST_RESULT:
        return text
    left = len(text) - LONGEST_RESULT
    return f"{text[:LONGEST_RESULT]}\n(cut here: {left} more characters)"


def _wrong(error: pydantic.ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    said = (f"{'.'.join(map(str, one['loc'])) or 'arguments'}: {one['msg']}" for one in found)
    return "; ".join(said)


# ----- from a function to an offer


def offers(tools: Sequence[Tool | Callable[..., Any]]) -> Mapping[str, Offer]:
    """What is offered to the model, by name. Raises `AgentNotUsable`, naming the tool."""
    found: dict[str, Offer] = {}
    for given in tools:
        made = _offer(given if isinstance(given, Tool) else Tool(fn=given))
        name = str(made.schema["function"]["name"])
        if name in found:
            raise AgentNotUsable(f"two tools are called {name!r}: give one another name=")
        found[name] = made
    return MappingProxyType(found)


def _offer(tool: Tool) -> Offer:
    name = _name(tool)
    parameters, hints = _signature(tool, name)
    turn_as = next((p for p in parameters if hints.get(p) is Turn), None)
    key_as = KEY if KEY in parameters else None
    seen = [p for p in parameters.values() if p.name not in (turn_as, key_as)]
    fields = {f"p{n}": parameter for n, parameter in enumerate(seen)}
    arguments = _arguments(name, fields, hints)
    described = arguments.model_json_schema(schema_generator=_Plain)
    described.pop("title", None)
    function = {"name": name, "description": _description(tool), "parameters": described}
    names = {field: parameter.name for field, parameter in fields.items()}
    schema = {"type": "function", "function": function}
    return Offer(tool, schema, arguments, names, turn_as, key_as)


def _name(tool: Tool) -> str:
    if not callable(tool.fn):
        raise AgentNotUsable(f"{shown(tool.fn)} is no tool: give a function, or tool(...) of one")
    name = tool.name if tool.name is not None else default_name(tool.fn).rpartition(".")[2]
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise AgentNotUsable(
            f"tool {shown(name)}: a name has 1 to 64 letters, digits, _ and -: give it a name="
        )
    return name


def _description(tool: Tool) -> str:
    return tool.description if tool.description is not None else inspect.getdoc(tool.fn) or ""


def _signature(tool: Tool, name: str) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, Any]]:
    """The parameters of a tool, and their annotations."""
    fn: Any = tool.fn
    while isinstance(fn, partial):
        fn = fn.func
    try:
        parameters = inspect.signature(tool.fn).parameters
        hints = typing.get_type_hints(
            fn if inspect.isroutine(fn) else type(fn).__call__, include_extras=True
        )
    except (TypeError, ValueError, NameError, AttributeError) as error:
        raise AgentNotUsable(
            f"tool {name!r}: its annotations cannot be read ({lone_cause(error)})"
        ) from None
    for parameter in parameters.values():
        _check(parameter, hints, name)
    return parameters, hints


def _check(parameter: inspect.Parameter, hints: Mapping[str, Any], tool: str) -> None:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if parameter.kind not in by_name:
        raise AgentNotUsable(
            f"tool {tool!r}: parameter {parameter.name!r} cannot be given by name, as models do"
        )
    if parameter.name not in hints and parameter.name != KEY:
        raise AgentNotUsable(
            f"tool {tool!r}: parameter {parameter.name!r} has no annotation, so the model cannot"
            " be told what it takes"
        )


def _arguments(
    name: str, fields: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]
) -> type[pydantic.BaseModel]:
    """A model of the arguments. Its fields have names of their own: a parameter may be called what
    a field may not."""
    made: dict[str, Any] = {}
    for field, parameter in fields.items():
        empty = parameter.default is inspect.Parameter.empty
        default: Any = ... if empty else parameter.default
        made[field] = (hints[parameter.name], pydantic.Field(default, alias=parameter.name))
    config = pydantic.ConfigDict(extra="forbid", protected_namespaces=())
    try:
        return pydantic.create_model(name, __config__=config, **made)
    except (pydantic.PydanticUserError, TypeError) as error:
        raise AgentNotUsable(
            f"tool {name!r}: its parameters have no JSON schema ({lone_cause(error)})"
        ) from None
