"""The test bench: what this project's own tests use, for whoever writes an agent, a channel or a
store.

    MemoryChannel   a platform in memory: hand in messages, look at what was delivered
    VirtualClock    a clock that follows Trio's, so that an hour passes in no time
"""

from ._clock import VirtualClock
from ._memory import MemoryChannel

__all__ = ["MemoryChannel", "VirtualClock"]
