"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Machine
from trio.testing import MockClock

MEMORY = Path("/dev/shm")

# Whoever starts the tests may ignore signals (nohup, a shell's background): a process that a test
# starts would inherit that, and rightly heed it.
for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder like `tmp_path`; in memory where the machine has such a place, because neither
    virtual time nor a process that is killed has any use for a disk that syncs."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as where:
        yield Path(where)


@pytest.fixture
def machine(memory_path: Path, autojump_clock: MockClock) -> Machine:
    """A store of its own, on virtual time."""
    return Machine(memory_path)
