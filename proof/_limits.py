"""What a machine can run out of, made small: a disk, memory, file descriptors, the processor, and
a wall clock that somebody sets.

Each is for one process alone. What needs a right or a tool that is not here raises `Skip` with the
reason, and with what would help.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

from ._platform import wait_until
from ._report import Skip


def need(tool: str) -> None:
    """Raise `Skip` unless the machine has this command."""
    if shutil.which(tool) is None:
        raise Skip(f"there is no {tool} here")


# ----- a disk


@attrs.frozen
class SmallDisk:
    """A file system of its own, and a ballast that fills it."""

    where: Path

    @property
    def _ballast(self) -> Path:
        return self.where / "ballast"

    def fill(self) -> None:
        """Take all the room that is left, to the last byte."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"\0" * size)

    def make_room(self) -> None:
        """Give it back."""
        self._ballast.unlink()


@contextmanager
def small_disk(where: Path, megabytes: int) -> Generator[SmallDisk]:
    """A tmpfs of that size at `where`."""
    need("mount")
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "proof", str(where)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Skip(f"cannot mount a tmpfs ({_first_line(done.stderr)}): run it as root")
    try:
        yield SmallDisk(where)
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


# ----- limits of one process


def limit(pid: int, which: int, value: int) -> None:
    """Set a soft limit of a running process; the hard one stays, so that it can be taken back."""
    _, hard = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (value, hard))


def unlimit(pid: int, which: int) -> None:
    """Take the soft limit back."""
    _, hard = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (hard, hard))


def under(limit: str, value: int) -> tuple[str, ...]:
    """Starts a process under a soft limit: `under("nofile", 12)`."""
    need("prlimit")
    return ("prlimit", f"--{limit}={value}:", "--")


def fds(pid: int) -> list[int]:
    """The descriptors that a process has open."""
    return [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def status_of(pid: int, field: str) -> int:
    """A number of `/proc/PID/status`; sizes there are in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise AssertionError(f"/proc/{pid}/status has no {field}")


# ----- control groups, of either version

_GROUPS: Final = Path("/sys/fs/cgroup")


@attrs.frozen
class Group:
    """A control group for one gateway, and for one life after the other."""

    path: Path

    @property
    def inside(self) -> tuple[str, ...]:
        """Starts a process in it."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"))

    @property
    def oom_kills(self) -> int:
        """How often the kernel's OOM killer has struck here."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.path / name).exists():
                words = (self.path / name).read_text().split()
                return int(words[words.index("oom_kill") + 1])
        return 0

    def freeze(self) -> None:
        """Let nothing in it run, and wait until nothing does."""
        if (self.path / "cgroup.freeze").exists():
            (self.path / "cgroup.freeze").write_text("1")
            events = self.path / "cgroup.events"
            wait_until(lambda: "frozen 1" in events.read_text(), "a frozen group")
        else:
            state = self.path / "freezer.state"
            state.write_text("FROZEN")
            wait_until(lambda: state.read_text().strip() == "FROZEN", "a frozen group")

    def thaw(self) -> None:
        """Let it run again."""
        if (self.path / "cgroup.freeze").exists():
            (self.path / "cgroup.freeze").write_text("0")
        else:
            (self.path / "freezer.state").write_text("THAWED")


@contextmanager
def memory_group(megabytes: int) -> Generator[Group]:
    """A group that may use so much memory, and no swap."""
    places = (_GROUPS / "memory", _GROUPS)
    with _group(places, ("memory.limit_in_bytes", "memory.max")) as group:
        for name in ("memory.limit_in_bytes", "memory.max"):
            if (group.path / name).exists():
                (group.path / name).write_text(str(megabytes << 20))
        if (group.path / "memory.swap.max").exists():
            (group.path / "memory.swap.max").write_text("0")
        yield group


@contextmanager
def freezer_group() -> Generator[Group]:
    """A group that can be frozen."""
    places = (_GROUPS / "unified", _GROUPS, _GROUPS / "freezer")
    with _group(places, ("cgroup.freeze", "freezer.state")) as group:
        yield group


@contextmanager
def _group(places: tuple[Path, ...], wanted: tuple[str, ...]) -> Generator[Group]:
    """A new group at the first of those places that gives it one of the files that are wanted."""
    for place in places:
        if not (place / "cgroup.procs").exists():
            continue
        with suppress(OSError):
            path = Path(tempfile.mkdtemp(prefix="proof-", dir=place))
            if any(os.access(path / name, os.W_OK) for name in wanted):
                break
            path.rmdir()
    else:
        raise Skip(
            f"no control group with {' or '.join(wanted)} can be made in {_GROUPS}: run it as root,"
            " with the controller enabled"
        )
    try:
        yield Group(path)
    finally:
        wait_until(lambda: _removed(path), f"an empty group {path}")


def _removed(path: Path) -> bool:
    with suppress(OSError):
        path.rmdir()
    return not path.exists()


# ----- a wall clock


@attrs.frozen
class WallClock:
    """The wall clock of processes that are started with `env`, to be set while they run. What the
    machine counts by itself (the monotonic clocks) goes on as ever."""

    file: Path
    library: Path

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to live by it."""
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            # Else it makes Python's threads wait for each other for seconds.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "NO_FAKE_STAT": "1",
        }

    def set(self, offset: int) -> None:
        """Set it so many seconds ahead of the real one."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(f"{offset:+d}\n")
        fresh.replace(self.file)

    def tidy_up(self, pid: int) -> None:
        """Remove what a process that lived by it, and was killed, has left behind."""
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            (Path("/dev/shm") / name).unlink(missing_ok=True)


def wall_clock(folder: Path) -> WallClock:
    """A clock that can be set, by `libfaketime`."""
    for place in ("lib/*/faketime", "lib/faketime", "lib64/faketime", "local/lib/faketime"):
        for library in Path("/usr").glob(f"{place}/libfaketimeMT.so.1"):
            clock = WallClock(folder / "clock", library)
            clock.set(0)
            return clock
    raise Skip("libfaketime is not here: apt-get install faketime")


def other_uptime(seconds: int) -> tuple[str, ...]:
    """Starts a process in a time namespace in which the machine has been up so much longer."""
    need("unshare")
    start = ("unshare", "--time", "--boottime", str(seconds), "--monotonic", str(seconds), "--")
    read = "import time; print(time.clock_gettime(time.CLOCK_BOOTTIME))"
    done = subprocess.run(
        [*start, sys.executable, "-c", read], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Skip(f"no time namespaces ({_first_line(done.stderr)}): run it as root")
    if float(done.stdout) < seconds:
        raise Skip("a process enters its time namespace with its children only: a newer kernel")
    return start


def _first_line(text: str) -> str:
    """What a command says went wrong, without what it says about that, and without our paths."""
    return (text.splitlines() or ["it does not say why"])[0].rpartition(": ")[2].rstrip(".")
