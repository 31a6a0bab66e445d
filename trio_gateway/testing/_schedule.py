"""One seed, one schedule: Trio's own dice, loaded.

Trio steps runnable tasks in an order of its own choosing. For tests it can be told to choose by a
seeded die, which is not part of its public interface (Hypothesis and pytest-trio use the same
switch): so it is used here and nowhere else, and its absence is said loudly.
"""

from __future__ import annotations

import random
from typing import Any

import trio
import trio._core._run as _run


def schedule_by(seed: int) -> None:
    """From here on, this process orders its tasks, and throws its dice, by `seed`.

    Every order that Trio could choose can come up. Threads and real I/O stay outside of it. Raises
    `RuntimeError` where this Trio does not have the switch.
    """
    trios: Any = _run
    if not hasattr(trios, "_ALLOW_DETERMINISTIC_SCHEDULING") or not hasattr(trios, "_r"):
        raise RuntimeError(
            f"Trio {trio.__version__} cannot be told to schedule by a seed: use the version that"
            " trio-gateway was released with"
        )
    trios._ALLOW_DETERMINISTIC_SCHEDULING = True
    trios._r.seed(seed)
    random.seed(seed)
