"""The guard: the small process between a gateway and the program that it runs.

    gateway --- lifeline (a socket) ---> guard, leader of a session of its own
                                           '--> program, in the guard's process group

It starts the program, tells how that ended, and waits. When the other end of the lifeline is
closed, on purpose or because the kernel closed it for a gateway that was killed, it kills its whole
session and with it itself. There is no other way for it to end, so its number stays taken, and
nothing can be killed that only happens to have the same one.

Run as `python -I -S _guard.py FD LC_CTYPE COMMAND...`; imports nothing but the standard library,
and of that as little as can be: it starts with every turn.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from types import FrameType

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
         signal.SIGQUIT, signal.SIGALRM, signal.SIGCHLD)  # fmt: skip
"""Signals that a process group may be sent, and that must not end its guard."""

SCANS = 100
"""Rounds through the session's processes at the most, should one go on making more."""


def main() -> None:
    """Guard one program until the lifeline is cut."""
    if os.getpgrp() != os.getpid():
        sys.exit("the guard needs a process group of its own: it is started by ProcessAgent only")
    lifeline, locale, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.set_inheritable(lifeline, False)
    wake, waker = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in HEARD:
        signal.signal(number, _hear)
    environment = dict(os.environ)
    environment.pop("LC_CTYPE", None)  # Python sets it for itself in a bare environment
    if locale:
        environment["LC_CTYPE"] = locale
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    program = os.fork()
    if not program:
        _become(command, environment, lifeline)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _let_go()
    _watch(program, lifeline, wake)


def _hear(_number: int, _frame: FrameType | None) -> None:
    """Not the guard's business. A handler, because what is ignored stays ignored in the program."""


def _become(command: list[str], environment: dict[str, str], lifeline: int) -> None:
    """In the forked process: be the program, or say why not (`e`, and an errno)."""
    try:
        for number in (*HEARD, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(lifeline, b"e%d\n" % (error.errno or 0))
    finally:
        os._exit(127)


def _let_go() -> None:
    """Keep no end of the program's pipes: who reads them is to see when the program closes them."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)


def _watch(program: int, lifeline: int, wake: int) -> None:
    """Tell how the program ends (`x`, and its exit code, or minus a signal), and go on."""
    told = False
    poll = select.poll()  # any number: that of the lifeline may be high
    poll.register(lifeline, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        if not told:
            ended, status = os.waitpid(program, os.WNOHANG)
            if told := bool(ended):
                with suppress(OSError):
                    os.write(lifeline, b"x%d\n" % os.waitstatus_to_exitcode(status))
        if any(fd == lifeline for fd, _ in poll.poll()):
            _kill_all()
        with suppress(BlockingIOError):
            os.read(wake, 4096)


def _kill_all() -> None:
    """Kill the session. Most of it is one group; what made a group of its own (`timeout`, a shell
    with job control) is found where the system has a /proc."""
    for _ in range(SCANS):
        found = _others_in_session()
        if not found:
            break
        for process in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _others_in_session() -> list[int]:
    own = os.getpid()
    with suppress(OSError):
        numbers = [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal()]
        return [number for number in numbers if number != own and _is_alive_in(own, number)]
    return []


def _is_alive_in(session: int, process: int) -> bool:
    try:
        stat = _read(f"/proc/{process}/stat")
    except OSError:
        return False
    state, _parent, _group, its_session, *_ = stat.rpartition(b")")[2].split()
    return int(its_session) == session and state not in (b"Z", b"X")


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
