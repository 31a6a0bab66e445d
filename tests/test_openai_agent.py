"""A model as an agent, against a server that nobody here wrote: `llmock`, as a process of its own
on loopback, which is told what to say and how to fail. Real HTTP, a real store, real time."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.request import Request, urlopen

import attrs
import pytest
import trio
import trio.lowlevel
from helpers import Log, crash_copy, msg, rows
from processes import launch, markers

from trio_gateway import (
    AgentMisuse,
    AgentNotUsable,
    DrainReport,
    Gateway,
    HistoryItem,
    Settings,
    Turn,
    TurnState,
    open_gateway,
)
from trio_gateway._events import (
    ModelDelayed,
    ProgressShown,
    StepRemembered,
    TurnInterrupted,
    TurnSettled,
)
from trio_gateway._policy import SORRY
from trio_gateway.agents import ModelFailed, OpenAIAgent, Tool, tool
from trio_gateway.agents._talk import Call, Said, opening
from trio_gateway.agents.openai_ import CUT

pytest.importorskip("openai", reason='the extra is not installed: pip install -e ".[test]"')
LLMOCK = shutil.which("llmock", path=str(Path(sys.executable).parent))
needs_llmock = pytest.mark.skipif(
    LLMOCK is None, reason='llmock is not installed: pip install -e ".[test]"'
)

PATIENCE = 20.0
"""Seconds that anything may take on a busy machine before a test fails."""

KEY = "sk-what-nobody-may-read"


# ----- the server


class Server:
    """A `llmock` that runs: what it is to do, and what it was asked."""

    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}"
        self.url = f"{self._root}/v1"

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self._root}/_llmock/{path}", data=data, method=method)
        with urlopen(request, timeout=PATIENCE) as response:
            return json.loads(response.read())

    def does(self, *behaviors: dict[str, Any]) -> None:
        """What it does with the next requests, in this order."""
        self._call("POST", "scenario", {"behaviors": list(behaviors)})

    def says(self, *texts: str) -> None:
        """What the model says next."""
        self.does(*({"type": "reply", "text": text} for text in texts))

    def reset(self) -> None:
        """Forget everything."""
        self._call("POST", "reset")

    def asked(self) -> list[dict[str, Any]]:
        """The requests, as records of its journal, oldest first."""
        found: list[dict[str, Any]] = self._call("GET", "requests")["requests"]
        return found

    def bodies(self) -> list[dict[str, Any]]:
        """What was in them."""
        return [record["body"] for record in self.asked()]

    def verdict(self) -> list[str]:
        """What `llmock` finds fault with in how it was asked."""
        return [found["code"] for found in self._call("GET", "verdict")["findings"]]


def calls(*wanted: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The model asks for tools."""
    tools = [{"name": name, "arguments": arguments} for name, arguments in wanted]
    return {"type": "reply", "tool_calls": tools} | more


def fails(status: int, **more: Any) -> dict[str, Any]:
    """The server refuses."""
    return {"type": "fail", "status": status} | more


def breaks(kind: str, after: int = 3, **more: Any) -> dict[str, Any]:
    """A stream breaks."""
    return {"type": "stream_fault", "kind": kind, "after_chunks": after} | more


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One process for all tests of this file."""
    yield from serving(tmp_path_factory.mktemp("llmock"))


@pytest.fixture(scope="module")
def running_slowly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that takes its time over every token."""
    yield from serving(tmp_path_factory.mktemp("llmock"), "--stream-chunk-delay-ms", "30")


def serving(where: Path, *options: str) -> Iterator[Server]:
    assert LLMOCK is not None
    log = where / "log.txt"
    env = {name: value for name, value in os.environ.items() if not name.startswith("LLMOCK_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [LLMOCK, "serve", "--port", "0", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=where,
        )
    try:
        yield Server(port_of(process, log))
    finally:
        process.kill()
        process.wait()


def port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(found[1])
        time.sleep(0.02)
    raise AssertionError(f"llmock does not serve: {log.read_text()}")


@pytest.fixture
def server(running: Server) -> Server:
    """It, with nothing left of the last test."""
    running.reset()
    return running


@pytest.fixture
def slow_server(running_slowly: Server) -> Server:
    """It, with nothing left of the last test."""
    running_slowly.reset()
    return running_slowly


def asking(server: Server, **options: Any) -> OpenAIAgent:
    """An agent that asks it."""
    return OpenAIAgent(model="m", base_url=server.url, api_key=KEY, **options)


class Hosted:
    """A gateway with a model in it."""

    def __init__(self, gateway: Gateway, log: Log) -> None:
        self.gateway = gateway
        self.log = log

    async def ask(self, text: str = "hi", session: str = "a") -> str:
        """What is said in the end to a message."""
        replies = await self.gateway.ask(msg(session, f"m{time.monotonic_ns()}", text))
        return replies[-1].text

    async def error(self, text: str = "hi") -> str:
        """The error with which a turn fails; the sender learns nothing of it."""
        before = len(self.log.of(TurnSettled))
        assert await self.ask(text) == SORRY
        settled = self.log.of(TurnSettled)[before]
        assert settled.state is TurnState.FAILED
        assert settled.error is not None
        return settled.error

    def steps(self) -> list[str]:
        """The names of the steps that were remembered."""
        return [event.name for event in self.log.of(StepRemembered)]

    def drafts(self) -> list[str]:
        """What was shown as the beginning of a reply."""
        return [event.text for event in self.log.of(ProgressShown) if event.draft]


@asynccontextmanager
async def hosted(agent: OpenAIAgent, where: Path, **settings: Any) -> AsyncGenerator[Hosted]:
    """A gateway on the store in `where`; nothing in the block may take longer than `PATIENCE`."""
    log = Log()
    with trio.fail_after(PATIENCE):
        async with open_gateway(
            agent, store=where / "gateway.db", settings=Settings(**settings), listen=log
        ) as gateway:
            yield Hosted(gateway, log)


def roles(body: dict[str, Any]) -> list[str]:
    return [message["role"] for message in body["messages"]]


def results(body: dict[str, Any]) -> list[str]:
    """What the model was told of its tool calls."""
    return [m["content"] for m in body["messages"] if m["role"] == "tool"]


# ----- asking


@needs_llmock
async def test_the_model_answers(server: Server, memory_path: Path) -> None:
    server.says("Hello, Ada.")
    async with hosted(asking(server), memory_path) as house:
        assert await house.ask("I am Ada") == "Hello, Ada."
        assert house.steps() == ["model 1"]
    (record,) = server.asked()
    assert record["body"]["messages"] == [{"role": "user", "content": "I am Ada"}]
    assert "tools" not in record["body"]
    assert server.verdict() == []


@needs_llmock
async def test_the_model_is_told_the_past(server: Server, memory_path: Path) -> None:
    server.says("Hello, Ada.", "You are Ada.", "Who?")
    async with hosted(asking(server, system="Be brief."), memory_path) as house:
        await house.ask("I am Ada")
        await house.ask("Who am I?")
        await house.ask("Who am I?", session="b")
    assert server.bodies()[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "I am Ada"},
        {"role": "assistant", "content": "Hello, Ada."},
        {"role": "user", "content": "Who am I?"},
    ]
    assert roles(server.bodies()[2]) == ["system", "user"]


