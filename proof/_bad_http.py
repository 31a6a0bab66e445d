"""The HTTP door, in this process, over real sockets: requests that are none, nearly one, or one
with odd things in it. Each is answered with one clear error, or served; nothing falls over, nobody
comes in without the token, what was accepted is kept, and who is healthy beside it is answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import attrs
import trio

from trio_gateway import Gateway, Settings, open_gateway
from trio_gateway._events import GatewayFailed, InputRefused
from trio_gateway.http import HttpChannel, HttpSettings

from ._bad_http_frames import frames
from ._bad_http_inputs import FINE, SECRET, TOKEN, Head, Sending, sendings
from ._bad_lives import ROOM, Batch, Ears, echo, rows, sound

CONTROL_EVERY: Final = 40
"""Every so many inputs, a healthy message must be answered."""

PATIENCE: Final = 60.0
LONGEST_ERROR: Final = 2000
"""Characters: an error that is longer is not a clear one."""

ENOUGH: Final = 200_000
"""Bytes of an answer that has no end."""

OPENAI: Final = (b"/v1/models", b"/v1/chat/", b"/v1/responses")


def http(batch: Batch) -> None:
    """One life of a gateway behind its door."""
    trio.run(_life, batch)


async def _life(batch: Batch) -> None:
    ears = Ears()
    channel = HttpChannel(
        HttpSettings(bind="127.0.0.1:0", header_time=30.0, longest_wait=20.0),
        token=TOKEN,
        hook_secret=SECRET,
    )
    settings = Settings(limits=ROOM, commands=False, grace=5.0, budget=10.0)
    with trio.fail_after(150):
        async with open_gateway(
            echo, store=batch.store, channels=[channel], settings=settings, listen=ears
        ) as gateway:
            await channel.serving.wait()
            host, _, port = channel.addresses[0].removeprefix("http://").rpartition(":")
            await Visitor(batch, gateway, (host, int(port))).visit()
            await gateway.wait_idle()
    failed = ears.of(GatewayFailed)
    assert not failed, f"the gateway itself failed: {failed[0].error}\n{failed[0].traceback}"
    faults = ears.of(InputRefused)
    assert not faults, f"{faults[0].where} was our fault: {faults[0].error}"
    secrets = [event for event in ears.events if TOKEN in repr(event)]
    assert not secrets, f"the token is in an event: {secrets[0]!r}"
    sound(batch)


@attrs.frozen
class Answer:
    """What came, as far as it came."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes

    def __str__(self) -> str:
        return f"{self.status} {self.body[:300]!r}"


