"""A disk on strings: SQLite's own file layer, with faults put in, and a record of what went by.

    with Disk() as disk:
        ...                              # whatever opens a database now uses this disk
        disk.fault = Fault("full", 12)   # the twelfth operation from here on finds no room
        disk.record = Recording(folder)  # from here on, every change is written down, in order

Beside the files of SQLite, the store's lock file is on the disk, too.

On one point it is harder than a real one: SQLite overlooks some failures (a WAL that could not be
deleted at the end), and here whoever called SQLite hears of those as well. On one it is softer: the
WAL's index is memory that processes share, and is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import apsw
import attrs

from trio_gateway.store import _lock

from ._recording import Op, Recording
from ._worlds import REAL

# ----- what goes wrong

_ALL: Final = ("open", "write", "sync", "truncate", "delete", "size", "lock")
_GROWING: Final = ("open", "write", "sync", "truncate")


@attrs.frozen
class Kind:
    """One way to fail."""

    strikes: tuple[str, ...]
    """The operations that fail so, and that are counted."""
    full: bool = False
    """There is no room; else the disk is broken."""
    lasts: bool = False
    """Every later one of these operations fails, too."""
    half: bool = False
    """Half of it is written."""
    dead: bool = False
    """Nothing works afterwards, reading neither."""
    lost: bool = False
    """What it was to save stays readable until the power goes, and is gone then: what Linux may do
    when writing back has failed, whose next fsync says that all is well."""


KINDS: Final = {
    "eio": Kind(_ALL),
    "eio for ever": Kind(_ALL, lasts=True),
    # Elsewhere SQLite says the same for a full disk as for a broken one.
    "full": Kind(("write",), full=True),
    "full for ever": Kind(_GROWING, full=True, lasts=True),
    "short": Kind(("write",), full=True, half=True),
    "torn": Kind(("write",), half=True, dead=True),
    "sync for ever": Kind(("sync",), lasts=True),
    "lost": Kind(("sync",), lost=True),
    "power": Kind(_ALL, dead=True),
    "read": Kind(("read",)),
    "read for ever": Kind(("read",), lasts=True),
}


@attrs.define
class Fault:
    """What goes wrong, and at which operation (from 1).

    `only` looks at the name of the operation and of the file, and says whether it counts. `struck`
    is called with both when it comes to it, `after` at each operation from then on, with their
    number.
    """

    name: str
    at: int = 1
    only: Callable[[str, str], bool] = lambda operation, file: True
    struck: Callable[[str, str], None] = lambda operation, file: None
    after: Callable[[int], None] = lambda count: None
    kind: Kind = attrs.field(init=False)
    seen: int = 0
    later: int = 0

    def __attrs_post_init__(self) -> None:
        self.kind = KINDS[self.name]

    @property
    def reached(self) -> bool:
        """Whether it has come to it."""
        return self.seen >= self.at

    def strikes(self, operation: str, file: str) -> bool:
        """Whether this operation is to fail."""
        if self.reached:
            self.later += 1
            self.after(self.later)
            if self.kind.dead:
                return True
        if operation not in self.kind.strikes or not self.only(operation, file):
            return False
        self.seen += 1
        if self.seen == self.at:
            self.struck(operation, file)
        return self.seen == self.at or (self.seen > self.at and self.kind.lasts)


_ERRORS: Final[dict[str, tuple[type[apsw.Error], int]]] = {
    "open": (apsw.CantOpenError, apsw.SQLITE_CANTOPEN),
    "read": (apsw.IOError, apsw.SQLITE_IOERR_READ),
    "write": (apsw.IOError, apsw.SQLITE_IOERR_WRITE),
    "sync": (apsw.IOError, apsw.SQLITE_IOERR_FSYNC),
    "truncate": (apsw.IOError, apsw.SQLITE_IOERR_TRUNCATE),
    "delete": (apsw.IOError, apsw.SQLITE_IOERR_DELETE),
    "size": (apsw.IOError, apsw.SQLITE_IOERR_FSTAT),
    "lock": (apsw.IOError, apsw.SQLITE_IOERR_LOCK),
}
"""What SQLite's file layer makes of a failing call. That there is no room, it says of a write only.
"""


_INJECTED: Final = "(injected)"


def _error(operation: str, full: bool) -> apsw.Error:
    made, code = _ERRORS[operation]
    if full and operation == "write":
        made, code = apsw.FullError, apsw.SQLITE_FULL
    error: Any = made(f"{operation}: {errno.errorcode[_errno(full)]} {_INJECTED}")
    error.extendedresult = code
    made_error: apsw.Error = error
    return made_error


def _errno(full: bool) -> int:
    return errno.ENOSPC if full else errno.EIO


# ----- the disk


class Disk(apsw.VFS):
    """The default disk for as long as the `with` block lasts."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.record: Recording | None = None
        self.operations: int = 0
        """How often it was asked for anything but reading."""
        super().__init__("faulty", REAL, makedefault=True)

    def __enter__(self) -> Disk:
        setattr(_lock, "os", _Os(self))  # noqa: B010 - a module is no place for a type checker
        setattr(_lock, "fcntl", _Fcntl(self))  # noqa: B010
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._overlook
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        setattr(_lock, "os", os)  # noqa: B010
        setattr(_lock, "fcntl", fcntl)  # noqa: B010
        sys.unraisablehook = self._unraisable
        self.unregister()

    def _overlook(self, found: sys.UnraisableHookArgs) -> None:
        """Where SQLite overlooks an error, Python would print it."""
        if not str(found.exc_value).endswith(_INJECTED):
            self._unraisable(found)

    def ask(self, operation: str, file: str) -> Kind | None:
        """Ask for one operation: raises if it fails, unless something is to be done first."""
        self.operations += operation != "read"
        fault = self.fault
        if fault is None or not fault.strikes(operation, file):
            return None
        if operation == "write" and fault.kind.half and not fault.later:
            return fault.kind
        if operation == "sync" and fault.kind.lost:
            return fault.kind
        raise _error(operation, fault.kind.full)

    def ask_system(self, operation: str, file: str) -> None:
        """The same for a file that is not SQLite's."""
        try:
            half = self.ask(operation, file)
        except apsw.Error:
            half = None if self.fault is None else self.fault.kind
        if half is not None:
            number = _errno(half.full)
            raise OSError(number, os.strerror(number), file)

    def note(self, op: Op) -> None:
        """Write down what was done, if it is to be."""
        if self.record is not None:
            self.record.add(op)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self.ask("delete", filename)
        super().xDelete(filename, syncdir)
        self.note(Op("delete", Path(filename).name, syncdir))


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._name = Path(self._path).name
        self._level = apsw.SQLITE_LOCK_NONE
        disk.ask("open", self._path)
        makes = bool(flags[0] & (apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL))
        # SQLite syncs the folder with the first sync of such a file, whether it made it or not.
        self._syncs_folder = makes and bool(flags[0] & apsw.SQLITE_OPEN_CREATE)
        super().__init__(REAL, name, flags)
        disk.note(Op("open", self._name))

    def xRead(self, amount: int, offset: int) -> bytes:
        self._disk.ask("read", self._path)
        return super().xRead(amount, offset)

    def xFileSize(self) -> int:
        self._disk.ask("size", self._path)
        return super().xFileSize()

    def xLock(self, level: int) -> None:
        try:
            self._disk.ask("lock", self._path)
            super().xLock(level)
        except apsw.IOError as error:
            if level != apsw.SQLITE_LOCK_EXCLUSIVE or self._level > apsw.SQLITE_LOCK_SHARED:
                raise
            # A reader that closes asks for a lock that it cannot have. SQLite does not mind; but
            # apsw would raise what it has seen here, unless it is this.
            raise apsw.BusyError(str(error)) from error
        self._level = level

    def xUnlock(self, level: int) -> None:
        super().xUnlock(level)
        self._level = level

    def xWrite(self, data: Any, offset: int) -> None:
        written = bytes(data)
        half = self._disk.ask("write", self._path)
        if half is not None:
            written = written[: len(written) // 2]
        super().xWrite(written, offset)  # pyright: ignore[reportUnknownMemberType] - a 3.12 type
        self._disk.note(Op("write", self._name, offset, written))
        if half is not None:
            raise _error("write", half.full)

    def xSync(self, flags: int) -> None:
        lost = self._disk.ask("sync", self._path)
        if lost is not None:
            self._disk.note(Op("lose", self._name))
            raise _error("sync", lost.full)
        super().xSync(flags)
        self._disk.note(Op("sync", self._name, self._syncs_folder))
        self._syncs_folder = False

    def xTruncate(self, newsize: int) -> None:
        self._disk.ask("truncate", self._path)
        super().xTruncate(newsize)
        self._disk.note(Op("truncate", self._name, newsize))


# ----- the store's lock file


class _Os:
    """What the lock asks the system for, as far as it goes to the disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._disk.ask_system("open", str(path))
        return os.open(path, flags, mode)

    def ftruncate(self, fd: int, length: int) -> None:
        self._disk.ask_system("truncate", "the lock file")
        os.ftruncate(fd, length)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._disk.ask_system("write", "the lock file")
        return os.pwrite(fd, data, offset)


class _Fcntl:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(fcntl, name)

    def flock(self, fd: int, operation: int) -> None:
        self._disk.ask_system("lock", "the lock file")
        fcntl.flock(fd, operation)
