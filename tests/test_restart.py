"""A restart behind a socket that somebody else holds, as systemd does."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import trio
from helpers import PATIENCE, rows

from trio_gateway.http import read_token, token_path

ECHO = "async def agent(turn):\n    return turn.text\n"

ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.executable, [sys.executable, "-m", "trio_gateway", *sys.argv[2:]])
"""


async def test_a_restart_under_load_refuses_no_connection(tmp_path: Path) -> None:
    """The listening socket belongs to who supervises: connections wait in it meanwhile."""
    source = tmp_path / "bot.py"
    source.write_text(ECHO)
    store = tmp_path / "gateway.db"
    answered: list[str] = []
    stop = trio.Event()
    token = read_token(token_path(store))

    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        listening.set_inheritable(True)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", ACTIVATE, str(listening.fileno())]
            command += ["run", f"{source}:agent", "--http", "127.0.0.1:1", "--store", str(store)]
            return subprocess.Popen(
                command, pass_fds=[listening.fileno()], stderr=subprocess.DEVNULL, cwd=tmp_path
            )

        async def client(number: int) -> None:
            n = 0
            while not stop.is_set():
                name = f"c{number}-{n}"
                n += 1
                # A connection each, and nothing is tried twice.
                async with httpx2.AsyncClient(trust_env=False, timeout=PATIENCE) as one:
                    response = await one.post(
                        f"{url}/v1/sessions/s{number}/messages",
                        headers={"authorization": f"Bearer {token}"},
                        json={"id": name, "text": name},
                    )
                if response.status_code == 202:
                    answered.append(name)
                else:
                    assert response.status_code == 503, response.text

        process = start()
        try:
            with trio.fail_after(90):
                async with trio.open_nursery() as nursery:
                    for number in range(4):
                        nursery.start_soon(client, number)
                    for _ in range(2):
                        before = len(answered)
                        while len(answered) < before + 40:  # noqa: ASYNC110
                            await trio.sleep(0.02)
                        process.terminate()
                        assert await trio.to_thread.run_sync(process.wait) == 0
                        process = start()
                    before = len(answered)
                    while len(answered) < before + 40:  # noqa: ASYNC110
                        await trio.sleep(0.02)
                    stop.set()
            process.terminate()
            assert await trio.to_thread.run_sync(process.wait) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    stored: Any = rows(store, "SELECT id, state FROM message")
    assert {name for name, _ in stored} >= set(answered)
    assert all(state == "answered" for name, state in stored if name in set(answered[:-8]))
    said = rows(store, "SELECT about, count(*) FROM delivery WHERE final GROUP BY about")
    assert all(count == 1 for _, count in said)
