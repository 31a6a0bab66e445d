"""What a store has been, commit after commit, and what of it must be there when the power has gone.

A recording (`_recording.py`) is read once, from front to back. After each commit the store is
opened as it is then, and everything in it is read: these are its states, in order. A store that a
power cut leaves must be one of them exactly: nothing half-made is a state. Which of them it may be
depends on when the power went: none older than what was promised, none newer than the commit at
hand. So one comparison covers every table, and every rule of the store needs to be looked at once
for each state, and not once for each of thousands of images.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeAlias

import apsw
import attrs

from trio_gateway.testing import violations

from ._recording import Commit, Medium, Op, Promise, Recording, read_files, write_files
from ._worlds import REAL

Rows: TypeAlias = dict[str, list[tuple[Any, ...]]]
"""Everything in a store, by table."""

TABLES: Final = (
    "store", "epoch", "cursor", "session", "message", "turn", "attempt", "step", "delivery",
)  # fmt: skip

NOTHING: Final[Rows] = {}


class Unreadable(Exception):
    """An image that is no sound database."""


def read_store(store: Path) -> Rows:
    """Open a store that nobody has open, let SQLite repair it, and read everything.

    Raises `Unreadable`. The files are left as SQLite's recovery leaves them.
    """
    if not store.exists():
        return NOTHING
    try:
        with closing(_connect(store)) as db:
            problems = [row[0] for row in db.execute("PRAGMA integrity_check")]
            if problems != ["ok"]:
                raise Unreadable("; ".join(map(str, problems)))
            made = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
            if not made:
                return NOTHING
            return {table: list(db.execute(f"SELECT * FROM {table}")) for table in TABLES}
    except apsw.Error as error:
        raise Unreadable(repr(error)) from error


def _connect(store: Path) -> Any:
    db: Any = apsw.Connection(str(store), flags=apsw.SQLITE_OPEN_READWRITE, vfs=REAL)
    # Alone, so that the WAL's index is kept in memory.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    return db


def digest(rows: Rows) -> bytes:
    """Short for everything in a store."""
    return hashlib.blake2b(repr(rows).encode(), digest_size=16).digest()


@attrs.frozen
class Bounds:
    """Which states a cut may leave: the first and the last, by number."""

    least: int
    most: int


@attrs.define
class Chronicle:
    """The states of a recorded store. State 0 is: no store at all."""

    states: list[Rows]
    _numbers: dict[bytes, list[int]]
    _bounds: list[Bounds]
    """For each number of entries that have passed."""
    _promised: list[tuple[int, int, Promise]]
    """In order: at which entry, from which state on it is kept, what."""

    @classmethod
    def of(cls, recording: Recording, folder: Path) -> Chronicle:
        """Read a recording. Raises `AssertionError` for a promise that no state keeps, and for a
        state that breaks a rule."""
        return _Reader(recording, folder).read()

    def bounds(self, passed: int) -> Bounds:
        """What the power may leave when so many entries have passed."""
        return self._bounds[passed]

    def number_of(self, rows: Rows, bounds: Bounds) -> int | None:
        """Which state this is, if it is one of those that may be."""
        for number in self._numbers.get(digest(rows), ()):
            if bounds.least <= number <= bounds.most:
                return number
        return None

    def describe(self, rows: Rows, passed: int) -> str:
        """What is wrong with a store that is none of the states that may be."""
        bounds = self.bounds(passed)
        may = f"it may be state {bounds.least} to {bounds.most} of {len(self.states) - 1}"
        numbers = self._numbers.get(digest(rows))
        if numbers is None:
            return f"half-made, no state that the store ever was; {may}\n{rows}"
        broken = [
            f"{promise.what} {promise.about}"
            for at, since, promise in self._promised
            if at < passed and since > numbers[-1]
        ]
        undone = f"broken: {broken}" if broken else "a commit that had returned is undone"
        return f"state {numbers[-1]}, but {may}; {undone}"


@attrs.define
class _Reader:
    """Reads a recording once."""

    recording: Recording
    folder: Path
    states: list[Rows] = attrs.field(factory=lambda: [NOTHING])
    _numbers: dict[bytes, list[int]] = attrs.field(factory=dict[bytes, "list[int]"])
    _named: list[Named] = attrs.field(factory=lambda: [Named()])
    _columns: dict[str, list[str]] = attrs.field(factory=dict[str, "list[str]"])
    _in_commit: bool = False

    def read(self) -> Chronicle:
        self._numbers[digest(NOTHING)] = [0]
        bounds = list(self._read_bounds())
        promised = [
            (at, self._kept_since(entry), entry)
            for at, entry in enumerate(self.recording.entries)
            if isinstance(entry, Promise)
        ]
        return Chronicle(self.states, self._numbers, self._raised(bounds, promised), promised)

    def _read_bounds(self) -> Iterator[Bounds]:
        """The bounds by the commits alone."""
        medium = Medium()
        returned = 0
        yield Bounds(0, 0)
        for entry in self.recording.entries:
            if isinstance(entry, Op):
                medium.do(entry)
            elif isinstance(entry, Commit):
                returned = self._pass_commit(entry, medium, returned)
            # While a store is made, it may be there already.
            ahead = self._in_commit or len(self.states) == 1
            yield Bounds(returned, len(self.states) - 1 + ahead)

    def _pass_commit(self, entry: Commit, medium: Medium, returned: int) -> int:
        """A commit begins or has returned; the number of the last state that is surely there."""
        first = len(self.states) == 1
        if entry.done or first or self._in_commit:
            # If one was begun and never returned, its process died, and it may have come through.
            self._look(medium)
        self._in_commit = not entry.done
        return len(self.states) - 1 if entry.done or first else returned

    def _look(self, medium: Medium) -> None:
        store = self.folder / "gateway.db"
        write_files(store, medium.kill())
        rows = read_store(store)
        if rows != self.states[-1]:
            broken = violations(store)
            assert not broken, f"state {len(self.states)} breaks rules: {broken}"
            self._numbers.setdefault(digest(rows), []).append(len(self.states))
            self.states.append(rows)
            self._columns = self._columns or _columns(store)
            self._named.append(_named(rows, self._columns))

    def _kept_since(self, promise: Promise) -> int:
        """From which state on a promise is kept for good."""
        kept = KEPT[promise.what]
        number = len(self.states)
        while number > 1 and kept(self._named[number - 1], *promise.about):
            number -= 1
        assert number < len(self.states), f"promised, and in no state: {promise}"
        return number

    def _raised(
        self, bounds: list[Bounds], promised: list[tuple[int, int, Promise]]
    ) -> list[Bounds]:
        """The bounds, with what was promised."""
        raised = list(bounds)
        least = 0
        waiting = iter([*promised, (len(bounds), 0, None)])
        at, since, _ = next(waiting)
        for passed, bound in enumerate(bounds):
            while at < passed:
                least = max(least, since)
                at, since, _ = next(waiting)
            if least > bound.least:
                raised[passed] = Bounds(least, bound.most)
        return raised


# ----- what a promise says of a store


def broken_promises(store: Path, promises: Iterable[Promise]) -> list[Promise]:
    """Those that a store does not keep. It is looked at in a copy, and stays as it is."""
    with tempfile.TemporaryDirectory(dir=store.parent) as where:
        copy = Path(where) / store.name
        write_files(copy, read_files(store))
        rows = read_store(copy)
        if not rows:
            return list(promises)
        state = _named(rows, _columns(copy))
    return [promise for promise in promises if not KEPT[promise.what](state, *promise.about)]


Named: TypeAlias = dict[str, list[dict[str, Any]]]
"""Everything in a store, by table and column."""


def _named(rows: Rows, columns: dict[str, list[str]]) -> Named:
    return {
        table: [dict(zip(columns[table], row, strict=True)) for row in found]
        for table, found in rows.items()
    }


def _columns(store: Path) -> dict[str, list[str]]:
    with closing(_connect(store)) as db:
        return {
            table: [row[1] for row in db.execute(f"PRAGMA table_info({table})")] for table in TABLES
        }


def _epoch(state: Named, epoch: int) -> bool:
    return any(row["id"] == epoch for row in state["epoch"])


def _begun(state: Named, turn: int, attempt: int) -> bool:
    return any(row["id"] == turn and row["attempt"] >= attempt for row in state["turn"])


def _marked(state: Named, turn: int, attempt: int) -> bool:
    return any(
        row["id"] == turn and (row["state"] != "RUNNING" or row["attempt"] > attempt)
        for row in state["turn"]
    )


def _settled(state: Named, turn: int, end: str) -> bool:
    return any(
        row["id"] == turn and row["state"] == end and row["settled_at"] for row in state["turn"]
    )


def _step(state: Named, turn: int, name: str) -> bool:
    return any(
        (row["turn"], row["name"], row["state"]) == (turn, name, "done") for row in state["step"]
    )


def _checkpoint(state: Named, turn: int) -> bool:
    return any(row["id"] == turn and row["checkpoint"] for row in state["turn"])


def _said(state: Named, turn: int, key: str, text: str) -> bool:
    whole = key.partition(".")[0]
    parts = [row for row in state["delivery"] if row["key"].partition(".")[0] == whole]
    return "".join(row["text"] for row in sorted(parts, key=_part)) == text


def _part(row: dict[str, Any]) -> int:
    part: int = row["part"]
    return part


def _delivered(state: Named, key: str) -> bool:
    return any(row["key"] == key and row["state"] == "delivered" for row in state["delivery"])


def _accepted(state: Named, channel: str, id: str) -> bool:
    return any((row["channel"], row["id"]) == (channel, id) for row in state["message"])


def _cursor(state: Named, channel: str, value: str) -> bool:
    return any(row["channel"] == channel and row["value"] >= value for row in state["cursor"])


KEPT: Final[dict[str, Callable[..., bool]]] = {
    "epoch": _epoch,
    "begun": _begun,
    "marked": _marked,
    "settled": _settled,
    "step": _step,
    "checkpoint": _checkpoint,
    "said": _said,
    "delivered": _delivered,
    "accepted": _accepted,
    "cursor": _cursor,
}
"""For each promise, whether a store keeps it."""
