"""Scenarios of a machine that plays with time: processes that are stopped or frozen, clocks that
jump.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from signal import SIGCONT, SIGSTOP, SIGTERM
from typing import Final

from ._limits import WallClock, freezer_group, other_uptime, wall_clock
from ._platform import PATIENCE, environment, open_turns, rows
from ._process import COMMAND, Process, started
from ._report import Size
from ._scene import Scene
from ._sweeps import same_gateway

HOUR: Final = 3600
YEARS: Final = 10 * 365 * 24 * HOUR

# ----- stopped and frozen


def stopped(scene: Scene) -> None:
    """The process is stopped for a while (Ctrl-Z, a debugger): nobody else gets its store, and it
    goes on as if nothing had been."""
    with started(scene.platform) as gateway:
        scene.feed(gateway, 40)
        scene.platform.wait_accepted()
        gateway.signal(SIGSTOP)
        _stands_still(scene, gateway)
        gateway.signal(SIGCONT)
        scene.platform.wait_answered()
        assert gateway.stop() == 0, gateway.story
    scene.finish()
    assert not scene.figures["resumed_crash"] + scene.figures["resumed_shutdown"], scene.figures


def frozen(scene: Scene) -> None:
    """Its whole control group is frozen, and it is told to stop meanwhile: it does, once it is
    thawed."""
    with freezer_group() as group, started(scene.platform, inside=group.inside) as gateway:
        scene.feed(gateway, 40)
        scene.open_long_turns(gateway, 10)
        group.freeze()
        try:
            _stands_still(scene, gateway)
            gateway.signal(SIGTERM)
            time.sleep(0.1)
            assert gateway.alive
        finally:
            group.thaw()
        assert gateway.wait() == 0, gateway.story
        scene.seen.append("a process that was frozen")
    assert set(open_turns(scene.platform.store).values()) == {"shutdown"}
    scene.finish()
    assert scene.figures["resumed_shutdown"] >= 10, scene.figures


def _stands_still(scene: Scene, gateway: Process) -> None:
    """While it does not run: messages pile up, others may read its store, none may have it."""
    still = {Size.QUICK: 0.5, Size.CI: 5.0, Size.LONG: 60.0}[scene.size]
    heard = len(scene.platform.events)
    deadline = time.monotonic() + still
    for _ in range(3):
        second = _second_gateway(scene)
        assert second.returncode == 1, second
        assert f"in use by process {gateway.pid}" in second.stderr, second
        assert not second.stdout, second
        scene.feed(gateway, 5)
    scene.seen.append("a second gateway refused, naming the first")
    reader = [sys.executable, "-m", "trio_gateway", "sessions", "list", "--json"]
    listing = _run(scene, [*reader, "--store", str(scene.platform.store)])
    assert listing.returncode == 0, listing
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(1.0, left))
        scene.feed(gateway, 5)
    # What it had written before it stood still is heard a moment later.
    assert len(scene.platform.events) - heard < 200, "it went on"
    assert gateway.alive


def _second_gateway(scene: Scene) -> subprocess.CompletedProcess[str]:
    return _run(scene, [*COMMAND, "--store", str(scene.platform.store)])


def _run(scene: Scene, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=scene.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=same_gateway() | environment(scene.folder),
        timeout=PATIENCE,
        check=False,
    )


# ----- clocks


def clock_jumps(scene: Scene) -> None:
    """Somebody sets the wall clock while the gateway runs, an hour and ten years to and fro:
    nothing is lost, out of order, or taken for too old."""
    clock = wall_clock(scene.folder)
    jumps = [-HOUR, HOUR, YEARS, -YEARS]
    scene.dice.shuffle(jumps)
    for jump in jumps:
        with _living_by(clock, scene) as gateway:
            scene.feed(gateway, 30)
            scene.open_long_turns(gateway, 3)
            clock.set(jump)
            scene.feed(gateway, 30)
            scene.open_long_turns(gateway, 3)
            _clock_stands(scene, jump)
            scene.platform.wait_accepted()
            if scene.dice.random() < 0.5:
                gateway.kill()
            else:
                assert gateway.stop() == 0, gateway.story
    with _living_by(clock, scene):
        scene.platform.wait_answered()
    scene.finish()
    _none_expired(scene)


@contextmanager
def _living_by(clock: WallClock, scene: Scene, **more: str) -> Generator[Process]:
    """A life by that clock."""
    # Killed so often, an innocent turn may well be open at three crashes in a row.
    env = {**clock.env, "TRIO_GATEWAY_RESUME__MAX_CRASHES": "100", **more}
    with started(scene.platform, env=env) as gateway:
        try:
            yield gateway
        finally:
            gateway.close()
            clock.tidy_up(gateway.pid)


def _clock_stands(scene: Scene, jump: int) -> None:
    """Whether the process really lives in that time."""
    ((newest,),) = rows(
        scene.platform.store, "SELECT accepted_at FROM message ORDER BY seq DESC LIMIT 1"
    )
    off = newest / 1e6 - time.time() - jump
    assert abs(off) < PATIENCE, f"the clock was to jump by {jump} s, and is {off} s off that"
    scene.seen.append(f"a wall clock {jump:+d} s off")


def clock_jumps_between_lives(scene: Scene) -> None:
    """The clock is set while no gateway runs. What was interrupted a moment ago was interrupted a
    moment ago; and what really was too long ago stays so, whatever the clock says."""
    clock = wall_clock(scene.folder)
    for jump in (0, HOUR, -YEARS, YEARS, -HOUR):
        clock.set(jump)
        with _living_by(clock, scene) as gateway:
            scene.platform.wait_answered()
            scene.open_long_turns(gateway, 3)
            _clock_stands(scene, jump)
            if scene.dice.random() < 0.5:
                gateway.kill()
            else:
                assert gateway.stop() == 0, gateway.story
    with started(scene.platform):
        scene.platform.wait_answered()
    _none_expired(scene)
    _expires_by_real_time(scene)
    scene.finish()


def _expires_by_real_time(scene: Scene) -> None:
    """Two seconds are too long, although the clock says that an hour is still to come."""
    clock = wall_clock(scene.folder)
    late = f"m{len(scene.platform.sent)}"
    with _living_by(clock, scene) as gateway:
        scene.open_long_turns(gateway, 1)
        assert gateway.stop() == 0, gateway.story
    time.sleep(2.0)
    clock.set(-HOUR)
    with _living_by(clock, scene, TRIO_GATEWAY_RESUME__WITHIN="1s"):
        scene.platform.wait_answered()
    assert scene.state_of(late) == "expired"
    scene.excuse(late, "too late")
    scene.seen.append("a turn that really was too old")


def other_machine_times(scene: Scene) -> None:
    """Lives in containers that count the machine's uptime each in their own way."""
    inside = [(), other_uptime(YEARS // 10), (), other_uptime(YEARS), other_uptime(HOUR * 2)]
    for start in inside:
        with started(scene.platform, inside=start) as gateway:
            scene.platform.wait_answered()
            scene.open_long_turns(gateway, 3)
            if scene.dice.random() < 0.5:
                gateway.kill()
            else:
                assert gateway.stop() == 0, gateway.story
        scene.seen.append("a life in a time namespace" if start else "a life outside of one")
    scene.finish()
    _none_expired(scene)


def _none_expired(scene: Scene) -> None:
    expired = rows(scene.platform.store, "SELECT id, error FROM turn WHERE state = 'EXPIRED'")
    assert not expired, f"expired: {expired}"
