"""Signals, and the watchdog that keeps a stop within its budget whatever else happens.

    kernel --> Python's C handler --> byte into a pipe ------.
                      |                                       v
               our handler (main thread) --> note + byte --> desk thread --> the event loop
                                                              |   stop, show
                                                              '--> the watchdog's clock

Everything is decided on one thread of our own, the desk. It was started before anything else, so
that a handler, which may interrupt the main thread at any point and inside any lock, only has to
append to a deque and write a byte. The desk passes a stop on to the event loop, and keeps the
time: a loop that does not take the stop up (an agent blocks it) is told nothing more; the desk
marks the open turns by itself, and at the end of the budget it leaves by `os._exit`.

Three lines of defence, each for when the one before cannot act:

    the event loop     serves the stop; the ordinary way
    the desk           the main thread blocks: in Python (`time.sleep`), or in C without ever
                       coming back to run a handler; hence the byte from the C handler
    a thread in C      something holds the interpreter's lock and does not give it back:
                       `faulthandler` prints where and leaves with 1, without needing the lock

Asked twice, nothing changes, but for Ctrl-C: the second ends the drain's window, the third leaves.

SIGHUP has two meanings. To a process with a terminal the kernel sends it when that is gone: nobody
is there any more, so it stops. Anywhere else somebody has sent it on purpose: read the
configuration again.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import FrameType, MappingProxyType
from typing import Any, Final, Protocol, TypeVar

import attrs
import trio

from ._markers import ResumeReason
from ._policy import StopPlan, plan_stop

T = TypeVar("T")

STOPS: Final = MappingProxyType(
    {
        signal.SIGTERM: ResumeReason.SHUTDOWN,
        signal.SIGINT: ResumeReason.SHUTDOWN,
        signal.SIGHUP: ResumeReason.SHUTDOWN,
        signal.SIGUSR1: ResumeReason.RESTART,
    }
)
"""The signals that ask for a stop, and why its turns resume; HUP only from a terminal."""

EXIT_FAILURE: Final = 1
EXIT_RESTART: Final = 75
EXIT_INTERRUPTED: Final = 130

NOTICE_AFTER: Final = 1.0
"""Seconds after which a loop that did not act counts as blocked, if the budget is not shorter."""

LEAVE_MARKING: Final = 1.0
"""Seconds that the third Ctrl-C waits for the markers, at the most."""

STUMBLE: Final = 0.05
"""Seconds that the desk waits after an error of its own, so that it does not spin."""

_NOTE: Final = b"\xff"
_NUMBERS: Final = frozenset(range(1, signal.NSIG))


@attrs.frozen
class Stop:
    """A stop that somebody asked for. `now`: do not wait for open turns any longer."""

    reason: ResumeReason
    by: str
    now: bool = False


class House(Protocol):
    """What the desk serves. The first three are called in the event loop, the others on the desk's
    thread, which must not wait for a loop that may be blocked."""

    def stop(self, stop: Stop) -> None:
        """Stop the gateway, if there is one already. Called again with each further signal."""
        ...

    def reload(self) -> None:
        """Read the configuration again, as soon as that is possible."""
        ...

    def show(self) -> str:
        """The tasks and the open turns, for whoever sent SIGUSR2."""
        ...

    def mark(self, reason: ResumeReason, timeout: float) -> int | None:
        """Mark the open turns without the loop; how many, or None if it was not possible."""
        ...

    def flush(self, timeout: float) -> None:
        """Get the log out, as far as that takes no longer than `timeout` seconds."""
        ...


class Fuse:
    """The watchdog's clock: what is due when, once a stop has begun. Times are `time.monotonic`."""

    def __init__(self, plan: StopPlan) -> None:
        self.plan = plan
        self.lit_at: float | None = None
        self.marked = False

    def light(self, now: float) -> bool:
        """Start the clock; False if it runs already."""
        if self.lit_at is not None:
            return False
        self.lit_at = now
        return True

    @property
    def mark_at(self) -> float | None:
        """When the open turns must be marked without the loop, if they are not by then."""
        if self.lit_at is None or self.marked:
            return None
        return self.lit_at + min(NOTICE_AFTER, self.plan.mark)

    @property
    def leave_at(self) -> float | None:
        """When the process must leave."""
        return None if self.lit_at is None else self.lit_at + self.plan.budget - self.plan.spare

    @property
    def ends_at(self) -> float | None:
        """When the budget ends."""
        return None if self.lit_at is None else self.lit_at + self.plan.budget


