"""The floor: a bare Trio program that makes the commits that a turn needs, and nothing else.

Four group-committed writes per turn (accept, begin, settle, delivered) over one writer thread, into
the gateway's own schema, with its pragmas: the same rows, the same indexes, the same fsyncs. No
children, no scopes, no sessions, no reading, no rules, nothing checked.
"""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any

import trio

from trio_gateway.store._database import Database, open_database
from trio_gateway.store._sql import read_sql

ACCEPT = (
    "INSERT INTO message (channel, id, session, conversation, state, body, accepted_at)"
    " VALUES ('wire', ?, ?, 0, 'queued', ?, 0)"
)
BEGIN = (
    "INSERT INTO turn (id, session, conversation, state, epoch, begun_at, attempt_at)"
    " VALUES (?, ?, 0, 'RUNNING', 1, 0, 0)"
)
TAKE = "UPDATE message SET state = 'running', turn = ? WHERE channel = 'wire' AND id = ?"
SETTLE = "UPDATE turn SET state = 'COMPLETED', settled_at = 0 WHERE id = ?"
CONSUME = "UPDATE message SET state = 'answered', ended_at = 0 WHERE turn = ?"
REPLY = (
    "INSERT INTO delivery (id, key, session, turn, n, part, parts, kind, about, text, attempt,"
    " final, state, epoch, created_at)"
    " VALUES (?, ?, ?, ?, 0, 1, 1, 'answer', ?, 'ok', 1, 1, 'pending', 1, 0)"
)
DELIVERED = "UPDATE delivery SET state = 'delivered', delivered_at = 0 WHERE id = ?"
SESSION = "INSERT INTO session (id, channel, name) VALUES (?, 'wire', ?)"


def connect(path: Path) -> Database:
    """A connection as the gateway's store configures it."""
    path.touch()
    db = open_database(path, write=True)
    for pragma in ("journal_mode = wal", "synchronous = full", "wal_autocheckpoint = 2000",
                   "cache_size = -4000"):  # fmt: skip
        db.execute(f"PRAGMA {pragma}")
    return db


class Writer:
    """Group commit, as short as it can be said."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    async def write(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """Run statements in the next transaction; return after the commit."""
        self._queue.put((statements, trio.lowlevel.current_task()))
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)

    def close(self) -> None:
        """Finish, and join the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            try:
                while len(batch) < 1000:
                    batch.append(self._queue.get_nowait())
            except Empty:
                pass
            last = None in batch
            batch = [entry for entry in batch if entry is not None]
            if batch:
                self._commit(batch)
            if last:
                return

    def _commit(self, batch: list[Any]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for statements, _ in batch:
            for sql, values in statements:
                self._db.execute(sql, values)
        self._db.execute("COMMIT")
        self._token.run_sync_soon(_wake, [task for _, task in batch])


def _wake(tasks: list[trio.lowlevel.Task]) -> None:
    for task in tasks:
        trio.lowlevel.reschedule(task)


async def turns_per_second(path: Path, sessions: int, turns_each: int) -> float:
    """Turns per second of the floor, with each session one turn after the other."""
    db = connect(path)
    db.execute(read_sql("schema.sql"))
    with db:
        db.executemany(SESSION, ((number, f"s{number}") for number in range(sessions)))
    writer = Writer(db)

    async def session(number: int) -> None:
        for n in range(turns_each):
            turn = number * turns_each + n
            name = f"{number}-{n}"
            await writer.write((ACCEPT, (name, number, '{"text":"hello","sender":null}')))
            await writer.write((BEGIN, (turn, number)), (TAKE, (turn, name)))
            await writer.write(
                (SETTLE, (turn,)),
                (CONSUME, (turn,)),
                (REPLY, (turn, f"floor-{turn}-end", number, turn, f'["{name}"]')),
            )
            await writer.write((DELIVERED, (turn,)))

    began = perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(sessions):
            nursery.start_soon(session, number)
    took = perf_counter() - began
    writer.close()
    db.close()
    return sessions * turns_each / took
