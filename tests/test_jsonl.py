"""The `jsonl` channel, over real pipes, sockets and files, with an inbox that only takes notes."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from trio_gateway._errors import ChannelEnded, StoreCorrupt, StoreFull
from trio_gateway._messages import (
    Delivery,
    HistoryItem,
    Message,
    Receipt,
    ReceiptStatus,
    ReplyKind,
    SessionKey,
)
from trio_gateway._policy import Limits, malformed
from trio_gateway.channels import Channel
from trio_gateway.channels._fds import FdWriter, LineReader, keep_standard_fds
from trio_gateway.channels.jsonl import JsonlChannel


class NotingIntake:
    """An inbox that keeps what it was given in memory, and judges it as the real one does."""

    def __init__(self, history: tuple[HistoryItem, ...] = ()) -> None:
        self.batches: list[tuple[Message, ...]] = []
        self.refused: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.arrived = trio.Event()
        self._history = history

    @property
    def messages(self) -> list[Message]:
        return [message for batch in self.batches for message in batch]

    async def accept(self, *messages: Message, cursor: str | None = None) -> tuple[Receipt, ...]:
        await trio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        known = {message.id for message in self.messages}
        self.batches.append(messages)
        self.arrived.set()
        return tuple(self._judge(message, known) for message in messages)

    def _judge(self, message: Message, known: set[str]) -> Receipt:
        refusal = malformed(message, Limits())
        status = ReceiptStatus.DUPLICATE if message.id in known else ReceiptStatus.ACCEPTED
        return Receipt(
            status=ReceiptStatus.REFUSED if refusal else status,
            session=message.key,
            id=message.id,
            reason=refusal.reason if refusal else None,
        )

    async def cursor(self) -> str | None:
        await trio.lowlevel.checkpoint()
        return None

    async def history(self, session: str, limit: int) -> tuple[HistoryItem, ...]:
        await trio.lowlevel.checkpoint()
        return self._history[-limit:]

    def refused_input(self, where: str, error: str) -> None:
        self.refused.append((where, error))


@attrs.frozen
class Ends:
    """The far ends of a channel's input and output."""

    into: int
    out: int
    channel: JsonlChannel

    def put(self, *values: object) -> None:
        os.write(self.into, b"".join(_line(value) for value in values))

    def events(self) -> list[dict[str, Any]]:
        """What was written so far, parsed."""
        os.set_blocking(self.out, False)
        data = b""
        with suppress(BlockingIOError):
            while some := os.read(self.out, 1 << 20):
                data += some
        assert not data or data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]


