"""The test bench: what this project's own tests use, for whoever writes an agent, a channel or a
store.

    kill_my_agent_anywhere   runs a scenario, dying before and after each of its commits
    lives                    runs an agent through seeded lives; finds the seed that breaks it
    Story, Fate              what an outsider saw of a seed, for a check of one's own
    Trouble, NO_TROUBLE      how often things go wrong in it
    live                     runs one life of a scenario, in a process of its own
    CrashPoints, die         dies at one commit of a store, or here
    World                    what outlives the process: the store, and what the world outside got
    MemoryChannel            a platform in memory: hand in messages, look at what was delivered
    VirtualClock             a clock that follows Trio's, so that an hour passes in no time
    GatewayOpener            opens gateways on one store, for tests of several boots
    check_invariants         what must be true of a store file, whatever happened; `violations`
                             lists what is not
    check_store              the contract of a store, as a suite
    check_channel            the contract of a channel, as a suite

Fixtures for pytest are in `trio_gateway.testing.plugin`; pytest finds them by itself.
"""

from ._check_channel import (
    CHANNEL_CHECKS,
    ChannelBench,
    MakeBench,
    MemoryIntake,
    check_channel,
)
from ._check_store import STORE_CHECKS, OpenStore, check_store
from ._clock import VirtualClock
from ._crash import (
    CrashFailure,
    CrashPoint,
    CrashPoints,
    CrashReport,
    Life,
    LifeFailed,
    Scenario,
    die,
    every_crash_point,
    kill_my_agent_anywhere,
    live,
)
from ._invariants import check_invariants, violations
from ._lives import Fate, LivesFailure, LivesReport, Story, lives
from ._memory import MemoryChannel
from ._opener import GatewayOpener
from ._seeded import NO_TROUBLE, Trouble
from ._world import Arrived, SurvivingChannel, World

__all__ = [
    "CHANNEL_CHECKS",
    "NO_TROUBLE",
    "STORE_CHECKS",
    "Arrived",
    "ChannelBench",
    "CrashFailure",
    "CrashPoint",
    "CrashPoints",
    "CrashReport",
    "Fate",
    "GatewayOpener",
    "Life",
    "LifeFailed",
    "LivesFailure",
    "LivesReport",
    "MakeBench",
    "MemoryChannel",
    "MemoryIntake",
    "OpenStore",
    "Scenario",
    "Story",
    "SurvivingChannel",
    "Trouble",
    "VirtualClock",
    "World",
    "check_channel",
    "check_invariants",
    "check_store",
    "die",
    "every_crash_point",
    "kill_my_agent_anywhere",
    "live",
    "lives",
    "violations",
]