@needs_llmock
async def test_history_0_tells_nothing_of_the_past(server: Server, memory_path: Path) -> None:
    async with hosted(asking(server, history=0), memory_path) as house:
        await house.ask("one")
        await house.ask("two")
    assert server.bodies()[1]["messages"] == [{"role": "user", "content": "two"}]


@needs_llmock
async def test_limits_and_extra_fields_are_in_the_request(
    server: Server, memory_path: Path
) -> None:
    agent = asking(server, max_tokens=7, extra={"temperature": 0.0, "seed": 3})
    async with hosted(agent, memory_path) as house:
        await house.ask()
    async with hosted(asking(server, max_tokens=None), memory_path) as house:
        await house.ask()
    first, second = server.bodies()
    assert (first["max_tokens"], first["temperature"], first["seed"]) == (7, 0.0, 3)
    assert "max_tokens" not in second


@pytest.mark.parametrize(
    ("url", "field"),
    [
        (None, "max_completion_tokens"),
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "max_completion_tokens"),
        ("http://127.0.0.1:8000/v1", "max_tokens"),
        ("https://openai.com.example/v1", "max_tokens"),
    ],
)
async def test_the_limit_has_the_name_that_the_server_knows(url: str | None, field: str) -> None:
    agent = OpenAIAgent(model="m", base_url=url, api_key=KEY, max_tokens=7)
    async with agent:
        assert agent._model is not None
        request = agent._model._request([], {})
    assert {name: request[name] for name in request if "tokens" in name} == {field: 7}


@needs_llmock
async def test_an_answer_that_was_cut_for_its_length_says_so(
    server: Server, memory_path: Path
) -> None:
    server.does({"type": "reply", "text": "It is a long", "finish_reason": "length"})
    async with hosted(asking(server), memory_path) as house:
        assert await house.ask() == f"It is a long\n\n{CUT}"


def line(role: Literal["user", "agent"], text: str) -> HistoryItem:
    return HistoryItem(role=role, text=text, at=datetime(2026, 1, 1, tzinfo=UTC))


PAST = [line("user", "a" * 10), line("agent", "b" * 10), line("user", "c" * 10)]
PAST += [line("agent", "d" * 10), line("agent", "e" * 10)]


@pytest.mark.parametrize(
    ("context", "told"),
    [
        (1000, "aaa bbb ccc ddd+eee now"),
        (53, "aaa bbb ccc ddd+eee now"),
        (52, "ccc ddd+eee now"),
        (33, "ccc ddd+eee now"),
        (32, "now"),  # a past that begins with an answer is no conversation
        (0, "now"),
    ],
)
def test_the_oldest_is_left_out_where_the_context_is_too_short(context: int, told: str) -> None:
    messages = opening(None, PAST, "now", context)
    seen = ["+".join(part[:3] for part in m["content"].split("\n\n")) for m in messages]
    assert " ".join(seen) == told
    assert [m["role"] for m in messages[::2]] == ["user"] * len(messages[::2])


def test_the_system_message_takes_its_part_of_the_context() -> None:
    messages = opening("s" * 21, PAST, "now", 53)
    assert [m["content"][:1] for m in messages] == ["s", "n"]


# ----- an answer as it grows


@needs_llmock
async def test_an_answer_is_shown_as_it_grows(slow_server: Server, memory_path: Path) -> None:
    text = " ".join(f"word{n}" for n in range(30))
    slow_server.says(text)
    async with hosted(asking(slow_server), memory_path) as house:
        began = time.monotonic()
        assert await house.ask() == text
        took = time.monotonic() - began
        drafts = house.drafts()
    assert drafts[-1] == text
    assert len(drafts) > 3
    assert all(text.startswith(draft) for draft in drafts)
    assert drafts == sorted(set(drafts), key=len)
    assert len(drafts) <= took / 0.1 + 2, "a draft every tenth of a second at the most"


@needs_llmock
async def test_a_fast_answer_does_not_flood(server: Server, memory_path: Path) -> None:
    text = "word " * 5000
    server.says(text)
    async with hosted(asking(server), memory_path) as house:
        began = time.monotonic()
        await house.ask()
        took = time.monotonic() - began
        assert house.drafts()[-1] == text
        assert len(house.drafts()) <= took / 0.1 + 2


