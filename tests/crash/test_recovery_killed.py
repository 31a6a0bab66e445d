"""Every commit crashed, and then every commit of the recovery, too."""

from __future__ import annotations

import pytest
from test_crash_points import check_errand, check_mixed_stop, errand, kill_anywhere, mixed_stop

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


def test_p05_a_mixed_stop_is_killed_anywhere_and_its_recovery_too() -> None:
    report = kill_anywhere(mixed_stop, check_mixed_stop, deaths=2)
    assert report.deaths > 300


def test_p08_says_steps_and_checkpoints_are_killed_anywhere_and_their_recovery_too() -> None:
    report = kill_anywhere(errand, check_errand, deaths=2)
    assert report.deaths > 300
