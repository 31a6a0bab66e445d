"""What comes in at the HTTP door: requests of which something is odd, and how each may be answered,
by what docs/http.md says of the API; and bytes that are nearly a request.

Everything is decided by the batch's dice, so that a point can be repeated.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote_from_bytes

import attrs

from ._bad_lives import Batch
from ._inputs import (
    as_line,
    as_table,
    broken,
    drawn,
    endless,
    json_value,
    name_text,
    odd_fields,
    odd_text,
)

TOKEN: Final = "token-of-the-bad-0123456789abcdef"
SECRET: Final = b"secret of the hooks, 32 bytes..."
HOST: Final = "localhost"
LONGEST_KEY: Final = 1024
LONGEST_TEXT: Final = 1024 * 1024

FINE: Final = frozenset({200, 202})
WRONG: Final = frozenset({401, 429})
"""A token that is none; after some of them, the address has to wait."""
MISREAD: Final = frozenset({413, 422})


@attrs.frozen
class Sending:
    """One thing to send. `allowed`: how it may be answered; empty: anyhow, or by the end of the
    connection, as long as that is clear."""

    kind: str
    data: bytes
    allowed: frozenset[int] = frozenset()
    message: tuple[str, str, str] | None = None
    """The session, the id and the text that are kept, if it is accepted."""
    stream: bool = False
    """Whether what comes may have no end: its beginning is enough."""


@attrs.frozen
class Head:
    """The head of a request, before anything is wrong with it."""

    method: str
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    host: bytes = HOST.encode()
    token: bytes | None = b"Bearer " + TOKEN.encode()

    def with_body(self, body: bytes) -> bytes:
        """The whole request."""
        lines = [self.method.encode() + b" " + self.target + b" HTTP/1.1", b"host: " + self.host]
        if self.token is not None:
            lines.append(b"authorization: " + self.token)
        lines += [name + b": " + value for name, value in self.headers]
        lines += [b"content-length: %d" % len(body), b"", b""]
        return b"\r\n".join(lines) + body


BAD_TOKENS: Final = (
    None, b"", b"Bearer", b"Bearer ", b"Bearer " + TOKEN[:-1].encode(),
    b"Bearer " + TOKEN[:8].encode(), b"Bearer " + TOKEN.encode() + b"x", b"Basic " + TOKEN.encode(),
    b"Bearer " + TOKEN.upper().encode(), TOKEN.encode(), b"Bearer \xff\xfe", b"Bearer null",
)  # fmt: skip

BAD_HOSTS: Final = (
    b"evil.example", b"localhost.evil.example", b"127.0.0.1.evil.example", b"", b"[::1",
    b"localhost:x", b"evil@localhost", b"localhost/x", b"\xff", b"localhost, evil.example",
)  # fmt: skip

BAD_ORIGINS: Final = (
    b"null", b"https://evil.example", b"http://localhost:1", b"file://", b"\xff", b"http://",
    b"http://localhost.evil.example",
)  # fmt: skip


def sendings(batch: Batch) -> Iterator[Sending]:
    """As many as the batch is to have."""
    drawer = Drawer(batch)
    kinds: dict[Callable[[], Sending], int] = {
        drawer.message: 30, drawer.hook: 10, drawer.openai: 12, drawer.look: 14, drawer.act: 6,
        drawer.events: 5, drawer.page: 4, drawer.intruder: 8, drawer.raw: 14,
    }  # fmt: skip
    for make in batch.dice.choices(list(kinds), list(kinds.values()), k=batch.size):
        yield make()


class Drawer:
    """Makes them."""

    def __init__(self, batch: Batch) -> None:
        self.dice = batch.dice
        few = max(8, batch.size // 6)
        self._fields = endless(drawn(odd_fields, few, batch.draw_seed()), self.dice)
        self._values = endless(drawn(json_value, few, batch.draw_seed()), self.dice)
        self._names = endless(drawn(name_text, few, batch.draw_seed()), self.dice)
        self._texts = endless(drawn(odd_text, few, batch.draw_seed()), self.dice)
        self._count = 0

    def _name(self) -> str:
        """The name of a session, as it comes out of a path."""
        return next(self._names).encode("utf-8", "surrogatepass").decode("utf-8", "replace")

    def _part(self, text: str) -> bytes:
        """A text as a part of a path, percent-encoded more than needed, or less."""
        safe = self.dice.choice(("", "/", "/:@!$&'()*+,;=~"))
        return quote_from_bytes(text.encode("utf-8", "surrogatepass"), safe=safe).encode()

    def _odd_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        if self.dice.random() < 0.8:
            return ()
        text = next(self._texts).encode("utf-8", "surrogatepass")
        value = bytes(b for b in text if b >= 32 and b != 127)[:500].strip()
        names = (b"prefer", b"x-odd", b"accept", b"content-type", b"cookie", b"range", b"via")
        return ((self.dice.choice(names), value),)

    # ----- messages

    def message(self) -> Sending:
        """Nearly a message."""
        self._count += 1
        name, fields = self._name(), next(self._fields)
        table = as_table(fields)
        if table is not None:
            table = {key: value for key, value in table.items() if key != "session"}
            if isinstance(table.get("id"), str) and self.dice.random() < 0.7:
                table["id"] = f"{table['id']}{self._count}"  # mostly one that is not known yet
            fields = table
        body = as_line(fields, self.dice)
        if self.dice.random() < 0.3:
            body = broken(body, self.dice)
        allowed, kept = expected(name, body)
        target = b"/v1/sessions/" + self._part(name) + b"/messages"
        if len(target) > 8000:
            allowed = allowed | {400, 414, 431}
        data = Head("POST", target, self._odd_headers()).with_body(body)
        return Sending("message", data, allowed, kept)

    def hook(self) -> Sending:
        """A webhook, genuine or not."""
        self._count += 1
        name, body = self._name(), as_line(next(self._fields), self.dice)
        id, stamp = f"w{self._count}", str(int(time.time()))
        mark = signature(SECRET, id, stamp, body)
        headers = {"webhook-id": id, "webhook-timestamp": stamp, "webhook-signature": mark}
        forge = self.dice.choice((None, *FORGERIES))
        allowed = frozenset({202, 422, 413, 403})
        if forge is not None:
            body, allowed = FORGERIES[forge](headers, body, self.dice), frozenset({401})
        given = tuple((key.encode(), value.encode()) for key, value in headers.items())
        head = Head("POST", b"/hooks/" + self._part(name), given, token=None)
        return Sending("hook", head.with_body(body), allowed)

    # ----- the rest of the API

    def openai(self) -> Sending:
        """A request of OpenAI's API with something odd in it."""
        chat = self.dice.random() < 0.5
        text, odd = next(self._texts), next(self._values)
        fields: dict[str, Any] = {"model": "m"}
        if chat:
            fields["messages"] = [{"role": "user", "content": text}]
        else:
            fields["input"] = text
        names = (
            "messages", "input", "stream", "user", "n", "tools", "stop", "stream_options", "text",
            "conversation", "previous_response_id", "background", "temperature", "odd", "model",
        )  # fmt: skip
        if self.dice.random() < 0.8:
            fields[self.dice.choice(names)] = self.dice.choice((odd, [odd], {"id": odd}, text))
        body = as_line(fields, self.dice)
        if self.dice.random() < 0.15:
            body = broken(body, self.dice)
        target = b"/v1/chat/completions" if chat else b"/v1/responses"
        head = Head("POST", target, self._odd_headers())
        return Sending("openai", head.with_body(body), frozenset({200, 400, 404, 413, 403}))

    def look(self) -> Sending:
        """Something to look at, under an odd name."""
        name = self._part(self._name())
        target = self.dice.choice((
            b"/v1/sessions/" + name + b"/messages", b"/v1/messages/" + name, b"/v1/sessions",
            b"/v1/models/" + name, b"/v1/responses/" + name, b"/v1/" + name, b"/" + name,
            b"/v1/status", b"/v1/quarantine", b"/v1/dead-letters", b"/readyz", b"/live/" + name,
        ))  # fmt: skip
        query = b"?limit=" + self._part(next(self._texts)) if self.dice.random() < 0.3 else b""
        if self.dice.random() < 0.2:
            query = b"?before=" + self._part(self.dice.choice(("0", "-1", "9" * 30, "x", "\u0661")))
        data = Head("GET", target + query, self._odd_headers()).with_body(b"")
        allowed = frozenset({200, 303, 400, 404, 405, 414, 422, 431})
        return Sending("look", data, allowed, stream=True)

    def act(self) -> Sending:
        """Something to do, about what there is not; and methods that there are not."""
        name = self._part(self._name())
        what = self.dice.choice((b"retry", b"drop", b"nothing"))
        target = self.dice.choice((
            b"/v1/sessions/" + name + b"/stop", b"/v1/quarantine/" + name + b"/" + what,
            b"/v1/dead-letters/" + name + b"/" + what, b"/v1/responses/" + name + b"/cancel",
            b"/v1/quarantine/" + b"9" * 25 + b"/" + what, b"/sessions/" + name + b"/messages",
        ))  # fmt: skip
        method = self.dice.choice(("POST", "POST", "POST", "PUT", "DELETE", "PATCH", "TRACE"))
        data = Head(method, target, self._odd_headers()).with_body(b"")
        allowed = frozenset({200, 303, 400, 403, 404, 405, 409, 413, 414, 415, 422, 431})
        return Sending("act", data, allowed)

    def events(self) -> Sending:
        """An event stream from an odd place on."""
        name = self._part(self._name())
        place = self.dice.choice(("0", "1", "-1", "9" * 18, "9" * 40, "x", "1.5", "", "\xb2"))
        headers: tuple[tuple[bytes, bytes], ...] = ((b"last-event-id", place.encode("latin-1")),)
        target = b"/v1/sessions/" + name + b"/events"
        if self.dice.random() < 0.3:
            headers, target = (), target + b"?after=" + self._part(next(self._texts))
        data = Head("GET", target, headers).with_body(b"")
        return Sending("events", data, frozenset({200, 400, 404, 414, 422, 431}), stream=True)

    def page(self) -> Sending:
        """What a browser that is not quite itself asks of the page."""
        name = self._part(self._name())
        target = self.dice.choice((
            b"/", b"/sessions/" + name, b"/messages/" + name, b"/sessions", b"/login", b"/logout",
            b"/pause", b"/unpause", b"/sessions/" + name + b"/messages", b"/style.css",
        ))  # fmt: skip
        body = as_line(next(self._values), self.dice) if self.dice.random() < 0.5 else b""
        headers = (
            (b"accept", b"text/html"),
            (b"content-type", b"application/x-www-form-urlencoded"),
        )
        token = self.dice.choice((None, b"Bearer " + TOKEN.encode()))
        if target == b"/pause":
            token = None  # who may do so would stop everybody
        cookie = self.dice.choice((b"", b"trio_gateway=1.x", b"trio_gateway=\xff", b"=;;=", b"a"))
        method = self.dice.choice(("GET", "POST"))
        head = Head(method, target, (*headers, (b"cookie", cookie)), token=token)
        allowed = frozenset({200, 303, 400, 401, 403, 404, 405, 413, 414, 422, 429, 431})
        return Sending("page", head.with_body(body), allowed)

    # ----- who must not come in

    def intruder(self) -> Sending:
        """Without the token, under another name, or from somebody else's page."""
        self._count += 1
        target = self.dice.choice((
            b"/v1/sessions/ada/messages", b"/v1/chat/completions", b"/v1/sessions/ada/stop",
        ))  # fmt: skip
        head, allowed = Head("POST", target), WRONG
        way = self.dice.choice(("token", "host", "origin"))
        if way == "token":
            head = attrs.evolve(head, token=self.dice.choice(BAD_TOKENS))
        elif way == "host":
            head, allowed = attrs.evolve(head, host=self.dice.choice(BAD_HOSTS)), OTHER_HOST
        else:
            origin = (b"origin", self.dice.choice(BAD_ORIGINS))
            head, allowed = attrs.evolve(head, headers=(origin,)), frozenset({403})
        fields = {"id": f"intruder-{self._count}", "text": "let me in"}
        return Sending(f"intruder {way}", head.with_body(json.dumps(fields).encode()), allowed)

    # ----- what is no request

    def raw(self) -> Sending:
        """Bytes that are nearly a request, or several, or none at all."""
        good = self.dice.choice((self.message, self.look, self.hook, self.openai))().data
        way = self.dice.random()
        if way < 0.7:
            data = broken(good[:6000], self.dice)
        elif way < 0.85:
            data = self.dice.choice(NO_REQUESTS)
        else:
            data = self.dice.randbytes(self.dice.randrange(1, 400))
        return Sending("raw", data)


