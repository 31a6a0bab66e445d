"""The bearer token: made once, beside the store, for the eyes of the store's owner alone."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from .._errors import ConfigError

SHORTEST: Final = 16
"""Characters; what is shorter can be guessed."""

LONGEST: Final = 4096


def token_path(store: Path) -> Path:
    """Where the token of a store lives: beside it."""
    return store.with_name(store.name + ".token")


def read_token(path: Path) -> str:
    """The token in the file at `path`; made, readable by its owner only, if there is none.

    Raises `ConfigError` for a file that others can read, or that holds no token.
    """
    with suppress(FileExistsError):
        _make(path)
    text = read_private(path, "the token")
    if len(text) < SHORTEST or not text.isascii() or any(one.isspace() for one in text):
        raise ConfigError(
            f"{path}: no token of at least {SHORTEST} characters; delete the file, and the next"
            " start makes a new one"
        )
    return text


def read_private(path: Path, what: str) -> str:
    """The text of a file that only its owner can read. Raises `ConfigError`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be read: {error.strerror}") from error
    try:
        _check_private(path, what, os.fstat(fd))
        return os.read(fd, LONGEST).decode("ascii", "replace").strip()
    finally:
        os.close(fd)


def _make(path: Path) -> None:
    """Write a new token where there is none: whole, or not at all. Raises `FileExistsError`."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(path)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(fd, 0o600)
            os.write(fd, f"{secrets.token_urlsafe(32)}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: the token cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            fresh.unlink()


def _check_private(path: Path, what: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: {what} is no file")
    if found.st_mode & 0o077:
        raise ConfigError(f"{path}: others can read {what}: chmod 600 {path}")
