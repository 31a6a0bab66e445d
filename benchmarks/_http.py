"""The HTTP door under load, beside a bare hypercorn that says hello. The server is a process of its
own, and so is who asks."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import trio
from hypercorn.config import Config
from hypercorn.trio import serve  # pyright: ignore[reportUnknownVariableType]
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from trio_gateway import Limits, Settings, Turn, open_gateway
from trio_gateway._collector import calm_collector
from trio_gateway.http import HttpChannel, HttpSettings

TOKEN = "a-token-of-the-benchmarks"
CONNECTIONS = 64
SESSIONS = 1000
ROOM = Limits(turns=10_000, open_messages=10_000_000, open_per_session=100_000)


# ----- the servers


async def _hello(request: Request) -> JSONResponse:
    """What any handler of a message does: read JSON, answer JSON."""
    fields = json.loads(await request.body())
    return JSONResponse({"ok": True, "id": fields["id"]}, 202)


async def serve_hello() -> None:
    """Hypercorn and Starlette, and nothing else."""
    path = "/v1/sessions/{key}/messages"
    app = Starlette(routes=[Route(path, _hello, methods=["POST"])])
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    config.keep_alive_max_requests = 1_000_000
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve, app, config))  # type: ignore[arg-type]
        print(url, flush=True)


async def _echo(turn: Turn) -> str:
    return turn.text


async def serve_gateway(path: Path) -> None:
    """The gateway, with an agent that says what it is told."""
    http = HttpSettings(bind="127.0.0.1:0", connections=20_000, per_peer=20_000)
    channel = HttpChannel(http, token=TOKEN)
    settings = Settings(limits=ROOM)
    async with open_gateway(_echo, store=path, channels=[channel], settings=settings):
        await channel.serving.wait()
        print(channel.addresses[0], flush=True)
        await trio.sleep_forever()


class Server:
    """One of them, as a process."""

    def __init__(self, kind: str, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._http", kind, str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        url = self._process.stdout.readline().strip().removeprefix("http://")
        host, _, port = url.rpartition(":")
        self.address = (host, int(port))

    def memory_kb(self) -> int:
        """Its resident memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


# ----- who asks


def _request(n: int, wait: bool) -> bytes:
    body = json.dumps({"id": f"m{n}", "text": "hello there"}).encode()
    prefer = "prefer: wait=30\r\n" if wait else ""
    head = (
        f"POST /v1/sessions/s{n % SESSIONS}/messages HTTP/1.1\r\nhost: localhost\r\n"
        f"authorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n{prefer}"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _ask(stream: trio.SocketStream, data: bytes) -> None:
    """One request; return when the whole answer is there. Raises for any answer but a good one."""
    await stream.send_all(data)
    said = b""
    while b"\r\n\r\n" not in said:
        said += await _some(stream)
    head, _, body = said.partition(b"\r\n\r\n")
    if not head.startswith((b"HTTP/1.1 202", b"HTTP/1.1 200")):
        raise RuntimeError(said.decode())
    size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < size:
        body += await _some(stream)


async def _some(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some()
    if not data:
        raise RuntimeError("the server has closed the connection")
    return bytes(data)


async def accepted_per_second(address: tuple[str, int], count: int) -> float:
    """Hand in `count` messages over 64 connections, each as fast as it is answered."""
    numbers = iter(range(count))

    async def talk() -> None:
        async with await trio.open_tcp_stream(*address) as stream:
            for n in numbers:
                await _ask(stream, _request(n, wait=False))

    began = perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(CONNECTIONS):
            nursery.start_soon(talk)
    return count / (perf_counter() - began)


async def first_texts(address: tuple[str, int], rate: float, count: int) -> list[float]:
    """Hand in messages at a rate, whether the earlier ones are answered or not: the seconds until
    each one's first text is there."""
    took: list[float] = []
    free: list[trio.SocketStream] = []

    async def one(n: int, due: float) -> None:
        stream = free.pop() if free else await trio.open_tcp_stream(*address)
        await _ask(stream, _request(n, wait=True))
        took.append(trio.current_time() - due)
        free.append(stream)

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for n in range(count):
            due = began + n / rate
            await trio.sleep_until(due)
            nursery.start_soon(one, n, due)
    for stream in free:
        await stream.aclose()
    return took


@asynccontextmanager
async def idle_streams(address: tuple[str, int], count: int) -> AsyncGenerator[None, None]:
    """So many clients that follow a session in which nothing happens."""
    async with trio.open_nursery() as nursery:
        for n in range(count):
            await nursery.start(_follow, address, n)
        yield
        nursery.cancel_scope.cancel()


async def _follow(address: tuple[str, int], n: int, *, task_status: trio.TaskStatus[None]) -> None:
    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(
            f"GET /v1/sessions/s{n}/events HTTP/1.1\r\nhost: localhost\r\n"
            f"authorization: Bearer {TOKEN}\r\n\r\n".encode()
        )
        said = b""
        while b"event: hello" not in said:
            said += await _some(stream)
        task_status.started()
        while True:
            await _some(stream)


# ----- what is measured


def accepted(kind: str, path: Path, count: int) -> float:
    """Messages accepted each second, after a warm-up."""
    with Server(kind, path) as server:
        return trio.run(accepted_per_second, server.address, count)


def p99_first_text_ms(path: Path, rate: float, count: int) -> float:
    """Milliseconds until the first text, that 99 of 100 messages stay under."""
    with Server("gateway", path) as server:
        trio.run(accepted_per_second, server.address, 500)
        took = sorted(trio.run(first_texts, server.address, rate, count))
    return took[int(len(took) * 0.99)] * 1000


def kb_each(path: Path, count: int) -> float:
    """Memory of the server for each idle event stream, in KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * count + 1000)), hard))

    async def grow(server: Server) -> float:
        async with idle_streams(server.address, 100):
            before = server.memory_kb()
        async with idle_streams(server.address, count):
            return (server.memory_kb() - before) / (count - 100)

    with Server("gateway", path) as server:
        return trio.run(grow, server)


SERVERS: dict[str, Callable[[Path], Awaitable[None]]] = {
    "hello": lambda _: serve_hello(),
    "gateway": serve_gateway,
}


async def _serve(kind: str, path: Path) -> None:
    await SERVERS[kind](path)


if __name__ == "__main__":
    calm_collector()
    trio.run(_serve, sys.argv[1], Path(sys.argv[2]))
