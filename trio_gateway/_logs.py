"""Logs, made from the stream of events, on their way to standard error.

The listener only puts the event into a bounded queue; a thread of its own renders and writes. So
a standard error that nobody reads (a full pipe, a stopped terminal) blocks that thread and nothing
else: the queue fills, records are dropped, and how many is told once there is room again.

What may be in a record: the texts of messages and replies at debug level only; the value of no
environment variable whose name sounds secret; no control character, so that nobody who writes a
message can write a log line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeAlias, cast

import attrs

from ._clock import SystemClock, as_datetime
from ._config import LogFormat, LogLevel
from ._errors import escape
from ._events import Event, TurnSettled
from ._markers import TurnState
from ._messages import SessionKey

QUEUE: Final = 10_000
"""Records that wait for standard error; what comes on top is dropped, and counted."""

FLUSH_AT_END: Final = 1.0
"""Seconds that the end waits for a standard error that nobody reads."""

SLOW_START: Final = 5.0
"""Seconds that the end waits, before that, for a log that has not got as far as its beginning."""

STDERR: Final = 2

RECENT: Final = 200
"""Records that are kept for whoever begins to follow."""

_BATCH: Final = 64 * 1024
_TEXTS: Final = frozenset({"text"})  # the fields in which people and agents speak
_RANK: Final = {level: rank for rank, level in enumerate(LogLevel)}

Fields: TypeAlias = dict[str, Any]
_Record: TypeAlias = MutableMapping[str, Any]
_Processor: TypeAlias = Callable[[Any, str, _Record], Any]


# ----- an event becomes a flat record


def event_name(event: Event) -> str:
    """`TurnSettled` is told as `turn_settled`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()


_BAD_ENDS: Final = {
    TurnState.FAILED: LogLevel.ERROR,
    TurnState.QUARANTINED: LogLevel.ERROR,
    TurnState.EXPIRED: LogLevel.WARNING,
}


def event_level(event: Event) -> LogLevel:
    """The level at which an event is told. A turn that failed is an error."""
    if isinstance(event, TurnSettled):
        return _BAD_ENDS.get(event.state, LogLevel(event.level))
    return LogLevel(event.level)


def event_fields(event: Event, *, texts: bool) -> Fields:
    """The fields of an event, flat: strings, numbers, truths and lists. Texts only if asked for."""
    told: Fields = {}
    for field in attrs.fields(type(event)):
        told.update(_flat(field.name, getattr(event, field.name)))
    return told if texts else {name: told[name] for name in told if name not in _TEXTS}


def _flat(name: str, value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[object, object]", value).items():
            yield from _flat(f"{name}_{key}", inner)
    elif attrs.has(kind := cast("type[attrs.AttrsInstance]", type(value))) and (
        not isinstance(value, SessionKey)
    ):
        # A delivery's own fields tell which one it is; only its `id` needs the name before it.
        for field in attrs.fields(kind):
            inner_name = f"{name}_id" if field.name == "id" else field.name
            yield from _flat(inner_name, getattr(value, field.name))
    elif value is not None:
        yield name, _plain(value)


def _plain(value: object) -> Any:
    if isinstance(value, datetime):
        return _utc(value)
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(one) for one in cast("Iterable[object]", value)]
    return str(value)


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


# ----- what must not be in a line

_SECRET_NAME: Final = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET: Final = 8


