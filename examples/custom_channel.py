"""A channel of your own: what it takes to connect a chat platform.

Try:

    python examples/custom_channel.py

The platform is part of this file: a server on a loopback port that speaks JSON lines.

    channel -> platform    {"watch": 6}                                send me what comes after 6
    platform -> channel    {"message": 7, "room": "ada", "text": "hi"}
    channel -> platform    {"post": KEY, "room": "ada", "text": "HI"}
    platform -> channel    {"posted": KEY}                             or:
                           {"wait": KEY, "seconds": 30}                too fast, come back later
                           {"gone": KEY}                               there is no such room

The message's number is the cursor: it is committed together with the message, so that none is lost
and none is answered twice, whatever breaks between the two. The platform shows a post once for each
key, so the channel calls itself idempotent, and a post whose answer got lost is sent again.

The program breaks the line at the worst moment, asks the channel to wait, and lets a message arrive
while there is no gateway.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from trio_gateway import (
    Channel,
    Delivery,
    Intake,
    Message,
    RetryLater,
    Turn,
    Undeliverable,
    open_gateway,
)


class Wire:
    """JSON lines over a socket. Both sides use it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lock = trio.Lock()
        self._buffer = b""

    async def write(self, line: Mapping[str, Any]) -> None:
        """Write one line."""
        async with self._lock:
            try:
                await self._stream.send_all(json.dumps(line).encode() + b"\n")
            except BaseException:
                self._stream.socket.close()  # half a line would garble the next one
                raise

    async def read(self) -> dict[str, Any] | None:
        """Read one line; None at the end."""
        while b"\n" not in self._buffer:
            data = await self._stream.receive_some()
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))


class LineChannel(Channel):
    """The channel. This class is all that a platform needs."""

    name = "lines"
    idempotent = True  # the platform recognises a post by its key
    text_limit = 500

    def __init__(self, port: int) -> None:
        self._port = port
        self._wire: Wire | None = None
        self._answers: dict[str, trio.MemorySendChannel[dict[str, Any]]] = {}

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """Connect, and hand messages to the inbox. Raising makes the gateway try again."""
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as stream:
            self._wire = wire = Wire(stream)
            try:
                await wire.write({"watch": int(await intake.cursor() or 0)})
                task_status.started()
                while (line := await wire.read()) is not None:
                    await self._take(line, intake)
            finally:
                self._hang_up()
        raise ConnectionError("the platform hung up")

    async def _take(self, line: dict[str, Any], intake: Intake) -> None:
        if "message" in line:
            number = str(line["message"])
            message = Message(channel=self.name, session=line["room"], id=number, text=line["text"])
            await intake.accept(message, cursor=number)
            return
        key = line.get("posted") or line.get("wait") or line["gone"]
        if key in self._answers:
            self._answers[key].send_nowait(line)

    def _hang_up(self) -> None:
        # Whoever waits for an answer gets none: the outcome of that post is unknown.
        self._wire = None
        for answer in self._answers.values():
            answer.close()

    async def send(self, delivery: Delivery) -> None:
        """Post one text, and wait until the platform has it."""
        if self._wire is None:
            raise ConnectionError("not connected")
        answered, answer = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[delivery.key] = answered
        try:
            post = {"post": delivery.key, "room": delivery.session.name, "text": delivery.text}
            await self._wire.write(post)
            outcome = await answer.receive()
        finally:
            del self._answers[delivery.key]
        if "wait" in outcome:
            raise RetryLater(outcome["seconds"])
        if "gone" in outcome:
            raise Undeliverable(f"there is no room {delivery.session.name!r}")


# ----- from here on: a platform to try it with


class Platform:
    """Keeps what people say, and shows what is posted. `next_answer` makes it difficult, once."""

    def __init__(self) -> None:
        self.posts = 0
        self.shown: dict[str, str] = {}
        self.next_answer = "posted"
        """How the next post is answered: posted, wait, gone; or not at all: the line breaks."""
        self.seconds = 0.2
        self._messages: list[dict[str, Any]] = []
        self._news = trio.Event()
        self._line = trio.CancelScope()

    async def start(self, nursery: trio.Nursery) -> int:
        """Serve in `nursery`; return the port."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(trio.serve_listeners, self._serve, listeners)
        return int(listeners[0].socket.getsockname()[1])

    def hang_up(self) -> None:
        """Break the line."""
        print("the line breaks")
        self._line.cancel()

    def say(self, room: str, text: str) -> None:
        """Somebody says something."""
        number = len(self._messages) + 1
        print(f"{room} says {text!r} (message {number})")
        self._messages.append({"message": number, "room": room, "text": text})
        self._wake()

    async def wait_shown(self, count: int) -> None:
        """Wait until so many posts are on the screen."""
        while len(self.shown) < count:
            await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _serve(self, stream: trio.SocketStream) -> None:
        try:
            with trio.CancelScope() as self._line:
                await self._talk(Wire(stream))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            print("somebody is gone")

    async def _talk(self, wire: Wire) -> None:
        hello = await wire.read()
        if hello is None:
            return
        print(f"somebody watches from message {hello['watch'] + 1} on")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._push, wire, hello["watch"])
            while (line := await wire.read()) is not None:
                await self._take_post(wire, line)
            nursery.cancel_scope.cancel()

    async def _push(self, wire: Wire, number: int) -> None:
        while True:
            while number < len(self._messages):
                await wire.write(self._messages[number])
                number += 1
            await self._news.wait()

    async def _take_post(self, wire: Wire, line: dict[str, Any]) -> None:
        self.posts += 1
        answer, self.next_answer = self.next_answer, "posted"
        if answer in ("posted", "none"):
            self._show(line["post"], line["room"], line["text"])
        if answer == "none":
            self.hang_up()
            return
        if answer == "wait":
            print("too fast: come back later")
        await wire.write({answer: line["post"], "seconds": self.seconds})

    def _show(self, key: str, room: str, text: str) -> None:
        if key in self.shown:
            print("a post comes again under its old key: shown already")
            return
        print(f"{room} reads {text!r}")
        self.shown[key] = text
        self._wake()


async def agent(turn: Turn) -> str:
    """Answer loudly."""
    return turn.text.upper()


async def main() -> None:
    """Show it."""
    platform = Platform()
    async with trio.open_nursery() as nursery:
        port = await platform.start(nursery)
        with tempfile.TemporaryDirectory() as folder, trio.fail_after(30):
            store = Path(folder, "lines.db")
            async with open_gateway(agent, store=store, channels=[LineChannel(port)]) as gateway:
                platform.say("ada", "hello")
                await platform.wait_shown(1)
                platform.next_answer = "none"
                platform.say("bob", "do you hear me?")
                await platform.wait_shown(2)
                await gateway.wait_idle()
                platform.next_answer = "wait"
                platform.say("bob", "good")
                await platform.wait_shown(3)
                await gateway.wait_idle()
            print("the gateway is gone")
            platform.say("ada", "still there?")
            async with open_gateway(agent, store=store, channels=[LineChannel(port)]) as gateway:
                await platform.wait_shown(4)
                await gateway.wait_idle()
        print(f"{platform.posts} posts arrived, {len(platform.shown)} were shown")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
