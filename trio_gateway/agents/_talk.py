"""What is said between a model and whoever asks it: values, and what is told of the past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from .._errors import GatewayError

if TYPE_CHECKING:
    from .._messages import HistoryItem


class ModelFailed(GatewayError):
    """The model server refused, or did not answer however often it was asked; or the model asked
    for tools until the turn's model calls were used up."""


@attrs.frozen
class Call:
    """A tool call that a model asks for; `arguments` is what it wrote, JSON if all is well."""

    id: str
    name: str
    arguments: str


@attrs.frozen
class Said:
    """What a model said: a text, or tool calls, or both; `finish` is why it stopped there."""

    text: str
    calls: tuple[Call, ...]
    finish: str

    def as_message(self) -> dict[str, Any]:
        """As a message of the conversation."""
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.calls
        ]
        return {"role": "assistant", "content": self.text or None, "tool_calls": calls}


def opening(
    system: str | None, past: Sequence[HistoryItem], text: str, context: int
) -> list[dict[str, Any]]:
    """The messages that a turn begins with: as much of the past as fits into `context` characters
    beside the other two. It begins with the user, and the two speak by turns: some models know
    nothing else."""
    room = context - len(system or "") - len(text)
    lines = [_message("user" if line.role == "user" else "assistant", line.text) for line in past]
    messages = _by_turns([*_newest(lines, room), _message("user", text)])
    return messages if system is None else [_message("system", system), *messages]


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _newest(lines: Sequence[dict[str, Any]], room: int) -> Sequence[dict[str, Any]]:
    """The newest lines that fit, from a user's line on."""
    first = len(lines)
    while first and len(lines[first - 1]["content"]) <= room:
        first -= 1
        room -= len(lines[first]["content"])
    while first < len(lines) and lines[first]["role"] != "user":
        first += 1
    return lines[first:]


def _by_turns(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of one speaker, one after the other, as one."""
    said: list[dict[str, Any]] = []
    for line in lines:
        if said and said[-1]["role"] == line["role"]:
            said[-1] = _message(line["role"], f"{said[-1]['content']}\n\n{line['content']}")
        else:
            said.append(line)
    return said