def _line(value: object) -> bytes:
    return (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"


def message(n: int, **fields: Any) -> dict[str, Any]:
    return {"session": "a", "id": f"m{n}", "text": "hi"} | fields


def delivery(text: str = "hello", **fields: Any) -> Delivery:
    made = Delivery(
        id=1,
        session=SessionKey("jsonl", "a"),
        key="k1",
        text=text,
        in_reply_to=("m1",),
        attempt=1,
        final=True,
        repeat=False,
        kind=ReplyKind.ANSWER,
    )
    return attrs.evolve(made, **fields)


@contextmanager
def piped() -> Generator[Ends]:
    """A channel over two pipes. `into` may be closed by the test, to end the input."""
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    try:
        yield Ends(write_in, read_out, JsonlChannel(read_in, write_out))
    finally:
        for fd in (read_in, write_in, read_out, write_out):
            with suppress(OSError):
                os.close(fd)


async def serve_all(ends: Ends, intake: NotingIntake) -> list[dict[str, Any]]:
    """Serve until the input, which is closed here, has ended; return the events."""
    os.close(ends.into)
    await serve(ends.channel, intake)
    return ends.events()


async def serve(channel: Channel, intake: NotingIntake) -> None:
    async with trio.open_nursery() as nursery:

        async def started(task_status: trio.TaskStatus[None]) -> None:
            await channel.serve(intake, task_status=task_status)

        await nursery.start(started)


class PoisonedIntake(NotingIntake):
    """Whose store cannot take the messages of one session, ever."""

    async def accept(self, *messages: Message, cursor: str | None = None) -> tuple[Receipt, ...]:
        if any(message.session == "damaged" for message in messages):
            raise StoreCorrupt("the database is damaged")
        return await super().accept(*messages, cursor=cursor)


async def test_p14_what_the_store_will_never_take_does_not_keep_its_neighbours_out() -> None:
    intake = PoisonedIntake()
    with piped() as ends:
        ends.put(message(1), message(2, session="damaged"), b"no message", message(3))
        events = await serve_all(ends, intake)
    assert [event["event"] for event in events] == ["accepted", "error", "error", "accepted"]
    assert "not accepted, send it again: the database is damaged" in events[1]["error"]
    assert [event.get("line") for event in events] == [None, 2, 3, None]
    assert [one.id for one in intake.messages] == ["m1", "m3"]


# ----- the contract


async def test_lines_become_messages_and_are_acknowledged_in_one_batch() -> None:
    intake = NotingIntake()
    with piped() as ends:
        ends.put(message(1), message(2, sender="u1", text="é\x00\n"), message(1))
        events = await serve_all(ends, intake)
    assert intake.batches[0][:2] == (
        Message(session="a", id="m1", text="hi", channel="jsonl"),
        Message(session="a", id="m2", text="é\x00\n", sender="u1", channel="jsonl"),
    )
    assert len(intake.batches) == 1
    assert events[0] == {"event": "accepted", "session": "a", "id": "m1", "duplicate": False}
    assert list(events[0]) == ["event", "session", "id", "duplicate"]
    assert [event["id"] for event in events] == ["m1", "m2", "m1"]


async def test_a_duplicate_says_so() -> None:
    intake = NotingIntake()
    with piped() as ends:
        intake.batches.append((Message(session="a", id="m1", text="hi", channel="jsonl"),))
        ends.put(message(1))
        assert [event["duplicate"] for event in await serve_all(ends, intake)] == [True]


async def test_a_reply_has_exactly_the_fields_of_the_contract() -> None:
    with piped() as ends:
        await ends.channel.send(delivery("a\nb\x00c\u2028"))
        data = os.read(ends.out, 65536)
    assert data.count(b"\n") == 1
    assert list(json.loads(data).items()) == [
        ("event", "reply"),
        ("session", "a"),
        ("key", "k1"),
        ("in_reply_to", ["m1"]),
        ("text", "a\nb\x00c\u2028"),
        ("attempt", 1),
        ("final", True),
        ("repeat", False),
    ]


async def test_output_is_valid_utf8_whatever_an_agent_says() -> None:
    with piped() as ends:
        await ends.channel.send(delivery("broken \ud800 pair \U0001f600"))
        ends.channel.progress("a", "broken \udfff")
        ends.channel.progress("a", "")
        events = ends.events()
    assert events[0]["text"] == "broken \ufffd pair \U0001f600"
    assert events[1] == {"event": "progress", "session": "a", "text": "broken \ufffd"}
    assert len(events) == 2, "the end of a progress is no event"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"hello", "not JSON: Expecting value at character 1"),
        (b"", "not JSON: Expecting value at character 1"),
        (b'{"session": "a", "id": "m1", "text": "hi"', "not JSON"),
        (b"\xff\xfe", "not UTF-8: byte 1 of the line"),
        (b"[" * 100_000, "not readable JSON"),
        (b"1" * 10_000, "not readable JSON"),
        (b"null", "expected an object"),
        (b"[]", "expected an object"),
        ({"id": "m1"}, "missing: session, text"),
        (message(1, urgent=True), "unknown: 'urgent'"),
        (message(1, text=None), "text: expected a string, got null"),
        (message(1, text=["x"]), "text: expected a string, got an array"),
        (message(1, id=7), "id: expected a string, got a number"),
        (message(1, session=True), "session: expected a string, got true or false"),
        (message(1, sender={}), "sender: expected a string, got an object"),
        (message(1, id="\ud800"), "id: not Unicode text (a lone surrogate)"),
    ],
)
async def test_p14_a_bad_line_costs_one_error(line: object, error: str) -> None:
    intake = NotingIntake()
    with piped() as ends:
        written = trio.Event()

        async def put() -> None:
            data = _line(message(1)) + _line(line) + _line(message(2))
            await trio.to_thread.run_sync(os.write, ends.into, data)
            os.close(ends.into)
            written.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            await serve(ends.channel, intake)
            await written.wait()
        events = ends.events()
    assert [event["event"] for event in events] == ["accepted", "error", "accepted"]
    assert list(events[1]) == ["event", "line", "error"]
    assert events[1]["line"] == 2
    assert events[1]["error"].startswith(error)
    assert intake.refused == [("line 2", events[1]["error"])]


