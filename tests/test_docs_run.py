"""The listings of the how-to pages are run, against real platforms, models and programs on
loopback. A page that gets another listing fails here, until that is run, too."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from doors import TOKEN, open_door
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from test_openai_agent import Server, calls, needs_llmock, serving
from test_readme import (
    ROOT,
    assert_in_order,
    blocks,
    environment,
    shown,
    terminal,
    wait_delivered,
)

from trio_gateway import Message, Settings, Turn, open_gateway
from trio_gateway._policy import Busy
from trio_gateway.agents import OpenAIAgent, tool
from trio_gateway.testing import (
    CHANNEL_CHECKS,
    STORE_CHECKS,
    GatewayOpener,
    Life,
    MemoryChannel,
    World,
    kill_my_agent_anywhere,
)

# OpenAI's client leaves the generators of a stream that it has read to its [DONE] to the collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Async generator '(openai|httpx2|httpcore2):ResourceWarning"
)

PATIENCE = 90.0
"""Seconds that anything may take on a busy machine before a test fails."""
EXAMPLES = ROOT / "examples"


def listings(page: str) -> list[str]:
    """The Python of a page of docs/."""
    return blocks("python", (ROOT / "docs" / page).read_text())


def made(listing: str, **given: Any) -> dict[str, Any]:
    """What a listing defines, with what the text around it takes for granted."""
    namespace: dict[str, Any] = {"__name__": "listing", **given}
    exec(compile(listing, "<listing>", "exec"), namespace)
    return namespace


def run(command: list[str], where: Path, given: str = "") -> str:
    """What a command writes; it must end well."""
    inherited = {k: v for k, v in environment().items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=where,
        env=inherited | {"NO_PROXY": "127.0.0.1"},
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def verdict_on(where: Path, **files: str) -> str:
    """What pytest says of files in a folder of their own."""
    (where / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    for name, text in files.items():
        (where / f"{name}.py").write_text(text)
    return run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], where)


# ----- approval.md

CLERK, MONDAY, STEERING = listings("approval.md")
STEER = Settings(busy=Busy.STEER)


def test_the_clerk_asks_the_boss_and_waits_until_monday(tmp_path: Path) -> None:
    assert "1 passed" in verdict_on(tmp_path, test_clerk=CLERK + MONDAY)


def test_the_transcript_of_the_question_is_what_happens(tmp_path: Path) -> None:
    (transcript,) = blocks("console", (ROOT / "docs/approval.md").read_text())
    before, after = re.split(r"^.*\bKilled\n", transcript, flags=re.M)
    order, past, answer = re.findall(r"^> (.*)$", before + after, re.M)
    assert past == order
    (tmp_path / "bot.py").write_text((EXAMPLES / "approval.py").read_text())
    with terminal(tmp_path) as first:
        first.wait_for("> ")
        first.type(f"{order}\n")
        first.wait_for(shown(before)[-1])
        wait_delivered(tmp_path / "gateway.db")
        first.kill()

    with terminal(tmp_path) as second:
        second.wait_for(shown(after)[0])
        second.type(f"{answer}\n")
        second.wait_for(shown(after)[-1])
        second.type("\x04")
        assert second.wait_end() == 0
        assert_in_order(shown(after), second.screen)


async def test_an_agent_that_waits_in_its_turn_leaves_it_to_the_next_boot(
    open_test_gateway: GatewayOpener, memory_channel: MemoryChannel, autojump_clock: object
) -> None:
    agent = made(STEERING)["agent"]
    async with open_test_gateway(agent, settings=STEER) as first:
        await memory_channel.receive("ada", "m1", "pay 500")
        await memory_channel.wait_sent(1)
    assert first.report is not None
    assert len(first.report.interrupted) == 1

    async with open_test_gateway(agent, settings=STEER) as second:
        await memory_channel.receive("ada", "m2", "yes")
        await second.wait_idle()

    assert memory_channel.texts("ada") == ["Shall I really pay 500?", "Done."]


async def steered(life: Life) -> None:
    """Somebody asks, and says yes while the turn waits for it."""
    async with life.open_gateway(made(STEERING)["agent"], settings=STEER) as gateway:
        await gateway.accept(Message(session="ada", id="m1", text="pay 500"))
        await gateway.accept(Message(session="ada", id="m2", text="yes"))
        _, replies = await gateway.outcome("local", "m1", wait=True)
        life.world.note(" ".join(reply.text for reply in replies))


def was_told_once(world: World) -> None:
    """What must be so, wherever it died."""
    assert set(world.notes) == {"Shall I really pay 500? Done."}


def test_an_answer_that_was_taken_counts_wherever_the_process_dies() -> None:
    assert kill_my_agent_anywhere(steered, was_told_once).deaths > 10


# ----- writing-a-channel.md

TAKE, SEND, LENGTH, BENCH, HOST = listings("writing-a-channel.md")


@pytest.mark.parametrize("listing", [TAKE, SEND, LENGTH], ids=["take", "send", "length"])
def test_the_channel_on_the_page_is_the_one_of_the_example(listing: str) -> None:
    assert listing in (EXAMPLES / "polling_channel.py").read_text()


def test_the_benches_of_two_pages_hold_a_channel_and_a_store(tmp_path: Path) -> None:
    contracts = listings("testing.md")[-1]
    mine = textwrap.dedent(
        f"""
        from pathlib import Path
        from test_bench import bench as my_bench
        from trio_gateway.store import open_store as open_file

        def open_store(name):
            return open_file(Path({str(tmp_path)!r}, name + ".db"))
        """
    )

    said = verdict_on(
        tmp_path,
        test_bench=BENCH.replace("examples/", f"{EXAMPLES}/"),
        test_contracts=mine + contracts,
    )

    assert f"{2 * len(CHANNEL_CHECKS) + len(STORE_CHECKS)} passed" in said


def test_a_program_hosts_the_channel_until_it_is_told_to_stop(tmp_path: Path) -> None:
    example = f"runpy.run_path({str(EXAMPLES / 'polling_channel.py')!r})"
    program = f"""
