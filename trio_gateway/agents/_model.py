"""A model server, asked until it answers, or until it is clear that it will not.

One call of a model is one HTTP request, made by the official SDK, whose answer is a stream of
events (`_hearing`).

    429, 408, 409, 5xx, no connection, silence    asked again, after what the server says
    a stream without its end, or with rubbish     asked again
    anything else (401, 404, no money)            `ModelFailed`
"""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import attrs
import httpx2
import openai
import trio

from .._errors import escape, shown
from .._events import ModelDelayed
from .._policy import retry_delay, unicode_text
from .._turns import Turn
from ._hearing import Draft, Hearing, NoAnswer, hear
from ._talk import ModelFailed, Said

LONGEST_DELAY: Final = 30.0
"""Seconds between two tries, where the server does not say."""

SHORTEST_SECRET: Final = 8
"""Characters of a key at the least that is taken out of what a server says."""

_AGAIN: Final = (408, 409, 429)
_NEVER: Final = ("insufficient_quota", "context_length_exceeded")
_QUOTED: Final = 300


@attrs.frozen(kw_only=True)
class Asking:
    """How a server is asked. Times are seconds."""

    model: str
    base_url: str | None
    max_tokens: int | None
    timeout: float
    tries: int
    patience: float
    extra: Mapping[str, Any]


class Model:
    """One model at one server, while the block lasts."""

    def __init__(self, asking: Asking, base_url: str | None, api_key: str) -> None:
        self._asking = asking
        # OpenAI's newer models take only the newer name, and most other servers only the older.
        own = base_url is None or httpx2.URL(base_url).host.endswith(".openai.com")
        self._limit = "max_completion_tokens" if own else "max_tokens"
        # A shorter one would be found in words that have nothing to do with it.
        self._secret = api_key if len(api_key) >= SHORTEST_SECRET else None
        self._client = openai.AsyncOpenAI(
            api_key=api_key,
            base_url=base_url,
            max_retries=0,  # it knows nothing of turns that drain, and of their time
            timeout=httpx2.Timeout(asking.timeout, connect=min(asking.timeout, 10.0)),
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def ask(
        self, turn: Turn, messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Any]
    ) -> Said:
        """Ask until it answers; the answer is shown as it grows. `tools`: the fields of the request
        that are about them.

        Raises `ModelFailed`. Leaves the turn when the gateway drains before a try, or between two.
        """
        request = self._request(messages, tools)
        began = trio.current_time()
        tries = 0
        while True:
            tries += 1
            if turn.draining.value:
                await turn.leave()
            try:
                return await self._once(turn, request)
            except NoAnswer as trouble:
                delay = self._delay(trouble, tries, trio.current_time() - began)
                await _wait(turn, trouble, delay)

    def _request(
        self, messages: Sequence[Mapping[str, Any]], tools: Mapping[str, Any]
    ) -> dict[str, Any]:
        request: dict[str, Any] = {"model": self._asking.model, "messages": messages, **tools}
        if self._asking.max_tokens is not None:
            request[self._limit] = self._asking.max_tokens
        return request | {"stream": True, "extra_body": dict(self._asking.extra)}

    async def _once(self, turn: Turn, request: dict[str, Any]) -> Said:
        create: Any = self._client.chat.completions.with_streaming_response.create
        hearing = Hearing(Draft(turn))
        try:
            async with create(**request) as response:
                await hear(response.iter_lines(), hearing)
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            if not hearing.over:
                raise NoAnswer(self._clean(_no_answer(error))) from None
        return hearing.said(self._clean)

    # ----- what a refusal means

    def _refused(self, error: openai.APIStatusError) -> Exception:
        status = error.status_code
        why = self._clean(f"the model server answered {status}: {_words(error)}")
        headers = error.response.headers
        again = status in _AGAIN or status >= 500
        if headers.get("x-should-retry") in ("true", "false"):
            again = headers["x-should-retry"] == "true"
        if again and error.code not in _NEVER:
            return NoAnswer(why, _retry_after(headers))
        return ModelFailed(f"{why} ({self._next_step(error)})")

    def _next_step(self, error: openai.APIStatusError) -> str:
        if error.code == "context_length_exceeded":
            return "give less `context`, or less `history`"
        if error.status_code in (401, 403):
            return "look at `api_key`, or OPENAI_API_KEY"
        if error.status_code == 404:
            return f"look at `base_url`, and whether it has model {shown(self._asking.model)}"
        return "asking again would not help"

    def _clean(self, text: str) -> str:
        """Somebody else's words in one harmless line, without the key: some servers quote it."""
        if self._secret is not None:
            text = text.replace(self._secret, "[secret]")
        line = escape(unicode_text(text))
        return line if len(line) <= _QUOTED else f"{line[:_QUOTED]}…"

    # ----- asking again

    def _delay(self, trouble: NoAnswer, tries: int, waited: float) -> float:
        """Seconds until the next try. Raises `ModelFailed` where there is none."""
        asked = trouble.after
        if asked is None:
            delay = retry_delay(tries, random.random(), cap=LONGEST_DELAY)
        else:
            delay = asked * (1.0 + random.random() / 10)  # so that not all come back together
        left = trio.current_effective_deadline() - trio.current_time()
        if tries >= self._asking.tries:
            raise ModelFailed(f"{trouble.why} (asked {tries} times)") from None
        if waited + delay > self._asking.patience:
            raise ModelFailed(
                f"{trouble.why} (it wants to be asked again in {delay:.0f} s: more than the"
                f" {self._asking.patience:g} s of `patience` in all)"
            ) from None
        if delay >= left:
            raise ModelFailed(
                f"{trouble.why} (it wants to be asked again in {delay:.0f} s, and the turn has"
                f" {max(left, 0.0):.0f} s left)"
            ) from None
        return delay


async def _wait(turn: Turn, trouble: NoAnswer, delay: float) -> None:
    """Wait for the next try, or leave the turn if the gateway drains."""
    events = turn._desk.events
    if events.heard:
        who: dict[str, Any] = {"session": turn.session, "turn": turn.id, "attempt": turn.attempt}
        events.emit(ModelDelayed(**who, error=trouble.why, retry_in=delay))
    if delay >= 1.0:
        turn.progress(f"The model does not answer; asking again in {delay:.0f} s.")
    with trio.move_on_after(delay):
        await turn.draining.wait_value(True)
    if turn.draining.value:
        await turn.leave()


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, or None."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else max(email.utils.mktime_tz(date) - time.time(), 0.0)


def _words(error: openai.APIStatusError) -> str:
    body = error.body
    message = cast("Mapping[str, Any]", body).get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) and message else error.message


def _no_answer(error: Exception) -> str:
    cause = error if isinstance(error, httpx2.HTTPError) else error.__cause__ or error
    if isinstance(cause, httpx2.TimeoutException):
        return f"the model server is silent ({type(cause).__name__})"
    return f"no connection to the model server ({type(cause).__name__}: {cause})"