# ----- tools


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


@tool(effect="safe")
async def weather(city: Annotated[str, "where"], unit: Literal["C", "F"] = "C") -> dict[str, Any]:
    """The weather in a city."""
    await trio.lowlevel.checkpoint()
    return {"city": city, "unit": unit, "degrees": 21}


@needs_llmock
async def test_tools_are_called_and_their_results_told(server: Server, memory_path: Path) -> None:
    server.does(calls(("add", {"a": 2, "b": 3}), ("weather", {"city": "Paris"})))
    server.says("It is warm.")
    async with hosted(asking(server, tools=[add, weather]), memory_path) as house:
        assert await house.ask() == "It is warm."
        assert house.steps() == ["model 1", "tool 1 add", "tool 2 weather", "model 2"]
    first, second = server.bodies()
    assert first["tool_choice"] == "auto"
    described = {one["function"]["name"]: one["function"] for one in first["tools"]}
    assert described["add"] == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    assert described["weather"]["parameters"]["properties"]["unit"]["enum"] == ["C", "F"]
    assert roles(second) == ["user", "assistant", "tool", "tool"]
    assert results(second) == ["5", '{"city":"Paris","unit":"C","degrees":21}']
    asked = second["messages"][1]["tool_calls"]
    told = second["messages"][2:]
    assert [one["id"] for one in asked] == [one["tool_call_id"] for one in told]
    assert server.verdict() == []


@needs_llmock
async def test_what_it_says_before_it_asks_for_tools_is_said(
    server: Server, memory_path: Path
) -> None:
    """So every draft is how the next reply begins."""
    server.does(calls(("add", {"a": 1}), text="I will add."))
    server.says("It is 2.")
    async with hosted(asking(server, tools=[add]), memory_path) as house:
        replies = await house.gateway.ask(msg("a", "m1"))
        assert [reply.text for reply in replies] == ["I will add.", "It is 2."]
        drafts = house.drafts()
    assert server.bodies()[1]["messages"][1]["content"] == "I will add."
    assert [draft for draft in drafts if draft.endswith(".")] == ["I will add.", "It is 2."]


@needs_llmock
async def test_a_model_that_calls_tools_by_itself(server: Server, memory_path: Path) -> None:
    """What the server makes of a schema is an argument that fits it."""
    seen: list[str] = []

    async def look_up(topic: str) -> str:
        """Look something up."""
        seen.append(topic)
        return f"all about {topic}"

    async with hosted(asking(server, tools=[look_up]), memory_path) as house:
        assert await house.ask("Look up honey") != SORRY
    assert len(seen) == 1
    assert results(server.bodies()[1]) == [f"all about {seen[0]}"]


def broken(how: str) -> str:
    """Fail."""
    raise LookupError(f"no {how} in the shop\nand a second line")


@needs_llmock
async def test_a_tool_that_raises_is_told_in_one_line_and_remembered(
    server: Server, memory_path: Path
) -> None:
    server.does(calls(("broken", {"how": "honey"})))
    server.says("There is none.")
    async with hosted(asking(server, tools=[broken]), memory_path) as house:
        assert await house.ask() == "There is none."
        assert "tool 1 broken" in house.steps()
    assert results(server.bodies()[1]) == ["Error: LookupError: no honey in the shop"]


@needs_llmock
@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (calls(("add", {"a": "many"})), "Error: a: Input should be a valid integer"),
        (calls(("add", {})), "Error: a: Field required"),
        (calls(("add", {"a": 1, "c": 2})), "Error: c: Extra inputs are not permitted"),
        (calls(("sub", {"a": 1})), "Error: there is no tool 'sub'. There are: add."),
        ({"type": "tool_fault", "kind": "unknown_tool"}, "Error: there is no tool 'llmock_unknown"),
        ({"type": "tool_fault", "kind": "malformed_arguments"}, "Error: arguments: Invalid JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_call_that_cannot_be_made_is_told(
    server: Server, memory_path: Path, wanted: dict[str, Any], told: str
) -> None:
    server.does(wanted)
    async with hosted(asking(server, tools=[add]), memory_path) as house:
        assert await house.ask() != SORRY
    (result,) = results(server.bodies()[1])
    assert result.startswith(told)
    assert "\n" not in result


@needs_llmock
async def test_a_result_is_text_json_or_what_can_be_shown(
    server: Server, memory_path: Path
) -> None:
    given: list[Any] = ["text", None, [1, {"a": True}], object(), "x" * 20_000, "lone \ud800"]
    values = iter(given)

    def take() -> Any:
        return next(values)

    server.does(calls(*[("take", {})] * len(given)))
    async with hosted(asking(server, tools=[take]), memory_path) as house:
        await house.ask()
    told = results(server.bodies()[1])
    assert told[:3] == ["text", "null", '[1,{"a":true}]']
    assert told[3].startswith("<object object at")
    assert told[4] == "x" * 16_000 + "\n(cut here: 4000 more characters)"
    assert told[5] == "lone \ufffd"


@needs_llmock
async def test_a_tool_can_have_the_turn_and_a_key_of_its_own(
    server: Server, memory_path: Path
) -> None:
    keys: list[str] = []

    @tool(effect="idempotent", name="buy", description="Buy it.")
    async def order(item: str, *, turn: Turn, idempotency_key: str) -> str:
        keys.append(idempotency_key)
        await turn.say(f"Buying {item}.")
        return turn.session.name

    server.does(calls(("buy", {"item": "tea"}), ("buy", {"item": "honey"})))
    server.says("Done.")
    async with hosted(asking(server, tools=[order]), memory_path) as house:
        replies = await house.gateway.ask(msg("ada", "m1", "shop"))
        assert [reply.text for reply in replies] == ["Buying tea.", "Buying honey.", "Done."]
    function = server.bodies()[0]["tools"][0]["function"]
    assert (function["name"], function["description"]) == ("buy", "Buy it.")
    assert list(function["parameters"]["properties"]) == ["item"]
    assert results(server.bodies()[1]) == ["ada", "ada"]
    assert len(set(keys)) == 2