OTHER_HOST: Final = frozenset({400, 421})

NO_REQUESTS: Final = (
    b"\r\n" * 50, b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"GET / HTTP/1.1\r\n folded: x\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nhost: localhost\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /%zz%00 HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 20_000 + b"\r\n\r\n",
    b"GET /v1/ws HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
)  # fmt: skip


# ----- webhooks, by the standard


def signature(secret: bytes, id: str, stamp: str, body: bytes) -> str:
    """The formula, written here once more."""
    mac = hmac.new(secret, f"{id}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(mac).decode()}"


def _other_body(headers: dict[str, str], body: bytes, dice: random.Random) -> bytes:
    return body + b" "


def _other_id(headers: dict[str, str], body: bytes, dice: random.Random) -> bytes:
    headers["webhook-id"] += "x"
    return body


def _other_time(headers: dict[str, str], body: bytes, dice: random.Random) -> bytes:
    stamp = str(int(time.time()) + dice.choice((-100_000, -400, 400, 100_000)))
    headers["webhook-timestamp"] = stamp
    headers["webhook-signature"] = signature(SECRET, headers["webhook-id"], stamp, body)
    return body


def _other_secret(headers: dict[str, str], body: bytes, dice: random.Random) -> bytes:
    forged = signature(b"x" * 32, headers["webhook-id"], headers["webhook-timestamp"], body)
    headers["webhook-signature"] = forged
    return body


def _no_signature(headers: dict[str, str], body: bytes, dice: random.Random) -> bytes:
    headers["webhook-signature"] = dice.choice(("", "v1,", "v1", " ", "v2,x", "v1,====", "v1," * 9))
    return body


def _nothing(headers: dict[str, str], body: bytes, dice: random.Random) -> bytes:
    del headers[dice.choice(list(headers))]
    return body


FORGERIES: Final[Mapping[str, Callable[[dict[str, str], bytes, random.Random], bytes]]] = {
    "body": _other_body,
    "id": _other_id,
    "time": _other_time,
    "secret": _other_secret,
    "signature": _no_signature,
    "nothing": _nothing,
}


# ----- what should come of a message, by the page that describes the API


def expected(name: str, body: bytes) -> tuple[frozenset[int], tuple[str, str, str] | None]:
    """How a message may be answered; and what is kept of it, if it is accepted."""
    try:
        fields = as_table(json.loads(body.decode()))
    except (ValueError, RecursionError):
        return frozenset({422, 413}), None
    if fields is None or fields.keys() - {"id", "text", "sender"} or not name:
        return MISREAD, None
    texts = [fields.get("text"), *(fields[key] for key in ("id", "sender") if key in fields)]
    if "sender" in fields and fields["sender"] is None:
        texts.remove(None)
    if not all(isinstance(text, str) for text in texts) or any(map(_is_lone, texts)):
        return MISREAD, None
    session = name.removeprefix("http:") or name  # of this channel all the same
    keys = [session, *(fields[key] for key in ("id", "sender") if fields.get(key) is not None)]
    if not all(0 < len(key) <= LONGEST_KEY for key in keys):
        return MISREAD, None
    if len(fields["text"].encode()) > LONGEST_TEXT:
        return frozenset({413}), None
    kept = (session, fields["id"], fields["text"]) if "id" in fields else None
    return frozenset({202, 409}), kept


def _is_lone(text: Any) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
