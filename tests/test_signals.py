"""The signal desk inside one process; `test_host.py` has the processes that it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from trio_gateway._events import DrainReport, MarkingFailed, StopRequested, TurnSettled, TurnsMarked
from trio_gateway._markers import ResumeReason, TurnState
from trio_gateway._messages import SessionKey
from trio_gateway._policy import StopPlan, plan_stop
from trio_gateway._signals import Fuse, SignalDesk, Stop, write_some
from trio_gateway._supervisor import Supervisor
from trio_gateway._tasktree import task_tree

LONG = plan_stop(grace=100, budget=200)


class NotingHouse:
    """A house that keeps what the desk asks of it."""

    def __init__(self) -> None:
        self.stops: list[Stop] = []
        self.reloads = 0
        self.marks: list[tuple[ResumeReason, float]] = []
        self.stopped = trio.Event()
        self.now = trio.Event()
        self.marked = threading.Event()

    def stop(self, stop: Stop) -> None:
        self.stops.append(stop)
        self.stopped.set()
        if stop.now:
            self.now.set()

    def reload(self) -> None:
        self.reloads += 1

    def show(self) -> str:
        return "the tasks\n"

    def mark(self, reason: ResumeReason, timeout: float) -> int | None:
        self.marks.append((reason, timeout))
        self.marked.set()
        return 1

    def flush(self, timeout: float) -> None:
        """There is no log."""


@contextmanager
def desk(plan: StopPlan = LONG) -> Generator[SignalDesk]:
    """A desk of this process. Its budget is long: the end of it would end the tests."""
    made = SignalDesk(plan)
    made.install()
    try:
        yield made
    finally:
        made.close()


async def bounded(event: trio.Event) -> None:
    with trio.fail_after(5):
        await event.wait()


# ----- the watchdog's clock


def test_the_fuse_derives_its_moments_from_one_budget() -> None:
    fuse = Fuse(plan_stop(grace=20, budget=30))
    assert fuse.mark_at is None
    assert fuse.leave_at is None
    assert fuse.light(now=100.0)
    assert fuse.mark_at == 101.0
    assert fuse.leave_at == 129.0
    assert fuse.ends_at == 130.0
    assert not fuse.light(now=110.0), "a second stop does not begin another budget"
    fuse.marked = True
    assert fuse.mark_at is None
    assert fuse.leave_at == 129.0


def test_a_short_budget_makes_the_watchdog_impatient() -> None:
    fuse = Fuse(plan_stop(budget=1))
    fuse.light(now=0.0)
    assert fuse.mark_at == pytest.approx(0.1)
    assert fuse.leave_at is not None
    assert 0.9 < fuse.leave_at < 1.0


# ----- signals reach the loop


def test_a_signal_stops_the_house() -> None:
    house = NotingHouse()

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await bounded(house.stopped)

    with desk() as signals:
        signals.run(house, main)
    assert house.stops[0] == Stop(ResumeReason.SHUTDOWN, "SIGTERM")


def test_a_signal_before_the_house_is_remembered() -> None:
    house = NotingHouse()

    async def main() -> None:
        await bounded(house.stopped)

    with desk() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.run(house, main)
    assert house.stops[0] == Stop(ResumeReason.RESTART, "SIGUSR1")


def test_c47_the_first_reason_counts_and_the_second_interrupt_hurries() -> None:
    house = NotingHouse()

    async def main() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
            await trio.sleep(0.05)
        assert not house.now.is_set(), "TERM and one Ctrl-C: still in no hurry"
        os.kill(os.getpid(), signal.SIGINT)
        await bounded(house.now)

    with desk() as signals:
        signals.run(house, main)
    assert {stop.reason for stop in house.stops} == {ResumeReason.SHUTDOWN}
    assert {stop.by for stop in house.stops} == {"SIGTERM"}


def test_a_signal_that_another_thread_gets_wakes_the_loop() -> None:
    """The kernel may give it to any thread; then nothing interrupts the main one's epoll."""
    house = NotingHouse()

    async def main() -> None:
        aim = threading.Timer(0.1, lambda: signal.pthread_kill(aim_at.ident or 0, signal.SIGTERM))
        aim_at = threading.Thread(target=time.sleep, args=(10,), daemon=True)
        aim_at.start()
        aim.start()
        await bounded(house.stopped)
        assert aim_at.is_alive()

    with desk() as signals:
        signals.run(house, main)


def test_ctrl_c_is_the_desks_and_not_a_keyboard_interrupt() -> None:
    house = NotingHouse()

    async def main() -> None:
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # noqa: ASYNC251 - a KeyboardInterrupt would come right here
        await bounded(house.stopped)

    with desk() as signals:
        signals.run(house, main)


def test_the_signals_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with desk() as signals:
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        assert signals.asked is None
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with desk():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_usr2_shows_the_tasks(capfd: pytest.CaptureFixture[str]) -> None:
    house = NotingHouse()

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        await trio.sleep(0.2)
        assert not house.stops

    with desk() as signals:
        signals.run(house, main)
    assert "trio-gateway: the tasks\n" in capfd.readouterr().err


# ----- the watchdog


