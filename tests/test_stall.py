"""A blocked event loop is told while it is blocked: which turn it is, and where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from processes import launch

from trio_gateway import _stall
from trio_gateway._stall import Stall, running_task, watching_for_stalls

SECRET = "hunter2-hunter2"


class Told:
    """What was told, by a watch that is quicker than a real one."""

    def __init__(self) -> None:
        self.stalls: list[Stall] = []
        self.lengths: list[float] = []
        self.began = threading.Event()
        self.over = threading.Event()

    def stalled(self, stall: Stall) -> None:
        """A stall began."""
        self.stalls.append(stall)
        self.began.set()

    def goes_on(self, seconds: float) -> None:
        """It is over."""
        self.lengths.append(seconds)
        self.over.set()


@pytest.fixture(name="told")
def _told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(_stall, "ASK_EVERY", 0.02)
    monkeypatch.setattr(_stall, "STALL_AFTER", 0.1)
    return Told()


def block(told: Told) -> None:
    """Block until the watch has said so."""
    password = SECRET
    assert told.began.wait(10), password
    told.began.clear()
    time.sleep(0.05)


def block_for(seconds: float) -> None:
    """Block, whoever notices."""
    time.sleep(seconds)


async def a_part_of_a_turn(told: Told) -> None:
    """What an agent's own nursery runs."""
    await trio.lowlevel.checkpoint()
    block(told)


async def a_turn(told: Told, work: Callable[[Told], object] | None = None) -> None:
    """Looks like the task of one."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0.1, name="another part")
        nursery.start_soon(a_part_of_a_turn, told)


async def blocked_by_a_turn(told: Told) -> None:
    """A loop with many tasks, one of which blocks it."""
    with watching_for_stalls(told.stalled, told.goes_on):
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(trio.sleep, 0.2, name=f"turn {n} (local:idle)")
            nursery.start_soon(a_turn, told, name="turn 77 (local:ada)")
        assert await trio.to_thread.run_sync(told.over.wait, 10)


async def test_a_blocking_turn_is_named_while_it_blocks(told: Told) -> None:
    await blocked_by_a_turn(told)
    (stall,) = told.stalls
    assert stall.turn == "turn 77 (local:ada)"
    assert stall.task is not None
    assert stall.task.endswith("a_part_of_a_turn")
    here = [place for place in stall.stack if Path(__file__).name in place]
    assert [place.rpartition(" in ")[2] for place in here] == ["a_part_of_a_turn", "block"]
    assert stall.untold == 0
    (seconds,) = told.lengths
    assert 0.1 < seconds < 10


async def test_no_value_is_told(told: Told) -> None:
    await blocked_by_a_turn(told)
    assert SECRET not in repr(told.stalls)


async def test_stalls_that_come_one_after_the_other_are_counted(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stall, "TELL_EVERY", 1.5)
    with watching_for_stalls(told.stalled, told.goes_on):
        block(told)
        began = time.monotonic()
        for _ in range(2):
            await trio.sleep(0.1)
            block_for(0.3)
        await trio.sleep(max(0.1, began + 1.6 - time.monotonic()))
        block(told)
        await trio.sleep(0.1)
    assert [stall.untold for stall in told.stalls] == [0, 2]
    assert len(told.lengths) == 2
    assert told.stalls[0].turn is None


async def test_a_loop_that_goes_on_is_not_stalled(told: Told) -> None:
    with watching_for_stalls(told.stalled, told.goes_on):
        await trio.sleep(0.4)
    assert told.stalls == []


async def test_the_end_waits_for_nobody(told: Told) -> None:
    before = threading.active_count()
    with watching_for_stalls(told.stalled, told.goes_on):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


async def test_the_running_task_is_found() -> None:
    assert running_task(trio.lowlevel.current_root_task()) is trio.lowlevel.current_task()
    assert running_task(None) is None


async def test_without_room_for_a_thread_nobody_watches(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with watching_for_stalls(told.stalled, told.goes_on):
        await trio.lowlevel.checkpoint()


def test_the_log_of_a_real_gateway_names_the_turn(tmp_path: Path) -> None:
    agent = """
        import time
        def think(password):
            time.sleep(1.8)
        async def agent(turn):
            think("hunter2-hunter2")
            return "done"
        """
    with launch(tmp_path, agent) as gateway:
        gateway.send("ada", "m1")
        record = gateway.expect_log("loop_stalled")
        assert not [event for event in gateway.events if event["event"] == "reply"]
        assert record["level"] == "error"
        assert record["turn"].startswith("turn 1 (")
        assert "ada" in record["turn"]
        assert record["stack"][-1].endswith(" in think")
        assert record["stack"][-2].endswith(" in agent")
        gateway.expect("reply", text="done")
        assert 1 < gateway.expect_log("loop_goes_on")["blocked_for"] < 10
        assert SECRET not in gateway.stderr
        assert gateway.stop() == 0
