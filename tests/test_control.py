"""The control socket: what is said over it, who may, what a peer that misbehaves costs."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway import _control_socket
from trio_gateway._control import (
    CHANGES,
    CONNECTIONS,
    LONGEST_REQUEST,
    NEEDED,
    STREAMS,
    VERBS,
    BadRequest,
    ControlError,
    Forbidden,
    Lines,
    NoGateway,
    Request,
    encode,
    error_of,
    parse_request,
    refusal,
)
from trio_gateway._control_address import Peer, address, may_control, peer_of, socket_of
from trio_gateway._control_client import connected
from trio_gateway._control_socket import Respondent, Send, control_socket, listen_at
from trio_gateway._errors import ConfigError, GatewayError, GatewayStopping, NotFound

NOBODY = 65534
PATIENCE = 20.0


# ----- requests and answers


def test_a_request_is_what_it_says() -> None:
    told = parse_request(b'{"do": "stop", "now": true}')
    assert (told.do, told.flag("now"), told.flag("restart")) == ("stop", True, False)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"", "not JSON (b''): expected one object a line"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b"{}", "do: expected one of status, overview, turns, stop, "),
        (b'{"do": ["stop"]}', "do: expected one of"),
        (b'{"do": "halt"}', "got 'halt'; a gateway of another version knows other requests"),
        (b'{"do": "stop", "noww": true}', "stop: unknown value 'noww'; known: now, restart"),
        (b'{"do": "drain", "x": 1}', "drain: unknown value 'x'; known: none"),
        (b'{"do": "stop", "now": 1}', "stop: now: expected true or false, got 1"),
        (b'{"do": "stop-turn"}', "stop-turn: session is missing"),
        (b'{"do": "quarantine-retry", "turn": true}', "turn: expected a number, got True"),
        (b'{"do": "quarantine-retry", "turn": -1}', "turn: expected a number, got -1"),
        (b"[" * 50_000, "not JSON"),
    ],
)
def test_p14_a_request_that_means_nothing_is_one_error(line: bytes, told: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(line)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500


@given(st.binary(max_size=200))
def test_p14_whatever_is_sent_is_a_request_or_one_error(line: bytes) -> None:
    with suppress(BadRequest):
        assert parse_request(line).do in VERBS


def test_every_verb_is_listed_once() -> None:
    assert set(VERBS) >= CHANGES
    assert set(VERBS) >= STREAMS
    assert {name for values in VERBS.values() for name in values} >= NEEDED


@pytest.mark.parametrize(
    "error",
    [
        Forbidden("no"),
        BadRequest("what"),
        NotFound("nobody"),
        GatewayStopping("later"),
        ConfigError("a: b\nc: d"),
        ControlError("oh"),
    ],
)
def test_an_error_arrives_as_the_error_that_it_was(error: GatewayError) -> None:
    back = error_of(json.loads(encode(refusal(error))))
    assert (type(back), str(back)) == (type(error), str(error))


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_cut_wherever_the_bytes_are(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    reader, got, at = Lines(64), list[bytes](), 0
    while at < len(whole):
        step = data.draw(st.integers(1, len(whole) - at))
        reader.add(whole[at : at + step])
        at += step
        while (line := reader.next()) is not None:
            got.append(line)
    assert got == lines


@pytest.mark.parametrize("more", [b"", b"\n", b"\n{}\n"])
def test_p14_a_line_that_is_too_long_is_an_error(more: bytes) -> None:
    reader = Lines(10)
    reader.add(b"x" * 10 + more)
    with pytest.raises(BadRequest, match="longer than 10 bytes"):
        reader.next()


def test_a_user_s_own_gateway_and_root_may_control_it() -> None:
    assert may_control(Peer(1, 1000), own=1000)
    assert may_control(Peer(1, 0), own=1000)
    assert not may_control(Peer(1, 1001), own=1000)
    assert not may_control(Peer(1, 1000), own=0)


# ----- a server


class Echo:
    """Answers with what it was asked; `logs` streams until it is over."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.peers: list[Peer] = []
        self.streams = 0
        self.hung_up = 0
        self.gone = trio.Event()
        self.closed = trio.Event()

    async def answer(self, request: Request, peer: Peer, send: Send) -> Mapping[str, Any]:
        self.asked.append(request)
        self.peers.append(peer)
        if request.do == "turns":
            raise NotFound("no such thing")
        if request.do == "undrain":
            raise ZeroDivisionError("a mistake")
        if request.do == "logs":
            self.streams += 1
            try:
                await send({"record": "first"})
                await self.closed.wait()
                await send({"record": "last"})
            finally:
                self.hung_up += not self.closed.is_set()
                self.streams -= 1
                self.gone.set()
            return {"end": "over"}
        await trio.lowlevel.checkpoint()
        return {"did": request.do}

    def close(self) -> None:
        self.closed.set()


