"""The HTTP door against what has gone wrong elsewhere, line by line; what is not in
test_http_guard: ways around the token, the hook, the names and the bounds."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import trio
from doors import TOKEN, Door, client_of, events_of, free_port, open_door, read_until
from helpers import rows
from processes import launch
from starlette.routing import Route
from test_http import error_of
from test_http_socket import connected, hear, in_thread, say
from websockets.exceptions import ConnectionClosed, WebSocketException

from trio_gateway import Settings, Turn
from trio_gateway.http import HttpSettings, read_token, token_path
from trio_gateway.http._app import App
from trio_gateway.http._guard import OPEN, TRIES, Guard
from trio_gateway.http._house import House
from trio_gateway.http._socket import SESSIONS
from trio_gateway.http._wire import MESSAGE_BYTES

SECRET = b"s" * 32


async def echo(turn: Turn) -> str:
    return f"re: {turn.text}"


def signed(body: bytes, name: str = "w1") -> dict[str, str]:
    stamp = str(int(time.time()))
    mac = hmac.new(SECRET, f"{name}.{stamp}.".encode() + body, hashlib.sha256).digest()
    mark = f"v1,{base64.b64encode(mac).decode()}"
    return {"webhook-id": name, "webhook-timestamp": stamp, "webhook-signature": mark}


async def raw(door: Door, data: bytes) -> bytes:
    """Send bytes, and read until the other side closes."""
    said = b""
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(*door.address) as stream:
            await stream.send_all(data)
            while some := await stream.receive_some():
                said += some
    return said


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ----- every way in is guarded


async def test_no_route_is_forgotten_by_the_guard(tmp_path: Path) -> None:
    """Whatever is added later, too: without a token there is nothing but health and the login."""
    async with open_door(tmp_path, echo, hook_secret=SECRET) as door:
        house = door.channel._house
        assert house is not None
        routes = App(house, print)._router.routes
        assert len(routes) > 30
        async with httpx2.AsyncClient(base_url=door.url, trust_env=False) as client:
            for route in routes:
                assert isinstance(route, Route)
                path = route.path.replace("{what:action}", "retry")
                for name in ("{key:name}", "{id:name}", "{name:name}", "{session:name}"):
                    path = path.replace(name, "ada")
                path = path.replace("{turn}", "1").replace("{delivery}", "1").replace("{id}", "x")
                for method in route.methods or ():
                    answer = await client.request(method, path)
                    if path in OPEN:
                        assert answer.status_code in (200, 303, 405, 415), (method, path)
                    elif path.startswith("/hooks/"):
                        assert error_of(answer) == (401, "unsigned")
                    else:
                        fine = answer.status_code == 401 or (
                            answer.status_code == 303 and "/login" in answer.headers["location"]
                        )
                        assert fine, (method, path, answer.status_code)


async def test_no_path_leads_around_the_guard(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door, client_of(door.url, "wrong") as client:
        for path in (
            "/healthz/../v1/sessions", "/healthz%2f..%2fv1/sessions", "//v1/sessions",
            "/healthz/", "/HEALTHZ", "/login/../v1/status", "/v1/sessions?/healthz",
            "/hooks/../v1/sessions", "/%2e%2e/v1/sessions", "/healthz%00", "/healthz;/v1",
        ):  # fmt: skip
            head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            said = await raw(door, head.encode())
            status = int(said.split(b" ")[1])
            # A path below /hooks/ is that of a session: there are no webhooks here.
            assert status in (401, 303, 404, 405), (path, said[:200])
            assert b'sessions":' not in said
        assert (await client.get("/v1/sessions")).status_code == 401


async def test_every_way_in_asks_the_same_hook(tmp_path: Path) -> None:
    """Messages by the API, a webhook, OpenAI's API, a form, a WebSocket: one authorisation."""
    asked: list[str] = []

    async def authorize(message: Any) -> bool:
        asked.append(message.session)
        return False

    def talk(url: str) -> str:
        with connected(url) as socket:
            say(socket, type="message", session="socket", id="m1", text="/status")
            return str(hear(socket, "error")["error"]["type"])

    async with open_door(tmp_path, echo, authorize=authorize, hook_secret=SECRET) as door:
        client = door.client
        assert error_of(await door.post("api", "/stop")) == (403, "not_allowed")
        hook = await client.post("/hooks/hook", content=b"hi", headers=signed(b"hi"))
        assert error_of(hook) == (403, "not_allowed")
        chat = {"messages": [{"role": "user", "content": "hi"}], "user": "chat"}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 403
        response = {"input": "hi", "user": "response", "background": True}
        assert (await client.post("/v1/responses", json=response)).status_code == 403
        form = await client.post("/sessions/form/messages", data={"text": "hi"})
        assert form.status_code == 403
        assert await in_thread(talk, door.url) == "not_allowed"
        assert rows(tmp_path / "gateway.db", "SELECT count(*) FROM message") == [(0,)]
    assert set(asked) >= {"api", "hook", "chat", "response", "form", "socket"}