import os, runpy, trio
from trio_gateway import open_gateway
globals().update({{name: thing for name, thing in {example}.items() if name[0] != "_"}})
platform, token = Platform(), Platform.token
{HOST.replace('"https://chat.example"', "platform.url")}
async def tried():
    async with platform.serving(), trio.open_nursery() as nursery:
        nursery.start_soon(main)
        platform.say("ada", "hello")
        await platform.wait_shown(1)
        os.kill(os.getpid(), signal.SIGTERM)
trio.run(tried)
"""
    (tmp_path / "program.py").write_text(program)

    said = run([sys.executable, "program.py"], tmp_path)

    assert said.splitlines() == ["ada says 'hello'", "ada reads 'HELLO'"]


# ----- process-agent.md

(PROGRAM,) = listings("process-agent.md")


def test_the_agent_that_is_a_program_counts(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(PROGRAM)
    (tmp_path / "agent.sh").write_text((EXAMPLES / "process_agent.sh").read_text())

    host = [sys.executable, "-m", "trio_gateway", "run", "bot.py:agent"]

    assert run(host, tmp_path, "one two\n").splitlines()[-1] == "There are 2 words."


# ----- openai-agent.md

WEATHER, PAYING, LEAVING, SMALL = listings("openai-agent.md")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One model server for all tests of this page."""
    yield from serving(tmp_path_factory.mktemp("llmock"))


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """It, as the server that the environment names."""
    running.reset()
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-anything")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return running


async def answer_of(agent: Any, where: Path, text: str) -> str:
    """What an agent answers in the end."""
    async with open_gateway(agent, store=where / "gateway.db") as gateway:
        with trio.fail_after(PATIENCE):
            return (await gateway.ask(Message(session="ada", id="m1", text=text)))[-1].text


@needs_llmock
async def test_the_model_asks_for_the_weather(server: Server, tmp_path: Path) -> None:
    server.does(calls(("weather", {"city": "Rome"})), {"type": "reply", "text": "Warm."})

    assert await answer_of(made(WEATHER)["agent"], tmp_path, "Rome?") == "Warm."
    assert "It is warm in Rome." in str(server.bodies()[-1]["messages"])


