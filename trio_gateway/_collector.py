"""Python's cyclic garbage collector, set for a process that hosts thousands of turns.

A running turn is some sixty objects that live for as long as it takes and are then free at once,
without the collector. Left at its defaults, the collector walks all of them every few hundred
allocations to find nothing: measured, a third of the processor at 1,000 turns in flight and more
than half at 10,000. Only whoever owns the process may change that, so the host command does, and
the library does not.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 100_000
"""Allocations between two looks at the youngest objects (Python's default is 700)."""


def calm_collector() -> None:
    """Set what is loaded by now aside for good, and look less often."""
    gc.freeze()
    gc.set_threshold(YOUNG, 50, 100)