class Said:
    """What the log was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        self.lines.append((level, event, fields))

    def events(self) -> list[str]:
        return [event for _, event, _ in self.lines]


@asynccontextmanager
async def serving(store: Path) -> AsyncGenerator[tuple[Echo, Said]]:
    echo, said = Echo(), Said()
    respondent: Respondent = echo
    with trio.fail_after(PATIENCE):
        async with control_socket(store, respondent, said):
            yield echo, said


async def ask(store: Path, do: str, **values: Any) -> dict[str, Any]:
    def sync() -> dict[str, Any]:
        with connected(store) as control:
            return control.ask(do, **values)

    return await trio.to_thread.run_sync(sync)


@asynccontextmanager
async def talking(store: Path) -> AsyncGenerator[trio.SocketStream]:
    with address(socket_of(store)) as where:
        stream = await trio.open_unix_socket(where)
    async with stream:
        yield stream


async def read_all(stream: trio.SocketStream) -> list[dict[str, Any]]:
    data = b""
    with suppress(trio.BrokenResourceError):
        async for chunk in stream:
            data += chunk
    return [json.loads(line) for line in data.splitlines()]


async def test_a_request_is_answered_by_whom_it_is_for(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db") as (echo, said):
        assert await ask(tmp_path / "a.db", "drain") == {"ok": True, "did": "drain"}
        assert echo.peers == [Peer(os.getpid(), os.getuid())]
        who = {"uid": os.getuid(), "pid": os.getpid()}
        assert said.lines == [
            (
                "info",
                "control",
                {"do": "drain", **who, "asked": {}},
            )
        ]
        with pytest.raises(NotFound, match="no such thing"):
            await ask(tmp_path / "a.db", "turns")


async def test_the_socket_is_private_and_there_only_while_it_is_served(tmp_path: Path) -> None:
    path = socket_of(tmp_path / "a.db")
    before = os.umask(0)
    try:
        async with serving(tmp_path / "a.db"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert os.umask(0) == 0, "the process's umask is as it was"
    finally:
        os.umask(before)
    assert not path.exists()
    with pytest.raises(NoGateway, match="no gateway runs on"):
        await ask(tmp_path / "a.db", "status")


async def test_c50_a_socket_of_a_dead_gateway_is_replaced(tmp_path: Path) -> None:
    listen_at(socket_of(tmp_path / "a.db")).close()  # the file stays, as after a kill
    assert socket_of(tmp_path / "a.db").exists()
    with pytest.raises(NoGateway):
        await ask(tmp_path / "a.db", "status")
    async with serving(tmp_path / "a.db"):
        assert (await ask(tmp_path / "a.db", "status"))["ok"]


async def test_p14_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = socket_of(tmp_path / "a.db")
    path.write_text("somebody's")
    async with serving(tmp_path / "a.db") as (_, said):
        ((level, event, fields),) = said.lines
        assert (level, event) == ("warning", "no_control_socket")
        assert "is no socket: move it away" in fields["error"]
    assert path.read_text() == "somebody's"


async def test_a_socket_that_another_gateway_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = socket_of(tmp_path / "a.db")
    async with serving(tmp_path / "a.db"):
        path.unlink()
        other = listen_at(path)
    assert path.exists()
    other.close()


@pytest.mark.parametrize("length", [100, 200, 2000])
async def test_a_long_path_is_no_obstacle(tmp_path: Path, length: int) -> None:
    folder = tmp_path
    while len(str(folder)) < length:
        folder /= "f" * min(200, max(1, length - len(str(folder)) - 1))
    folder.mkdir(parents=True, exist_ok=True)
    async with serving(folder / "a.db"):
        assert (await ask(folder / "a.db", "status"))["ok"]
    assert not socket_of(folder / "a.db").exists()


async def test_p14_a_name_that_no_socket_can_have_costs_the_socket_only(tmp_path: Path) -> None:
    store = tmp_path / ("n" * 120)
    async with serving(store) as (_, said):
        ((_, event, fields),) = said.lines
        assert event == "no_control_socket"
        assert "cannot have a name of 125 bytes; give the store a shorter one" in fields["error"]
    with pytest.raises(ControlError, match="cannot have a name of 125 bytes"):
        await ask(store, "status")


# ----- who may


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
async def test_another_user_is_refused_also_where_the_socket_is_open_to_all(tmp_path: Path) -> None:
    store = tmp_path / "a.db"
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    async with serving(store) as (echo, said):
        code, _ = await _as_nobody(store)
        assert code == "PermissionError", "its mode keeps others out"
        socket_of(store).chmod(0o666)
        code, told = await _as_nobody(store)
        assert code == "answered"
        assert json.loads(told)["kind"] == "forbidden"
        assert f"user {NOBODY} may not control this gateway" in json.loads(told)["error"]
        assert echo.asked == []
        assert said.events() == ["control_refused"]


async def _as_nobody(store: Path) -> tuple[str, str]:
    """What a process of another user gets that asks for the status."""
    source = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except OSError as error:
    print(type(error).__name__)
else:
    sock.settimeout(20)
    try:
        sock.sendall(b'{"do": "status"}\\n')
    except BrokenPipeError:
        pass  # turned away already
    print("answered"); print(sock.recv(65536).decode())
"""
    done = await trio.run_process(
        [sys.executable, "-c", source, str(socket_of(store))], capture_stdout=True
    )
    code, _, told = done.stdout.decode().partition("\n")
    return code, told