@pytest.mark.parametrize(
    "name", ["x-forwarded-for", "forwarded", "x-real-ip", "x-forwarded-host", "cf-connecting-ip"]
)
async def test_what_a_client_says_of_its_address_is_not_believed(tmp_path: Path, name: str) -> None:
    """Nor is it let in from this machine, nor does it guess longer under other addresses."""
    async with open_door(tmp_path, echo) as door, client_of(door.url, "wrong") as client:
        for n in range(TRIES):
            answer = await client.get("/v1/status", headers={name: f"127.0.0.{n}"})
            assert answer.status_code == 401
        answer = await client.get("/v1/status", headers={name: "127.0.0.99"})
        assert error_of(answer) == (429, "too_many_attempts")


async def test_a_socket_under_another_name_is_refused(tmp_path: Path) -> None:
    """DNS rebinding: WebSockets are no way around the check of the Host."""
    async with open_door(tmp_path, echo) as door:
        said = await raw(
            door,
            b"GET /v1/ws HTTP/1.1\r\nhost: evil.example\r\nconnection: upgrade\r\n"
            b"upgrade: websocket\r\nsec-websocket-version: 13\r\nauthorization: Bearer "
            + TOKEN.encode()
            + b"\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        assert b" 421 " in said.splitlines()[0]
        for more in (b"host: evil.example\r\nhost: localhost", b"host: localhost\r\nhost: evil"):
            said = await raw(door, b"GET /v1/status HTTP/1.1\r\n" + more + b"\r\n\r\n")
            assert b" 400 " in said.splitlines()[0]


async def test_a_new_token_ends_the_old_one(tmp_path: Path) -> None:
    """To change it, delete the file and restart: no connection and no cookie outlives that."""
    path = token_path(tmp_path / "gateway.db")
    old = read_token(path)
    cookie = Guard(old, HttpSettings()).cookie()
    path.unlink()
    guard = Guard(read_token(path), HttpSettings())
    for headers in ({"authorization": f"Bearer {old}"}, {"cookie": f"trio_gateway={cookie}"}):
        with pytest.raises(Exception, match="a token is needed"):
            guard.admit({"path": "/", "client": None}, {"host": "localhost", **headers})


def test_it_listens_on_this_machine_only_unless_told() -> None:
    assert HttpSettings().bind.startswith("127.0.0.1:")


# ----- bounds, before anybody has shown a token


async def test_nobody_changes_to_another_protocol(tmp_path: Path) -> None:
    """HTTP/2 has no bounds here: a client without a token that gave it no window kept its
    connection for ever."""
    async with open_door(tmp_path, echo, http=HttpSettings(header_time=1.0)) as door:
        said = await raw(
            door,
            b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, http2-settings\r\n"
            b"upgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n",
        )
        assert said.startswith(b"HTTP/1.1 200 ")
        assert b" 101 " not in said
        settings = b"\0\0\0\4\0\0\0\0\0"
        said = await raw(door, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        assert said.startswith(b"HTTP/1.1 4")


async def test_a_socket_that_is_gone_is_gone(tmp_path: Path) -> None:
    """Hypercorn's ping kept the connection, and its place among those that may be open, for twenty
    seconds; and a stop waited for it."""

    def talk(url: str) -> None:
        with connected(url) as socket:
            say(socket, type="hello", session="ada")
            hear(socket, "welcome")

    async with open_door(tmp_path, echo, http=HttpSettings(per_peer=1)) as door:
        await door.client.aclose()
        for _ in range(3):
            with trio.fail_after(15):
                while True:  # it takes a moment until the last one is noticed to have gone
                    try:
                        await in_thread(talk, door.url)
                        break
                    except (WebSocketException, OSError, EOFError):
                        await trio.sleep(0.05)


async def test_a_frame_that_is_too_large_ends_its_connection_alone(tmp_path: Path) -> None:
    def talk(url: str) -> int:
        with connected(url) as socket:
            socket.send("x" * (MESSAGE_BYTES + 1))
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(20)
            assert closed.value.rcvd is not None
            return closed.value.rcvd.code

    async with open_door(tmp_path, echo) as door:
        assert await in_thread(talk, door.url) == 1009
        assert (await door.post("ada", "hi")).status_code == 202


async def test_a_socket_follows_a_bounded_number_of_sessions(tmp_path: Path) -> None:
    def talk(url: str) -> None:
        with connected(url) as socket:
            for n in range(SESSIONS):
                say(socket, type="hello", session=f"s{n}")
                hear(socket, "welcome")
            say(socket, type="hello", session="one more")
            assert hear(socket, "error")["error"]["type"] == "too_many"

    async with open_door(tmp_path, echo) as door:
        await in_thread(talk, door.url)


async def test_all_addresses_together_have_a_bounded_number_of_connections(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo, http=HttpSettings(connections=2)) as door:
        others = [socket.create_connection(door.address) for _ in range(2)]
        with trio.fail_after(20):
            async with await trio.open_tcp_stream(*door.address) as stream:
                with suppress(trio.BrokenResourceError):
                    assert await stream.receive_some() == b""
        for other in others:
            other.close()


# ----- names and texts are data


NAMES = [
    "../../etc/passwd",
    "a\r\nset-cookie: x=1",
    "\0",
    "a\nb",
    "\x1b[2J",
    "x" * 1024,
    "a/b/../c",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
async def test_a_name_is_a_name_and_nothing_else(tmp_path: Path, name: str) -> None:
    place = quote(name, safe="")
    before = files_in(tmp_path.parent)
    async with open_door(tmp_path, echo) as door:
        answer = await door.post(place, "hi", id=name, headers={"prefer": "wait=10"})
        assert answer.json()["receipt"]["session"] == f"http:{name}"
        async with events_of(door.client, place, 0) as events:
            assert (await read_until(events, "settled"))[-1].data["id"] == name
        life = (await door.client.get(f"/v1/messages/{place}")).json()
        assert life["timelines"][0]["message"]["state"] == "answered"
        form = await door.client.post(f"/sessions/{place}/messages", data={"text": "hi"})
        assert form.status_code == 303
        assert form.headers["location"].isascii()
        assert "set-cookie" not in form.headers
    assert files_in(tmp_path.parent) == before
    assert {file.partition("-")[0] for file in files_in(tmp_path)} <= {
        "gateway.db", "gateway.db.lock",
    }  # fmt: skip


async def test_p14_an_error_is_short_whatever_it_is_about(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        fields = {"\xe9" * 5000 + str(n): "\xe9" * 5000 for n in range(20)}
        answer = await door.client.post("/v1/sessions/ada/messages", json=fields)
        assert error_of(answer) == (422, "invalid")
        assert len(answer.text) < 1000


async def test_p14_no_request_is_sent_elsewhere(tmp_path: Path) -> None:
    """A slash too many is nothing that there is, and no redirect to whatever Host was named."""
    async with open_door(tmp_path, echo) as door:
        for path in ("/v1/status/", "/v1/responses/", "/healthz/", "/v1/chat/completions/"):
            answer = await door.client.get(path)
            assert answer.status_code == 404, path


# ----- what is said


CURIOUS = """
async def agent(turn):
    import os
    raise RuntimeError(turn.text)
"""


async def test_neither_token_nor_text_nor_control_characters_are_in_the_log(tmp_path: Path) -> None:
    secret_file = tmp_path / "hook-secret"
    secret = base64.b64encode(b"the secret of the webhooks......").decode()
    secret_file.touch(0o600)
    secret_file.write_text(secret)
    address = f"127.0.0.1:{free_port()}"
    url, options = f"http://{address}", ["--http", address, "--log-level", "debug"]
    env = {**os.environ, "TRIO_GATEWAY_CHANNELS__HTTP__HOOK_SECRET": str(secret_file)}
    with launch(tmp_path, CURIOUS, options=options, env=env) as process:
        process.expect_log("channel_connected")
        token = read_token(token_path(tmp_path / "gateway.db"))
        async with client_of(url, token) as client:
            await client.get("/v1/sessions", params={"token": token})
            await client.get("/v1/nothing", headers={"cookie": f"trio_gateway={token}"})
            await client.post("/v1/sessions/a/messages", content=b"{" + token.encode())
            await client.post("/login", data={"token": token})
            body = {"id": "m1\x1b[2J\r\n", "text": "private words"}
            await client.post("/v1/sessions/a/messages", json=body, headers={"prefer": "wait=10"})
            await client.post("/hooks/a", content=b"hi", headers={"webhook-signature": secret})
        async with client_of(url, f"{token}x") as client:
            await client.get("/v1/sessions")
        assert process.stop() == 0
        log = process.stderr
    assert '"FAILED"' in log, "the turn's end is not in it"
    assert token not in log
    assert secret not in log
    assert "\x1b" not in log
    assert all(json.loads(line) for line in log.splitlines()), "a line that is no object"


async def test_what_holds_a_secret_does_not_show_it(tmp_path: Path) -> None:
    """A traceback that shows values, a debugger, a log of objects."""
    async with open_door(tmp_path, echo, hook_secret=SECRET) as door:
        house = door.channel._house
        assert isinstance(house, House)
        shown = repr((door.channel, house, house.guard))
    assert TOKEN not in shown
    assert repr(SECRET)[2:-1] not in shown


async def test_a_webhook_is_checked_before_it_is_read(tmp_path: Path) -> None:
    """Not even its JSON is looked at; and its session is not told from others."""
    async with open_door(tmp_path, echo, hook_secret=SECRET, settings=Settings()) as door:
        async with httpx2.AsyncClient(base_url=door.url, trust_env=False) as client:
            for body in (b"{" * 10_000, b'{"text": 1}', b"\xff\xfe", b""):
                forged = {**signed(body), "webhook-signature": "v1,AAAA"}
                answer = await client.post("/hooks/../x", content=body, headers=forged)
                assert error_of(answer) in ((401, "bad_signature"), (401, "unauthorized"))
        assert rows(tmp_path / "gateway.db", "SELECT count(*) FROM message") == [(0,)]
