"""One connection writes, on its own thread, and operations that wait together are committed
together: one transaction, one fsync, for all of them (group commit).

    tasks      accept   settle   accept   remember          accept
                  \\       |        |        /                  |
    queue          '------+--------+-------'                   |
    thread     BEGIN  1  2  3  4  COMMIT (one fsync)       BEGIN  1  COMMIT
    tasks              <- each is woken with its own result ->

Operations run in the order in which they were handed in; promise 4 rests on that. A batch that
fails is rolled back and its operations are retried one by one, so that a bad one fails alone.

A task that waits for its operation cannot be cancelled: once handed in, the outcome is known to
whoever asked, never "perhaps".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Final, Generic, Protocol, TypeVar, TypeVarTuple

import apsw
import outcome
import trio

from .._errors import StoreClosed, StoreError
from ._database import Database, translate

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

BATCH: Final = 1000
"""Operations in one transaction at the most: bounds how long the first of them waits."""

CHECKPOINT_PAGES: Final = 2000
"""The WAL is written back to the database when it has grown by this many pages (8 MiB)."""

Tap = Callable[[str], None]
"""Called with "before" and "after" around every commit. What it raises before, the commit raises;
afterwards the commit stands, whatever is raised."""

Meter = Callable[[int, float], None]
"""Called after every commit, on the thread that makes it: how many operations, how many seconds."""


class Book(Protocol):
    """Whose methods are the operations: told where transactions begin and come to nothing."""

    def begins(self) -> None:
        """A transaction begins."""
        ...

    def rolled_back(self) -> None:
        """It was rolled back."""
        ...


class Operation(Generic[T]):
    """One write on its way: a callable, who waits for it, and in the end its outcome."""

    __slots__ = ("args", "call", "done", "outcome", "task")

    def __init__(
        self, call: Callable[..., T], args: tuple[Any, ...], task: trio.lowlevel.Task | None
    ) -> None:
        self.call = call
        self.args = args
        self.task = task
        self.outcome: outcome.Outcome[T] | None = None
        self.done: threading.Event | None = None


class Writer(Protocol):
    """Runs writes in order, each in a transaction."""

    async def run(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run `call(*args)` in a transaction; return its result after the commit.

        Cancelled only before it is handed in. Raises `StoreError`.
        """
        ...

    async def run_always(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Like `run`, but also for a caller that is cancelled already: for what has happened and
        must be known."""
        ...

    async def run_abandonable(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Like `run`, but a cancelled caller stops waiting; the write itself goes on."""
        ...

    def run_from_thread(self, call: Callable[[*Ts], T], *args: *Ts, timeout: float) -> T | None:
        """Like `run`, for a thread outside of Trio. None: not done within `timeout` seconds."""
        ...

    async def aclose(self) -> None:
        """Finish what was handed in, then close the connection."""
        ...


def no_tap(moment: str) -> None:
    """The tap of a store that nobody tests."""


def no_meter(operations: int, seconds: float) -> None:
    """The meter of a store whose commits nobody counts."""


class _Transactions:
    """Runs batches over one connection."""

    def __init__(self, db: Database, tap: Tap, meter: Meter, book: Book) -> None:
        self._db = db
        self._tap = tap
        self._meter = meter
        self._book = book
        self._wal_pages = 0
        self._is_done = False
        self._has_written = False
        db.set_wal_hook(self._note_done)

    def _note_done(self, db: object, name: str, pages: int) -> int:
        """SQLite calls this once a commit stands, whatever COMMIT itself goes on to return."""
        self._is_done = self._has_written = True
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def commit(self, batch: list[Operation[Any]]) -> None:
        """Give every operation of the batch its outcome."""
        self._is_done = False
        try:
            self._commit_together(batch)
        except Exception as error:
            if self._is_done:
                # An error after the fact. To ask again would find the messages known and the
                # turns begun, and nobody would run them.
                return
            self._roll_back()
            if len(batch) == 1:
                batch[0].outcome = outcome.Error(translate(error))
            else:
                for operation in batch:
                    self.commit([operation])

    def _commit_together(self, batch: list[Operation[Any]]) -> None:
        began = monotonic()
        self._db.execute("BEGIN IMMEDIATE")
        self._book.begins()
        for operation in batch:
            operation.outcome = outcome.Value(operation.call(*operation.args))
        self._tap("before")
        self._db.execute("COMMIT")
        self._meter(len(batch), monotonic() - began)
        self._tap("after")

    def _roll_back(self) -> None:
        self._book.rolled_back()
        if self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except apsw.Error:
                # SQLite has rolled back by itself (a full disk, an I/O error).
                return

    def checkpoint_if_due(self) -> None:
        """Write the WAL back when it has grown; after the results are out, so nobody waits."""
        if self._wal_pages < CHECKPOINT_PAGES:
            return
        self._wal_pages = 0
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error:
            # Nothing is lost: the WAL stays as long as it is, and the next growth tries again.
            return

    def close(self) -> None:
        """Write the WAL back and close. A file that was refused at boot is left as it is."""
        if self._has_written:
            self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        try:
            self._db.close()
        except apsw.Error:
            # Nothing is lost: the next boot reads the WAL.
            return


class ThreadWriter:
    """The writer of a running gateway: group commit on a thread of its own."""

    def __init__(
        self, db: Database, book: Book, tap: Tap = no_tap, meter: Meter = no_meter
    ) -> None:
        self._transactions = _Transactions(db, tap, meter, book)
        self._queue: SimpleQueue[Operation[Any] | None] = SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._closed = False
        # A daemon: a disk that hangs must not keep a process that was told to leave.
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._hand_in(call, args)
        result: T = await trio.lowlevel.wait_task_rescheduled(_cannot_abort)
        return result

    async def run_always(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        self._hand_in(call, args)
        result: T = await trio.lowlevel.wait_task_rescheduled(_cannot_abort)
        return result

    async def run_abandonable(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        operation = self._hand_in(call, args)

        def abandon(_: object) -> trio.lowlevel.Abort:
            operation.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        result: T = await trio.lowlevel.wait_task_rescheduled(abandon)
        return result

    def _hand_in(self, call: Callable[..., T], args: tuple[Any, ...]) -> Operation[T]:
        if self._closed:
            raise StoreClosed("the store is closed")
        operation = Operation(call, args, trio.lowlevel.current_task())
        self._queue.put(operation)
        return operation

    def run_from_thread(self, call: Callable[[*Ts], T], *args: *Ts, timeout: float) -> T | None:
        if self._closed:
            return None
        operation = Operation(call, args, None)
        operation.done = threading.Event()
        self._queue.put(operation)
        if operation.done.wait(timeout) and operation.outcome is not None:
            return operation.outcome.unwrap()
        return None

    async def aclose(self) -> None:
        self._closed = True
        self._queue.put(None)
        await trio.to_thread.run_sync(self._thread.join, abandon_on_cancel=True)

    # ----- on the thread

    def _work(self) -> None:
        batch: list[Operation[Any]] = []
        open_ = True
        try:
            while open_:
                open_ = self._gather(batch)
                if batch:
                    self._transactions.commit(batch)
                    self._answer(batch)
                    batch = []
                    self._transactions.checkpoint_if_due()
        except BaseException as error:  # noqa: ASYNC103 - a thread of its own; the run is told
            self._die(batch, error)
        self._transactions.close()

    def _die(self, batch: list[Operation[Any]], error: BaseException) -> None:
        """Something is wrong beyond the database: no memory, say. Without this thread everybody
        would wait for ever, so Trio's run is ended, by the error. What had been handed in may be on
        disk or not: that is for the next boot to read."""
        self._closed = True
        while not self._queue.empty():
            operation = self._queue.get()
            if operation is not None:
                batch.append(operation)
        for operation in batch:
            operation.outcome = outcome.Error(StoreClosed(f"the store's thread died of {error!r}"))
        self._answer(batch)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(_raise, error)

    def _gather(self, batch: list[Operation[Any]]) -> bool:
        """Fill `batch` with all that waits, at least one; False when the writer is to close."""
        operation = self._queue.get()
        try:
            while operation is not None:
                batch.append(operation)
                if len(batch) == BATCH:
                    return True
                operation = self._queue.get_nowait()
        except Empty:
            return True
        return False

    def _answer(self, batch: list[Operation[Any]]) -> None:
        for operation in batch:
            if operation.done is not None:
                operation.done.set()
        try:
            self._token.run_sync_soon(_wake, batch)
        except trio.RunFinishedError:
            return  # nobody waits any more


class InlineWriter:
    """Runs each write at once, in the loop. For tests on a virtual clock, which would run away
    while a thread works, and for tools that have nothing else to do."""

    def __init__(
        self, db: Database, book: Book, tap: Tap = no_tap, meter: Meter = no_meter
    ) -> None:
        self._transactions = _Transactions(db, tap, meter, book)
        self._closed = False

    async def run(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self.run_always(call, *args)

    async def run_always(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        result = self.run_sync(call, *args)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result

    async def run_abandonable(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        return await self.run(call, *args)

    def run_sync(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run `call(*args)` in a transaction, now."""
        if self._closed:
            raise StoreClosed("the store is closed")
        operation = Operation(call, args, None)
        self._transactions.commit([operation])
        if operation.outcome is None:
            raise StoreError("the write had no outcome")
        result = operation.outcome.unwrap()
        self._transactions.checkpoint_if_due()
        return result

    def run_from_thread(self, call: Callable[[*Ts], T], *args: *Ts, timeout: float) -> T | None:
        # The connection belongs to the loop's thread, which does not answer: leave it alone.
        return None

    async def aclose(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if not self._closed:
            self._closed = True
            self._transactions.close()


def _cannot_abort(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


def _raise(error: BaseException) -> None:
    raise error


def _wake(batch: list[Operation[Any]]) -> None:
    for operation in batch:
        if operation.task is not None and operation.outcome is not None:
            trio.lowlevel.reschedule(operation.task, operation.outcome)
