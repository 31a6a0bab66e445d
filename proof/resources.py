"""What happens to a gateway whose machine runs out of something, or plays with it: the disk is
full, no file can be opened, memory is gone, the process is stopped or frozen, the clock jumps.

Each scenario is a story of the real command and of one store, at the end of which every message
that was ever sent must have been answered once, in order, and exactly what was interrupted must
have been resumed. Each also looks whether its fault was really met: one that was not is a failure.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Final

import attrs

from . import _pauses, _shortages
from ._platform import AGENT, Platform, furnish
from ._process import scratch_folder, told
from ._report import Campaign, Job, Skip
from ._scene import EXTRA, Scene
from ._sweeps import work_off

CAMPAIGN: Final = Campaign(
    name="resources",
    injects="full disks, no descriptors, no memory, stopped and frozen processes, jumping clocks",
    short="machines that run out, or play with time",
    promises=(1, 2, 4, 5, 6, 7, 9, 11, 14),
    counted="scenarios",
    must_see=(
        "a write that found no room",
        "a gateway that could open no file",
        "a process that found no memory",
        "a second gateway refused, naming the first",
    ),
)

SCENARIOS: Final[dict[str, Callable[[Scene], None]]] = {
    "stopped": _pauses.stopped,
    "no-more-bytes": _shortages.no_more_bytes,
    "no-fds": _shortages.no_fds,
    "no-fds-at-boot": _shortages.no_fds_at_boot,
    "no-memory": _shortages.no_memory,
    "full-in-load": _shortages.full_in_load,
    "full-at-marking": _shortages.full_at_marking,
    "full-at-boot": _shortages.full_at_boot,
    "full-log": _shortages.full_log,
    "full-from-the-beginning": _shortages.full_from_the_beginning,
    "out-of-memory": _shortages.out_of_memory,
    "poisoned": _shortages.poisoned,
    "frozen": _pauses.frozen,
    "clock-jumps": _pauses.clock_jumps,
    "clock-jumps-between-lives": _pauses.clock_jumps_between_lives,
    "other-machine-times": _pauses.other_machine_times,
}

CONFIG: Final = """
[drain]
grace = "500ms"
budget = "3s"

[log]
level = "info"
"""


@attrs.frozen
class Outcome:
    """What came of one scenario."""

    scene: Scene
    failure: str | None = None
    skipped: str | None = None


def run(job: Job) -> None:
    """Each scenario, so many times; two beside each other."""
    if job.only is not None:
        points = [job.only]
    else:
        names = list(SCENARIOS)[: job.amount(2, len(SCENARIOS), len(SCENARIOS))]
        times = job.amount(1, 1, 3)
        points = [f"{name}/{number}" for number in range(times) for name in names]
    work_off(points, range(job.jobs), partial(_play, job), partial(_note, job))
    if job.report.figures["scenarios"] == 0:
        raise Skip("this machine has the means for none of the scenarios")


def _play(job: Job, hand: int, point: str) -> Outcome:
    """One scenario, in a folder of its own."""
    scenario = SCENARIOS[point.partition("/")[0]]
    dice = random.Random(f"{job.seed} {point}")
    with scratch_folder() as folder:
        furnish(folder, CONFIG, AGENT + EXTRA)
        scene = Scene(folder, job.size, dice, Platform(folder, dice))
        try:
            scenario(scene)
        except Skip as skip:
            return Outcome(scene, skipped=str(skip))
        except Exception as error:
            return Outcome(scene, failure=told(error))
    return Outcome(scene)


def _note(job: Job, point: str, outcome: Outcome) -> None:
    if outcome.skipped is not None:
        print(f"SKIPPED resources {point}: {outcome.skipped}", file=sys.stderr, flush=True)
        job.report.count(scenarios_skipped=1)
        job.report.saw(f"skipped {point}: {outcome.skipped}")
        return
    job.report.count(scenarios=1, **outcome.scene.figures)
    job.report.saw(*outcome.scene.seen)
    if outcome.failure is not None:
        job.report.fail(point, outcome.failure)
