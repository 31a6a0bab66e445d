"""The OpenAI API, with the agent as a model: `/v1/models`, `/v1/chat/completions`, `/v1/responses`.

A request is one message of one session; its id is the response's id, so that a response is found
again in any later life. What a stream tells is folded out of the journal (see `_fold`): nothing is
told before it is on disk, and a stream that broke goes on behind any of its events.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import orjson
import trio
from starlette.requests import Request
from starlette.responses import Response

from .._messages import Message, SessionKey
from ..store import JournalEntry, StoreReader
from ._events import frame, stream, wait_for_more, watch
from ._fold import MODEL, ChatFold, Event, ResponseFold, turns_led
from ._house import PAGE, House
from ._messages import accept, outcome_within
from ._openai_asked import Asked, ParamProblem, chat_asked, new_id, response_asked
from ._problem import RETRY_SOON, Problem, answer
from ._request import number, read_object, trace_of

Send = Callable[[Any], Awaitable[None]]
Write = Callable[[bytes], Awaitable[None]]

CHAT: Final = "chatcmpl"
RESPONSE: Final = "resp"

LARGEST: Final = 2**53

DO_NOT_REPEAT: Final = {"x-should-retry": "false"}
"""For OpenAI's clients, which repeat a request after 409, 429 and 5xx: here, it would be another
message, or wait in vain."""

_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


# ----- errors


def is_here(path: str) -> bool:
    """Whether a path belongs to the OpenAI API: its errors have that API's form."""
    return path.startswith(("/v1/models", "/v1/chat/", "/v1/responses"))


def told(problem: Problem) -> Response:
    """A problem in OpenAI's envelope. Bad input is 400 here."""
    status = 400 if problem.status == 422 else problem.status
    headers = dict(problem.headers)
    if status == 409 or problem.kind == "too_many_attempts":
        headers |= DO_NOT_REPEAT
    return answer({"error": _error(problem, status)}, status, headers)


def _error(problem: Problem, status: int) -> dict[str, Any]:
    return {
        "message": problem.message,
        "type": _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": getattr(problem, "param", None),
        "code": problem.kind,
    }


# ----- models


async def get_models(house: House, request: Request) -> Response:
    """GET /v1/models"""
    await trio.lowlevel.checkpoint()
    return answer({"object": "list", "data": [_model()]})


async def get_model(house: House, request: Request) -> Response:
    """GET /v1/models/{name}"""
    await trio.lowlevel.checkpoint()
    if request.path_params["name"] != MODEL:
        raise ParamProblem("model", "model_not_found", f"there is one: {MODEL}", 404)
    return answer(_model())


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": "trio-gateway"}


# ----- messages in


@attrs.frozen
class _Question:
    """A request as the message that it becomes."""

    asked: Asked
    message: Message
    repeatable: bool
    """Whether a repeat would be recognised."""


async def _question(house: House, request: Request, asked: Asked, prefix: str) -> _Question:
    key = request.headers.get("idempotency-key") or None
    message_id = new_id(prefix, key)
    session = await _session_of(house, request, asked)
    message = Message(
        # A session of its own where none is named; the same one when the same key comes again.
        session=session or message_id,
        id=message_id,
        text=asked.text,
        sender=asked.sender,
        channel=house.channel,
        traceparent=trace_of(request),
    )
    return _Question(asked, message, key is not None)


async def _session_of(house: House, request: Request, asked: Asked) -> str | None:
    if (named := request.headers.get("x-session")) is not None:
        session = house.session(named)
        if session.channel != house.channel:
            raise ParamProblem("X-Session", "invalid", f"{session} belongs to another channel")
        return session.name
    if asked.session is not None or asked.previous is None:
        return asked.session
    return (await _known(house, asked.previous, "previous_response_id")).session.name


# ----- what is known of a response


@attrs.frozen
class _Known:
    """A message, and where its journal begins."""

    id: str
    session: SessionKey
    before: int
    led: frozenset[int]
    requeued: int

    def fold(self) -> ResponseFold:
        return ResponseFold(self.id, self.session.name, led=self.led, requeued=self.requeued)


async def _known(house: House, message_id: str, param: str = "response_id") -> _Known:
    """Raises `ParamProblem` (404)."""
    found = None
    if message_id.startswith((f"{RESPONSE}_", f"{CHAT}_")):
        found = await house.ask(lambda reader: _look_up(reader, house.channel, message_id))
    if found is None:
        raise ParamProblem(param, "not_found", "there is no such response (any more)", 404)
    return found


