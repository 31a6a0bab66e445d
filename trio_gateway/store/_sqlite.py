"""The store in one SQLite file, through apsw."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, TypeVarTuple, cast

import apsw
import trio

from .._clock import Clock, SystemClock
from .._errors import (
    GatewayError,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreIOError,
    StoreSchemaError,
)
from .._markers import ResumeReason
from .._messages import Cursor, Delivery, HistoryItem, Message, Reply, SessionKey
from ._codec import BadRow
from ._database import SENSELESS, Database, open_database, select, translate
from ._ledger import Ledger
from ._lock import StoreLock, open_private
from ._reads import OpenTurnRow, StoreReader
from ._records import (
    Admitted,
    Arrival,
    Begin,
    Begun,
    Draft,
    Forgotten,
    NewReply,
    OpenTurn,
    PendingTurn,
    Recovered,
    Said,
    Settled,
    Settlement,
    Taken,
    WaitingSession,
)
from ._sql import read_sql
from ._writer import InlineWriter, Meter, Tap, ThreadWriter, Writer, no_meter, no_tap

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

APPLICATION_ID: Final = 0x74726977  # "triw"
SCHEMA_VERSION: Final = 3
MIGRATIONS: Final[dict[int, str]] = {1: "migrate_1.sql", 2: "migrate_2.sql"}
"""From which version, the file that leads to the next one."""

OLDEST_SQLITE: Final = (3, 51, 3)
"""Before this, two connections can corrupt a WAL while it is reset."""

BUSY_MS: Final = 5000


class SqliteStore:
    """The store of one running gateway. Made by `open_store`; the contract is `Store`.

    The busiest verbs hand the writer's own coroutine out instead of awaiting it in one of theirs:
    each layer of coroutine is alive as long as its commit, thousands of times over.
    """

    def __init__(self, path: Path, writer: Writer, ledger: Ledger, reader: StoreReader) -> None:
        self.path = path
        self._writer = writer
        self._ledger = ledger
        self._reader = reader
        self._read_lock = trio.Lock()
        # Not Trio's own: agents that sit in all of its threads may wait for what is read here.
        self._read_limit = trio.CapacityLimiter(1)
        self._reads_inline = isinstance(writer, InlineWriter)
        self._closed = False
        self._run = writer.run
        # For what has happened outside already: a cancelled caller is no reason not to write it.
        self._run_always = writer.run_always

    @property
    def store_id(self) -> str:
        return self._ledger.store_id

    async def _read(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        async with self._read_lock:
            if self._closed:
                raise StoreClosed("the store is closed")
            try:
                if self._reads_inline:
                    return call(*args)
                # Shielded by not being abandoned: the connection has one user at a time.
                return await trio.to_thread.run_sync(call, *args, limiter=self._read_limit)
            except (apsw.Error, *SENSELESS) as error:
                if isinstance(error, GatewayError):
                    raise
                raise translate(error) from error

    # ----- boot and end

    async def recover(self, pulled: frozenset[str] = frozenset()) -> Recovered:
        try:
            return await self._run(self._ledger.recover, pulled)
        except StoreError as error:
            raise _named(self.path, error) from error

    async def touch(self) -> None:
        await self._writer.run_abandonable(self._ledger.touch)

    async def end_epoch(self, ending: str) -> None:
        await self._writer.run_abandonable(self._ledger.end_epoch, ending)

    async def aclose(self) -> None:
        """Finish every write that was handed in, write the WAL back, close."""
        if self._closed:
            return
        self._closed = True
        async with self._read_lock:
            self._reader.close()
        await self._writer.aclose()

    # ----- inbox

    def accept(
        self, arrivals: Sequence[Arrival], cursor: Cursor | None = None
    ) -> Coroutine[Any, Any, tuple[Admitted, ...]]:
        return self._run(self._ledger.accept, arrivals, cursor)

    async def cursor(self, channel: str) -> str | None:
        return await self._run(self._ledger.get_cursor, channel)

    async def stop_by_key(self, key: SessionKey) -> tuple[int | None, tuple[str, ...]]:
        return await self._run(self._ledger.stop_by_key, key)

    # ----- turns

    def begin(self, request: Begin) -> Coroutine[Any, Any, Begun]:
        return self._run(self._ledger.begin, request)

    async def resume(self, pending: PendingTurn) -> OpenTurn | None:
        return await self._run(self._ledger.resume, pending)

    def settle(self, end: Settlement) -> Coroutine[Any, Any, Settled]:
        return self._run_always(self._ledger.settle, end)

    async def end_pending(self, ends: Sequence[Settlement]) -> tuple[Settled, ...]:
        return await self._run(self._ledger.end_pending, ends)

    async def mark_resume_pending(self, reason: ResumeReason) -> int:
        return await self._writer.run_abandonable(self._ledger.mark_resume_pending, reason)

    def mark_resume_pending_from_thread(self, reason: ResumeReason, timeout: float) -> int | None:
        return self._writer.run_from_thread(
            self._ledger.mark_resume_pending, reason, timeout=timeout
        )

    async def clear_resume_pending(self, ends: Sequence[Settlement]) -> tuple[Settled, ...]:
        return await self._writer.run_abandonable(self._ledger.clear_resume_pending, ends)

    async def ask_restart(self, turn: int) -> None:
        await self._run(self._ledger.ask_restart, turn)

    async def take(self, turn: int, attempt: int, request: Begin) -> Taken:
        return await self._run(self._ledger.take, turn, attempt, request)

    # ----- steps and replies

    async def begin_step(self, turn: int, attempt: int, name: str, effect: str) -> bool:
        return await self._run(self._ledger.begin_step, turn, attempt, name, effect)

    def remember(
        self, turn: int, attempt: int, name: str, effect: str, result: str, began_at: int
    ) -> Coroutine[Any, Any, bool]:
        return self._run_always(
            self._ledger.remember, turn, attempt, name, effect, result, began_at
        )

    async def checkpoint(self, turn: int, attempt: int, value: str) -> bool:
        return await self._run(self._ledger.checkpoint, turn, attempt, value)

    def say(
        self, turn: int, attempt: int, session: SessionKey, session_id: int, reply: NewReply
    ) -> Coroutine[Any, Any, Said | None]:
        return self._run(self._ledger.say, turn, attempt, session, session_id, reply)

    async def notify(
        self, sessions: Sequence[tuple[SessionKey, int]], what: str, text: str
    ) -> tuple[Delivery, ...]:
        return await self._writer.run_abandonable(self._ledger.notify, sessions, what, text)

    async def note_drafts(self, drafts: Sequence[Draft]) -> None:
        await self._run(self._ledger.note_drafts, drafts)

    # ----- outbox

    def sending(self, delivery: int) -> Coroutine[Any, Any, None]:
        return self._run(self._ledger.sending, delivery)

    def delivered(self, arrivals: Sequence[tuple[int, int]]) -> Coroutine[Any, Any, None]:
        return self._run_always(self._ledger.delivered, arrivals)

    async def delayed(
        self, delivery: int, tries: int, not_before: int, error: str, repeat: bool
    ) -> None:
        await self._run(self._ledger.delayed, delivery, tries, not_before, error, repeat)

    async def dead(self, delivery: int, tries: int, error: str) -> None:
        await self._run(self._ledger.dead, delivery, tries, error)

    async def drop(self, delivery: int, error: str) -> None:
        await self._run(self._ledger.drop, delivery, error)

    # ----- retention

    async def forget(self, after_seq: int, keep: int, remember: int) -> Forgotten:
        return await self._run(self._ledger.forget, after_seq, keep, remember)

    # ----- reads

    async def history(
        self, session: SessionKey, turn: int | None, limit: int
    ) -> tuple[HistoryItem, ...]:
        return await self._read(self._reader.history, session, turn, limit)

    async def replies_to(
        self, channel: str, message_id: str
    ) -> tuple[str | None, tuple[Reply, ...]]:
        return await self._read(self._reader.replies_to, channel, message_id)

    async def messages_of(self, pending: PendingTurn) -> tuple[Message, ...]:
        return await self._run(self._ledger.messages_of, pending)

    async def open_turns(self) -> tuple[OpenTurnRow, ...]:
        return await self._read(self._reader.open_turns)

    async def inspect(self, question: Callable[[StoreReader], T]) -> T:
        return await self._read(question, self._reader)

    # ----- what an operator does

    async def requeue_quarantined(self, turn: int) -> WaitingSession | None:
        return await self._run(self._ledger.requeue_quarantined, turn)

    async def drop_quarantined(self, turn: int) -> tuple[str, ...]:
        return await self._run(self._ledger.drop_quarantined, turn)

    async def resend_dead(self, delivery: int) -> Delivery | None:
        return await self._run(self._ledger.resend_dead, delivery)

    async def drop_dead(self, delivery: int) -> bool:
        return await self._run(self._ledger.drop_dead, delivery)


@asynccontextmanager
async def open_store(
    path: str | os.PathLike[str],
    *,
    clock: Clock | None = None,
    inline: bool = False,
    tap: Tap = no_tap,
    meter: Meter = no_meter,
) -> AsyncGenerator[SqliteStore, None]:
    """Open the store at `path`, or make it; leaving the block closes it.

    Raises `StoreInUse` (another process has it), `StoreCorrupt`, `StoreSchemaError`,
    `StoreIOError`; in each case the file was not changed. `inline` runs writes in the loop instead
    of on a thread. `tap` is called around every commit (see `testing.CrashPoints`), `meter` after
    every commit, with how many operations it had and how many seconds it took.
    """
    where = Path(path).absolute()  # noqa: ASYNC240 - pure, but for the current folder
    clock = clock or SystemClock()
    with lock_store(where):
        if inline:
            db = connect(where, clock)
        else:
            db = await trio.to_thread.run_sync(connect, where, clock)
        ledger = _ledger_of(where, db, clock)
        try:
            reader = StoreReader(open_read_only(where))
        except BaseException:
            _let_go(db)
            raise
        made = InlineWriter if inline else ThreadWriter
        writer = made(db, ledger, tap, meter)
        store = SqliteStore(where, writer, ledger, reader)
        try:
            yield store
        finally:
            # Bounded by the host's budget: what a disk does not finish by then is left to the
            # watchdog, and nothing that was acknowledged is at stake.
            with trio.CancelScope(shield=True):
                await store.aclose()


class lock_store:
    """Hold the store's lock for a `with` block."""

    def __init__(self, path: Path) -> None:
        self._lock = StoreLock(path)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def connect(path: Path, clock: Clock) -> Database:
    """The writing connection: the file private, the library new enough, the pragmas asserted."""
    require_sqlite()
    os.close(open_private(path))
    try:
        version = _look_before(path)
        db = open_database(path, write=True)
        try:
            _configure(db)
            _bring_schema(db, version, clock)
            _check_schema(db)
        except BaseException:
            _let_go(db)
            raise
    except (apsw.Error, *SENSELESS, StoreError) as error:
        raise _named(path, error) from error
    _keep_private(path)
    return db


