"""The WebSocket, with a client that nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from doors import TOKEN, Door, free_port, open_door
from helpers import Script
from processes import launch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from trio_gateway import Turn
from trio_gateway.http import read_token, token_path

PATIENCE = 20.0


async def echo(turn: Turn) -> str:
    return f"re: {turn.text}"


@contextmanager
def connected(url: str, token: str = TOKEN, **headers: str) -> Generator[ClientConnection]:
    given = {"Authorization": f"Bearer {token}", **headers}
    with connect(
        url.replace("http:", "ws:") + "/v1/ws",
        additional_headers=given,
        open_timeout=PATIENCE,
        close_timeout=PATIENCE,
        proxy=None,
    ) as socket:
        yield socket


def say(socket: ClientConnection, **fields: Any) -> None:
    socket.send(json.dumps(fields))


def hear(socket: ClientConnection, kind: str, event: str | None = None) -> dict[str, Any]:
    """The next frame of that kind; progress is passed over."""
    while True:
        said: dict[str, Any] = json.loads(socket.recv(PATIENCE))
        if said["type"] == kind and event in (None, said.get("event")):
            return said


async def in_thread(call: Any, *args: Any) -> Any:
    with trio.fail_after(PATIENCE * 2):
        return await trio.to_thread.run_sync(lambda: call(*args))


async def test_a_conversation_over_one_socket(tmp_path: Path) -> None:
    def talk(url: str) -> None:
        with connected(url) as socket:
            say(socket, type="hello", session="ada", last=0)
            assert hear(socket, "welcome") == {"type": "welcome", "session": "http:ada", "seq": 0}
            say(socket, type="message", session="ada", id="m1", text="hello")
            ack = {"type": "ack", "session": "http:ada", "id": "m1", "status": "accepted"}
            seen = [json.loads(socket.recv(PATIENCE)) for _ in range(5)]
            assert ack in seen
            events = [one for one in seen if one["type"] == "event"]
            kinds = [one["event"] for one in events]
            assert kinds == ["accepted", "begun", "reply", "settled"]
            assert events[2]["text"] == "re: hello"
            say(socket, type="message", session="ada", id="m1", text="hello")
            assert hear(socket, "ack")["status"] == "duplicate"

    async with open_door(tmp_path, echo) as door:
        await in_thread(talk, door.url)


BAD_FRAMES = {
    "{": "not_json",
    "[]": "invalid",
    "{}": "invalid",
    '{"type": "hello"}': "invalid",
    '{"type": "hello", "session": "ada", "last": -1}': "invalid",
    '{"type": "hello", "session": "ada", "last": true}': "invalid",
    '{"type": "message", "session": "ada", "text": "hi"}': "invalid",
    '{"type": "message", "session": "ada", "id": "", "text": "hi"}': "malformed",
    '{"type": "message", "session": "ada", "id": "m", "text": "hi", "more": 1}': "invalid",
}


async def test_p14_a_bad_frame_costs_one_error(tmp_path: Path) -> None:
    def talk(url: str) -> None:
        with connected(url) as socket:
            for frame, kind in BAD_FRAMES.items():
                socket.send(frame)
                assert hear(socket, "error")["error"]["type"] == kind, frame
            socket.send(b'{"type": "message", "session": "ada", "id": "m1", "text": "hi"}')
            assert "frame of text" in hear(socket, "error")["error"]["message"]
            say(socket, type="message", session="ada", id="m1", text="hi")
            assert hear(socket, "ack")["status"] == "accepted"

    async with open_door(tmp_path, echo) as door:
        await in_thread(talk, door.url)


async def test_a_stop_closes_with_1012_when_all_is_told(tmp_path: Path) -> None:
    script = Script()

    stack = ExitStack()

    def open_socket(url: str) -> ClientConnection:
        socket = stack.enter_context(connected(url))
        say(socket, type="hello", session="ada", last=0)
        say(socket, type="message", session="ada", id="m1", text="hello")
        hear(socket, "event", "begun")
        return socket

    def listen(socket: ClientConnection) -> tuple[int, list[str]]:
        kinds: list[str] = []
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                kinds.append(json.loads(socket.recv(PATIENCE)).get("event"))
        assert closed.value.rcvd is not None
        stack.close()
        return closed.value.rcvd.code, kinds

    async with open_door(tmp_path, script) as door:
        socket = await in_thread(open_socket, door.url)
        door.gateway.request_stop()
        await door.gateway.draining.wait_value(True)
        script.release()
        code, kinds = await in_thread(listen, socket)
    assert code == 1012
    assert kinds[-2:] == ["reply", "settled"]


async def test_who_comes_back_too_late_is_told_of_the_gap_here_too(tmp_path: Path) -> None:
    def talk(url: str) -> dict[str, Any]:
        with connected(url) as socket:
            say(socket, type="hello", session="ada", last=1)
            assert hear(socket, "welcome")["seq"] == 1
            return hear(socket, "gap")

    async with open_door(tmp_path, echo) as door:
        for n in range(3):
            await door.post("ada", "hello", id=f"m{n}", headers={"prefer": "wait=10"})
        await door.gateway._store.forget(0, 2**62, 0)  # what retention does
        gap = await in_thread(talk, door.url)
    assert gap == {"type": "gap", "session": "http:ada", "from": 2, "to": 11}


SLOW = """
import trio
async def agent(turn):
    await turn.say(f"one of {turn.text}")
    await trio.sleep(0 if turn.resumed else 60)
    return f"two of {turn.text}"
"""


async def test_p7_who_comes_back_after_a_kill_goes_on(tmp_path: Path) -> None:
    port = free_port()
    url, options = f"http://127.0.0.1:{port}", ["--http", f"127.0.0.1:{port}"]

    def before(token: str) -> int:
        with connected(url, token) as socket:
            say(socket, type="hello", session="ada", last=0)
            say(socket, type="message", session="ada", id="m1", text="m1")
            return int(hear(socket, "event", "reply")["seq"])

    def after(token: str, last: int) -> list[str]:
        with connected(url, token) as socket:
            say(socket, type="hello", session="ada", last=last)
            kinds: list[str] = []
            while "settled" not in kinds:
                kinds.append(hear(socket, "event")["event"])
            return kinds

    with launch(tmp_path, SLOW, options=options) as process:
        process.expect_log("channel_connected")
        token = read_token(token_path(tmp_path / "gateway.db"))
        last = await in_thread(before, token)
        process.kill()
    with launch(tmp_path, SLOW, options=options) as process:
        process.expect_log("channel_connected")
        kinds = await in_thread(after, token, last)
        assert process.stop() == 0
    assert kinds == ["interrupted", "resumed", "reply", "settled"]


@pytest.mark.parametrize(
    ("token", "headers", "status"),
    [
        ("wrong", {}, 401),
        (TOKEN, {"Origin": "http://evil.example"}, 403),
    ],
)
async def test_a_socket_is_guarded_as_all_else(
    tmp_path: Path, token: str, headers: dict[str, str], status: int
) -> None:
    def talk(door: Door) -> int:
        with pytest.raises(InvalidStatus) as refused, connected(door.url, token, **headers):
            raise AssertionError("it was let in")
        return int(refused.value.response.status_code)

    async with open_door(tmp_path, echo) as door:
        assert await in_thread(talk, door) == status
