"""The `jsonl` door: lines that are none, nearly one, or one with odd texts in it.

In this process, over real pipes, thousands of lines a life; and through the real command.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import attrs
import trio

from trio_gateway import Message, Turn
from trio_gateway.channels._fds import MAX_LINE
from trio_gateway.channels.jsonl import JsonlChannel

from ._bad_lives import PLAIN, Batch, Ears, hosted, in_virtual_time, sound, whole
from ._inputs import as_line, as_table, broken, drawn, odd_fields

CONTROL_EVERY: Final = 20
"""Every so many lines one is a healthy message, which must be answered."""

LONGEST_KEY: Final = 1024
LONGEST_TEXT: Final = 1024 * 1024
LONGEST_ERROR: Final = 2000
"""Characters: an error that is longer is not a clear one."""

PATIENCE: Final = 60.0
"""Real seconds that the command may take for a batch, on a busy machine."""

# ----- what goes in


def stream_of(batch: Batch, *, giants: bool) -> bytes:
    """A stream of lines, about as many as the batch is to have. The last may lack its newline."""
    dice = batch.dice
    drawn_fields = drawn(odd_fields, max(8, batch.size // 5), batch.draw_seed())
    lines: list[bytes] = _giants() if giants else []
    while len(lines) < batch.size:
        line = as_line(_fresh(dice.choice(drawn_fields), len(lines), dice), dice)
        lines.append(line if dice.random() < 0.35 else broken(line, dice))
        if len(lines) % CONTROL_EVERY == 0:
            lines.append(_control(len(lines)))
    lines.append(_control(len(lines)))
    end = b"" if dice.random() < 0.5 else b"\n"
    return b"\n".join(lines) + end


def _fresh(fields: Any, n: int, dice: random.Random) -> Any:
    """Mostly a new id: what is known already is not looked at any more."""
    found = as_table(fields)
    if found is not None and isinstance(found.get("id"), str) and dice.random() < 0.7:
        return {**found, "id": f"{found['id']}{n}"}
    return fields


def _control(n: int) -> bytes:
    return json.dumps({"session": "control", "id": f"control-{n}", "text": f"control {n}"}).encode()


def _giants() -> list[bytes]:
    """Lines that are too much of something, each followed by a healthy one."""
    whole_line = {"session": "big", "id": "big", "text": "x" * LONGEST_TEXT}
    many = {f"key {n}": n for n in range(20_000)}
    found = [
        b"x" * (MAX_LINE + 1),
        b"[" * MAX_LINE,
        json.dumps(whole_line).encode(),
        json.dumps({**whole_line, "id": "bigger", "text": "x" * (LONGEST_TEXT + 1)}).encode(),
        json.dumps({**whole_line, "id": "\u00e9" * 5000}).encode(),
        json.dumps(many).encode(),
        json.dumps({**whole_line, "id": "again", **many}).encode(),
    ]
    return [line for n, giant in enumerate(found) for line in (giant, _control(-1 - n))]


def lines_in(stream: bytes) -> list[bytes]:
    """The lines that a reader finds in a stream."""
    *lines, last = stream.split(b"\n")
    return [*lines, last] if last else lines


# ----- what should come of it, by the page that describes the format


def expected(data: bytes) -> tuple[str, dict[str, Any]]:
    """How a line is to be answered: accepted, refused or error; and its fields."""
    fields = _parsed(data)
    if fields is None:
        return "error", {}
    about = [fields[name] for name in ("session", "id", "sender") if fields.get(name) is not None]
    if any(_is_lone(text) for text in about):
        return "error", {}
    if not all(0 < len(text) <= LONGEST_KEY for text in about):
        return "refused", fields
    text = fields["text"]
    if _is_lone(text) or len(text.encode()) > LONGEST_TEXT:
        return "refused", fields
    return "accepted", fields


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The fields of a line that is a message by its form."""
    if len(data) > MAX_LINE:
        return None
    try:
        fields = as_table(json.loads(data.decode()))
    except (ValueError, RecursionError):
        return None
    if fields is None or not {"session", "id", "text"} <= fields.keys():
        return None
    if fields.keys() - {"session", "id", "text", "sender"}:
        return None
    texts = [fields["session"], fields["id"], fields["text"]]
    if fields.get("sender") is not None:  # it may be null, or left out
        texts.append(fields["sender"])
    return fields if all(isinstance(text, str) for text in texts) else None