def _look_up(reader: StoreReader, channel: str, message_id: str) -> _Known | None:
    place = reader.journal_place(channel, message_id)
    life = reader.journal_about(channel, message_id)
    if place is None or not life or life[0].what != "accepted":
        return None
    session, seq = place
    requeued = max((entry.seq for entry in life if entry.what == "requeued"), default=0)
    led = turns_led(message_id, _until(reader, session, seq - 1, requeued)) if requeued else ()
    return _Known(message_id, session, seq - 1, frozenset(led), requeued)


def _until(
    reader: StoreReader, session: SessionKey, after: int, seq: int
) -> tuple[JournalEntry, ...]:
    """A journal up to a place, and a page beyond: what was committed together stands together."""
    entries: tuple[JournalEntry, ...] = ()
    while after < seq and (page := reader.journal(session, after, PAGE)):
        entries += page
        after = page[-1].seq
    return entries + tuple(reader.journal(session, after, PAGE))


async def _feed(
    house: House, known: _Known, fold: ResponseFold, entries: Sequence[JournalEntry]
) -> list[Event]:
    """The events that a part of the journal makes."""
    if any(entry.what == "begun" and not entry.messages for entry in entries):
        # Its messages went on to another turn meanwhile; the journal tells which they were.
        fold.lead((await _known(house, known.id)).led)
    return [event for entry in entries for event in fold.feed(entry)]


async def _folded(house: House, known: _Known) -> ResponseFold:
    """A response as it stands."""
    fold, after = known.fold(), known.before
    while entries := await house.journal(known.session, after, drafts=True):
        await _feed(house, known, fold, entries)
        after = entries[-1].seq
        if fold.ended or len(entries) < PAGE:
            break
    return fold


async def _follow(
    house: House, known: _Known, write: Write, told: Callable[[list[Event]], bytes]
) -> ResponseFold:
    """Write a response's events, as `told` puts them, until its end, or the gateway's."""
    fold, after = known.fold(), known.before
    with house.bells.following(known.session) as bell, house.streaming.reading(known.session):
        while not fold.ended:
            heard, closing = bell.rung, house.closing.is_set()
            while entries := await house.happened(bell, known.session, after, drafts=True):
                after = entries[-1].seq
                if data := told(await _feed(house, known, fold, entries)):
                    await write(data)
                if fold.ended:
                    break
            if closing or fold.ended:
                break
            if not await wait_for_more(house, bell, heard):
                await write(b": still here\n\n")
    return fold


async def _accept_and_wait(house: House, request: Request, message: Message) -> None:
    """Hand a message in, and wait until it has reached its end, as long as may be; not for a client
    that has left."""
    with house.gateway.question(message) as question:
        await accept(house, message, question)
        if house.draining:
            return  # what begins after the restart is not worth a wait
        left = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, request, nursery.cancel_scope)
            await outcome_within(house, question, house.settings.longest_wait)
            left = False
            nursery.cancel_scope.cancel()
    if left:
        raise Problem(400, "gone", "the client has left")


# ----- responses


async def post_response(house: House, request: Request, send: Send) -> None:
    """POST /v1/responses"""
    asked = response_asked(await read_object(request, house.settings))
    question = await _question(house, request, asked, RESPONSE)
    message = question.message
    if asked.stream:
        with house.streaming.reading(message.key):
            await accept(house, message)
            await _stream_response(house, request, send, await _known(house, message.id), -1)
        return
    if asked.background:
        await accept(house, message)
    else:
        await _accept_and_wait(house, request, message)
    await _send_response(house, request, send, message.id)


async def _send_response(house: House, request: Request, send: Send, message_id: str) -> None:
    fold = await _folded(house, await _known(house, message_id))
    await answer(fold.response())(request.scope, request.receive, send)


async def _stream_response(
    house: House, request: Request, send: Send, known: _Known, after: int
) -> None:
    """What comes behind the event with the number `after`. If the gateway stops first, the stream
    ends without a last event: then the client comes back."""

    def told(events: list[Event]) -> bytes:
        return b"".join(
            frame(event["type"], event) for event in events if event["sequence_number"] > after
        )

    async def body(write: Write) -> None:
        await _follow(house, known, write, told)

    await stream(request, send, body)


async def get_response(house: House, request: Request, send: Send) -> None:
    """GET /v1/responses/{id}"""
    message_id = request.path_params["id"]
    if request.query_params.get("stream", "false").lower() not in ("true", "1"):
        await _send_response(house, request, send, message_id)
        return
    known = await _known(house, message_id)
    named = request.query_params.get("starting_after")
    after = number(request, "starting_after", 0, LARGEST) if named else -1
    await _stream_response(house, request, send, known, after)


