"""`trio-gateway doctor`: what is well, what is not, and what to do about it. Changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final

import apsw
import attrs

from ._config import Config, format_duration, parse_duration
from ._errors import StoreError
from ._policy import plan_stop
from .store import StoreReader, holder_of, read_store
from .store._sqlite import require_sqlite

STOP_LIMIT: Final = "TRIO_GATEWAY_STOP_LIMIT"
"""Tells how long whoever runs the container waits before it kills, like 30s."""

LITTLE_DISK: Final = 500 * 1024**2
NO_DISK: Final = 16 * 1024**2
SYSTEMCTL_PATIENCE: Final = 3.0
"""Seconds that systemctl gets to answer."""


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@attrs.frozen
class Finding:
    """What one check found. The text names the next step where there is one."""

    status: Status
    check: str
    found: str


def examine(
    config: Config,
    store: Path,
    environ: Mapping[str, str] = os.environ,
    processes: Path = Path("/proc"),
) -> list[Finding]:
    """Every finding about a store and a configuration, in a fixed order.

    `processes` is where the system shows its processes.
    """
    path = store.absolute()
    # Who holds the lock comes after the permissions: asking makes the lock private.
    findings = [_sqlite(), *_permissions(path), *_disk(path)]
    held, holder = _lock(path)
    findings.append(held)
    findings += _contents(path, holder)
    findings += _deadlines(config, environ, processes / (str(holder or "self")) / "cgroup")
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
            return [*_store(path, reader), *_open(reader, holder), *_for_people(reader)]
        finally:
            reader.close()
    except (StoreError, apsw.Error) as error:
        return [Finding(Status.FAIL, "store", str(error))]


def _store(path: Path, reader: StoreReader) -> list[Finding]:
    wrong = reader.check()
    if not wrong:
        return [Finding(Status.OK, "store", f"{path} is readable and sound")]
    advice = "stop the gateway, keep a copy of the file, and restore a backup"
    return [Finding(Status.FAIL, "store", f"{path}: {problem}: {advice}") for problem in wrong]


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


def _deadlines(config: Config, environ: Mapping[str, str], cgroup: Path) -> Iterator[Finding]:
    drain = config.sections.drain
    plan = plan_stop(drain.grace, drain.budget)
    for warning in config.warnings():
        yield Finding(Status.WARN, "deadlines", warning)
    yield Finding(
        Status.OK,
        "deadlines",
        f"a stop takes at most {_written(plan.budget)}, of which {_written(plan.grace)} for turns",
    )
    if (limit := environ.get(STOP_LIMIT)) is not None:
        yield _container_limit(limit, plan.budget)
    if (unit := unit_in(cgroup)) is not None:
        yield _systemd_limit(unit, plan.budget)


def _written(seconds: float) -> str:
    return format_duration(timedelta(milliseconds=round(seconds * 1000)))


def _container_limit(text: str, budget: float) -> Finding:
    try:
        limit = parse_duration(text).total_seconds()
    except ValueError as error:
        return Finding(Status.FAIL, "supervisor", f'{STOP_LIMIT}: {error}, got "{text}"')
    return _compare(STOP_LIMIT, limit, budget, f"give it more, or lower drain.budget below {text}")


def _compare(who: str, limit: float, budget: float, advice: str) -> Finding:
    told = f"{who} allows {_written(limit)} for a stop, drain.budget is {_written(budget)}"
    if budget > limit:
        return Finding(Status.FAIL, "supervisor", f"{told}: it would be killed before; {advice}")
    if budget == limit:
        return Finding(Status.WARN, "supervisor", f"{told}: leave a second between them")
    return Finding(Status.OK, "supervisor", told)


@attrs.frozen
class Unit:
    """A systemd service, and whether it belongs to a user's own systemd."""

    name: str
    user: bool


def unit_in(cgroup: Path) -> Unit | None:
    """The service that a process belongs to, from its /proc/PID/cgroup; None for a login shell."""
    try:
        path = cgroup.read_text("utf-8", "replace")
    except OSError:
        return None
    names = re.findall(r"/([^/\n]+\.(?:service|scope))(?=/|\n|$)", path)
    if not names or names[-1].endswith(".scope") or names[-1].startswith("user@"):
        return None
    return Unit(names[-1], user="/user@" in path)


def _systemd_limit(unit: Unit, budget: float) -> Finding:
    limit = _ask_systemctl(unit)
    if limit is None:
        return Finding(
            Status.WARN,
            "supervisor",
            f"systemd does not tell how long {unit.name} may take to stop; compare its"
            f" TimeoutStopSec with drain.budget ({_written(budget)}) yourself",
        )
    if limit == float("inf"):
        return Finding(Status.OK, "supervisor", f"{unit.name} may take any time to stop")
    advice = f"raise its TimeoutStopSec above {_written(budget)}, or lower drain.budget"
    return _compare(unit.name, limit, budget, advice)


def _ask_systemctl(unit: Unit) -> float | None:
    """Seconds, infinity, or None where there is no answer."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return None
    where = ["--user"] if unit.user else []
    command = [systemctl, *where, "show", "-p", "TimeoutStopUSec", "--", unit.name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=SYSTEMCTL_PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_timespan(done.stdout.decode("utf-8", "replace").partition("=")[2].strip())


_SPANS: Final = {
    "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
    "w": 604800.0, "month": 2629800.0, "y": 31557600.0,
}  # fmt: skip


def parse_timespan(text: str) -> float | None:
    """Seconds of a span as systemd writes it: `1min 30s`, `500ms`, `infinity`; else None."""
    if text == "infinity":
        return float("inf")
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if not parts or "".join(n + unit for n, unit in parts) != text.replace(" ", ""):
        return None
    if any(unit not in _SPANS for _, unit in parts):
        return None
    return sum(float(n) * _SPANS[unit] for n, unit in parts)
