"""The HTTP channel, talked to by curl: the page's own command, an answer that is waited for, and
an event stream that is left and taken up again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from subprocess import PIPE, run
from typing import Any

import pytest
import trio
from doors import TOKEN, Door, open_door

from trio_gateway import Turn

PAGE = Path(__file__).parents[1] / "docs" / "http.md"
PATIENCE = 60.0

pytestmark = pytest.mark.skipif(
    shutil.which("curl") is None, reason="there is no curl: apt-get install curl"
)


async def agent(turn: Turn) -> str:
    return f"you said {turn.text}"


def words(door: Door, *more: str) -> list[str]:
    """The command, with the token, and no proxy of whoever runs the tests."""
    head = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "50"]
    return [*head, "--header", f"Authorization: Bearer {TOKEN}", *more]


async def curl(door: Door, *more: str) -> str:
    """What it prints."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(words(door, *more), capture_stdout=True)
    return done.stdout.decode()


async def test_the_page_s_command_is_answered_as_the_page_says(tmp_path: Path) -> None:
    """By a shell, as it stands there."""
    shown = re.search(r"\n\$ (curl .*?)\n(\{.*?\})\n```", PAGE.read_text(), re.S)
    assert shown is not None
    async with open_door(tmp_path, agent) as door:
        command = shown[1].replace("http://127.0.0.1:8080", door.url)
        with trio.fail_after(PATIENCE):
            done = await trio.to_thread.run_sync(
                lambda: run(
                    ["sh", "-c", command.replace("curl ", "curl -sS --noproxy '*' ", 1)],
                    env={"TOKEN": TOKEN, "PATH": "/usr/local/bin:/usr/bin:/bin"},
                    stdout=PIPE, timeout=50, check=True,
                )
            )  # fmt: skip
    assert json.loads(done.stdout) == json.loads(shown[2])


async def test_an_answer_is_waited_for(tmp_path: Path) -> None:
    async with open_door(tmp_path, agent) as door:
        told = await curl(
            door, "--header", "Prefer: wait=30", "--data", '{"id": "m1", "text": "hello"}',
            "--write-out", "\n%{http_code}", f"{door.url}/v1/sessions/ada/messages",
        )  # fmt: skip
    body, _, status = told.rpartition("\n")
    assert status == "200"
    assert [reply["text"] for reply in json.loads(body)["replies"]] == ["you said hello"]


async def test_without_the_token_there_is_nothing(tmp_path: Path) -> None:
    async with open_door(tmp_path, agent) as door:
        with trio.fail_after(PATIENCE):
            done = await trio.run_process(
                ["curl", "-sS", "--noproxy", "*", f"{door.url}/v1/sessions"], capture_stdout=True
            )
    assert json.loads(done.stdout)["error"]["type"] == "unauthorized"


async def test_a_stream_that_was_left_goes_on_behind_the_last_event(tmp_path: Path) -> None:
    async with open_door(tmp_path, agent) as door:
        await door.post("ada", "one", id="m1")
        first = await followed(door, "0", "m1")
        await door.post("ada", "two", id="m2")
        rest = await followed(door, first[-1][0], "m2")
    assert [what for _, what, _ in first] == ["accepted", "begun", "reply", "settled"]
    assert [what for _, what, _ in rest] == ["accepted", "begun", "reply", "settled"]
    assert [data["text"] for _, what, data in (*first, *rest) if what == "reply"] == [
        "you said one", "you said two",
    ]  # fmt: skip


async def followed(door: Door, after: str, until: str) -> list[tuple[str, str, Any]]:
    """The events behind one, until a message has settled, each with its id; then curl is left."""
    url = f"{door.url}/v1/sessions/ada/events"
    command = words(door, "--no-buffer", "--header", f"Last-Event-ID: {after}", url)
    process = await trio.lowlevel.open_process(command, stdout=PIPE)
    assert process.stdout is not None
    told, found = b"", list[tuple[str, str, Any]]()
    try:
        with trio.fail_after(PATIENCE):
            while not found or found[-1][1] != "settled" or until not in str(found[-1][2]):
                told += (chunk := await process.stdout.receive_some())
                assert chunk, f"it ended after {told!r}"
                found = [_event(one) for one in re.findall(r"id: .*?\n\n", told.decode(), re.S)]
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()
    return [event for event in found if event[1] != "hello"]


def _event(frame: str) -> tuple[str, str, Any]:
    fields = dict(line.split(": ", 1) for line in frame.strip().splitlines())
    return fields["id"], fields["event"], json.loads(fields["data"])
