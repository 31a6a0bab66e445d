"""What a request of the OpenAI API asks for: one text, for one session. Pure.

What would change the answer and cannot be had here is refused, by its name; what only tunes a model
is accepted, and left to the agent.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import attrs

from .._errors import shown
from ._problem import Problem

_TUNING: Final = frozenset({
    "frequency_penalty", "metadata", "min_p", "parallel_tool_calls", "presence_penalty",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "repeat_penalty",
    "repetition_penalty", "safety_identifier", "seed", "service_tier", "store", "temperature",
    "top_k", "top_p",
})  # fmt: skip
_SHARED: Final = frozenset({"model", "stream", "stream_options", "user"})

CHAT_FIELDS: Final = _SHARED | {"messages"}
CHAT_IGNORED: Final = _TUNING | {
    "logit_bias", "max_completion_tokens", "max_tokens", "prediction", "reasoning_effort",
    "verbosity",
}  # fmt: skip
RESPONSE_FIELDS: Final = _SHARED | {"background", "conversation", "input", "previous_response_id"}
RESPONSE_IGNORED: Final = _TUNING | {
    "context_management", "include", "instructions", "max_output_tokens", "max_tool_calls",
    "reasoning", "truncation",
}  # fmt: skip
"""Fields that are accepted, and change nothing."""

_EMPTY: Final[tuple[Any, ...]] = (None, False, 0, [], {}, "")
_MEANINGLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": _EMPTY,
    "function_call": (*_EMPTY, "none", "auto"),
    "functions": _EMPTY,
    "logprobs": _EMPTY,
    "modalities": (*_EMPTY, ["text"]),
    "moderation": _EMPTY,
    "n": (None, 1),
    "prompt": _EMPTY,
    "response_format": (*_EMPTY, {"type": "text"}),
    "stop": _EMPTY,
    "text": (*_EMPTY, {"format": {"type": "text"}}),
    "tool_choice": (*_EMPTY, "none", "auto"),
    "tools": _EMPTY,
    "top_logprobs": _EMPTY,
    "web_search_options": _EMPTY,
}
"""Fields that are refused, unless their value asks for nothing."""


class ParamProblem(Problem):
    """A request with one field that cannot be served. `param`: its name."""

    def __init__(self, param: str, kind: str, message: str, status: int = 400) -> None:
        super().__init__(status, kind, f"{param}: {message}")
        self.param = param


@attrs.frozen(kw_only=True)
class Asked:
    """One request. `session` is None where it names none by itself."""

    text: str
    session: str | None
    sender: str | None
    stream: bool
    usage: bool = False
    background: bool = False
    previous: str | None = None


def chat_asked(fields: Mapping[str, Any]) -> Asked:
    """The body of a chat completion. Raises `ParamProblem`."""
    _check(fields, CHAT_FIELDS, CHAT_IGNORED)
    options: Mapping[str, Any] = _optional(fields, "stream_options", dict) or {}
    user = _optional(fields, "user", str) or None
    return Asked(
        text=_last_user_text(_required(fields, "messages"), "messages"),
        session=user,
        sender=user,
        stream=bool(_optional(fields, "stream", bool)),
        usage=bool(options.get("include_usage")),
    )


def response_asked(fields: Mapping[str, Any]) -> Asked:
    """The body of a response. Raises `ParamProblem`."""
    _check(fields, RESPONSE_FIELDS, RESPONSE_IGNORED)
    given = _required(fields, "input")
    user = _optional(fields, "user", str) or None
    asked = Asked(
        text=given if isinstance(given, str) else _last_user_text(given, "input"),
        session=user or _conversation(fields),
        sender=user,
        stream=bool(_optional(fields, "stream", bool)),
        background=bool(_optional(fields, "background", bool)),
        previous=_optional(fields, "previous_response_id", str) or None,
    )
    if asked.previous is not None and fields.get("conversation") is not None:
        raise ParamProblem("previous_response_id", "invalid", "not together with conversation")
    return asked


def _check(fields: Mapping[str, Any], used: frozenset[str], ignored: frozenset[str]) -> None:
    for name, value in fields.items():
        if name in used or name in ignored:
            continue
        if name not in _MEANINGLESS:
            raise ParamProblem(shown(name)[1:-1], "unknown_parameter", "unknown")
        if not _asks_nothing(name, value):
            raise ParamProblem(name, "unsupported_parameter", "not supported: the agent decides")


def _asks_nothing(name: str, value: Any) -> bool:
    if name == "text" and isinstance(value, dict):
        # How long an answer is to be is left to the agent.
        table = cast("dict[str, Any]", value)
        value = {key: inner for key, inner in table.items() if key != "verbosity"}
    return value in _MEANINGLESS[name]


def _required(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ParamProblem(name, "missing_required_parameter", "missing")
    return fields[name]


def _optional(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise ParamProblem(name, "invalid_type", f"expected {kind.__name__}, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    return type(value).__name__


def _conversation(fields: Mapping[str, Any]) -> str | None:
    value = fields.get("conversation")
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("id", 0)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ParamProblem("conversation", "invalid_type", 'expected a name or {"id": name}')
    return value


# ----- the text: that of the last message from the user


def _last_user_text(value: Any, param: str) -> str:
    """Earlier messages are not read: they are the agent's own history in its session."""
    if not isinstance(value, list):
        raise ParamProblem(
            param, "invalid_type", f"expected a list of messages, got {_kind(value)}"
        )
    items = cast("Sequence[Any]", value)
    for place in range(len(items) - 1, -1, -1):
        item = _message(items[place], f"{param}[{place}]")
        if item.get("role") == "user":
            return _text_of(item.get("content"), f"{param}[{place}].content")
    raise ParamProblem(param, "invalid", "there is no message with the role user")


def _message(item: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise ParamProblem(param, "invalid_type", f"expected an object, got {_kind(item)}")
    found = cast("Mapping[str, Any]", item)
    if found.get("role") in ("tool", "function") or found.get("type", "message") != "message":
        # It follows the user's words, and would be lost with what came before them.
        raise ParamProblem(
            param, "unsupported_value", "not supported: the agent calls its own tools"
        )
    return found


def _text_of(content: Any, param: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ParamProblem(param, "invalid_type", f"expected a text or parts, got {_kind(content)}")
    parts = cast("Sequence[Any]", content)
    return "\n".join(_part(part, f"{param}[{place}]") for place, part in enumerate(parts))


def _part(part: Any, param: str) -> str:
    table: Mapping[str, Any] = cast("Mapping[str, Any]", part) if isinstance(part, dict) else {}
    kind, text = table.get("type"), table.get("text")
    if kind in ("text", "input_text") and isinstance(text, str):
        return text
    raise ParamProblem(
        param, "unsupported_value", f"only parts of text are supported, got {shown(kind)}"
    )


# ----- ids


def new_id(prefix: str, key: str | None) -> str:
    """The id of a message, and of what is made of it: the same for the same idempotency key."""
    if key is None:
        return f"{prefix}_{secrets.token_hex(16)}"
    digest = hashlib.sha256(f"{prefix}\0{key}".encode("utf-8", "replace")).hexdigest()
    return f"{prefix}_{digest[:32]}"
