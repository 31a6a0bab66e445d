"""Real processes under load, killed at random at least 300 times. Prints one line of JSON."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Final

import attrs
import pytest
from campaign import Campaign, Figures

pytestmark = [pytest.mark.crash, pytest.mark.timeout(1200)]

KILLS: Final = int(os.environ.get("CRASH_KILLS", "300"))
SEED: Final = int(os.environ.get("CRASH_SEED", "1"))
AT_ONCE: Final = 2


def test_p01_p02_p05_p06_p07_p08_killed_at_random_under_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two campaigns beside each other, on a store each."""
    figures: list[Figures] = []
    failures: list[BaseException] = []

    def run(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            figures.append(Campaign(folder, SEED + number).run(-(-KILLS // AT_ONCE)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    with capsys.disabled():
        print("\n" + json.dumps({"random_kills": total(figures), "seed": SEED}))
    assert total(figures)["kills"] >= KILLS


def total(figures: list[Figures]) -> dict[str, float]:
    """The sums; of the times, the longest."""
    names = [field.name for field in attrs.fields(Figures)]
    sums: dict[str, float] = {name: sum(getattr(f, name) for f in figures) for name in names}
    return sums | {"seconds": round(max(f.seconds for f in figures), 1)}
