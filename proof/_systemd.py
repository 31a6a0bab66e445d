"""A systemd of our own: the real one, as number 1 of private namespaces, with our units only.

    with Systemd(folder) as systemd:        # the units are in folder/units
        systemd.ctl("start", "gateway.service")
        systemd.show("gateway.service", "Result", "NRestarts")

The files of this machine are shared with it. `/run`, `/etc/systemd`, the process numbers, the
mounts and its tree of cgroups are its own, so that it sees, starts and stops nothing of this
machine, and everything in it ends when its number 1 does. It boots in about 0.1 s.
"""

from __future__ import annotations

import itertools
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ._platform import PATIENCE
from ._report import Skip

UNITS: Final = Path(__file__).parent / "units"
"""What systemd needs besides ours: the targets that it starts and stops by."""

BOOT: Final = """
set -eu
echo $$ >"$CGROUP/cgroup.procs"
exec setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork \
    --kill-child=SIGKILL --cgroup --uts --ipc bash -euc '
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /run/systemd/system /run/lock
    umount -l /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount -t tmpfs tmpfs /etc/systemd
    : >/etc/systemd/system.conf
    mount --bind "$CONSOLE" /dev/console
    exec env -i container=proof PATH="$PATH" SYSTEMD_UNIT_PATH="$UNITS" \
        SYSTEMD_GENERATOR_PATH=/nonexistent SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nonexistent \
        "$SYSTEMD" --system --show-status=no --log-target=console
'
"""

_numbers = itertools.count()


def program() -> Path | None:
    """Where systemd is, if it is."""
    places = (Path("/lib/systemd/systemd"), Path("/usr/lib/systemd/systemd"))
    return next((place for place in places if place.exists()), None)


def cgroups() -> Path | None:
    """Where the tree of cgroups (version 2) is mounted, if it is and may be written."""
    for place in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (place / "cgroup.procs").exists() and os.access(place, os.W_OK):
            return place
    return None


def check_machine() -> None:
    """Raise `Skip` where no systemd of our own can be booted, with what would help."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Skip("needs root on Linux for private namespaces: run it with sudo")
    if program() is None:
        raise Skip("there is no systemd: apt-get install systemd")
    if missing := [name for name in ("unshare", "nsenter", "setpriv") if not shutil.which(name)]:
        raise Skip(f"there is no {', '.join(missing)}: apt-get install util-linux")
    if cgroups() is None:
        raise Skip(
            "needs a cgroup2 file system that may be written: a privileged container has one"
        )
    if not Path("/dev/console").exists():
        raise Skip("there is no /dev/console: a container has one with docker run -t")


class Systemd:
    """One systemd, which may die and boot again. `folder` has its units and gets its console."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._units = folder / "units"
        shutil.copytree(UNITS, self._units)
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._cgroup: Path | None = None

    def __enter__(self) -> Systemd:
        self.boot()
        return self

    def __exit__(self, *exception: object) -> None:
        self.die()

    def write_unit(self, name: str, text: str) -> None:
        """Make or change a unit. One that systemd knows already needs `reload`."""
        path = self._units / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    @property
    def pid(self) -> int:
        """The process beneath which all of its processes are."""
        return self._process.pid if self._process is not None else 0

    # ----- its life

    def boot(self) -> None:
        """Start it, and wait until it serves. Raises `AssertionError` if it does not."""
        self._make_cgroup()
        master, slave = pty.openpty()
        threading.Thread(target=self._keep_console, args=(master,), daemon=True).start()
        try:
            self._process = subprocess.Popen(
                ["bash", "-c", BOOT], env=self._environment(os.ttyname(slave)),
                stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, start_new_session=True,
            )  # fmt: skip
            self._wait_booted(slave)
        except BaseException:
            self.die()
            raise
        finally:
            os.close(slave)

    def die(self) -> None:
        """Kill its number 1 and with it, at the same moment, everything that it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.kill(self._init or self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            self._process.kill()
            self._process.wait(PATIENCE)
        self._process, self._init = None, 0
        self._remove_cgroup()

    def power_off(self) -> None:
        """Let it stop everything in order, as a machine that is switched off, and wait."""
        assert self._process is not None
        self.ctl("--no-block", "poweroff", check=False)
        self._process.wait(PATIENCE)
        self._process, self._init = None, 0
        self._remove_cgroup()

    @property
    def console(self) -> str:
        """What it has said, in all of its lives."""
        path = self._folder / "console.txt"
        said = path.read_text(errors="replace") if path.exists() else ""
        return re.sub(r"[\r\n]+", "\n", said)

    # ----- talking to it

    def ctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`systemctl`, inside."""
        enter = ["nsenter", "-t", str(self._init), "-m", "-p", "-C", "-u", "-i", "--"]
        done = subprocess.run(
            [*enter, "systemctl", "--no-pager", *words],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"systemctl {words}: {done.returncode} {done.stderr}")
        return done

    def show(self, unit: str, *properties: str) -> Mapping[str, str]:
        """What it says of a unit."""
        said = self.ctl("show", unit, "-p", ",".join(properties)).stdout
        return MappingProxyType(dict(line.split("=", 1) for line in said.splitlines() if line))

    # ----- how

    def _environment(self, console: str) -> dict[str, str]:
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "CGROUP": str(self._cgroup),
            "CONSOLE": console,
            "UNITS": str(self._units),
            "SYSTEMD": str(program()),
        }

    def _wait_booted(self, slave: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            self._init = self._init or self._find_init()
            if self._init and self._is_up():
                return
            time.sleep(0.01)
        raise AssertionError(f"systemd did not come up: {self.console[-2000:]}")

    def _is_up(self) -> bool:
        said = self.ctl("is-system-running", check=False).stdout.strip()
        return said in ("running", "degraded")

    def _find_init(self) -> int:
        for pid in children(self.pid):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                    return pid
        return 0

    def _keep_console(self, master: int) -> None:
        # A terminal that nobody reads is full some day, and systemd would wait for it.
        with (self._folder / "console.txt").open("ab") as kept:
            with suppress(OSError):
                while said := os.read(master, 65536):
                    kept.write(said)
                    kept.flush()
            os.close(master)

    def _make_cgroup(self) -> None:
        place = cgroups()
        assert place is not None
        self._cgroup = place / f"proof-{os.getpid()}-{next(_numbers)}"
        self._cgroup.mkdir()

    def _remove_cgroup(self) -> None:
        """Remove its tree of cgroups; the kernel lets go of the dead a moment later."""
        if self._cgroup is None:
            return
        deadline = time.monotonic() + PATIENCE
        for place, _, _ in os.walk(self._cgroup, topdown=False):
            while time.monotonic() < deadline:
                try:
                    Path(place).rmdir()
                    break
                except OSError:
                    time.sleep(0.01)
        self._cgroup = None


def children(pid: int) -> Iterator[int]:
    """The children of a process, its threads' included."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, path.read_text().split())


def below(pid: int) -> Iterator[int]:
    """Every process below one, parents first."""
    for child in children(pid):
        yield child
        yield from below(child)


def gateway_below(pid: int) -> int | None:
    """The gateway among the processes below one, as this machine numbers it."""
    for found in below(pid):
        with suppress(OSError):
            if b"trio_gateway" in Path(f"/proc/{found}/cmdline").read_bytes():
                return found
    return None