def _let_go(db: Database) -> None:
    """Close a connection that was not used, and leave the file and its WAL as they are."""
    with suppress(apsw.Error):
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        db.close()


def require_sqlite() -> None:
    """Refuse a SQLite that can corrupt a WAL. Raises `StoreError`."""
    if tuple(map(int, apsw.sqlite_lib_version().split("."))) < OLDEST_SQLITE:
        raise StoreError(
            f"SQLite {apsw.sqlite_lib_version()} is too old (3.51.3 fixed a corruption of the"
            " WAL): install a current apsw wheel"
        )


def open_read_only(path: Path) -> Database:
    """A connection that cannot write, and so never checkpoints. Raises `StoreError`."""
    try:
        db = open_database(path, write=False)
        db.set_busy_timeout(BUSY_MS)
        db.execute("PRAGMA trusted_schema = OFF")
        list(db.execute("SELECT count(*) FROM sqlite_schema"))
    except (apsw.Error, *SENSELESS) as error:
        raise _named(path, error) from error
    return db


def read_store(path: str | os.PathLike[str]) -> StoreReader:
    """Read a store, also one that a gateway has open.

    Raises `StoreIOError` where there is none, `StoreSchemaError`, `StoreCorrupt`.
    """
    where = Path(path).absolute()
    if not where.exists():
        raise StoreIOError(f"{where}: there is no store; name one with --store")
    require_sqlite()
    db = open_read_only(where)
    try:
        version = _version(where, db)
        if version != SCHEMA_VERSION:
            raise StoreSchemaError(_other_version(where, version))
    except (apsw.Error, *SENSELESS, StoreError) as error:
        db.close()
        raise _named(where, error) from error
    return StoreReader(db)


