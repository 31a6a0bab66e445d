"""`trio-gateway doctor`: what is well, what is not, and what to do about it. Changes nothing."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import apsw

from ._allowance import Finding, Status, Unit, compare, unit_in, written
from ._config import Config
from ._errors import StoreError, words_of
from ._policy import plan_stop
from .store import SENSELESS, StoreReader, holder_of, read_store
from .store._sqlite import require_sqlite

LITTLE_DISK: Final = 500 * 1024**2
NO_DISK: Final = 16 * 1024**2


def examine(
    config: Config,
    store: Path,
    environ: Mapping[str, str] = os.environ,
    processes: Path = Path("/proc"),
    unit: Unit | None = None,
) -> list[Finding]:
    """Every finding about a store and a configuration, in a fixed order.

    `processes` is where the system shows its processes; `unit` is the service to compare with,
    in place of the one that the gateway or this process belongs to.
    """
    path = store.absolute()
    # Who holds the lock comes after the permissions: asking makes the lock private.
    findings = [_sqlite(), *_permissions(path), *_disk(path)]
    held, holder = _lock(path)
    findings.append(held)
    findings += _contents(path, holder)
    unit = unit or unit_in(processes / str(holder or "self") / "cgroup")
    findings += _deadlines(config, environ, unit)
    return findings


# ----- the library, the files, the disk


def _sqlite() -> Finding:
    try:
        require_sqlite()
    except StoreError as error:
        return Finding(Status.FAIL, "sqlite", str(error))
    return Finding(Status.OK, "sqlite", apsw.sqlite_lib_version())


def _permissions(path: Path) -> Iterator[Finding]:
    yield _folder(path.parent)
    for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", ".lock"))):
        if (told := _mode(file)) is not None:
            yield told


def _folder(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding(Status.FAIL, "folder", f"{folder} is no folder: make it, or name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(Status.FAIL, "folder", f"{folder} cannot be written by this user")
    mode = folder.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        return Finding(
            Status.WARN, "folder", f"{folder} can be written by others: chmod go-w {folder}"
        )
    return Finding(Status.OK, "folder", f"{folder} can be written")


def _mode(file: Path) -> Finding | None:
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return Finding(Status.FAIL, "permissions", f"{file}: {error.strerror}")
    mode = stat.S_IMODE(about.st_mode)
    if mode & 0o077:
        return Finding(
            Status.FAIL,
            "permissions",
            f"{file} is {mode:04o}, so others can read conversations: chmod 600 {file}",
        )
    if about.st_uid != os.getuid():
        owner = f"user {about.st_uid}"
        return Finding(Status.WARN, "permissions", f"{file} belongs to {owner}, not to this one")
    return Finding(Status.OK, "permissions", f"{file} is {mode:04o}")


def _disk(path: Path) -> Iterator[Finding]:
    if not path.parent.is_dir():
        return
    free = shutil.disk_usage(path.parent).free
    told = f"{free / 1024**2:,.0f} MiB free at {path.parent}"
    if free < NO_DISK:
        yield Finding(Status.FAIL, "disk", f"{told}: no message can be accepted without room")
    elif free < LITTLE_DISK:
        yield Finding(Status.WARN, "disk", f"{told}: make room before it is full")
    else:
        yield Finding(Status.OK, "disk", told)


# ----- the store


def _lock(path: Path) -> tuple[Finding, int | None]:
    try:
        holder = holder_of(path)
    except StoreError as error:
        return Finding(Status.FAIL, "lock", str(error)), None
    if holder is None:
        return Finding(Status.OK, "lock", "no gateway has the store open"), None
    return Finding(Status.OK, "lock", f"a gateway has the store open: process {holder}"), holder


def _contents(path: Path, holder: int | None) -> list[Finding]:
    if not path.exists():
        return [Finding(Status.OK, "store", f"{path} is not there yet; the first start makes it")]
    try:
        reader = read_store(path)
        try:
            return [
                *_store(path, reader),
                *_rows(reader),
                *_open(reader, holder),
                *_for_people(reader),
            ]
        finally:
            reader.close()
    except (StoreError, apsw.Error, *SENSELESS) as error:
        return [Finding(Status.FAIL, "store", words_of(error))]


def _store(path: Path, reader: StoreReader) -> list[Finding]:
    wrong = reader.check()
    if not wrong:
        return [Finding(Status.OK, "store", f"{path} is readable and sound")]
    advice = "stop the gateway, keep a copy of the file, and restore a backup"
    return [Finding(Status.FAIL, "store", f"{path}: {problem}: {advice}") for problem in wrong]


def _rows(reader: StoreReader) -> Iterator[Finding]:
    if astray := reader.astray():
        told = ", ".join(astray)
        yield Finding(
            Status.FAIL,
            "messages",
            f"rows were damaged, and no start will answer {told}: send these again under other ids",
        )


def _open(reader: StoreReader, holder: int | None) -> Iterator[Finding]:
    counts = reader.counts()
    yield Finding(
        Status.OK,
        "open",
        f"{counts.running} running, {counts.resume_pending} to resume,"
        f" {counts.waiting} messages waiting, {counts.undelivered} replies on their way",
    )
    channels = Counter(
        turn.session.channel for turn in reader.open_turns() if turn.state == "RESUME_PENDING"
    )
    if channels and holder is not None:
        told = ", ".join(f"{channel} ({n})" for channel, n in sorted(channels.items()))
        yield Finding(
            Status.WARN,
            "channels",
            f"turns wait to be resumed until their channel connects: {told}",
        )


def _for_people(reader: StoreReader) -> Iterator[Finding]:
    counts = reader.counts()
    for name, command, n in (
        ("quarantine", "quarantine", counts.quarantined),
        ("dead letters", "dead-letters", counts.dead_letters),
    ):
        if n:
            told = f"{n} wait for somebody: trio-gateway {command} list"
            yield Finding(Status.WARN, name, told)
        else:
            yield Finding(Status.OK, name, "none")


# ----- deadlines


def _deadlines(config: Config, environ: Mapping[str, str], unit: Unit | None) -> Iterator[Finding]:
    drain = config.sections.drain
    plan = plan_stop(drain.grace, drain.budget)
    for warning in config.warnings():
        yield Finding(Status.WARN, "deadlines", warning)
    yield Finding(
        Status.OK,
        "deadlines",
        f"a stop takes at most {written(plan.budget)}, of which {written(plan.grace)} for turns",
    )
    yield from compare(plan.budget, environ, unit)
