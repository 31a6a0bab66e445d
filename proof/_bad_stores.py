"""A store with something of everything in it, to be damaged; what a gateway makes of it undamaged;
and a look at whatever is left of it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import apsw
import attrs
import trio

from trio_gateway import (
    Delivery,
    Gateway,
    GatewayError,
    Message,
    ResumeReason,
    RetryLater,
    Settings,
    Turn,
    Undeliverable,
    _commands,
    open_gateway,
)
from trio_gateway._policy import DeliveryRules, ResumeRules
from trio_gateway.testing import MemoryChannel, VirtualClock

from ._bad_lives import (
    ROOM,
    Batch,
    clear,
    command,
    hosted,
    in_memory,
    in_virtual_time,
    ours,
    rows,
)

Files = dict[str, bytes]
"""The files of a store, by name; one that is missing is not there."""

DB: Final = "gateway.db"
WAL: Final = "gateway.db-wal"
SHM: Final = "gateway.db-shm"
TABLES: Final = (
    "store", "epoch", "cursor", "session", "message", "turn", "attempt", "step", "delivery",
)  # fmt: skip

SESSIONS_HERE: Final = ("local", "chat")
"""The channels that its gateways have."""

LONG_ENOUGH: Final = 26 * 3600.0
"""Virtual seconds after which everything that can still happen in the store has happened: a
delivery waits a day at the most, whatever stands in its row."""

# ----- a store with something of everything in it

SETTINGS: Final = Settings(
    limits=ROOM,
    grace=1.0,
    budget=10.0,
    delivery=DeliveryRules(max_tries=2, timeout=30.0),
    resume=ResumeRules(within=None, max_interruptions=2),
)

RUNNING: Final = ("steps", "queue", "put-aside")
"""Sessions whose turns do not end in the lives in which the store is made."""


class Platform(MemoryChannel):
    """Some destinations take nothing, ask to wait, or hang."""

    def __init__(self, *, making: bool) -> None:
        super().__init__("chat", idempotent=False, text_limit=40)
        self._making = making

    async def send(self, delivery: Delivery) -> None:
        """See `Channel.send`."""
        name = delivery.session.name
        if self._making and name == "dead":
            raise Undeliverable("gone")
        if self._making and name == "later":
            raise RetryLater(600.0)
        if self._making and name == "sending":
            await trio.sleep_forever()
        await super().send(delivery)


def agent_of(*, making: bool) -> Callable[[Turn], Any]:
    async def step(n: int) -> int:
        await trio.lowlevel.checkpoint()
        return n

    async def hang() -> None:
        await trio.sleep_forever()

    async def agent(turn: Turn) -> str:
        name = turn.session.name
        if name == "failed":
            raise ValueError("no")
        if name == "steps":
            await turn.say("on it, and it will take a moment, or two, or three")
            await turn.step(step, 1, effect="safe")
            await turn.step(step, 2, effect="unsafe")
            await turn.checkpoint({"n": turn.attempt})
            if making:
                await turn.step(hang, effect="unsafe")
        if making and name in RUNNING:
            await trio.sleep_forever()
        return f"re: {turn.text}, which is a longer text than fits into one"

    return agent


SESSIONS: Final = tuple(
    f"{channel}:{name}"
    for channel in SESSIONS_HERE
    for name in ("new", "done", "failed", *RUNNING, "dead", "later", "sending")
    if channel == "chat" or name not in ("dead", "later", "sending")
)
"""The sessions of it, as `channel:name`; and one that is new."""


@cache
def stores() -> Mapping[str, Files]:
    """The files of such a store: `killed` in mid-life, with all of it in the WAL, and some of it;
    and `stopped` in order. The same in every process, but for what SQLite itself draws."""
    with (
        tempfile.TemporaryDirectory(dir=in_memory()) as folder,
        mock.patch("secrets.token_hex", return_value="5eed5eed"),
        mock.patch("os.getpid", return_value=4242),
    ):
        made: dict[str, Files] = {}
        in_virtual_time(partial(_make, Path(folder), made))
        return made


async def _make(folder: Path, made: dict[str, Files]) -> None:
    clock = VirtualClock()
    opened: dict[str, Any] = {"store": folder / DB, "settings": SETTINGS, "clock": clock}
    for life in range(3):
        platform = Platform(making=True)
        async with open_gateway(
            agent_of(making=True), channels=[platform], inline_store=True, **opened
        ) as gateway:
            await platform.wait_ready()
            await _fill(gateway, platform, life)
            await trio.sleep(10 + life)
            if life == 1:
                made["all in the WAL"] = read_files(folder)
            if life == 2:
                made["killed"] = read_files(folder)
            gateway.request_stop(ResumeReason.RESTART, now=True)
    made["stopped"] = read_files(folder)


async def _fill(gateway: Gateway, platform: Platform, life: int) -> None:
    ids = _Ids(life)
    for name in ("done", "queue") if life else ("done", "failed", *RUNNING):
        for text in ("one", "two \u00e9\U0001f600"):
            await gateway.accept(Message(session=name, id=ids.next(), text=text, sender="ada"))
            await platform.receive(name, ids.next(), text)
        await trio.sleep(1)
    for name in ("dead", "later", "sending") if life else ():
        await platform.receive(name, ids.next(), "hi")
        await platform.receive(name, ids.next(), "hi again")
    await platform.receive_all(
        platform.message("done", ids.next(), "/status"),
        platform.message("done", ids.next(), "/new"),
        cursor=f"offset {life}",
    )


@attrs.define
class _Ids:
    life: int
    n: int = 0

    def next(self) -> str:
        self.n += 1
        return f"m{self.life}-{self.n}"


def read_files(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in (DB, WAL) if (folder / name).exists()}


def write_files(folder: Path, files: Files) -> None:
    """Put the files of a store into a folder, and nothing else."""
    clear(folder)
    for name, data in files.items():
        (folder / name).write_bytes(data)


# ----- the truth: what becomes of a store that is whole


@attrs.frozen
class Truth:
    """Each message's session and end, after an undamaged boot."""

    ends: Mapping[tuple[str, str], tuple[str, str]]
    """(channel, id): session, state."""
    content: Mapping[str, frozenset[tuple[Any, ...]]]
    head: tuple[Any, ...]