def edit_store(path: str | os.PathLike[str], change: Callable[[Ledger], T]) -> T:
    """Run one change of a store that no gateway has open, in a transaction.

    Raises `StoreInUse`, naming the pid, and the errors of `read_store`.
    """
    where = Path(path).absolute()
    if not where.exists():
        raise StoreIOError(f"{where}: there is no store; name one with --store")
    with lock_store(where):
        clock = SystemClock()
        db = connect(where, clock)
        ledger = _ledger_of(where, db, clock)
        writer = InlineWriter(db, ledger)
        try:
            return writer.run_sync(change, ledger)
        except StoreError as error:
            raise _named(where, error) from error
        finally:
            writer.close()


def _look_before(path: Path) -> int:
    """The schema version of what is there, found without changing it; 0 for a new file."""
    if path.stat().st_size == 0 and not path.with_name(path.name + "-wal").exists():
        return 0
    try:
        return _look(path, write=False)
    except apsw.ReadOnlyError:
        # Its maker died while making it. That is rolled back by whoever may write, and only then
        # can be read.
        return _look(path, write=True)


def _look(path: Path, *, write: bool) -> int:
    db = open_database(path, write=write)
    try:
        db.set_busy_timeout(BUSY_MS)
        version = _version(path, db)
        if version and _pragma(db, "journal_mode") != "wal":
            _check_pages(db)
        return version
    finally:
        db.close()


