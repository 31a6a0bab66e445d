"""A channel that asks for messages: a bot at a platform with an API like Telegram's, over HTTP.

Try:

    python -m pip install ".[http]" httpx2
    python examples/polling_channel.py

The platform is part of this file, a server on a loopback port. Every call is a POST of JSON:

    /bot<TOKEN>/getMe          {}
    /bot<TOKEN>/getUpdates     {"offset": 7, "timeout": 25}        waits until there is something
                               -> [{"update_id": 7, "chat": "ada", "text": "hi"}]
    /bot<TOKEN>/sendMessage    {"chat": "ada", "text": "HI"}

and is answered {"ok": true, "result": ...}, or {"ok": false, "error_code": 429, "description": ...,
"retry_after": 30}. Asking from offset 7 on tells the platform that 6 and all before it are
received; it forgets them. So the channel must not ask for 7 before 6 is on disk: the offset is its
cursor, committed together with the messages.

The platform knows no keys: a text that is sent twice is shown twice. So a text whose first sending
may have arrived is labelled. The program lets an answer get lost, asks the channel to wait, and
lets a message arrive while there is no gateway.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import trio
from hypercorn.config import Config
from hypercorn.trio import serve  # pyright: ignore[reportUnknownVariableType]
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from trio_gateway import (
    Channel,
    Delivery,
    DeliveryRules,
    Intake,
    Message,
    Receipt,
    RefusalKind,
    RetryLater,
    Settings,
    Turn,
    Undeliverable,
    open_gateway,
)

POLL = 25
"""Seconds that the platform may wait with an answer if there is nothing new."""


class BotChannel(Channel):
    """The channel. This class is all that a platform needs."""

    name = "bot"
    text_limit = 4096

    def __init__(self, url: str, token: str) -> None:
        self._base = f"{url}/bot{token}"
        self._client: httpx2.AsyncClient | None = None

    def text_length(self, text: str) -> int:
        """The platform counts UTF-16 units: an emoji is two."""
        return len(text.encode("utf-16-le", "surrogatepass")) // 2

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """Ask for messages, and hand them in, until cancelled. Raising: the gateway tries again."""
        patience = httpx2.Timeout(10, read=POLL + 10, pool=None)
        async with httpx2.AsyncClient(timeout=patience) as client:
            self._client = client
            try:
                await self._call("getMe")  # a wrong token is noticed here
                task_status.started()
                while True:
                    await self._take_some(intake)
            finally:
                self._client = None

    async def _take_some(self, intake: Intake) -> None:
        offset = int(await intake.cursor() or 0)
        updates = await self._call("getUpdates", offset=offset, timeout=POLL)
        if updates:
            messages = [self._message(update) for update in updates if "text" in update]
            cursor = str(updates[-1]["update_id"] + 1)
            await self._tell_refusals(await intake.accept(*messages, cursor=cursor))

    def _message(self, update: dict[str, Any]) -> Message:
        number, chat = str(update["update_id"]), update["chat"]
        return Message(channel=self.name, session=chat, id=number, text=update["text"], sender=chat)

    async def _tell_refusals(self, receipts: Sequence[Receipt]) -> None:
        for receipt in receipts:
            if receipt.refusal is RefusalKind.CLOSING:
                await trio.sleep_forever()  # the cursor stays; the next boot is told them again
            if receipt.reason is not None:
                await self._post(receipt.session.name, receipt.reason)

    async def send(self, delivery: Delivery) -> None:
        """Send one text. What is neither busy nor gone has an unknown outcome."""
        again = "(You may have seen this before.)\n" if delivery.repeat else ""
        await self._post(delivery.session.name, again + delivery.text)

    async def _post(self, chat: str, text: str) -> None:
        await self._call("sendMessage", chat=chat, text=text)

    async def _call(self, method: str, **fields: Any) -> Any:
        """Call the platform. No error of this has the address in it, for the token is there."""
        if self._client is None:
            raise ConnectionError("not connected")
        try:
            response = await self._client.post(f"{self._base}/{method}", json=fields)
            answer = response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise ConnectionError(f"{method}: {type(error).__name__}") from None
        if answer["ok"]:
            return answer["result"]
        if answer["error_code"] == 429:
            raise RetryLater(answer["retry_after"])
        if answer["error_code"] == 403 and method == "sendMessage":
            raise Undeliverable(answer["description"])
        raise ConnectionError(f"{method}: {answer['error_code']} {answer['description']}")


# ----- from here on: a platform to try it with


class Platform:
    """Keeps what people say until it is received, and shows what is sent. `next_answer` makes it
    difficult, once."""

    token = "17:secret"

    def __init__(self) -> None:
        self.url = ""
        self.shown: list[tuple[str, str]] = []
        self.next_answer = "sent"
        """How the next sending is answered: sent, busy, gone; or lost: shown all the same."""
        self.retry_after = 0.2
        self._said = 0
        self._waiting: list[dict[str, Any]] = []
        self._broken = False
        self._polls = 0
        self._news = trio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None, None]:
        """Listen on a free port for the length of the block."""
        routes = [Route(f"/bot{self.token}/{{method}}", self._called, methods=["POST"])]
        config = Config()
        config.bind, config.errorlog, config.graceful_timeout = ["127.0.0.1:0"], None, 0.1
        over = trio.Event()
        async with trio.open_nursery() as nursery:
            app: Any = Starlette(routes=routes)
            run = partial(serve, app, config, shutdown_trigger=over.wait)
            (self.url,) = await nursery.start(run)
            yield
            self.cut()
            over.set()

    def say(self, chat: str, text: str) -> None:
        """Somebody says something."""
        print(f"{chat} says {text!r}")
        self._said += 1
        self._waiting.append({"update_id": self._said, "chat": chat, "text": text})
        self._wake()

    def cut(self) -> None:
        """Break off whoever waits for messages."""
        self._broken = True
        self._wake()

    async def wait_shown(self, count: int) -> None:
        """Wait until so many texts are on the screen."""
        while len(self.shown) < count:
            await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _called(self, request: Request) -> Response:
        fields = await request.json()
        method = request.path_params["method"]
        if method == "getUpdates":
            return await self._updates(fields["offset"], fields["timeout"])
        return self._take(fields["chat"], fields["text"]) if method == "sendMessage" else _ok({})

    async def _updates(self, offset: int, patience: float) -> Response:
        self._waiting = [one for one in self._waiting if one["update_id"] >= offset]
        self._polls += 1
        number = self._polls
        with trio.move_on_after(patience):
            while not self._waiting and not self._broken and number == self._polls:
                await self._news.wait()
        if number != self._polls:
            return _error(409, "somebody else asks for the same bot")
        if self._broken:
            self._broken = False
            return Response("the line is dead", 502)
        return _ok(self._waiting)

    def _take(self, chat: str, text: str) -> Response:
        answer, self.next_answer = self.next_answer, "sent"
        if answer == "busy":
            print("too fast: come back later")
            return _error(429, "Too Many Requests", retry_after=self.retry_after)
        if answer == "gone":
            return _error(403, f"{chat} has blocked the bot")
        print(f"{chat} reads {text!r}")
        self.shown.append((chat, text))
        self._wake()
        return Response("the answer got lost", 502) if answer == "lost" else _ok({})


def _ok(result: Any) -> Response:
    return JSONResponse({"ok": True, "result": result})


def _error(code: int, description: str, **more: Any) -> Response:
    answer = {"ok": False, "error_code": code, "description": description, **more}
    return JSONResponse(answer, code)


async def agent(turn: Turn) -> str:
    """Answer loudly."""
    return turn.text.upper()


SOON = Settings(delivery=DeliveryRules(first_delay=0.1))
"""A second try comes soon, so that the program is short."""


async def main() -> None:
    """Show it."""
    platform = Platform()
    with tempfile.TemporaryDirectory() as folder, trio.fail_after(30):
        store = Path(folder, "bot.db")
        async with platform.serving():
            channel = BotChannel(platform.url, platform.token)
            async with open_gateway(agent, store=store, channels=[channel], settings=SOON) as first:
                platform.say("ada", "hello")
                await platform.wait_shown(1)
                platform.next_answer = "busy"
                platform.say("bob", "good morning")
                await platform.wait_shown(2)
                platform.next_answer = "lost"
                platform.say("bob", "do you hear me?")
                await platform.wait_shown(4)
                await first.wait_idle()
            print("the gateway is gone")
            platform.say("ada", "still there?")
            async with open_gateway(agent, store=store, channels=[channel]) as second:
                await platform.wait_shown(5)
                await second.wait_idle()
    print(f"{len(platform.shown)} texts were shown")


if __name__ == "__main__":
    trio.run(main)