def secrets_in(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values of variables whose names sound secret, longest first."""
    found = {
        value
        for name, value in environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name)
    }
    return tuple(sorted(found, key=len, reverse=True))


def redact(value: Any, secrets: Iterable[str]) -> Any:
    """`value` with every secret replaced by `[secret]`, also inside lists."""
    if isinstance(value, list):
        return [redact(one, secrets) for one in cast("list[object]", value)]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "[secret]")
    return value


# ----- a record becomes a line, through a chain of structlog's processors


class Renderer:
    """Makes lines of records. No format: JSON, made by nothing that has to be imported first."""

    def __init__(self, log_format: LogFormat | None, *, colors: bool = False) -> None:
        self._secrets: tuple[str, ...] = ()
        self._chain: list[_Processor] = [self._redacted]
        if log_format is None:
            self._chain.append(_plain_json)
        elif log_format is LogFormat.CONSOLE:
            self._chain += _console_chain(colors)
        else:
            self._chain += _json_chain()
        self.look_for_secrets()

    def look_for_secrets(self) -> None:
        """Read the environment again: an agent may have loaded secrets after the log began."""
        self._secrets = secrets_in(os.environ)

    def line(self, record: Fields) -> str:
        """One record (with timestamp, level and event) as text that ends with a line end."""
        told: Any = dict(record)
        for processor in self._chain:
            told = processor(None, record["level"], told)
        return f"{told}\n"

    def _redacted(self, _: Any, __: str, record: _Record) -> _Record:
        return {name: redact(value, self._secrets) for name, value in record.items()}


def _plain_json(_: Any, __: str, record: _Record) -> str:
    return json.dumps(dict(record), default=repr)


def _json_chain() -> list[_Processor]:
    from structlog.processors import JSONRenderer

    # ASCII only: every control character, separator and lone surrogate becomes an escape.
    return [JSONRenderer(ensure_ascii=True)]


def _console_chain(colors: bool) -> list[_Processor]:
    from structlog.dev import ConsoleRenderer

    render = ConsoleRenderer(0, colors=colors, sort_keys=False)  # no padding

    def with_traceback(logger: Any, name: str, record: _Record) -> str:
        lines = str(record.pop("traceback", "")).splitlines()
        line = render(logger, name, _for_people(record))
        # The bar tells a line of a traceback from a line of the log, whatever it says.
        return "\n".join([str(line), *(f"    | {escape(one)}" for one in lines)])

    return [with_traceback]


class _Written:
    """A value as it is to be written; structlog would quote a string once more."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _for_people(record: _Record) -> Fields:
    moment = datetime.fromisoformat(record["timestamp"]).astimezone()
    told: Fields = {name: _Written(_quoted(value)) for name, value in record.items()}
    return told | {
        "timestamp": moment.strftime("%H:%M:%S"),
        "level": record["level"],
        "event": escape(record["event"]),
    }


def _quoted(value: object) -> str:
    """A value written so that nobody can pass off its text as another field."""
    if isinstance(value, list):
        return ",".join(_quoted(one) for one in cast("list[object]", value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return str(value)
    if value and not re.search(r'[\s="\\,]', value) and escape(value) == value:
        return value
    return '"' + escape(value.replace("\\", "\\\\").replace('"', '\\"')) + '"'


# ----- a line goes to standard error


@attrs.frozen
class Told:
    """What is to be written. The fields are made by whoever writes; events do not change."""

    at: int
    level: LogLevel
    event: str
    fields: Callable[[], Fields]

    def record(self) -> Fields:
        head = {"timestamp": _utc(as_datetime(self.at)), "level": str(self.level)}
        return {**head, "event": self.event, **self.fields()}


class Follower(Protocol):
    """Who follows a log, beside standard error."""

    level: LogLevel

    def hear(self, told: Told) -> None:
        """Take a record; in any thread, also in a signal handler, without waiting."""
        ...


class Log:
    """Where a gateway's log goes. Every method but `flush` returns at once, in any thread, also
    in a signal handler. Made by `logging_to_stderr`."""

    def __init__(self, level: LogLevel, make_renderer: Callable[[], Renderer], fd: int) -> None:
        self._rank = self._lowest = _RANK[level]
        self._followers: tuple[Follower, ...] = ()
        self._recent: deque[Told] = deque(maxlen=RECENT)
        self._make_renderer = make_renderer
        self._fd = fd
        self._clock = SystemClock()
        # SimpleQueue is reentrant: a signal handler may log while it is being filled.
        self._queue: SimpleQueue[Told | threading.Event] = SimpleQueue()
        # Only ever counted up; the writing thread tells by how much.
        self._dropped = 0
        self._told_dropped = 0
        # What the writing thread itself could not write.
        self._lost = 0
        self._renderer: Renderer | None = None
        self._ready = threading.Event()
        self._ending = threading.Event()
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def listener(self, event: Event) -> None:
        """Tell an event; for `Gateway.listen`."""
        level = event_level(event)
        if _RANK[level] >= self._lowest:
            texts = level is LogLevel.DEBUG
            self._put(level, event_name(event), lambda: event_fields(event, texts=texts))

    def say(self, level: str, event: str, **fields: object) -> None:
        """Tell what is no event of the gateway. `level` is one of `LogLevel`'s."""
        told = LogLevel(level)
        if _RANK[told] >= self._lowest:
            self._put(told, event, lambda: _flat_all(fields))

    def flush(self, timeout: float = FLUSH_AT_END) -> bool:
        """Wait at most `timeout` seconds until all that was told is written; say whether it is."""
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout)

    def close(self, timeout: float = FLUSH_AT_END) -> bool:
        """Flush, and end the writing thread. What is told afterwards is not written."""
        # On a slow disk the first import can take longer than a flush may; it is not stuck.
        self._ready.wait(SLOW_START)
        self._queue.put(self._ending)
        return self._ending.wait(timeout)

    def _put(self, level: LogLevel, event: str, fields: Callable[[], Fields]) -> None:
        told, rank = Told(self._clock.now().wall, level, event, fields), _RANK[level]
        for follower in self._followers:
            if rank >= _RANK[follower.level]:
                follower.hear(told)
        if rank < self._rank:
            return
        self._recent.append(told)
        if self._queue.qsize() >= QUEUE:
            self._dropped += 1
        else:
            self._queue.put(told)

    # ----- for whoever follows

    def use_level(self, level: LogLevel) -> None:
        """Write from this level on."""
        self._rank = _RANK[level]
        self._find_lowest()

    def recent(self) -> tuple[Told, ...]:
        """What was told last, oldest first."""
        return tuple(self._recent)

    @contextmanager
    def follow(self, follower: Follower) -> Generator[None]:
        """Tell `follower` too while the block lasts, from its own level on."""
        self._followers = (*self._followers, follower)
        self._find_lowest()
        try:
            yield
        finally:
            self._followers = tuple(one for one in self._followers if one is not follower)
            self._find_lowest()

    def _find_lowest(self) -> None:
        ranks = (_RANK[follower.level] for follower in self._followers)
        self._lowest = min((self._rank, *ranks))

    # ----- the writing thread

    def _write_all(self) -> None:
        output = _Output(self._fd)
        self._best_renderer()
        flushed: threading.Event | None = None
        while flushed is not self._ending:
            try:
                flushed = self._write_next(output)
            except Exception:
                # No memory, say. What was in hand is lost, the log is not.
                self._lost += 1

    def _write_next(self, output: _Output) -> threading.Event | None:
        """Wait for something to write, and write it; who waited for that, if anybody."""
        first = self._queue.get()
        renderer = self._best_renderer()
        text, flushed = self._collect(first, renderer)
        dropped, lost = self._dropped, self._lost
        if count := dropped - self._told_dropped + lost:
            text = self._drops(renderer, count) + text
        if output.write(text):
            self._told_dropped = dropped
            self._lost -= lost
        else:
            self._lost += text.count("\n") - bool(count)
        if flushed is not None:
            flushed.set()
        return flushed

    def _best_renderer(self) -> Renderer:
        """structlog is slow to import; nobody has to wait for it here. Where it cannot be imported,
        for want of a descriptor or of memory, what there is to tell is told without it."""
        if self._renderer is None:
            try:
                self._renderer = self._make_renderer()
            except Exception:
                return Renderer(None)
            finally:
                self._ready.set()
        return self._renderer

    def _collect(
        self, item: Told | threading.Event, renderer: Renderer
    ) -> tuple[str, threading.Event | None]:
        """The lines that wait, up to a batch or to somebody who waits for them."""
        renderer.look_for_secrets()
        lines: list[str] = []
        size = 0
        while isinstance(item, Told):
            lines.append(render(renderer, item))
            size += len(lines[-1])
            if size >= _BATCH or self._queue.empty():
                return "".join(lines), None
            item = self._queue.get()
        return "".join(lines), item

    def _drops(self, renderer: Renderer, count: int) -> str:
        fields: Fields = {"count": count}
        told = Told(self._clock.now().wall, LogLevel.WARNING, "log_dropped", lambda: fields)
        return render(renderer, told)


def _flat_all(fields: Mapping[str, object]) -> Fields:
    return {name: told for key in fields for name, told in _flat(key, fields[key])}


def render(renderer: Renderer, told: Told) -> str:
    """One record as a line, also one that cannot be written as it is."""
    try:
        return renderer.line(told.record())
    except Exception as error:
        # A record that cannot be written must not end the log.
        fields: Fields = {"about": told.event, "error": f"{type(error).__name__}: {error}"}
        unreadable = Told(told.at, LogLevel.ERROR, "log_record_unreadable", lambda: fields)
        return renderer.line(unreadable.record())


_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""A file has no room; it may have some again."""


class _Output:
    """A file descriptor that may block, be full, or be gone."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._gone = False
        self._cut = False
        # Where somebody talks to the gateway, a prompt may stand there: on a row of its own.
        prompts = os.isatty(fd) and os.environ.get("TERM", "dumb") != "dumb"
        self._clear = "\r\x1b[J" if prompts else ""

    def write(self, text: str) -> bool:
        """Write all of it; wait for room in a pipe; do nothing once nobody can read it any more.
        False: a disk had no room for it."""
        begin = "\n" if self._cut else self._clear
        data = whole = memoryview((begin + text).encode("utf-8", "backslashreplace"))
        while data and not self._gone:
            try:
                data = data[self._write_some(data) :]
            except OSError as error:
                if error.errno in _FULL:
                    # In the middle of a line, perhaps: the next one begins on a row of its own.
                    self._cut = self._cut or len(data) < len(whole)
                    return False
                self._gone = True
        self._cut = False
        return True

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            select.select([], [self._fd], [])
            return 0


@contextmanager
def logging_to_stderr(
    level: LogLevel, log_format: LogFormat, *, fd: int = STDERR
) -> Generator[Log]:
    """Yield a `Log` that writes to standard error; the end of the block flushes it, bounded."""
    terminal = os.isatty(fd)
    if log_format is LogFormat.AUTO:
        log_format = LogFormat.CONSOLE if terminal else LogFormat.JSON
    colors = terminal and not os.environ.get("NO_COLOR")
    log = Log(level, lambda: Renderer(log_format, colors=colors), fd)
    try:
        yield log
    finally:
        log.close()