class SignalDesk:
    """Takes the process's signals. One for each process; install it before anything heavy.

    Before `run`, and until the house has a gateway, a stop is remembered; if that takes longer
    than the budget, the watchdog leaves here too.
    """

    def __init__(self, plan: StopPlan | None = None) -> None:
        self._fuse = Fuse(plan or plan_stop())
        self._notes: deque[int | Stop | StopPlan] = deque()
        self._stop: Stop | None = None
        self._interrupts = 0
        self._stops = STOPS
        self._reloads = 0
        self._reloaded = 0
        self._shows = 0
        self._shown = 0
        self._show_by: float | None = None
        self._leave_by: tuple[float, int] | None = None
        self._house: House | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._before: dict[int, Any] = {}
        self._read_fd, self._write_fd = -1, -1
        self._stderr = 2
        self._thread = threading.Thread(target=self._keep, name="signal-desk", daemon=True)

    # ----- for the host, in the main thread

    def install(self) -> None:
        """Take TERM, INT, HUP (unless ignored: nohup), USR1 and USR2. In the main thread."""
        if not hangs_up():
            self._stops = MappingProxyType({n: STOPS[n] for n in STOPS if n != signal.SIGHUP})
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._stderr = _unblocking(2)
        self._thread.start()
        for number in (*STOPS, signal.SIGUSR2):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)

    def close(self) -> None:
        """Give the signals back. For whoever goes on living after the gateway."""
        if self._write_fd < 0:
            return
        write_fd, self._write_fd = self._write_fd, -1
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(write_fd)  # ends the desk's thread
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._read_fd)
        if self._stderr != 2:
            os.close(self._stderr)

    def use_plan(self, plan: StopPlan) -> None:
        """Keep this plan's budget. A stop that has begun is measured by it from its beginning."""
        self._fuse.plan = plan
        self._notes.append(plan)
        self._wake_desk()

    def run(self, house: House, main: Callable[[], Awaitable[T]]) -> T:
        """`trio.run(main)`, with the signals served by `house` in it."""
        self._house = house
        # Trio wants the one place for the C handler's byte for itself, and says so. Inside, it is
        # ours again: the desk wakes the loop as Trio's own byte would.
        signal.set_wakeup_fd(-1)
        try:
            return trio.run(self._attached, main)
        finally:
            self._token = None
            signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    async def _attached(self, main: Callable[[], Awaitable[T]]) -> T:
        trios = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._token = trio.lowlevel.current_trio_token()
        try:
            self.obey()
            return await main()
        finally:
            signal.set_wakeup_fd(trios, warn_on_full_buffer=False)

    def obey(self) -> None:
        """Hand what was asked so far to the house. In the event loop."""
        if self._house is None:
            return
        if self._stop is not None:
            self._house.stop(self._stop)
        if self._reloaded < self._reloads:
            self._reloaded = self._reloads
            self._house.reload()
        if self._shown < self._shows:
            self._shown = self._shows
            self._tell(self._house.show())

    def arm(self, reason: ResumeReason, by: str) -> None:
        """Keep the time of a stop that no signal asked for."""
        self._notes.append(Stop(reason, by))
        self._wake_desk()

    def marked(self) -> None:
        """The loop has marked the open turns, or has said that it could not."""
        self._fuse.marked = True

    def leave_within(self, seconds: float, code: int) -> None:
        """Everything is done: if the process is not gone in time, leave with `code` regardless.

        What keeps it is somebody else's: a thread of the agent's that does not end, say.
        """
        self._leave_by = (time.monotonic() + seconds, code)
        self._wake_desk()

    def take_no_more(self) -> None:
        """Ignore what comes now. Python gives the signals back to the kernel while it takes itself
        apart, and a second TERM would make an orderly end one by a signal."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    @property
    def asked(self) -> Stop | None:
        """The stop that somebody asked for, also before there was anything to stop."""
        return self._stop

    @property
    def time_left(self) -> float:
        """Seconds until the budget of the stop that is under way ends; all of it before."""
        ends_at = self._fuse.ends_at
        return self._fuse.plan.budget if ends_at is None else max(0.0, ends_at - time.monotonic())

    # ----- in a handler

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._notes.append(number)
        self._wake_desk()

    def _wake_desk(self) -> None:
        # A full pipe is fine (the desk has enough to wake up for), and so is none at all.
        with suppress(OSError):
            os.write(self._write_fd, _NOTE)

    def _forget(self) -> None:
        """In a forked child: its signals are its own, and must not be told to its parent's desk."""
        if self._write_fd < 0:
            return
        signal.set_wakeup_fd(-1)
        for number in self._before:
            on = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, on)
        os.close(self._write_fd)
        os.close(self._read_fd)
        self._write_fd = self._read_fd = -1

    # ----- on the desk's thread

    def _keep(self) -> None:
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        open_ = True
        while open_:
            try:
                open_ = self._serve(poll)
            except Exception:
                # A machine without memory, say. Nobody else keeps the time: what is due stays due.
                time.sleep(STUMBLE)

    def _serve(self, poll: select.poll) -> bool:
        """Wait for what comes next, and do it; False when the desk is closed."""
        if poll.poll(self._wait()):
            data = os.read(self._read_fd, 4096)
            if not data:
                return False
            self._read(data)
        self._act(time.monotonic())
        return True

    def _wait(self) -> float | None:
        """Milliseconds until something is due, or None."""
        due = [self._fuse.mark_at, self._fuse.leave_at, self._show_by]
        due.append(self._leave_by[0] if self._leave_by else None)
        times = [moment for moment in due if moment is not None]
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _read(self, data: bytes) -> None:
        for number in set(data) & _NUMBERS:
            # From the C handler. If the main thread never comes to run ours, this is all that we
            # shall hear; ours counts and decides, a moment later.
            if number in self._stops:
                self._light(self._stops[signal.Signals(number)], signal.Signals(number).name)
        while self._notes:
            self._note(self._notes.popleft())
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.obey, idempotent=True)

    def _note(self, note: int | Stop | StopPlan) -> None:
        if isinstance(note, Stop):
            self._light(note.reason, note.by)
            return
        if isinstance(note, StopPlan):
            self._set_last_line()
            return
        number = signal.Signals(note)
        if number is signal.SIGUSR2:
            self._shows += 1
            self._show_by = time.monotonic() + NOTICE_AFTER
            return
        if number not in self._stops:
            self._reloads += 1
            return
        self._interrupts += number is signal.SIGINT
        self._light(self._stops[number], number.name)

    def _light(self, reason: ResumeReason, by: str) -> None:
        stop = self._stop or Stop(reason, by)
        self._stop = attrs.evolve(stop, now=self._interrupts >= 2)
        if self._fuse.light(time.monotonic()):
            self._set_last_line()

    def _set_last_line(self) -> None:
        if self._fuse.lit_at is None:
            return
        # The C thread needs no interpreter, and cannot be told the exit code: 1. Where there is no
        # room for one more thread, the desk itself is the last line.
        with suppress(RuntimeError, MemoryError):
            faulthandler.dump_traceback_later(
                max(0.1, self.time_left), exit=True, file=self._stderr
            )

    def _act(self, now: float) -> None:
        if self._interrupts >= 3:
            self._leave(EXIT_INTERRUPTED, "interrupted three times")
        if self._leave_by is not None and now >= self._leave_by[0]:
            self._leave(self._leave_by[1], "something keeps the process from ending by itself")
        if self._fuse.leave_at is not None and now >= self._fuse.leave_at:
            self._leave(self._code(), f"the stop's budget of {self._fuse.plan.budget:g} s is over")
        if self._fuse.mark_at is not None and now >= self._fuse.mark_at:
            self._fuse.marked = True  # not again, whatever comes of it, before the end
            self._mark(self._fuse.plan.mark)
        if self._show_by is not None and now >= self._show_by:
            self._show_anyway()

    def _show_anyway(self) -> None:
        self._show_by = None
        if self._shown < self._shows:
            self._shown = self._shows
            self._tell("the event loop does not answer; this is where the threads are\n")
            faulthandler.dump_traceback(self._stderr)

    def _code(self) -> int:
        restart = self._stop is not None and self._stop.reason is ResumeReason.RESTART
        return EXIT_RESTART if restart else EXIT_FAILURE

    def _mark(self, timeout: float) -> None:
        if self._house is None or self._stop is None:
            return
        count = self._house.mark(self._stop.reason, timeout)
        if count:
            self._tell(f"the event loop does not answer; {count} open turns are marked to resume\n")

    def _leave(self, code: int, why: str) -> None:
        """The end. What follows the markers is best effort, and cannot block."""
        try:
            self._mark(min(LEAVE_MARKING, self._fuse.plan.spare / 2))
            self._tell(f"{why}; leaving with exit code {code}\n")
            if self._house is not None:
                self._house.flush(self._fuse.plan.spare / 4)
        finally:
            os._exit(code)

    def _tell(self, text: str) -> None:
        """Write to standard error as much as there is room for; never wait for a reader."""
        write_some(self._stderr, f"trio-gateway: {text}".encode(errors="backslashreplace"))


def hangs_up(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a SIGHUP tells that a terminal is gone: this process has one, and no supervisor."""
    if environ.get("NOTIFY_SOCKET"):
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def write_some(fd: int, data: bytes) -> None:
    """Write as much of `data` as there is room for just now."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    with suppress(OSError):
        while data and poll.poll(0):
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]


def _unblocking(fd: int) -> int:
    """The same pipe or terminal opened once more, so that writing to it never blocks; `fd` itself
    where that is not possible, or where it is a file, which never blocks.

    The flag is not set on `fd`: that is shared with whoever started us.
    """
    with suppress(OSError):
        mode = os.fstat(fd).st_mode
        if sys.platform == "linux" and (stat.S_ISFIFO(mode) or os.isatty(fd)):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return fd
