"""A disk on strings: SQLite's own file layer, with faults put in.

    with Disk() as disk:
        ...                              # whatever opens a database now uses this disk
        disk.fault = Fault("full", 12)   # the twelfth operation from here on finds no room

Counted are the operations that change something, and reads if the fault is one of reading.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import apsw
import attrs

KINDS: Final = ("eio", "full", "eio for ever", "full for ever", "torn", "power", "read")

REAL: Final = apsw.vfs_names()[0]
"""The file layer that is SQLite's default without us."""


@attrs.define
class Fault:
    """What goes wrong, and at which operation (from 1).

    eio, full    that operation fails, once; "for ever": and every later one
    torn         half of a write is written, then every operation fails
    power        every operation fails from there on, reading too
    read         that reading fails, once

    `only` looks at the name of the operation and of the file, and says whether it counts.
    """

    kind: str
    at: int = 1
    only: Callable[[str, str], bool] = lambda operation, file: True
    seen: int = 0

    @property
    def reached(self) -> bool:
        """Whether it has come to it."""
        return self.seen >= self.at

    def strike(self, operation: str, file: str) -> bool:
        """Raise if this operation fails; True if it is to be torn."""
        if (operation == "read") != (self.kind == "read") and self.kind != "power":
            return False
        if not self.only(operation, file):
            return False
        if operation == "read" and self.kind == "power" and not self.reached:
            return False
        self.seen += 1
        if self.seen < self.at or (self.seen > self.at and self.kind in ("eio", "full", "read")):
            return False
        if self.kind == "torn" and self.seen == self.at and operation == "write":
            return True
        raise self.error()

    def error(self) -> apsw.Error:
        """What the kernel would say."""
        if self.kind.startswith("full"):
            return apsw.FullError("no room (a test)")
        return apsw.IOError(f"{errno.errorcode[errno.EIO]} (a test)")


class Disk(apsw.VFS):
    """The default disk for as long as the `with` block lasts."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        super().__init__("faulty", REAL, makedefault=True)

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unregister()

    def strike(self, operation: str, file: str) -> bool:
        """Raise if this operation fails; True if it is to be torn."""
        return self.fault is not None and self.fault.strike(operation, file)

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _File(self, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        self.strike("delete", filename)
        super().xDelete(filename, syncdir)


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        super().__init__(REAL, name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        self._disk.strike("read", self._name)
        return super().xRead(amount, offset)

    def xLock(self, level: int) -> None:
        try:
            super().xLock(level)
        except apsw.IOError as error:
            # A reader that closes asks for a lock that it cannot have. SQLite does not mind; but
            # apsw would raise what it has seen here, unless it is this.
            raise apsw.BusyError(str(error)) from error

    def xWrite(self, data: Any, offset: int) -> None:
        if self._disk.strike("write", self._name):
            super().xWrite(bytes(data)[: len(data) // 2], offset)
            raise apsw.IOError("torn (a test)")
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._disk.strike("sync", self._name)
        super().xSync(flags)

    def xTruncate(self, newsize: int) -> None:
        self._disk.strike("truncate", self._name)
        super().xTruncate(newsize)