@needs_llmock
async def test_the_last_call_of_a_turn_may_ask_for_no_tool(
    server: Server, memory_path: Path
) -> None:
    server.does(calls(("add", {"a": 1}), times=2))
    async with hosted(asking(server, tools=[add], max_calls=3), memory_path) as house:
        assert await house.ask() != SORRY
    assert [body["tool_choice"] for body in server.bodies()] == ["auto", "auto", "none"]


@needs_llmock
async def test_a_model_that_asks_for_tools_without_end_fails_the_turn(
    server: Server, memory_path: Path
) -> None:
    server.does(calls(("add", {"a": 1}), times=None))
    async with hosted(asking(server, tools=[add], max_calls=3), memory_path) as house:
        assert "in the last of its 3 calls" in await house.error()
    assert len(server.asked()) == 3


# ----- trouble that passes


@needs_llmock
async def test_a_server_that_asks_to_wait_is_asked_when_it_wants(
    server: Server, memory_path: Path
) -> None:
    server.does(fails(429, retry_after=0.7))
    server.says("Here I am.")
    async with hosted(asking(server), memory_path) as house:
        began = time.monotonic()
        assert await house.ask() == "Here I am."
        assert time.monotonic() - began >= 0.7
        (delayed,) = house.log.of(ModelDelayed)
    assert 0.7 <= delayed.retry_in <= 0.8
    assert "429" in delayed.error
    assert server.verdict() == []


@needs_llmock
@pytest.mark.parametrize("status", [408, 409, 500, 503, 529])
async def test_a_server_that_is_not_well_is_asked_again(
    server: Server, memory_path: Path, status: int
) -> None:
    server.does(fails(status, retry_after=0.05))
    server.says("Better.")
    async with hosted(asking(server), memory_path) as house:
        assert await house.ask() == "Better."
    assert len(server.asked()) == 2


@needs_llmock
async def test_without_a_time_from_the_server_the_pauses_grow(
    server: Server, memory_path: Path
) -> None:
    server.does(fails(500, times=2))
    async with hosted(asking(server), memory_path) as house:
        await house.ask()
        first, second = (event.retry_in for event in house.log.of(ModelDelayed))
    assert 0.5 <= first <= 1.0 <= second <= 2.0
    assert server.verdict() == []


@needs_llmock
@pytest.mark.parametrize("kind", ["disconnect", "truncate", "malformed"])
async def test_a_stream_that_breaks_is_no_answer(
    server: Server, memory_path: Path, kind: str
) -> None:
    """The SDK takes the second of them for an answer."""
    server.does(breaks(kind), {"type": "reply", "text": "All of it, to the end.", "times": 2})
    async with hosted(asking(server), memory_path) as house:
        assert await house.ask() == "All of it, to the end."
        assert len(house.log.of(ModelDelayed)) == 1
    assert len(server.asked()) == 2
    # It cannot always tell: a stream with rubbish in it may have been sent to its end all the same.
    assert server.verdict() in ([], ["malformed_chunk_ignored"] if kind == "malformed" else [])


@needs_llmock
async def test_a_server_that_falls_silent_is_asked_again(server: Server, memory_path: Path) -> None:
    server.does(breaks("stall", stall_seconds=5))
    server.says("No.", "Yes.")
    async with hosted(asking(server, timeout=0.3), memory_path) as house:
        assert await house.ask() == "Yes."
        (delayed,) = house.log.of(ModelDelayed)
    assert delayed.error == "the model server is silent (ReadTimeout)"


@needs_llmock
async def test_broken_streams_have_an_end(server: Server, memory_path: Path) -> None:
    server.does(breaks("truncate", times=None))
    async with hosted(asking(server, tries=2), memory_path) as house:
        assert "was cut: it has no finish reason (asked 2 times)" in await house.error()
    assert len(server.asked()) == 2


@needs_llmock
async def test_a_wait_that_is_longer_than_the_patience_is_not_begun(
    server: Server, memory_path: Path
) -> None:
    server.does(fails(429, retry_after=3600))
    async with hosted(asking(server, patience=60), memory_path) as house:
        began = time.monotonic()
        error = await house.error()
        assert time.monotonic() - began < 30  # not a minute, and not an hour
    assert "429" in error
    assert "more than the 60 s of `patience`" in error


@needs_llmock
async def test_a_wait_that_is_longer_than_the_turn_is_not_begun(
    server: Server, memory_path: Path
) -> None:
    server.does(fails(429, retry_after=100))
    async with hosted(asking(server), memory_path, time_limit=30.0) as house:
        error = await house.error()
    assert re.search(r"asked again in 1\d\d s, and the turn has (29|30) s left", error)


