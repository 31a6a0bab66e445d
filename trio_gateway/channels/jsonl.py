"""`jsonl`: one JSON object per line on standard input and output, for other programs.

The format is a contract:

    in   {"session": "a", "id": "m1", "text": "hi", "sender": "u1"}       sender may be left out
    out  {"event":"accepted","session","id","duplicate":bool}
         {"event":"refused","session","id","error"}
         {"event":"reply","session","key","in_reply_to":["m1"],"text","attempt":1,
          "final":bool,"repeat":bool}
         {"event":"progress","session","text"}
         {"event":"error","line":n,"error"}

`accepted` is said after the commit. `final` is true on the reply with which a turn settles, also
an apology. `repeat` is true where the same `key` may have been written before. `error` is about a
line of input that could not be read as a message, or could not be stored; send it again.

The end of the input is not the end: what was accepted is answered first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, cast

import orjson
import trio

from .._errors import GatewayError, InvalidInput, StoreError
from .._messages import Delivery, Intake, Message, Receipt, ReceiptStatus
from . import Channel
from ._fds import FdWriter, Line, LineReader, serve_lines

_NEEDED: Final = ("session", "id", "text")
_OPTIONAL: Final = ("sender",)

_SHOWN: Final = 5
"""Unknown fields that an error names: a line can have a million of them."""


class JsonlChannel(Channel):
    """JSON lines over two file descriptors, standard input and output unless told otherwise."""

    name = "jsonl"
    idempotent = False
    notices = False

    def __init__(self, read_fd: int = 0, write_fd: int = 1) -> None:
        self._reader = LineReader(read_fd)
        self._writer = FdWriter(write_fd)

    async def serve(self, intake: Intake, *, task_status: trio.TaskStatus[None]) -> None:
        """Take lines in until the input ends. Raises `ChannelEnded` when the output is closed."""
        task_status.started()

        async def take(lines: tuple[Line, ...]) -> None:
            await self._writer.write(b"".join(await _take_in(lines, intake, self.name)))

        await serve_lines(self._reader, self._writer, take)

    async def send(self, delivery: Delivery) -> None:
        """Write one reply. Raises `ChannelEnded` when the output is closed."""
        await self._writer.write(
            _dump(
                {
                    "event": "reply",
                    "session": delivery.session.name,
                    "key": delivery.key,
                    "in_reply_to": list(delivery.in_reply_to),
                    "text": delivery.text,
                    "attempt": delivery.attempt,
                    "final": delivery.final,
                    "repeat": delivery.repeat,
                }
            )
        )

    def progress(self, session: str, text: str) -> None:
        """Write what a turn is doing, unless the reader is behind; then it is dropped."""
        if text:
            self._writer.write_nowait(
                _dump({"event": "progress", "session": session, "text": text})
            )


async def _take_in(lines: Sequence[Line], intake: Intake, channel: str) -> list[bytes]:
    """Hand in what is acceptable among `lines`, together; return what there is to say, in order."""
    read = [_read_line(line, channel) for line in lines]
    messages = [message for message in read if isinstance(message, Message)]
    answers = iter(await _accept(messages, intake) if messages else ())
    return [
        _answer(line, next(answers)) if isinstance(result, Message) else _bad(line, result, intake)
        for line, result in zip(lines, read, strict=True)
    ]


async def _accept(messages: Sequence[Message], intake: Intake) -> Sequence[Receipt | GatewayError]:
    """Hand in together what came together. What the store will never take (a damaged row of one
    session) must not keep its neighbours out: then one by one."""
    try:
        return await intake.accept(*messages)
    except GatewayError as error:
        if len(messages) == 1 or (isinstance(error, StoreError) and error.retryable):
            return [error] * len(messages)
    return [answer for message in messages for answer in await _accept([message], intake)]


def _answer(line: Line, answer: Receipt | GatewayError) -> bytes:
    if isinstance(answer, GatewayError):
        return _error(line, f"not accepted, send it again: {answer}")
    return _receipt(answer)


def _receipt(receipt: Receipt) -> bytes:
    about = {"session": receipt.session.name, "id": receipt.id}
    if not receipt.accepted:
        return _dump({"event": "refused", **about, "error": receipt.reason or "refused"})
    duplicate = receipt.status is ReceiptStatus.DUPLICATE
    return _dump({"event": "accepted", **about, "duplicate": duplicate})


def _bad(line: Line, error: str, intake: Intake) -> bytes:
    intake.refused_input(f"line {line.number}", error)
    return _error(line, error)


def _error(line: Line, error: str) -> bytes:
    return _dump({"event": "error", "line": line.number, "error": error})


# ----- one line in


def _read_line(line: Line, channel: str) -> Message | str:
    """The message on a line, or what is wrong with it, in words for whoever wrote it."""
    try:
        return _message(_load(line), channel)
    except InvalidInput as error:
        return str(error)


def _load(line: Line) -> dict[str, Any]:
    if line.data is None:
        raise InvalidInput(f"the line is too long: {line.size} bytes")
    try:
        value = json.loads(line.data.decode())
    except UnicodeDecodeError as error:
        raise InvalidInput(f"not UTF-8: byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise InvalidInput(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError) as error:
        raise InvalidInput(f"not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInput('expected an object such as {"session": "a", "id": "m1", "text": "hi"}')
    return cast("dict[str, Any]", value)


def _message(fields: dict[str, Any], channel: str) -> Message:
    if missing := [name for name in _NEEDED if name not in fields]:
        raise InvalidInput(f"missing: {', '.join(missing)}")
    if extra := [name for name in fields if name not in (*_NEEDED, *_OPTIONAL)]:
        more = f" and {len(extra) - _SHOWN} more" if len(extra) > _SHOWN else ""
        raise InvalidInput(f"unknown: {', '.join(map(_shown, extra[:_SHOWN]))}{more}")
    return Message(
        session=_string(fields, "session"),
        id=_string(fields, "id"),
        # Whether a text with a lone surrogate is taken is the inbox's business: whoever sent it
        # learns of it by its id. A session or an id with one could not even be named.
        text=_typed(fields, "text"),
        sender=None if fields.get("sender") is None else _string(fields, "sender"),
        channel=channel,
    )


def _typed(fields: dict[str, Any], name: str) -> str:
    value = fields[name]
    if isinstance(value, str):
        return value
    raise InvalidInput(f"{name}: expected a string, got {_JSON_TYPES[type(value)]}")


def _string(fields: dict[str, Any], name: str) -> str:
    value = _typed(fields, name)
    if _representable(value) != value:
        raise InvalidInput(f"{name}: not Unicode text (a lone surrogate)")
    return value


_JSON_TYPES: Final = {
    dict: "an object",
    list: "an array",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _shown(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:39] + "…")


# ----- one line out


def _dump(event: dict[str, Any]) -> bytes:
    """One line of UTF-8. JSON escapes newlines and NUL, so an event never spans lines."""
    try:
        return orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        clean = {k: _representable(v) if isinstance(v, str) else v for k, v in event.items()}
        return orjson.dumps(clean, option=orjson.OPT_APPEND_NEWLINE)


def _representable(text: str) -> str:
    """`text` with what has no place in UTF-8 (lone surrogates) replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
