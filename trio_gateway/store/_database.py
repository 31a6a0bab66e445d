"""The database library, as far as this store uses it, with types that are whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, TypeAlias, cast

import apsw

from .._errors import (
    GatewayError,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreIOError,
    StoreSchemaError,
    words_of,
)

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
    (apsw.SQLError, StoreSchemaError, "its tables are not those of a gateway"),
    (apsw.ReadOnlyError, StoreIOError, "the database cannot be written: look at its permissions"),
    (apsw.CantOpenError, StoreIOError, "the database file cannot be opened"),
    (apsw.IOError, StoreIOError, "the disk failed"),
)


def select(db: Database, statement: str, values: Values = ()) -> list[Row]:
    """All rows of a query.

    What the database calls text need not be one, if a bit fell over: then what is no UTF-8 in it
    is read as an escape (`\\xff`), so that one bad row does not keep the others from being read.
    """
    try:
        return list(db.execute(statement, values))
    except UnicodeDecodeError:
        return _select_leniently(db, statement, values)


def _select_leniently(db: Database, statement: str, values: Values) -> list[Row]:
    import apsw.ext  # slow to import, and never needed while all is well

    info: Any = apsw.ext
    count = len(info.query_info(db, statement).description)
    names = [f"c{n}" for n in range(count)]
    cells = ", ".join(f"typeof({name}) = 'text', {_raw(name)}" for name in names)
    given = f"WITH given ({', '.join(names)}) AS MATERIALIZED ({statement}) "
    found = db.execute(given + f"SELECT {cells} FROM given", values)  # noqa: S608 - our own words
    return [
        tuple(
            cell.decode(errors="backslashreplace") if is_text else cell
            for is_text, cell in zip(row[::2], row[1::2], strict=True)
        )
        for row in found
    ]


def _raw(name: str) -> str:
    return f"CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END"


SENSELESS: Final = (TypeError, ValueError, OverflowError)
"""What comes of a row that makes no sense; callers' values were looked at before. A page that took
another's place shows what is in it as rows of another table, of any type."""


def translate(error: BaseException) -> BaseException:
    """Our error for one of the database's, and for what comes of a row that makes no sense; any
    other error as it is."""
    made: StoreError
    if isinstance(error, SENSELESS) and not isinstance(error, GatewayError):
        made = StoreCorrupt(
            f"a row of the database makes no sense ({type(error).__name__}: {words_of(error)})"
        )
        made.__cause__ = error
        return made
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
