"""Seeded lives: what they find, that a seed is a life, and that the model bites."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import trio
import trio._core._run as trios_own

from trio_gateway import Message, Settings, Turn
from trio_gateway.testing import NO_TROUBLE, LivesFailure, Story, Trouble, lives
from trio_gateway.testing._model import Model, Told
from trio_gateway.testing._schedule import schedule_by
from trio_gateway.testing._snapshot import MessageRow, Record, Snapshot, TurnRow

effects: Counter[int] = Counter()
"""The world outside: how often something happened for each turn."""


async def careless(turn: Turn) -> str:
    effects[turn.id] += 1
    await trio.sleep(1)
    return "done"


async def careful(turn: Turn) -> str:
    async def act() -> str:
        await trio.sleep(0.5)
        effects[turn.id] += 1
        return "done"

    # The world outside knows no keys: cut in the middle, the step is in doubt, and not repeated.
    return await turn.step(act, effect="unsafe")


def once(story: Story) -> None:
    assert set(effects.values()) <= {1}, "an effect happened twice"


# ----- what they find


def test_p08_a_careless_agent_is_found_out_and_its_seed_finds_it_again() -> None:
    with pytest.raises(LivesFailure, match="an effect happened twice") as found:
        lives(careless, seeds=200, check=once, workers=2)
    assert "life 2" in str(found.value)
    assert f"seeds=[{found.value.seed}]" in str(found.value)
    with pytest.raises(LivesFailure) as again:
        lives(careless, seeds=[found.value.seed], check=once)
    assert again.value.what == found.value.what
    assert not effects  # what a seed does to the world outside ends with the seed


def test_p08_a_careful_agent_passes() -> None:
    report = lives(careful, seeds=60, check=once, workers=2)
    assert report.figures["seeds"] == 60
    assert report.figures["deaths"] > 10
    assert report.seen["died with open turns"] > 5


def test_without_trouble_nobody_dies_and_everything_is_answered() -> None:
    def all_answered(story: Story) -> None:
        ends = {message.end for message in story.messages if message.text == "hello"}
        assert ends <= {"answered", "stopped", "expired"}
        for message in story.messages:
            if message.end == "answered":
                assert message.replies == ("done",)

    settings = Settings(grace=5.0)
    report = lives(
        careless, seeds=20, check=all_answered, settings=settings, trouble=NO_TROUBLE, workers=2
    )
    assert report.figures["deaths"] == 0 < report.figures["ends"]
    assert "disk_faults" not in report.figures


def test_an_agent_that_never_ends_is_told_of() -> None:
    async def stuck(turn: Turn) -> str:
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(LivesFailure, match="not idle"):
        lives(stuck, seeds=20, trouble=Trouble(deaths=False))


# ----- a seed is a life

TRACE = """
import json, sys, trio
from trio_gateway.testing._lives import Plan, explore
from trio_gateway.testing._seeded import Trouble

async def agent(turn):
    await trio.sleep(0.5)
    await turn.say("on it")
    await trio.sleep(0.5)
    return "done"

def check(story):
    raise AssertionError("to see the trace")

plan = Plan(agent, check, ("hello",), None, Trouble())
print(json.dumps([[o.trace, o.figures] for o in explore(plan, range(30), 2)]))
"""


def test_a_seed_is_the_same_in_every_process() -> None:
    """Whatever Python's own hashes are; the store's name in the keys is all that differs."""

    def lived(hash_seed: str) -> object:
        done = subprocess.run(
            [sys.executable, "-c", TRACE],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        return json.loads(re.sub(r"[0-9a-f]{8}-(?=\d|n-|c-)", "", done.stdout))

    assert lived("1") == lived("2")


def test_pytest_repeats_one_seed(tmp_path: Path) -> None:
    (tmp_path / "test_agent.py").write_text(
        """
import trio
from trio_gateway.testing import lives

