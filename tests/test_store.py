"""The SQLite store: group commit, order, files, locks, versions, damage, statements, retention."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import attrs
import pytest
import trio
import trio.lowlevel
from helpers import rows

from trio_gateway import (
    Clock,
    Cursor,
    Instant,
    Message,
    ReceiptStatus,
    ReplyKind,
    ResumeReason,
    SessionKey,
    StoreBusy,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreInUse,
    StoreIOError,
    StoreSchemaError,
    SystemClock,
    TurnState,
    open_gateway,
)
from trio_gateway.store import (
    Admitted,
    Arrival,
    Begin,
    NewReply,
    OpenTurn,
    Settlement,
    SqliteStore,
    _sqlite,
    edit_store,
    holder_of,
    open_store,
    read_store,
)
from trio_gateway.store._sql import parse_queries, query, read_sql
from trio_gateway.store._sqlite import SCHEMA_VERSION, connect, open_read_only
from trio_gateway.testing import Life, World, check_invariants, die, live

PATIENCE = 10.0
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


def arrival(session: str, id: str, text: str = "hi", *, begin: bool = False) -> Arrival:
    message = Message(session=session, id=id, text=text)
    return Arrival(message, message.key, begin=begin)


async def accept(store: SqliteStore, session: str, id: str, *, begin: bool = False) -> Admitted:
    (admitted,) = await store.accept([arrival(session, id, begin=begin)])
    return admitted


async def begin(store: SqliteStore, session: str, id: str) -> OpenTurn:
    """A turn, begun with a message."""
    turn = (await accept(store, session, id, begin=True)).turn
    assert turn is not None
    return turn


def end_of(
    turn: OpenTurn, state: TurnState = TurnState.COMPLETED, text: str = "done"
) -> Settlement:
    kind = ReplyKind.ANSWER if state is TurnState.COMPLETED else ReplyKind.APOLOGY
    reply = NewReply(0, kind, (text,), True, tuple(m.id for m in turn.messages))
    return Settlement(turn.id, turn.attempt, turn.session, turn.session_id, state, reply)


class Gate:
    """A tap that can hold a commit up, and counts them."""

    def __init__(self) -> None:
        self.commits = 0
        self._open = threading.Event()
        self._open.set()
        self._held = threading.Event()

    def __call__(self, moment: str) -> None:
        if moment == "before":
            self.commits += 1
            self._held.set()
            assert self._open.wait(PATIENCE), "the gate was never opened"

    @contextmanager
    def shut(self) -> Generator[None]:
        """No commit passes while the block lasts."""
        self._held.clear()
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def wait_held(self) -> None:
        """Wait until a commit is being held up."""
        assert await trio.to_thread.run_sync(self._held.wait, PATIENCE)


@asynccontextmanager
async def opened(path: Path, gate: Gate | None = None) -> AsyncGenerator[SqliteStore]:
    """The store, in a new epoch."""
    async with open_store(path, tap=gate or Gate()) as store:
        await store.recover()
        yield store


# ----- group commit


async def test_operations_that_wait_together_share_one_transaction(path: Path) -> None:
    gate = Gate()
    async with opened(path, gate) as store:
        before = gate.commits
        async with trio.open_nursery() as nursery:
            with gate.shut():
                nursery.start_soon(accept, store, "first", "m0")
                await gate.wait_held()
                for number in range(1, 51):
                    nursery.start_soon(accept, store, f"s{number}", f"m{number}")
                await trio.testing.wait_all_tasks_blocked()
        assert gate.commits - before == 2
    assert rows(path, "SELECT count(*) FROM message") == [(51,)]


async def test_p14_a_batch_in_which_one_fails_loses_only_that_one(path: Path) -> None:
    gate = Gate()
    outcomes: dict[str, object] = {}

    async def try_to(session: str, id: str) -> None:
        try:
            outcomes[id] = (await accept(store, session, id, begin=True)).receipt.status
        except StoreError as error:
            outcomes[id] = type(error)

    async with opened(path, gate) as store:
        await begin(store, "busy", "m0")
        async with trio.open_nursery() as nursery:
            with gate.shut():
                nursery.start_soon(accept, store, "holds the gate", "m1")
                await gate.wait_held()
                for session, id in (("a", "m2"), ("busy", "m3"), ("b", "m4")):
                    # Second: a second open turn of one session, which the schema itself refuses.
                    nursery.start_soon(try_to, session, id)
                    await trio.testing.wait_all_tasks_blocked()
    accepted = ReceiptStatus.ACCEPTED
    assert outcomes == {"m2": accepted, "m3": StoreError, "m4": accepted}
    assert rows(path, "SELECT id FROM message ORDER BY seq") == [("m0",), ("m1",), ("m2",), ("m4",)]
    check_invariants(path)


async def test_changes_take_effect_in_the_order_of_the_calls(path: Path) -> None:
    called: list[str] = []

    async def set_cursor(value: str) -> None:
        called.append(value)
        await store.accept([arrival("s", value)], Cursor(channel="c", value=value))

    async with opened(path) as store:
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(set_cursor, f"m{number}")
        assert await store.cursor("c") == called[-1]
    assert [id for (id,) in rows(path, "SELECT id FROM message ORDER BY seq")] == called


async def test_p04_marking_catches_a_turn_whose_begin_is_still_on_its_way(path: Path) -> None:
    """The writer works in order: what was handed in before the mark is marked."""
    gate = Gate()
    marked: list[int] = []

    async def mark() -> None:
        marked.append(await store.mark_resume_pending(ResumeReason.SHUTDOWN))

    async with opened(path, gate) as store, trio.open_nursery() as nursery:
        with gate.shut():
            nursery.start_soon(begin, store, "a", "m1")
            await gate.wait_held()
            nursery.start_soon(begin, store, "b", "m2")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(mark)
            await trio.testing.wait_all_tasks_blocked()
    assert marked == [2]
    assert rows(path, "SELECT DISTINCT state FROM turn") == [("RESUME_PENDING",)]


async def test_c01_p04_a_thousand_turns_are_marked_in_one_transaction(path: Path) -> None:
    gate = Gate()
    async with opened(path, gate) as store:
        await store.accept([arrival(f"s{n}", f"m{n}", begin=True) for n in range(1000)])
        before = gate.commits
        assert await store.mark_resume_pending(ResumeReason.RESTART) == 1000
        assert gate.commits - before == 1
        assert await store.mark_resume_pending(ResumeReason.SHUTDOWN) == 0
    assert rows(path, "SELECT state, reason, count(*) FROM turn GROUP BY 1, 2") == [
        ("RESUME_PENDING", "restart", 1000)
    ]


# ----- cancellation


async def test_whoever_waits_for_a_write_cannot_be_cancelled_out_of_its_outcome(
    path: Path,
) -> None:
    gate = Gate()
    got: list[Admitted] = []

    async def accept_one() -> None:
        got.append(await accept(store, "s", "m1"))

    async with opened(path, gate) as store:
        async with trio.open_nursery() as nursery:
            with gate.shut():
                nursery.start_soon(accept_one)
                await gate.wait_held()
                nursery.cancel_scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert not got
        assert got[0].receipt.status is ReceiptStatus.ACCEPTED


async def test_whoever_is_cancelled_already_hands_nothing_in(path: Path) -> None:
    async with opened(path) as store:
        with trio.CancelScope() as scope:
            scope.cancel()
            await accept(store, "s", "m1")
        assert scope.cancelled_caught
    assert rows(path, "SELECT count(*) FROM message") == [(0,)]


async def test_p11_a_mark_that_hangs_does_not_hold_up_the_stop_and_is_written_all_the_same(
    path: Path,
) -> None:
    gate = Gate()
    async with opened(path, gate) as store:
        await begin(store, "s", "m1")
        with gate.shut():
            with trio.move_on_after(0.05) as scope:
                await store.mark_resume_pending(ResumeReason.SHUTDOWN)
            assert scope.cancelled_caught
    assert rows(path, "SELECT state, reason FROM turn") == [("RESUME_PENDING", "shutdown")]


async def test_p11_a_thread_can_mark_when_the_loop_does_not_answer(path: Path) -> None:
    async with opened(path) as store:
        await begin(store, "s", "m1")
        marked = store.mark_resume_pending_from_thread(ResumeReason.RESTART, PATIENCE)
    assert marked == 1
    assert rows(path, "SELECT state, reason FROM turn") == [("RESUME_PENDING", "restart")]


async def test_p11_a_thread_that_marks_gives_up_in_time(path: Path) -> None:
    gate = Gate()
    async with opened(path, gate) as store:
        await begin(store, "s", "m1")
        with gate.shut():
            assert store.mark_resume_pending_from_thread(ResumeReason.RESTART, 0.05) is None


async def test_a_closed_store_says_so(path: Path) -> None:
    async with opened(path) as store:
        await store.aclose()
        with pytest.raises(StoreClosed):
            await accept(store, "s", "m1")
        with pytest.raises(StoreClosed):
            await store.replies_to("local", "m1")
        assert store.mark_resume_pending_from_thread(ResumeReason.RESTART, 1.0) is None


async def test_what_was_handed_in_is_written_before_the_store_closes(path: Path) -> None:
    gate = Gate()
    async with opened(path, gate) as store, trio.open_nursery() as nursery:
        with gate.shut():
            for number in range(20):
                nursery.start_soon(accept, store, "s", f"m{number}")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(store.aclose)
            await trio.testing.wait_all_tasks_blocked()
    assert rows(path, "SELECT count(*) FROM message") == [(20,)]


# ----- files


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
async def test_files_are_private_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        async with opened(path) as store:
            await accept(store, "s", "m1")
            modes = {
                file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in path.parent.iterdir()
            }
    finally:
        os.umask(before)
    names = ("gateway.db", "gateway.db-wal", "gateway.db-shm", "gateway.db.lock")
    assert modes == dict.fromkeys(names, "0o600")


async def test_files_that_others_could_read_become_private(path: Path) -> None:
    async with opened(path) as store:
        await accept(store, "s", "m1")
        for file in path.parent.iterdir():
            file.chmod(0o666)
        copy = path.parent / "copy"
        copy.mkdir()
        for file in path.parent.glob("gateway*"):
            (copy / file.name).write_bytes(file.read_bytes())
            (copy / file.name).chmod(0o666)
    async with opened(copy / "gateway.db") as store:
        await accept(store, "s", "m2")
        assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in copy.iterdir()} == {"0o600"}


def test_a_link_is_not_followed(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(StoreIOError, match=re.escape(str(path))):
        connect(path, SystemClock())
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("where", ["missing/gateway.db", "."])
async def test_a_path_that_cannot_be_a_store_is_named(tmp_path: Path, where: str) -> None:
    with pytest.raises(StoreIOError, match=re.escape(str(tmp_path))):
        async with opened(tmp_path / where):
            raise AssertionError("opened")


# ----- the lock


async def test_c50_the_second_owner_is_refused_and_told_who_the_first_is(path: Path) -> None:
    async with opened(path) as store:
        with pytest.raises(StoreInUse, match=f"process {os.getpid()}") as caught:
            async with opened(path):
                raise AssertionError("opened twice")
        assert caught.value.pid == os.getpid()
        assert str(path) in str(caught.value)
        assert holder_of(path) == os.getpid()
        await accept(store, "s", "m1")  # and the first goes on
    assert holder_of(path) is None


HOLD = """
import sys, trio
from trio_gateway.store import open_store
async def main():
    async with open_store(sys.argv[1]):
        print("open", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


@contextmanager
def held_by_another_process(path: Path) -> Generator[int]:
    """Another process has the store open; its pid."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            yield process.pid
        finally:
            process.kill()


async def test_c50_the_lock_is_seen_by_other_processes_and_goes_with_its_owner(path: Path) -> None:
    with held_by_another_process(path) as pid:
        with pytest.raises(StoreInUse) as caught:
            async with opened(path):
                raise AssertionError("opened twice")
        assert caught.value.pid == pid
        with pytest.raises(StoreInUse):
            edit_store(path, lambda ledger: ledger.touch())
        assert holder_of(path) == pid
    async with opened(path) as store:
        await accept(store, "s", "m1")


@pytest.mark.parametrize("content", [b"", b"999999999\n", b"1\n", b"\xff garbage \x00"])
async def test_c50_a_lock_file_of_the_dead_stops_nobody(path: Path, content: bytes) -> None:
    lock = path.with_name("gateway.db.lock")
    lock.write_bytes(content)
    async with opened(path):
        assert lock.read_text() == f"{os.getpid()}\n"


async def test_a_store_that_cannot_be_opened_is_not_locked_afterwards(path: Path) -> None:
    write(path, b"this is no database, and long enough to be looked at" * 100)
    with pytest.raises(StoreCorrupt):
        async with opened(path):
            raise AssertionError("opened")
    assert holder_of(path) is None


# ----- the connection


def pragma(db: Any, name: str) -> object:
    return next(iter(db.execute(f"PRAGMA {name}")))[0]


def test_p05_the_writing_connection_is_durable(path: Path) -> None:
    with closing(connect(path, SystemClock())) as db:
        assert pragma(db, "journal_mode") == "wal"
        assert pragma(db, "synchronous") == 2
        assert pragma(db, "wal_autocheckpoint") == 0
        assert pragma(db, "trusted_schema") == 0


def test_what_cannot_do_wal_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(StoreError, match="journal_mode did not become wal"):
        connect(Path(":memory:"), SystemClock())


def test_a_sqlite_that_corrupts_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sqlite, "OLDEST_SQLITE", (99, 0, 0))
    with pytest.raises(StoreError, match="is too old"):
        connect(path, SystemClock())


async def test_a_reader_cannot_write(path: Path) -> None:
    async with opened(path):
        with closing(open_read_only(path)) as db, pytest.raises(apsw.ReadOnlyError):
            db.execute("UPDATE epoch SET pid = 0")


async def fill_and_die(life: Life) -> None:
    """Four messages, and no farewell: what is in the WAL stays there."""
    async with open_store(life.world.store) as store:
        await store.recover()
        for number in range(4):
            await accept(store, "s", f"m{number}")
        die()


def test_a_reader_does_not_checkpoint_not_even_as_the_last_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert live(fill_and_die, world)
    wal = world.store.with_name("gateway.db-wal")
    before = world.store.read_bytes(), wal.read_bytes()
    with closing(read_store(world.store)) as reader:
        assert reader.counts().waiting == 4
    assert (world.store.read_bytes(), wal.read_bytes()) == before


async def test_p14_another_writer_that_keeps_the_lock_is_named_and_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sqlite, "BUSY_MS", 50)
    async with opened(path) as store:
        with closing(apsw.Connection(str(path))) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusy, match="another process") as caught:
                await accept(store, "s", "m1")
            assert caught.value.retryable
            other.execute("ROLLBACK")
        assert (await accept(store, "s", "m1")).receipt.status is ReceiptStatus.ACCEPTED


# ----- versions


def contents(path: Path) -> bytes:
    return path.read_bytes()


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


async def make(path: Path) -> None:
    """A store with something in it."""
    async with opened(path) as store:
        turn = await begin(store, "s", "m1")
        await store.settle(end_of(turn))
        await begin(store, "s", "m2")


def set_pragma(path: Path, name: str, value: int) -> None:
    with closing(apsw.Connection(str(path))) as db:
        db.execute(f"PRAGMA {name} = {value}")


async def refuses(path: Path, error: type[StoreError], match: str) -> None:
    """Every way in refuses, in words, and the file stays as it is to the byte."""
    before = contents(path)
    with pytest.raises(error, match=match) as caught:
        async with open_store(path):
            raise AssertionError("opened")
    assert str(path) in str(caught.value)
    with pytest.raises(error):
        async with open_gateway(lambda turn: None, store=path):
            raise AssertionError("opened")
    with pytest.raises(error):
        read_store(path).counts()
    with pytest.raises(error):
        edit_store(path, lambda ledger: ledger.touch())
    assert contents(path) == before


async def test_c52_a_newer_schema_is_refused_and_untouched(path: Path) -> None:
    await make(path)
    set_pragma(path, "user_version", SCHEMA_VERSION + 1)
    await refuses(path, StoreSchemaError, "install the newer trio-gateway")


async def test_c52_the_database_of_another_program_is_refused_and_untouched(path: Path) -> None:
    with closing(apsw.Connection(str(path))) as db:
        db.execute("CREATE TABLE recipes (title TEXT)")
    await refuses(path, StoreSchemaError, "another program")


async def test_c52_an_older_schema_is_migrated_all_or_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(path)
    migrations = {
        "good.sql": "ALTER TABLE turn ADD COLUMN mood TEXT; UPDATE turn SET mood = 'fine';",
        "bad.sql": "ALTER TABLE turn ADD COLUMN mood TEXT; UPDATE nothing SET mood = 'fine';",
    }
    monkeypatch.setattr(_sqlite, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    monkeypatch.setattr(_sqlite, "read_sql", migrations.__getitem__)

    monkeypatch.setattr(_sqlite, "MIGRATIONS", {SCHEMA_VERSION: "bad.sql"})
    with pytest.raises(StoreError):
        connect(path, SystemClock())
    assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    with pytest.raises(apsw.SQLError, match="mood"):
        rows(path, "SELECT mood FROM turn")
    with pytest.raises(StoreSchemaError, match="a gateway migrates it"):
        read_store(path)

    monkeypatch.setattr(_sqlite, "MIGRATIONS", {SCHEMA_VERSION: "good.sql"})
    connect(path, SystemClock()).close()
    assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION + 1,)]
    assert rows(path, "SELECT DISTINCT mood FROM turn") == [("fine",)]


OLDER = {
    2: """
        ALTER TABLE message DROP COLUMN traceparent;
        ALTER TABLE delivery DROP COLUMN traceparent;
        PRAGMA user_version = 2;
    """,
    1: """
        DROP TRIGGER journal_accepted;
        DROP TRIGGER journal_settled;
        DROP TRIGGER journal_begun;
        DROP TRIGGER journal_interrupted;
        DROP TRIGGER journal_reply;
        DROP TABLE journal;
        DROP TABLE pulled;
        PRAGMA user_version = 1;
    """,
}
"""What leads from a version back to the one before: what that release wrote."""


@pytest.mark.parametrize("version", OLDER)
async def test_c52_a_store_of_each_released_version_is_migrated(path: Path, version: int) -> None:
    """Whole: what was open goes on, and the tables are those of a new store."""
    async with opened(path) as store:
        turn = await begin(store, "a", "m1")
        done = await begin(store, "b", "m2")
        await store.settle(end_of(done))
    with closing(apsw.Connection(str(path))) as db:
        for older in range(SCHEMA_VERSION - 1, version - 1, -1):
            db.execute(OLDER[older])
    assert rows(path, "PRAGMA user_version") == [(version,)]

    traced = attrs.evolve(arrival("a", "m3").message, traceparent=TRACEPARENT)
    async with open_store(path) as store:
        recovered = await store.recover()
        (pending,) = recovered.turns
        resumed = await store.resume(pending)
        assert resumed is not None
        assert (resumed.id, resumed.messages) == (turn.id, turn.messages)
        assert [delivery.text for delivery in recovered.deliveries] == ["done"]
        await store.accept([Arrival(traced, traced.key)])
        settled = await store.settle(
            attrs.evolve(end_of(resumed), next=Begin(resumed.session, resumed.session_id, False))
        )
        assert settled.next is not None
        assert settled.next.turn is not None
        assert settled.next.turn.messages == (traced,)
    assert rows(path, "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    await make(path.with_name("new.db"))
    columns = (
        'SELECT made.name, field.name, field.type, field."notnull" FROM sqlite_schema AS made'
        " JOIN pragma_table_info(made.name) AS field WHERE made.type = 'table' ORDER BY 1, 2"
    )
    assert rows(path, columns) == rows(path.with_name("new.db"), columns)


async def test_a_trace_that_cannot_be_read_loses_nothing(path: Path) -> None:
    """It is no reason to lose a message, nor a reply."""
    message = attrs.evolve(arrival("a", "m1").message, traceparent=TRACEPARENT)
    async with opened(path) as store:
        (admitted,) = await store.accept([Arrival(message, message.key, begin=True)])
        assert admitted.turn is not None
        reply = NewReply(1, ReplyKind.SAY, ("said",), False, ("m1",), traceparent=TRACEPARENT)
        said = await store.say(1, 1, admitted.turn.session, admitted.session_id, reply)
        assert said is not None
        assert said.deliveries[0].traceparent == TRACEPARENT
    with closing(apsw.Connection(str(path))) as db:
        db.execute("UPDATE message SET traceparent = CAST(x'ff00ff' AS TEXT)")
        db.execute("UPDATE delivery SET traceparent = 'nonsense'")
    async with open_store(path) as store:
        recovered = await store.recover()
        assert [one.traceparent for one in recovered.deliveries] == [None]
        turn = await store.resume(recovered.turns[0])

    assert turn is not None
    assert turn.messages == (attrs.evolve(message, traceparent=None),)


# ----- damage


async def test_c53_a_file_that_is_no_database_is_refused_and_untouched(path: Path) -> None:
    write(path, b"\x89PNG or whatever this is" * 400)
    await refuses(path, StoreCorrupt, "restore a copy")


async def test_c53_a_destroyed_header_is_refused_and_untouched(path: Path) -> None:
    await make(path)
    whole = contents(path)
    write(path, b"\xff" * 100 + whole[100:])
    await refuses(path, StoreCorrupt, "restore a copy")


@pytest.mark.parametrize("part", [0.3, 0.7])
async def test_c53_a_truncated_file_is_refused_and_untouched(path: Path, part: float) -> None:
    await make(path)
    whole = contents(path)
    write(path, whole[: int(len(whole) * part)])
    await refuses(path, StoreCorrupt, "restore a copy")


async def test_c53_garbage_in_any_page_is_refused_or_never_met(path: Path) -> None:
    """A page that nobody reads at boot does not matter yet. But no damage makes a gateway hang, or
    write, or fail without the file's name."""
    await make(path)
    whole = contents(path)
    refused = [page for page in range(len(whole) // PAGE) if await is_refused(path, whole, page)]
    assert len(refused) >= 5


PAGE = 4096


async def is_refused(path: Path, whole: bytes, page: int) -> bool:
    """Whether a gateway refuses the file with garbage in one page. If so, it says which file, and
    leaves it as it is."""
    damaged = whole[: page * PAGE] + b"\xa5" * PAGE + whole[(page + 1) * PAGE :]
    write(path, damaged)
    refusals: list[StoreCorrupt] = []
    try:
        with trio.fail_after(PATIENCE):
            async with open_gateway(lambda turn: "hm", store=path):
                await trio.lowlevel.checkpoint()
    except StoreCorrupt as error:
        refusals.append(error)
    for refusal in refusals:
        assert str(path) in str(refusal)
        assert contents(path) == damaged
    return bool(refusals)


def test_c53_a_damaged_file_with_a_wal_beside_it_is_refused_and_both_are_untouched(
    tmp_path: Path,
) -> None:
    """What would be written back into a damaged file is evidence, and may be all that is left."""
    world = World(tmp_path)
    trio.run(make, world.store)
    assert live(fill_and_die, world)
    wal = world.store.with_name("gateway.db-wal")
    whole, frames = contents(world.store), contents(wal)
    refused = 0
    for page in range(len(whole) // PAGE):
        write(wal, frames)
        if trio.run(is_refused, world.store, whole, page):
            assert contents(wal) == frames
            refused += 1
    assert refused >= 3


def test_c53_a_torn_wal_costs_what_was_torn_and_nothing_before_it(tmp_path: Path) -> None:
    """SQLite reads a WAL up to the first frame that is not whole: what a power cut leaves."""
    world = World(tmp_path)
    assert live(fill_and_die, world)
    wal = world.store.with_name("gateway.db-wal")
    whole = wal.read_bytes()
    wal.write_bytes(whole[:-100])
    assert rows(world.store, "SELECT id FROM message ORDER BY seq") == [
        ("m0",),
        ("m1",),
        ("m2",),
    ]
    check_invariants(world.store)


# ----- statements


QUERIES = parse_queries(read_sql("queries.sql"))
PACKAGE = Path(_sqlite.__file__).parent


def test_every_query_has_a_sentence_and_is_used() -> None:
    source = "".join(file.read_text() for file in PACKAGE.glob("*.py"))
    for name, (sentence, _) in QUERIES.items():
        assert sentence[0].isupper() or sentence.startswith(("its ", "and ")), name
        assert sentence.endswith((".", ",")), name
        assert f'"{name}"' in source, f"{name} is used nowhere"


def test_a_query_without_a_sentence_is_refused() -> None:
    with pytest.raises(ValueError, match="sentence"):
        parse_queries("-- name: nothing\nSELECT 1;\n")
    with pytest.raises(KeyError):
        query("unheard_of")


BY_A_PERSON = {
    "list_sessions": "the newest of all sessions, on a terminal",
    "sessions_named": "a session by half of its name, on a terminal",
    "find_message": "a message by half of its name, on a terminal",
    "list_astray": "every message, for the doctor",
    "newest_turn": "the end of the table, once at boot",
    "last_ending": "the end of the table, once at boot",
    "store_id": "a table of one row",
}
"""Statements that a person or a boot asks for once, and that may look at more than they return."""

OPEN_ONLY = re.compile(
    r"USING (COVERING )?INDEX (message_queued|turn_open|turn_quarantined|delivery_open"
    r"|delivery_dead|delivery_loose)\b"
)
"""The partial indexes hold what is open, or the few rows that a person is to look at."""


def plan(db: apsw.Connection, statement: str) -> list[str]:
    """How SQLite would run a statement, step by step."""
    for count in range(20):
        try:
            found = list(db.execute(f"EXPLAIN QUERY PLAN {statement}", (None,) * count))
        except apsw.BindingsError:
            continue
        return [row[3] for row in found]
    raise AssertionError("more than 20 values")


async def test_no_statement_on_the_way_of_a_message_looks_at_more_than_is_open(path: Path) -> None:
    async with opened(path):
        with closing(apsw.Connection(str(path))) as db:
            for name, (_, statement) in QUERIES.items():
                for step in plan(db, statement):
                    if step.startswith("SCAN") and not _is_cheap(step):
                        assert name in BY_A_PERSON, f"{name}: {step}"


def _is_cheap(step: str) -> bool:
    return bool(OPEN_ONLY.search(step)) or step.startswith(("SCAN CONSTANT", "SCAN (subquery"))


# ----- retention


class ManualClock:
    """Time stands still unless it is told to move."""

    def __init__(self) -> None:
        self.time = timedelta(days=10_000)

    def now(self) -> Instant:
        microseconds = self.time // timedelta(microseconds=1)
        return Instant(microseconds, microseconds, "machine")


def days_ago(clock: ManualClock, days: int) -> int:
    return (clock.time - timedelta(days=days)) // timedelta(microseconds=1)


@asynccontextmanager
async def aging(path: Path, clock: Clock) -> AsyncGenerator[SqliteStore]:
    async with open_store(path, clock=clock) as store:
        await store.recover()
        yield store


async def answered(store: SqliteStore, session: str, id: str) -> None:
    """A message that was answered with a step, a reply, and its delivery."""
    turn = await begin(store, session, id)
    await store.remember(turn.id, 1, "think", "safe", '"a thought"', 1)
    settled = await store.settle(end_of(turn, text="an answer"))
    await store.delivered([(delivery.id, 1) for delivery in settled.deliveries])


async def test_p01_texts_go_before_ids_and_ids_are_recognised_until_they_go(path: Path) -> None:
    clock = ManualClock()
    async with aging(path, clock) as store:
        await answered(store, "s", "old")
        clock.time += timedelta(days=100)
        await answered(store, "s", "young")
        forgotten = await store.forget(0, days_ago(clock, 90), days_ago(clock, 400))
        assert (forgotten.texts, forgotten.messages, forgotten.next_seq) == (1, 0, None)
        assert rows(path, "SELECT id, body IS NULL FROM message") == [("old", 1), ("young", 0)]
        assert rows(path, "SELECT text FROM delivery") == [(None,), ("an answer",)]
        assert rows(path, "SELECT count(*) FROM step") == [(1,)]
        again = await accept(store, "s", "old", begin=True)
        assert again.receipt.status is ReceiptStatus.DUPLICATE

        clock.time += timedelta(days=301)
        forgotten = await store.forget(0, days_ago(clock, 90), days_ago(clock, 400))
        assert (forgotten.texts, forgotten.messages) == (1, 1)
        assert rows(path, "SELECT id FROM message") == [("young",)]
        assert (await accept(store, "s", "old")).receipt.status is ReceiptStatus.ACCEPTED
    check_invariants(path)


async def test_p01_nothing_that_is_open_is_forgotten(path: Path) -> None:
    clock = ManualClock()
    async with aging(path, clock) as store:
        turn = await begin(store, "running", "m1")
        await store.remember(turn.id, 1, "think", "safe", '"a thought"', 1)
        await accept(store, "running", "m2")
        settled = await begin(store, "undelivered", "m3")
        await store.settle(end_of(settled, text="not there yet"))
        clock.time += timedelta(days=1000)
        await store.forget(0, days_ago(clock, 90), days_ago(clock, 400))
        assert rows(path, "SELECT id FROM message WHERE body IS NOT NULL") == [("m1",), ("m2",)]
        assert rows(path, "SELECT count(*) FROM step") == [(1,)]
        assert rows(path, "SELECT text, state FROM delivery") == [("not there yet", "pending")]


async def test_retention_goes_in_bites(path: Path) -> None:
    clock = ManualClock()
    async with aging(path, clock) as store:
        for start in range(0, 1200, 400):
            await store.accept([arrival("s", f"m{n}") for n in range(start, start + 400)])
        key = SessionKey("local", "s")
        (session_id,) = rows(path, "SELECT id FROM session")[0]
        begun = await store.begin(Begin(key, session_id, True))
        assert begun.turn is not None
        await store.settle(end_of(begun.turn))
        clock.time += timedelta(days=100)
        seq: int | None = 0
        bites = 0
        while seq is not None:
            bite = await store.forget(seq, days_ago(clock, 90), days_ago(clock, 400))
            seq, bites = bite.next_seq, bites + 1
        assert bites == 3
        assert rows(path, "SELECT count(*) FROM message WHERE body IS NOT NULL") == [(200,)]
