"""Who may come in over HTTP; each test is a line of what goes wrong elsewhere."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import trio
from doors import TOKEN, client_of, open_door
from helpers import Script
from processes import launch
from test_http import error_of

from trio_gateway import ConfigError, Turn
from trio_gateway.http import HttpSettings, read_token, token_path
from trio_gateway.http._guard import COOKIE, COOKIE_LIFE, LOCKED, TRIES, Guard
from trio_gateway.http._hooks import read_secret
from trio_gateway.http._problem import Problem


async def echo(turn: Turn) -> str:
    return f"re: {turn.text}"


# ----- the token


def test_the_token_is_made_once_and_private(tmp_path: Path) -> None:
    path = token_path(tmp_path / "gateway.db")
    before = os.umask(0)
    try:
        token = read_token(path)
    finally:
        os.umask(before)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(path) == token
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("x" * 40, 0o644, "chmod 600"),
        ("", 0o600, "delete the file"),
        ("short", 0o600, "at least 16"),
        ("two words in one token", 0o600, "delete the file"),
    ],
)
def test_a_token_that_is_none_is_refused(tmp_path: Path, content: str, mode: int, why: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=why):
        read_token(path)


def test_a_link_in_the_tokens_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x" * 40)
    path = tmp_path / "token"
    path.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(path)


def test_the_command_prints_the_token(tmp_path: Path) -> None:
    store = tmp_path / "gateway.db"
    command = [sys.executable, "-m", "trio_gateway", "token", "--store", str(store)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == read_token(token_path(store))


async def test_a_token_is_needed_from_everywhere(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        for token in ("wrong", TOKEN[:-1], f"{TOKEN}x", TOKEN.upper()):
            async with client_of(door.url, token) as client:
                response = await client.get("/v1/sessions")
                assert error_of(response) == (401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
        # In a URL it would be in every log.
        async with client_of(door.url, "wrong") as client:
            response = await client.get("/v1/sessions", params={"token": TOKEN})
            assert response.status_code == 401


async def test_health_needs_no_token_and_tells_no_secret(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door, client_of(door.url, "wrong") as client:
        for path in ("/healthz", "/readyz", "/startupz"):
            response = await client.get(path)
            assert response.status_code == 200
            assert str(tmp_path) not in response.text


def make_guard(**settings: tuple[str, ...]) -> tuple[Guard, list[float]]:
    now = [0.0]
    guard = Guard(TOKEN, HttpSettings(**settings), lambda: now[0], lambda: now[0])  # type: ignore[arg-type]
    return guard, now


def test_who_guesses_has_to_wait() -> None:
    guard, now = make_guard()
    scope = {"path": "/v1/sessions", "client": ("192.0.2.1", 1)}
    wrong = {"host": "localhost", "authorization": "Bearer wrong"}
    right = {"host": "localhost", "authorization": f"Bearer {TOKEN}"}

    def status(headers: dict[str, str], peer: str = "192.0.2.1") -> int:
        try:
            guard.admit({**scope, "client": (peer, 1)}, headers)
        except Problem as problem:
            return problem.status
        return 200

    assert [status(wrong) for _ in range(TRIES + 1)] == [401] * TRIES + [429]
    assert status(wrong, "192.0.2.2") == 401
    # Behind a proxy all come from one address: whoever has the token is let in all the same.
    assert status(right) == 200
    now[0] += LOCKED + 1
    assert status(wrong) == 401


def test_the_pages_cookie_is_signed_and_ends() -> None:
    guard, now = make_guard()
    scope = {"path": "/", "client": None}

    def is_let_in(cookie: str) -> bool:
        try:
            guard.admit(scope, {"host": "localhost", "cookie": f"{COOKIE}={cookie}"})
        except Problem:
            return False
        return True

    good = guard.cookie()
    until, _, signature = good.partition(".")
    assert is_let_in(good)
    assert not is_let_in(f"{int(until) + 1}.{signature}")
    assert not is_let_in(f"{until}.{signature[:-2]}AA")
    assert not is_let_in(until)
    assert TOKEN not in good
    now[0] += COOKIE_LIFE + 1
    assert not is_let_in(good)


# ----- where a browser thinks it is


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("192.0.2.7:80", 200),
        ("chat.example", 200),
        ("CHAT.example:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example@localhost", 400),
        ("", 400),
        ("[::1", 400),
        ("localhost:x", 400),
    ],
)
def test_a_name_that_is_not_ours_is_refused(host: str, status: int) -> None:
    """DNS rebinding: a page of somebody else, whose name leads here all of a sudden."""
    guard, _ = make_guard(hosts=("chat.example",))
    headers = {"host": host, "authorization": f"Bearer {TOKEN}"}
    try:
        guard.admit({"path": "/v1/sessions", "client": None}, headers)
        found = 200
    except Problem as problem:
        found = problem.status
    assert found == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8080", 200),
        ("https://app.example", 200),
        ("http://localhost:8081", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_a_page_of_somebody_else_is_refused(origin: str, status: int) -> None:
    guard, _ = make_guard(origins=("https://app.example",))
    headers = {"host": "localhost:8080", "origin": origin, "cookie": f"{COOKIE}={guard.cookie()}"}
    try:
        guard.admit({"path": "/v1/sessions", "client": None}, headers)
        found = 200
    except Problem as problem:
        found = problem.status
    assert found == status


# ----- webhooks

SECRET = b"s" * 32


def signed(body: bytes, *, secret: bytes = SECRET, name: str = "w1", at: float = 0) -> Headers:
    """The headers of a webhook, by the standard; the formula is written here once more."""
    stamp = str(int(time.time() + at))
    mac = hmac.new(secret, f"{name}.{stamp}.".encode() + body, hashlib.sha256).digest()
    mark = base64.b64encode(mac).decode()
    return {"webhook-id": name, "webhook-timestamp": stamp, "webhook-signature": f"v1a,x v1,{mark}"}


Headers = dict[str, str]


async def test_a_webhook_is_let_in_by_its_signature_once(tmp_path: Path) -> None:
    script = Script(open=True)
    async with open_door(tmp_path, script, hook_secret=SECRET) as door:
        async with httpx2.AsyncClient(base_url=door.url, trust_env=False) as client:
            body = b'{"text": "deploy"}'
            headers = signed(body)
            first = await client.post("/hooks/ops", content=body, headers=headers)
            assert (first.status_code, first.json()["status"]) == (202, "accepted")
            again = await client.post("/hooks/ops", content=body, headers=headers)
            assert again.json()["status"] == "duplicate"
        await door.gateway.wait_idle()
        assert script.begun == [("ops", 1, "deploy")]
    async with open_door(tmp_path, script, hook_secret=SECRET) as door:
        async with httpx2.AsyncClient(base_url=door.url, trust_env=False) as client:
            after = await client.post("/hooks/ops", content=body, headers=headers)
        assert after.json()["status"] == "duplicate"
        assert len(script.begun) == 1


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        (dict, "unsigned"),
        (lambda: signed(b"other"), "bad_signature"),
        (lambda: signed(b"hi", secret=b"t" * 32), "bad_signature"),
        (lambda: signed(b"hi", at=-400), "stale"),
        (lambda: signed(b"hi", at=400), "stale"),
        (lambda: {**signed(b"hi"), "webhook-id": "w2"}, "bad_signature"),
        (lambda: {**signed(b"hi"), "webhook-signature": ""}, "bad_signature"),
        (lambda: {**signed(b"hi"), "webhook-timestamp": "now"}, "unsigned"),
    ],
)
async def test_a_webhook_that_is_not_genuine_is_refused(
    tmp_path: Path, headers: Callable[[], Headers], kind: str
) -> None:
    async with open_door(tmp_path, echo, hook_secret=SECRET) as door:
        async with httpx2.AsyncClient(base_url=door.url, trust_env=False) as client:
            response = await client.post("/hooks/ops", content=b"hi", headers=headers())
        assert error_of(response) == (401, kind)


async def test_without_a_secret_there_are_no_webhooks(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        response = await door.client.post("/hooks/ops", content=b"hi", headers=signed(b"hi"))
        assert error_of(response) == (404, "not_found")


@pytest.mark.parametrize("text", ["", "whsec_", "whsec_short", "whsec_c2hvcnQ=", "not base64!!"])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="secret"):
        read_secret(path)


# ----- who takes their time


async def until_closed(address: tuple[str, int], data: bytes) -> tuple[bytes, float]:
    """Send, and read until the other side closes: what it said, and after how long."""
    since = time.monotonic()
    with trio.fail_after(20):
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(data)
            said = b""
            try:
                while some := await stream.receive_some():
                    said += some
            except trio.BrokenResourceError:
                said += b"(reset)"
    return said, time.monotonic() - since


@pytest.mark.parametrize(
    "data", [b"", b"GET /v1/sessions HT", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-slow: "]
)
async def test_a_head_that_never_ends_is_cut(tmp_path: Path, data: bytes) -> None:
    """Slow loris."""
    async with open_door(tmp_path, echo, http=HttpSettings(header_time=1.0)) as door:
        _, took = await until_closed(door.address, data)
    assert took < 5


async def test_a_body_that_never_ends_is_cut(tmp_path: Path) -> None:
    head = (
        f"POST /v1/sessions/ada/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
        f"authorization: Bearer {TOKEN}\r\n\r\n{{"
    )
    async with open_door(tmp_path, echo, http=HttpSettings(body_time=0.5)) as door:
        said, took = await until_closed(door.address, head.encode())
    assert b"408" in said.splitlines()[0]
    assert took < 5


async def test_a_head_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo) as door:
        head = b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 40_000 + b"\r\n\r\n"
        said, _ = await until_closed(door.address, head)
        assert b" 431 " in said.splitlines()[0]
        assert (await door.post("ada", "hi")).status_code == 202


async def test_one_address_has_a_bounded_number_of_connections(tmp_path: Path) -> None:
    async with open_door(tmp_path, echo, http=HttpSettings(per_peer=3)) as door:
        others = [socket.create_connection(door.address) for _ in range(3)]
        said, took = await until_closed(door.address, b"GET /healthz HTTP/1.1\r\n")
        assert said in (b"", b"(reset)")
        assert took < 5
        for other in others:
            other.close()
        with trio.fail_after(10):
            head = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
            # It takes a moment until all of them are noticed to have gone.
            while b" 200 " not in (await until_closed(door.address, head))[0]:  # noqa: ASYNC110
                await trio.sleep(0.05)


# ----- what is said


FAILING = """
async def agent(turn):
    raise RuntimeError("the secret is " + turn.text)
"""


async def test_no_secret_in_log_or_answers(tmp_path: Path) -> None:
    options = ["--http", "127.0.0.1:0", "--log-level", "debug"]
    with launch(tmp_path, FAILING, options=options) as process:
        process.expect_log("channel_connected")
        token = read_token(token_path(tmp_path / "gateway.db"))
        process.stop()
        assert token not in process.stderr
