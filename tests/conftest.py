"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Machine
from trio.testing import MockClock

MEMORY = Path("/dev/shm")


@pytest.fixture
def machine(tmp_path: Path, autojump_clock: MockClock) -> Iterator[Machine]:
    """A store of its own, on virtual time; in memory where the machine has such a place, because
    virtual time has no use for a disk that syncs."""
    if not os.access(MEMORY, os.W_OK):
        yield Machine(tmp_path)
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as where:
        yield Machine(Path(where))
