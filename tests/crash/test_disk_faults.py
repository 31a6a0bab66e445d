"""Each single operation of the disk, failing in each way."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty_disk import KINDS
from test_store_faults import sweep

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", KINDS)
def test_p01_p05_p06_p14_every_operation_of_the_disk_fails_and_nothing_is_lost_or_doubled(
    kind: str, memory_path: Path
) -> None:
    assert sweep(memory_path, kind, every=1) > 30
