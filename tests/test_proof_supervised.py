"""The campaigns under real supervisors, a little of each; and that what adds them up notices
what is wrong."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from proof import supervisors, systemd
from proof._report import Skip
from proof._supervised import Life, Marker, Outcome, Supervised, check_lives, deal, played
from proof._systemd import check_machine


def test_p05_a_stop_by_a_real_systemd_that_kills_in_the_drain() -> None:
    try:
        check_machine()
        systemd.try_boot()
    except Skip as skip:
        pytest.skip(str(skip))
    outcome = played("0:1", lambda outcome: systemd.play_store(outcome, 0))
    assert outcome.failure is None, outcome.failure
    assert outcome.figures["cycles"] == outcome.figures["killed_in_drain"] == 1
    assert outcome.figures["resumed_shutdown"] >= 2


@pytest.mark.parametrize("kind", ["shell", "supervisord"])
def test_p05_other_supervisors(kind: str) -> None:
    try:
        supervisors.check_machine()
    except Skip as skip:
        pytest.skip(str(skip))
    if lacking := supervisors.lacks(kind):
        pytest.skip(lacking)
    outcome = played(f"{kind}:0:1", lambda outcome: supervisors.play_store(outcome, 0))
    assert outcome.failure is None, outcome.failure
    assert outcome.figures["cycles"] == 1
    assert outcome.figures["messages"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads what only Linux has")
def test_without_root_the_campaign_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Skip, match="sudo"):
        check_machine()


def test_the_unit_is_the_one_of_the_page() -> None:
    lines = systemd.documented_unit().splitlines()
    assert lines[0] == "[Unit]"
    assert {"[Service]", "Type=notify", "RestartForceExitStatus=75"} <= set(lines)
    assert not [line for line in lines if line and line[0] not in "[#" and "=" not in line]


def test_cycles_are_dealt_fairly_and_again_the_same() -> None:
    kinds = range(7)
    dealt = deal(kinds, 1, 0, 70)
    assert set(Counter(dealt).values()) == {10}
    assert dealt[20:30] == deal(kinds, 1, 20, 10)
    assert deal(kinds, 0, 0, 7) == list(kinds)
    assert dealt != deal(kinds, 2, 0, 70)


# ----- what adds up


def life(
    number: int,
    found: dict[int, Marker] | None = None,
    began: dict[int, tuple[int, str]] | None = None,
    *log: str,
) -> Life:
    records: list[dict[str, Any]] = [{"event": event} for event in ("gateway_started", *log)]
    return Life(number=number, found=found or {}, began=began or {}, log=records)


def marker(state: str = "RESUME_PENDING", reason: str = "shutdown", **more: int) -> Marker:
    return Marker(state=state, reason=reason, **{"attempt": 1, "crashes": 0, **more})


STOPPED = ("stop_requested", "turns_marked", "turn_settled")


def test_lives_that_are_right() -> None:
    figures = check_lives(
        [
            life(1, {}, {1: (1, "fresh"), 2: (1, "fresh")}, *STOPPED),
            life(2, {2: marker()}, {2: (2, "shutdown"), 3: (1, "fresh")}),
            life(3, {3: marker("RUNNING", "crash")}, {3: (2, "crash")}, *STOPPED),
            life(4, {3: marker(attempt=2, crashes=1)}, {3: (3, "shutdown")}),
        ],
        whole=True,
    )
    assert figures == {"lives": 4, "lives_marked": 2, "settled_in_drains": 2, "found_open": 3}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([life(1, {}, {7: (2, "shutdown")})], "resumed turn 7, which was not open"),
        ([life(1, {7: marker()}, {7: (1, "fresh")})], "began attempt 1"),
        ([life(1, {7: marker()}, {7: (3, "shutdown")})], "began attempt 3"),
        ([life(1, {7: marker()}, {7: (2, "crash")})], "crash"),
        ([life(1, {7: marker(), 8: marker()}, {7: (2, "shutdown")})], r"found \[7, 8\] open"),
        ([life(1, {}, {}, *STOPPED), life(2, {7: marker("RUNNING", "crash")})], "found running"),
        ([life(1, {7: marker()}), life(2, {7: marker(crashes=1)})], "was found"),
        ([life(1, {7: marker("RUNNING", "crash")}), life(2, {7: marker()})], "was found"),
    ],
)
def test_lives_that_are_not(wrong: list[Life], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_lives(wrong, whole=True)


def test_a_line_that_a_death_cut_off_is_dropped_and_no_other(tmp_path: Path) -> None:
    accepted = '{"event": "accepted", "session": "a", "id": "%s", "duplicate": false}\n'
    with Supervised(tmp_path, random.Random(0)) as gateway:
        os.mkfifo(tmp_path / "in.1")
        with (tmp_path / "out.jsonl").open("a") as out:
            out.write("\n#boot 1\n" + accepted % "m1" + accepted[:20])
            out.write("\n#died signal killed KILL\n" + accepted % "m2")
            out.flush()
            gateway.wait(lambda: gateway.platform.accepted == {"m1", "m2"}, "both")
            assert gateway.deaths == ["signal killed KILL"]
            out.write(accepted[:20] + "\n" + accepted % "m3")
            out.flush()
            with pytest.raises(AssertionError, match="neither JSON nor cut off"):
                gateway.wait(lambda: "m3" in gateway.platform.accepted, "a third")


def test_a_failure_is_part_of_what_came_of_a_point() -> None:
    def fall_over(outcome: Outcome) -> None:
        outcome.count(cycles=3)
        raise AssertionError("as it should")

    outcome = played("9:9", fall_over)
    assert outcome.figures == {"cycles": 3}
    assert "as it should" in (outcome.failure or "")