async def test_a_server_that_is_not_there(memory_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        agent = OpenAIAgent(model="m", base_url=url, tries=2)
        async with hosted(agent, memory_path) as house:
            error = await house.error()
    assert error.startswith("ModelFailed: no connection to the model server (ConnectError")
    assert error.endswith("(asked 2 times)")


# ----- trouble that does not pass


@needs_llmock
@pytest.mark.parametrize(
    ("status", "more", "hint"),
    [
        (401, {}, "look at `api_key`, or OPENAI_API_KEY"),
        (403, {}, "look at `api_key`, or OPENAI_API_KEY"),
        (404, {}, "look at `base_url`, and whether it has model 'm'"),
        (400, {"code": "context_length_exceeded"}, "give less `context`, or less `history`"),
        (429, {"code": "insufficient_quota"}, "asking again would not help"),
        (422, {}, "asking again would not help"),
    ],
)
async def test_a_refusal_is_one_clear_error(
    server: Server, memory_path: Path, status: int, more: dict[str, Any], hint: str
) -> None:
    server.does(fails(status, times=None, message="That is why.", **more))
    async with hosted(asking(server), memory_path) as house:
        error = await house.error()
        assert error == f"ModelFailed: the model server answered {status}: That is why. ({hint})"
        (settled,) = house.log.of(TurnSettled)
        trace = str(settled.traceback)
    assert trace.count("Traceback") == 1, "how the SDK came to it is nobody's business"
    assert len(server.asked()) == 1
    assert server.verdict() in ([], ["gave_up"])


@needs_llmock
async def test_a_key_that_the_server_quotes_is_in_no_error(
    server: Server, memory_path: Path
) -> None:
    server.does(fails(401, message=f"Incorrect API key: {KEY}\x1b[31m"))
    server.does(fails(500, message=f"Broken by {KEY}", retry_after=0.01))
    agent = asking(server)
    async with hosted(agent, memory_path) as house:
        error = await house.error()
        await house.ask("again")
        assert len(house.log.of(ModelDelayed)) == 1
        assert KEY not in "".join(map(repr, house.log.events))
    assert "Incorrect API key: [secret]\\x1b[31m" in error
    assert KEY not in repr(agent)
    assert repr(agent) == "OpenAIAgent(model='m')"


@needs_llmock
def test_a_key_is_in_no_log_line(server: Server, tmp_path: Path) -> None:
    """Of a process, at the level that tells everything."""
    server.does(fails(401, message=f"Incorrect API key: {KEY}"))
    agent = f"""
    import logging
    from trio_gateway.agents import OpenAIAgent
    logging.basicConfig(level="DEBUG")
    agent = OpenAIAgent(model="m", base_url={server.url!r}, api_key={KEY!r})
    """
    with launch(tmp_path, agent, env=os.environ | {"TRIO_GATEWAY_LOG_LEVEL": "debug"}) as gateway:
        gateway.send("a", "m1")
        gateway.expect("reply", text=SORRY)
        assert gateway.stop() == 0
        assert "the model server answered 401" in gateway.stderr
        assert KEY not in gateway.stderr


# ----- interrupted


LAMP = """
import os, time
from pathlib import Path
from trio_gateway.agents import OpenAIAgent, tool

def press(what: str) -> str:
    with Path("book").open("a") as book:
        book.write(what + "\\n")
    while not Path("done").exists():
        time.sleep(0.01)
    return "pressed"

def light(what: str) -> str:
    return press(what)

agent = OpenAIAgent(model="m", base_url={url!r}, tools=[tool(effect={effect!r})(light)])
"""
"""An agent whose tool writes down that it was called, and ends when there is a file `done`."""


def book(where: Path) -> list[str]:
    """The calls of the tool."""
    return (where / "book").read_text().split() if (where / "book").exists() else []


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@needs_llmock
def test_p08_killed_in_a_model_call_the_tools_before_it_are_not_called_again(
    server: Server, tmp_path: Path
) -> None:
    agent = LAMP.format(url=server.url, effect="unsafe")
    (tmp_path / "done").touch()
    server.does(calls(("light", {"what": "lamp"}), text="I press it."))
    # The second answer does not come to its end in the first life.
    server.does({"type": "reply", "text": "Light! Light! Light! Light!", "times": 2})
    server.does(breaks("stall", after=0, stall_seconds=0, times=1))
    server.does(breaks("stall", stall_seconds=4))
    with launch(tmp_path, agent) as gateway:
        gateway.send("a", "m1")
        gateway.expect("reply", text="I press it.")
        gateway.expect("progress", text="Light! ")
        gateway.kill()
    assert markers(tmp_path)["a"][0] == "RUNNING"
    with launch(tmp_path, agent) as gateway:
        gateway.expect("reply", text="Light! Light! Light! Light!")
        assert gateway.stop() == 0
    assert said(tmp_path) == ["I press it.", "Light! Light! Light! Light!"]
    assert book(tmp_path) == ["lamp"]
    assert [roles(body)[-1] for body in server.bodies()].count("user") == 1
    assert results(server.bodies()[-1]) == ["pressed"]


@needs_llmock
@pytest.mark.parametrize("effect", ["safe", "idempotent", "unsafe"])
def test_p08_killed_in_a_tool(server: Server, tmp_path: Path, effect: str) -> None:
    """It is called again if it says that it may be; else the model is told that nobody knows."""
    agent = LAMP.format(url=server.url, effect=effect)
    server.does(calls(("light", {"what": "lamp"})))
    server.says("The end.")
    with launch(tmp_path, agent) as gateway:
        gateway.send("a", "m1")
        wait_for(lambda: book(tmp_path))
        gateway.kill()
    (tmp_path / "done").touch()
    with launch(tmp_path, agent) as gateway:
        gateway.expect("reply", text="The end.")
        assert gateway.stop() == 0
    first, second = server.bodies()
    (told,) = results(second)
    if effect == "unsafe":
        assert book(tmp_path) == ["lamp"]
        assert told.startswith("The outcome of this call is unknown")
    else:
        assert book(tmp_path) == ["lamp", "lamp"]
        assert told == "pressed"
    assert roles(first) == ["user"]
    assert len(second["messages"][1]["tool_calls"]) == 1, "what the model had asked for is kept"


EXAMPLE = Path(__file__).parents[1] / "examples" / "openai_agent.py"


@needs_llmock
def test_the_example_orders_nothing_twice(server: Server, tmp_path: Path) -> None:
    """Killed while it orders, as its docstring says."""
    shop = tmp_path / "shop.log"
    server.does(calls(("in_stock", {"item": "honey"})))
    server.does(calls(("order", {"item": "honey", "count": 2})))
    server.says("I do not know whether your order has arrived.")
    env = os.environ | {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": KEY, "SHOP_PACE": "60"}
    with launch(tmp_path, EXAMPLE.read_text(), env=env) as gateway:
        gateway.send("a", "m1", "Two jars of honey, please.")
        wait_for(lambda: shop.exists() and shop.read_text())
        gateway.kill()
    with launch(tmp_path, EXAMPLE.read_text(), env=env) as gateway:
        gateway.expect("reply", text="I do not know whether your order has arrived.")
        assert gateway.stop() == 0
    assert shop.read_text() == "2 honey\n"
    stock, ordered = results(server.bodies()[-1])
    assert stock == "7"
    assert ordered.startswith("The outcome of this call is unknown")
    assert len(server.asked()) == 3


@needs_llmock
async def test_p05_slow_tokens_and_a_stop_in_the_middle(
    slow_server: Server, memory_path: Path
) -> None:
    text = "word " * 200  # six seconds
    slow_server.says(text)
    agent = asking(slow_server)
    async with hosted(agent, memory_path, grace=0.3, budget=5.0) as house:
        await house.gateway.accept([msg("a", "m1")])
        await house.log.wait_for(ProgressShown)
    report = house.gateway.report
    assert report is not None
    assert (len(report.interrupted), report.unresponsive, report.timed_out) == (1, (), True)
    assert sum(report.phases.values()) < 5

    slow_server.says("Short.")
    async with hosted(agent, memory_path) as house:
        (settled,) = await house.log.wait_for(TurnSettled)
        assert settled.state is TurnState.COMPLETED
    assert said(memory_path) == ["Short."]


def said(where: Path) -> list[str]:
    """What was said for good, in every life."""
    sql = "SELECT text FROM delivery WHERE kind != 'notice' ORDER BY id"
    return [str(text) for (text,) in rows(where / "gateway.db", sql)]


@needs_llmock
async def test_an_answer_that_is_under_way_may_end_in_the_drain(
    slow_server: Server, memory_path: Path
) -> None:
    text = "word " * 30
    slow_server.says(text)
    async with hosted(asking(slow_server), memory_path) as house:
        await house.gateway.accept([msg("a", "m1")])
        await house.log.wait_for(ProgressShown)
    assert house.gateway.report is not None
    assert len(house.gateway.report.settled) == 1
    assert said(memory_path) == [text]


class Gate:
    """A tool that the test lets end."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.open = trio.Event()
        self.times = 0

    async def wait(self) -> str:
        """Wait for the gate."""
        self.times += 1
        self.begun.set()
        await self.open.wait()
        return "open"


@needs_llmock
async def test_when_the_gateway_drains_a_tool_may_end_and_no_model_call_begins(
    server: Server, memory_path: Path
) -> None:
    """Neither does the next tool; the stop does not wait, and nothing is done again."""
    gate = Gate()
    agent = asking(server, tools=[gate.wait, add])
    server.does(calls(("wait", {}), ("add", {"a": 1})))
    server.says("Through.")
    async with hosted(agent, memory_path, grace=10.0, budget=15.0) as house:
        await house.gateway.accept([msg("a", "m1")])
        await gate.begun.wait()
        house.gateway.request_stop()
        await house.gateway.draining.wait_value(True)
        gate.open.set()
    report = house.gateway.report
    assert report is not None
    assert (report.interrupted, report.timed_out) == ((1,), False)
    assert report.phases["drain"] < 5
    assert house.steps() == ["model 1", "tool 1 wait"]
    assert len(house.log.of(TurnInterrupted)) == 1
    assert len(server.asked()) == 1

    async with hosted(agent, memory_path) as house:
        (settled,) = await house.log.wait_for(TurnSettled)
        assert settled.state is TurnState.COMPLETED
        assert house.steps() == ["tool 2 add", "model 2"]
    assert gate.times == 1
    assert said(memory_path) == ["Through."]
    assert len(server.asked()) == 2


@needs_llmock
async def test_when_the_gateway_drains_nobody_waits_for_a_busy_server(
    server: Server, memory_path: Path
) -> None:
    agent = asking(server)
    server.does(fails(429, retry_after=60))
    async with hosted(agent, memory_path, grace=10.0, budget=15.0) as house:
        await house.gateway.accept([msg("a", "m1")])
        await house.log.wait_for(ModelDelayed)
    assert house.gateway.report is not None
    assert house.gateway.report.phases["drain"] < 5
    server.says("Now.")
    async with hosted(agent, memory_path) as house:
        await house.log.wait_for(TurnSettled)
    assert said(memory_path) == ["Now."]


@needs_llmock
async def test_p08_an_answer_that_was_remembered_is_not_asked_for_again(
    server: Server, memory_path: Path
) -> None:
    """Killed between the answer and its settling."""
    server.says("Once.")
    store = memory_path / "gateway.db"
    log = Log()
    copies: list[Path] = []

    def look(event: object) -> None:
        if isinstance(event, StepRemembered):
            copies.append(crash_copy(store))

    log.hooks.append(look)
    agent = asking(server)
    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=store, listen=log, inline_store=True) as gateway:
            await gateway.ask(msg("a", "m1"))
        async with open_gateway(agent, store=copies[0], listen=log) as gateway:
            await log.wait_for(TurnSettled, 2)
    assert len(server.asked()) == 1


async def test_leave_is_for_a_gateway_that_drains(memory_path: Path) -> None:
    errors: list[str] = []
    turns: list[Turn] = []

    async def agent(turn: Turn) -> str:
        turns.append(turn)
        try:
            await turn.leave()
        except AgentMisuse as error:
            errors.append(str(error))
        return "stayed"

    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=memory_path / "gateway.db") as gateway:
            (reply,) = await gateway.ask(msg("a", "m1"))
            assert reply.text == "stayed"
            with pytest.raises(AgentMisuse, match="this turn is over"):
                await turns[0].leave()
    assert len(errors) == 1
    assert "does not drain" in errors[0]


async def test_a_turn_that_leaves_makes_the_drain_short_and_resumes(memory_path: Path) -> None:
    resumed: list[bool] = []
    begun = trio.Event()

    async def agent(turn: Turn) -> str:
        resumed.append(turn.resumed is not None)
        if turn.resumed is None and turn.message.id != "m2":
            begun.set()
            await turn.draining.wait_value(True)
            await turn.leave()
        return "back"

    store = memory_path / "gateway.db"
    with trio.fail_after(PATIENCE):
        async with open_gateway(agent, store=store, settings=Settings(grace=15.0)) as gateway:
            await gateway.accept([msg("a", "m1"), msg("a", "m2"), msg("b", "m3")])
            await begun.wait()
        report = gateway.report
        assert isinstance(report, DrainReport)
        assert (report.interrupted, report.settled, report.timed_out) == ((1, 2), (), False)
        async with open_gateway(agent, store=store) as gateway:
            await gateway.wait_idle()
    assert resumed == [False, False, True, True, False]


# ----- streams that no server should send, and some do


class Nobody:
    """Who is shown a draft."""

    def progress(self, text: str, *, draft: bool = False) -> None:
        """Look away."""


async def heard(*lines: str) -> Said:
    from trio_gateway.agents._hearing import Draft, Hearing, hear

    async def stream() -> AsyncGenerator[str]:
        for line in lines:
            await trio.lowlevel.checkpoint()
            yield line

    nobody: Any = Nobody()
    hearing = Hearing(Draft(nobody))
    await hear(stream(), hearing)
    return hearing.said(str)


def chunk(finish: str | None = None, **delta: Any) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]})


END = chunk("stop")
FUNCTION = {"name": "f", "arguments": '{"a": 1}'}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([chunk(content="a"), "", ": ping", "event: x", chunk(content="b"), END], "ab"),
        (["data:" + chunk("stop", content="tight")[5:].strip()], "tight"),
        ([chunk("stop", content="a"), "data: [DONE]", chunk(content="b")], "a"),
        ([chunk(refusal="I may not.", content=None), END], "I may not."),
        (['data: {"choices": []}', chunk("stop", content="a"), 'data: {"choices": null}'], "a"),
        ([chunk("stop", content="half \ud83d"), chunk(content="\ude00")], "half 😀"),
    ],
)
async def test_what_counts_of_a_stream(lines: list[str], expected: str) -> None:
    assert await heard(*lines) == Said(expected, (), "stop")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"id": "x", "function": FUNCTION}, {"id": "y", "function": FUNCTION}], ["x", "y"]),
        ([{"index": 0, "function": FUNCTION}], ["call-0"]),
        ([{"index": 7, "id": "x", "function": {"name": "f"}},
          {"index": 7, "function": {"arguments": '{"a": 1}'}}], ["x"]),
        ([{"id": "x", "function": {"name": "f", "arguments": '{"a"'}},
          {"function": {"arguments": ": 1}"}}], ["x"]),
    ],
)  # fmt: skip
async def test_calls_in_all_their_forms(lines: list[dict[str, Any]], expected: list[str]) -> None:
    said = await heard(*(chunk(tool_calls=[part]) for part in lines), chunk("tool_calls"))
    assert said.calls == tuple(Call(id, "f", '{"a": 1}') for id in expected)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "no finish reason"),
        ([chunk(content="a"), "data: [DONE]"], "no finish reason"),
        (["data: {"], "not understood"),
        (["data: []"], "not understood"),
        (['data: {"choices": [3]}'], "not understood"),
        (['data: {"choices": [{"delta": {"tool_calls": [{"index": []}]}}]}'], "not understood"),
        (['data: {"error": {"message": "overloaded"}}', END], "overloaded"),
        (['data: {"error": "overloaded"}', END], "overloaded"),
        ([chunk("stop", content="  ")], "answered with nothing"),
        ([chunk("stop", content=["a"])], "answered with nothing"),
        ([chunk("length")], "said nothing within `max_tokens`"),
        ([chunk("content_filter")], "withheld"),
    ],
)
async def test_what_is_no_answer(lines: list[str], why: str) -> None:
    from trio_gateway.agents._hearing import NoAnswer

    with pytest.raises((NoAnswer, ModelFailed), match=re.escape(why)):
        await heard(*lines)


async def test_an_answer_without_end_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trio_gateway.agents import _hearing

    monkeypatch.setattr(_hearing, "LONGEST_ANSWER", 1000)

    def forever() -> Iterable[str]:
        while True:
            yield chunk(content="x" * 100)

    async def stream() -> AsyncGenerator[str]:
        for line in forever():
            await trio.lowlevel.checkpoint()
            yield line

    nobody: Any = Nobody()
    hearing = _hearing.Hearing(_hearing.Draft(nobody))
    with trio.fail_after(PATIENCE):
        await _hearing.hear(stream(), hearing)
    with pytest.raises(_hearing.NoAnswer, match="longer than 1000 characters"):
        hearing.said(str)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)}, 0.0),
        ({}, None),
    ],
)
def test_when_the_server_wants_to_be_asked_again(
    headers: dict[str, str], seconds: float | None
) -> None:
    from trio_gateway.agents._model import _retry_after

    assert _retry_after(headers) == seconds


def test_the_server_can_name_a_date() -> None:
    from trio_gateway.agents._model import _retry_after

    later = datetime.now(UTC) + timedelta(seconds=30)
    seconds = _retry_after({"retry-after": format_datetime(later, usegmt=True)})
    assert seconds is not None
    assert 25 < seconds <= 30


# ----- what it is made of


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": ""}, "model: expected a text"),
        ({"model": 3}, "model: expected a text"),
        ({"system": 3}, "system: expected a text"),
        ({"api_key": b"secret-secret"}, "api_key: expected a text, got bytes"),
        ({"base_url": "localhost:8000"}, "base_url: expected one that begins with http"),
        ({"history": -1}, "history=-1: expected a number, at least 0"),
        ({"history": "20"}, "history='20': expected a number"),
        ({"context": 0}, "context=0: expected a number, at least 1"),
        ({"max_tokens": 0}, "max_tokens=0: expected a number, at least 1"),
        ({"max_calls": 0}, "max_calls=0: expected a number"),
        ({"max_calls": True}, "max_calls=True: expected a number"),
        ({"tries": 0}, "tries=0: expected a number"),
        ({"timeout": 0}, "timeout=0: expected seconds, more than 0"),
        ({"timeout": float("inf")}, "timeout=inf: expected seconds"),
        ({"patience": "long"}, "patience='long': expected seconds"),
    ],
    ids=str,
)
def test_an_argument_without_meaning_is_one_error(options: dict[str, Any], error: str) -> None:
    with pytest.raises(AgentNotUsable) as raised:
        OpenAIAgent(**{"model": "m"} | options)
    assert error in str(raised.value)
    assert "secret" not in str(raised.value)


def takes_anything(*args: int) -> None:
    raise NotImplementedError


def takes_by_place(a: int, /) -> None:
    raise NotImplementedError


def says_nothing(a) -> None:  # type: ignore[no-untyped-def]
    raise NotImplementedError


def takes_a_socket(a: socket.socket) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ([3], "3 is no tool: give a function"),
        ([add, add], "two tools are called 'add'"),
        ([lambda: 3], "tool '<lambda>': a name has 1 to 64 letters"),
        ([Tool(fn=add, name="a b")], "tool 'a b': a name has"),
        ([takes_anything], "tool 'takes_anything': parameter 'args' cannot be given by name"),
        ([takes_by_place], "tool 'takes_by_place': parameter 'a' cannot be given by name"),
        ([says_nothing], "tool 'says_nothing': parameter 'a' has no annotation"),
        ([takes_a_socket], "tool 'takes_a_socket': its parameters have no JSON schema"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tool_that_is_none_is_one_error(tools: list[Any], error: str) -> None:
    with pytest.raises(AgentNotUsable) as raised:
        OpenAIAgent(model="m", tools=tools)
    assert error in str(raised.value)


def test_an_effect_without_meaning_is_an_error_where_it_is_said() -> None:
    with pytest.raises(AgentNotUsable, match="effect='harmless': expected 'safe'"):
        tool(effect="harmless")
    with pytest.raises(AgentNotUsable, match="effect='harmless': expected 'safe'"):
        Tool(fn=add, effect="harmless")


def test_a_tool_is_still_its_function() -> None:
    assert tool(effect="safe")(add)(2, b=3) == 5


@attrs.define
class Shop:
    """What a tool can belong to."""

    stock: dict[str, int]

    def count(self, schema: str, copy: bool = False) -> int:
        """How many there are. (Its parameters are called what fields of a model may not be.)"""
        return self.stock[schema] + copy


def test_methods_and_odd_names_make_tools() -> None:
    agent = OpenAIAgent(model="m", tools=[Shop({"tea": 3}).count])
    (offer,) = agent._offers.values()
    assert list(offer.schema["function"]["parameters"]["properties"]) == ["schema", "copy"]
    assert offer.read('{"schema": "tea"}') == {"schema": "tea"}
    assert offer.tool.fn(**offer.read('{"schema": "tea", "copy": true}')) == 4


async def test_without_a_key_it_says_so_when_the_gateway_starts(
    memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    agent = OpenAIAgent(model="m")
    with pytest.raises(AgentNotUsable, match="no key: set OPENAI_API_KEY"):
        async with hosted(agent, memory_path):
            raise AssertionError("it has started")


@needs_llmock
async def test_key_and_server_come_from_the_environment(
    server: Server, memory_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with hosted(OpenAIAgent(model="m"), memory_path) as house:
        assert await house.ask() != SORRY
    assert len(server.asked()) == 1


@needs_llmock
async def test_one_agent_can_serve_two_gateways(server: Server, memory_path: Path) -> None:
    """Which end in any order; its connections are closed with the last."""
    agent = asking(server)
    (memory_path / "other").mkdir()
    async with hosted(agent, memory_path) as house:
        async with hosted(agent, memory_path / "other") as other:
            assert await other.ask() != SORRY
        assert await house.ask() != SORRY
        model = agent._model
        assert model is not None
        assert not model._client.is_closed()
    assert model._client.is_closed()


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.stdout + done.stderr


def test_an_extra_that_is_missing_is_one_error() -> None:
    said = python(
        "import sys; sys.modules['openai'] = None\n"
        "from trio_gateway.agents import OpenAIAgent\n"
        "try: OpenAIAgent(model='m')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    assert said.startswith("AgentNotUsable OpenAIAgent needs packages")
    assert said.rstrip().endswith('pip install "trio-gateway[openai]"')


def test_the_sdk_is_imported_only_when_it_is_used() -> None:
    said = python(
        "import sys, trio_gateway.agents\n"
        "print([name for name in ('openai', 'pydantic', 'httpx2') if name in sys.modules])"
    )
    assert said.strip() == "[]"