@cache
def truth(kind: str) -> Truth:
    """What a boot makes of the undamaged store."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        batch = Batch("truth", 0, 1, 0, Path(folder))
        write_files(batch.folder, stores()[kind])
        content, head = content_of(batch.store), head_of(batch.store)
        in_virtual_time(partial(_plain_life, batch))
        ends = ends_in(batch.store)
    assert ends, "the store is empty"
    assert all(state not in ("queued", "running") for _, state in ends.values()), ends
    return Truth(ends, content, head)


async def _plain_life(batch: Batch) -> None:
    async with hosted(
        batch, agent_of(making=False), Platform(making=False), settings=SETTINGS
    ) as g:
        await g.wait_idle()


def ends_in(store: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """How each message stands; where a text is none, it is read as far as it can be."""
    found = rows(
        store,
        "SELECT CAST(message.channel AS BLOB), CAST(message.id AS BLOB), CAST(name AS BLOB),"
        " CAST(state AS BLOB) FROM message LEFT JOIN session ON session.id = message.session",
    )
    told = [[(b"" if cell is None else cell).decode(errors="replace") for cell in row]
            for row in found]  # fmt: skip
    return {(channel, id): (name, state) for channel, id, name, state in told}


def head_of(store: Path) -> tuple[Any, ...]:
    """What the file says of itself."""
    head = store.read_bytes()[:100]
    with closing(connection(store)) as db:
        names = ("user_version", "application_id", "encoding", "schema_version")
        tables = frozenset(db.execute("SELECT type, name, CAST(sql AS BLOB) FROM sqlite_schema"))
        return (head[18:20], tables, *(list(db.execute(f"PRAGMA {name}")) for name in names))


def content_of(store: Path) -> dict[str, frozenset[tuple[Any, ...]]]:
    """Every row of every table, with texts as bytes."""
    with closing(connection(store)) as db:
        return {table: frozenset(db.execute(f"SELECT {_all_columns(db, table)} FROM {table}"))
                for table in TABLES}  # fmt: skip


def connection(store: Path) -> Any:
    return apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READWRITE)


def columns_of(db: Any, table: str) -> list[tuple[str, str]]:
    """Name and type of each column."""
    return [(row[1], row[2]) for row in db.execute(f"PRAGMA table_info({table})")]


def _all_columns(db: Any, table: str) -> str:
    return ", ".join(
        f"CAST({name} AS BLOB)" if kind == "TEXT" else name for name, kind in columns_of(db, table)
    )


# ----- a look


def look(batch: Batch) -> None:
    """The commands show what can be shown, or say what is wrong: each of them, and one of them as
    it is given in a shell."""
    dice, store = batch.dice, batch.store
    ids = [f"m{life}-{n}" for life in range(3) for n in range(1, 20)]
    calls: tuple[Callable[[bool], object], ...] = (
        lambda json: _commands.sessions_list(json=json, store=store),
        lambda json: _commands.sessions_show(dice.choice(SESSIONS), json=json, store=store),
        lambda json: _commands.explain(dice.choice(ids), json=json, store=store),
        lambda json: _commands.explain(dice.choice(ids), json=json, store=store),
        lambda json: _commands.quarantine_list(json=json, store=store),
        lambda json: _commands.letters_list(json=json, store=store),
    )
    for call in calls:
        _say_or_refuse(batch, partial(call, dice.random() < 0.5))
    words = dice.choice((("doctor",), ("doctor", "--json"), ("sessions", "list")))
    command(batch, *words, "--store", str(store), codes=(0, 1))


def _say_or_refuse(batch: Batch, call: Callable[[], object]) -> None:
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            call()
    except GatewayError as error:
        batch.error(ours(error))
    else:
        told = out.getvalue()
        assert told, "a command had nothing to say"
        assert "\x1b" not in told, f"what stands in a row commands the terminal: {told!r:.500}"
    batch.figures["looks"] += 1
