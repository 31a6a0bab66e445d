"""A real Chromium, headless, driven over the WebDriver protocol: plain JSON over HTTP.

    async with open_browser() as browser:
        await browser.go(url)
        await browser.wait_for("return document.title === 'Sign in'")

It and its driver are processes of their own, with an own folder for what they write; whatever
happens in the block, they are gone after it.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import httpx2
import trio

PATIENCE = 30.0
"""Seconds that anything may take on a busy machine before a test fails."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--window-size=1200,1500",
)

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"

TAB, ENTER, SPACE = "\ue004", "\ue007", "\ue00d"


def missing() -> str | None:
    """Why there is no browser; None: there is one."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    packages = "apt-get install chromium chromium-driver"
    return f"no {' and no '.join(lacking)} on this machine: {packages}" if lacking else None


@attrs.define
class Browser:
    """One window."""

    client: httpx2.AsyncClient
    session: str

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One command. Raises `AssertionError` with what the driver says."""
        json = (body or {}) if method == "POST" else None
        response = await self.client.request(method, f"/session/{self.session}{path}", json=json)
        value = response.json()["value"]
        assert response.status_code == 200, value
        return value

    async def go(self, url: str) -> None:
        """Open a page."""
        await self.ask("POST", "/url", {"url": url})

    async def url(self) -> str:
        """Which page is open."""
        return str(await self.ask("GET", "/url"))

    async def eval(self, script: str, *args: Any) -> Any:
        """What a script in the page returns."""
        return await self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    async def wait_for(self, condition: str, *args: Any) -> Any:
        """Wait until `condition`, an expression in the page, is true."""
        with trio.move_on_after(PATIENCE):
            while True:
                if value := await self.eval(f"return {condition}", *args):
                    return value
                await trio.sleep(0.03)
        raise AssertionError(f"never: {condition}\n{await self.text()}")

    async def text(self) -> str:
        """What the page says."""
        return str(await self.eval("return document.body.innerText"))

    async def find(self, css: str) -> str:
        """An element, for the driver."""
        found = await self.ask("POST", "/element", {"using": "css selector", "value": css})
        return str(found[ELEMENT])

    async def click(self, css: str) -> None:
        """Click where a person would."""
        await self.ask("POST", f"/element/{await self.find(css)}/click")

    async def type(self, css: str, text: str) -> None:
        """Type into an element."""
        await self.ask("POST", f"/element/{await self.find(css)}/value", {"text": text})

    async def keys(self, text: str) -> None:
        """Press keys, wherever the focus is."""
        presses = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": presses}]
        await self.ask("POST", "/actions", {"actions": actions})

    async def devtools(self, command: str, **params: Any) -> Any:
        """A command of Chromium's own."""
        return await self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    async def look(self, *, width: int = 1000, height: int = 760, dark: bool = False) -> None:
        """Choose the size of the window, and light or dark."""
        await self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, path: Path) -> None:
        """A screenshot, as PNG."""
        await trio.Path(path).write_bytes(base64.b64decode(await self.ask("GET", "/screenshot")))

    async def complaints(self) -> list[str]:
        """What the console says that is no answer of the server: errors, refusals of the policy."""
        logs = await self.ask("POST", "/se/log", {"type": "browser"})
        return [one["message"] for one in logs if one["source"] != "network"]

    async def has_dialog(self) -> bool:
        """Whether a script has opened one."""
        response = await self.client.get(f"/session/{self.session}/alert/text")
        return response.status_code == 200


@asynccontextmanager
async def open_browser() -> AsyncGenerator[Browser, None]:
    """Start a browser that writes to a folder of its own only."""
    port = _free_port()
    command = ["chromedriver", f"--port={port}"]
    async with _folder() as folder, trio.open_nursery() as nursery:
        # A session of its own, so that all that they start can be ended with them.
        process = await nursery.start(
            partial(
                trio.run_process, command, env=_environment(folder), start_new_session=True,
                check=False, capture_stdout=True, capture_stderr=True,
            )
        )  # fmt: skip
        try:
            base = f"http://127.0.0.1:{port}"
            async with httpx2.AsyncClient(
                base_url=base, timeout=PATIENCE, trust_env=False
            ) as client:
                await _until_ready(client)
                session = await _new_session(client, folder)
                yield Browser(client, session)
                await client.delete(f"/session/{session}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _folder() -> AsyncGenerator[Path, None]:
    # Not pytest's: the sockets in it cannot have names as long as that.
    folder = Path(tempfile.mkdtemp(prefix="browser-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}


async def _until_ready(client: httpx2.AsyncClient) -> None:
    with trio.fail_after(PATIENCE):
        while True:
            with suppress(httpx2.TransportError):
                if (await client.get("/status")).json()["value"]["ready"]:
                    return
            await trio.sleep(0.05)


async def _new_session(client: httpx2.AsyncClient, folder: Path) -> str:
    options = {"args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL"},
        "unhandledPromptBehavior": "ignore",
    }
    response = await client.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
    assert response.status_code == 200, response.text
    return str(response.json()["value"]["sessionId"])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
