"""One process per store: a lock of the operating system, which a dead process cannot keep."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from .._errors import StoreInUse, StoreIOError


class StoreLock:
    """Holds `<store>.lock` with flock(2). The file stays; what it says is only who held it last."""

    def __init__(self, store: Path) -> None:
        self.path = store.with_name(store.name + ".lock")
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock. Raises `StoreInUse`, naming the holder's pid."""
        fd = open_private(self.path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_pid(fd)
            os.close(fd)
            who = f"process {holder}" if holder else "another process"
            raise StoreInUse(
                f"{self.path.with_suffix('')} is in use by {who}: stop it first, or name"
                " another store",
                holder,
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give the lock back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def holder_of(store: Path) -> int | None:
    """The pid of the process that has `store` open, or None when nobody has."""
    lock = StoreLock(store)
    if not lock.path.exists():
        return None
    try:
        lock.acquire()
    except StoreInUse as error:
        return error.pid or 0
    lock.release()
    return None


def _read_pid(fd: int) -> int | None:
    try:
        return int(os.pread(fd, 32, 0).strip() or b"0") or None
    except ValueError:
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