class Bank:
    """What was paid, by key."""

    def __init__(self) -> None:
        self.paid: dict[str, int] = {}

    async def pay(self, amount: int, key: str) -> str:
        self.paid[key] = amount
        return f"{amount} paid"


@needs_llmock
async def test_the_model_pays_under_a_key(server: Server, tmp_path: Path) -> None:
    bank = Bank()
    pay = made(PAYING, tool=tool, bank=bank)["pay"]
    server.does(calls(("pay", {"amount": 5})), {"type": "reply", "text": "Paid."})

    assert await answer_of(OpenAIAgent(model="m", tools=[pay]), tmp_path, "pay") == "Paid."
    assert list(bank.paid.values()) == [5]


@needs_llmock
async def test_the_small_model_is_asked(server: Server, tmp_path: Path) -> None:
    server.says("Paris.")

    agent = made(SMALL.replace("http://127.0.0.1:8377/v1", server.url))["agent"]

    assert await answer_of(agent, tmp_path, "France?") == "Paris."
    assert server.bodies()[0]["model"] == "smollm2"


async def test_an_agent_between_two_steps_leaves(
    open_test_gateway: GatewayOpener, memory_channel: MemoryChannel, autojump_clock: object
) -> None:
    between = made(f"async def between(turn):\n{textwrap.indent(LEAVING, '    ')}")["between"]

    async def agent(turn: Turn) -> str:
        await between(turn)
        await turn.say("Working.")
        if turn.resumed is None:
            await turn.draining.wait_value(True)
            await between(turn)
        return "Done."

    async with open_test_gateway(agent) as first:
        await memory_channel.receive("ada", "m1", "work")
        await memory_channel.wait_sent(1)
    assert first.report is not None
    assert len(first.report.interrupted) == 1
    async with open_test_gateway(agent) as second:
        await second.wait_idle()

    assert memory_channel.texts("ada") == ["Working.", "Done."]


# ----- openai-api.md

CLIENT, REPEAT, STREAM = listings("openai-api.md")


async def test_openais_client_talks_repeats_and_reads_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason='the extra is not installed: pip install -e ".[test]"')
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    repeat = REPEAT.replace("...,", 'model="trio-gateway", input="a book",')
    asked = 0

    async def agent(turn: Turn) -> str:
        nonlocal asked
        asked += 1
        return f"You said {turn.text}."

    def talk(url: str) -> list[str]:
        client = made(CLIENT.replace("http://127.0.0.1:8080", url), token=TOKEN)["client"]
        with client:
            made(repeat + repeat, client=client)
            done = client.responses.create(model="trio-gateway", input="go on", user="bob")
            told: list[str] = []
            given = {"client": client, "id": done.id, "seen": 0, "told": told}
            made(STREAM.replace("...", "told.append(event.type)"), **given)
            return told

    async with open_door(tmp_path, agent) as door:
        told = await trio.to_thread.run_sync(talk, door.url)

    assert capsys.readouterr().out == "You said hello.\n"
    assert asked == 3  # the one that came twice, once
    assert told[0] != "response.created"
    assert told[-1] == "response.completed"


# ----- traces


async def test_the_traces_page_nests_and_takes_a_provider(memory_path: Path) -> None:
    listing, opening = listings("traces.md")
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    agent = made(listing.replace("trace.get_tracer(", "provider.get_tracer("), provider=provider)
    host = "async def host():\n" + textwrap.indent(opening, "    ").replace(
        "...", 'await gateway.ask(Message(session="a", id="m1", text="hi"))'
    ).replace("agent, ", "agent, store=store, ")
    given = made(
        host, open_gateway=open_gateway, agent=agent["agent"], provider=provider, Message=Message,
        store=memory_path / "gateway.db",
    )  # fmt: skip
    with trio.fail_after(PATIENCE):
        await given["host"]()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    inner, turn = spans["look it up"], spans["turn"]
    assert inner.parent is not None
    assert inner.parent.span_id == turn.context.span_id
