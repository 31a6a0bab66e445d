"""An answer on its way: server-sent events, put together into what the model said.

The SDK's own stream is not used: it stops reading when it has heard enough, and leaves async
generators open, which is a warning under Trio. Here a stream is read to its end.

A stream that ends without a finish reason was cut, whatever the connection says: half an answer
looks like one.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, cast

import attrs
import trio

from .._policy import unicode_text
from .._turns import Turn
from ._talk import Call, ModelFailed, Said

LONGEST_ANSWER: Final = 4 * 1024 * 1024
"""Characters of one answer at the most, arguments of calls included."""

PACE: Final = 0.1
"""Seconds between two drafts of an answer at the least: a model is faster than any reader."""


class NoAnswer(Exception):
    """There is none now, and may be later; `after`: in so many seconds, says the server."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.after = after


class Draft:
    """Shows an answer as it grows, not more often than it can be read."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._at = -math.inf
        self._shown = ""

    def show(self, text: Callable[[], str], *, last: bool = False) -> None:
        """Show the text so far, if it is time; in the end, always."""
        now = trio.current_time()
        if now - self._at < PACE and not last:
            return
        self._at = now
        so_far = text()
        if so_far and so_far != self._shown:
            self._shown = so_far
            self._turn.progress(so_far, draft=True)


@attrs.define
class _Part:
    """A tool call on its way."""

    id: str = ""
    name: str = ""
    arguments: list[str] = attrs.field(factory=list[str])


@attrs.define(eq=False)
class Hearing:
    """One answer, as far as it has been heard."""

    draft: Draft
    text: list[str] = attrs.field(factory=list[str])
    calls: dict[int, _Part] = attrs.field(factory=dict[int, _Part])
    size: int = 0
    finish: str | None = None
    fault: str | None = None
    over: bool = False

    def take(self, line: str) -> bool:
        """Take one line of the stream; False: nothing more is wanted. Raises nothing."""
        if not line.startswith("data:") or self.over:
            return True
        data = line[5:].strip()
        if data == "[DONE]":
            self.over = True
            return True
        try:
            self._chunk(json.loads(data))  # which also takes half a character
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            self.fault = f"a line of the stream is not understood ({type(error).__name__})"
        if self.size > LONGEST_ANSWER:
            self.fault = f"the answer is longer than {LONGEST_ANSWER} characters"
        return self.fault is None

    def _chunk(self, chunk: Any) -> None:
        if error := chunk.get("error"):
            self.fault = f"an error came instead of the rest: {_message(error)}"
        for choice in (chunk.get("choices") or ())[:1]:
            delta: Any = choice.get("delta") or {}
            if text := _text(delta.get("content")) or _text(delta.get("refusal")):
                self.size += len(text)
                self.text.append(text)
                self.draft.show(self._so_far)
            for part in delta.get("tool_calls") or ():
                self._call(part)
            self.finish = _text(choice.get("finish_reason")) or self.finish

    def _call(self, part: Any) -> None:
        # Some servers send calls whole, and without an index.
        index = part.get("index")
        if index is None:
            index = len(self.calls) if part.get("id") else max(len(self.calls) - 1, 0)
        call = self.calls.setdefault(index, _Part())
        function: Any = part.get("function") or {}
        call.id = _text(part.get("id")) or call.id
        call.name = _text(function.get("name")) or call.name
        arguments = _text(function.get("arguments"))
        self.size += len(arguments)
        call.arguments.append(arguments)

    def _so_far(self) -> str:
        return unicode_text("".join(self.text))

    def said(self, clean: Callable[[str], str]) -> Said:
        """The answer. Raises `NoAnswer` when it is none, and `ModelFailed` when the next would not
        be one either."""
        if self.fault is not None:
            raise NoAnswer(clean(f"the model server's answer: {self.fault}"))
        if self.finish is None:
            raise NoAnswer("the model server's answer was cut: it has no finish reason")
        text = self._so_far()
        if not text.strip() and not self.calls:
            raise self._nothing(clean)
        self.draft.show(lambda: text, last=True)
        return Said(text, tuple(self._calls()), self.finish)

    def _nothing(self, clean: Callable[[str], str]) -> Exception:
        if self.finish == "length":
            return ModelFailed("the model has said nothing within `max_tokens`: allow more")
        if self.finish == "content_filter":
            return ModelFailed("the model server's filter has withheld the answer")
        return NoAnswer(clean(f"the model answered with nothing (finish reason {self.finish})"))

    def _calls(self) -> list[Call]:
        return [
            Call(
                unicode_text(part.id) or f"call-{n}",
                unicode_text(part.name),
                unicode_text("".join(part.arguments)),
            )
            for n, part in enumerate(self.calls.values())
        ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _message(error: object) -> str:
    if isinstance(error, dict):
        return str(cast("dict[str, Any]", error).get("message", "no more is said"))
    return str(error)


async def hear(lines: AsyncIterator[str], hearing: Hearing) -> None:
    """Read a stream to its end. Where nothing more is wanted the reading is cancelled: that is what
    ends generators inside generators in order, and leaves none of them open."""
    with trio.CancelScope() as scope:
        async for line in lines:
            if not hearing.take(line):
                scope.cancel(reason="nothing more is wanted")
