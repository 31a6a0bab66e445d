"""The floor: a bare Trio program that makes the commits that a turn needs, and nothing else.

Four group-committed writes per turn (accept, begin, settle, delivered) over one writer thread, with
the gateway's own pragmas. No children, no scopes, no sessions, no events, no rules.
"""

from __future__ import annotations

import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any

import apsw
import trio

SCHEMA = """
CREATE TABLE message (seq INTEGER PRIMARY KEY, session INTEGER, id TEXT UNIQUE, text TEXT, state TEXT);
CREATE TABLE turn (id INTEGER PRIMARY KEY, session INTEGER, state TEXT);
CREATE TABLE delivery (id INTEGER PRIMARY KEY, turn INTEGER, text TEXT, state TEXT);
"""


def connect(path: Path) -> apsw.Connection:
    """A connection as the gateway's store configures it."""
    db = apsw.Connection(str(path))
    for pragma in ("journal_mode = wal", "synchronous = full", "wal_autocheckpoint = 2000",
                   "cache_size = -32000"):  # fmt: skip
        db.execute(f"PRAGMA {pragma}")
    return db


class Writer:
    """Group commit, as short as it can be said."""

    def __init__(self, db: apsw.Connection) -> None:
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
    db.execute(SCHEMA)
    writer = Writer(db)

    async def session(number: int) -> None:
        for n in range(turns_each):
            turn = number * turns_each + n
            await writer.write(
                ("INSERT INTO message (session, id, text, state) VALUES (?, ?, ?, 'queued')",
                 (number, f"{number}-{n}", "hello")))  # fmt: skip
            await writer.write(
                ("INSERT INTO turn (id, session, state) VALUES (?, ?, 'RUNNING')", (turn, number)))
            await writer.write(
                ("UPDATE turn SET state = 'COMPLETED' WHERE id = ?", (turn,)),
                ("INSERT INTO delivery (id, turn, text, state) VALUES (?, ?, 'ok', 'pending')",
                 (turn, turn)))  # fmt: skip
            await writer.write(("UPDATE delivery SET state = 'delivered' WHERE id = ?", (turn,)))

    began = perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(sessions):
            nursery.start_soon(session, number)
    took = perf_counter() - began
    writer.close()
    db.close()
    return sessions * turns_each / took