async def agent(turn):
    await trio.sleep(1)
    return "done"

def test_agent():
    report = lives(agent, seeds=1000)
    assert report.figures["seeds"] == 1
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--gateway-seed", "17"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout


def test_a_trio_that_cannot_be_seeded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trios_own, "_ALLOW_DETERMINISTIC_SCHEDULING")
    with pytest.raises(RuntimeError, match="schedule by a seed"):
        schedule_by(1)


# ----- used wrongly


async def test_lives_inside_a_trio_run_are_refused() -> None:
    with pytest.raises(RuntimeError, match="plain"):
        lives(careful, seeds=1)


def test_a_plain_agent_is_refused() -> None:
    def plain(turn: Turn) -> str:
        return "no"

    with pytest.raises(TypeError, match="async function"):
        lives(plain, seeds=1)  # type: ignore[arg-type]


# ----- the model bites


def turn(state: str, **more: object) -> TurnRow:
    fields: dict[str, object] = {
        "id": 1, "session": 1, "state": state, "attempt": 1, "epoch": 1,
        "reason": "shutdown" if state == "RESUME_PENDING" else None, "crashes": 0,
        "interruptions": 0, "retry_of": None, "restart_asked": 0,
    }  # fmt: skip
    return TurnRow(**{**fields, **more})  # type: ignore[arg-type]


def disk(*turns: TurnRow, epoch: int = 1, messages: tuple[MessageRow, ...] = ()) -> Snapshot:
    return Snapshot(
        epoch=epoch,
        turns={row.id: row for row in turns},
        messages={(row.channel, row.id): row for row in messages},
    )


def model_of(*commits: Snapshot, stop: str | None = None) -> Model:
    """A model in its first life that has seen these commits."""
    model = Model(Settings(), {"memory": True}, budget=10.0)
    model.begin_life(0.0, "machine")
    model.commit(disk(), 0.0)
    model.booted = True
    for commit in commits:
        if stop is not None and any(row.reason for row in commit.turns.values()):
            model.stop_at, model.stop_reason = 1.0, stop
        model.commit(commit, 1.0)
    return model


RUNNING = turn("RUNNING")
MARKED = turn("RESUME_PENDING", interruptions=1)

WRONG = {
    "promise 2": model_of(disk(RUNNING, turn("RUNNING", id=2))),
    "promise 4": model_of(
        disk(RUNNING, turn("RUNNING", id=2, session=2)),
        disk(MARKED, turn("RUNNING", id=2, session=2)),
        stop="shutdown",
    ),
    "promise 5": model_of(disk(RUNNING), disk(turn("COMPLETED")), disk(RUNNING)),
    "promise 6": model_of(
        disk(RUNNING),
        disk(turn("COMPLETED"), messages=(MessageRow(1, "memory", "m1", 1, "running", 1),)),
    ),
    "promise 9": model_of(
        disk(RUNNING),
        disk(turn("RESUME_PENDING", crashes=1, interruptions=1)),
        stop="shutdown",
    ),
}


@pytest.mark.parametrize("promise", WRONG)
def test_the_model_names_the_promise_that_is_broken(promise: str) -> None:
    assert any(line.startswith(f"{promise}:") for line in WRONG[promise].broken)


def test_the_model_is_content_with_a_planned_stop() -> None:
    model = model_of(disk(RUNNING), disk(MARKED), disk(turn("COMPLETED", interruptions=1)),
                     stop="shutdown")  # fmt: skip
    assert model.broken == []


def test_p01_the_model_notices_what_is_gone(tmp_path: Path) -> None:
    model = model_of()
    message = Message(session="a", id="m1", text="hello", channel="memory")
    model.accepted["memory", "m1"] = Told(message, 0.0, accepted=True)
    model.end_life(Record(), 2.0, died=True)
    assert model.broken == ["promise 1: message ('memory', 'm1') was accepted, and is not on disk"]
