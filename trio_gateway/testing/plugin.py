"""Fixtures for pytest. Installing the package is enough: pytest finds them by itself.

    async def test_answers(open_test_gateway, memory_channel, autojump_clock):
        async with open_test_gateway(my_agent):
            await memory_channel.receive("ada", "m1", "hello")
            await memory_channel.wait_sent(1)
        async with open_test_gateway(my_agent):  # the next boot, on the same store
            assert memory_channel.texts() == ["hello to you, too"]

`pytest --gateway-seed 17` has every `lives` of the tests live that seed alone: to repeat a failure.

Async tests are pytest-trio's affair; its `autojump_clock` beside these fixtures makes time virtual,
so that an hour passes in no time. Without it everything works, in real time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from ._clock import VirtualClock
    from ._memory import MemoryChannel
    from ._opener import GatewayOpener

ONE_SEED: Final = "GATEWAY_TEST_SEED"
"""The variable in which `lives` finds the one seed to live; see `_lives`, which this file does not
import: a plugin is loaded by every pytest, also where nobody tests a gateway."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--gateway-seed`."""
    parser.addoption(
        "--gateway-seed", type=int, help="trio_gateway.testing.lives: live this seed alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Hand the seed to `lives`, which knows nothing of pytest."""
    seed: int | None = config.getoption("--gateway-seed")
    if seed is not None:
        os.environ[ONE_SEED] = str(seed)


def pytest_unconfigure() -> None:
    """What comes after these tests is none of them."""
    os.environ.pop(ONE_SEED, None)


@pytest.fixture
def gateway_store(tmp_path: Path) -> Path:
    """Where this test's store goes; nothing is there yet."""
    return tmp_path / "gateway.db"


@pytest.fixture
def virtual_clock() -> VirtualClock:
    """A clock for the gateway that follows Trio's, and whose wall clock can be made to jump."""
    from ._clock import VirtualClock

    return VirtualClock()


@pytest.fixture
def memory_channel() -> MemoryChannel:
    """A platform in memory. It outlives the gateways of the test, as a platform does."""
    from ._memory import MemoryChannel

    return MemoryChannel()


@pytest.fixture
def open_test_gateway(
    gateway_store: Path, virtual_clock: VirtualClock, memory_channel: MemoryChannel
) -> Iterator[GatewayOpener]:
    """Opens gateways on `gateway_store`, with `virtual_clock` and `memory_channel`: call it with
    the agent, and with whatever else `open_gateway` takes. Each call is a boot; after the test,
    the store's invariants are checked."""
    from ._invariants import check_invariants
    from ._opener import GatewayOpener

    yield GatewayOpener(
        store=gateway_store, clock=virtual_clock, channels=[memory_channel], inline_store=True
    )
    if gateway_store.exists():
        check_invariants(gateway_store)