def test_c46_a_loop_that_does_not_take_the_stop_up_is_marked_without_it() -> None:
    house = NotingHouse()

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert house.marked.wait(5), "the loop is blocked here; only the desk can act"

    with desk(plan_stop(grace=100, budget=200)) as signals:
        signals.run(house, main)
    assert house.marks == [(ResumeReason.RESTART, 2.0)]


def test_a_loop_that_marks_is_left_alone() -> None:
    house = NotingHouse()

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await bounded(house.stopped)
        signals.marked()
        await trio.sleep(1.3)

    with desk() as signals:
        signals.run(house, main)
    assert house.marks == []


def test_a_stop_without_a_signal_is_timed_too() -> None:
    house = NotingHouse()

    async def main() -> None:
        assert signals.time_left == LONG.budget
        signals.arm(ResumeReason.RESTART, "turn 1")
        assert house.marked.wait(5)
        assert signals.time_left < LONG.budget

    with desk() as signals:
        signals.run(house, main)
    assert house.marks[0][0] is ResumeReason.RESTART


def test_p11_a_desk_that_stumbles_keeps_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for one more thread, no memory: the stop is timed all the same, to its very end."""

    class PoorHouse(NotingHouse):
        def mark(self, reason: ResumeReason, timeout: float) -> int | None:
            super().mark(reason, timeout)
            raise MemoryError

    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("unable to start watchdog thread")

    def leave(code: int) -> None:
        left.append(code)
        gone.set()
        signals._fuse.lit_at = None  # so that the desk, which is not gone, does not leave again

    left: list[int] = []
    gone = threading.Event()
    monkeypatch.setattr("faulthandler.dump_traceback_later", no_thread)
    monkeypatch.setattr(os, "_exit", leave)
    house = PoorHouse()
    with desk(plan_stop(grace=0.2, budget=0.6)) as signals:

        async def main() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert gone.wait(5), "the loop is blocked here; only the desk can act"

        signals.run(house, main)
    assert left == [1]
    assert len(house.marks) == 2


def test_the_plan_may_come_late() -> None:
    with desk() as signals:
        signals.arm(ResumeReason.SHUTDOWN, "a test")
        time.sleep(0.1)
        signals.use_plan(plan_stop(grace=300, budget=400))
        assert 390 < signals.time_left < 400


def test_a_full_pipe_is_not_waited_for() -> None:
    read_fd, write_fd = os.pipe()
    try:
        began = time.monotonic()
        write_some(write_fd, b"x" * 1_000_000)
        assert time.monotonic() - began < 10
        assert len(os.read(read_fd, 1 << 20)) >= 4096
        os.close(read_fd)
        write_some(write_fd, b"nobody reads this")
    finally:
        os.close(write_fd)


# ----- the task tree


async def test_the_task_tree_says_where_each_task_waits() -> None:
    async def waits_for_ever() -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits_for_ever, name="patience")
        await trio.testing.wait_all_tasks_blocked()
        tree = task_tree()
        nursery.cancel_scope.cancel()
    (line,) = (line for line in tree.splitlines() if "patience" in line)
    assert "waits_for_ever (" in line
    assert Path(__file__).name in line


# ----- the supervisor's socket


WHO = SessionKey("local", "a")
SETTLED = TurnSettled(session=WHO, turn=1, attempt=1, state=TurnState.COMPLETED)
REQUESTED = StopRequested(reason=ResumeReason.SHUTDOWN, by="a test")
REPORT = DrainReport(
    reason=ResumeReason.SHUTDOWN,
    settled=(1,),
    interrupted=(),
    unresponsive=(),
    marked=1,
    timed_out=False,
    undelivered=0,
    phases={},
)


@contextmanager
def supervised(address: str) -> Generator[tuple[Supervisor, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        server.setblocking(False)
        yield Supervisor({"NOTIFY_SOCKET": address}), server


def heard(server: socket.socket) -> list[str]:
    told: list[str] = []
    try:
        while True:
            told.append(server.recv(4096).decode())
    except BlockingIOError:
        return told


def test_stopping_is_told_after_marking_and_once(tmp_path: Path) -> None:
    with supervised(str(tmp_path / "notify")) as (supervisor, server):
        supervisor.ready()
        supervisor.hear(REQUESTED, lambda: 5.0)
        assert heard(server) == ["READY=1\nSTATUS=serving"]
        supervisor.hear(TurnsMarked(count=3, seconds=0.1), lambda: 5.0)
        supervisor.hear(REPORT, lambda: 5.0)
        assert heard(server) == ["STOPPING=1\nSTATUS=draining 3 turns"]


def test_stopping_is_told_when_marking_failed(tmp_path: Path) -> None:
    with supervised(str(tmp_path / "notify")) as (supervisor, server):
        supervisor.hear(MarkingFailed(error="the disk is full"), lambda: 5.0)
        assert heard(server) == ["STOPPING=1\nSTATUS=stopping"]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_more_time_is_asked_for_only_while_turns_settle_in_a_stop() -> None:
    with supervised(f"@trio-gateway-{os.getpid()}") as (supervisor, server):
        supervisor.ready()
        heard(server)
        supervisor.hear(SETTLED, lambda: 5.0)
        assert heard(server) == []
        supervisor.hear(REQUESTED, lambda: 5.0)
        supervisor.hear(SETTLED, lambda: 4.25)
        assert heard(server) == ["EXTEND_TIMEOUT_USEC=4250000"]
