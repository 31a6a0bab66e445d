"""What a supervisor is told: pings, a status, and time for a start that gets further."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
from processes import ECHO, launch
from trio.testing import wait_all_tasks_blocked

from trio_gateway import SessionKey
from trio_gateway._errors import StoreError, StoreFull
from trio_gateway._events import Event, GatewayStarted, MessageRefused, StopRequested, TurnSettled
from trio_gateway._markers import ResumeReason, TurnState
from trio_gateway._supervisor import (
    START_STEP,
    STATUS_EVERY,
    Supervisor,
    status_of,
    watchdog_interval,
)

WHO = SessionKey("local", "a")
SETTLED = TurnSettled(session=WHO, turn=1, attempt=1, state=TurnState.EXPIRED)
ANY = MessageRefused(session=WHO, message_id="m", reason="full")
STARTED = GatewayStarted(
    epoch=1, previous_stop=None, resuming=2, quarantined=0, expired=0, waiting=0, undelivered=0
)


class Heard:
    """The socket at which a supervisor listens."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def __call__(self) -> list[str]:
        """What it was told since the last call."""
        told: list[str] = []
        with suppress(BlockingIOError):
            while True:
                told.append(self._socket.recv(4096).decode())
        return told

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


@contextmanager
def supervised(where: Path, **environ: str) -> Generator[tuple[Supervisor, Heard]]:
    heard = Heard(where / "notify")
    try:
        yield Supervisor({"NOTIFY_SOCKET": str(where / "notify"), **environ}), heard
    finally:
        heard.close()


def no_time_left() -> float:
    """For what does not ask."""
    raise AssertionError("asked for the time that is left")


# ----- the start


def test_a_start_that_gets_further_is_given_more_time(tmp_path: Path) -> None:
    more = f"EXTEND_TIMEOUT_USEC={START_STEP * 1e6:.0f}"
    with supervised(tmp_path) as (supervisor, heard):
        supervisor.starting()
        assert heard() == [f"STATUS=opening the store\n{more}"]
        supervisor.hear(SETTLED, no_time_left)
        assert heard() == [more]
        supervisor.hear(ANY, no_time_left)
        assert heard() == []
        supervisor.hear(STARTED, no_time_left)
        assert heard() == [f"STATUS=resuming 2 turns\n{more}"]
        supervisor.ready()
        heard()
        supervisor.hear(SETTLED, no_time_left)
        assert heard() == []


