"""The OpenAI API, as OpenAI's own client uses it, over real sockets."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import httpx2
import openai
import pytest
import trio
from doors import TOKEN, Door, free_port, open_door
from helpers import Script, rows
from processes import PATIENCE, launch

from trio_gateway import Limits, Settings, StoreBusy, Turn
from trio_gateway._policy import Busy
from trio_gateway.http import HttpSettings, read_token, token_path

# OpenAI's client leaves the generators of a stream that it has read to its [DONE] to the collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning"
)

STORY = "Once upon a time there was a gateway that never lost a turn ."


async def echo(turn: Turn) -> str:
    return f"re: {turn.text}"


async def writer(turn: Turn) -> str:
    """Says something, then writes its answer word by word."""
    await turn.say("On it.")
    for place, letter in enumerate(STORY):
        if letter == " ":
            turn.progress(STORY[: place + 1], draft=True)
            await trio.sleep(0.01)
    return STORY


def of(door: Door, **options: Any) -> openai.AsyncOpenAI:
    given: dict[str, Any] = {
        "base_url": f"{door.url}/v1",
        "api_key": TOKEN,
        "max_retries": 0,
    } | options
    return openai.AsyncOpenAI(**given, http_client=httpx2.AsyncClient(trust_env=False))


@asynccontextmanager
async def talk(where: Path, agent: Any, **options: Any) -> AsyncGenerator[tuple[Door, Any]]:
    """A gateway and OpenAI's client, whose types are those of another service."""
    async with open_door(where, agent, **options) as door, of(door) as client:
        yield door, client


async def until(true: Callable[[], object]) -> None:
    """Wait for what no event tells."""
    with trio.fail_after(PATIENCE):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def events_of(stream: Any) -> list[Any]:
    async with stream:
        return [event async for event in stream]


def numbers(events: list[Any]) -> list[int]:
    return [event.sequence_number for event in events]


def items_of(events: list[Any]) -> dict[int, tuple[str, str]]:
    """What the deltas of each item make, and how it ended."""
    texts: dict[int, str] = {}
    ends: dict[int, tuple[str, str]] = {}
    for event in events:
        if event.type == "response.output_text.delta":
            texts[event.output_index] = texts.get(event.output_index, "") + event.delta
        elif event.type == "response.output_item.done":
            assert event.item.content[0].text == texts[event.output_index]
            ends[event.output_index] = (texts[event.output_index], event.item.status)
    return ends


def said(response: Any) -> list[str]:
    return [item.content[0].text for item in response.output]