def _check_pages(db: Database) -> None:
    """Look at every page of a file that is about to become a WAL database (a copy that was made by
    other means): that writes to it, and whoever refuses a damaged one has not changed it."""
    found = [str(row[0]) for row in select(db, "PRAGMA quick_check(1)")]
    if found != ["ok"]:
        raise StoreCorrupt("; ".join(found).replace("\n", " "))


def _version(path: Path, db: Database) -> int:
    version = int(_pragma(db, "user_version"))
    ((tables,),) = list(db.execute("SELECT count(*) FROM sqlite_schema"))
    if not tables and not version:
        return 0
    if int(_pragma(db, "application_id")) != APPLICATION_ID:
        raise StoreSchemaError("this is the database of another program; name another store")
    if version > SCHEMA_VERSION:
        raise StoreSchemaError(_other_version(path, version))
    if version < 1:
        raise StoreSchemaError(f"it has tables, and schema version {version}, which there is not")
    return version


def _other_version(path: Path, version: int) -> str:
    if version > SCHEMA_VERSION:
        return (
            f"{path} has schema version {version}, this trio-gateway knows {SCHEMA_VERSION}:"
            " install the newer trio-gateway that wrote it. The file was not changed."
        )
    return (
        f"{path} has schema version {version}, older than {SCHEMA_VERSION}: a gateway migrates it"
        " when it opens it (trio-gateway run)"
    )


def _configure(db: Database) -> None:
    db.set_busy_timeout(BUSY_MS)
    db.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 1)
    wanted = {
        "journal_mode": "wal",
        # NORMAL loses acknowledged markers when the power goes.
        "synchronous": 2,
        "trusted_schema": 0,
        # The writer checkpoints, when nobody waits.
        "wal_autocheckpoint": 0,
        "cache_size": -4_000,
        "temp_store": 2,
    }
    for name, value in wanted.items():
        # To the end: only there is a switch to WAL committed, or not. Else it would look like one,
        # and the store would live without.
        list(db.execute(f"PRAGMA {name} = {value}"))
        if str(_pragma(db, name)) != str(value):
            raise StoreError(f"PRAGMA {name} did not become {value}: the file system cannot do it")