# ----- peers that misbehave


async def test_p14_a_bad_request_gets_one_error_and_ends_the_talk(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db") as (echo, _), talking(tmp_path / "a.db") as stream:
        await stream.send_all(b'{"do": "halt"}\n{"do": "drain"}\n')
        (answer,) = await read_all(stream)
        assert (answer["ok"], answer["kind"]) == (False, "bad-request")
        assert echo.asked == []


async def test_p14_a_request_without_an_end_is_not_kept(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db"), talking(tmp_path / "a.db") as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(b"x" * (LONGEST_REQUEST + 10))
        (answer,) = await read_all(stream)
        assert answer["error"] == f"the line is longer than {LONGEST_REQUEST} bytes"


async def test_several_requests_follow_each_other_over_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db"), talking(tmp_path / "a.db") as stream:
        await stream.send_all(b'{"do": "drain"}\n{"do": "turns"}\n{"do": "status"}\n')
        await stream.send_eof()
        told = await read_all(stream)
        assert [answer["ok"] for answer in told] == [True, False, True]


async def test_a_mistake_of_ours_is_told_and_stops_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db") as (_, said):
        with pytest.raises(ControlError, match="failed in the gateway; its log says why"):
            await ask(tmp_path / "a.db", "undrain")
        level, event, fields = said.lines[-1]
        assert (level, event) == ("error", "control_failed")
        assert "ZeroDivisionError" in fields["traceback"]
        assert (await ask(tmp_path / "a.db", "status"))["ok"]


async def test_a_peer_that_asks_nothing_is_sent_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_control_socket, "PATIENCE", 0.2)
    async with serving(tmp_path / "a.db"), talking(tmp_path / "a.db") as stream:
        await stream.send_all(b'{"do": ')
        (answer,) = await read_all(stream)
        assert answer["error"] == "no request within 0.2 s"


async def test_a_peer_that_reads_nothing_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_control_socket, "PATIENCE", 1.0)
    async with serving(tmp_path / "a.db") as (echo, _), talking(tmp_path / "a.db") as stream:
        with pytest.raises(trio.BrokenResourceError):
            while True:  # it never reads an answer, until it is cut off
                await stream.send_all(b'{"do": "drain"}\n' * 1000)
        assert echo.asked
        assert (await ask(tmp_path / "a.db", "status"))["ok"]


