"""The test bench: what this project's own tests use, for whoever writes an agent, a channel or a
store.

    MemoryChannel   a platform in memory: hand in messages, look at what was delivered
    VirtualClock    a clock that follows Trio's, so that an hour passes in no time
    check_invariants    what must be true of a store file, whatever happened
"""

from ._clock import VirtualClock
from ._invariants import check_invariants, violations
from ._memory import MemoryChannel
from ._opener import GatewayOpener

__all__ = [
    "GatewayOpener",
    "MemoryChannel",
    "VirtualClock",
    "check_invariants",
    "violations",
]
