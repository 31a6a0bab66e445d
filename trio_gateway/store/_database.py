"""The database library, as far as this store uses it, with types that are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias, cast

import apsw

from .._errors import StoreBusy, StoreCorrupt, StoreError, StoreFull, StoreIOError

Row: TypeAlias = tuple[Any, ...]
Values: TypeAlias = Sequence[Any]


class Database(Protocol):
    """One connection to a SQLite file; as a context manager, one transaction."""

    def execute(self, statements: str, bindings: Values = ..., /) -> Iterator[Row]:
        """Run statements; iterate over the rows."""
        ...

    def executemany(self, statements: str, bindings: Iterable[Values], /) -> Iterator[Row]:
        """Run one statement for each of many bindings."""
        ...

    def changes(self) -> int:
        """Rows that the last statement changed."""
        ...

    def last_insert_rowid(self) -> int:
        """The id of the row inserted last."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        ...

    def set_busy_timeout(self, milliseconds: int, /) -> None:
        """How long to wait for another connection's lock."""
        ...

    def set_wal_hook(self, call: Callable[[Any, str, int], int] | None, /) -> None:
        """Call with the WAL's length in pages after each commit."""
        ...

    def wal_checkpoint(self, dbname: str | None = ..., mode: int = ...) -> tuple[int, int]:
        """Write the WAL back."""
        ...

    def config(self, op: int, *args: int) -> int:
        """Set an option of the connection."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> bool | None: ...


def open_database(path: Path, *, write: bool) -> Database:
    """A connection to the file at `path`, which exists."""
    flags = apsw.SQLITE_OPEN_READWRITE if write else apsw.SQLITE_OPEN_READONLY
    return cast("Database", apsw.Connection(str(path), flags=flags))


_KINDS: Final[tuple[tuple[type[apsw.Error], type[StoreError], str], ...]] = (
    (apsw.FullError, StoreFull, "the disk is full: make room; it is tried again"),
    (apsw.CorruptError, StoreCorrupt, "the database is damaged: restore a copy of the file"),
    (apsw.NotADBError, StoreCorrupt, "the file is not a database"),
    (apsw.BusyError, StoreBusy, "another process keeps the database locked"),
    (apsw.LockedError, StoreBusy, "another connection keeps the database locked"),
    (apsw.ReadOnlyError, StoreIOError, "the database cannot be written: look at its permissions"),
    (apsw.CantOpenError, StoreIOError, "the database file cannot be opened"),
    (apsw.IOError, StoreIOError, "the disk failed"),
)


def translate(error: BaseException) -> BaseException:
    """Our error for one of the database's; any other error as it is."""
    if not isinstance(error, apsw.Error):
        return error
    for foreign, ours, meaning in _KINDS:
        if isinstance(error, foreign):
            made = ours(f"{meaning} ({error})")
            break
    else:
        made = StoreError(f"the store refused a write: {error}")
    made.__cause__ = error
    return made