async def test_there_are_so_many_connections_and_no_more(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db") as (_, said), trio.open_nursery() as nursery:
        streams = []
        with address(socket_of(tmp_path / "a.db")) as where:
            for _ in range(CONNECTIONS):
                stream = await trio.open_unix_socket(where)
                await stream.send_all(b'{"do": "drain"}\n')
                assert await stream.receive_some()
                streams.append(stream)
            with pytest.raises(ControlError, match="16 connections are open already"):
                await ask(tmp_path / "a.db", "status")
        assert said.events()[-1] == "control_refused"
        await streams.pop().aclose()
        with trio.fail_after(PATIENCE):
            while True:  # that it is closed arrives in its own time
                with suppress(ControlError):
                    await ask(tmp_path / "a.db", "status")
                    break
        for stream in streams:
            nursery.start_soon(stream.aclose)


# ----- streams


async def test_who_hangs_up_is_not_told_any_more(tmp_path: Path) -> None:
    async with serving(tmp_path / "a.db") as (echo, _):
        async with talking(tmp_path / "a.db") as stream:
            await stream.send_all(b'{"do": "logs", "follow": true}\n')
            assert await stream.receive_some() == b'{"record":"first"}\n'
            assert echo.streams == 1
        await echo.gone.wait()
        assert (echo.streams, echo.hung_up) == (0, 1)


async def test_who_follows_gets_the_rest_at_the_end(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    async def follow(task_status: trio.TaskStatus[None]) -> None:
        async with talking(tmp_path / "a.db") as stream:
            await stream.send_all(b'{"do": "logs", "follow": true}\n')
            told.append(json.loads(await stream.receive_some()))
            task_status.started()
            told.extend(await read_all(stream))

    async with trio.open_nursery() as nursery, serving(tmp_path / "a.db"):
        await nursery.start(follow)
    assert told == [{"record": "first"}, {"record": "last"}, {"ok": True, "end": "over"}]


async def test_p11_idle_connections_do_not_hold_up_the_end(tmp_path: Path) -> None:
    async with trio.open_nursery():
        async with serving(tmp_path / "a.db"):
            with address(socket_of(tmp_path / "a.db")) as where:
                idle = [await trio.open_unix_socket(where) for _ in range(5)]
            await idle[0].send_all(b'{"do": "drain"}\n')
            assert await idle[0].receive_some()
            began = trio.current_time()
        assert trio.current_time() - began < PATIENCE / 4
        for stream in idle:
            await stream.aclose()


# ----- the client, at others' sockets


@contextmanager
def impostor(store: Path, says: bytes) -> Generator[None]:
    """Something else that listens there."""
    listener = listen_at(socket_of(store))
    listener.setblocking(True)

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with closing(connection), suppress(OSError):
                    connection.recv(1000)
                    connection.sendall(says)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)
        listener.close()


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (b"", "hung up before it answered"),
        (b"220 mail.example\r\n", "is no gateway"),
        (b"[]\n", "is no gateway"),
        (b'{"half', "hung up before it answered"),
    ],
)
def test_p14_what_is_no_gateway_is_said_to_be_none(tmp_path: Path, says: bytes, told: str) -> None:
    path = tmp_path / "a.db"
    with impostor(path, says), pytest.raises(ControlError, match=told), connected(path) as control:
        control.ask("status")


def test_the_peer_is_known_from_the_kernel() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with closing(ours), closing(theirs):
        assert peer_of(ours) == Peer(os.getpid(), os.geteuid())


def test_p14_a_process_that_has_the_store_and_no_socket_is_named(tmp_path: Path) -> None:
    source = (
        "import sys, time\nfrom pathlib import Path\n"
        "from trio_gateway.store._sqlite import lock_store\n"
        "with lock_store(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / "a.db")], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        refused = f"process {holder.pid} has .* cannot be asked"
        with pytest.raises(ControlError, match=refused), connected(tmp_path / "a.db"):
            raise AssertionError("connected")
    finally:
        holder.kill()
        holder.communicate()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with pytest.raises(GatewayError) as caught, connected(tmp_path / "a.db"):
            pass
        if isinstance(caught.value, NoGateway):
            return
    raise AssertionError("the lock of a dead process is held")
