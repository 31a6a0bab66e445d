"""The real command in a process of its own, on a disk that fails at one operation.

    python -m proof._faulty_command "eio for ever" 120 python -m trio_gateway run ...

puts the disk of `_disk.py` under the command that follows, and says `struck` on standard error
when it comes to the fault. What is looked at here is what only a process has: that it goes on or
leaves by itself, its exit code, and what its log says.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trio_gateway._cli import main as command

from ._disk import KINDS, Disk, Fault
from ._faulty_life import Point
from ._platform import Platform, furnish, wait_until
from ._process import Process, scratch_folder, started
from ._spread import Tally

_KINDS: Final = ("eio", "eio for ever", "full for ever", "sync for ever", "read for ever", "read")
_FIRST: Final = {"read": 30, "read for ever": 30, "sync for ever": 14}
"""From where to where the fault is put: those that are rare must be struck early."""

_BUDGET: Final = 4
_SLACK: Final = 6
"""Seconds: for a stop, and for a machine that has company."""

_CONFIG: Final = f"""
[drain]
grace = "700ms"
budget = "{_BUDGET}s"
"""

_TEXTS: Final = ("plain", "steps", "says", "sleep 1.5", "slow")
"""The fourth does not end within the grace."""

_ROOT: Final = Path(__file__).parent.parent


def point(number: int, dice: random.Random) -> Point:
    """One such life: a fault at boot, or while people write."""
    kind = _KINDS[number % len(_KINDS)]
    at = dice.randint(1, dice.choice((12, _FIRST.get(kind, 300))))
    return Point("command", number, kind, at, "on")


def try_one(point: Point, tally: Tally) -> None:
    """The faulty process, a good one after it, the account."""
    with scratch_folder() as folder:
        furnish(folder, _CONFIG)
        platform = Platform(folder, random.Random(str(point)))
        lines = [platform.new(f"s{number}", text) for number, text in enumerate(_TEXTS * 2)]
        inside = (sys.executable, "-m", __name__, point.kind, str(point.at))
        path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        with started(platform, inside=inside, env={"PYTHONPATH": path}, again=None) as gateway:
            _live(gateway, lines, point, tally)
        with started(platform) as gateway:
            platform.wait_accepted()
            gateway.end_input()
            assert gateway.wait() == 0, gateway.story
        figures = platform.account(forgiving=True)
        tally.count(command_messages=figures["messages"], command_repeats=figures["repeats"])


def _live(gateway: Process, lines: list[bytes], point: Point, tally: Tally) -> None:
    gateway.send(*lines)
    wait_until(lambda: _is_over(gateway), "the fault, or all that can be had without it")
    left = not gateway.alive
    began = time.monotonic()
    code = gateway.wait() if left else gateway.stop()
    assert time.monotonic() - began < _BUDGET + _SLACK, f"the stop was too long\n{gateway.story}"
    log = gateway.log()
    struck = log.count("struck ")
    tally.count(faults=int(bool(struck)), commands=1)
    records = list(_records(log))
    assert not any(r["event"] in ("host_failed", "gateway_failed") for r in records), log
    assert "Traceback" not in log, log
    if left:
        assert code == 1, f"left by itself with {code}\n{log}"
        told = [line for line in log.splitlines() if line.startswith("trio-gateway: ")]
        assert told, f"left, and did not say why\n{log}"
        assert all("gateway.db" in line for line in told), f"does not name the store: {told}"
        tally.saw("the command left with 1, and said why")
        return
    assert code == 0, f"was stopped, and left with {code}\n{log}"
    if any(record["event"] == "marking_failed" for record in records):
        tally.saw("a stop of the command could not mark")
    if struck:
        tally.saw("the command went on")


def _is_over(gateway: Process) -> bool:
    """It has left, or everything that does not last is answered, or it has said often enough that
    it cannot be."""
    platform = gateway.platform
    sleeping = {id for id, message in platform.sent.items() if "sleep" in message["text"]}
    log = gateway.log()
    return (
        not gateway.alive
        or platform.sent.keys() == platform.finals.keys() | sleeping
        or ("struck " in log and log.count('"level": "error"') > 3)
        or sum(event["event"] == "error" for event in platform.events) > 3
    )


def _records(log: str) -> Iterator[dict[str, Any]]:
    for line in log.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


# ----- in that process


def _run() -> int:
    kind, at, *rest = sys.argv[1:]
    assert kind in KINDS, kind
    words = rest[rest.index("trio_gateway") + 1 :]

    def struck(operation: str, file: str) -> None:
        os.write(2, f"struck {operation} {file}\n".encode())

    with Disk() as disk:
        disk.fault = Fault(kind, int(at), struck=struck)
        return command(words)


if __name__ == "__main__":
    sys.exit(_run())
