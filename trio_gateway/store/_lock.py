"""One process per store: a lock of the operating system, which a dead process cannot keep."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from .._errors import StoreInUse, StoreIOError


class StoreLock:
    """Holds `<store>.lock` with flock(2). The file stays; what it says is only who held it last."""

    def __init__(self, store: Path) -> None:
        self.path = store.with_name(store.name + ".lock")
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises `StoreInUse`, naming the holder's pid, and `StoreIOError`."""
        fd = open_private(self.path)
        try:
            self._take(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _take(self, fd: int) -> None:
        try:
            locked = _locked(fd, fcntl.LOCK_EX, tries=3)
        except OSError as error:
            raise StoreIOError(
                f"{self.path} cannot be locked ({error.strerror}): name a store on a file system"
                " that can"
            ) from error
        if not locked:
            holder = _read_pid(fd)
            who = f"process {holder}" if holder else "another process"
            raise StoreInUse(
                f"{self.path.with_suffix('')} is in use by {who}: stop it first, or name"
                " another store",
                holder,
            )
        # A full disk has no room for the number: the lock is held all the same.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def holder_of(store: Path) -> int | None:
    """The pid of the process that has `store` open, or None when nobody has."""
    path = StoreLock(store).path
    if not path.exists():
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return None if _locked(fd, fcntl.LOCK_SH) else _read_pid(fd) or 0
    finally:
        os.close(fd)


def _locked(fd: int, kind: int, tries: int = 1) -> bool:
    """Take a lock if it is free. More than one try outlasts whoever only looks who holds it."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(0.02)
        else:
            return True
    return False


def _read_pid(fd: int) -> int | None:
    try:
        return int(os.pread(fd, 32, 0).strip() or b"0") or None
    except (ValueError, OSError):
        return None


def open_private(path: Path) -> int:
    """Open or create `path` so that nobody else can read it, whatever the umask; follow no link."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)
    except OSError as error:
        raise StoreIOError(
            f"{path} cannot be opened for writing ({error.strerror}): look at the folder and its"
            " permissions, or name another store"
        ) from error
    return fd
