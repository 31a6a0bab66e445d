"""`trio-gateway demo` is real, and says so truthfully."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

PATIENCE = 60.0


def demo(folder: Path, **env: str) -> subprocess.Popen[str]:
    """The demonstration as a process; its temporary files go into `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "trio_gateway", "demo"],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(story: str) -> list[int]:
    """The processes that it started."""
    return [int(pid) for pid in re.findall(r"started: process (\d+)", story)]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_c03_the_demo_kills_a_gateway_in_mid_drain_and_nothing_is_lost(tmp_path: Path) -> None:
    # What is configured for real gateways must not reach the demonstration's.
    (tmp_path / "gateway.toml").write_text('[log]\nlevel = "critical"\n')
    process = demo(tmp_path, TRIO_GATEWAY_DRAIN__BUDGET="1s")
    story, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, story + errors
    assert errors == ""
    live, timeline, account = re.split(r"\nfrom the store.*:\n|\nso:\n", story)

    assert "has marked 3 turns to resume" in live
    marked, answered, killed = (
        live.index(what) for what in ("has marked", "answers short", "SIGKILL")
    )
    assert marked < answered < killed
    assert "the store   long is RESUME_PENDING: shutdown" in live
    assert "the store   stuck is RESUME_PENDING: shutdown" in live
    assert "short is" not in live
    assert "left with exit code 0" in live

    again = re.findall(r"(\w+) +turn RUNNING again", timeline)
    assert sorted(again) == ["long", "stuck"]
    rows = {line.split()[0]: line for line in account.splitlines() if line[:1].islower()}
    assert re.search(r"settled +gateway 1 +1 +3 ", rows["short"])
    assert re.search(r"RESUME_PENDING \(shutdown\) +gateway 2 +2 +\d \+ \d ", rows["long"])
    done = re.search(r"(\d) \+ (\d)", rows["long"])
    assert done is not None
    assert int(done[1]) + int(done[2]) == 8
    assert account.rstrip().endswith("three messages, three answers: none lost, none twice")

    assert len(processes_of(story)) == 2
    assert not any(map(is_alive, processes_of(story)))
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.toml"]


def test_a_demo_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    process = demo(tmp_path)
    assert process.stdout is not None
    story = ""
    while "SIGTERM" not in story:
        line = process.stdout.readline()
        assert line
        story += line
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert errors == "trio-gateway: stopped by SIGTERM\n"
    assert not any(map(is_alive, processes_of(story)))
    assert list(tmp_path.iterdir()) == []