def hi(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": text}], **more}


# ----- models


async def test_the_agent_is_the_one_model(tmp_path: Path) -> None:
    async with talk(tmp_path, echo) as (_, client):
        assert [model.id async for model in client.models.list()] == ["trio-gateway"]
        assert (await client.models.retrieve("trio-gateway")).object == "model"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
        assert caught.value.code == "model_not_found"


# ----- responses


async def test_a_response_is_the_answer(tmp_path: Path) -> None:
    async with talk(tmp_path, writer) as (_, client):
        response = await client.responses.create(model="any", input="hi", temperature=0.3)
        assert said(response) == ["On it.", STORY]
        assert (response.status, response.model, response.usage) == (
            "completed",
            "trio-gateway",
            None,
        )
        again = await client.responses.retrieve(response.id)
        assert again == response


async def test_who_names_the_response_before_goes_on_in_its_session(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        return " / ".join(line.text for line in await turn.history(10)) or "nothing"

    async with talk(tmp_path, agent) as (_, client):
        first = await client.responses.create(model="any", input="one")
        alone = await client.responses.create(model="any", input="other")
        second = await client.responses.create(
            model="any", input="two", previous_response_id=first.id
        )
        assert said(first) == said(alone) == ["nothing"]
        assert said(second) == ["one / nothing"]
        third = await client.responses.create(
            model="any", input="three", conversation=first.conversation.id
        )
        assert said(third) == ["one / nothing / two / one / nothing"]


async def test_sessions_are_named_by_header_user_and_conversation(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        return f"{turn.session} {turn.message.sender}"

    async with talk(tmp_path, agent) as (_, client):
        create = client.responses.create
        header = {"X-Session": "desk"}
        named = [
            await create(model="any", input="x", user="ada"),
            await create(model="any", input="x", conversation={"id": "c:1"}),
            await create(model="any", input="x", user="ada", extra_headers=header),
        ]
        assert [said(one)[0] for one in named] == ["http:ada ada", "http:c:1 None", "http:desk ada"]
        chat = await client.chat.completions.create(**hi(user="ada"))
        assert chat.choices[0].message.content == "http:ada ada"
        assert chat.trio_gateway == {"state": "answered", "session": "ada"}


async def test_only_the_last_words_of_the_user_are_sent(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "re: first"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    given: list[dict[str, Any]] = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "re: first"},
        {"role": "user", "content": [{"type": "input_text", "text": "last"}]},
    ]
    async with talk(tmp_path, echo) as (_, client):
        chat = await client.chat.completions.create(model="any", messages=messages)
        assert chat.choices[0].message.content == "re: a\nb"
        assert said(await client.responses.create(model="any", input=given)) == ["re: last"]


async def test_a_stream_tells_how_the_answer_grows(tmp_path: Path) -> None:
    async with talk(tmp_path, writer) as (_, client):
        events = await events_of(
            await client.responses.create(model="any", input="hi", stream=True)
        )
    assert numbers(events) == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert items_of(events) == {0: ("On it.", "completed"), 1: (STORY, "completed")}
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 4
    assert events[-1].type == "response.completed"
    assert said(events[-1].response) == ["On it.", STORY]


async def test_the_clients_own_accumulator_understands_the_stream(tmp_path: Path) -> None:
    async with talk(tmp_path, writer) as (_, client):
        async with client.responses.stream(model="any", input="hi") as stream:
            async for _ in stream:
                pass
            response = await stream.get_final_response()
        assert said(response) == ["On it.", STORY]
        async with client.responses.stream(response_id=response.id, starting_after=7) as stream:
            events = [event async for event in stream]
        # It skips by itself, so it must be sent the beginning; it is, or it could not add up.
        assert events[0].sequence_number == 8


async def test_a_stream_goes_on_behind_any_of_its_events(tmp_path: Path) -> None:
    async with talk(tmp_path, writer) as (_, client):
        created = await client.responses.create(model="any", input="hi", stream=True)
        events = await events_of(created)
        name = events[0].response.id
        for seen in range(len(events)):
            rest = await events_of(
                await client.responses.retrieve(name, stream=True, starting_after=seen)
            )
            assert rest == events[seen + 1 :]
        assert await events_of(await client.responses.retrieve(name, stream=True)) == events


async def test_two_readers_of_one_response_are_told_the_same(tmp_path: Path) -> None:
    told: list[list[Any]] = []
    async with talk(tmp_path, writer) as (_, client):
        response = await client.responses.create(model="any", input="hi", background=True)
        assert response.status in ("queued", "in_progress")

        async def read() -> None:
            told.append(await events_of(await client.responses.retrieve(response.id, stream=True)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
        assert told[0] == told[1]
        assert told[0][-1].type == "response.completed"
        assert (await client.responses.retrieve(response.id)).status == "completed"


async def test_a_draft_that_is_not_written_is_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    async with talk(tmp_path, writer) as (door, client):
        note = door.gateway.note_drafts

        async def busy_now_and_then(drafts: Any) -> None:
            nonlocal calls
            calls += 1
            if calls % 2:
                raise StoreBusy("busy")
            await note(drafts)

        monkeypatch.setattr(door.gateway, "note_drafts", busy_now_and_then)
        events = await events_of(
            await client.responses.create(model="any", input="hi", stream=True)
        )
    assert calls > 4
    assert items_of(events) == {0: ("On it.", "completed"), 1: (STORY, "completed")}


async def test_a_draft_may_be_no_unicode(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        turn.progress("lone \ud800", draft=True)
        await trio.sleep(0.05)
        return "lone \ud800 one"

    async with talk(tmp_path, agent) as (_, client):
        events = await events_of(
            await client.responses.create(model="any", input="hi", stream=True)
        )
    assert items_of(events) == {0: ("lone \ufffd one", "completed")}


@pytest.mark.parametrize("busy", [Busy.INTERRUPT, Busy.COLLECT, Busy.STEER])
async def test_messages_that_share_a_turn_have_streams_of_their_own(
    tmp_path: Path, busy: Busy
) -> None:
    """Whatever turns a message goes through: told again, its stream is the same."""

    async def agent(turn: Turn) -> str:
        text = f"{turn.text}: ".replace("\n", "+")
        for word in ("one ", "two ", "three "):
            text += word
            turn.progress(text, draft=True)
            await trio.sleep(0.1)
        while (more := await turn.take()) is not None:
            text += f"({more.text}) "
        return text

    told: dict[str, list[Any]] = {}
    async with talk(tmp_path, agent, settings=Settings(busy=busy)) as (_, client):

        async def ask(text: str) -> None:
            told[text] = await events_of(
                await client.responses.create(model="any", input=text, user="ada", stream=True)
            )

        async with trio.open_nursery() as nursery:
            for text in ("a", "b", "c"):
                nursery.start_soon(ask, text)
                await trio.sleep(0.15)
        for events in told.values():
            name = events[0].response.id
            assert events[-1].type == "response.completed"
            assert numbers(events) == list(range(len(events)))
            assert await events_of(await client.responses.retrieve(name, stream=True)) == events


async def test_a_word_to_the_gateway_is_answered_by_it(tmp_path: Path) -> None:
    async with talk(tmp_path, echo) as (_, client):
        events = await events_of(
            await client.responses.create(model="any", input="/status", stream=True)
        )
        assert events[-1].type == "response.completed"
        chat = await client.chat.completions.create(**hi("/status"))
        assert [chat.choices[0].message.content] == said(events[-1].response)


async def test_a_response_that_is_tried_again_is_answered_in_the_end(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        turn.progress("I thi", draft=True)
        await trio.sleep(0.05)
        if turn.id == 1:
            raise ValueError
        return "I think so."

    async with talk(tmp_path, agent) as (_, client):
        create = client.responses.create
        events = await events_of(await create(model="any", input="hi", user="ada", stream=True))
        assert events[-1].type == "response.failed"
        retry = await create(model="any", input="/retry", user="ada")
        assert retry.status == "completed"
        name = events[0].response.id
        again = await events_of(await client.responses.retrieve(name, stream=True))
        assert again[-1].type == "response.completed"
        assert again[: len(events) - 1] == events[:-1]
        assert said(await client.responses.retrieve(name))[-1] == "I think so."


async def test_a_client_that_leaves_ends_nothing(tmp_path: Path) -> None:
    script = Script()
    async with talk(tmp_path, script) as (door, client):
        house = door.channel._house
        assert house is not None
        with trio.move_on_after(0.3):
            await client.responses.create(model="any", input="hi", user="ada")
        async with await client.responses.create(
            model="any", input="hi", user="bob", stream=True
        ) as stream:
            assert (await anext(stream)).type == "response.created"
            (session,) = [turn.session for turn in script.turns if turn.session.name == "bob"]
            assert session in house.streaming
        await until(lambda: session not in house.streaming)
        script.release()
        unanswered = "SELECT 1 FROM message WHERE state != 'answered'"
        await until(lambda: not rows(tmp_path / "gateway.db", unanswered))


# ----- ends that are no answers


async def test_a_failure_is_told_with_its_apology(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        turn.progress("I thi", draft=True)
        await trio.sleep(0.05)
        raise ValueError("secret")

    async with talk(tmp_path, agent) as (_, client):
        response = await client.responses.create(model="any", input="hi")
        assert response.status == "failed"
        assert response.error.code == "server_error"
        assert "Sorry" in response.error.message
        assert said(response) == [response.error.message]
        events = await events_of(
            await client.responses.create(model="any", input="hi", stream=True)
        )
        assert events[-1].type == "response.failed"
        assert [how for _, how in items_of(events).values()] == ["incomplete", "completed"]
        assert "Sorry" in said(events[-1].response)[-1]
        chat = await client.chat.completions.create(**hi())
        assert "Sorry" in chat.choices[0].message.content
        assert chat.trio_gateway["state"] == "failed"


async def test_a_response_that_is_cancelled_stays_so(tmp_path: Path) -> None:
    script = Script()
    async with talk(tmp_path, script) as (_, client):
        first = await client.responses.create(model="any", input="hi", user="ada", background=True)
        waits = await client.responses.create(model="any", input="hi", user="ada", background=True)
        await script.wait_begun(1)
        with pytest.raises(openai.ConflictError, match="waits behind"):
            await client.responses.cancel(waits.id)
        async with await client.responses.retrieve(first.id, stream=True) as stream:
            assert (await client.responses.cancel(first.id)).status == "cancelled"
            events = [event async for event in stream]
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.status == "cancelled"
        script.release()
        ended = await events_of(await client.responses.retrieve(waits.id, stream=True))
        assert ended[-1].type == "response.completed"
        assert (await client.responses.cancel(waits.id)).status == "completed"
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel("resp_unknown")


async def test_nothing_said_and_not_answered_is_an_error_of_chat(tmp_path: Path) -> None:
    script = Script()
    async with talk(tmp_path, script) as (door, client), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(openai.InternalServerError, match="stopped"):
                await client.chat.completions.create(**hi(user="ada"))

        nursery.start_soon(ask)
        (turn,) = await script.wait_begun(1)
        await door.gateway.stop_turn(turn.session)


# ----- repeats


async def test_p1_an_idempotency_key_makes_one_message(tmp_path: Path) -> None:
    key = {"Idempotency-Key": "k1"}
    async with talk(tmp_path, echo) as (_, client):
        create = client.responses.create
        first = await create(model="any", input="hi", extra_headers=key)
        assert await create(model="any", input="hi", extra_headers=key) == first
        streamed = await events_of(
            await create(model="any", input="hi", extra_headers=key, stream=True)
        )
        assert said(streamed[-1].response) == ["re: hi"]
        retrying = client.with_options(max_retries=5)
        with pytest.raises(openai.ConflictError) as caught:
            await retrying.responses.create(model="any", input="other", extra_headers=key)
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
        chat = await client.chat.completions.create(**hi("another API"), extra_headers=key)
        assert chat.choices[0].message.content == "re: another API"
    assert rows(tmp_path / "gateway.db", "SELECT count(*) FROM message") == [(2,)]


# ----- chat completions


async def test_a_chat_streams(tmp_path: Path) -> None:
    async with talk(tmp_path, writer) as (_, client):
        chunks = await events_of(await client.chat.completions.create(**hi(stream=True)))
        whole = await client.chat.completions.create(**hi())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content == f"On it.\n\n{STORY}"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert len(chunks) > 4
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_usage_is_not_invented(tmp_path: Path) -> None:
    asked = hi(stream=True, stream_options={"include_usage": True})
    async with talk(tmp_path, echo) as (_, client):
        chunks = await events_of(await client.chat.completions.create(**asked))
        assert (await client.chat.completions.create(**hi())).usage is None
    assert chunks[-1].choices == []
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


async def test_the_client_that_blocks_works_too(tmp_path: Path) -> None:
    def converse(url: str) -> tuple[str | None, list[str], str]:
        with (
            httpx2.Client(trust_env=False) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, http_client=http) as client,
        ):
            chat: Any = client.chat.completions.create(**hi())
            with client.chat.completions.create(**hi(stream=True)) as stream:
                parts = [chunk.choices[0].delta.content or "" for chunk in stream]
            response = client.responses.create(model="any", input="hi")
            return chat.choices[0].message.content, parts, response.output_text

    async with open_door(tmp_path, writer) as door:
        whole, parts, text = await trio.to_thread.run_sync(converse, door.url)
    assert "".join(parts) == whole == f"On it.\n\n{STORY}"
    assert text == f"On it.{STORY}"


async def test_a_chat_that_takes_too_long_goes_on(tmp_path: Path) -> None:
    script = Script()
    key = {"Idempotency-Key": "k"}
    http = HttpSettings(longest_wait=0.1)
    async with talk(tmp_path, script, http=http) as (_, client):
        with pytest.raises(openai.InternalServerError, match="goes on") as caught:
            await client.chat.completions.create(**hi(user="ada"), extra_headers=key)
        assert caught.value.status_code == 504
        with pytest.raises(openai.InternalServerError, match="Idempotency-Key would") as caught:
            await client.with_options(max_retries=3).chat.completions.create(**hi(user="bob"))
        assert caught.value.response.headers["x-should-retry"] == "false"
        response = await client.responses.create(model="any", input="hi", user="eve")
        assert response.status == "in_progress"
        script.release()
        chat = await client.chat.completions.create(**hi(user="ada"), extra_headers=key)
        assert chat.choices[0].message.content == "re: hi"


# ----- what is refused


async def test_errors_raise_what_the_client_knows(tmp_path: Path) -> None:
    async with talk(tmp_path, echo) as (door, client):
        async with of(door, api_key="wrong") as stranger:
            with pytest.raises(openai.AuthenticationError) as refused:
                await stranger.models.list()
            assert refused.value.code == "unauthorized"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.retrieve("resp_0")
        assert missing.value.param == "response_id"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_0", stream=True)
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.create(model="any", input="x", previous_response_id="resp_0")
        assert missing.value.param == "previous_response_id"
        with pytest.raises(openai.APIStatusError, match="forgotten with age") as kept:
            await client.responses.delete("resp_0")
        assert kept.value.status_code == 405
        with pytest.raises(openai.BadRequestError, match="not JSON"):
            await client.post("/responses", cast_to=object, content=b"{")
        with pytest.raises(openai.NotFoundError, match="nothing here"):
            await client.get("/responses/x/unknown", cast_to=object)


async def test_too_many_wrong_tokens_are_not_repeated_by_the_client(tmp_path: Path) -> None:
    options = {"api_key": "wrong", "max_retries": 3}
    async with open_door(tmp_path, echo) as door, of(door, **options) as stranger:
        for _ in range(10):
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        with pytest.raises(openai.RateLimitError) as caught:
            await stranger.models.list()
    assert caught.value.code == "too_many_attempts"


async def test_a_full_or_busy_gateway_is_a_rate_limit(tmp_path: Path) -> None:
    script = Script()
    settings = Settings(limits=Limits(open_per_session=1), busy=Busy.REJECT)
    async with talk(tmp_path, script, settings=settings) as (_, client):
        await client.responses.create(model="any", input="x", user="ada", background=True)
        await script.wait_begun(1)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError):
                await client.chat.completions.create(**hi(user="ada", stream=stream))
        script.release()


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
BAD_CHATS: dict[str, dict[str, Any]] = {
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "n": {"n": 2},
    "logprobs": {"logprobs": True},
    "response_format": {"response_format": {"type": "json_object"}},
    "stop": {"stop": ["x"]},
    "temprature": {"temprature": 1},
    "messages": {"messages": "hi"},
    "messages[0]": {"messages": ["hi"]},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "messages[0].content[1]": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]
    },
    "messages[1]": {
        "messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "42"}]
    },
    "user": {"user": 1},
    "stream": {"stream": "yes"},
}


@pytest.mark.parametrize("param", BAD_CHATS)
async def test_p14_what_cannot_be_had_of_a_chat_is_named(tmp_path: Path, param: str) -> None:
    async with talk(tmp_path, echo) as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post(
                "/chat/completions", cast_to=object, body={**hi(), **BAD_CHATS[param]}
            )
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert param in caught.value.message


BAD_RESPONSES: dict[str, dict[str, Any]] = {
    "input": {"input": None},
    "tools": {"tools": [{"type": "web_search"}]},
    "text": {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
    "prompt": {"prompt": {"id": "p"}},
    "top_logprobs": {"top_logprobs": 2},
    "input[0]": {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
    "input[0].content[0]": {
        "input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]
    },
    "conversation": {"conversation": {"name": "x"}},
    "previous_response_id": {"conversation": "x", "previous_response_id": "resp_1"},
}


@pytest.mark.parametrize("param", BAD_RESPONSES)
async def test_p14_what_cannot_be_had_of_a_response_is_named(tmp_path: Path, param: str) -> None:
    body = {"model": "any", "input": "hi", **BAD_RESPONSES[param]}
    async with talk(tmp_path, echo) as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post("/responses", cast_to=object, body=body)
    assert caught.value.param == param


async def test_what_only_tunes_a_model_is_left_to_the_agent(tmp_path: Path) -> None:
    chat: dict[str, Any]
    chat = {"temperature": 0, "top_p": 1, "max_tokens": 5, "n": 1, "tools": [], "seed": 3,
            "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False,
            "metadata": {"a": "b"}, "stop": None}  # fmt: skip
    response: dict[str, Any]
    response = {"instructions": "Be brief.", "max_output_tokens": 5, "store": False, "tools": [],
                "text": {"format": {"type": "text"}, "verbosity": "low"}, "include": [],
                "reasoning": {"effort": "low"}, "truncation": "auto"}  # fmt: skip
    async with talk(tmp_path, echo) as (_, client):
        assert (await client.chat.completions.create(**hi(**chat))).choices
        assert said(await client.responses.create(model="any", input="x", **response)) == ["re: x"]


# ----- stops


async def test_p5_a_stop_ends_streams_without_a_last_event(tmp_path: Path) -> None:
    async def agent(turn: Turn) -> str:
        turn.progress("Half of", draft=True)
        if turn.resumed is None:
            await trio.sleep_forever()
        await trio.sleep(0.05)
        return "Half of it is the whole."

    seen: list[Any] = []
    async with talk(tmp_path, agent) as (door, client):
        stream = await client.responses.create(model="any", input="hi", stream=True)
        chat = await client.chat.completions.create(**hi(stream=True))
        async with stream, chat, trio.open_nursery() as nursery:

            async def wait_for_chat() -> None:
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.chat.completions.create(**hi())
                assert (caught.value.status_code, caught.value.code) == (503, "stopping")

            async def wait_for_response() -> None:
                response = await client.responses.create(model="any", input="hi")
                assert response.status == "in_progress"

            nursery.start_soon(wait_for_chat)
            nursery.start_soon(wait_for_response)
            while len(seen) < 5:
                seen.append(await anext(stream))
            await until(lambda: len(door.gateway.turns()) == 4)
            door.gateway.request_stop(now=True)
            seen += [event async for event in stream]
            with pytest.raises(openai.APIError, match="restarts"):
                async for _ in chat:
                    pass
    assert seen[-1].delta == "Half of"
    async with talk(tmp_path, agent) as (_, client):
        rest = await events_of(
            await client.responses.retrieve(
                seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
            )
        )
    assert numbers(seen + rest) == list(range(len(seen) + len(rest)))
    assert items_of(seen + rest) == {0: ("Half of it is the whole.", "completed")}
    assert rest[-1].type == "response.completed"


STORYTELLER = """
import trio
WORDS = "Once upon a time there was a gateway that never lost a turn, not even this one".split()
async def agent(turn):
    await turn.say("On it.")
    text = "" if turn.resumed is None or turn.text == "same" else "Again: "
    for word in WORDS:
        text += word + " "
        turn.progress(text, draft=True)
        await trio.sleep(0.04)
    return text + "."
"""
TALE = "Once upon a time there was a gateway that never lost a turn, not even this one ."


def read_on(client: openai.OpenAI, name: str, seen: list[Any]) -> Iterator[Any]:
    """What comes behind what was seen, however often the connection breaks."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(openai.APIConnectionError, httpx2.TransportError):
            after = seen[-1].sequence_number
            with client.responses.retrieve(name, stream=True, starting_after=after) as stream:
                for event in stream:
                    seen.append(event)
                    yield event
                    if event.type == "response.completed":
                        return
        time.sleep(0.05)
    raise AssertionError(f"no end within {PATIENCE} s: {seen}")


@pytest.mark.parametrize("text", ["same", "other"])
def test_p5_a_stream_goes_on_after_kill_9(tmp_path: Path, text: str) -> None:
    """Every event once, no number left out, whether the second attempt writes the same or not."""
    port = free_port()
    options = ("--http", f"127.0.0.1:{port}")
    token = read_token(token_path(tmp_path / "gateway.db"))
    seen: list[Any] = []
    with (
        httpx2.Client(trust_env=False, timeout=PATIENCE) as http,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=token, http_client=http
        ) as client,
    ):
        with (
            launch(tmp_path, STORYTELLER, options=options) as gateway,
            suppress(openai.APIConnectionError, httpx2.TransportError),
            client.responses.create(model="any", input=text, stream=True) as stream,
        ):
            for event in stream:
                seen.append(event)
                if len(seen) == 15:
                    gateway.signal(SIGKILL)
        assert 15 <= len(seen) < 25
        name = seen[0].response.id
        with launch(tmp_path, STORYTELLER, options=options) as gateway:
            list(read_on(client, name, seen))
            final = client.responses.retrieve(name)
            assert gateway.stop() == 0
    assert numbers(seen) == list(range(len(seen)))
    items = items_of(seen)
    assert items[0] == ("On it.", "completed")
    if text == "same":
        assert items[1] == (TALE, "completed")
        assert len(items) == 2
    else:
        assert items[1][1] == "incomplete"
        assert TALE.startswith(items[1][0])
        assert items[2] == (f"Again: {TALE}", "completed")
    assert said(final) == said(seen[-1].response) == ["On it.", items[len(items) - 1][0]]