async def test_c38_a_text_that_is_not_unicode_is_refused_by_its_id() -> None:
    with piped() as ends:
        ends.put(message(1, text="\ud800"))
        (event,) = await serve_all(ends, NotingIntake())
    assert list(event) == ["event", "session", "id", "error"]
    assert event["event"] == "refused"
    assert "lone surrogate" in event["error"]


async def test_a_null_sender_is_no_sender() -> None:
    intake = NotingIntake()
    with piped() as ends:
        ends.put(message(1, sender=None))
        await serve_all(ends, intake)
    assert intake.messages[0].sender is None


async def test_p12_what_could_not_be_stored_is_not_acknowledged() -> None:
    intake = NotingIntake()
    intake.error = StoreFull("the disk is full")
    with piped() as ends:
        ends.put(message(1), b"x")
        events = await serve_all(ends, intake)
    assert events[0] == {
        "event": "error",
        "line": 1,
        "error": "not accepted, send it again: the disk is full",
    }
    assert events[1]["line"] == 2
    assert len(intake.refused) == 1, "only the second line is the sender's fault"


async def test_a_last_line_without_a_newline_counts() -> None:
    intake = NotingIntake()
    with piped() as ends:
        os.write(ends.into, _line(message(1)).rstrip())
        await serve_all(ends, intake)
    assert [m.id for m in intake.messages] == ["m1"]


async def test_lines_are_put_together_from_pieces() -> None:
    intake = NotingIntake()
    with piped() as ends:
        data = _line(message(1)) + _line(message(2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, ends.channel, intake)
            for byte in data:
                os.write(ends.into, bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert [m.id for m in intake.messages] == ["m1", "m2"]


# ----- the descriptors


async def test_a_line_that_is_too_long_is_skipped_and_the_next_one_read() -> None:
    read_fd, write_fd = os.pipe()
    reader = LineReader(read_fd, max_line=10)
    os.write(write_fd, b"x" * 30 + b"\nshort\n" + b"y" * 11)
    os.close(write_fd)
    lines = [*await reader.receive(), *await reader.receive()]
    os.close(read_fd)
    assert [(line.number, line.data, line.size) for line in lines] == [
        (1, None, 30),
        (2, b"short", 5),
        (3, None, 11),
    ]
    assert await reader.receive() == ()


async def test_ten_megabytes_in_one_line() -> None:
    intake = NotingIntake()
    text = "x" * 10_000_000
    with piped() as ends:

        async def put() -> None:
            line = _line(message(1, text=text))
            await trio.to_thread.run_sync(_write_all, ends.into, line)
            os.close(ends.into)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put)
            await serve(ends.channel, intake)
        (event,) = ends.events()
    assert event["event"] == "refused"
    assert "10000000 bytes, at most 1048576" in event["error"]


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


async def test_input_may_be_a_regular_file_and_output_too(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"".join(_line(message(n)) for n in range(5000)))
    intake = NotingIntake()
    with source.open("rb") as read_from, target.open("wb") as write_to:
        await serve(JsonlChannel(read_from.fileno(), write_to.fileno()), intake)
    assert [m.id for m in intake.messages] == [f"m{n}" for n in range(5000)]
    assert len(target.read_bytes().splitlines()) == 5000


async def test_input_from_dev_null_ends_at_once() -> None:
    nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
    await serve(JsonlChannel(nothing, out), NotingIntake())
    os.close(nothing)
    os.close(out)


async def test_input_from_a_directory_is_a_clear_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(ChannelEnded, match="the input cannot be read: Is a directory"):
            await LineReader(fd).receive()
    finally:
        os.close(fd)


async def test_one_socket_can_be_both_input_and_output() -> None:
    intake = NotingIntake()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(_line(message(1)))
        theirs.shutdown(socket.SHUT_WR)
        channel = JsonlChannel(ours.fileno(), ours.fileno())
        await serve(channel, intake)
        await channel.send(delivery())
        assert [json.loads(line)["event"] for line in theirs.recv(65536).splitlines()] == [
            "accepted",
            "reply",
        ]
        assert ours.gettimeout() is None
        assert os.get_blocking(ours.fileno()), "the flag belongs to whoever shares the socket"


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
async def test_p11_a_reader_that_stops_reading_does_not_block_the_loop(kind: str) -> None:
    far, near = _pair(kind)
    try:
        writer = FdWriter(near)
        big = b"x" * 300_000 + b"\n"
        beats = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, big)
            with trio.move_on_after(0.3):
                while True:
                    await trio.sleep(0.01)
                    beats += 1
            assert beats > 10, "the loop stood still"
            assert not writer.write_nowait(b"progress\n"), "there is no room: dropped"
            assert os.get_blocking(near)
            received = await trio.to_thread.run_sync(_read_exactly, far, len(big))
        assert received.replace(b"\r", b"")[: len(big)] == big[: len(received)]
    finally:
        os.close(far)
        os.close(near)