def _pragma(db: Database, name: str) -> Any:
    ((value,),) = list(db.execute(f"PRAGMA {name}"))
    return value


@cache
def _schema() -> Mapping[str, frozenset[str]]:
    """Every table and index of the schema, and its columns."""
    with closing(cast("Database", apsw.Connection(":memory:"))) as db:
        db.execute(read_sql("schema.sql"))
        return _tables(db)


def _tables(db: Database) -> Mapping[str, frozenset[str]]:
    found = select(
        db,
        "SELECT made.name, group_concat(field.name, ' ') FROM sqlite_schema AS made"
        " LEFT JOIN pragma_table_info(made.name) AS field"
        " WHERE made.name NOT LIKE 'sqlite_%' AND made.type IN ('table', 'index')"
        " GROUP BY made.name",
    )
    return {str(name): frozenset(str(columns or "").split()) for name, columns in found}


def _check_schema(db: Database) -> None:
    """Whoever changed the tables by hand learns of it now, and not from one turn after the other.
    What is there besides is nobody's business, unless it changes rows by itself."""
    there = _tables(db)
    for name, columns in _schema().items():
        if name not in there:
            raise StoreSchemaError(f"it lacks {name}, which schema version {SCHEMA_VERSION} has")
        if lacking := sorted(columns - there[name]):
            raise StoreSchemaError(f"its {name} lacks {', '.join(lacking)}")
    ours = _our_triggers()
    theirs = _triggers(db)
    for name in theirs:
        if theirs[name] != ours.get(name):
            raise StoreSchemaError(
                f"it has a trigger, {name}: drop it, it would change turns by itself"
            )
    for name in ours.keys() - theirs.keys():
        raise StoreSchemaError(f"it lacks {name}, which schema version {SCHEMA_VERSION} has")


@cache
def _our_triggers() -> Mapping[str, str]:
    with closing(cast("Database", apsw.Connection(":memory:"))) as db:
        db.execute(read_sql("schema.sql"))
        return _triggers(db)


def _triggers(db: Database) -> Mapping[str, str]:
    """Every trigger, and its text."""
    found = select(db, "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
    return {str(name): str(sql) for name, sql in found}


def _bring_schema(db: Database, version: int, clock: Clock) -> None:
    """Create the schema, or migrate it from an older version, in one transaction."""
    if version == SCHEMA_VERSION:
        return
    # Not apsw's own `with`: after a failed commit it complains that there is nothing to roll back,
    # and not of the disk. Whoever calls closes the connection, and what was not committed goes.
    db.execute("BEGIN IMMEDIATE")
    if version == 0:
        db.execute(read_sql("schema.sql"))
        db.execute(
            "INSERT INTO store (id, created_at) VALUES (?, ?)",
            (secrets.token_hex(4), clock.now().wall),
        )
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    else:
        for old in range(version, SCHEMA_VERSION):
            db.execute(read_sql(MIGRATIONS[old]))
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


def _keep_private(path: Path) -> None:
    # SQLite gives the WAL and the SHM the database's own permissions; older ones may differ.
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).chmod(0o600)


def _ledger_of(path: Path, db: Database, clock: Clock) -> Ledger:
    # Until we have written ourselves: whoever refuses a file leaves it, and its WAL, alone.
    db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    try:
        return Ledger(db, clock)
    except (apsw.Error, BadRow) as error:
        _let_go(db)
        raise _named(path, error) from error


def _damaged(path: Path, error: Exception) -> StoreCorrupt:
    return StoreCorrupt(
        f"{path} is damaged or no database ({error}). It was not changed: move it away and"
        " restore a copy, or name another store with --store"
    )


def _named(path: Path, error: Exception) -> StoreError:
    """The same as an error of ours that names the file."""
    translated = translate(error)
    if isinstance(translated, StoreCorrupt) or isinstance(error, BadRow):
        return _damaged(path, error)
    if not isinstance(translated, StoreError):
        return StoreError(f"{path}: {error}")
    told = str(translated)
    return type(translated)(told if told.startswith(str(path)) else f"{path}: {told}")
