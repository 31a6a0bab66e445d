"""Every example is run as a reader would run it, as a process, and does what its docstring says."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from doors import free_port
from processes import launch

from trio_gateway import Channel
from trio_gateway.http import read_token, token_path
from trio_gateway.testing import CHANNEL_CHECKS, ChannelBench

EXAMPLES = Path(__file__).parents[1] / "examples"
PATIENCE = 40.0
"""Seconds that anything may take on a busy machine before a test fails."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a user who has configured nothing."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TRIO_GATEWAY_")}
    return inherited | more


def hosting(example: str, *options: str) -> list[str]:
    """The command that hosts the agent of an example."""
    agent = f"{EXAMPLES / example}.py:agent"
    return [sys.executable, "-m", "trio_gateway", "run", agent, *options]


def output_of(command: list[str], where: Path, given: str = "") -> list[str]:
    """What a command writes on standard output, by line; it must end well."""
    done = subprocess.run(
        command,
        cwd=where,
        env=environment(),
        input=given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ----- echo


def test_echo_answers_what_is_piped_into_it(tmp_path: Path) -> None:
    assert output_of(hosting("echo"), tmp_path, "hello\n") == ["hello"]


def test_echo_answers_every_line_in_order(tmp_path: Path) -> None:
    assert output_of(hosting("echo"), tmp_path, "one\ntwo\nthree\n") == ["one", "two", "three"]


def test_the_store_remembers_what_echo_has_answered(tmp_path: Path) -> None:
    output_of(hosting("echo"), tmp_path, "hello\n")

    listed = output_of([sys.executable, "-m", "trio_gateway", "sessions", "list"], tmp_path)

    assert any("console" in line for line in listed)


# ----- assistant


class Assistant:
    """The assistant as a process, over `jsonl`. All waiting is bounded."""

    def __init__(self, where: Path, pace: float) -> None:
        self._shop = where / "shop.log"
        self._errors = (where / "stderr.txt").open("ab")
        self._process = subprocess.Popen(
            hosting("assistant", "--jsonl"),
            cwd=where,
            env=environment(ASSISTANT_PACE=str(pace)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._timer = threading.Timer(PATIENCE, self._process.kill)
        self._timer.start()

    def ask(self, text: str) -> None:
        """Send it a message."""
        assert self._process.stdin is not None
        line = json.dumps({"session": "ada", "id": "m1", "text": text})
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, **fields: Any) -> dict[str, Any]:
        """The next event with those fields."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event: dict[str, Any] = json.loads(line)
            if fields.items() <= event.items():
                return event
        raise AssertionError(f"the output ended without {fields}")

    def wait_ordered(self, count: int) -> None:
        """Wait until the shop has so many orders."""
        deadline = time.monotonic() + PATIENCE
        while len(self.orders()) < count:
            assert time.monotonic() < deadline, "the shop waits for an order"
            time.sleep(0.01)

    def orders(self) -> list[str]:
        """What was ordered, as the shop has it."""
        lines = self._shop.read_text().splitlines() if self._shop.exists() else []
        return [line.partition(" ")[2] for line in lines]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def end_input(self) -> int:
        """There is nothing more to ask; wait for the end."""
        _, _ = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode

    def close(self) -> None:
        """Leave nothing behind."""
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)
        self._timer.cancel()
        self._errors.close()


@contextmanager
def assistant(where: Path, pace: float = 0.05) -> Generator[Assistant, None, None]:
    """An assistant for the length of the block."""
    started = Assistant(where, pace)
    try:
        yield started
    finally:
        started.close()


def test_the_assistant_orders_and_tells(tmp_path: Path) -> None:
    with assistant(tmp_path) as first:
        first.ask("tea, bread")

        said = first.expect(event="reply")
        letter = first.expect(event="reply")

        assert said["text"] == "I will order 2 things: tea, bread."
        assert not said["final"]
        assert letter["final"]
        assert "order of tea" in letter["text"]
        assert letter["text"].endswith("Yours, the assistant")
        assert first.orders() == ["tea", "bread"]
        assert first.end_input() == 0


def test_the_assistant_killed_while_it_orders_orders_nothing_twice(tmp_path: Path) -> None:
    with assistant(tmp_path, pace=1.0) as first:
        first.ask("tea, bread")
        first.expect(event="reply", final=False)
        first.wait_ordered(1)
        first.send_signal(signal.SIGKILL)

    with assistant(tmp_path) as second:
        letter = second.expect(event="reply", repeat=False)  # what was said is not said again

        assert letter["final"]
        assert letter["attempt"] == 2
        assert "tea: ordered just before I was interrupted" in letter["text"]
        assert second.orders() == ["tea", "bread"]


def test_the_assistant_goes_on_with_its_letter_after_a_kill(tmp_path: Path) -> None:
    with assistant(tmp_path, pace=0.3) as first:
        first.ask("tea, bread, honey")
        first.expect(event="progress", text="writing about bread: ordered")
        first.send_signal(signal.SIGKILL)

    with assistant(tmp_path) as second:
        # What was on disk at the kill is the line about tea; a letter goes on where it was.
        second.expect(event="progress", text="writing about bread: ordered")
        letter = second.expect(event="reply", repeat=False)

        assert letter["text"].count("order of tea") == 1
        assert second.orders() == ["tea", "bread", "honey"]


def test_the_assistant_keeps_it_short_when_the_gateway_drains(tmp_path: Path) -> None:
    with assistant(tmp_path, pace=0.3) as first:
        first.ask("tea, bread, honey")
        first.expect(event="progress", text="writing about tea: ordered")
        first.send_signal(signal.SIGTERM)

        letter = first.expect(event="reply", final=True)

        assert letter["text"].endswith("In haste, your assistant")
        assert first.end_input() == 0


# ----- an agent in another language

COUNTER = f"""
import runpy
agent = runpy.run_path({str(EXAMPLES / "process_agent.py")!r})["agent"]
"""


def test_the_script_counts(tmp_path: Path) -> None:
    lines = output_of(hosting("process_agent"), tmp_path, 'two "words"\none\n')

    assert lines == [
        "I am counting.",
        "There are 2 words.",
        "I am counting.",
        "There are 1 words.",
    ]


def test_the_script_counts_once_although_the_gateway_is_killed(tmp_path: Path) -> None:
    with launch(tmp_path, COUNTER, env=environment(WORDS_PACE="60")) as first:
        first.send("ada", "m1", "these are four words")
        first.expect("progress", text="writing the answer")
        first.kill()

    with launch(tmp_path, COUNTER, env=environment(WORDS_PACE="0")) as second:
        reply = second.expect("reply", final=True)
        assert reply["text"] == "There are 4 words."
        assert reply["attempt"] == 2
        assert second.stop() == 0

    assert (tmp_path / "counted.log").read_text() == "4\n"


# ----- the programs


def test_embedded_drains_when_its_block_is_left(tmp_path: Path) -> None:
    lines = output_of([sys.executable, str(EXAMPLES / "embedded.py")], tmp_path)

    assert "tick" in lines
    assert [line for line in lines if line != "tick"] == [
        "m1 is accepted",
        "m1 is duplicate",
        "m2: 4 words, the longest is 'something'",
        "leaving with 1 turn open",
        "drained: 1 settled, 0 interrupted, timed out: False",
        "m3: 5 words, the longest is 'three'",
    ]


def test_custom_channel_loses_nothing_and_shows_nothing_twice(tmp_path: Path) -> None:
    lines = output_of([sys.executable, str(EXAMPLES / "custom_channel.py")], tmp_path)

    for line in (
        "ada reads 'HELLO'",
        "the line breaks",
        "a post comes again under its old key: shown already",
        "too fast: come back later",
        "bob reads 'GOOD'",
        "somebody watches from message 4 on",
        "ada reads 'STILL THERE?'",
    ):
        assert line in lines
    assert lines[-1] == "6 posts arrived, 4 were shown"


LINES = runpy.run_path(str(EXAMPLES / "custom_channel.py"))


@asynccontextmanager
async def line_bench() -> AsyncGenerator[ChannelBench, None]:
    """The example's channel, with the example's platform at its other end."""
    async with trio.open_nursery() as nursery:
        platform = LINES["Platform"]()
        port = await platform.start(nursery)
        yield bench_of(platform, LINES["LineChannel"](port))
        nursery.cancel_scope.cancel()


def bench_of(platform: Any, channel: Channel) -> ChannelBench:
    """What the platform can do, in the words of the suite."""

    async def say(session: str, id: str, text: str) -> None:
        platform.say(session, text)

    async def wait_heard(count: int) -> list[str]:
        await platform.wait_shown(count)
        return list(platform.shown.values())

    async def cut() -> None:
        platform.hang_up()

    async def be_busy(seconds: float) -> None:
        platform.next_answer, platform.seconds = "wait", seconds

    async def be_gone() -> None:
        platform.next_answer = "gone"

    return ChannelBench(
        channel=channel,
        say=say,
        wait_heard=wait_heard,
        cut=cut,
        be_busy=be_busy,
        be_gone=be_gone,
    )


@pytest.mark.parametrize("check", CHANNEL_CHECKS, ids=lambda check: check.__name__)
async def test_custom_channel_keeps_the_contract(check: Any) -> None:
    await check(line_bench)


def test_crash_test_finds_the_careless_agent_out(tmp_path: Path) -> None:
    lines = output_of([sys.executable, str(EXAMPLES / "crash_test.py")], tmp_path)

    careless, careful = lines
    assert re.fullmatch(r"careless: point=\d+ (before|after): charged 2 times", careless)
    assert re.fullmatch(r"careful: died (\d+) times, .*; charged once each time", careful)


def test_seeded_lives_find_the_careless_agent_out(tmp_path: Path) -> None:
    careless, careful = output_of([sys.executable, str(EXAMPLES / "seeded_lives.py")], tmp_path)

    assert re.fullmatch(r"careless: seed \d+: turns \[.+\] were charged twice", careless)
    assert re.fullmatch(r"careful: 60 seeds, died \d+ times; each turn was charged once", careful)


def test_openai_client_reads_on_after_a_kill(tmp_path: Path) -> None:
    port = free_port()
    host = ["--http", f"127.0.0.1:{port}", "--store", str(tmp_path / "gateway.db")]
    told = runpy.run_path(str(EXAMPLES / "openai_client.py"))["STORY"]
    given = environment(
        OPENAI_API_KEY=read_token(token_path(tmp_path / "gateway.db")),
        OPENAI_BASE_URL=f"http://127.0.0.1:{port}/v1",
        STORY_PACE="0.05",
        NO_PROXY="127.0.0.1",
    )
    client = [sys.executable, str(EXAMPLES / "openai_client.py")]
    with ended(hosting("openai_client", *host), tmp_path, given) as gateway:
        wait_for_port(port, gateway)
        with ended(client, tmp_path, given, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            begun = b""
            while len(begun) < len("Once upon a time"):
                begun += (letter := reader.stdout.read(1))
                assert letter, "the client has left"
            gateway.kill()
            gateway.wait(PATIENCE)
            with ended(hosting("openai_client", *host), tmp_path, given):
                rest, _ = reader.communicate(timeout=PATIENCE)
    assert reader.returncode == 0
    assert (begun + rest).decode() == f"{told}\n"


@contextmanager
def ended(
    command: list[str], where: Path, env: dict[str, str], stdout: int | None = subprocess.DEVNULL
) -> Generator[subprocess.Popen[bytes]]:
    """A process, which is gone after the block."""
    # Without a buffer, whose content `communicate` would not see.
    with subprocess.Popen(
        command, cwd=where, env=env, stdout=stdout, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nobody listens at {port}")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_opens_by_telling_what_to_try(example: Path) -> None:
    opening = example.read_text().split('"""')[1]

    assert "Try:\n" in opening
    assert f"examples/{example.name}" in opening