def _pair(kind: str) -> tuple[int, int]:
    """The reading and the writing end."""
    if kind == "pipe":
        return os.pipe()
    if kind == "terminal":
        return os.openpty()
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def _read_exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(fd, 1 << 20)
    return data


async def test_p14_without_a_descriptor_left_nobody_watches_the_reader_and_all_else_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_more() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    far, near = os.pipe()
    writer = FdWriter(near)
    monkeypatch.setattr("select.epoll", no_more)
    with trio.move_on_after(0.05) as scope:
        await writer.wait_closed()
    assert scope.cancelled_caught
    await writer.write(b"all the same\n")
    assert os.read(far, 100) == b"all the same\n"
    os.close(far)
    os.close(near)


async def test_lines_never_mix_and_a_cancelled_one_is_finished_by_the_next() -> None:
    far, near = os.pipe()
    writer = FdWriter(near)
    try:
        first, second, third = (letter * 100_000 + b"\n" for letter in (b"a", b"b", b"c"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, first)
            nursery.start_soon(writer.write, second)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, third)
            data = await trio.to_thread.run_sync(_read_exactly, far, len(first) + len(third))
        lines = data.splitlines(keepends=True)
        # One of the two had begun, and is whole; the other had not, and is not there at all.
        assert lines[0] in (first, second)
        assert lines[1:] == [third]
    finally:
        os.close(far)
        os.close(near)


async def test_a_closed_output_ends_the_channel() -> None:
    with piped() as ends:
        os.close(ends.out)
        with pytest.raises(ChannelEnded, match="standard output is closed"):
            await ends.channel.send(delivery())
        ends.channel.progress("a", "nobody hears this")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's epoll tells")
@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
async def test_a_reader_that_leaves_is_noticed_without_writing(kind: str) -> None:
    far, near = _pair(kind)
    read_in, write_in = os.pipe()
    left = trio.Event()

    async def expect_end() -> None:
        with pytest.raises(ChannelEnded):
            await channel.serve(NotingIntake(), task_status=trio.TASK_STATUS_IGNORED)
        left.set()

    try:
        channel = JsonlChannel(read_in, near)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_end)
            await trio.testing.wait_all_tasks_blocked()
            assert not left.is_set()
            os.close(far)
            with trio.fail_after(2):
                await left.wait()
    finally:
        for fd in (near, read_in, write_in):
            os.close(fd)


async def test_every_cancellation_of_serve_leaves_the_input_readable() -> None:
    intake = NotingIntake()
    with piped() as ends:
        for n in range(20):
            with trio.move_on_after(0.001):
                await ends.channel.serve(intake, task_status=trio.TASK_STATUS_IGNORED)
            ends.put(message(n))
        await serve_all(ends, intake)
    assert [m.id for m in intake.messages] == [f"m{n}" for n in range(20)]


def test_closed_standard_descriptors_are_occupied() -> None:
    """In a child, where fds 0 and 1 can really be closed."""
    script = (
        "import os; from trio_gateway.channels._fds import keep_standard_fds\n"
        "os.close(0); os.close(1); keep_standard_fds()\n"
        "assert os.read(0, 1) == b''\n"
        "try: os.write(1, b'x')\n"
        "except OSError: os._exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=30)
    assert done.returncode == 7
    keep_standard_fds()  # with all three there, it does nothing
    with tempfile.TemporaryFile() as file:
        assert file.fileno() > 2