async def post_cancel(house: House, request: Request) -> Response:
    """POST /v1/responses/{id}/cancel: end its turn for good, like /stop."""
    known = await _known(house, request.path_params["id"])
    row = await house.ask(lambda reader: reader.message(house.channel, known.id))
    if row is not None and row.state == "queued":
        raise Problem(
            409, "waits", "it waits behind another turn of its session: cancel that one, or wait"
        )
    if row is not None and row.state == "running":
        await house.gateway.stop_turn(known.session)
    return answer((await _folded(house, known)).response())


async def delete_response(house: House, request: Request) -> Response:
    """DELETE /v1/responses/{id}: not served."""
    await trio.lowlevel.checkpoint()
    raise Problem(
        405, "unsupported", "responses are not deleted one by one; they are forgotten with age"
    )


# ----- chat completions


async def post_chat(house: House, request: Request, send: Send) -> None:
    """POST /v1/chat/completions"""
    asked = chat_asked(await read_object(request, house.settings))
    question = await _question(house, request, asked, CHAT)
    message = question.message
    if asked.stream:
        with house.streaming.reading(message.key):
            await accept(house, message)
            await _stream_chat(house, request, send, question)
        return
    await _accept_and_wait(house, request, message)
    fold = await _folded(house, await _known(house, message.id))
    _check_answered(house, fold, question)
    await answer(_completion(fold))(request.scope, request.receive, send)


def _unanswered(fold: ResponseFold) -> Problem | None:
    """What to tell where there is no answer to tell. Nothing was said, or it goes on."""
    if not fold.ended:
        return Problem(503, "stopping", "the gateway restarts; the answer comes after that")
    if fold.state == "answered" or fold.texts:
        return None
    return Problem(500, fold.state or "failed", f"this has ended: {fold.state}", DO_NOT_REPEAT)


def _check_answered(house: House, fold: ResponseFold, question: _Question) -> None:
    """Raises `Problem` where there is no answer to tell. Only a request that would be recognised
    may be repeated by the client itself."""
    problem = _unanswered(fold)
    if problem is None:
        return
    if fold.ended:
        raise problem
    if not house.draining:
        problem = Problem(504, "slow", "this takes longer, and goes on")
    if question.repeatable:
        raise Problem(problem.status, problem.kind, problem.message, RETRY_SOON)
    advice = f"{problem.message}; an Idempotency-Key would make a repeat safe"
    raise Problem(problem.status, problem.kind, advice, DO_NOT_REPEAT)


def _completion(fold: ResponseFold) -> dict[str, Any]:
    text = "\n\n".join(text for text in fold.texts if text)
    return {
        "id": fold.id,
        "object": "chat.completion",
        "created": int(fold.created),
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "trio_gateway": _way(fold),
    }


def _way(fold: ResponseFold) -> dict[str, Any]:
    """What OpenAI's API has no words for."""
    return {"state": fold.state, "session": fold.session}


async def _stream_chat(house: House, request: Request, send: Send, question: _Question) -> None:
    known = await _known(house, question.message.id)
    chat = ChatFold()
    chunks = _Chunks(known, question.asked.usage)

    def told(events: list[Event]) -> bytes:
        if events and events[0]["type"] == "response.created":
            chunks.created = int(events[0]["response"]["created_at"])
            return chunks.delta({"role": "assistant", "content": chat.feed(events)})
        text = chat.feed(events)
        return chunks.delta({"content": text}) if text else b""

    async def body(write: Write) -> None:
        fold = await _follow(house, known, write, told)
        problem = _unanswered(fold)
        await write(chunks.end(fold) if problem is None else _error_chunk(problem))

    await stream(request, send, body)


class _Chunks:
    """A chat completion in pieces. Nobody counts tokens here, so `usage` is null."""

    def __init__(self, known: _Known, usage: bool) -> None:
        self._known = known
        self._usage = {"usage": None} if usage else {}
        self.created = 0

    def delta(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._chunk([choice], **more)

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        return _data({
            "id": self._known.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": MODEL,
            "choices": choices,
            **self._usage,
            **more,
        })  # fmt: skip

    def end(self, fold: ResponseFold) -> bytes:
        last = self._chunk([]) if self._usage else b""
        return self.delta({}, "stop", trio_gateway=_way(fold)) + last + b"data: [DONE]\n\n"


def _data(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _error_chunk(problem: Problem) -> bytes:
    return _data({"error": _error(problem, problem.status)})