def _is_lone(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


@attrs.define
class Account:
    """What a stream should lead to, and what its answers are checked against."""

    batch: Batch
    stream: bytes
    accepted: dict[str, dict[str, Any]] = attrs.field(factory=dict[str, dict[str, Any]])

    def check(self, events: Sequence[dict[str, Any]]) -> None:
        """Exactly one answer for each line, in order; exactly one reply for what was accepted."""
        lines = lines_in(self.stream)
        answers = [e for e in events if e["event"] in ("accepted", "refused", "error")]
        replies = [e for e in events if e["event"] == "reply"]
        assert len(answers) + len(replies) == len(events), (
            f"odd events: {Counter(map(str, events))}"
        )
        for number, (line, answer) in enumerate(zip(lines, answers, strict=False), 1):
            self._check_answer(number, line, answer)
        assert len(answers) == len(lines), f"{len(lines)} lines, {len(answers)} answers"
        self._check_replies(replies)

    def _check_answer(self, number: int, line: bytes, answer: dict[str, Any]) -> None:
        outcome, fields = expected(line)
        where = f"line {number}: {line[:300]!r} was answered with {str(answer)[:600]}"
        assert answer["event"] == outcome, f"{where}, not with {outcome}"
        if outcome == "error":
            assert answer["line"] == number, where
        else:
            assert (answer["session"], answer["id"]) == (fields["session"], fields["id"]), where
        if outcome != "accepted":
            assert 0 < len(answer["error"]) <= LONGEST_ERROR, where
        else:
            assert answer["duplicate"] == (fields["id"] in self.accepted), where
            self.accepted.setdefault(fields["id"], fields)
        self.batch.input("duplicate" if answer.get("duplicate") else outcome)

    def _check_replies(self, replies: Sequence[dict[str, Any]]) -> None:
        found = {reply["in_reply_to"][0]: reply for reply in replies}
        assert len(found) == len(replies), "somebody was answered twice"
        missing = self.accepted.keys() - found.keys()
        assert not missing, f"accepted and not answered: {list(missing)[:5]}"
        for id, reply in found.items():
            sent = self.accepted[id]
            right = (sent["session"], f"re: {sent['text']}", True, False)
            told = (reply["session"], reply["text"], reply["final"], reply["repeat"])
            assert told == right, f"{sent} was answered with {reply}"


# ----- in this process


def jsonl(batch: Batch) -> None:
    """Thousands of lines through one life, over two pipes."""
    stream = stream_of(batch, giants=batch.number == 0)
    account = Account(batch, stream)
    out = bytearray()
    heard: list[Message] = []
    in_virtual_time(partial(_life, batch, stream, out, heard))
    assert out.endswith(b"\n"), "the output ends within a line"
    account.check([json.loads(line) for line in bytes(out).splitlines()])
    told = {m.id: {"session": m.session, "text": m.text, "sender": m.sender} for m in heard}
    for id, sent in account.accepted.items():
        kept = {"session": sent["session"], "text": sent["text"], "sender": sent.get("sender")}
        assert told[id] == kept, f"the agent was asked {told[id]}, sent was {kept}"
    sound(batch)
    batch.seen["a last line without a newline"] += not stream.endswith(b"\n")
    batch.seen["a line longer than any is read"] += batch.number == 0


async def _life(batch: Batch, stream: bytes, out: bytearray, heard: list[Message]) -> None:
    async def agent(turn: Turn) -> str:
        heard.append(turn.message)
        return f"re: {turn.text}"

    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_feed, batch, write_in, stream)
            nursery.start_soon(_drink, read_out, out)
            channel = JsonlChannel(read_in, write_out)
            ears = Ears()
            async with hosted(batch, agent, channel, settings=PLAIN, ears=ears) as gateway:
                await gateway.wait_input_ended()
                await whole(batch, gateway)
            # The pipe is as long as a reader is quick; what is in it is read before the end.
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    finally:
        for fd in (read_in, read_out, write_out):
            os.close(fd)


async def _feed(batch: Batch, fd: int, stream: bytes) -> None:
    """Write in pieces of any size: lines are cut anywhere."""
    os.set_blocking(fd, False)
    left = memoryview(stream)
    try:
        while left:
            await trio.lowlevel.wait_writable(fd)
            size = batch.dice.choice((7, 500, 4096, 60_000))
            with suppress(BlockingIOError):
                left = left[os.write(fd, left[:size]) :]
    finally:
        os.close(fd)


async def _drink(fd: int, out: bytearray) -> None:
    os.set_blocking(fd, False)
    while True:
        await trio.lowlevel.wait_readable(fd)
        with suppress(BlockingIOError):
            out += os.read(fd, 1 << 16)


# ----- through the real command

_AGENT: Final = """
async def agent(turn):
    return f"re: {turn.text}"
"""

_CONFIG: Final = """
[chat]
commands = false
[limits]
open_per_session = 1000000
[log]
format = "json"
"""


def process(batch: Batch) -> None:
    """Lines through `trio-gateway run --jsonl`: it answers each, and leaves in order."""
    stream = stream_of(batch, giants=False)
    (batch.folder / "bot.py").write_text(_AGENT)
    (batch.folder / "gateway.toml").write_text(_CONFIG)
    code, out, err = _talk(batch, stream)
    assert code == 0, f"exit code {code}\n{err[-3000:]}"
    assert "Traceback" not in err, err[-3000:]
    for line in err.splitlines():
        json.loads(line)  # whatever was sent, a line of the log is one
    Account(batch, stream).check([json.loads(line) for line in out.splitlines()])
    sound(batch)
    batch.seen["the real command"] += 1


def _talk(batch: Batch, stream: bytes) -> tuple[int, bytes, str]:
    errors = batch.folder / "stderr.txt"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trio_gateway", "run", "bot.py:agent", "--jsonl"],
            cwd=batch.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    try:
        out = _exchange(process, stream)
        code = process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
    return code, out, errors.read_text(errors="replace")


def _exchange(process: subprocess.Popen[bytes], stream: bytes) -> bytes:
    """Write all of it and close; read all of the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    into, out = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(into, False)
    left, heard = memoryview(stream), bytearray()
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline, f"no end within {PATIENCE} s, {len(left)} bytes unread"
        readable, writable, _ = select.select([out], [into] if left else [], [], 1.0)
        if writable:
            left = left[os.write(into, left[:4096]) :]
            if not left:
                process.stdin.close()
        if readable:
            some = os.read(out, 1 << 16)
            heard += some
            if not some:
                return bytes(heard)