class Visitor:
    """Sends one thing after the other, and looks at what comes."""

    def __init__(self, batch: Batch, gateway: Gateway, address: tuple[str, int]) -> None:
        self._batch = batch
        self._gateway = gateway
        self._address = address
        self._stream: trio.SocketStream | None = None
        self._kept: dict[str, tuple[str, str]] = {}
        self._controls = 0

    async def visit(self) -> None:
        """All of them; then the account."""
        for n, sending in enumerate(sendings(self._batch)):
            await self._try(sending)
            if n % CONTROL_EVERY == 0:
                await self._control()
        await self._hang_up()
        await frames(self._batch, self._address)
        await self._control()
        await self._hang_up()
        self._account()

    async def _try(self, sending: Sending) -> None:
        try:
            answer = await self._ask(sending)
        except trio.TooSlowError:
            raise AssertionError(f"no answer to {sending.data[:300]!r}") from None
        kind = sending.kind
        self._batch.input(f"{kind} {'closed' if answer is None else answer.status}")
        story = f"{kind}: {sending.data[:600]!r} was answered {answer}"
        if answer is None:
            assert not sending.allowed, story
            return
        assert TOKEN.encode() not in answer.body, f"the token is in an answer: {story}"
        assert answer.status < 500 or (not sending.allowed and answer.status == 501), story
        if sending.allowed:
            assert answer.status in sending.allowed, f"{story}, not {sorted(sending.allowed)}"
            if answer.status >= 400:
                _check_clear(answer, story)
        if sending.message is not None and answer.status in FINE:
            session, id, text = sending.message
            self._kept[id] = session, text

    async def _control(self) -> None:
        self._controls += 1
        id = f"control-{self._controls}"
        body = json.dumps({"id": id, "text": id}).encode()
        head = Head("POST", b"/v1/sessions/control/messages", ((b"prefer", b"wait=20"),))
        answer = await self._ask(Sending("control", head.with_body(body), FINE))
        assert answer is not None, f"nobody answers {id}"
        assert answer.status == 200, f"{id} was answered {answer}"
        said = json.loads(answer.body)
        assert said["replies"][-1]["text"] == f"re: {id}", said

    def _account(self) -> None:
        """What was accepted is there as it was sent; nobody came in who must not."""
        stored = {
            id: (session, json.loads(body)["text"])
            for id, session, body in rows(
                self._batch.store,
                "SELECT message.id, session.name, body FROM message"
                " JOIN session ON session.id = message.session",
            )
        }
        for id, kept in self._kept.items():
            assert stored.get(id) == kept, f"{id!r} was accepted as {kept}, and is {stored.get(id)}"
        intruders = [id for id in stored if id.startswith("intruder-")]
        assert not intruders, f"let in: {intruders}"
        assert not any(text == "let me in" for _, text in stored.values()), "somebody was let in"

    # ----- the wire

    async def _ask(self, sending: Sending) -> Answer | None:
        """None: the connection has ended instead."""
        fresh = self._stream is None or not sending.allowed
        if fresh:
            await self._hang_up()
            self._stream = await trio.open_tcp_stream(*self._address)
        stream = self._stream
        assert stream is not None
        answer: Answer | None = None
        with trio.fail_after(PATIENCE):
            with suppress(trio.BrokenResourceError):
                await stream.send_all(sending.data)
                if not sending.allowed:
                    await stream.send_eof()  # it may wait for more otherwise
            with suppress(trio.BrokenResourceError):
                answer = await _read(stream, endless=sending.stream)
        ended = answer is None or answer.headers.get(b"connection") == b"close"
        if ended or not sending.allowed or b"content-length" not in (answer or _NONE).headers:
            await self._hang_up()
        return answer

    async def _hang_up(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)


_NONE: Final = Answer(0, {}, b"")


async def _read(stream: trio.SocketStream, *, endless: bool) -> Answer | None:
    """One answer; of one without an end, the beginning."""
    said = b""
    while b"\r\n\r\n" not in said:
        if not (data := await stream.receive_some()):
            return None
        said += data
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    status = int(first.split(b" ")[1])
    pairs = (line.partition(b":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if status == 100:
        raise AssertionError("it waits for a body that has been sent")
    if b"content-length" in headers:
        size = int(headers[b"content-length"])
        while len(body) < size:
            if not (data := await stream.receive_some()):
                return None
            body += data
        return Answer(status, headers, body[:size])
    # In chunks: an event stream. Its first event is enough where it has no end.
    while not (endless and b"\n\n" in body) and b"\r\n0\r\n\r\n" not in b"\r\n" + body:
        if len(body) > ENOUGH or not (data := await stream.receive_some()):
            break
        body += data
    return Answer(status, headers, body)


def _check_clear(answer: Answer, story: str) -> None:
    """An error says in a few words what is wrong, in one of the door's three forms."""
    kind = answer.headers.get(b"content-type", b"")
    if kind.startswith(b"text/html"):
        assert answer.body.strip(), f"not a word: {story}"
        return
    if not answer.body and answer.status in (400, 431):
        return  # the server itself, of what is no HTTP
    assert kind == b"application/json", f"no envelope: {story}"
    said: Any = json.loads(answer.body)
    error = said["error"]
    assert error["message"].strip(), f"not a word: {story}"
    assert len(error["message"]) <= LONGEST_ERROR, f"too many words: {story}"
    assert error.get("type") or error.get("code"), f"no kind: {story}"
    assert "Traceback" not in error["message"], story