# ----- the watchdog


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.25),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
    ],
)
def test_pings_come_at_half_of_what_the_watchdog_waits(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_interval(environ) == seconds


class Disk:
    """A store that takes writes, or what it is set to."""

    def __init__(self) -> None:
        self.error: StoreError | None = None
        self.hangs = False
        self.complaints: list[StoreError] = []

    async def touch(self) -> None:
        """Write."""
        await trio.lowlevel.checkpoint()
        if self.hangs:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error


@pytest.fixture(name="disk")
def _disk() -> Disk:
    return Disk()


async def pings_in(seconds: float, disk: Disk, where: Path) -> int:
    """How often a watchdog of 10 s is pinged in so many seconds."""
    with supervised(where, WATCHDOG_USEC="10000000") as (supervisor, heard):
        with trio.move_on_after(seconds):
            await supervisor.keep_alive(disk.touch, disk.complaints.append)
        told = heard()
    (where / "notify").unlink()
    assert set(told) <= {"WATCHDOG=1"}
    return len(told)


async def test_the_watchdog_is_pinged_while_the_store_takes_writes(
    autojump_clock: trio.testing.MockClock, disk: Disk, tmp_path: Path
) -> None:
    assert await pings_in(99, disk, tmp_path) == 20
    disk.hangs = True
    assert await pings_in(99, disk, tmp_path) == 0
    assert disk.complaints == []


async def test_a_store_that_fails_gives_no_sign_of_life_and_is_told_once(
    autojump_clock: trio.testing.MockClock, disk: Disk, tmp_path: Path
) -> None:
    disk.error = StoreError("the disk failed")
    assert await pings_in(99, disk, tmp_path) == 0
    assert disk.complaints == [disk.error]


async def test_a_full_disk_is_no_reason_to_be_killed(
    autojump_clock: trio.testing.MockClock, disk: Disk, tmp_path: Path
) -> None:
    """A new start would have no more room, and the turns that ran would be charged with it."""
    disk.error = StoreFull("the disk is full")
    assert await pings_in(99, disk, tmp_path) == 20
    assert disk.complaints == []


async def test_without_a_watchdog_nothing_is_written(tmp_path: Path, disk: Disk) -> None:
    disk.error = StoreError("touched")
    with supervised(tmp_path) as (supervisor, heard):
        await supervisor.keep_alive(disk.touch, disk.complaints.append)
        assert heard() == []
    await Supervisor({"WATCHDOG_USEC": "1000000"}).keep_alive(disk.touch, disk.complaints.append)
    assert disk.complaints == []


# ----- the status


async def test_the_status_follows_what_happens_at_a_modest_rate(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    events = iter(range(1000))
    hear: Callable[[Event], None]
    with supervised(tmp_path) as (supervisor, heard):

        def hear(event: Event) -> None:
            supervisor.hear(event, no_time_left)

        supervisor.ready()
        heard()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.keep_status, lambda: f"event {next(events)}")
            await wait_all_tasks_blocked()
            assert heard() == []
            began = trio.current_time()
            while trio.current_time() < began + 10 * STATUS_EVERY - 0.1:
                hear(ANY)
                await trio.sleep(0.1)
            assert heard() == [f"STATUS=event {n}" for n in range(10)]
            await trio.sleep(100)  # what came last is told, and then nothing more
            assert len(heard()) <= 1
            nursery.cancel_scope.cancel()
        supervisor.interject("blocked by turn 1")
        supervisor.go_on()
        assert heard() == ["STATUS=blocked by turn 1", "STATUS=event 10"]


async def test_a_status_that_is_the_same_is_not_told_again(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    with supervised(tmp_path) as (supervisor, heard):
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.keep_status, lambda: "the same")
                while True:
                    supervisor.hear(
                        StopRequested(reason=ResumeReason.SHUTDOWN, by="x"), no_time_left
                    )
                    await trio.sleep(1)
        assert heard() == ["STATUS=the same"]


def test_a_status_says_what_is_open() -> None:
    counts = {"turns_running": 3, "messages_open": 5, "undelivered": 0}
    assert status_of("serving", counts) == (
        "serving: turns running 3, messages open 5, replies on their way 0"
    )


# ----- a real process


def test_p11_a_blocked_loop_gives_no_sign_of_life(tmp_path: Path) -> None:
    """It pings while it serves, not while a turn blocks it, and again afterwards; the status says
    which turn it is."""
    agent = """
        import time
        async def agent(turn):
            time.sleep(2.2)
            return "done"
        """
    heard = Heard(tmp_path / "notify")
    env = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    with launch(tmp_path, agent, env=env) as gateway:
        time.sleep(1)
        assert heard().count("WATCHDOG=1") >= 2
        gateway.send("a", "m1")
        stalled = gateway.expect_log("loop_stalled")
        told = heard()
        time.sleep(0.5)
        assert "WATCHDOG=1" not in heard()
        assert f"STATUS=blocked by {stalled['turn']}" in told
        gateway.expect("reply", text="done")
        time.sleep(0.5)
        assert "WATCHDOG=1" in heard()
        assert gateway.stop() == 0
    heard.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux has")
def test_a_start_under_a_limit_that_is_too_short_is_warned_of(tmp_path: Path) -> None:
    env = os.environ | {"TRIO_GATEWAY_STOP_LIMIT": "5s"}
    with launch(tmp_path, ECHO, budget=10, env=env) as gateway:
        record = gateway.expect_log("supervisor")
        assert record["level"] == "warning"
        assert "allows 5s for a stop, drain.budget is 10s" in record["warning"]
